"""The parity gate: a bundle leaves the exporter only if it computes what transformers and PEFT compute.

    report = check_parity(directory, manifest, samples, checkpoint.directory, [peft_row(folder) for folder in folders])

On the files as shipped, with the adapters as the graphs carry them:

1. The log-mel features are those of transformers' extractor.
2. The logits of every row, behind the prompt and behind every forced token (`teacher`), from both forms of the
   decoder, differ by no more than `TOLERANCE` times the largest logit. A network that amplifies rounding errors so much
   that PyTorch's own float32 is far from its float64 is granted a multiple of that distance instead; a wrong graph does
   not change it.
3. Every adapter moves the logits by at least ten times the error that was measured.
4. The runtime writes the same tokens, from the same rows, with shared and with own history (`replay`).

The oracle (`reference`) needs one pass for each row and text, so the gate takes little longer than the runtime's own
decoding; memory holds the base once in torch and once in ONNX Runtime.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from das_asr.export.reference import Reference, RowOpener, RowTrace, load_reference
from das_asr.export.replay import REPLAYED_RULES, Comparison, Written, compare, written
from das_asr.export.teacher import Encoder, Forced, GrowingDecoder, StaticDecoder, forced_batches, graph_logits
from das_asr.runtime.errors import ParityError
from das_asr.runtime.features import LogMel
from das_asr.runtime.manifest import Manifest, ParityReport
from das_asr.runtime.transcriber import Transcriber

__all__ = ["MAX_TOKENS", "TOLERANCE", "check_parity"]

TOLERANCE = 2e-5
"""Largest logit difference that is allowed without further ado, relative to the largest logit."""

MAX_TOKENS = 64
"""Most tokens a row writes in the gate."""

_FEATURE_TOLERANCE = 1e-4  # absolute; both extractors transform in float32, features lie between about -1 and 1.5
_EFFECT = 10  # times the measured error
_ROUNDING = 4  # times PyTorch's own error: both sides round, and more rows are compared than it is measured on
_FORCED = 3  # samples whose logits are compared
_BATCH = 4  # utterances transcribed together

_log = logging.getLogger(__name__)

Samples = Sequence[NDArray[np.float32]]


@dataclass
class _Logits:
    """Running figures of the logit comparison."""

    largest_difference: float = 0.0
    total_difference: float = 0.0
    count: int = 0
    largest: float = 0.0
    where: str = ""
    effects: dict[str, float] = field(default_factory=dict)

    def add(self, ours: NDArray[np.float32], oracle: NDArray[np.float32], where: str) -> None:
        """Takes one row of one utterance, both [1 + steps, V]."""
        difference = np.abs(ours.astype(np.float64) - oracle)
        self.total_difference += float(difference.sum())
        self.count += difference.size
        self.largest = max(self.largest, float(np.abs(oracle).max()))
        worst = float(difference.max())
        # Neither `>` nor without the second condition: NaN must not pass unnoticed.
        if not (worst <= self.largest_difference or math.isnan(self.largest_difference)):
            step = int(np.unravel_index(difference.argmax(), difference.shape)[0])
            self.largest_difference, self.where = worst, f"{where}, {f'step {step}' if step else 'prefill'}"


def check_parity(
    directory: Path, manifest: Manifest, samples: Samples, base: Path, openers: Sequence[RowOpener]
) -> ParityReport:
    """Compares a bundle with transformers and PEFT.

    Args:
        directory: the bundle; its files are those of `manifest`.
        manifest: its manifest, whose parity report may still be empty.
        samples: audio to decode, float32 [n] each at the model's rate, neither silent nor longer than the window.
        base: local folder of the base checkpoint.
        openers: the oracle's rows 1 .. K, in the order of the manifest's adapters.

    Raises:
        ParityError: they disagree, or an adapter changes nothing.
        ExportError: this ONNX Runtime cannot run the graphs.
    """
    first = manifest.tokens.first_timestamp
    never = () if first is None else range(first, manifest.dimensions.vocabulary)
    reference = load_reference(base, openers, never)
    features = _features(reference, manifest, samples)
    encoded = reference.encode(features)
    _log.info("comparing logits of %d rows", manifest.rows)
    batches = forced_batches(min(len(samples), _FORCED), manifest.rows, manifest.dimensions)
    ours = _graph_logits(directory, manifest, features, batches)
    logits = _compare_logits(ours, batches, manifest, reference, encoded)
    allowed = _judge_logits(logits, reference, features, batches[-1])
    _log.info("comparing tokens on %d samples", len(samples))
    comparisons = _compare_tokens(directory, manifest, reference, samples, encoded, allowed)
    return ParityReport(
        max_logit_difference=logits.largest_difference,
        mean_logit_difference=logits.total_difference / logits.count,
        largest_logit=logits.largest,
        tolerance=allowed / logits.largest,
        adapter_effects=logits.effects,
        steps=1 + batches[0][0].steps.shape[1],
        tokens_compared=sum(item.compared for item in comparisons),
        tokens_differing=sum(item.differing for item in comparisons),
        rules=REPLAYED_RULES,
    )


def _features(reference: Reference, manifest: Manifest, samples: Samples) -> NDArray[np.float32]:
    """The oracle's features [samples, mels, frames], after checking that the runtime's are the same."""
    expected = np.stack([reference.features(audio, manifest.audio) for audio in samples])
    ours = LogMel(manifest.audio, manifest.dimensions.mels).batch(samples)
    if ours.shape != expected.shape:
        raise ParityError(f"The runtime's features have shape {ours.shape[1:]}, transformers' {expected.shape[1:]}.")
    if not (difference := float(np.abs(ours - expected).max())) <= _FEATURE_TOLERANCE:
        raise ParityError(
            f"The runtime's log-mel features differ from transformers' by {difference:.2g}, at most "
            f"{_FEATURE_TOLERANCE} was expected. The checkpoint's preprocessor_config.json asks for something that "
            "das-asr does not compute."
        )
    return expected


# --- Logits ---


def _graph_logits(
    directory: Path, manifest: Manifest, features: NDArray[np.float32], batches: Sequence[Sequence[Forced]]
) -> dict[str, list[NDArray[np.float32]]]:
    """The logits [B, R, 1 + steps, V] of each batch from each decoder file; a bundle may lack the static one."""
    dims = manifest.dimensions
    cross = Encoder(directory)(features[: len(batches[-1])])
    found = {}
    for kind in (GrowingDecoder, StaticDecoder):
        if kind.file in manifest.files:
            decoder = kind(directory, dims)
            found[kind.file] = [graph_logits(decoder, cross, batch, dims) for batch in batches]
            del decoder  # one at a time in memory
    return found


def _compare_logits(
    ours: Mapping[str, Sequence[NDArray[np.float32]]],
    batches: Sequence[Sequence[Forced]],
    manifest: Manifest,
    reference: Reference,
    encoded: Sequence[Any],
) -> _Logits:
    """Compares row by row, so that the oracle opens each row once."""
    figures = _Logits()
    base: list[NDArray[np.floating[Any]]] = []
    for row, name in enumerate(("base", *(entry.name for entry in manifest.adapters))):
        prefills = []
        with reference.row(row):
            for index, batch in enumerate(batches):
                for place, forced in enumerate(batch):
                    theirs = _oracle_logits(reference, encoded[forced.sample], forced, row)
                    where = f"row {row} ({name}), batch of {len(batch)}, sample {forced.sample + 1}"
                    for file, logits in ours.items():
                        figures.add(logits[index][place, row], theirs, f"{file}, {where}")
                    prefills.append(theirs[0])
        base = base or prefills
        if row:  # behind the prompt, which all rows share
            figures.effects[name] = max(float(np.abs(a - b).max()) for a, b in zip(prefills, base, strict=True))
    return figures


def _oracle_logits(reference: Reference, encoded: Any, forced: Forced, row: int) -> NDArray[np.floating[Any]]:
    """Logits [1 + steps, V] of the open row."""
    return reference.logits(encoded, forced.history(row), len(forced.prompt) - 1)


def _judge_logits(
    figures: _Logits, reference: Reference, features: NDArray[np.float32], batch: Sequence[Forced]
) -> float:
    """Raises ParityError unless errors are small and effects are not; returns how far a logit may be off, absolute."""
    error, allowed = figures.largest_difference, TOLERANCE * figures.largest
    if not error <= allowed:
        allowed = max(allowed, _ROUNDING * _rounding_error(reference, features, batch))
    if not error <= allowed:
        raise ParityError(
            f"The exported graphs do not compute what transformers and PEFT compute: logits differ by {error:.3g} at "
            f"{figures.where}, at most {allowed:.3g} was expected, with {figures.largest:.3g} the largest logit. "
            "Please report this with the versions of all packages."
        )
    for name, effect in figures.effects.items():
        if not effect >= _EFFECT * error:
            raise ParityError(
                f"Adapter {name!r} changes nothing measurable: it moves the base's logits by {effect:.2g}, the error "
                f"of the export is {error:.2g}. Was it trained? Leave it out, or give the folder of the trained one."
            )
    return allowed


def _rounding_error(reference: Reference, features: NDArray[np.float32], batch: Sequence[Forced]) -> float:
    """How far the base's logits in torch's float32 are from its float64, at most."""
    _log.info("measuring PyTorch's own rounding error")
    windows = features[[forced.sample for forced in batch]]
    rounded, exact = (
        [
            _oracle_logits(oracle, encoded, forced, 0)
            for encoded, forced in zip(oracle.encode(windows), batch, strict=True)
        ]
        for oracle in (reference, reference.in_float64())
    )
    return max(float(np.abs(a - b).max()) for a, b in zip(rounded, exact, strict=True))


# --- Tokens ---


def _compare_tokens(
    directory: Path,
    manifest: Manifest,
    reference: Reference,
    samples: Samples,
    encoded: Sequence[Any],
    tolerance: float,
) -> list[Comparison]:
    """Replays everything that the runtime writes; `tolerance` is that of one logit, absolute."""
    prompt = _prompt(manifest)
    limit = min(MAX_TOKENS, manifest.dimensions.text_positions - len(prompt))
    products = _transcribe(directory, manifest, samples, limit)
    traces = _replay(reference, encoded, prompt, products)
    return [
        compare(
            product,
            oracle,
            end_of_text=manifest.tokens.end_of_text,
            limit=limit,
            tau=manifest.tau,
            tolerance=tolerance,
        )
        for product, oracle in zip(products, traces, strict=True)
    ]


def _prompt(manifest: Manifest) -> list[int]:
    """What steers the decoder to transcribe without timestamps; in a multilingual model, in its first language."""
    tokens = manifest.tokens
    steering = [tokens.start_of_transcript]
    if tokens.languages and tokens.transcribe is not None:
        steering += [next(iter(tokens.languages.values())), tokens.transcribe]
    return steering + ([] if tokens.no_timestamps is None else [tokens.no_timestamps])


def _transcribe(directory: Path, manifest: Manifest, samples: Samples, limit: int) -> list[Written]:
    """Everything the runtime writes: with a shared history one by one, with own histories in batches."""
    sizes = dict(zip(REPLAYED_RULES, (1, _BATCH), strict=True))
    products = []
    with Transcriber.load(directory, precision="fp32", verify_files=False) as transcriber:
        for rule, size in sizes.items():
            for start in range(0, len(samples), size):
                results = transcriber.transcribe_batch(
                    samples[start : start + size],
                    sample_rate=manifest.audio.sample_rate,
                    rule=rule,
                    tau=manifest.tau,
                    language=next(iter(manifest.tokens.languages), None),
                    max_tokens=limit,
                    no_speech_threshold=None,  # the gate is about what is written, also where it would be discarded
                )
                products += [
                    written(result, index, manifest.tokens.end_of_text) for index, result in enumerate(results, start)
                ]
    return products


def _replay(
    reference: Reference, encoded: Sequence[Any], prompt: Sequence[int], products: Sequence[Written]
) -> list[list[RowTrace]]:
    """One trace of every row for each product."""
    traces: list[list[RowTrace]] = [[] for _ in products]
    for row in range(reference.rows):
        with reference.row(row):
            for product, rows in zip(products, traces, strict=True):
                rows.append(reference.trace(encoded[product.sample], prompt, product.tokens[row]))
    return traces
