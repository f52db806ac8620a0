"""Continuous batching: requests join and leave the decoder at any step, and one thread runs it for all of them.

    scheduler = Scheduler(backend, SchedulerOptions(max_batch=8))
    future = scheduler.submit(request)
    transcription = future.result()

Requests with the same encoder context share a lane: one run of the decoder per step, whatever their adapters, ages,
prompts, rules and limits. Where the backend cannot mix adapters, only those with the same adapters do. Lanes take
turns, a step each. Requests are admitted in the order they came, one between two steps, while there is a place and
those who wait lose more by waiting than those who are being decoded lose while the encoder runs (`Pace`). A request
that is cancelled, or whose deadline passes, leaves at the next step. While there is nothing to do the thread sleeps.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from das_asr.runtime.backends.base import Backend, LoadedStack, Slots, Step
from das_asr.runtime.decoding import DecodedBatch, Plan, Prompt, Writing, prefill, wants_logits
from das_asr.runtime.errors import ClosedError, DeadlineError, OptionError, QueueFullError
from das_asr.runtime.pace import Pace
from das_asr.runtime.results import Transcription

__all__ = ["Request", "Scheduler", "SchedulerOptions", "Stages"]

_Key = tuple[int, tuple[int, ...]]  # of a lane: which stack if they do not mix, and the shape of the features


@dataclass(frozen=True, kw_only=True)
class SchedulerOptions:
    """How requests are put together.

    Attributes:
        max_batch: utterances in the decoder at a time.
        max_queue: requests that may wait for a place; one more is refused.
    """

    max_batch: int = 8
    max_queue: int = 256

    def __post_init__(self) -> None:
        if self.max_batch < 1 or self.max_queue < 1:
            raise OptionError(f"max_batch is {self.max_batch}, max_queue {self.max_queue}; both must be at least 1.")


@dataclass
class Stages:
    """Seconds that a request spent in each stage."""

    queue: float = 0.0
    encoder: float = 0.0
    prefill: float = 0.0
    steps: list[float] = field(default_factory=list)


@dataclass(eq=False)
class Request:
    """One utterance on its way.

    Attributes:
        features: log-mel f32 [mels, frames]; those with the same number of frames share a lane.
        stack: of the rows that decode it.
        plan: how to decode; its control is that of a batch of one.
        prompts: the one prompt.
        finish: makes the result when the loop has ended.
        deadline: moment of `perf_counter`, or None.
        future: of the result; cancelling it takes the request out.
    """

    features: NDArray[np.float32]
    stack: LoadedStack
    plan: Plan
    prompts: list[Prompt]
    finish: Callable[[DecodedBatch, Stages], Transcription]
    deadline: float | None = None
    future: Future[Transcription] = field(default_factory=Future)
    submitted: float = field(default_factory=perf_counter)
    stages: Stages = field(default_factory=Stages)
    _writing: Writing | None = None

    def gone(self) -> bool:
        """Whether nobody waits for the result any more; tells a future whose deadline passed."""
        if self.future.done():
            return True
        if self.deadline is None or perf_counter() < self.deadline:
            return False
        waited = perf_counter() - self.submitted
        self.fail(DeadlineError(f"The deadline passed {waited:.3g} s after the request came. Ask for more, or retry."))
        return True

    def fail(self, error: BaseException) -> None:
        """Gives the future an error, unless it has been cancelled."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)

    def begin(self, prompts: Sequence[Prompt], step: Step) -> bool:
        """Takes the outcome of the prompt; False if that was all."""
        self._writing = Writing(self.plan, np.array([len(prompt.ids) for prompt in prompts]))
        return self._writing.write(step)

    def write(self, step: Step) -> bool:
        """Takes the outcome of a step, its arrays those of a batch of one; False at the end."""
        assert self._writing is not None
        return self._writing.write(step)

    def ids(self) -> NDArray[np.int64]:
        """The token [R, 1] that each row is fed next."""
        assert self._writing is not None
        ids: NDArray[np.int64] = self._writing.written[0][:, None]
        return ids

    def complete(self) -> None:
        """Gives the future its result."""
        assert self._writing is not None
        decoded = self._writing.finish(self.stages.prefill, tuple(self.stages.steps))
        try:
            result = self.finish(decoded, self.stages)
        except Exception as error:  # noqa: BLE001  # whoever waits for the result is told, as by `transcribe`
            self.fail(error)
            return
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(result)


class Scheduler:
    """A queue, and the thread that serves it; the thread starts with the first request."""

    def __init__(self, backend: Backend, options: SchedulerOptions) -> None:
        self._backend, self._options = backend, options
        self._queue: deque[Request] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._pace = Pace()

    def submit(self, request: Request) -> Future[Transcription]:
        """Queues a request.

        Raises:
            QueueFullError: too many are waiting.
            ClosedError: after `close`.
        """
        with self._changed:
            if self._closing:
                raise ClosedError("This Transcriber is closed. Load the bundle again.")
            if len(self._queue) >= self._options.max_queue:
                self._drop_gone()
            if len(self._queue) >= self._options.max_queue:
                raise QueueFullError(
                    f"{len(self._queue)} requests are waiting, and max_queue is {self._options.max_queue}. Try again "
                    "later, or send fewer."
                )
            self._queue.append(request)
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="das-scheduler", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return request.future

    def close(self) -> None:
        """Takes no more requests, and returns when the last one that was taken is done."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _serve(self) -> None:
        lanes: dict[_Key, _Lane] = {}
        try:
            while self._wait(busy=bool(lanes)):
                self._admit(lanes)
                began, live = perf_counter(), sum(len(lane.live) for lane in lanes.values())
                for lane in lanes.values():
                    lane.step()
                if live:
                    self._pace.stepped(live, perf_counter() - began)
                lanes = {key: lane for key, lane in lanes.items() if lane.live}
        except BaseException as error:
            self._break(error, lanes)
            raise

    def _wait(self, *, busy: bool) -> bool:
        """Sleeps until there is something to do; False when there never will be."""
        with self._changed:
            if not busy:
                self._changed.wait_for(lambda: self._queue or self._closing)
            return busy or bool(self._queue)

    def _admit(self, lanes: dict[_Key, _Lane]) -> None:
        """Gives the oldest request that somebody waits for a place in its lane, if there is one and it is time."""
        ages = [len(request.stages.steps) for lane in lanes.values() for request in lane.live]
        if len(ages) >= self._options.max_batch:
            return
        with self._changed:
            self._drop_gone()
            if not self._queue or not self._pace.admits(len(self._queue), ages):
                return
            request = self._queue.popleft()
        key = 0 if self._backend.mixes else id(request.stack), request.features.shape
        lane = lanes.get(key)
        if lane is None:
            lane = lanes[key] = _Lane(self._backend, self._options.max_batch, self._pace)
        lane.admit(request)

    def _drop_gone(self) -> None:
        self._queue = deque(waiting for waiting in self._queue if not waiting.gone())

    def _break(self, error: BaseException, lanes: dict[_Key, _Lane]) -> None:
        """Nobody must wait for a thread that is gone."""
        with self._changed:
            self._closing = True
            left = [*self._queue, *(request for lane in lanes.values() for request in lane.live)]
            self._queue.clear()
        for request in left:
            request.fail(error)


class _Lane:
    """The live requests that share slots, in the order of their places."""

    def __init__(self, backend: Backend, capacity: int, pace: Pace) -> None:
        self._backend, self._capacity, self._pace = backend, capacity, pace
        self._slots: Slots | None = None
        self.live: list[Request] = []

    def admit(self, request: Request) -> None:
        """Encodes a request, feeds its prompt, and gives it a place unless that was all there was to do."""
        request.stages.queue = perf_counter() - request.submitted
        try:
            self._start(request)
        except Exception as error:  # noqa: BLE001  # of this request alone: the others go on
            request.fail(error)

    def _start(self, request: Request) -> None:
        if self._slots is None:
            self._slots = self._backend.open_slots(self._capacity)
        began = perf_counter()
        encoded = self._backend.encode(request.features[None], request.stack)
        encoding = perf_counter()
        batch = self._backend.start(encoded, request.stack, request.plan.control)
        prompts, step = prefill(batch, request.prompts, request.plan)
        goes_on = request.begin(prompts, step)
        request.stages.encoder, request.stages.prefill = encoding - began, perf_counter() - encoding
        self._pace.admitted(perf_counter() - began)
        if not goes_on:
            request.complete()
            return
        self._slots.join(encoded, request.stack, request.plan.control, batch, len(prompts[0].ids))
        self.live.append(request)

    def step(self) -> None:
        """One run of the decoder for all live requests."""
        for place in reversed(range(len(self.live))):
            if self.live[place].gone():
                self._leave(place)
        if not self.live:
            return
        assert self._slots is not None
        began = perf_counter()
        try:
            ids = [request.ids() for request in self.live]
            steps = self._slots.run(ids, logits=any(wants_logits(request.plan) for request in self.live))
        except Exception as error:  # noqa: BLE001  # all of them needed this run; the scheduler lives on
            for request in self.live:
                request.fail(error)
            self.live, self._slots = [], None
            return
        seconds = perf_counter() - began
        for place in reversed(range(len(self.live))):
            self._write(place, steps[place], seconds)

    def _write(self, place: int, step: Step, seconds: float) -> None:
        request = self.live[place]
        request.stages.steps.append(seconds)
        try:
            goes_on = request.write(step)
        except Exception as error:  # noqa: BLE001  # a rule of the user's
            request.fail(error)
            self._leave(place)
            return
        if not goes_on:
            self._pace.completed(len(request.stages.steps))
            request.complete()
            self._leave(place)

    def _leave(self, place: int) -> None:
        """Frees a place; the last request moves into it."""
        assert self._slots is not None
        self._slots.leave(place)
        last = self.live.pop()
        if place < len(self.live):
            self.live[place] = last
