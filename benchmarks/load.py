"""Requests as a service gets them: Poisson arrivals, a choice of adapters per request, and three ways to serve them.

    continuous   `Transcriber.submit`
    static       whatever waits, up to a batch, decoded together by `transcribe_batch`; then the next batch
    single       one at a time

First each of them gets all requests at once, which shows how much it can do; then requests arrive at rates that are
shares of what `continuous` could do. Tokens are those of the results; a row that does not win costs time and counts for
nothing.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from das_asr.benchmarks.audio import find_audio
from das_asr.runtime import QueueFullError, SchedulerOptions, Transcriber, Transcription
from das_asr.runtime.audio import load_audio
from das_asr.runtime.errors import OptionError

__all__ = ["PATTERNS", "SERVERS", "LoadOptions", "measure_load", "render_load"]

PATTERNS = ("all", "same", "uniform", "zipf")
"""Which adapters a request asks for: all of them; the first; one, each as often; one, the n-th 1 / n times as often."""

SERVERS = ("continuous", "static", "single")


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Options of `measure_load`.

    Attributes:
        bundle: what serves.
        audio: clips that requests are drawn from.
        requests: per measurement.
        rates: of arrivals, as shares of the capacity.
        patterns: of `PATTERNS`.
        max_batch: utterances decoded together.
        max_queue: requests that may wait.
        threads: of a run of a graph.
        precision: of the bundle; None is its default.
        seed: of arrivals, clips and adapters.
    """

    bundle: Path
    audio: tuple[Path, ...]
    requests: int = 100
    rates: tuple[float, ...] = (0.5, 0.7, 0.9, 4.0)
    patterns: tuple[str, ...] = ("all",)
    max_batch: int = 8
    max_queue: int = 64
    threads: int = 1
    precision: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if wrong := [pattern for pattern in self.patterns if pattern not in PATTERNS]:
            raise OptionError(f"--patterns has {wrong[0]!r}, expected {', '.join(PATTERNS)}.")
        if not all(0 < rate <= 100 for rate in self.rates):
            raise OptionError(f"--rates is {self.rates}, expected shares of the capacity such as 0.5,0.7,4.")
        if self.requests < 10:
            raise OptionError(f"--requests is {self.requests}, expected at least 10: fewer have no percentiles.")


@dataclass(frozen=True, eq=False)
class _Asked:
    samples: NDArray[np.float32]
    adapters: tuple[str, ...]


@dataclass(frozen=True)
class _Served:
    """One request that was served; seconds."""

    latency: float
    queue: float
    audio: float
    tokens: int


class _Server(Protocol):
    def submit(self, asked: _Asked) -> Future[Transcription]: ...


def measure_load(options: LoadOptions, say: Callable[[str], None]) -> dict[str, Any]:
    """Saturates every server, then lets requests arrive; returns rows of figures.

    Raises:
        OptionError: there is no audio.
        BundleError: the bundle cannot be used.
    """
    runs: list[dict[str, Any]] = []
    for pattern in options.patterns:
        with _load(options, max(options.max_queue, options.requests)) as transcriber:
            asked = _requests(options, transcriber, pattern)
            for name in SERVERS:  # each once without being counted: pages and buffers come with the first requests
                with _server(name, transcriber, options) as server:
                    _burst(server, asked[: options.max_batch])
            for name in SERVERS:
                runs.append(_row(name, pattern, None, *_measured(name, transcriber, options, asked, None)))
                say(f"{pattern}, {name}: {runs[-1]['requests_per_second']:.1f} requests/s at most")
        capacity = runs[-len(SERVERS)]["requests_per_second"]  # of the first server, `continuous`
        with _load(options, options.max_queue) as transcriber:
            for rate, name in product(options.rates, SERVERS):
                found = _measured(name, transcriber, options, asked, rate * capacity)
                runs.append(_row(name, pattern, rate, *found))
                say(f"{pattern}, {name} at {rate:g} of the capacity: p95 {runs[-1]['latency']['p95']:.3f} s")
    plain = {**asdict(options), "bundle": str(options.bundle), "audio": list(map(str, options.audio))}
    return {"options": plain, "runs": runs}


def _load(options: LoadOptions, max_queue: int) -> Transcriber:
    scheduling = SchedulerOptions(max_batch=options.max_batch, max_queue=max_queue)
    return Transcriber.load(options.bundle, threads=options.threads, precision=options.precision, scheduling=scheduling)


def _requests(options: LoadOptions, transcriber: Transcriber, pattern: str) -> list[_Asked]:
    rate = transcriber.manifest.audio.sample_rate
    clips = [load_audio(path, target_rate=rate) for path in find_audio(options.audio)]
    rng = random.Random(f"{options.seed} {pattern}")  # noqa: S311
    names = transcriber.adapters
    weights = [1 / place if pattern == "zipf" else 1.0 for place in range(1, len(names) + 1)]

    def adapters() -> tuple[str, ...]:
        if pattern == "all" or not names:
            return names
        return names[:1] if pattern == "same" else tuple(rng.choices(names, weights))

    return [_Asked(rng.choice(clips), adapters()) for _ in range(options.requests)]


# --- Servers ---


class _Continuous:
    def __init__(self, transcriber: Transcriber) -> None:
        self._transcriber = transcriber

    def submit(self, asked: _Asked) -> Future[Transcription]:
        rate = self._transcriber.manifest.audio.sample_rate
        return self._transcriber.submit(asked.samples, sample_rate=rate, adapters=asked.adapters)


class _Static:
    """Takes what waits, up to `size` requests with the adapters of the oldest, and decodes it as one batch."""

    def __init__(self, transcriber: Transcriber, size: int, limit: int) -> None:
        self._transcriber, self._size, self._limit = transcriber, size, limit
        self._waiting: deque[tuple[_Asked, Future[Transcription]]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def submit(self, asked: _Asked) -> Future[Transcription]:
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

    def _decode(self, batch: Sequence[tuple[_Asked, Future[Transcription]]]) -> None:
        rate = self._transcriber.manifest.audio.sample_rate
        samples = [asked.samples for asked, _ in batch]
        results = self._transcriber.transcribe_batch(samples, sample_rate=rate, adapters=batch[0][0].adapters)
        for (_, future), result in zip(batch, results, strict=True):
            future.set_result(result)

    def _next(self) -> list[tuple[_Asked, Future[Transcription]]]:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            fits = [pair for pair in self._waiting if pair[0].adapters == self._waiting[0][0].adapters][: self._size]
            for pair in fits:
                self._waiting.remove(pair)
            return fits


@contextmanager
def _server(name: str, transcriber: Transcriber, options: LoadOptions, limit: int = 1 << 30) -> Iterator[_Server]:
    if name == "continuous":
        yield _Continuous(transcriber)
        return
    server = _Static(transcriber, options.max_batch if name == "static" else 1, limit)
    try:
        yield server
    finally:
        server.close()


# --- Measuring ---


def _measured(
    name: str, transcriber: Transcriber, options: LoadOptions, asked: Sequence[_Asked], rate: float | None
) -> tuple[list[_Served], int, float]:
    """(what was served, how many were refused, seconds); without a rate everything comes at once."""
    limit = (1 << 30) if rate is None else options.max_queue
    with _server(name, transcriber, options, limit) as server:
        return _burst(server, asked) if rate is None else _arrive(server, asked, rate, options.seed)


def _burst(server: _Server, asked: Sequence[_Asked]) -> tuple[list[_Served], int, float]:
    return _arrive(server, asked, float("inf"), 0)


def _arrive(server: _Server, asked: Sequence[_Asked], rate: float, seed: int) -> tuple[list[_Served], int, float]:
    """Sends requests at exponential intervals, on schedule even where the server is late."""
    rng = random.Random(seed)  # noqa: S311
    began = time.perf_counter()
    due, refused = began, 0
    pending: list[tuple[float, list[float], Future[Transcription]]] = []
    for one in asked:
        due += rng.expovariate(1.0) / rate
        time.sleep(max(0.0, due - time.perf_counter()))
        ended: list[float] = []
        try:
            future = server.submit(one)
        except QueueFullError:
            refused += 1
            continue
        future.add_done_callback(_noted(ended))
        pending.append((min(due, time.perf_counter()), ended, future))
    wait_for([future for _, _, future in pending])
    seconds = time.perf_counter() - began
    return [_served(start, ended, future.result()) for start, ended, future in pending], refused, seconds


def _noted(ended: list[float]) -> Callable[[object], None]:
    return lambda _: ended.append(time.perf_counter())


def _served(start: float, ended: list[float], result: Transcription) -> _Served:
    while not ended:  # the callback runs right behind what `wait` saw
        time.sleep(0.0001)
    latency = ended[0] - start
    return _Served(latency, latency - result.timings.total, result.duration, len(result.tokens))


def _row(
    server: str, pattern: str, rate: float | None, served: Sequence[_Served], refused: int, seconds: float
) -> dict[str, Any]:
    def percentiles(values: Sequence[float]) -> dict[str, float]:
        points = np.percentile(values, [50, 95, 99]) if values else [float("nan")] * 3
        return dict(zip(("p50", "p95", "p99"), map(float, points), strict=True))

    return {
        "server": server,
        "pattern": pattern,
        "rate": rate,
        "served": len(served),
        "refused": refused,
        "seconds": seconds,
        "requests_per_second": len(served) / seconds,
        "tokens_per_second": sum(one.tokens for one in served) / seconds,
        "rtfx": sum(one.audio for one in served) / seconds,
        "latency": percentiles([one.latency for one in served]),
        "queue": percentiles([max(0.0, one.queue) for one in served]),
    }


# --- Shown ---


def render_load(result: dict[str, Any]) -> str:
    """The rows as a table in Markdown."""
    head = ["adapters", "rate", "server", "requests/s", "tokens/s", "RTFx", "latency p50 / p95 / p99, s", "refused"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for run in result["runs"]:
        rate = "all at once" if run["rate"] is None else f"{run['rate']:g}"
        latency = " / ".join(f"{run['latency'][point]:.3f}" for point in ("p50", "p95", "p99"))
        figures = [f"{run[name]:.1f}" for name in ("requests_per_second", "tokens_per_second", "rtfx")]
        cells = [run["pattern"], rate, run["server"], *figures, latency, str(run["refused"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
