"""Decoding with a self-attention cache of fixed size, on any engine that binds tensors by address.

What differs between engines is behind two contracts: `Memory` (where tensors lie) and `Program` (a compiled graph). The
rest is here and in `static_batch.py`: utterances are encoded into the workspace they are decoded in, caches are updated
in place, the graph's choice is fed back on the device, and the host reads a few bytes per step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from das_asr.runtime.adapters import Stack, rounded_tensors
from das_asr.runtime.backends.base import Control, Encoded, LoadedStack
from das_asr.runtime.backends.memory import Buffer, DeviceLock, Memory
from das_asr.runtime.backends.runner import Lease, Pool, Program, Runner
from das_asr.runtime.backends.static_batch import StaticBatch, StaticEncoded, StaticSlots, StaticStack
from das_asr.runtime.backends.workspace import Workspace
from das_asr.runtime.contract import RULE_CODES, DType
from das_asr.runtime.manifest import Dimensions

__all__ = ["Graphs", "StaticBackend", "adapter_tensors", "unlimited"]


def unlimited(batch: int, rows: int, rank: int) -> None:
    """`Graphs.check` of graphs that take any number of utterances and rows and any rank."""


@dataclass(frozen=True)
class Graphs:
    """The two compiled graphs of a precision, and what must be known of them.

    Attributes:
        dtype: of adapters, cross tensors and caches.
        alone: whether the encoder must be run on one utterance at a time, see `contract.ALONE`.
        check: raises a BackendError if so many utterances, rows or ranks are more than the graphs take.
    """

    encoder: Program
    decoder: Program
    dtype: DType
    alone: bool
    check: Callable[[int, int, int], None] = unlimited


class StaticBackend:
    """One bundle on one device; see `base.Backend`."""

    def __init__(self, memory: Memory, graphs: Graphs, dims: Dimensions, carried: Stack | tuple[int, int]) -> None:
        """Takes compiled graphs.

        Args:
            memory: of the device.
            graphs: compiled for it.
            dims: of the graphs.
            carried: what `load_stack(None)` means: a stack to be loaded, or rows and rank of the stack that the graphs
                carry themselves.
        """
        self._memory, self._graphs, self._dims, self._carried = memory, graphs, dims, carried
        self._lock = DeviceLock(memory)
        self._warm: StaticStack | None = None  # what was warmed up, until somebody asks for it

    @property
    def prunes(self) -> bool:
        """No: on a GPU a row costs less than a copy of the caches."""
        return False

    @property
    def mixes(self) -> bool:
        """No: a workspace belongs to a stack of adapters, with its number of rows and its rank."""
        return False

    def load_stack(self, stack: Stack | None) -> StaticStack:
        """Puts adapters on the device."""
        if stack is None and self._warm is not None:
            warm, self._warm = self._warm, None  # not kept: with the last reference to a stack its memory is free
            return warm
        wanted = self._carried if stack is None else stack
        if isinstance(wanted, tuple):
            return self._stack(*wanted, {})
        self._graphs.check(1, wanted.rows, wanted.rank)
        arrays = adapter_tensors(wanted, self._graphs.dtype)
        with self._lock:
            tensors = {name: self._upload(array) for name, array in arrays.items()}
        return self._stack(wanted.rows, wanted.rank, tensors)

    def encode(self, features: NDArray[np.float32], stack: LoadedStack) -> StaticEncoded:
        """Runs the encoder on features [B, mels, frames], into a workspace of its own."""
        assert isinstance(stack, StaticStack)
        count = len(features)
        self._graphs.check(count, stack.rows, stack.rank)
        with self._lock:
            lease = stack.pool.lease(count)
            workspace = lease.runner.workspace
            workspace.audio = features.shape[2] // 2
            self._memory.write(workspace.tensor("features", count), features)
            runs = [(index, 1) for index in range(count)] if self._graphs.alone else [(0, count)]
            for first, size in runs:
                tensors = {**stack.tensors, **workspace.encoding(first, size)}
                self._graphs.encoder.bind(tensors, repeated=False).run()
        return StaticEncoded(count, {}, lease)

    def start(self, encoded: Encoded, stack: LoadedStack, control: Control) -> StaticBatch:
        """Decodes where the utterances were encoded; a second batch of the same utterances gets a copy of them."""
        assert isinstance(encoded, StaticEncoded)
        assert isinstance(stack, StaticStack)
        with self._lock:
            lease = encoded.lease
            if lease.decoding:
                lease = stack.pool.lease(encoded.batch)
                for place in range(encoded.batch):
                    lease.runner.adopt(place, encoded.lease.runner, place)
            lease.decoding = True
            lease.runner.control(control.feeds(), 0)
        return StaticBatch(self._lock, lease, control)

    def open_slots(self, capacity: int) -> StaticSlots:
        """Places in a workspace of the stack that the first utterance brings."""

        def lease(stack: StaticStack) -> Lease:
            self._graphs.check(capacity, stack.rows, stack.rank)
            return stack.pool.lease(capacity)

        return StaticSlots(self._lock, lease)

    def warm_up(self) -> None:
        """Runs encoder, prompt and step once on silence, so that no request pays for what engines do at first.

        The stack it takes is the one that `load_stack(None)` returns next.
        """
        stack = self.load_stack(None)
        rows, dims = stack.rows, self._dims
        bias = np.zeros((1, dims.vocabulary), np.float32)
        control = Control(
            rule=np.full(1, RULE_CODES["base"], np.int64),
            tau=np.zeros(1, np.float32),
            token_bias=bias,
            first_token_bias=bias,
            row_mask=np.ones((1, rows), np.bool_),
            first_valid=np.zeros(1, np.int64),
        )
        silence = np.zeros((1, dims.mels, dims.frames), np.float32)
        batch = self.start(self.encode(silence, stack), stack, control)
        batch.run(np.array([0]), np.array([1]), np.zeros((1, rows, 2), np.int64))
        for position in (2, 3):  # the second may be recorded as a graph
            batch.run(np.array([position]), np.array([1]))
        self._warm = stack

    def close(self) -> None:
        """Waits for the device and frees the graphs."""
        with self._lock:
            self._memory.close()
            self._warm = None
            del self._graphs

    def _upload(self, array: NDArray[Any]) -> Buffer:
        buffer = self._memory.allocate(array.shape, self._graphs.dtype)
        self._memory.write(buffer, array)
        return buffer

    def _stack(self, rows: int, rank: int, tensors: Mapping[str, Buffer]) -> StaticStack:
        memory, graphs, dims = self._memory, self._graphs, self._dims

        def make(places: int) -> Runner:
            workspace = Workspace(memory, dims, graphs.dtype, places, rows, rank)
            return Runner(memory, graphs.decoder, workspace, tensors)

        return StaticStack(rows, tensors, rank, Pool(make))


def adapter_tensors(stack: Stack, dtype: DType) -> dict[str, NDArray[Any]]:
    """The tensors of a stack in the dtype of the graphs; bfloat16, which NumPy lacks, as its bits.

    Raises:
        AdapterError: an adapter has values beyond its range.
    """
    if dtype == "bfloat16":
        return {name: _bfloat16(tensor) for name, tensor in stack.tensors.items()}
    return rounded_tensors(stack, np.dtype(dtype))


def _bfloat16(array: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper half of the bits, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(array).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
