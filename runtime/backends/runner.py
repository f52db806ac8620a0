"""Runs of the decoder on one workspace with one stack of adapters, and the pool such runners come from."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from das_asr.runtime.backends.base import Step, Traffic
from das_asr.runtime.backends.memory import Buffer, Mailbox, Memory, host_buffer
from das_asr.runtime.backends.workspace import CONTROL, INBOX, OUTBOX, Workspace

__all__ = ["Bound", "Lease", "Pool", "Program", "Runner", "Turn", "attended_slots"]

_BUCKETS = (64, 128, 256)  # few enough that a CUDA graph for each is captured soon
_KEPT_PLACES = 16  # of workspaces that nobody uses at the moment


class Bound(Protocol):
    """A compiled graph with all its tensors bound."""

    def run(self) -> None:
        """Queues one run."""
        ...


class Program(Protocol):
    """A compiled graph."""

    def bind(self, tensors: Mapping[str, Buffer], *, repeated: bool) -> Bound:
        """Binds tensors by name for any number of runs.

        Args:
            tensors: may hold others than the graph's; those are passed over.
            repeated: whether it will be run so often that recording it as a CUDA graph pays.
        """
        ...


@dataclass(frozen=True)
class Turn:
    """One run that was queued, and where its outcome will be."""

    workspace: Workspace
    box: Mailbox
    position: NDArray[np.int64]  # [n]
    prompt_last: NDArray[np.int64]  # [n]
    traffic: Traffic

    def was_for(self, position: NDArray[np.int64], prompt_last: NDArray[np.int64]) -> bool:
        """Whether this is the run with these inputs."""
        return np.array_equal(self.position, position) and np.array_equal(self.prompt_last, prompt_last)

    def outcome(self) -> Step:
        """Waits for the run; call it once."""
        self.box.wait()
        row, candidate, logprob = (self.workspace.take(self.box, name, len(self.position)) for name in OUTBOX)
        self.traffic.to_host.update(row=row.nbytes, candidate=candidate.nbytes, logprob=logprob.nbytes)
        return Step(
            cast("NDArray[np.int64]", row), cast("NDArray[np.int64]", candidate), cast("NDArray[np.float32]", logprob)
        )


class Runner:
    """Queues runs of the decoder; the caller sees to it that one thread at a time does."""

    def __init__(self, memory: Memory, decoder: Program, workspace: Workspace, adapters: Mapping[str, Buffer]) -> None:
        self.memory, self.workspace = memory, workspace
        self._decoder, self._adapters = decoder, adapters
        self._slots = workspace.dims.text_positions
        self._boxes = cycle(workspace.boxes)
        self._steps: dict[tuple[int, int, int], Bound] = {}  # (utterances, attended slots, audio) -> one new token
        self._attended: dict[int, Buffer] = {}  # on the host; a run that is queued may still read it

    def clear(self) -> None:
        """Forgets what was decoded: numbers that are no longer finite would get into what is decoded next."""
        for cache in self.workspace.caches():
            self.memory.zero(cache)

    def control(self, values: Mapping[str, NDArray[np.generic]], place: int) -> None:
        """Writes the control values [n, ...] of utterances from a place on."""
        for name in CONTROL:
            target = self.workspace.tensor(name, self.workspace.places)
            self.memory.write(target.part(place, len(values[name])), values[name])

    def queue(self, position: NDArray[np.int64], prompt_last: NDArray[np.int64], ids: NDArray[np.int64] | None) -> Turn:
        """Queues a run over the first n utterances.

        Args:
            position: int64 [n], of the first new token, 0 or above: it is also the cache slot.
            prompt_last: int64 [n].
            ids: int64 [n, R, width]; None feeds the choice of the run before.
        """
        count, width = len(position), 1 if ids is None else ids.shape[2]
        attended = attended_slots(int(position.max()) + width, self._slots)
        turn = Turn(self.workspace, next(self._boxes), position, prompt_last, Traffic())
        self._send(turn, ids)
        self._bound(count, width, attended).run()
        turn.box.receive(self.workspace.outbox)
        return turn

    def queue_next(self, turn: Turn) -> Turn:
        """Queues the step behind a run, as it will be if the graph's choice is fed and nobody has ended."""
        position = np.maximum(turn.position, turn.prompt_last) + 1
        return self.queue(np.minimum(position, self._slots - 1), turn.prompt_last, None)

    def logits(self, turn: Turn) -> NDArray[np.float32]:
        """The logits [n, R, V] of the run that was queued last."""
        source = self.workspace.tensor("logits", len(turn.position))
        array = np.empty(source.shape, np.float32)
        self.memory.read(source, array)
        return array

    def adopt(self, place: int, other: Runner, origin: int) -> None:
        """Copies an utterance, caches and control values included, from a place of another runner, or of this one."""
        self.workspace.audio = other.workspace.audio  # of all utterances that share a workspace
        targets = self.workspace.utterance(place)
        for name, source in other.workspace.utterance(origin).items():
            self.memory.copy(targets[name], source)

    def _send(self, turn: Turn, ids: NDArray[np.int64] | None) -> None:
        workspace, count = self.workspace, len(turn.position)
        turn.box.wait()  # its memory may still be on the way from a turn that nobody asked for
        for name in INBOX:
            values = getattr(turn, name)
            workspace.put(turn.box, name, values)
            turn.traffic.to_device[name] = values.nbytes
        turn.box.send(workspace.inbox)
        target = workspace.tensor("ids", count)
        if ids is None:
            self.memory.copy(target.shaped(count, workspace.rows, 1), workspace.tensor("next_ids", count))
        else:
            self.memory.write(target.shaped(*ids.shape), ids)
            turn.traffic.to_device["ids"] = ids.nbytes

    def _bound(self, count: int, width: int, attended: int) -> Bound:
        if width > 1:
            return self._bind(count, width, attended, repeated=False)
        key = (count, attended, self.workspace.audio)
        if key not in self._steps:
            self._steps[key] = self._bind(count, 1, attended, repeated=True)
        return self._steps[key]

    def _bind(self, count: int, width: int, attended: int, *, repeated: bool) -> Bound:
        tensors = {**self._adapters, **self.workspace.inputs(count, width)}
        if attended not in self._attended:
            self._attended[attended] = host_buffer(np.array([attended], np.int64))
        tensors["attended"] = self._attended[attended]
        return self._decoder.bind(tensors, repeated=repeated)


class Lease:
    """A runner in use; it goes back to its pool with the last reference to the lease."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.decoding = False  # whether a batch has its caches in it


class Pool:
    """Runners of one stack: made when needed, and kept for the next request."""

    def __init__(self, make: Callable[[int], Runner]) -> None:
        self._make = make
        self._free: deque[Runner] = deque()

    def lease(self, count: int) -> Lease:
        """A runner with places for `count` utterances, rounded up so that few sizes occur; its caches are zeros.

        Raises:
            BackendError: there is no memory for it.
        """
        places = 1 << (count - 1).bit_length()
        fitting = next((runner for runner in list(self._free) if runner.workspace.places == places), None)
        if fitting is None:
            self._shrink(places)
            fitting = self._make(places)
        else:
            self._free.remove(fitting)
            fitting.clear()
        lease = Lease(fitting)
        weakref.finalize(lease, self._free.append, fitting).atexit = False
        return lease

    def _shrink(self, places: int) -> None:
        """Lets go of runners that have been free for longest, so that those of all sizes do not pile up."""
        while self._free and places + sum(runner.workspace.places for runner in list(self._free)) > _KEPT_PLACES:
            self._free.popleft()


def attended_slots(needed: int, slots: int) -> int:
    """How many cache slots a run reads: the needed ones, rounded up to one of few numbers."""
    return min((size for size in (*_BUCKETS, slots) if needed <= size <= slots), default=slots)
