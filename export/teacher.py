"""Teacher forcing: the same given tokens through the exported graphs and through the oracle, logits against logits.

Every row gets tokens of its own, utterances of one batch differ in audio and in prompt length (so all but the longest
are padded on the left), and a batch of one is run besides. Random tokens do: the logits behind them are as well defined
as behind any others, and they lead the rows apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from das_asr.export.onnx import DECODER_FILE, ENCODER_FILE
from das_asr.runtime.contract import cache_names, cross_specs
from das_asr.runtime.manifest import Dimensions

__all__ = ["Forced", "Graphs", "forced_batches", "graph_logits"]

_STEPS = 5  # single-token runs after the prefill
_SHORTEST_PROMPT = 3  # with a single key, attention weights are 1 and a LoRA on the queries would not show
_LONGER_BY = 2  # tokens from one utterance of a batch to the next
_SEED = 20240229
_ERRORS_ONLY = 3  # a level below warns about every adapter input, which the graph could otherwise fold as a constant


@dataclass(frozen=True)
class Forced:
    """One utterance's given tokens."""

    sample: int  # index of the audio
    prompt: tuple[int, ...]  # the same in every row
    steps: NDArray[np.int64]  # [R, steps], each row its own

    def history(self, row: int) -> list[int]:
        """All tokens of one row."""
        return [*self.prompt, *self.steps[row].tolist()]


class Graphs:
    """The shipped files through plain ONNX Runtime, with the adapters that they carry as defaults."""

    def __init__(self, directory: Path, dims: Dimensions) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        # Threads that wait actively would take turns with torch's, and both would crawl.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        sessions: list[Any] = [
            onnxruntime.InferenceSession(directory / name, options, providers=["CPUExecutionProvider"])
            for name in (ENCODER_FILE, DECODER_FILE)
        ]
        self._dims = dims
        self._encoder, self._decoder = sessions

    def encode(self, features: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """Features [B, mels, frames] -> the cross tensors by name."""
        names = [spec.name for spec in cross_specs(self._dims)]
        return dict(zip(names, self._encoder.run(names, {"features": features}), strict=True))

    def decode(self, feeds: dict[str, NDArray[Any]]) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
        """One run: logits [B, R, V], and the caches by the names under which the next run takes them."""
        pasts, presents = zip(*cache_names(self._dims), strict=True)
        logits, *caches = self._decoder.run(["logits", *presents], feeds)
        return logits, dict(zip(pasts, caches, strict=True))


def forced_batches(samples: int, rows: int, dims: Dimensions) -> list[list[Forced]]:
    """The batches to compare: one of a single utterance, and one of all samples if there are several."""
    random = np.random.default_rng(_SEED)
    longest = _SHORTEST_PROMPT + _LONGER_BY * (samples - 1)
    steps = max(1, min(_STEPS, dims.text_positions - longest))

    def forced(sample: int, place: int) -> Forced:
        prompt = random.integers(dims.vocabulary, size=_SHORTEST_PROMPT + _LONGER_BY * place).tolist()
        return Forced(sample, tuple(prompt), random.integers(dims.vocabulary, size=(rows, steps)))

    batches = [[forced(0, 0)]]
    if samples > 1:
        # The longest prompt stands last but one, so that both neighbours of it are padded.
        batches.append([forced(index, (index + 1) % samples) for index in range(samples)])
    return batches


def graph_logits(
    graphs: Graphs, cross: dict[str, NDArray[Any]], batch: Sequence[Forced], dims: Dimensions
) -> NDArray[np.float32]:
    """Logits [B, R, 1 + steps, V] of the exported graphs behind the prompt and behind each forced token.

    Args:
        graphs: of the bundle.
        cross: what the encoder gave for the first B samples, B being the size of `batch`, or for more.
        batch: utterances of these samples in their order, with equally many forced steps.
        dims: of the bundle.
    """
    first = {name: tensor[: len(batch)] for name, tensor in cross.items()}
    return np.stack(list(_runs(graphs, first, batch, dims)), axis=2)


def _runs(
    graphs: Graphs, cross: dict[str, NDArray[Any]], batch: Sequence[Forced], dims: Dimensions
) -> Iterator[NDArray[np.float32]]:
    """Logits [B, R, V] of the prefill and of every step."""
    rows, steps = batch[0].steps.shape
    lengths = np.array([len(forced.prompt) for forced in batch])
    pads = lengths.max() - lengths
    controls = cross | _controls(len(batch), rows, dims, first_valid=pads, prompt_last=lengths - 1)
    prompts = [[0] * pad + list(forced.prompt) for pad, forced in zip(pads, batch, strict=True)]
    ids = np.repeat(np.array(prompts)[:, None], rows, axis=1)
    empty = np.zeros((len(batch), rows, dims.decoder_heads, 0, dims.head_size), np.float32)
    logits, caches = graphs.decode(
        controls | {"ids": ids, "position": -pads} | {past: empty for past, _ in cache_names(dims)}
    )
    yield logits
    for step in range(steps):
        ids = np.stack([forced.steps[:, step : step + 1] for forced in batch])
        logits, caches = graphs.decode(controls | {"ids": ids, "position": lengths + step} | caches)
        yield logits


def _controls(
    batch: int, rows: int, dims: Dimensions, *, first_valid: NDArray[np.int64], prompt_last: NDArray[np.int64]
) -> dict[str, NDArray[Any]]:
    """Inputs that stay the same; nothing is suppressed or selected, for only logits are read."""
    return {
        "first_valid": first_valid,
        "prompt_last": prompt_last,
        "rule": np.zeros(batch, np.int64),
        "tau": np.zeros(batch, np.float32),
        "token_bias": np.zeros((batch, dims.vocabulary), np.float32),
        "first_token_bias": np.zeros((batch, dims.vocabulary), np.float32),
        "row_mask": np.ones((batch, rows), np.bool_),
    }
