"""Slots: utterances of different age and with different adapters that share every run of the decoder, on the CPU.

    slots = backend.open_slots(capacity=8)
    slots.join(encoded, stack, control, batch, length)   # an utterance whose prompt was fed as a batch of one
    steps = slots.run(ids)                               # one token for every live utterance
    slots.leave(0)                                       # the last utterance moves into the place that is free

Joining and leaving change a list; tensors are copied before the next run only (`arrange`), when it is known who takes
whose place. So whoever joins after another has left is copied into the gap and nobody moves, and an utterance that is
alone is not copied at all: the run reads the tensors it came with. Places of the buffers are not those of the list.

The live utterances always have the first places of every buffer, so a run reads no more than what is alive. The
self-attention caches are as long as the oldest live utterance; younger ones are padded on the left, which `first_valid`
hides. Cross-attention tensors, tens of megabytes per utterance, are copied once, and once more if a gap is closed; the
decoder reads views of the buffers.

While all live utterances have the same stack of adapters, a run takes that stack as it is. As soon as one has another,
each place gets a copy of its own. A place keeps its copy for the next utterance with the same stack, also while no run
needs it. A run has as many rows, and adapters of as large a rank, as the largest stack among the live utterances; what
smaller ones lack is zeros, and `row_mask` keeps the rows that they lack out of the selection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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

    def arrange(self, parts: Sequence[int | Array]) -> None:
        """Gives the first places their content.

        Args:
            parts: of each place: an array [...], or the place that has the content now. Who moves comes from behind
                all these places.
        """
        shapes = [self._shapes[part] if isinstance(part, int) else part.shape for part in parts]
        old, buffer = self._buffer, self._fitted(shapes, parts)
        for place, (part, shape) in enumerate(zip(parts, shapes, strict=True)):
            if isinstance(part, int):
                if buffer is old and part == place:
                    continue
                assert old is not None
                part = old[part, ...][tuple(map(slice, shape))]
            target = buffer[place, ...]
            if target.shape != shape:
                target[...] = 0
            target[tuple(map(slice, shape))] = part
        self._buffer, self._shapes = buffer, shapes

    def view(self, count: int) -> Array:
        """The first places [count, ...] of the buffer."""
        assert self._buffer is not None
        return self._buffer[:count]

    def _fitted(self, shapes: Sequence[tuple[int, ...]], parts: Sequence[int | Array]) -> Array:
        """A buffer as large as the shapes: the one there is, or an empty one."""
        shape = (self._capacity, *map(max, zip(*shapes, strict=True)))
        if self._buffer is not None and self._buffer.shape == shape:
            return self._buffer
        dtypes = [part.dtype for part in parts if not isinstance(part, int)]
        dtype = dtypes[0] if self._buffer is None else self._buffer.dtype
        return np.zeros(shape, dtype)  # pages that no utterance ever uses take no memory


@dataclass(eq=False)
class _Utterance:
    """One that is alive, and what of it is not in the buffers yet."""

    stack: LoadedStack
    length: int  # cached tokens
    fixed: Mapping[str, Array]  # cross tensors and control values [1, ...]; empty once they are in the buffers
    caches: Sequence[Array]  # [1, R, H, length, d]; empty once they are in the common ones
    adapters: Mapping[str, Array]  # [1, R, ...]; empty while all have the same stack
    place: int = -1  # in the buffers; none before the first run


class SlotBuffers:
    """What the utterances of a set of slots have in memory; the backend binds it and runs the graph.

    Attributes:
        caches: `past_*` tensors [n, R, H, T, d] in the order of `contract.cache_names`, R the most rows that one of
            the n live utterances has, T the largest length.
    """

    def __init__(self, capacity: int, read_adapters: ReadAdapters) -> None:
        """Makes room for utterances.

        Args:
            capacity: how many.
            read_adapters: gives the decoder's adapter tensors [1, R, ...] of a stack.
        """
        self.capacity = capacity
        self.caches: list[Array] = []
        self._read_adapters = read_adapters
        self._live: list[_Utterance] = []  # as they joined and left
        self._order: list[_Utterance] = []  # as they lie in the buffers
        self._arranged = True
        self._fixed: dict[str, PaddedPlaces] = {}  # cross tensors and control values
        self._adapters: dict[str, PaddedPlaces] = {}
        self._copied: list[LoadedStack] = []  # whose adapters each place has

    @property
    def count(self) -> int:
        """Live utterances n."""
        return len(self._live)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Cached tokens [n] of each, in the order of the buffers."""
        return np.array([one.length for one in self._order], np.int64)

    @property
    def stack(self) -> LoadedStack | None:
        """The stack that all live utterances have, or None where they differ: `inputs` then has their adapters."""
        first = self._live[0].stack
        return first if all(one.stack is first for one in self._live) else None

    def join(
        self, stack: LoadedStack, cross: Mapping[str, Array], control: Control, caches: Sequence[Array], length: int
    ) -> None:
        """Adds one utterance behind the others.

        Args:
            stack: its adapters.
            cross: its cross tensors [1, ...].
            control: of a batch of one.
            caches: its caches [1, R, H, length, d], without padding; they may be written to.
            length: tokens in them.
        """
        assert self.count < self.capacity
        new = _Utterance(stack, length, {**cross, **control.feeds()}, caches, {})
        if any(one.stack is not stack for one in self._live):  # reading may fail, so before anything changes
            unread = [one for one in (*self._live, new) if not one.adapters]
            for one, adapters in [(one, self._read_adapters(one.stack)) for one in unread]:
                one.adapters = adapters
        self._live.append(new)
        self._arranged = False

    def leave(self, place: int) -> None:
        """Takes an utterance out; the last one gets its place in the list."""
        last = self._live.pop()
        if place < len(self._live):
            self._live[place] = last
        self._arranged = False

    def advance(self, caches: Sequence[Array]) -> None:
        """Takes the caches that a run wrote, one token longer."""
        self.caches = list(caches)
        for one in self._live:
            one.length += 1

    # --- Before a run ---

    def arrange(self) -> bool:
        """Brings the tensors of all who live to the first places; False if that was so since the last call."""
        if self._arranged:
            return False
        order = self._places()
        self._arrange_caches(order)
        if len(order) > 1 or not order[0].fixed:
            for name in self._fixed or order[0].fixed:
                parts = [one.fixed[name][0] if one.fixed else one.place for one in order]
                self._fixed.setdefault(name, PaddedPlaces(self.capacity)).arrange(parts)
            for one in order:
                one.fixed = {}
        if self.stack is None:
            self._copy_adapters(order)
        for place, one in enumerate(order):
            one.place, one.caches = place, ()
        self._order, self._arranged = order, True
        return True

    def _places(self) -> list[_Utterance]:
        """Who gets which place: whoever has one of the first keeps it, the others fill the gaps."""
        count = len(self._live)
        kept = {one.place: one for one in self._live if 0 <= one.place < count}
        others = (one for one in self._live if not 0 <= one.place < count)
        return [kept[place] if place in kept else next(others) for place in range(count)]

    def _arrange_caches(self, order: Sequence[_Utterance]) -> None:
        rows, longest = max(one.stack.rows for one in order), max(one.length for one in order)
        if len(order) == 1 and order[0].caches:
            self.caches = list(order[0].caches)
            return
        old = self.caches
        shapes = [(len(order), rows, *cache.shape[2:3], longest, *cache.shape[4:]) for cache in order[0].caches or old]
        stay = all(one.caches or one.place == place for place, one in enumerate(order))
        if not (stay and [cache.shape for cache in old] == shapes):
            dtype = (order[0].caches or old)[0].dtype
            self.caches = [np.zeros(shape, dtype) for shape in shapes]
        for place, one in enumerate(order):
            if self.caches is old and not one.caches:
                continue
            for index, cache in enumerate(self.caches):
                own = one.caches[index][0] if one.caches else old[index][one.place, : one.stack.rows]
                cache[place, : one.stack.rows, :, longest - one.length :] = own[:, :, own.shape[2] - one.length :]

    def _copy_adapters(self, order: Sequence[_Utterance]) -> None:
        """Gives each place the adapters of its utterance, unless it has them from one before."""
        has = [one.stack is copied for one, copied in zip(order, self._copied, strict=False)]
        has += [False] * (len(order) - len(has))
        for name in order[0].adapters:
            parts = [place if has[place] else one.adapters[name][0] for place, one in enumerate(order)]
            self._adapters.setdefault(name, PaddedPlaces(self.capacity)).arrange(parts)
        self._copied = [one.stack for one in order]

    # --- Into a run, and out of it ---

    def inputs(self) -> dict[str, Array]:
        """What stays the same until somebody joins or leaves, by the decoder's input names: views [n, ...].

        These are cross tensors, control values with the padding that the caches have now, and the adapters unless
        `stack` has them.
        """
        adapters = self._adapters if self.stack is None else {}
        places = adapters if self._order[0].fixed else {**self._fixed, **adapters}
        views = {name: places.view(self.count) for name, places in places.items()}
        lengths = self.lengths
        return {**self._order[0].fixed, **views, "first_valid": lengths.max() - lengths}

    def ids(self, ids: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
        """The ids [n, R, 1] of a run: those of each utterance's own rows, and any for the rows that it lacks."""
        padded = np.zeros((self.count, max(one.stack.rows for one in self._live), 1), np.int64)
        for one, own in zip(self._live, ids, strict=True):
            padded[one.place, : len(own)] = own
        return padded

    def split(self, step: Step) -> list[Step]:
        """The outcome of a run for each utterance, as they joined and left, with the rows that it has."""
        return [step.of(one.place, one.stack.rows) for one in self._live]
