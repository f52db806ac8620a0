"""Teacher forcing: the same given tokens through the exported graphs and through the oracle, logits against logits.

Every row gets tokens of its own, utterances of one batch differ in audio and in prompt length (so all but the longest
are padded on the left), and a batch of one is run besides. Random tokens do: the logits behind them are as well defined
as behind any others, and they lead the rows apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from das_asr.runtime.contract import DECODER_FILE, DECODER_STATIC_FILE, ENCODER_FILE, cache_names
from das_asr.runtime.errors import ExportError
from das_asr.runtime.manifest import Dimensions

__all__ = ["Encoder", "Forced", "GrowingDecoder", "StaticDecoder", "forced_batches", "graph_logits"]

_STEPS = 5  # single-token runs after the prefill
_SHORTEST_PROMPT = 3  # with a single key, attention weights are 1 and a LoRA on the queries would not show
_LONGER_BY = 2  # tokens from one utterance of a batch to the next
_SEED = 20240229
Feeds = dict[str, NDArray[Any]]

_LEAST_ENGINE = "1.25"  # the first that has TensorScatter on a CPU
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


class Encoder:
    """The shipped encoder through plain ONNX Runtime, with the adapters that it carries as defaults."""

    def __init__(self, directory: Path) -> None:
        self._session = _session(directory / ENCODER_FILE)
        self._names = [output.name for output in self._session.get_outputs()]

    def __call__(self, features: NDArray[np.float32]) -> Feeds:
        """Features [B, mels, frames] -> the cross tensors by name."""
        return dict(zip(self._names, self._session.run(self._names, {"features": features}), strict=True))


class GrowingDecoder:
    """`decoder.onnx` with the adapters that it carries; `open` begins a batch."""

    file = DECODER_FILE

    def __init__(self, directory: Path, dims: Dimensions) -> None:
        self._session, self._dims = _session(directory / self.file), dims

    def open(self, batch: int, rows: int) -> Callable[[Feeds], NDArray[np.float32]]:
        """A function that runs the decoder once, feeds without caches -> logits [B, R, V], and keeps the caches."""
        pasts, presents = zip(*cache_names(self._dims), strict=True)
        empty = np.zeros((batch, rows, self._dims.decoder_heads, 0, self._dims.head_size), np.float32)
        caches = dict.fromkeys(pasts, empty)

        def run(feeds: Feeds) -> NDArray[np.float32]:
            logits, *values = self._session.run(["logits", *presents], feeds | caches)
            caches.update(zip(pasts, values, strict=True))
            return logits  # type: ignore[no-any-return]

        return run


class StaticDecoder:
    """`decoder_static.onnx` in the same way, with its caches updated in place."""

    file = DECODER_STATIC_FILE

    def __init__(self, directory: Path, dims: Dimensions) -> None:
        self._session, self._dims = _session(directory / self.file), dims

    def open(self, batch: int, rows: int) -> Callable[[Feeds], NDArray[np.float32]]:
        """As that of `GrowingDecoder`."""
        from onnxruntime import OrtValue

        binding = self._session.io_binding()
        shape = (batch * rows, self._dims.decoder_heads, self._dims.text_positions, self._dims.head_size)
        for past, present in cache_names(self._dims):
            value = OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)

        def run(feeds: Feeds) -> NDArray[np.float32]:
            written = (feeds["position"] + feeds["first_valid"]).max(keepdims=True) + feeds["ids"].shape[2]
            for name, array in (feeds | {"attended": written}).items():
                binding.bind_cpu_input(name, array)
            binding.bind_output("logits", "cpu")
            self._session.run_with_iobinding(binding)
            logits: NDArray[np.float32] = binding.get_outputs()[-1].numpy()
            return logits.copy()  # a view of memory that the next run may overwrite

        return run


def _session(path: Path) -> Any:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as engine  # pyright: ignore[reportAttributeAccessIssue]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    # Threads that wait actively would take turns with torch's, and both would crawl.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except engine.NotImplemented as error:
        raise ExportError(
            f"ONNX Runtime {onnxruntime.__version__} cannot run {path}, which must be compared with PyTorch: {error}. "
            f"Exporting and verifying need onnxruntime {_LEAST_ENGINE} or newer; older ones still run the bundle."
        ) from error


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
    decoder: GrowingDecoder | StaticDecoder, cross: Feeds, batch: Sequence[Forced], dims: Dimensions
) -> NDArray[np.float32]:
    """Logits [B, R, 1 + steps, V] of an exported decoder behind the prompt and behind each forced token.

    Args:
        decoder: of the bundle.
        cross: what the encoder gave for the first B samples, B being the size of `batch`, or for more.
        batch: utterances of these samples in their order, with equally many forced steps.
        dims: of the bundle.
    """
    first = {name: tensor[: len(batch)] for name, tensor in cross.items()}
    run = decoder.open(len(batch), len(batch[0].steps))
    return np.stack([run(feeds) for feeds in _feeds(first, batch, dims)], axis=2)


def _feeds(cross: Feeds, batch: Sequence[Forced], dims: Dimensions) -> Iterator[Feeds]:
    """What the prefill and every step take, but for the caches."""
    rows, steps = batch[0].steps.shape
    lengths = np.array([len(forced.prompt) for forced in batch])
    pads = lengths.max() - lengths
    controls = cross | _controls(len(batch), rows, dims, first_valid=pads, prompt_last=lengths - 1)
    prompts = [[0] * pad + list(forced.prompt) for pad, forced in zip(pads, batch, strict=True)]
    yield controls | {"ids": np.repeat(np.array(prompts)[:, None], rows, axis=1), "position": -pads}
    for step in range(steps):
        ids = np.stack([forced.steps[:, step : step + 1] for forced in batch])
        yield controls | {"ids": ids, "position": lengths + step}


def _controls(
    batch: int, rows: int, dims: Dimensions, *, first_valid: NDArray[np.int64], prompt_last: NDArray[np.int64]
) -> Feeds:
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
