"""One Transcriber and many threads."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from das_asr.runtime import ClosedError, StepCandidates, Transcriber, Transcription
from tests.rules import CHOICES, Gate

THREADS = 8
Clips = list[tuple[Path, str, str]]


@pytest.fixture(scope="module")
def demo(demo_bundle: Path) -> Iterator[Transcriber]:
    with Transcriber.load(demo_bundle, threads=1) as transcriber:
        yield transcriber


def said(result: Transcription) -> dict[str, Any]:
    return {key: value for key, value in result.to_dict().items() if key != "timings"}


def requests(demo_audio: Clips) -> list[tuple[Path, dict[str, Any]]]:
    """Requests that differ in audio, rule, adapters and options."""
    return [(demo_audio[index][0], choice) for index, choice in enumerate(CHOICES * 2)]


def test_eight_threads_get_what_one_thread_gets(demo: Transcriber, demo_audio: Clips) -> None:
    work = requests(demo_audio)
    expected = [said(demo.transcribe(path, **choice)) for path, choice in work]
    order = random.Random(0).sample(range(len(work)), len(work)) * 2
    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(lambda index: demo.transcribe(work[index][0], **work[index][1]), order))
    for index, result in zip(order, results, strict=True):
        assert said(result) == expected[index]


def test_requests_run_at_the_same_time(demo: Transcriber, demo_audio: Clips) -> None:
    gates = [Gate() for _ in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        running = [pool.submit(demo.transcribe, demo_audio[0][0], rule=gate) for gate in gates]
        assert all(gate.reached.wait(30) for gate in gates)  # all of them are in mid-request
        for gate in gates:
            gate.opened.set()
        assert len({result.result(30).tokens for result in running}) == 1


def test_close_waits_for_running_requests_and_refuses_new_ones(demo_bundle: Path, demo_audio: Clips) -> None:
    transcriber = Transcriber.load(demo_bundle, threads=1)
    gate = Gate()
    with ThreadPoolExecutor(2) as pool:
        request = pool.submit(transcriber.transcribe, demo_audio[0][0], rule=gate)
        assert gate.reached.wait(30)
        closing = pool.submit(transcriber.close)
        _wait_until_refused(transcriber)
        assert not closing.done()
        assert not request.done()
        gate.opened.set()
        assert request.result(30).text
        closing.result(30)
    transcriber.close()


def test_a_second_close_waits_like_the_first(demo_bundle: Path, demo_audio: Clips) -> None:
    transcriber = Transcriber.load(demo_bundle, threads=1)
    gate = Gate()
    with ThreadPoolExecutor(3) as pool:
        request = pool.submit(transcriber.transcribe, demo_audio[0][0], rule=gate)
        assert gate.reached.wait(30)
        first = pool.submit(transcriber.close)
        _wait_until_refused(transcriber)
        second = pool.submit(transcriber.close)
        time.sleep(0.1)
        assert not first.done()
        assert not second.done()
        gate.opened.set()
        assert request.result(30).text
        first.result(30)
        second.result(30)


def _wait_until_refused(transcriber: Transcriber) -> None:
    """Until `close` in another thread has come far enough."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            transcriber.transcribe_batch([])
        except ClosedError:
            return
        time.sleep(0.01)
    pytest.fail("close() in another thread has not begun")


def test_a_failing_request_does_not_hold_up_close(demo_bundle: Path, demo_audio: Clips) -> None:
    class Failing(Gate):
        def choose(self, step: StepCandidates) -> Any:
            raise ZeroDivisionError

    transcriber = Transcriber.load(demo_bundle, threads=1)
    with pytest.raises(ZeroDivisionError):
        transcriber.transcribe(demo_audio[0][0], rule=Failing())
    with ThreadPoolExecutor(1) as pool:
        pool.submit(transcriber.close).result(30)


def test_adapters_come_and_go_while_others_transcribe(
    demo_bundle: Path, demo_adapters: dict[str, Path], demo_audio: Clips
) -> None:
    path = demo_audio[0][0]
    with Transcriber.load(demo_bundle, threads=1) as transcriber:
        names = {
            "fewer": ("music", "weather"),
            "all": ("music", "weather", "sports"),
        }
        expected = {adapters: said(transcriber.transcribe(path, adapters=adapters)) for adapters in names.values()}
        done = threading.Event()

        def change() -> None:
            for _ in range(6):
                transcriber.unload_adapter("sports")
                transcriber.load_adapter("sports", demo_adapters["sports"])

        def ask() -> list[Transcription]:
            results = []
            while not done.is_set():
                results.append(transcriber.transcribe(path))
            return results

        with ThreadPoolExecutor(5) as pool:
            asking = [pool.submit(ask) for _ in range(4)]
            try:
                pool.submit(change).result(60)
            finally:
                done.set()
            results = [result for answers in asking for result in answers.result(30)]
    assert results
    for result in results:
        assert said(result)["tokens"] == expected[result.rows[1:]]["tokens"]
        assert said(result)["hypotheses"] == expected[result.rows[1:]]["hypotheses"]


def test_two_threads_that_load_the_same_name_do_not_both_succeed(
    demo_bundle: Path, demo_adapters: dict[str, Path]
) -> None:
    from das_asr.runtime import OptionError

    def load() -> bool:
        try:
            transcriber.load_adapter("extra", demo_adapters["music"])
        except OptionError:
            return False
        return True

    with Transcriber.load(demo_bundle, threads=1) as transcriber:
        with ThreadPoolExecutor(THREADS) as pool:
            outcomes = list(pool.map(lambda _: load(), range(THREADS)))
        assert sorted(outcomes) == [False] * (THREADS - 1) + [True]
        assert transcriber.adapters == ("music", "weather", "sports", "extra")
