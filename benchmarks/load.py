"""Requests as a service gets them: Poisson arrivals, a choice of adapters per request, and three ways to serve them.

    continuous   `Transcriber.submit`
    static       whatever waits, up to a batch, decoded together by `transcribe_batch`; then the next batch
    single       one at a time

First each of them gets all requests at once, which shows how much it can do; then requests arrive at rates that are
shares of what `continuous` could do. Tokens are those of the results; a row that does not win costs time and counts
for nothing. `decoder_tokens_per_second` leaves out the time in which the serving thread prepares audio and encodes, so
it is what the decoder alone would do were its input always ready. `occupancy` is the mean number of utterances in the
decoder (Little's law: the time they spend there by the time that passes).
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from das_asr.benchmarks.audio import find_audio
from das_asr.benchmarks.load_options import LoadOptions
from das_asr.benchmarks.load_peer import check_peer, measure_peer, render_peer
from das_asr.benchmarks.load_servers import SERVERS, Request, Server, load_bundle, open_server
from das_asr.benchmarks.output import plain_options
from das_asr.runtime import QueueFullError, Transcriber, Transcription
from das_asr.runtime.audio import load_audio
from das_asr.runtime.manifest import read_manifest

__all__ = ["measure_load", "render_load"]


@dataclass(frozen=True)
class _Served:
    """One request that was served; seconds."""

    latency: float
    queue: float
    audio: float
    tokens: int
    preparing: float  # reading and features; its share of a batch
    encoding: float  # likewise
    decoding: float


def measure_load(options: LoadOptions, say: Callable[[str], None]) -> dict[str, Any]:
    """Saturates every server, then lets requests arrive; returns rows of figures.

    Raises:
        OptionError: there is no audio, or the peer and the bundle do not go together.
        BundleError: the bundle cannot be used.
        UnavailableError: a package of the peer is missing.
    """
    check_peer(options)
    clips = _clips(options)
    spoken = [one.samples for one in _requests(options, clips, (), "all")]
    peer = measure_peer(options, spoken, say) if options.peer else None
    runs: list[dict[str, Any]] = []
    for pattern in options.patterns:
        with load_bundle(options, options.max_batch, max(options.max_queue, options.requests)) as transcriber:
            asked = _requests(options, clips, transcriber.adapters, pattern)
            for name in SERVERS:  # each once without being counted: pages and buffers come with the first requests
                with open_server(name, transcriber, options.max_batch) as server:
                    _burst(server, asked[: options.max_batch])
            for name in SERVERS:
                runs.append(_row(name, pattern, None, *_measured(name, transcriber, options, asked, None)))
                say(f"{pattern}, {name}: {runs[-1]['requests_per_second']:.1f} requests/s at most")
        capacity = runs[-len(SERVERS)]["requests_per_second"]  # of the first server, `continuous`
        with load_bundle(options, options.max_batch, options.max_queue) as transcriber:
            for rate, name in product(options.rates, SERVERS):
                found = _measured(name, transcriber, options, asked, rate * capacity)
                runs.append(_row(name, pattern, rate, *found))
                say(f"{pattern}, {name} at {rate:g} of the capacity: p95 {runs[-1]['latency']['p95']:.3f} s")
    return {"options": plain_options(options), "runs": runs, "peer": peer}


def _clips(options: LoadOptions) -> list[NDArray[np.float32]]:
    rate = read_manifest(options.bundle).audio.sample_rate
    return [load_audio(path, target_rate=rate) for path in find_audio(options.audio)]


def _requests(
    options: LoadOptions, clips: Sequence[NDArray[np.float32]], names: tuple[str, ...], pattern: str
) -> list[Request]:
    rng = random.Random(f"{options.seed} {pattern}")  # noqa: S311
    weights = [1 / place if pattern == "zipf" else 1.0 for place in range(1, len(names) + 1)]

    def adapters() -> tuple[str, ...]:
        if pattern == "all" or not names:
            return names
        return names[:1] if pattern == "same" else tuple(rng.choices(names, weights))

    return [Request(rng.choice(clips), adapters()) for _ in range(options.requests)]


# --- Measuring ---


def _measured(
    name: str, transcriber: Transcriber, options: LoadOptions, asked: Sequence[Request], rate: float | None
) -> tuple[list[_Served], int, float]:
    """(what was served, how many were refused, seconds); without a rate everything comes at once."""
    limit = (1 << 30) if rate is None else options.max_queue
    with open_server(name, transcriber, options.max_batch, limit) as server:
        return _burst(server, asked) if rate is None else _arrive(server, asked, rate, options.seed)


def _burst(server: Server, asked: Sequence[Request]) -> tuple[list[_Served], int, float]:
    return _arrive(server, asked, float("inf"), 0)


def _arrive(server: Server, asked: Sequence[Request], rate: float, seed: int) -> tuple[list[_Served], int, float]:
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
    sharing = Counter(id(future.result().timings) for _, _, future in pending)
    return [_served(start, ended, future.result(), sharing) for start, ended, future in pending], refused, seconds


def _noted(ended: list[float]) -> Callable[[object], None]:
    return lambda _: ended.append(time.perf_counter())


def _served(start: float, ended: list[float], result: Transcription, sharing: Counter[int]) -> _Served:
    while not ended:  # the callback runs right behind what `wait` saw
        time.sleep(0.0001)
    latency, timings = ended[0] - start, result.timings
    batch = sharing[id(timings)]  # utterances of one batch share one object
    return _Served(
        latency=latency,
        queue=latency - timings.total,
        audio=result.duration,
        tokens=len(result.tokens),
        preparing=(timings.audio + timings.features) / batch,
        encoding=timings.encoder / batch,
        decoding=timings.prefill + timings.steps,
    )


def _row(
    server: str, pattern: str, rate: float | None, served: Sequence[_Served], refused: int, seconds: float
) -> dict[str, Any]:
    def percentiles(values: Sequence[float]) -> dict[str, float]:
        points = np.percentile(values, [50, 95, 99]) if values else [float("nan")] * 3
        return dict(zip(("p50", "p95", "p99"), map(float, points), strict=True))

    tokens = sum(one.tokens for one in served)
    before = sum(one.encoding for one in served)
    if server != "continuous":  # there, whoever submits prepares the audio, beside the thread that serves
        before += sum(one.preparing for one in served)
    return {
        "server": server,
        "pattern": pattern,
        "rate": rate,
        "served": len(served),
        "refused": refused,
        "seconds": seconds,
        "requests_per_second": len(served) / seconds,
        "tokens_per_second": tokens / seconds,
        "decoder_tokens_per_second": tokens / (seconds - before),
        "occupancy": sum(one.decoding for one in served) / seconds,
        "rtfx": sum(one.audio for one in served) / seconds,
        "latency": percentiles([one.latency for one in served]),
        "queue": percentiles([max(0.0, one.queue) for one in served]),
    }


# --- Shown ---


def render_load(result: dict[str, Any]) -> str:
    """The rows as a table in Markdown."""
    head = ["adapters", "rate", "server", "requests/s", "tokens/s", "of the decoder alone", "RTFx", "occupancy"]
    head += ["queue p50, s", "latency p50 / p95 / p99, s", "refused"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for run in result["runs"]:
        rate = "all at once" if run["rate"] is None else f"{run['rate']:g}"
        latency = " / ".join(f"{run['latency'][point]:.3f}" for point in ("p50", "p95", "p99"))
        names = ("requests_per_second", "tokens_per_second", "decoder_tokens_per_second", "rtfx", "occupancy")
        figures = [f"{run[name]:.1f}" for name in names]
        queue = f"{run['queue']['p50']:.3f}"
        cells = [run["pattern"], rate, run["server"], *figures, queue, latency, str(run["refused"])]
        lines.append("| " + " | ".join(cells) + " |")
    table = "\n".join(lines) + "\n"
    return f"{table}\n{render_peer(result['peer'])}" if result["peer"] else table
