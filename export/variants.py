"""The gate of precision variants: what the runtime writes with fewer bits, beside what it writes with float32.

    report = compare_variant(bundle, manifest, "int8", samples, speech)
    check_variant("int8", report)

Fewer bits cannot agree with PyTorch to float32's rounding errors, so a variant is judged by what it writes: the tokens
of every row on the sample clips, and, where labelled speech is given, the word error rate. A precision that a CPU
cannot run is not compared here, and its report says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from das_asr.runtime.errors import DataError, ParityError
from das_asr.runtime.manifest import Manifest, VariantReport
from das_asr.runtime.results import Transcription
from das_asr.runtime.transcriber import Transcriber
from das_asr.runtime.utterances import Utterance, read_utterances

__all__ = [
    "LEAST_WORDS",
    "MOST_DIFFERENT",
    "MOST_WORSE",
    "NEEDS_A_GPU",
    "check_variant",
    "compare_variant",
    "read_speech",
]

MOST_DIFFERENT = 0.03
"""Share of float32's tokens that a variant may write otherwise."""

MOST_WORSE = 0.005
"""By how much the word error rate may be above float32's, as a fraction."""

LEAST_WORDS = 2000
"""Fewer words say too little about half a point."""

NEEDS_A_GPU = {"bf16": "ONNX Runtime has no bfloat16 arithmetic on a CPU"}
"""Precisions that cannot be compared on a CPU, and why."""

_BATCH = 8  # utterances decoded together
_MAX_TOKENS = 64

T = TypeVar("T")
Samples = Sequence[NDArray[np.float32]]


def read_speech(manifest: Path | None) -> list[Utterance]:
    """Labelled speech for the word error rate; none without a manifest.

    Raises:
        DataError: it cannot be read, or has fewer than `LEAST_WORDS` words.
    """
    speech = [] if manifest is None else read_utterances(manifest)
    words = sum(len(_words(utterance.text)) for utterance in speech)
    if manifest is not None and words < LEAST_WORDS:
        raise DataError(f"--eval-manifest {manifest} has {words} words; at least {LEAST_WORDS} are needed. Add speech.")
    return speech


def compare_variant(
    bundle: Path, manifest: Manifest, precision: str, samples: Samples, speech: Sequence[Utterance]
) -> VariantReport:
    """Decodes with both precisions.

    Args:
        bundle: its files; float32's graphs and the variant's are there.
        manifest: of the bundle, with both precisions.
        precision: the variant.
        samples: audio, float32 [n] each at the model's rate.
        speech: labelled utterances, or none.

    Returns:
        The figures; for a precision of `NEEDS_A_GPU` why there are none.
    """
    if precision in NEEDS_A_GPU:
        return VariantReport(0, 0, 0, None, None, NEEDS_A_GPU[precision])
    (exact, exact_wrong), (other, other_wrong) = (
        _decode(bundle, manifest, name, samples, speech) for name in ("fp32", precision)
    )
    words = sum(len(_words(utterance.text)) for utterance in speech)
    return VariantReport(
        tokens_compared=sum(map(len, exact)),
        tokens_differing=sum(_distance(a, b) for a, b in zip(exact, other, strict=True)),
        words=words,
        wer=other_wrong / words if words else None,
        wer_fp32=exact_wrong / words if words else None,
    )


def check_variant(precision: str, report: VariantReport) -> None:
    """Refuses a variant that writes something else than float32.

    Raises:
        ParityError: too many tokens differ, or too many words are wrong.
    """
    advice = f"Leave {precision} out of --precision, or give --force to ship it all the same."
    if report.disagreement > MOST_DIFFERENT:
        raise ParityError(
            f"Precision {precision} writes {report.tokens_differing} of {report.tokens_compared} tokens of the sample "
            f"clips ({report.disagreement:.1%}) otherwise than float32; {MOST_DIFFERENT:.0%} are allowed. {advice}"
        )
    if report.wer is not None and report.wer_fp32 is not None and report.wer > report.wer_fp32 + MOST_WORSE:
        raise ParityError(
            f"Precision {precision} has a word error rate of {report.wer:.2%} on {report.words} words, float32 "
            f"{report.wer_fp32:.2%}; {100 * MOST_WORSE:g} points more are allowed. {advice}"
        )


def _decode(
    bundle: Path, manifest: Manifest, precision: str, samples: Samples, speech: Sequence[Utterance]
) -> tuple[list[tuple[int, ...]], int]:
    """(tokens of every row of every sample, wrong words of the speech)."""
    with Transcriber.load(bundle, precision=precision, verify_files=False) as transcriber:
        options: dict[str, Any] = {
            "rule": "hypothesis",
            "language": next(iter(manifest.tokens.languages), None),
            "no_speech_threshold": None,
        }
        rate = manifest.audio.sample_rate
        tokens = [
            hypothesis.tokens
            for part in _parts(samples)
            for result in transcriber.transcribe_batch(part, sample_rate=rate, max_tokens=_MAX_TOKENS, **options)
            for hypothesis in result.hypotheses
        ]
        wrong = 0
        for utterances in _parts(speech):
            results: list[Transcription] = transcriber.transcribe_batch([item.audio for item in utterances], **options)
            pairs = zip(utterances, results, strict=True)
            wrong += sum(_distance(_words(said.text), _words(heard.text)) for said, heard in pairs)
        return tokens, wrong


def _parts(items: Sequence[T]) -> Iterator[Sequence[T]]:
    return (items[start : start + _BATCH] for start in range(0, len(items), _BATCH))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:'\w+)?", text.lower())


def _distance(wanted: Sequence[object], found: Sequence[object]) -> int:
    """Insertions, deletions and substitutions (Levenshtein)."""
    costs = list(range(len(found) + 1))
    for row, item in enumerate(wanted, start=1):
        diagonal, costs[0] = costs[0], row
        for column, other in enumerate(found, start=1):
            best = min(costs[column] + 1, costs[column - 1] + 1, diagonal + (item != other))
            diagonal, costs[column] = costs[column], best
    return costs[-1]
