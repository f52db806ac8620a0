"""`das-bench load --peer`: a batched pipeline beside `Transcriber.submit`, all utterances at hand.

faster-whisper's `BatchedInferencePipeline` is no server: it gets all its work at once, and batches begin and end
together. So the two are compared where both can be, saturated: the base alone, on the same checkpoint, utterances,
cores and limits, with batches of one and of the load test's size, from samples to text. `COMPARED` and `NOT_COMPARED`
tell the rest, in the result too.

Everybody takes turns, and the peer has a process of its own that is stopped while it is not measured.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from das_asr.benchmarks.bundles import check_base
from das_asr.benchmarks.figures import ratios
from das_asr.benchmarks.load_options import LoadOptions
from das_asr.benchmarks.load_servers import load_bundle
from das_asr.benchmarks.machine import pinned
from das_asr.benchmarks.models import SAMPLE_RATE, resolve_model
from das_asr.benchmarks.peers.engines import ENGINES, Tools, UnavailableError, versions_of
from das_asr.benchmarks.peers.process import SideProcess
from das_asr.benchmarks.peers.sides import Side, converted
from das_asr.benchmarks.systems import Work
from das_asr.benchmarks.timing import Burst
from das_asr.benchmarks.wer_report import markdown_table
from das_asr.benchmarks.worker import check_threads
from das_asr.runtime import Transcriber
from das_asr.runtime.errors import OptionError
from das_asr.runtime.manifest import read_manifest

__all__ = ["COMPARED", "NOT_COMPARED", "check_peer", "measure_peer", "render_peer"]

COMPARED = (
    "the base alone (K = 0): the same weights in the same precision, the same utterances, all at hand, the same cores "
    "and threads, greedy, English, a whole window of the encoder for each utterance, the same limit of tokens, from "
    "samples to text",
    "with K adapters: what they cost on top of that; the peer decodes the base alone all the same",
)
NOT_COMPARED = (
    "arrivals, latency, queues and refusals: the peer is no server, it takes all utterances as one audio, and a batch "
    "ends with its longest text",
    "adapters: the peer has none",
    "texts: the peer pads features with zeros, where the model was trained with those of silence, so what is written "
    "of audio that is shorter than the window may differ, and with it the number of tokens; the table has how many of "
    "the texts are the same",
)

Samples = NDArray[np.float32]
Run = Callable[[], Burst]
Say = Callable[[str], None]


@dataclass(frozen=True)
class _Entry:
    """One row of the comparison."""

    system: str  # the peer, or `das`
    domains: int  # K
    batch: int


def check_peer(options: LoadOptions) -> None:
    """Refuses what cannot be compared at all, before anything is loaded.

    Raises:
        UnavailableError: a package of the peer is missing.
        OptionError: there is no checkpoint, it is not the bundle's, or the peer has no such precision.
    """
    if options.peer is None:
        return
    versions_of(options.peer)
    check_threads(options.threads)
    check_base(options.bundle, _checkpoint(options), "--base")
    if (precision := _precision(options)) not in (known := ENGINES[options.peer].precisions):
        raise OptionError(
            f"--precision is {precision}, {options.peer} has {' and '.join(known)}. Name one that the bundle has too."
        )


def measure_peer(options: LoadOptions, clips: Sequence[Samples], say: Say) -> dict[str, Any]:
    """Figures of the peer and of the runtime; `refused` tells why there are none where the peer cannot do the work.

    Args:
        options: that `check_peer` has passed.
        clips: the utterances, float32 [n] at the model's rate.
        say: told how far it is.
    """
    assert options.peer is not None
    seconds = sum(map(len, clips)) / SAMPLE_RATE
    about = {
        "peer": options.peer,
        "versions": versions_of(options.peer),
        "precision": _precision(options),
        "utterances": len(clips),
        "audio_seconds": seconds,
        "max_tokens": _most_tokens(options),
        "compared": list(COMPARED),
        "not_compared": list(NOT_COMPARED),
    }
    with ExitStack() as stack:
        stack.enter_context(pinned(options.threads))  # who opens threads here hands on where they may run
        try:
            peer = _open_peer(options, clips, stack)
        except UnavailableError as error:
            say(f"{options.peer}: not comparable: {error}")
            return {**about, "refused": str(error), "runs": []}
        entries = {**peer, **_open_ours(options, clips, stack)}
        taken = _take_turns(entries, options.repeats, say)
    return {**about, "refused": None, "runs": [_figures(entry, taken, seconds) for entry in taken]}


def _checkpoint(options: LoadOptions) -> Path:
    return resolve_model(str(options.base), flag="--base")


def _precision(options: LoadOptions) -> str:
    return options.precision or read_manifest(options.bundle).precisions[0]


def _most_tokens(options: LoadOptions) -> int:
    """The peer's engine writes at most half as many tokens as the model has positions."""
    return read_manifest(options.bundle).dimensions.text_positions // 2


def _batches(options: LoadOptions) -> list[int]:
    return sorted({1, options.max_batch})


# --- Measuring ---


def _open_peer(options: LoadOptions, clips: Sequence[Samples], stack: ExitStack) -> dict[_Entry, Run]:
    """The peer's runs, each tried once on a first batch.

    Raises:
        UnavailableError: the peer cannot convert the checkpoint, or cannot batch it.
    """
    assert options.peer is not None
    checkpoint, side = _checkpoint(options), Side(options.peer, _precision(options))
    folder = converted(side, checkpoint, Tools())
    work = Work(checkpoint, (), None, threads=options.threads, precision=side.precision)
    process = SideProcess(side.engine, work, folder, Tools())
    stack.callback(process.close)
    runs: dict[_Entry, Run] = {}
    for batch in _batches(options):
        process.transcribe_all(clips[: options.max_batch], batch)
        runs[_Entry(side.engine, 0, batch)] = functools.partial(process.transcribe_all, clips, batch)
    return runs


def _open_ours(options: LoadOptions, clips: Sequence[Samples], stack: ExitStack) -> dict[_Entry, Run]:
    """The runtime's runs: a Transcriber for each size of a batch, with and without adapters."""
    runs: dict[_Entry, Run] = {}
    for batch in _batches(options):
        transcriber = stack.enter_context(load_bundle(options, batch, len(clips)))
        for adapters in dict.fromkeys([(), transcriber.adapters]):
            run = functools.partial(_submit_all, transcriber, adapters, _most_tokens(options))
            run(clips[: options.max_batch])
            runs[_Entry("das", len(adapters), batch)] = functools.partial(run, clips)
    return runs


def _submit_all(
    transcriber: Transcriber, adapters: tuple[str, ...], most_tokens: int, clips: Sequence[Samples]
) -> Burst:
    started = perf_counter()
    futures = [
        transcriber.submit(
            clip, sample_rate=SAMPLE_RATE, adapters=adapters, language="en", max_tokens=most_tokens,
            no_speech_threshold=1.0,  # measured, as the peer does, and never above
        )
        for clip in clips
    ]  # fmt: skip
    results = [future.result() for future in futures]
    return Burst(perf_counter() - started, tuple(result.tokens for result in results))


def _take_turns(entries: Mapping[_Entry, Run], repeats: int, say: Say) -> dict[_Entry, list[Burst]]:
    """What every entry took in each repeat; each repeat begins with another one."""
    names = list(entries)
    taken: dict[_Entry, list[Burst]] = {name: [] for name in names}
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            taken[name].append(entries[name]())
            say(f"{name.system}, K = {name.domains}, batch {name.batch}: {taken[name][-1].seconds:.2f} s")
    return taken


def _figures(entry: _Entry, taken: Mapping[_Entry, Sequence[Burst]], audio_seconds: float) -> dict[str, Any]:
    """The figures of an entry, and its time over the peer's with batches of the same size within each repeat."""
    mine = taken[entry]
    peer = next(bursts for other, bursts in taken.items() if other.batch == entry.batch)  # the peer comes first
    seconds = [burst.seconds for burst in mine]
    tokens = sum(map(len, mine[0].tokens))
    middle = statistics.median(seconds)
    return {
        **asdict(entry),
        "seconds": seconds,
        "rtfx": audio_seconds / middle,
        "tokens": tokens,
        "tokens_per_second": tokens / middle,
        "ratio_to_peer": ratios(seconds, [burst.seconds for burst in peer]),
        "same_texts": None if entry.domains else _same(mine[0], peer[0]),
    }


def _same(one: Burst, other: Burst) -> int:
    return sum(a == b for a, b in zip(one.tokens, other.tokens, strict=True))


# --- Shown ---


def render_peer(found: Mapping[str, Any]) -> str:
    """The comparison in Markdown: the table or the reason that there is none, and what is compared."""
    return "\n\n".join(_parts(found)) + "\n"


def _parts(found: Mapping[str, Any]) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    yield (
        f"Beside {found['peer']}'s batched pipeline ({versions}): {found['utterances']} utterances, "
        f"{found['audio_seconds']:.1f} s, all at hand, {found['precision']}, at most {found['max_tokens']} tokens each."
    )
    if found["refused"] is not None:
        yield f"Not comparable with this checkpoint: {found['refused']}"
        return
    head = ["system", "batch", "RTFx", "tokens/s", f"time, x {found['peer']}", "same texts"]
    yield markdown_table(head, map(_cells, found["runs"]))
    for title, items in (("Compared:", found["compared"]), ("Not compared:", found["not_compared"])):
        yield "\n".join([title, "", *(f"- {item}" for item in items)])


def _cells(run: Mapping[str, Any]) -> list[str]:
    title = f"DAS, K = {run['domains']}" if run["system"] == "das" else ENGINES[run["system"]].title
    figures = [f"{run['rtfx']:.1f}", f"{run['tokens_per_second']:.1f}", f"{run['ratio_to_peer']['median']:.2f}"]
    same = "-" if run["same_texts"] is None else str(run["same_texts"])
    return [title, str(run["batch"]), *figures, same]
