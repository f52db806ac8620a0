"""Slots: utterances of different age and with different adapters that share every run of the decoder, on the CPU.

    slots = backend.open_slots(capacity=8)
    slots.join(encoded, stack, control, batch, length)   # an utterance whose prompt was fed as a batch of one
    steps = slots.run(ids)                               # one token for every live utterance
    slots.leave(0)                                       # the last utterance moves into the place that is free

The live utterances are always the first `count` places of every buffer, so a run reads no more than what is alive. The
self-attention caches are as long as the oldest live utterance; younger ones are padded on the left, which `first_valid`
hides. Cross-attention tensors, tens of megabytes per utterance, are copied once when it joins, and once more if it is
moved; the decoder reads views of the buffers.

While all live utterances have the same stack of adapters, a run takes that stack as it is. As soon as one has another,
each place gets a copy of its own, and as soon as all are alike again the copies go. A run has as many rows, and
adapters of as large a rank, as the largest stack among the live utterances; what smaller ones lack is zeros, and
`row_mask` keeps the rows that they lack out of the selection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from das_asr.runtime.backends.base import Control, LoadedStack, Step

__all__ = ["PaddedPlaces", "SlotBuffers"]

Array = NDArray[Any]
ReadAdapters = Callable[[LoadedStack], Mapping[str, Array]]


class PaddedPlaces:
    """One tensor of every utterance, in a buffer that is in every axis as large as the largest of them.

    Whoever is smaller is padded with zeros behind.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._buffer: Array | None = None  # [capacity, ...]
        self._shapes: list[tuple[int, ...]] = []  # of each utterance's own part

    def put(self, place: int, array: Array) -> None:
        """Makes an array [...] the content of a place, the last from now on."""
        kept = self._shapes[:place]
        target = self._fitted(kept, [*kept, array.shape], array.dtype)[place, ...]
        if target.shape != array.shape:
            target[...] = 0
        target[tuple(map(slice, array.shape))] = array
        self._shapes = [*kept, array.shape]

    def leave(self, place: int, last: int) -> None:
        """Frees a place; what is in the last one moves into it."""
        if place != last:
            assert self._buffer is not None
            self._buffer[place], self._shapes[place] = self._buffer[last], self._shapes[last]
        self._shapes = self._shapes[:last]
        if self._buffer is not None and last:
            self._fitted(self._shapes, self._shapes, self._buffer.dtype)

    def view(self, count: int) -> Array:
        """The first places [count, ...] of the buffer."""
        assert self._buffer is not None
        return self._buffer[:count]

    def _fitted(self, kept: list[tuple[int, ...]], wanted: list[tuple[int, ...]], dtype: np.dtype[Any]) -> Array:
        """The buffer as large as is wanted, with what is kept in it."""
        shape = (self._capacity, *map(max, zip(*wanted, strict=True)))
        if self._buffer is None or self._buffer.shape != shape:
            old, self._buffer = self._buffer, np.zeros(shape, dtype)  # pages that no utterance ever uses take no memory
            for place, size in enumerate(kept):
                assert old is not None
                part = tuple(map(slice, size))
                self._buffer[place, ...][part] = old[place, ...][part]
        return self._buffer


class SlotBuffers:
    """What the utterances of a set of slots have in memory; the backend binds it and runs the graph.

    Attributes:
        count: live utterances n.
        lengths: i64 [n], cached tokens of each.
        caches: `past_*` tensors [n, R, H, T, d] in the order of `contract.cache_names`, R the most rows that one of
            them has, T the largest length.
    """

    def __init__(self, capacity: int, read_adapters: ReadAdapters) -> None:
        """Makes room for utterances.

        Args:
            capacity: how many.
            read_adapters: gives the decoder's adapter tensors [1, R, ...] of a stack.
        """
        self.capacity = capacity
        self.count = 0
        self.lengths = np.zeros(0, np.int64)
        self.caches: list[Array] = []
        self._read_adapters = read_adapters
        self._stacks: list[LoadedStack] = []
        self._fixed: dict[str, PaddedPlaces] = {}  # cross tensors and control values
        self._adapters: dict[str, PaddedPlaces] = {}  # empty while all have the same stack

    @property
    def stack(self) -> LoadedStack | None:
        """The stack that all live utterances have, or None where they differ: `inputs` then has their adapters."""
        return None if self._adapters else self._stacks[0]

    def join(
        self, stack: LoadedStack, cross: Mapping[str, Array], control: Control, caches: Sequence[Array], length: int
    ) -> None:
        """Adds one utterance behind the others.

        Args:
            stack: its adapters.
            cross: its cross tensors [1, ...].
            control: of a batch of one.
            caches: its caches [1, R, H, length, d], without padding.
            length: tokens in them.
        """
        assert self.count < self.capacity
        stacks = [*self._stacks, stack]
        self._copy_adapters(stacks)
        self._put(self._fixed, self.count, {**cross, **control.feeds()})
        rows, longest = _most_rows(stacks), max(length, self._longest)
        if self.count:
            pairs = zip(self.caches, caches, strict=True)
            self.caches = [np.concatenate([_padded(a, rows, longest), _padded(b, rows, longest)]) for a, b in pairs]
        else:
            self.caches = [cache.copy() for cache in caches]  # theirs live as long as the batch of one
        self._stacks = stacks
        self.lengths = np.append(self.lengths, length)
        self.count += 1

    def leave(self, place: int) -> None:
        """Frees the place of an utterance; the last one moves into it."""
        last = self.count - 1
        order = np.arange(last)
        if place != last:
            order[place] = last
        self._stacks = [self._stacks[index] for index in order]
        if _alike(self._stacks):
            self._adapters = {}
        for places in (*self._fixed.values(), *self._adapters.values()):
            places.leave(place, last)
        self.count = last
        unused = self._longest
        self.lengths = self.lengths[order]
        unused -= self._longest
        rows = _most_rows(self._stacks)
        self.caches = [np.ascontiguousarray(cache[order, :rows, :, unused:]) for cache in self.caches] if last else []

    def advance(self, caches: Sequence[Array]) -> None:
        """Takes the caches that a run wrote, one token longer."""
        self.caches = list(caches)
        self.lengths = self.lengths + 1

    def inputs(self) -> dict[str, Array]:
        """What stays the same until somebody joins or leaves, by the decoder's input names: views [n, ...].

        These are cross tensors, control values with the padding that the caches have now, and the adapters unless
        `stack` has them.
        """
        views = {name: places.view(self.count) for name, places in {**self._fixed, **self._adapters}.items()}
        return views | {"first_valid": self._longest - self.lengths}

    def ids(self, ids: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
        """The ids [n, R, 1] of a run: those of each utterance's own rows, and any for the rows that it lacks."""
        padded = np.zeros((self.count, _most_rows(self._stacks), 1), np.int64)
        for place, own in enumerate(ids):
            padded[place, : len(own)] = own
        return padded

    def split(self, step: Step) -> list[Step]:
        """The outcome of a run for each utterance, with the rows that it has."""
        return [step.of(place, stack.rows) for place, stack in enumerate(self._stacks)]

    def _copy_adapters(self, stacks: Sequence[LoadedStack]) -> None:
        """Gives each utterance its own copy of its adapters, where stacks differ."""
        if _alike(stacks):
            return
        first = self.count if self._adapters else 0
        tensors = [self._read_adapters(stack) for stack in stacks[first:]]  # may fail, so before anything changes
        for place, arrays in enumerate(tensors, first):
            self._put(self._adapters, place, arrays)

    def _put(self, buffers: dict[str, PaddedPlaces], place: int, arrays: Mapping[str, Array]) -> None:
        for name, array in arrays.items():
            if name not in buffers:
                buffers[name] = PaddedPlaces(self.capacity)
            buffers[name].put(place, array[0])

    @property
    def _longest(self) -> int:
        return int(self.lengths.max()) if len(self.lengths) else 0


def _alike(stacks: Sequence[LoadedStack]) -> bool:
    return all(stack is stacks[0] for stack in stacks)


def _most_rows(stacks: Sequence[LoadedStack]) -> int:
    return max((stack.rows for stack in stacks), default=0)


def _padded(cache: Array, rows: int, length: int) -> Array:
    """[n, R', H, T', d] -> [n, rows, H, length, d] with zeros, of which no query that counts sees any.

    Rows are added behind the others, cached tokens in front.
    """
    missing = (rows - cache.shape[1], length - cache.shape[3])
    return np.pad(cache, ((0, 0), (0, missing[0]), (0, 0), (missing[1], 0), (0, 0))) if any(missing) else cache
