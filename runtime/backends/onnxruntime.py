"""ONNX Runtime on a CPU: tensors are handed from run to run by reference, the host sees ids and scores only."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from das_asr.runtime.adapters import Stack, rounded_tensors
from das_asr.runtime.backends import BackendOptions
from das_asr.runtime.backends.base import Control, Encoded, LoadedStack, Step, Traffic
from das_asr.runtime.backends.huge_pages import HugePages
from das_asr.runtime.backends.placement import CPU
from das_asr.runtime.backends.sessions import open_session
from das_asr.runtime.backends.slots import SlotBuffers
from das_asr.runtime.cache import GrowingCache
from das_asr.runtime.contract import (
    ALONE,
    DECODER_FILE,
    ENCODER_FILE,
    cache_names,
    cross_specs,
    decoder_inputs,
    encoder_inputs,
    encoder_outputs,
)
from das_asr.runtime.errors import BackendError, BundleError
from das_asr.runtime.manifest import Dimensions, Manifest

__all__ = ["Binding", "OnnxRuntimeBackend", "OnnxRuntimeBatch", "OnnxRuntimeSlots"]

_HOST = ("cpu", 0)
_ELEMENT_TYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}
_STEP_OUTPUTS = ("row", "candidate", "logprob")


class Binding:
    """One IO binding, and a count of every byte that crosses between host and device."""

    def __init__(self, session: Any, device: str, device_id: int) -> None:
        self._session, self._device, self._device_id = session, device, device_id
        self._binding = session.io_binding()
        self._held: dict[str, Any] = {}
        self.traffic = Traffic()

    def feed(self, name: str, array: NDArray[Any]) -> None:
        """Binds a host array; its bytes cross."""
        self._binding.bind_cpu_input(name, np.ascontiguousarray(array))
        self.traffic.to_device[name] = array.nbytes

    def place(self, name: str, array: NDArray[Any]) -> None:
        """Moves a host array to the device, for all runs; its bytes cross once."""
        self.connect(name, _to_device(array, self._device, self._device_id))
        self.traffic.to_device[name] = array.nbytes

    def connect(self, name: str, value: Any) -> None:
        """Binds a tensor that is already on the device; nothing crosses."""
        self._held[name] = value  # on the CPU it may be a view of an array that only this object keeps alive
        self._binding.bind_ortvalue_input(name, value)

    def take(self, name: str, places: NDArray[np.int64]) -> None:
        """Binds some rows of the tensor [B, R, ...] that is bound now, in memory of their own."""
        self.connect(name, _rows(self._held[name], places))

    def run(self, device_outputs: Sequence[str], host_outputs: Sequence[str]) -> tuple[list[Any], list[NDArray[Any]]]:
        """Runs the graph: (tensors that stay on the device, copies of those the host asked for)."""
        self._binding.clear_binding_outputs()
        for name in device_outputs:
            self._binding.bind_output(name, self._device, self._device_id)
        for name in host_outputs:
            self._binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(self._binding)
        outputs = list(self._binding.get_outputs())
        # `numpy()` is a view into the engine's memory, which the next run may overwrite.
        fetched = [value.numpy().copy() for value in outputs[len(device_outputs) :]]
        self.traffic.to_host.update((name, array.nbytes) for name, array in zip(host_outputs, fetched, strict=True))
        return outputs[: len(device_outputs)], fetched

    def step(self, device_outputs: Sequence[str], *, logits: bool) -> tuple[list[Any], Step]:
        """Runs the decoder: (tensors that stay on the device, what the host is told)."""
        kept, fetched = self.run(device_outputs, (*_STEP_OUTPUTS, "logits") if logits else _STEP_OUTPUTS)
        return kept, Step(*fetched)

    def take_traffic(self) -> Traffic:
        """What crossed since the last call."""
        traffic, self.traffic = self.traffic, Traffic()
        return traffic


class OnnxRuntimeBackend:
    """`encoder.onnx` and `decoder.onnx` on the CPU."""

    def __init__(
        self, directory: Path, manifest: Manifest, options: BackendOptions, *, profiles: Path | None = None
    ) -> None:
        """Loads the graphs of a precision; with a folder for `profiles` the engine writes one of each graph there."""
        self._dims = manifest.dimensions
        self._rows = manifest.rows
        pages = HugePages() if options.huge_pages else None
        self._encoder, self._decoder = (
            open_session(path, options, {CPU: {}}, profile=None if profiles is None else str(profiles / path.stem))
            for path in (directory / ENCODER_FILE, directory / DECODER_FILE)
        )
        self._dtype = _cache_type(self._decoder)
        # A number in bundles whose encoder takes nothing else, a symbol in those that take less.
        self._window = next(given.shape[2] for given in self._encoder.get_inputs() if given.name == "features")
        self._alone = ALONE in self._encoder.get_modelmeta().custom_metadata_map
        if pages is not None:
            pages.advise()

    @property
    def prunes(self) -> bool:
        """Yes: on a CPU a row costs more than a copy of the caches."""
        return True

    def load_stack(self, stack: Stack | None) -> LoadedStack:
        """Puts adapters on the device; None is the stack that the graphs carry, which needs no memory of its own."""
        if stack is None:
            return LoadedStack(self._rows, {})
        tensors = rounded_tensors(stack, self._dtype)
        return LoadedStack(stack.rows, {name: _to_device(tensor, *_HOST) for name, tensor in tensors.items()})

    def encode(self, features: NDArray[np.float32], stack: LoadedStack) -> Encoded:
        """Runs the encoder on features [B, mels, frames]; its outputs stay on the device."""
        self._check_frames(features.shape[2])
        if self._alone and features.shape[0] > 1:
            return self._joined([self.encode(features[index : index + 1], stack) for index in range(len(features))])
        binding = Binding(self._encoder, *_HOST)
        binding.feed("features", features)
        _connect(binding, stack.tensors, [spec.name for spec in encoder_inputs(self._dims)])
        names = [spec.name for spec in encoder_outputs(self._dims)]
        tensors, _ = binding.run(names, ())
        return Encoded(features.shape[0], dict(zip(names, tensors, strict=True)))

    def _check_frames(self, frames: int) -> None:
        window = self._window
        if isinstance(window, int) and frames != window:
            raise BundleError(
                f"This bundle's encoder takes whole windows of {window} frames, not {frames}. Export it again, or "
                "leave audio_context at 'window'."
            )

    def _joined(self, parts: Sequence[Encoded]) -> Encoded:
        """Utterances that were encoded one by one as a batch."""
        tensors = {}
        for name in parts[0].tensors:
            whole = np.concatenate([part.tensors[name].numpy() for part in parts])
            tensors[name] = _to_device(whole, *_HOST)
        return Encoded(len(parts), tensors)

    def start(self, encoded: Encoded, stack: LoadedStack, control: Control) -> OnnxRuntimeBatch:
        """Binds cross-attention tensors, adapters and control values once for all steps of the batch."""
        binding = Binding(self._decoder, *_HOST)
        names = [spec.name for spec in decoder_inputs(self._dims)]
        _connect(binding, encoded.tensors, names)
        _connect(binding, stack.tensors, names)
        for name, array in control.feeds().items():
            binding.place(name, array)
        shape = (encoded.batch, stack.rows, self._dims.decoder_heads, 0, self._dims.head_size)
        empty = _to_device(np.zeros(shape, self._dtype), *_HOST)
        return OnnxRuntimeBatch(binding, GrowingCache(self._dims, empty), self._dims)

    def open_slots(self, stack: LoadedStack, capacity: int) -> OnnxRuntimeSlots:
        """Slots in host memory; see `base.Backend`."""
        binding = Binding(self._decoder, *_HOST)
        _connect(binding, stack.tensors, [spec.name for spec in decoder_inputs(self._dims)])
        return OnnxRuntimeSlots(binding, self._dims, capacity)

    def close(self) -> None:
        """Frees both graphs and gives their memory back to the system."""
        del self._encoder, self._decoder
        _trim_heap()


class OnnxRuntimeBatch:
    """B utterances in the decoder; see `base.DecodingBatch`."""

    def __init__(self, binding: Binding, cache: GrowingCache, dims: Dimensions) -> None:
        self._binding, self.cache, self._dims = binding, cache, dims
        self._next_ids: Any = None
        self.traffic: list[Traffic] = []

    def run(
        self, position: NDArray[np.int64], prompt_last: NDArray[np.int64],
        ids: NDArray[np.int64] | None = None, *, logits: bool = False,
    ) -> Step:  # fmt: skip
        """Runs the decoder once; without `ids` the graph's own choice of the run before is bound, never fetched."""
        if ids is None:
            self._binding.connect("ids", self._next_ids)
        else:
            self._binding.feed("ids", ids)
        self._binding.feed("position", position)
        self._binding.feed("prompt_last", prompt_last)
        for name, value in self.cache.inputs():
            self._binding.connect(name, value)
        kept, step = self._binding.step((*self.cache.present_names, "next_ids"), logits=logits)
        self._next_ids = kept.pop()
        self.cache.advance(kept)
        self.traffic.append(self._binding.take_traffic())
        return step

    def keep_rows(self, places: NDArray[np.int64], row_mask: NDArray[np.bool_], stack: LoadedStack) -> None:
        """Copies the rows that stay; see `base.DecodingBatch`."""
        for spec in cross_specs(self._dims):
            if "rows" in spec.shape:
                self._binding.take(spec.name, places)
        _connect(self._binding, stack.tensors, [spec.name for spec in decoder_inputs(self._dims)])
        self.cache.advance([_rows(value, places) for value in self.cache.values])
        self._next_ids = _rows(self._next_ids, places)
        self._binding.place("row_mask", row_mask)


class OnnxRuntimeSlots:
    """Utterances that join and leave between runs; see `base.Slots`."""

    def __init__(self, binding: Binding, dims: Dimensions, capacity: int) -> None:
        self._binding, self._buffers = binding, SlotBuffers(capacity)
        self._pasts, self._presents = (list(names) for names in zip(*cache_names(dims), strict=True))
        self._changed = False

    @property
    def count(self) -> int:
        """Live utterances."""
        return self._buffers.count

    def join(self, encoded: Encoded, control: Control, batch: OnnxRuntimeBatch, length: int) -> None:
        """Copies the utterance's tensors into the buffers."""
        cross = {name: tensor.numpy() for name, tensor in encoded.tensors.items()}
        self._buffers.join(cross, control, [value.numpy() for value in batch.cache.values], length)
        self._changed = True

    def leave(self, place: int) -> None:
        """Moves the last utterance into the place."""
        self._buffers.leave(place)
        self._changed = True

    def run(self, ids: NDArray[np.int64], *, logits: bool = False) -> Step:
        """One token for every row of every live utterance."""
        lengths = self._buffers.lengths
        if self._changed:
            self._bind()
        self._binding.feed("ids", ids)
        self._binding.feed("position", lengths)
        self._binding.feed("prompt_last", lengths - 1)
        kept, step = self._binding.step(self._presents, logits=logits)
        self._buffers.advance([value.numpy() for value in kept])
        for name, value in zip(self._pasts, kept, strict=True):
            self._binding.connect(name, value)
        return step

    def _bind(self) -> None:
        """Binds everything whose number of utterances changed."""
        buffers = self._buffers
        arrays = {**buffers.cross(), **buffers.control().feeds(), **dict(zip(self._pasts, buffers.caches, strict=True))}
        for name, array in arrays.items():
            self._binding.place(name, array)
        self._changed = False


def _cache_type(decoder: Any) -> np.dtype[Any]:
    """What a graph holds its caches in, and with them adapters and cross tensors."""
    (found,) = (item.type for item in decoder.get_inputs() if item.name == "past_k0")
    if found not in _ELEMENT_TYPES:
        raise BackendError(
            f"The graphs hold their caches as {found}; this backend takes {', '.join(_ELEMENT_TYPES)}. "
            "Load another precision, such as precision='fp32'."
        )
    return _ELEMENT_TYPES[found]


def _to_device(array: NDArray[Any], device: str, device_id: int) -> Any:
    """A host array as a tensor of the device; on the CPU it may share the array's memory."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), device, device_id)


def _rows(value: Any, places: NDArray[np.int64]) -> Any:
    """Some rows of a tensor [B, R, ...] in host memory."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(value.numpy().take(places, axis=1))


def _trim_heap() -> None:
    """Makes glibc return freed memory, of which it would keep nearly all; other C libraries need no asking."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _connect(binding: Binding, tensors: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        if name in tensors:
            binding.connect(name, tensors[name])
