"""Speaks a random choice of sentences with espeak-ng and writes them as 16 kHz mono FLAC with a `metadata.jsonl`.

Made the clips of `benchmarks/demo/audio` and `export/samples`; their READMEs have the command lines. The choice depends
on the seed and the files alone, the sound on the version of espeak-ng, which must be on PATH. Sentence files hold one
sentence per line. Voices are taken in turn.

    python benchmarks/demo/make_audio.py --sentences music 4 music.txt --sentences general 3 general.txt \
        --voice linda --voice f5 --seed 1 --output /tmp/clips
"""

from __future__ import annotations

import io
import itertools
import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import soundfile
import soxr

__all__ = ["Choice", "choose", "main", "speak", "spoken"]

SAMPLE_RATE = 16_000  # Hz
ACCENT = "en-us"
WORDS_PER_MINUTE = 160
WAKE_WORD = "olly"  # of the SLURP sentences; scoring leaves it out, so sentences with it are of no use here


@dataclass(frozen=True)
class Choice:
    """Which sentences may be spoken."""

    seed: int
    words: tuple[int, int]  # fewest and most words of a sentence
    seconds: float  # longest clip
    excluded: frozenset[str]  # sentences that are used elsewhere


def choose(path: Path, choice: Choice) -> Iterator[str]:
    """Yields the file's suitable sentences in random order, each once."""
    sentences = sorted({line.strip() for line in path.read_text(encoding="utf-8").splitlines()})
    suitable = [sentence for sentence in sentences if _suits(sentence, choice)]
    yield from random.Random(f"{choice.seed} {path.name}").sample(suitable, len(suitable))  # noqa: S311


def _suits(sentence: str, choice: Choice) -> bool:
    fewest, most = choice.words
    words = sentence.split()
    return fewest <= len(words) <= most and WAKE_WORD not in words and sentence not in choice.excluded


def speak(text: str, voice: str) -> npt.NDArray[np.float32]:
    """Speaks one sentence; returns f32 [samples] at 16 kHz."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise click.ClickException("espeak-ng is not on PATH. Install it, on Debian with `apt-get install espeak-ng`.")
    command = [program, "-v", f"{ACCENT}+{voice}", "-s", str(WORDS_PER_MINUTE), "--stdout", text]
    wave = subprocess.run(command, check=True, capture_output=True).stdout
    samples, rate = soundfile.read(io.BytesIO(wave), dtype="float32")
    resampled: npt.NDArray[np.float32] = soxr.resample(samples, rate, SAMPLE_RATE, quality="VHQ")
    return resampled


def spoken(
    path: Path, voices: Iterator[str], count: int, choice: Choice
) -> Iterator[tuple[str, str, npt.NDArray[np.float32]]]:
    """Yields `count` clips of a sentence file as (voice, sentence, samples); too long ones give way to the next."""
    left = count
    for sentence in choose(path, choice):
        if left == 0:
            return
        voice = next(voices)
        samples = speak(sentence, voice)
        if len(samples) <= choice.seconds * SAMPLE_RATE:
            left -= 1
            yield voice, sentence, samples
    if left:
        raise click.ClickException(f"{path} lacks {left} suitable sentence(s). Widen --words or --seconds.")


def _texts(paths: tuple[Path, ...]) -> frozenset[str]:
    lines = itertools.chain.from_iterable(path.read_text(encoding="utf-8").splitlines() for path in paths)
    return frozenset(json.loads(line)["text"] for line in lines)


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option(
    "--sentences",
    type=(str, int, click.Path(path_type=Path, exists=True, dir_okay=False)),
    multiple=True,
    required=True,
    metavar="DOMAIN COUNT FILE",
    help="Take COUNT sentences of FILE, for DOMAIN; several times.",
)
@click.option("--voice", "voices", multiple=True, required=True, help="espeak-ng voice variant; several times.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the clips.")
@click.option("--seed", type=int, required=True, help="Of the random choice.")
@click.option("--words", type=(int, int), default=(4, 10), show_default=True, help="Fewest and most words.")
@click.option("--seconds", type=float, default=7.0, show_default=True, help="Longest clip.")
@click.option(
    "--exclude",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    multiple=True,
    help="metadata.jsonl whose sentences are left out.",
)
def main(
    sentences: tuple[tuple[str, int, Path], ...],
    voices: tuple[str, ...],
    output: Path,
    seed: int,
    words: tuple[int, int],
    seconds: float,
    exclude: tuple[Path, ...],
) -> None:
    """Writes `<domain>-<number>-<voice>.flac` and one line of `metadata.jsonl` for each clip."""
    choice = Choice(seed, words, seconds, _texts(exclude))
    turn = itertools.cycle(voices)
    output.mkdir(parents=True, exist_ok=True)
    with (output / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for domain, count, path in sentences:
            for number, (voice, sentence, samples) in enumerate(spoken(path, turn, count, choice), start=1):
                name = f"{domain}-{number}-{voice}.flac"
                soundfile.write(output / name, samples, SAMPLE_RATE, subtype="PCM_16")
                metadata.write(json.dumps({"file_name": name, "text": sentence, "domain": domain}) + "\n")


if __name__ == "__main__":
    main()
