"""What is being decoded with a self-attention cache of fixed size: batches, and slots for continuous batching.

Runs are queued ahead: while the host looks at a step's outcome, the device works on the next one. If nobody asks for
that one, because the text has ended or the host feeds ids of its own, it did no harm: the cache slots it wrote are
written again before they are read. A host that has fed its own ids once will do so again, so no more are queued for it.

A prompt longer than `contract.longest_run` is fed in pieces, each of which sees what those before it left in the cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from das_asr.runtime.backends.base import Control, Encoded, LoadedStack, Step, Traffic
from das_asr.runtime.backends.memory import DeviceLock
from das_asr.runtime.backends.runner import Lease, Pool, Runner, Turn
from das_asr.runtime.backends.workspace import CONTROL
from das_asr.runtime.contract import longest_run

__all__ = ["StaticBatch", "StaticEncoded", "StaticSlots", "StaticStack"]


@dataclass(frozen=True)
class StaticStack(LoadedStack):
    """A stack of adapters on the device, and the runners that decode with it."""

    rank: int
    pool: Pool


@dataclass(frozen=True)
class StaticEncoded(Encoded):
    """Utterances that lie encoded in a leased workspace."""

    lease: Lease


class StaticBatch:
    """B utterances in the decoder; see `base.DecodingBatch`."""

    def __init__(self, lock: DeviceLock, lease: Lease, control: Control) -> None:
        self._lock, self.lease = lock, lease
        self._first_traffic = {name: array.nbytes for name, array in control.feeds().items() if name in CONTROL}
        self._ahead: Turn | None = None
        self._guesses = lease.runner.memory.ahead  # whether the next step is worth queuing
        self.traffic: list[Traffic] = []

    def run(
        self, position: NDArray[np.int64], prompt_last: NDArray[np.int64],
        ids: NDArray[np.int64] | None = None, *, logits: bool = False,
    ) -> Step:  # fmt: skip
        """Runs the decoder, a long prompt in pieces, and queues the step that will most likely come next."""
        runner = self.lease.runner
        with self._lock:
            turn, self._ahead = self._ahead, None
            if turn is not None and ids is not None:
                self._guesses = False
            if turn is None or ids is not None or not turn.was_for(position, prompt_last):
                turn = self._queue(position, prompt_last, ids)
            fetched = runner.logits(turn) if logits else None
            if self._guesses and not logits:
                self._ahead = runner.queue_next(turn)
        self._count(turn)
        return dataclasses.replace(turn.outcome(), logits=fetched)

    def keep_rows(self, places: NDArray[np.int64], row_mask: NDArray[np.bool_], stack: LoadedStack) -> None:
        """Never asked for; see `StaticBackend.prunes`."""
        del places, row_mask, stack
        raise AssertionError("rows were to leave, but this backend keeps all of them")

    def _queue(
        self, position: NDArray[np.int64], prompt_last: NDArray[np.int64], ids: NDArray[np.int64] | None
    ) -> Turn:
        """Queues a run, or several; nobody asks for the outcome of any but the last."""
        runner = self.lease.runner
        if ids is None:
            return runner.queue(position, prompt_last, None)
        *pieces, last = _pieces(position, prompt_last, ids, longest_run(runner.workspace.dims))
        for piece in pieces:
            self._count(runner.queue(*piece))
        return runner.queue(*last)

    def _count(self, turn: Turn) -> None:
        turn.traffic.to_device.update(self._first_traffic)
        self._first_traffic = {}
        self.traffic.append(turn.traffic)


class StaticSlots:
    """Utterances of one stack that join and leave between runs; see `base.Slots`."""

    def __init__(self, lock: DeviceLock, lease: Callable[[StaticStack], Lease]) -> None:
        """Takes the lock of the device, and what finds places for utterances of a stack."""
        self._lock, self._find = lock, lease
        self._lease: Lease | None = None
        self._rows = 0
        self._lengths = np.zeros(0, np.int64)  # cached tokens of each

    @property
    def count(self) -> int:
        """Live utterances."""
        return len(self._lengths)

    def join(self, encoded: Encoded, stack: LoadedStack, control: Control, batch: Any, length: int) -> None:
        """Copies the utterance's tensors, its control values among them, into the next place.

        Raises:
            BackendError: there is no memory for the places, or they are more than an engine takes.
        """
        del encoded, control  # the batch has both
        assert isinstance(batch, StaticBatch)
        assert isinstance(stack, StaticStack)
        with self._lock:
            if self._lease is None:
                self._lease, self._rows = self._find(stack), stack.rows
            self._lease.runner.adopt(self.count, batch.lease.runner, 0)
        self._lengths = np.append(self._lengths, length)

    def leave(self, place: int) -> None:
        """Copies the last utterance into the place."""
        last = self.count - 1
        if place != last:
            with self._lock:
                self._runner.adopt(place, self._runner, last)
        lengths = self._lengths.copy()  # a turn may hold the old ones
        lengths[place] = lengths[last]
        self._lengths = lengths[:last]

    def run(self, ids: Sequence[NDArray[np.int64]], *, logits: bool = False) -> list[Step]:
        """One token for every row of every live utterance."""
        runner = self._runner
        with self._lock:
            turn = runner.queue(self._lengths, self._lengths - 1, np.stack(ids))
            fetched = runner.logits(turn) if logits else None
        self._lengths = self._lengths + 1
        step = dataclasses.replace(turn.outcome(), logits=fetched)
        return [step.of(place, self._rows) for place in range(self.count)]

    @property
    def _runner(self) -> Runner:
        assert self._lease is not None
        return self._lease.runner


_Piece = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
"""Position [B], prompt_last [B] and ids [B, R, n] of a run."""


def _pieces(
    position: NDArray[np.int64], prompt_last: NDArray[np.int64], ids: NDArray[np.int64], longest: int
) -> Iterator[_Piece]:
    """Splits a run into runs of at most so many tokens. Each ends where its own last token is read.

    Prompts are padded on the left, so they end together, in the last piece; others may begin later than the first one.
    """
    for first in range(0, ids.shape[2], longest):
        piece = ids[:, :, first : first + longest]
        begin = position + first
        yield _unpadded(begin, np.minimum(prompt_last, begin + piece.shape[2] - 1), piece)


def _unpadded(position: NDArray[np.int64], prompt_last: NDArray[np.int64], ids: NDArray[np.int64]) -> _Piece:
    """Moves the padding of prompts from the left, where positions are negative, to the right.

    There it needs no mask and no slot of its own: nothing sees it, and each utterance's next tokens overwrite it. An
    utterance of nothing but padding writes some from slot 0 on, and what it chooses is not asked for.
    """
    if (position >= 0).all():
        return position, prompt_last, ids
    pads = np.maximum(-position, 0)
    moved = np.stack([np.roll(utterance, -pad, axis=1) for utterance, pad in zip(ids, pads, strict=True)])
    return position + pads, prompt_last, moved
