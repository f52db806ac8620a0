"""Three ways to serve requests, for `das-bench load`."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from das_asr.benchmarks.load_options import LoadOptions
from das_asr.runtime import QueueFullError, SchedulerOptions, Transcriber, Transcription

__all__ = ["SERVERS", "Request", "Server", "load_bundle", "open_server"]

SERVERS = ("continuous", "static", "single")
"""As told in `load.py`."""


@dataclass(frozen=True, eq=False)
class Request:
    """Audio, float32 [n] at the model's rate, and the adapters that are wanted."""

    samples: NDArray[np.float32]
    adapters: tuple[str, ...]


class Server(Protocol):
    """Takes requests."""

    def submit(self, asked: Request) -> Future[Transcription]:
        """Queues a request; raises QueueFullError where there is no room."""
        ...


class _Continuous:
    def __init__(self, transcriber: Transcriber) -> None:
        self._transcriber = transcriber

    def submit(self, asked: Request) -> Future[Transcription]:
        rate = self._transcriber.manifest.audio.sample_rate
        return self._transcriber.submit(asked.samples, sample_rate=rate, adapters=asked.adapters)


class _Static:
    """Takes what waits, up to `size` requests with the adapters of the oldest, and decodes it as one batch."""

    def __init__(self, transcriber: Transcriber, size: int, limit: int) -> None:
        self._transcriber, self._size, self._limit = transcriber, size, limit
        self._waiting: deque[tuple[Request, Future[Transcription]]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def submit(self, asked: Request) -> Future[Transcription]:
        future: Future[Transcription] = Future()
        with self._changed:
            if len(self._waiting) >= self._limit:
                raise QueueFullError("full")
            self._waiting.append((asked, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _serve(self) -> None:
        while batch := self._next():
            try:
                self._decode(batch)
            except Exception as error:  # noqa: BLE001  # nobody must wait for ever
                for _, future in batch:
                    future.set_exception(error)

    def _decode(self, batch: Sequence[tuple[Request, Future[Transcription]]]) -> None:
        rate = self._transcriber.manifest.audio.sample_rate
        samples = [asked.samples for asked, _ in batch]
        results = self._transcriber.transcribe_batch(samples, sample_rate=rate, adapters=batch[0][0].adapters)
        for (_, future), result in zip(batch, results, strict=True):
            future.set_result(result)

    def _next(self) -> list[tuple[Request, Future[Transcription]]]:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            fits = [pair for pair in self._waiting if pair[0].adapters == self._waiting[0][0].adapters][: self._size]
            for pair in fits:
                self._waiting.remove(pair)
            return fits


def load_bundle(options: LoadOptions, max_batch: int, max_queue: int) -> Transcriber:
    """The bundle that is measured; batches and queue are those of `submit`."""
    scheduling = SchedulerOptions(max_batch=max_batch, max_queue=max_queue)
    return Transcriber.load(options.bundle, threads=options.threads, precision=options.precision, scheduling=scheduling)


@contextmanager
def open_server(name: str, transcriber: Transcriber, size: int, limit: int = 1 << 30) -> Iterator[Server]:
    """Opens one of `SERVERS`: with batches of up to `size`, and room for `limit` requests that wait.

    The queue of `continuous` is the transcriber's own.
    """
    if name == "continuous":
        yield _Continuous(transcriber)
        return
    server = _Static(transcriber, size if name == "static" else 1, limit)
    try:
        yield server
    finally:
        server.close()
