"""`das-synth speech` and `das-synth merge`.

    das-synth speech music.jsonl --output speech/music --voice rms
    das-synth speech music.jsonl --output part0 --shard 0/2
    das-synth merge speech/music part0 part1

Nothing is done here that `das_asr.training.speech` does not offer.
"""

from __future__ import annotations

from pathlib import Path

import click

from das_asr.runtime.console import Command, Shard

__all__ = ["merge", "speech"]

_SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True}
_FOLDER = click.Path(path_type=Path)
_ENGINES = "espeak-ng, flite, festival, pico, sherpa-onnx, openai, or command:LINE"


@click.command(cls=Command, context_settings=_SETTINGS)
@click.argument("sentences", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=_FOLDER, help="Folder to write, or one to go on with.")
@click.option("--domain", help="Domain of sentences that do not name theirs.")
@click.option("--engine", default="flite", help=f"One of {_ENGINES}; LINE may have {{text}} and {{output}}.")
@click.option(
    "--voice", "voices", multiple=True, help="Engine's name of a voice; several are drawn from.  [the engine's]"
)
@click.option("--speed", nargs=2, type=float, default=(1.0, 1.0), metavar="LO HI", help="Factor of the rate.")
@click.option("--pitch", nargs=2, type=float, default=(1.0, 1.0), metavar="LO HI", help="Factor of the pitch.")
@click.option("--noise-db", nargs=2, type=float, metavar="LO HI", help="Signal-to-noise ratio in dB.  [no noise]")
@click.option("--max-seconds", type=float, default=30.0, help="Longer audio fails.")
@click.option("--workers", type=int, help="Utterances spoken at a time.  [one per core]")
@click.option("--seed", type=int, default=0, help="Of voices, speeds, pitches and noise.")
@click.option("--shard", type=Shard(), default="0/1", help="Speak only the i-th of n parts, counted from 0.")
@click.option("--model", help="sherpa-onnx: folder of the voice model; openai: the endpoint's name of the model.")
@click.option("--base-url", help="openai: address of the endpoint.  [OPENAI_BASE_URL]")
@click.option("--quiet", is_flag=True, help="No progress.")
def speech(
    sentences: Path,
    output: Path,
    domain: str | None,
    engine: str,
    voices: tuple[str, ...],
    speed: tuple[float, float],
    pitch: tuple[float, float],
    noise_db: tuple[float, float] | None,
    max_seconds: float,
    workers: int | None,
    seed: int,
    shard: tuple[int, int],
    model: str | None,
    base_url: str | None,
    quiet: bool,
) -> None:
    """Speak SENTENCES (JSON Lines with text, or one sentence per line) into an AudioFolder of 16 kHz FLAC files.

    Started again after a stop, it goes on where it was. The key of an endpoint is taken from OPENAI_API_KEY.
    """
    from das_asr.training.speech.options import SpeechOptions
    from das_asr.training.speech.sentences import read_sentences
    from das_asr.training.speech.synthesis import synthesize

    name, _, line = engine.partition(":")
    options = SpeechOptions(
        engine=name,
        voices=(*voices, line) if line else voices,
        speed=speed,
        pitch=pitch,
        noise_db=noise_db,
        max_seconds=max_seconds,
        workers=workers,
        seed=seed,
        shard=shard,
        model=model,
        base_url=base_url,
    )
    report = synthesize(read_sentences(sentences, domain), options, output, quiet=quiet)
    reasons = "".join(f", {count} {reason}" for reason, count in report.failures.items())
    click.echo(
        f"{report.output}: {report.spoken + report.resumed} utterances, {report.total_seconds / 3600:.2f} h. "
        f"This run: {report.spoken} spoken, {report.failed} failed{reasons}; {report.audio_seconds:.0f} s of audio in "
        f"{report.wall_seconds:.0f} s, {report.times_real_time:.0f} times real time with {report.workers} workers."
    )


@click.command(cls=Command, context_settings=_SETTINGS)
@click.argument("output", type=_FOLDER)
@click.argument("shards", nargs=-1, required=True, type=_FOLDER)
def merge(output: Path, shards: tuple[Path, ...]) -> None:
    """Join the folders of all SHARDS of one run into OUTPUT, which is then what one run would have made."""
    from das_asr.training.speech.merge import merge_shards

    click.echo(f"{output}: {merge_shards(shards, output)} utterances.")
