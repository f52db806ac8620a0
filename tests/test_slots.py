"""Slots: requests with different adapters share every run, and each gets what it gets alone."""

from __future__ import annotations

import dataclasses
import random
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from das_asr.export.half import write_half
from das_asr.export.precision import write_variant
from das_asr.runtime import SchedulerOptions, Transcriber, Transcription
from das_asr.runtime.backends import BackendOptions, create_backend
from das_asr.runtime.backends.base import Control, LoadedStack, Step
from das_asr.runtime.backends.onnxruntime import OnnxRuntimeSlots
from das_asr.runtime.backends.slots import SlotBuffers
from das_asr.runtime.errors import BundleError
from das_asr.runtime.manifest import read_manifest
from tests.bundles import make_bundle
from tests.checkpoints import make_adapter
from tests.rules import CHOICES, Gate

Clips = list[tuple[Path, str, str]]
Array = NDArray[Any]

CAPACITY = 4

# --- The buffers ---


@dataclasses.dataclass
class Kept:
    """An utterance as it joined and grew."""

    number: int
    stack: LoadedStack
    cross: dict[str, Array]
    cache: Array  # [1, R, 3, T, 2]


def make_stacks() -> list[LoadedStack]:
    random = np.random.default_rng(0)
    sizes = [(1, 1), (2, 4), (2, 4), (2, 7), (5, 2)]
    return [LoadedStack(rows, {"lora_a": random.random((1, rows, 6, rank))}) for rows, rank in sizes]


STACKS = make_stacks()


def read_adapters(stack: LoadedStack) -> dict[str, Array]:
    return dict(stack.tensors)


def make_utterance(number: int, stack: LoadedStack, length: int) -> Kept:
    random = np.random.default_rng(number)
    rank = stack.tensors["lora_a"].shape[3]
    cross = {"cross_k": random.random((1, 3, 2)), "cross_u": random.random((1, stack.rows, 5, rank))}
    return Kept(number, stack, cross, random.random((1, stack.rows, 3, length, 2)))


def make_control(number: int, rows: int) -> Control:
    return Control(
        rule=np.array([number]),
        tau=np.zeros(1, np.float32),
        token_bias=np.full((1, 3), number, np.float32),
        first_token_bias=np.zeros((1, 3), np.float32),
        row_mask=np.ones((1, rows), np.bool_),
        first_valid=np.zeros(1, np.int64),
    )


def padded(array: Array, shape: tuple[int, ...]) -> Array:
    return np.pad(array, [(0, whole - part) for part, whole in zip(array.shape, shape, strict=True)])


def check_buffers(buffers: SlotBuffers, kept: list[Kept]) -> None:
    """What a run would read, wherever each utterance lies."""
    assert buffers.count == len(kept)
    if not kept:
        return
    buffers.arrange()
    assert not buffers.arrange()
    rows = max(one.stack.rows for one in kept)
    rank = max(one.stack.tensors["lora_a"].shape[3] for one in kept)
    longest = max(one.cache.shape[3] for one in kept)
    alike = all(one.stack is kept[0].stack for one in kept)
    found = buffers.inputs()
    assert all(len(array) == len(kept) and array.flags.c_contiguous for array in found.values())
    assert [cache.shape[3] for cache in buffers.caches] == [longest, longest]
    assert buffers.stack is (kept[0].stack if alike else None)
    assert ("lora_a" in found) != alike
    places = {int(number): place for place, number in enumerate(found["rule"])}
    assert [buffers.lengths[places[one.number]] for one in kept] == [one.cache.shape[3] for one in kept]
    for one in kept:
        place = places[one.number]
        unused = longest - one.cache.shape[3]
        assert found["rule"][place] == one.number
        assert found["token_bias"][place, 0] == one.number
        assert found["first_valid"][place] == unused
        assert found["row_mask"][place].tolist() == [row < one.stack.rows for row in range(rows)]
        np.testing.assert_array_equal(found["cross_k"][place], one.cross["cross_k"][0])
        np.testing.assert_array_equal(found["cross_u"][place], padded(one.cross["cross_u"][0], (rows, 5, rank)))
        if not alike:
            np.testing.assert_array_equal(
                found["lora_a"][place], padded(one.stack.tensors["lora_a"][0], (rows, 6, rank))
            )
        assert buffers.caches[1].shape[1] == rows
        np.testing.assert_array_equal(buffers.caches[1][place, : one.stack.rows, :, unused:], -one.cache[0])


def check_run(buffers: SlotBuffers, kept: list[Kept]) -> None:
    """What goes into a run and what comes out of it belongs to each utterance's own rows."""
    ids = [np.full((one.stack.rows, 1), one.number) for one in kept]
    rows = max(one.stack.rows for one in kept)
    fed = buffers.ids(ids)
    assert fed.shape == (len(kept), rows, 1)
    numbers = fed[:, 0, 0]
    told = Step(numbers, fed[:, :, 0], np.zeros((len(kept), rows), np.float32), np.zeros((len(kept), rows, 3)))
    for one, step in zip(kept, buffers.split(told), strict=True):
        assert step.row.tolist() == [one.number]
        assert step.candidate.tolist() == [[one.number] * one.stack.rows]
        assert step.logits is not None
        assert (step.logprob.shape, step.logits.shape) == ((1, one.stack.rows), (1, one.stack.rows, 3))


moves = st.one_of(
    st.tuples(st.just("join"), st.integers(0, len(STACKS) - 1), st.integers(1, 5)),
    st.tuples(st.just("leave"), st.integers(0, CAPACITY - 1), st.just(0)),
    st.tuples(st.just("run"), st.just(0), st.just(0)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(moves, max_size=30))
def test_slots_hold_what_joined_and_did_not_leave(orders: list[tuple[str, int, int]]) -> None:
    """Joins, leaves and runs in any order, against a list of utterances that is kept beside."""
    buffers, kept = SlotBuffers(CAPACITY, read_adapters), list[Kept]()
    for number, (move, which, length) in enumerate(orders):
        if move == "join" and len(kept) < CAPACITY:
            one = make_utterance(number, STACKS[which], length)
            control = make_control(number, one.stack.rows)
            buffers.join(one.stack, one.cross, control, [one.cache.copy(), -one.cache], length)
            kept.append(one)
        elif move == "leave" and which < len(kept):
            buffers.leave(which)
            last = kept.pop()
            if which < len(kept):
                kept[which] = last
        elif move == "run" and kept:
            check_buffers(buffers, kept)
            check_run(buffers, kept)
            new = np.random.default_rng(number).random((len(kept), max(one.stack.rows for one in kept), 3, 1, 2))
            pairs = zip(buffers.caches, (1, -1), strict=True)
            places = {int(at): place for place, at in enumerate(buffers.inputs()["rule"])}
            buffers.advance([np.concatenate([cache, sign * new], 3) for cache, sign in pairs])
            for one in kept:
                token = new[places[one.number]]
                one.cache = np.concatenate([one.cache, token[None, : one.stack.rows]], 3)
    check_buffers(buffers, kept)


def test_adapters_are_read_only_where_they_differ() -> None:
    read = list[LoadedStack]()

    def reading(stack: LoadedStack) -> dict[str, Array]:
        read.append(stack)
        return dict(stack.tensors)

    buffers = SlotBuffers(CAPACITY, reading)

    def join(number: int, stack: LoadedStack) -> None:
        one = make_utterance(number, stack, 2)
        buffers.join(stack, one.cross, make_control(number, stack.rows), [one.cache], 2)

    first, other = STACKS[1], STACKS[2]
    join(0, first)
    join(1, first)
    assert read == []
    join(2, other)
    assert read == [first, first, other]
    join(3, first)  # the others have their copies already
    assert read == [first, first, other, first]
    buffers.leave(2)
    assert buffers.stack is first
    join(4, first)
    assert len(read) == 4


def test_adapters_that_cannot_be_read_change_nothing() -> None:
    def broken(stack: LoadedStack) -> dict[str, Array]:
        raise OSError("gone")

    buffers = SlotBuffers(CAPACITY, broken)
    kept = [make_utterance(0, STACKS[1], 2)]
    buffers.join(STACKS[1], kept[0].cross, make_control(0, 2), [kept[0].cache, -kept[0].cache], 2)
    one = make_utterance(1, STACKS[4], 3)
    with pytest.raises(OSError, match="gone"):
        buffers.join(STACKS[4], one.cross, make_control(1, 5), [one.cache, -one.cache], 3)
    check_buffers(buffers, kept)


def address(buffers: SlotBuffers, number: int, name: str) -> int:
    """Where the tensor of an utterance lies."""
    found = buffers.inputs()
    (place,) = np.flatnonzero(found["rule"] == number)
    return int(found[name][place].ctypes.data)


def test_a_lone_utterance_is_read_where_it_is() -> None:
    buffers, one = SlotBuffers(CAPACITY, read_adapters), make_utterance(7, STACKS[1], 2)
    buffers.join(one.stack, one.cross, make_control(7, 2), [one.cache], 2)
    buffers.arrange()
    assert address(buffers, 7, "cross_k") == one.cross["cross_k"].ctypes.data
    assert buffers.caches[0] is one.cache


def test_who_takes_the_place_of_another_moves_nobody() -> None:
    buffers, lengths = SlotBuffers(CAPACITY, read_adapters), {1: 3, 2: 4, 3: 2, 4: 1}

    def join(number: int, stack: LoadedStack) -> None:
        one = make_utterance(number, stack, lengths[number])
        buffers.join(stack, one.cross, make_control(number, 2), [one.cache], lengths[number])

    for number in (1, 2, 3):
        join(number, STACKS[number])
    buffers.arrange()
    before = {number: address(buffers, number, "cross_u") for number in (1, 2, 3)}
    caches, adapters = buffers.caches[0], address(buffers, 1, "lora_a")
    buffers.inputs()["lora_a"][:] = 5  # so that it shows what is copied again
    buffers.leave(0)
    join(4, STACKS[1])
    buffers.arrange()
    assert address(buffers, 4, "cross_u") == before[1]
    assert [address(buffers, number, "cross_u") for number in (2, 3)] == [before[2], before[3]]
    assert buffers.caches[0] is caches
    assert address(buffers, 4, "lora_a") == adapters
    assert (buffers.inputs()["lora_a"] == 5).all()  # the place had the adapters of the newcomer


# --- Requests ---


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, demo_base: Path, demo_adapters: dict[str, Path]) -> Path:
    """The demo's, with graphs of all precisions that a CPU runs."""
    folder = make_bundle(demo_base, demo_adapters, tmp_path_factory.mktemp("slots") / "bundle")
    dims = read_manifest(folder).dimensions
    write_variant(folder, "int8", dims)
    write_half(folder, "fp16", dims, folder / "fp16")
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, demo_base: Path) -> Path:
    """An adapter of a larger rank than any of the demo's."""
    return make_adapter(demo_base, tmp_path_factory.mktemp("wide") / "wide", rank=80, alpha=40, scale_b=0.1)


def load(bundle: Path, precision: str = "fp32", max_batch: int = 6) -> Transcriber:
    manifest = dataclasses.replace(read_manifest(bundle), precisions=("fp32", "int8", "fp16"))
    backend = create_backend("onnxruntime", bundle, manifest, BackendOptions(threads=1), precision)
    return Transcriber(manifest, bundle, backend, SchedulerOptions(max_batch=max_batch))


@pytest.fixture(scope="module")
def demo(bundle: Path, wide: Path) -> Iterator[Transcriber]:
    with load(bundle) as transcriber:
        transcriber.load_adapter("wide", wide)
        yield transcriber


@dataclasses.dataclass
class Runs:
    """How many utterances each run had, and whether their adapters were copies."""

    sizes: list[int]
    copied: list[bool]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    noted = Runs([], [])
    run = OnnxRuntimeSlots.run

    def noting(slots: OnnxRuntimeSlots, ids: Any, *, logits: bool = False) -> list[Step]:
        steps = run(slots, ids, logits=logits)
        copies = [name for name in slots._buffers.inputs() if name.startswith("lora_")]
        assert bool(copies) == (slots._buffers.stack is None)
        noted.sizes.append(len(ids))
        noted.copied.append(bool(copies))
        return steps

    monkeypatch.setattr(OnnxRuntimeSlots, "run", noting)
    return noted


def check_same(together: Transcription, alone: Transcription) -> None:
    assert (together.tokens, together.text, together.adapter) == (alone.tokens, alone.text, alone.adapter)
    assert (together.rows, together.rule, together.finished) == (alone.rows, alone.rule, alone.finished)
    assert [h.tokens for h in together.hypotheses] == [h.tokens for h in alone.hypotheses]
    assert [token.row for token in together.provenance] == [token.row for token in alone.provenance]
    assert together.avg_logprob == pytest.approx(alone.avg_logprob, abs=1e-4)


def submit_behind(gate: Gate, transcriber: Transcriber, clip: Path, work: list[Any]) -> list[Future[Transcription]]:
    """Submits work while a first request is halted, so that all of it is in the queue together."""
    first = transcriber.submit(clip, rule=gate, adapters=("music",))
    assert gate.reached.wait(60)
    futures = [transcriber.submit(path, **choice) for path, choice in work]
    gate.opened.set()
    return [first, *futures]


SETS: list[tuple[str, ...] | None] = [
    None,
    (),
    ("music",),
    ("sports",),
    ("wide",),
    ("sports", "music"),
    ("music", "sports"),
    ("wide", "weather", "music"),
]
MORE: list[dict[str, Any]] = [
    {},
    {"max_tokens": 3},
    {"prompt": "bruno mars"},
    {"rule": "paper", "tau": 0.05},
    {"rule": "gain"},
]


@pytest.mark.parametrize("seed", range(3))
def test_mixed_adapters_give_what_each_gets_alone(demo: Transcriber, demo_audio: Clips, runs: Runs, seed: int) -> None:
    choose = random.Random(seed)
    work: list[Any] = [
        (choose.choice(demo_audio)[0], {"adapters": names, **choose.choice(MORE)}) for names in (*SETS, *SETS[:4])
    ]
    work += [(demo_audio[5][0], choice) for choice in CHOICES]
    choose.shuffle(work)
    expected = [demo.transcribe(path, **choice) for path, choice in work]
    futures = []
    for path, choice in work:
        futures.append(demo.submit(path, **choice))
        time.sleep(choose.choice((0, 0, 0.02)))  # so that they join at different steps
    for future, alone in zip(futures, expected, strict=True):
        check_same(future.result(120), alone)
    assert any(runs.copied)


def test_one_run_serves_all_sets(bundle: Path, demo_audio: Clips, runs: Runs) -> None:
    work = [(demo_audio[index][0], {"adapters": names}) for index, names in enumerate(SETS[:4])]
    with load(bundle) as transcriber:  # one that has served nobody yet admits whoever waits
        futures = submit_behind(Gate(), transcriber, demo_audio[0][0], work)
        assert all(future.result(120).finished for future in futures)
    assert max(runs.sizes) >= 3
    steps = sum(future.result().timings.step_count for future in futures)
    assert sum(runs.sizes) == steps  # no request is stepped by a run of another set
    assert len(runs.sizes) < steps


@pytest.mark.parametrize("adapters", [None, ("weather",)])
def test_requests_of_one_set_share_its_tensors(
    bundle: Path, demo_audio: Clips, runs: Runs, adapters: tuple[str, ...] | None
) -> None:
    gate = Gate()
    with load(bundle) as transcriber:
        first = transcriber.submit(demo_audio[0][0], rule=gate, adapters=adapters)
        assert gate.reached.wait(60)
        futures = [transcriber.submit(path, adapters=adapters) for path, _, _ in demo_audio[1:6]]
        gate.opened.set()
        assert all(future.result(120).text for future in (first, *futures))
    assert max(runs.sizes) > 1
    assert not any(runs.copied)


def test_the_copies_go_when_the_last_stranger_leaves(bundle: Path, demo_audio: Clips, runs: Runs) -> None:
    work = [(demo_audio[1][0], {"adapters": ("music",)}), (demo_audio[2][0], {"adapters": None, "max_tokens": 2})]
    with load(bundle) as transcriber:
        expected = [transcriber.transcribe(path, **choice) for path, choice in work]
        futures = submit_behind(Gate(), transcriber, demo_audio[0][0], work)
        for future, alone in zip(futures[1:], expected, strict=True):
            check_same(future.result(120), alone)
    assert (runs.copied[0], any(runs.copied), runs.copied[-1]) == (False, True, False)
    behind = len(runs.copied) - runs.copied[::-1].index(True)
    assert runs.sizes[behind] == 2


def test_requests_keep_the_stack_they_started_with(
    bundle: Path, demo_adapters: dict[str, Path], demo_audio: Clips, runs: Runs
) -> None:
    gate = Gate()
    with load(bundle) as transcriber:
        expected = transcriber.transcribe(demo_audio[1][0])
        before = submit_behind(gate, transcriber, demo_audio[0][0], [(demo_audio[1][0], {})])
        transcriber.unload_adapter("music")
        transcriber.load_adapter("song", demo_adapters["music"])
        after = transcriber.submit(demo_audio[1][0])
        check_same(before[1].result(120), expected)
        assert after.result(120).rows == ("base", "weather", "sports", "song")
        check_same(after.result(), transcriber.transcribe(demo_audio[1][0]))
    assert max(runs.sizes) > 1


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_other_precisions(bundle: Path, wide: Path, demo_audio: Clips, precision: str, runs: Runs) -> None:
    with load(bundle, precision) as transcriber:
        transcriber.load_adapter("wide", wide)
        work = [(demo_audio[index][0], {"adapters": names}) for index, names in enumerate(SETS)]
        expected = [transcriber.transcribe(path, **choice) for path, choice in work]
        futures = submit_behind(Gate(), transcriber, demo_audio[0][0], work)
        for future, alone in zip(futures[1:], expected, strict=True):
            found = future.result(120)
            assert [h.tokens for h in found.hypotheses] == [h.tokens for h in alone.hypotheses]
            # The last bits of a sum depend on padding, and decide now and then how an activation is rounded.
            assert found.avg_logprob == pytest.approx(alone.avg_logprob, abs=0.02)
    assert any(runs.copied)


def test_the_bundles_own_adapters_are_read_when_first_mixed(bundle: Path, demo_audio: Clips, tmp_path: Path) -> None:
    """And a file that is gone by then fails the request that needed it, nobody else."""
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    with load(copy) as transcriber:
        expected = transcriber.transcribe(demo_audio[1][0])
        music = transcriber.transcribe(demo_audio[2][0], adapters=("music",))  # this set is read now
        shutil.rmtree(copy / "adapters")
        gate = Gate()
        first = transcriber.submit(demo_audio[0][0], rule=gate)
        assert gate.reached.wait(60)
        others = [transcriber.submit(demo_audio[1][0]), transcriber.submit(demo_audio[2][0], adapters=("music",))]
        gate.opened.set()
        check_same(others[0].result(120), expected)
        assert first.result(120).text
        with pytest.raises(BundleError, match=r"music\.safetensors"):
            others[1].result(120)
        check_same(transcriber.submit(demo_audio[2][0], adapters=("music",)).result(120), music)
