"""ONNX Runtime on a CPU: tensors are handed from run to run by reference, the host sees ids and scores only."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from das_asr.runtime.adapters import Stack, read_stack, rounded_tensors
from das_asr.runtime.backends import BackendOptions
from das_asr.runtime.backends.base import Control, Encoded, LoadedStack, Step, Traffic
from das_asr.runtime.backends.binding import HOST, Binding, to_device
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
    decoder_inputs,
    encoder_inputs,
)
from das_asr.runtime.errors import BackendError, BundleError
from das_asr.runtime.manifest import Dimensions, Manifest

__all__ = ["OnnxRuntimeBackend", "OnnxRuntimeBatch", "OnnxRuntimeSlots"]

_ELEMENT_TYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}


class OnnxRuntimeBackend:
    """`encoder.onnx` and `decoder.onnx` on the CPU."""

    def __init__(
        self,
        directory: Path,
        graphs: Path,
        manifest: Manifest,
        options: BackendOptions,
        *,
        profiles: Path | None = None,
    ) -> None:
        """Loads graphs.

        Args:
            directory: the bundle.
            graphs: folder of the precision.
            manifest: of the bundle.
            options: of the backend.
            profiles: folder into which the engine writes a profile of each graph.
        """
        self._directory, self._manifest = directory, manifest
        self._dims = manifest.dimensions
        pages = HugePages() if options.huge_pages else None
        self._encoder, self._decoder = (
            open_session(path, options, {CPU: {}}, profile=None if profiles is None else str(profiles / path.stem))
            for path in (graphs / ENCODER_FILE, graphs / DECODER_FILE)
        )
        self._dtype = _cache_type(self._decoder)
        # A number in bundles whose encoder takes nothing else, a symbol in those that take less.
        self._window = next(given.shape[2] for given in self._encoder.get_inputs() if given.name == "features")
        # Not every precision hands over the same tensors; each graph says which of them have rows.
        self._cross = {output.name: "rows" in output.shape for output in self._encoder.get_outputs()}
        self._alone = ALONE in self._encoder.get_modelmeta().custom_metadata_map
        if pages is not None:
            pages.advise()

    @property
    def prunes(self) -> bool:
        """Yes: on a CPU a row costs more than a copy of the caches."""
        return True

    @property
    def mixes(self) -> bool:
        """Yes: who has other adapters than the rest of a run gets a copy of them in the run's buffers."""
        return True

    def load_stack(self, stack: Stack | None) -> LoadedStack:
        """Puts adapters on the device; None is the stack that the graphs carry, which needs no memory of its own."""
        if stack is None:
            return LoadedStack(self._manifest.rows, {})
        tensors = rounded_tensors(stack, self._dtype)
        return LoadedStack(stack.rows, {name: to_device(tensor, *HOST) for name, tensor in tensors.items()})

    def encode(self, features: NDArray[np.float32], stack: LoadedStack) -> Encoded:
        """Runs the encoder on features [B, mels, frames]; its outputs stay on the device."""
        self._check_frames(features.shape[2])
        if self._alone and features.shape[0] > 1:
            return self._joined([self.encode(features[index : index + 1], stack) for index in range(len(features))])
        binding = Binding(self._encoder, *HOST)
        binding.feed("features", features)
        binding.connect_all(stack.tensors, [spec.name for spec in encoder_inputs(self._dims)])
        tensors, _ = binding.run(list(self._cross), ())
        return Encoded(features.shape[0], dict(zip(self._cross, tensors, strict=True)))

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
            tensors[name] = to_device(whole, *HOST)
        return Encoded(len(parts), tensors)

    def start(self, encoded: Encoded, stack: LoadedStack, control: Control) -> OnnxRuntimeBatch:
        """Binds cross-attention tensors, adapters and control values once for all steps of the batch."""
        binding = Binding(self._decoder, *HOST)
        binding.connect_all(encoded.tensors, list(self._cross))
        binding.connect_all(stack.tensors, [spec.name for spec in decoder_inputs(self._dims)])
        for name, array in control.feeds().items():
            binding.place(name, array)
        shape = (encoded.batch, stack.rows, self._dims.decoder_heads, 0, self._dims.head_size)
        empty = to_device(np.zeros(shape, self._dtype), *HOST)
        with_rows = [name for name, has_rows in self._cross.items() if has_rows]
        return OnnxRuntimeBatch(binding, GrowingCache(self._dims, empty), self._dims, with_rows)

    def open_slots(self, capacity: int) -> OnnxRuntimeSlots:
        """Slots in host memory; see `base.Backend`."""
        return OnnxRuntimeSlots(self._decoder, self._dims, SlotBuffers(capacity, self._decoder_adapters))

    def _decoder_adapters(self, stack: LoadedStack) -> dict[str, NDArray[Any]]:
        """The decoder's part [1, R, ...] of a stack, in host memory."""
        tensors = stack.tensors or self._carried
        return {spec.name: tensors[spec.name].numpy() for spec in decoder_inputs(self._dims) if spec.name in tensors}

    @functools.cached_property
    def _carried(self) -> Mapping[str, Any]:
        """The stack that the graphs carry: the engine does not give its own copy away, so it is read once more."""
        names = [entry.name for entry in self._manifest.adapters]
        return self.load_stack(read_stack(self._directory, names, self._dims)).tensors

    def close(self) -> None:
        """Frees both graphs and gives their memory back to the system."""
        del self._encoder, self._decoder
        _trim_heap()


class OnnxRuntimeBatch:
    """B utterances in the decoder; see `base.DecodingBatch`."""

    def __init__(self, binding: Binding, cache: GrowingCache, dims: Dimensions, cross_by_row: Sequence[str]) -> None:
        self._binding, self.cache, self._dims, self._cross_by_row = binding, cache, dims, cross_by_row
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
        for name in self._cross_by_row:
            self._binding.connect(name, _rows(self._binding.connected(name), places))
        self._binding.connect_all(stack.tensors, [spec.name for spec in decoder_inputs(self._dims)])
        self.cache.advance([_rows(value, places) for value in self.cache.values])
        self._next_ids = _rows(self._next_ids, places)
        self._binding.place("row_mask", row_mask)


class OnnxRuntimeSlots:
    """Utterances that join and leave between runs; see `base.Slots`."""

    def __init__(self, decoder: Any, dims: Dimensions, buffers: SlotBuffers) -> None:
        self._decoder, self._buffers = decoder, buffers
        self._names = [spec.name for spec in decoder_inputs(dims)]
        self._pasts, self._presents = (list(names) for names in zip(*cache_names(dims), strict=True))
        self._binding: Binding | None = None

    @property
    def count(self) -> int:
        """Live utterances."""
        return self._buffers.count

    def join(
        self, encoded: Encoded, stack: LoadedStack, control: Control, batch: OnnxRuntimeBatch, length: int
    ) -> None:
        """Takes the utterance's tensors, which the next run finds in the buffers."""
        cross = {name: tensor.numpy() for name, tensor in encoded.tensors.items()}
        self._buffers.join(stack, cross, control, [value.numpy() for value in batch.cache.values], length)

    def leave(self, place: int) -> None:
        """Moves the last utterance into the place."""
        self._buffers.leave(place)

    def run(self, ids: Sequence[NDArray[np.int64]], *, logits: bool = False) -> list[Step]:
        """One token for every row of every live utterance."""
        if self._buffers.arrange() or self._binding is None:
            self._binding = self._bound()
        binding, lengths = self._binding, self._buffers.lengths
        binding.feed("ids", self._buffers.ids(ids))
        binding.feed("position", lengths)
        binding.feed("prompt_last", lengths - 1)
        kept, step = binding.step(self._presents, logits=logits)
        self._buffers.advance([value.numpy() for value in kept])
        for name, value in zip(self._pasts, kept, strict=True):
            binding.connect(name, value)
        return self._buffers.split(step)

    def _bound(self) -> Binding:
        """A binding of all live utterances; a new one, because an input without a tensor must not keep an older one."""
        binding, buffers = Binding(self._decoder, *HOST), self._buffers
        if buffers.stack is not None:
            binding.connect_all(buffers.stack.tensors, self._names)
        for name, array in {**buffers.inputs(), **dict(zip(self._pasts, buffers.caches, strict=True))}.items():
            binding.place(name, array)
        return binding


def _cache_type(decoder: Any) -> np.dtype[Any]:
    """What a graph holds its caches in, and with them adapters and cross tensors."""
    (found,) = (item.type for item in decoder.get_inputs() if item.name == "past_k0")
    if found not in _ELEMENT_TYPES:
        raise BackendError(
            f"The graphs hold their caches as {found}; this backend takes {', '.join(_ELEMENT_TYPES)}. "
            "Load another precision, such as precision='fp32'."
        )
    return _ELEMENT_TYPES[found]


def _rows(value: Any, places: NDArray[np.int64]) -> Any:
    """Some rows of a tensor [B, R, ...] in host memory."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(value.numpy().take(places, axis=1))


def _trim_heap() -> None:
    """Makes glibc return freed memory, of which it would keep nearly all; other C libraries need no asking."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
