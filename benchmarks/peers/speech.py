"""Labelled speech through all sides, everybody to the end of the text: word errors beside time."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from das_asr.benchmarks.models import SAMPLE_RATE
from das_asr.benchmarks.rtf import interleave
from das_asr.benchmarks.systems import System
from das_asr.benchmarks.testsets import EvaluationSet, check_references, fit_window
from das_asr.benchmarks.timing import Utterance
from das_asr.benchmarks.wordcounts import count_errors
from das_asr.benchmarks.wording import Wording, Words
from das_asr.runtime.audio import load_audio
from das_asr.runtime.utterances import Utterance as Labelled
from das_asr.runtime.utterances import read_utterances

__all__ = ["Heard", "measure_speech", "read_speech"]

Heard = dict[str, Any]
"""`wer`, `tokens`, `rtf`, `rtfx`, and `seconds` of the whole set in each repeat."""


def read_speech(speech: Path, window_seconds: float) -> tuple[Labelled, ...]:
    """The clips of an AudioFolder or manifest, every one checked: one that does not fit would end the whole run.

    Raises:
        DataError: the speech cannot be read, or a clip is too long or too short for the model, or has no words.
    """
    sets = (EvaluationSet(speech.name, speech, tuple(read_utterances(speech))),)
    check_references(sets, Wording().normalizer())
    return fit_window(sets, window_seconds)[0].utterances


def measure_speech(
    sides: Mapping[str, System], checkpoint: Path, utterances: Sequence[Labelled], repeats: int, warmup: int
) -> tuple[dict[str, Any], dict[str, Heard]]:
    """Transcribes every clip with every side, interleaved clip by clip.

    Args:
        sides: by name.
        checkpoint: whose tokenizer turns all tokens into text.
        utterances: as `read_speech` gives them.
        repeats: that count.
        warmup: before them, and only for the first clip.

    Returns:
        What the set is, and what each side made of it.
    """
    clips = [load_audio(utterance.audio, target_rate=SAMPLE_RATE) for utterance in utterances]
    taken = [interleave(sides, clip, repeats, warmup if not place else 0) for place, clip in enumerate(clips)]
    audio = sum(map(len, clips)) / SAMPLE_RATE
    normalize = Wording().normalizer()
    wanted = [normalize(utterance.text) for utterance in utterances]
    found = {"clips": len(clips), "audio_seconds": audio, "words": sum(map(len, wanted))}
    decode = _decoder(checkpoint)
    heard = {}
    for name in sides:
        firsts = [clip[name][0] for clip in taken]
        texts = [normalize(decode(first)) for first in firsts]
        seconds = [sum(clip[name][repeat].total for clip in taken) for repeat in range(repeats)]
        rtf = statistics.median(seconds) / audio
        tokens = sum(len(first.tokens) for first in firsts)
        heard[name] = {"wer": _wer(wanted, texts), "tokens": tokens, "rtf": rtf, "rtfx": 1 / rtf, "seconds": seconds}
    return found, heard


def _wer(wanted: Sequence[Words], texts: Sequence[Words]) -> float:
    return float(count_errors(wanted, texts).sum() / sum(map(len, wanted)))


def _decoder(checkpoint: Path) -> Any:
    """The function from what was heard to its text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))

    def decode(heard: Utterance) -> str:
        return str(tokenizer.decode(list(heard.tokens), skip_special_tokens=True))

    return decode
