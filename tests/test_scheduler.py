"""Continuous batching: the same as alone, in order, bounded, and gone when nobody waits for it any more."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from das_asr.runtime import (
    AudioError,
    ClosedError,
    DeadlineError,
    OptionError,
    QueueFullError,
    SchedulerOptions,
    StepCandidates,
    Transcriber,
    Transcription,
)
from das_asr.runtime import scheduler as scheduler_module
from tests.rules import CHOICES, Gate

Clips = list[tuple[Path, str, str]]

WORK: list[dict[str, Any]] = [*CHOICES, {"rule": "hypothesis", "score": "root", "switch_cost": 0.5}]


def load(bundle: Path, **options: int) -> Transcriber:
    return Transcriber.load(bundle, threads=1, scheduling=SchedulerOptions(**options))


@pytest.fixture(scope="module")
def demo(demo_bundle: Path) -> Iterator[Transcriber]:
    with load(demo_bundle, max_batch=5) as transcriber:
        yield transcriber


def check_same(together: Transcription, alone: Transcription) -> None:
    assert (together.tokens, together.text, together.adapter) == (alone.tokens, alone.text, alone.adapter)
    assert (together.rows, together.rule, together.finished) == (alone.rows, alone.rule, alone.finished)
    assert [h.tokens for h in together.hypotheses] == [h.tokens for h in alone.hypotheses]
    assert together.avg_logprob == pytest.approx(alone.avg_logprob, abs=1e-4)
    assert together.no_speech_prob == pytest.approx(alone.no_speech_prob, abs=1e-4)


# --- What requests get ---


def test_requests_get_what_they_get_alone(demo: Transcriber, demo_audio: Clips) -> None:
    work = [(path, WORK[index % len(WORK)]) for index, (path, _, _) in enumerate(demo_audio * 2)]
    random.Random(0).shuffle(work)
    alone = [demo.transcribe(path, **choice) for path, choice in work]
    futures = []
    for path, choice in work:
        futures.append(demo.submit(path, **choice))
        time.sleep(random.Random(len(futures)).choice((0, 0, 0.01)))  # so that they join at different steps
    for future, expected in zip(futures, alone, strict=True):
        check_same(future.result(60), expected)


def test_rows_of_any_number_and_a_rule_of_ones_own(demo: Transcriber, demo_audio: Clips) -> None:
    class Surest:
        name, needs_logits = "surest", True

        def choose(self, step: StepCandidates) -> Any:
            assert step.logits is not None
            return step.logits.max(axis=2).argmax(axis=1)

    choices = [
        {"rule": Surest()},
        {"adapters": ()},
        {"adapters": ("music",)},
        {"rule": Surest(), "adapters": ("music",)},
    ]
    alone = [demo.transcribe(demo_audio[3][0], **choice) for choice in choices]
    futures = [demo.submit(demo_audio[3][0], **choice) for choice in choices]
    for future, expected in zip(futures, alone, strict=True):
        check_same(future.result(60), expected)


def test_timings_add_up(demo: Transcriber, demo_audio: Clips) -> None:
    futures = [demo.submit(path) for path, _, _ in demo_audio[:8]]
    for future in futures:
        timings = future.result(60).timings
        stages = timings.audio + timings.features + timings.encoder + timings.prefill + timings.steps + timings.host
        assert timings.total == pytest.approx(stages)
        assert min(timings.encoder, timings.prefill, timings.steps, timings.queue) > 0
        assert timings.step_count > 1
    assert futures[-1].result().timings.queue > futures[0].result().timings.queue


def test_silence_and_errors_are_told_at_once(demo: Transcriber, demo_audio: Clips) -> None:
    assert demo.submit(np.zeros(16_000, np.float32), sample_rate=16_000).result(0).text == ""
    with pytest.raises(AudioError):
        demo.submit("nowhere.wav")
    with pytest.raises(OptionError, match="no adapter 'opera'"):
        demo.submit(demo_audio[0][0], adapters=("opera",))
    with pytest.raises(OptionError, match="deadline is 0"):
        demo.submit(demo_audio[0][0], deadline=0)


def test_asyncio(demo: Transcriber, demo_audio: Clips) -> None:
    async def main() -> list[Transcription]:
        return await asyncio.gather(*(demo.transcribe_async(path, rule="paper") for path, _, _ in demo_audio[:4]))

    for result, (path, _, _) in zip(asyncio.run(main()), demo_audio[:4], strict=True):
        check_same(result, demo.transcribe(path, rule="paper"))


def test_a_swapped_adapter_does_not_disturb_requests_in_flight(
    demo_bundle: Path, demo_adapters: dict[str, Path], demo_audio: Clips
) -> None:
    gate = Gate()
    with load(demo_bundle, max_batch=4) as transcriber:
        expected = transcriber.transcribe(demo_audio[0][0])
        before = [transcriber.submit(demo_audio[0][0], rule=gate), transcriber.submit(demo_audio[0][0])]
        assert gate.reached.wait(30)
        transcriber.unload_adapter("music")
        transcriber.load_adapter("song", demo_adapters["music"])
        after = transcriber.submit(demo_audio[0][0])
        gate.opened.set()
        check_same(before[1].result(30), expected)
        assert after.result(30).rows == ("base", "weather", "sports", "song")


# --- The queue ---


def test_the_queue_is_bounded_and_served_in_order(demo_bundle: Path, demo_audio: Clips) -> None:
    gate, done = Gate(), list[int]()
    with load(demo_bundle, max_batch=1, max_queue=3) as transcriber:
        first = transcriber.submit(demo_audio[0][0], rule=gate)
        assert gate.reached.wait(30)
        waiting = [transcriber.submit(demo_audio[index][0]) for index in (1, 2, 3)]
        for index, future in enumerate(waiting):
            future.add_done_callback(lambda _, index=index: done.append(index))
        with pytest.raises(QueueFullError, match="3 requests are waiting, and max_queue is 3"):
            transcriber.submit(demo_audio[4][0])
        assert waiting[1].cancel()
        later = transcriber.submit(demo_audio[4][0])  # in the place of the one that was cancelled
        later.add_done_callback(lambda _: done.append(9))
        gate.opened.set()
        assert first.result(30).text
        wait_for([waiting[0], waiting[2], later], 30)
        assert done == [1, 0, 2, 9]
        with pytest.raises(CancelledError):
            waiting[1].result()


def test_a_request_in_flight_can_be_cancelled(demo_bundle: Path, demo_audio: Clips) -> None:
    gate = Gate()
    with load(demo_bundle, max_batch=2) as transcriber:
        expected = transcriber.transcribe(demo_audio[1][0])
        doomed = transcriber.submit(demo_audio[0][0], rule=gate)
        assert gate.reached.wait(30)
        other = transcriber.submit(demo_audio[1][0])
        assert doomed.cancel()
        gate.opened.set()
        check_same(other.result(30), expected)
        assert doomed.cancelled()


def test_deadlines_hold_in_the_queue_and_in_the_decoder(demo_bundle: Path, demo_audio: Clips) -> None:
    gate = Gate()
    with load(demo_bundle, max_batch=1) as transcriber:
        # Time enough to reach the decoder, on a busy machine too.
        decoding = transcriber.submit(demo_audio[0][0], rule=gate, deadline=2)
        assert gate.reached.wait(30)
        queued = transcriber.submit(demo_audio[1][0], deadline=0.05)
        patient = transcriber.submit(demo_audio[2][0], deadline=60)
        time.sleep(2)
        gate.opened.set()
        for future in (decoding, queued):
            with pytest.raises(DeadlineError, match="deadline passed"):
                future.result(30)
        assert patient.result(30).text


def test_a_rule_that_fails_takes_nobody_along(demo: Transcriber, demo_audio: Clips) -> None:
    class Broken:
        name, needs_logits = "broken", False

        def choose(self, step: StepCandidates) -> Any:
            if step.step == 2:
                raise RuntimeError("no idea")
            return np.zeros(1, np.int64)

    class Wrong(Broken):
        def choose(self, step: StepCandidates) -> Any:
            return np.array([99])

    others = [demo.submit(path) for path, _, _ in demo_audio[:2]]
    broken, wrong = (demo.submit(demo_audio[2][0], rule=rule) for rule in (Broken(), Wrong()))
    more = demo.submit(demo_audio[3][0])
    with pytest.raises(RuntimeError, match="no idea"):
        broken.result(30)
    with pytest.raises(OptionError, match="returned row"):
        wrong.result(30)
    assert all(future.result(30).text for future in (*others, more))


# --- The thread ---


def test_closing_waits_for_all_that_was_taken(demo_bundle: Path, demo_audio: Clips) -> None:
    gate = Gate()
    transcriber = load(demo_bundle, max_batch=2)
    futures = [transcriber.submit(demo_audio[0][0], rule=gate)]
    assert gate.reached.wait(30)
    futures += [transcriber.submit(path) for path, _, _ in demo_audio[:4]]
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(transcriber.close)
        time.sleep(0.05)
        assert not closing.done()
        gate.opened.set()
        closing.result(30)
    assert all(future.done() and future.result().text for future in futures)
    with pytest.raises(ClosedError):
        transcriber.submit(demo_audio[0][0])


def test_an_idle_scheduler_sleeps(demo: Transcriber, demo_audio: Clips) -> None:
    demo.submit(demo_audio[0][0]).result(30)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.05


def test_a_thread_that_breaks_leaves_nobody_waiting(
    demo_bundle: Path, demo_audio: Clips, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(lane: object) -> None:
        raise MemoryError("none left")

    monkeypatch.setattr(scheduler_module._Lane, "step", broken)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with load(demo_bundle, max_batch=2) as transcriber:
        futures: list[Future[Transcription]] = []

        def flood() -> None:
            for path, _, _ in demo_audio * 100:
                futures.append(transcriber.submit(path))

        with pytest.raises(ClosedError):
            flood()
        for future in futures:
            with pytest.raises(MemoryError):
                future.result(30)


def test_options_of_the_scheduler() -> None:
    for options in ({"max_batch": 0}, {"max_queue": 0}):
        with pytest.raises(OptionError, match="both must be at least 1"):
            SchedulerOptions(**options)
