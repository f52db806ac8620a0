"""`das-transcribe`: audio files to text with an exported bundle."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from das_asr.runtime.backends import BACKENDS
from das_asr.runtime.console import Command, NamedFolder
from das_asr.runtime.errors import DasError
from das_asr.runtime.options import AUDIO_CONTEXTS, SCORES, DecodingOptions
from das_asr.runtime.selection import HYPOTHESIS, RULES

if TYPE_CHECKING:
    from das_asr.runtime.results import Transcription
    from das_asr.runtime.transcriber import Transcriber

__all__ = ["colored_words", "main"]

_COLORS = ("green", "cyan", "magenta", "yellow", "blue", "red")


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("files", nargs=-1, required=True, type=click.Path())
@click.option("--bundle", required=True, type=click.Path(), help="Folder that das-export wrote.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Plain text, or one JSON object per line with everything known.",
)
@click.option("--provenance", is_flag=True, help="Show which adapter chose which word.")
@click.option("--language", help="Code or English name; detected if the model knows several.")
@click.option("--task", type=click.Choice(["transcribe", "translate"]), default="transcribe", show_default=True)
@click.option("--prompt", help="Text that came before, or words to expect.")
@click.option("--max-tokens", type=int, help="Longest transcription in tokens.")
@click.option("--adapters", help="Comma-separated names, by default all; auto:3 keeps the 3 most telling ones.")
@click.option("--max-active-rows", type=int, help="Rows that go on after --prune-after tokens, the base among them.")
@click.option("--prune-margin", type=float, help="Rows that are further behind the best stop; rule hypothesis.")
@click.option("--prune-after", type=int, help="Tokens after which rows are pruned; by default 8.")
@click.option(
    "--load-adapter",
    "loaded",
    multiple=True,
    type=NamedFolder(),
    help="Add a PEFT LoRA checkpoint as a further row.",
)
@click.option("--rule", type=click.Choice(RULES), help="How to choose among the rows; by default the bundle's.")
@click.option("--tau", type=float, help="Threshold of the rule in probability units.")
@click.option(
    "--score",
    type=click.Choice(SCORES),
    default="mean",
    show_default=True,
    help="How rule hypothesis scores a row's text.",
)
@click.option(
    "--switch-cost", type=float, help="Let rows take over inside a text: free where they agree, else at this."
)
@click.option("--base-bias", type=float, default=0.0, show_default=True, help="In favour of the base's text.")
@click.option(
    "--audio-context",
    type=click.Choice(AUDIO_CONTEXTS),
    default="window",
    show_default=True,
    help="What the encoder hears: the model's window, or the audio and a margin.",
)
@click.option("--audio-margin", type=float, default=1.0, show_default=True, help="Seconds behind the audio, for fit.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option(
    "--backend", type=click.Choice(BACKENDS), default="onnxruntime", show_default=True, help="All but this need a GPU."
)
@click.option(
    "--cuda-graphs/--no-cuda-graphs", default=False, show_default=True, help="On a GPU, record each step and repeat it."
)
@click.option("--allow-cpu-nodes", is_flag=True, help="On a GPU, accept that nodes fall back to another provider.")
@click.option("--threads", type=int, help="Threads; by default all cores.")
@click.option("--precision", help="Of the graphs; by default the bundle's first.")
@click.version_option(package_name="das-asr")
def main(
    files: Sequence[str],
    bundle: str,
    form: str,
    provenance: bool,
    loaded: Sequence[tuple[str, Path]],
    adapters: str | None,
    device: str,
    backend: str,
    cuda_graphs: bool,
    allow_cpu_nodes: bool,
    threads: int | None,
    precision: str | None,
    **choices: Any,
) -> None:
    """Transcribe FILES: wav, flac, ogg or mp3, at any rate and with any number of channels."""
    options = DecodingOptions(adapters=_chosen(adapters), **choices)
    from das_asr.runtime.transcriber import Transcriber  # after the options: a wrong one is told at once

    with Transcriber.load(
        bundle, device, threads, backend=backend, precision=precision, cuda_graphs=cuda_graphs,
        allow_cpu_nodes=allow_cpu_nodes,
    ) as transcriber:  # fmt: skip
        for name, directory in loaded:
            transcriber.load_adapter(name, directory)
        failed = 0
        for path, outcome in _transcribe_all(transcriber, files, options):
            if isinstance(outcome, DasError):
                failed += 1
                click.echo(f"{path}: {outcome}", err=True)
            else:
                click.echo(_render(path, outcome, form, provenance, several=len(files) > 1))
    if failed:
        raise click.ClickException(f"{failed} of {len(files)} files could not be transcribed.")


def _chosen(adapters: str | None) -> tuple[str, ...] | str | None:
    """Names of adapters, or `auto:m` as it is."""
    if adapters is None or adapters.startswith("auto:"):
        return adapters
    return tuple(name.strip() for name in adapters.split(",") if name.strip())


def _transcribe_all(
    transcriber: Transcriber, files: Sequence[str], options: DecodingOptions
) -> Iterator[tuple[str, Transcription | DasError]]:
    """Each file's result or error, with a progress bar on a terminal when there are several."""
    hidden = len(files) < 2 or not sys.stderr.isatty()
    with click.progressbar(files, label="Transcribing", file=sys.stderr, hidden=hidden) as bar:
        for path in bar:
            try:
                yield path, transcriber.transcribe(path, options)
            except DasError as error:
                yield path, error


def _render(path: str, result: Transcription, form: str, provenance: bool, *, several: bool) -> str:
    if form == "json":
        return json.dumps({"file": path, **result.to_dict(), "rtf": result.rtf}, ensure_ascii=False)
    text = colored_words(result) if provenance else result.text
    line = f"{path}: {text}" if several else text
    return f"{line}\n{_legend(result)}" if provenance else line


def colored_words(result: Transcription) -> str:
    """The text with the words that the base would not have written in their adapter's colour, tagged [adapter]."""
    return "".join(
        _colored(word.word, word.adapter, result.rows, word.differs_from_base) for word in result.words
    ).strip()


def _colored(word: str, adapter: str, rows: Sequence[str], differs: bool) -> str:
    if not differs:
        return word
    color = _COLORS[(rows.index(adapter) - 1) % len(_COLORS)] if adapter != rows[0] else None
    return word[: len(word) - len(word.lstrip())] + click.style(f"{word.lstrip()}[{adapter}]", fg=color)


def _legend(result: Transcription) -> str:
    """Who won, and how sure each row was."""
    if result.adapter is not None:
        scores = ", ".join(f"{item.adapter} {item.score:.3f}" for item in result.hypotheses)
        return f"  {result.rule}: {result.adapter} wins ({scores})"
    if not result.words and result.rule == HYPOTHESIS:
        return f"  {result.rule}: no speech"
    counts = {name: sum(word.adapter == name for word in result.words) for name in result.rows}
    shares = ", ".join(f"{name} {count}" for name, count in counts.items())
    threshold = "" if result.rule == HYPOTHESIS else f", tau {result.tau:g}"
    return f"  {result.rule}{threshold}: words by row {shares}"


if __name__ == "__main__":
    main()
