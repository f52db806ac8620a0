"""The decoder with caches of fixed size computes what the growing one computes, for utterances of any age."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from das_asr.runtime.contract import DECODER_FILE, DECODER_STATIC_FILE, cache_names, cross_specs
from das_asr.runtime.manifest import Dimensions
from tests.bundles import small_graphs

Feeds = dict[str, NDArray[Any]]

ROWS = 3
STEPS = 6
PROMPTS = (2, 5, 3)  # tokens; ages from then on differ
OUTPUTS = ("next_ids", "row", "candidate", "logprob", "logits")
TOLERANCE = 2e-5  # relative to the largest logit, as in the parity gate


@dataclass(frozen=True)
class Decoders:
    """Both forms of one decoder, and what three utterances have to say to them."""

    dims: Dimensions
    growing: Any
    static: Any
    cross: Feeds  # [3, ...] each
    ids: list[NDArray[np.int64]]  # [R, prompt + STEPS] each; the prompt is the same in every row


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> Decoders:
    folder = tmp_path_factory.mktemp("static")
    dims, stack = small_graphs(folder, folder, {})
    random = np.random.default_rng(0)
    sizes = {"batch": len(PROMPTS), "rows": ROWS, "audio": dims.audio_positions, "rank": stack.rank}
    shapes = {spec.name: [sizes.get(str(size), size) for size in spec.shape] for spec in cross_specs(dims)}
    cross = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}  # type: ignore[arg-type]
    ids = [random.integers(dims.vocabulary, size=(ROWS, length + STEPS)) for length in PROMPTS]
    for length, history in zip(PROMPTS, ids, strict=True):
        history[:, :length] = history[0, :length]
    return Decoders(dims, session(folder / DECODER_FILE), session(folder / DECODER_STATIC_FILE), cross, ids)


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def steering(decoders: Decoders, utterances: Sequence[int]) -> Feeds:
    """Inputs that stay the same, the rule of each utterance another one."""
    batch, vocabulary = len(utterances), decoders.dims.vocabulary
    bias = np.zeros((batch, vocabulary), np.float32)
    bias[:, ::3] = -1e30
    return {name: tensor[list(utterances)] for name, tensor in decoders.cross.items()} | {
        "first_valid": np.zeros(batch, np.int64),
        "prompt_last": np.array(PROMPTS)[list(utterances)] - 1,
        "rule": np.array(utterances) + 2,
        "tau": np.full(batch, 0.01, np.float32),
        "token_bias": bias,
        "first_token_bias": np.roll(bias, 1, axis=1),
        "row_mask": np.ones((batch, ROWS), np.bool_),
    }


def alone(decoders: Decoders, utterance: int) -> list[dict[str, Any]]:
    """What the growing decoder says to one utterance, behind its prompt and behind every further token."""
    dims, length = decoders.dims, PROMPTS[utterance]
    pasts, presents = zip(*cache_names(dims), strict=True)
    caches = dict.fromkeys(pasts, np.zeros((1, ROWS, dims.decoder_heads, 0, dims.head_size), np.float32))
    said = []
    for begin, end in [(0, length), *((at, at + 1) for at in range(length, length + STEPS))]:
        feeds = {"ids": decoders.ids[utterance][None, :, begin:end], "position": np.array([begin])}
        values = decoders.growing.run([*OUTPUTS, *presents], steering(decoders, [utterance]) | feeds | caches)
        caches = dict(zip(pasts, values[len(OUTPUTS) :], strict=True))
        said.append({name: value[0] for name, value in zip(OUTPUTS, values, strict=False)})
    return said


@pytest.fixture(scope="module")
def expected(decoders: Decoders) -> list[list[dict[str, Any]]]:
    return [alone(decoders, utterance) for utterance in range(len(PROMPTS))]


class Lanes:
    """Caches of the static decoder for some utterances, bound in place."""

    def __init__(self, decoders: Decoders, utterances: Sequence[int]) -> None:
        self._decoders, self._utterances = decoders, list(utterances)
        dims = decoders.dims
        shape = (len(self._utterances) * ROWS, dims.decoder_heads, dims.text_positions, dims.head_size)
        self.values = {
            past: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for past, _ in cache_names(dims)
        }

    def run(self, ids: NDArray[np.int64], position: Sequence[int], attended: int) -> list[dict[str, Any]]:
        binding = self._decoders.static.io_binding()
        feeds = {"ids": ids, "position": np.array(position), "attended": np.array([attended])}
        for name, array in (steering(self._decoders, self._utterances) | feeds).items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for past, present in cache_names(self._decoders.dims):
            binding.bind_ortvalue_input(past, self.values[past])
            binding.bind_ortvalue_output(present, self.values[past])
        for name in OUTPUTS:
            binding.bind_output(name)
        self._decoders.static.run_with_iobinding(binding)
        outputs = [value.numpy().copy() for value in binding.get_outputs()[-len(OUTPUTS) :]]
        return [dict(zip(OUTPUTS, values, strict=True)) for values in zip(*outputs, strict=True)]


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    largest = np.abs(wanted["logits"]).max()
    difference = np.abs(found["logits"] - wanted["logits"]).max()
    assert difference <= TOLERANCE * largest, f"logits differ by {difference:.3g}, the largest is {largest:.3g}"
    np.testing.assert_allclose(found["logprob"], wanted["logprob"], rtol=0, atol=4 * TOLERANCE * largest)
    for name in ("next_ids", "row", "candidate"):
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def step_ids(decoders: Decoders, utterances: Sequence[int], step: int) -> NDArray[np.int64]:
    return np.stack([decoders.ids[item][:, PROMPTS[item] + step][:, None] for item in utterances])


def test_prompts_padded_on_the_right(decoders: Decoders, expected: list[list[dict[str, Any]]]) -> None:
    """One prefill of different lengths; the steps of the shorter ones overwrite their padding."""
    everyone = range(len(PROMPTS))
    lanes = Lanes(decoders, everyone)
    ids = np.full((len(PROMPTS), ROWS, max(PROMPTS)), 7)
    for place, length in enumerate(PROMPTS):
        ids[place, :, :length] = decoders.ids[place][:, :length]
    runs = [lanes.run(ids, [0] * len(PROMPTS), max(PROMPTS))]
    for step in range(STEPS):
        position = [length + step for length in PROMPTS]
        runs.append(lanes.run(step_ids(decoders, everyone, step), position, max(position) + 1))
    for number, run in enumerate(runs):
        for utterance in everyone:
            assert_same(run[utterance], expected[utterance][number])


@pytest.mark.parametrize("bucket", [1, 8, 24])
def test_utterances_of_any_age_share_a_run(
    decoders: Decoders, expected: list[list[dict[str, Any]]], bucket: int
) -> None:
    """Prefilled one by one, one of them already steps ahead, then together; `attended` is rounded up to the bucket."""
    ages = (4, 0, 1)  # steps that each has made before they meet
    meeting = Lanes(decoders, range(len(PROMPTS)))
    for utterance, age in enumerate(ages):
        lanes = Lanes(decoders, [utterance])
        lanes.run(decoders.ids[utterance][None, :, : PROMPTS[utterance]], [0], PROMPTS[utterance])
        for step in range(age):
            at = PROMPTS[utterance] + step
            lanes.run(step_ids(decoders, [utterance], step), [at], at + 1)
        for past, value in lanes.values.items():
            meeting.values[past].numpy()[utterance * ROWS : (utterance + 1) * ROWS] = value.numpy()
    for further in range(STEPS - max(ages)):
        steps = [age + further for age in ages]
        ids = np.concatenate([step_ids(decoders, [item], step) for item, step in enumerate(steps)])
        position = [length + step for length, step in zip(PROMPTS, steps, strict=True)]
        attended = -(-(max(position) + 1) // bucket) * bucket
        for utterance, found in enumerate(meeting.run(ids, position, attended)):
            assert_same(found, expected[utterance][1 + steps[utterance]])


@pytest.mark.parametrize("slot", [3, 23], ids=["a slot", "the last slot"])
def test_caches_are_updated_in_place(decoders: Decoders, slot: int) -> None:
    """Only the new slot changes, in the memory that was bound; what a separate output gives is the same."""
    lanes = Lanes(decoders, [0])
    for value in lanes.values.values():
        value.numpy()[:] = 0.5
    before = {past: value.numpy().copy() for past, value in lanes.values.items()}
    ids = step_ids(decoders, [0], 0)
    lanes.run(ids, [slot], slot + 1)
    feeds = {"ids": ids, "position": np.array([slot]), "attended": np.array([slot + 1])}
    for past, present in cache_names(decoders.dims):
        found = lanes.values[past].numpy()
        np.testing.assert_array_equal(
            found, decoders.static.run([present], steering(decoders, [0]) | feeds | before)[0]
        )
        changed = (found != before[past]).any(axis=(0, 1, 3))
        assert changed.tolist() == [item == slot for item in range(decoders.dims.text_positions)]
