"""Slots: utterances of different age that share every run of the decoder, on the CPU.

    slots = backend.open_slots(stack, capacity=8)
    slots.join(encoded, control, batch)      # an utterance whose prompt was fed as a batch of one
    step = slots.run(ids)                    # one token for every live utterance
    slots.leave(0)                           # the last utterance moves into the place that is free

The live utterances are always the first `count` places of every buffer, so a run reads no more than what is alive. The
self-attention caches are as long as the oldest live utterance; younger ones are padded on the left, which `first_valid`
hides. Cross-attention tensors, tens of megabytes per utterance, are copied once when it joins, and once more if it is
moved; the decoder reads views of the buffers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from das_asr.runtime.backends.base import Control

__all__ = ["SlotBuffers"]

Array = NDArray[Any]


class SlotBuffers:
    """What the utterances of a set of slots have in memory; the backend binds it and runs the graph.

    Attributes:
        count: live utterances n.
        lengths: i64 [n], cached tokens of each.
        caches: `past_*` tensors [n, R, H, T, d] in the order of `contract.cache_names`, T the largest length.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.count = 0
        self.lengths = np.zeros(0, np.int64)
        self.caches: list[Array] = []
        self._cross: dict[str, Array] = {}  # name -> [capacity, ...]
        self._control: Control | None = None

    def join(self, cross: Mapping[str, Array], control: Control, caches: Sequence[Array], length: int) -> None:
        """Adds one utterance behind the others.

        Args:
            cross: its cross tensors [1, ...].
            control: of a batch of one.
            caches: its caches [1, R, H, length, d], without padding.
            length: tokens in them.
        """
        assert self.count < self.capacity
        for name, array in cross.items():
            buffer = self._cross.get(name)
            if buffer is None:
                # Pages that no utterance ever uses take no memory.
                buffer = self._cross[name] = np.empty((self.capacity, *array.shape[1:]), array.dtype)
            buffer[self.count] = array[0]
        longest = max(length, self._longest)
        if self.count:
            pairs = zip(self.caches, caches, strict=True)
            self.caches = [np.concatenate([_padded(a, longest), _padded(b, longest)]) for a, b in pairs]
        else:
            self.caches = [cache.copy() for cache in caches]  # theirs live as long as the batch of one
        self._control = control if self._control is None else _concatenated(self._control, control)
        self.lengths = np.append(self.lengths, length)
        self.count += 1

    def leave(self, place: int) -> None:
        """Frees the place of an utterance; the last one moves into it."""
        last = self.count - 1
        order = np.arange(last)
        if place != last:
            order[place] = last
            for buffer in self._cross.values():
                buffer[place] = buffer[last]
        self.count = last
        unused = self._longest
        self.lengths = self.lengths[order]
        unused -= self._longest
        self.caches = [np.ascontiguousarray(cache[order, :, :, unused:]) for cache in self.caches] if last else []
        assert self._control is not None
        self._control = _taken(self._control, order) if last else None

    def advance(self, caches: Sequence[Array]) -> None:
        """Takes the caches that a run wrote, one token longer."""
        self.caches = list(caches)
        self.lengths = self.lengths + 1

    def cross(self) -> dict[str, Array]:
        """Views [n, ...] of the cross tensors of the live utterances."""
        return {name: buffer[: self.count] for name, buffer in self._cross.items()}

    def control(self) -> Control:
        """Control values of the live utterances, with the padding that their caches have now."""
        assert self._control is not None
        return dataclasses.replace(self._control, first_valid=self._longest - self.lengths)

    @property
    def _longest(self) -> int:
        return int(self.lengths.max()) if len(self.lengths) else 0


def _padded(cache: Array, length: int) -> Array:
    """[n, R, H, T, d] -> [n, R, H, length, d] with zeros on the left, which no query sees."""
    missing = length - cache.shape[3]
    return np.pad(cache, ((0, 0), (0, 0), (0, 0), (missing, 0), (0, 0))) if missing else cache


def _concatenated(first: Control, second: Control) -> Control:
    return Control(**{name: np.concatenate([value, getattr(second, name)]) for name, value in vars(first).items()})


def _taken(control: Control, order: NDArray[np.int64]) -> Control:
    return Control(**{name: value[order] for name, value in vars(control).items()})
