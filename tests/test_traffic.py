"""What crosses between host and device: ids, positions and scores, however long the history and large the vocabulary.

Three witnesses: the runtime's own count (`DecodingBatch.traffic`), a bound computed from the numbers of utterances and
rows, and a spy between the runtime and ONNX Runtime that accounts for every call and every byte.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from das_asr.runtime import Transcriber, Transcription
from das_asr.runtime.backends import BackendOptions
from das_asr.runtime.backends.base import Control, DecodingBatch, Encoded, LoadedStack, Step, Traffic
from das_asr.runtime.backends.binding import Binding
from das_asr.runtime.backends.onnxruntime import OnnxRuntimeBackend, OnnxRuntimeBatch
from das_asr.runtime.manifest import read_manifest
from tests.bundles import make_bundle

ROWS = 4  # of the demo bundle


def step_bytes(batch: int, rows: int, *, host_rule: bool = False) -> dict[str, int]:
    """Every tensor that may cross in one step, and its size."""
    sizes = {"position": 8 * batch, "prompt_last": 8 * batch, "row": 8 * batch}
    sizes |= {"candidate": 8 * batch * rows, "logprob": 4 * batch * rows}
    return sizes | ({"ids": 8 * batch * rows} if host_rule else {})


class Keeping:
    """A backend that keeps its batches; `wrap` may put something around each."""

    def __init__(self, backend: OnnxRuntimeBackend, wrap: Callable[[OnnxRuntimeBatch], DecodingBatch]) -> None:
        self._backend, self._wrap = backend, wrap
        self.batches: list[DecodingBatch] = []
        self.prunes = False  # all rows stay: a step's bytes are then known before it runs
        self.load_stack, self.encode, self.close = backend.load_stack, backend.encode, backend.close

    def start(self, encoded: Encoded, stack: LoadedStack, control: Control) -> DecodingBatch:
        self.batches.append(self._wrap(self._backend.start(encoded, stack, control)))
        return self.batches[-1]

    @property
    def steps(self) -> list[Traffic]:
        """Traffic of the last batch after its prefill."""
        return self.batches[-1].traffic[1:]


def open_bundle(
    bundle: Path, wrap: Callable[[OnnxRuntimeBatch], DecodingBatch] = lambda batch: batch
) -> tuple[Transcriber, Keeping]:
    manifest = read_manifest(bundle)
    backend = Keeping(OnnxRuntimeBackend(bundle, bundle, manifest, BackendOptions(threads=1)), wrap)
    return Transcriber(manifest, bundle, backend), backend


@pytest.fixture(scope="module")
def demo(demo_bundle: Path) -> Iterator[tuple[Transcriber, Keeping]]:
    transcriber, backend = open_bundle(demo_bundle)
    with transcriber:
        yield transcriber, backend


class MostConfident:
    """A rule on the host."""

    name = "most-confident"
    needs_logits = False

    def choose(self, step: Any) -> Any:
        return step.logprobs.argmax(axis=1)


def run(transcriber: Transcriber, clips: list[Path], **options: Any) -> list[Transcription]:
    return transcriber.transcribe_batch(clips, **{"no_speech_threshold": None, "language": "en"} | options)


# --- The bound ---


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("rule", ["hypothesis", "paper"])
def test_a_step_moves_ids_positions_and_scores_only(
    demo: tuple[Transcriber, Keeping], demo_audio: list[tuple[Path, str, str]], batch: int, rule: str
) -> None:
    transcriber, backend = demo
    run(transcriber, [path for path, _, _ in demo_audio[:batch]], rule=rule)
    assert len(backend.steps) > 5
    for traffic in backend.steps:
        assert traffic.to_device | traffic.to_host == step_bytes(batch, ROWS)
        assert traffic.total == 24 * batch + 12 * batch * ROWS


def test_a_rule_on_the_host_adds_the_ids_it_chose(
    demo: tuple[Transcriber, Keeping], demo_audio: list[tuple[Path, str, str]]
) -> None:
    transcriber, backend = demo
    run(transcriber, [demo_audio[0][0]], rule=MostConfident())
    assert backend.steps
    for traffic in backend.steps:
        assert traffic.to_device | traffic.to_host == step_bytes(1, ROWS, host_rule=True)


def test_rows_that_have_left_the_batch_move_nothing(
    demo: tuple[Transcriber, Keeping], demo_audio: list[tuple[Path, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    transcriber, backend = demo
    monkeypatch.setattr(backend, "prunes", True)
    for path, _, _ in demo_audio:
        rows = run(transcriber, [path])[0].timings.step_rows
        for traffic, before, now in zip(backend.steps, (ROWS, *rows), rows, strict=False):
            mask = {} if now == before else {"row_mask": now}
            assert traffic.to_device | traffic.to_host == step_bytes(1, now) | mask
        if rows[-1] < ROWS:
            return
    pytest.fail("no row left early in any clip")


def test_a_smaller_set_of_adapters_moves_less(
    demo: tuple[Transcriber, Keeping], demo_audio: list[tuple[Path, str, str]]
) -> None:
    transcriber, backend = demo
    run(transcriber, [demo_audio[0][0]], adapters=("sports",))
    assert {traffic.total for traffic in backend.steps} == {sum(step_bytes(1, 2).values())}


def test_what_stays_the_same_crosses_once_with_the_prefill(
    demo: tuple[Transcriber, Keeping], demo_audio: list[tuple[Path, str, str]]
) -> None:
    transcriber, backend = demo
    run(transcriber, [demo_audio[0][0]])
    vocabulary = transcriber.manifest.dimensions.vocabulary
    prefill = backend.batches[-1].traffic[0]
    once = {"rule": 8, "tau": 4, "row_mask": ROWS, "first_valid": 8}
    once |= {"token_bias": 4 * vocabulary, "first_token_bias": 4 * vocabulary}
    prompt = {"ids": prefill.to_device["ids"]}
    assert prefill.to_device | prefill.to_host == once | prompt | step_bytes(1, ROWS)


# --- The bound can be broken ---


class AsksForLogits:
    """Wrong on purpose: fetches the logits of every step."""

    def __init__(self, inner: OnnxRuntimeBatch) -> None:
        self._inner = inner
        self.traffic = inner.traffic

    def run(self, position: Any, prompt_last: Any, ids: Any = None, *, logits: bool = False) -> Step:
        return self._inner.run(position, prompt_last, ids, logits=True)


class HostCache:
    """Wrong on purpose: the cache goes through the host between steps."""

    def __init__(self, inner: OnnxRuntimeBatch) -> None:
        self._binding, self._cache = inner._binding, inner.cache
        self._kept: list[NDArray[np.float32]] | None = None
        self._next_ids: Any = None
        self.traffic: list[Traffic] = []

    def run(self, position: Any, prompt_last: Any, ids: Any = None, *, logits: bool = False) -> Step:
        for name, array in (("position", position), ("prompt_last", prompt_last)):
            self._binding.feed(name, array)
        self._binding.feed("ids", self._next_ids if ids is None else ids)
        for index, (name, value) in enumerate(self._cache.inputs()):
            if self._kept is None:
                self._binding.connect(name, value)
            else:
                self._binding.feed(name, self._kept[index])
        names = ("row", "candidate", "logprob", "next_ids", *self._cache.present_names)
        _, (row, candidate, logprob, self._next_ids, *self._kept) = self._binding.run((), names)
        self.traffic.append(self._binding.take_traffic())
        return Step(row, candidate, logprob)


def test_asking_for_logits_breaks_the_bound(demo_bundle: Path, demo_audio: list[tuple[Path, str, str]]) -> None:
    transcriber, backend = open_bundle(demo_bundle, AsksForLogits)
    with transcriber:
        run(transcriber, [demo_audio[0][0]])
        vocabulary = transcriber.manifest.dimensions.vocabulary
    allowed = sum(step_bytes(1, ROWS).values())
    assert {traffic.total for traffic in backend.steps} == {allowed + 4 * ROWS * vocabulary}


def test_a_cache_on_the_host_breaks_the_bound_and_grows(
    demo_bundle: Path, demo_audio: list[tuple[Path, str, str]]
) -> None:
    transcriber, backend = open_bundle(demo_bundle, HostCache)
    with transcriber:
        run(transcriber, [demo_audio[0][0]])
    totals = [traffic.total for traffic in backend.steps]
    assert min(totals) > 100 * sum(step_bytes(1, ROWS).values())
    assert totals == sorted(set(totals))  # every step moves more than the one before


# --- Nothing crosses unseen ---


class SpyValue:
    """A tensor of the engine; fetching its content is on record, and nothing else can be done with it."""

    def __init__(self, value: Any, name: str, spy: Spy) -> None:
        self.inner, self.name, self._spy = value, name, spy

    def numpy(self) -> NDArray[Any]:
        array: NDArray[Any] = self.inner.numpy()
        self._spy.to_host[self.name] += array.nbytes
        return array


class SpyBinding:
    """An IO binding that puts every call on record; a call it does not know fails."""

    def __init__(self, session: SpySession) -> None:
        self.inner = session.inner.io_binding()
        self._session, self._spy = session, session.spy
        self._outputs: list[str] = []

    def bind_cpu_input(self, name: str, array: NDArray[Any]) -> None:
        self._spy.to_device[name] += array.nbytes
        self.inner.bind_cpu_input(name, array)

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self._spy.connected.append((self._session.name, name, value))
        self.inner.bind_ortvalue_input(name, value.inner if isinstance(value, SpyValue) else value)

    def bind_output(self, name: str, device: str, device_id: int = 0) -> None:
        self._outputs.append(name)
        self.inner.bind_output(name, device, device_id)

    def clear_binding_outputs(self) -> None:
        self._outputs.clear()
        self.inner.clear_binding_outputs()

    def get_outputs(self) -> list[SpyValue]:
        values = self.inner.get_outputs()
        made = [SpyValue(value, name, self._spy) for value, name in zip(values, self._outputs, strict=True)]
        self._spy.made.update((name, value) for name, value in zip(self._outputs, made, strict=True))
        return made


class SpySession:
    """A session that can be run by a spied binding only."""

    def __init__(self, inner: Any, name: str, spy: Spy) -> None:
        self.inner, self.name, self.spy = inner, name, spy

    def io_binding(self) -> SpyBinding:
        return SpyBinding(self)

    def run_with_iobinding(self, binding: SpyBinding) -> None:
        self.inner.run_with_iobinding(binding.inner)
        if self.name == "decoder":
            self.spy.end_run()


class Spy:
    """What really crossed in each run of the decoder, and which tensors were handed over."""

    def __init__(self) -> None:
        self.to_device: Counter[str] = Counter()
        self.to_host: Counter[str] = Counter()
        self.uploads = 0  # bytes of arrays made into tensors of the device
        self.made: dict[str, SpyValue] = {}  # the latest output of each name
        self.connected: list[tuple[str, str, Any]] = []  # (graph, input, tensor)
        self.runs: list[
            tuple[int, int]
        ] = []  # bytes to the device before each run, bytes to the host after the one before

    def end_run(self) -> None:
        self.runs.append((self.to_device.total() + self.uploads, self.to_host.total()))
        self.to_device.clear()
        self.to_host.clear()
        self.uploads = 0


@pytest.fixture
def spied(demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Transcriber, Keeping, Spy]]:
    spy = Spy()
    transcriber, backend = open_bundle(demo_bundle)
    engine = backend._backend
    engine._encoder = SpySession(engine._encoder, "encoder", spy)
    engine._decoder = SpySession(engine._decoder, "decoder", spy)
    upload = onnxruntime.OrtValue.ortvalue_from_numpy

    def counted(array: NDArray[Any], device: str, device_id: int) -> Any:
        spy.uploads += array.nbytes
        return upload(array, device, device_id)

    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", counted)
    with transcriber:
        yield transcriber, backend, spy


@pytest.mark.parametrize("rule", ["hypothesis", "paper", MostConfident()], ids=["own", "shared", "host"])
def test_every_byte_that_crosses_is_counted(
    spied: tuple[Transcriber, Keeping, Spy], demo_audio: list[tuple[Path, str, str]], rule: Any
) -> None:
    transcriber, backend, spy = spied
    run(transcriber, [path for path, _, _ in demo_audio[:2]], rule=rule, no_speech_threshold=0.6)
    counted = backend.batches[-1].traffic
    assert len(spy.runs) == len(counted) > 5
    features = 2 * 4 * transcriber.manifest.dimensions.mels * transcriber.manifest.dimensions.frames
    to_device = [up for up, _ in spy.runs]
    to_device[0] -= features  # the encoder's input, which no step repeats
    assert to_device == [sum(traffic.to_device.values()) for traffic in counted]
    to_host = [down for _, down in spy.runs[1:]] + [spy.to_host.total()]
    assert to_host == [sum(traffic.to_host.values()) for traffic in counted]


def test_tensors_are_handed_on_as_the_very_same_objects(
    spied: tuple[Transcriber, Keeping, Spy], demo_audio: list[tuple[Path, str, str]]
) -> None:
    transcriber, _, spy = spied
    run(transcriber, [demo_audio[0][0]], max_tokens=3)
    layers = transcriber.manifest.dimensions.decoder_layers
    decoder = [(name, value) for graph, name, value in spy.connected if graph == "decoder"]
    cross = {name: value for name, value in decoder if name.startswith("cross_")}
    assert len(cross) == 3 * layers
    assert all(value is spy.made[name] for name, value in cross.items())  # bound once, made once
    assert sum(name in cross for name, _ in decoder) == len(cross)
    assert isinstance(dict(decoder)["ids"], SpyValue)
    pasts = [(name, value) for name, value in decoder if name.startswith("past_")]
    assert len(pasts) == 3 * 2 * layers
    handed_on = pasts[2 * layers :]  # the first run has an empty cache
    assert all(value.name == name.replace("past", "present") for name, value in handed_on)
    assert len({id(value) for _, value in handed_on}) == len(handed_on)  # the outputs of each run, not of one


def test_hot_loaded_adapters_cross_once_and_not_per_request(
    demo_base: Path, demo_adapters: dict[str, Path], demo_audio: list[tuple[Path, str, str]], tmp_path: Path
) -> None:
    transcriber, backend = open_bundle(make_bundle(demo_base, {}, tmp_path / "bundle"))
    with transcriber:
        transcriber.load_adapter("music", demo_adapters["music"])
        run(transcriber, [demo_audio[0][0]])
    for traffic in backend.batches[-1].traffic:
        assert not any(name.startswith("lora_") for name in traffic.to_device)


class RecordingBinding:
    """Takes outputs and says where they were asked to be."""

    def __init__(self) -> None:
        self.places: dict[str, tuple[Any, ...]] = {}

    def io_binding(self) -> RecordingBinding:
        return self

    def run_with_iobinding(self, binding: RecordingBinding) -> None: ...

    def clear_binding_outputs(self) -> None: ...

    def bind_output(self, name: str, *place: Any) -> None:
        self.places[name] = place

    def get_outputs(self) -> list[Any]:
        return [onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32)) for _ in self.places]


def test_on_a_second_gpu_outputs_stay_there_and_only_what_is_fetched_leaves_it() -> None:
    session = RecordingBinding()
    kept, fetched = Binding(session, "cuda", 1).run(["present_k0", "next_ids"], ["row"])
    assert session.places == {"present_k0": ("cuda", 1), "next_ids": ("cuda", 1), "row": ("cpu",)}
    assert (len(kept), len(fetched)) == (2, 1)
