"""The encoder in integers: its attention against plain numpy, and the whole against the float32 one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from das_asr.export.integer_encoder import use_integer_attention
from das_asr.export.precision import write_variant
from das_asr.runtime.contract import integer_cross_specs
from das_asr.runtime.manifest import read_manifest
from tests.bundles import make_bundle

HEADS, HEAD_SIZE = 3, 32
WIDTH = HEADS * HEAD_SIZE


def run(model: onnx.ModelProto, feeds: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    outputs: list[Any] = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)
    result: NDArray[np.float32] = outputs[0]
    return result


def attention_in_integers() -> onnx.ModelProto:
    node = helper.make_node(
        "Attention", ["q", "k", "v"], ["y"], name="attention", q_num_heads=HEADS, kv_num_heads=HEADS, scale=1.0
    )
    shape = ["batch", "audio", WIDTH]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("q", "k", "v", "y")]
    graph = helper.make_graph([node], "graph", values[:3], values[3:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    use_integer_attention(model)
    assert [node.op_type for node in model.graph.node] == ["Scan"]
    return model


def attention(q: NDArray[np.float32], k: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.float32]:
    q, k, v = (x.reshape(*x.shape[:2], HEADS, HEAD_SIZE).transpose(0, 2, 1, 3) for x in (q, k, v))
    weights = np.exp(q @ k.transpose(0, 1, 3, 2))
    context = weights / weights.sum(-1, keepdims=True) @ v
    merged: NDArray[np.float32] = context.transpose(0, 2, 1, 3).reshape(len(q), -1, WIDTH)
    return merged


@pytest.mark.parametrize("sharpness", [0.01, 0.3, 1.0])
def test_attention_of_flat_and_of_peaked_rows(sharpness: float) -> None:
    generator = np.random.default_rng(0)
    q, k, v = (generator.standard_normal((2, 300, WIDTH), np.float32) for _ in range(3))
    q *= sharpness
    v += 0.5
    wanted, found = attention(q, k, v), run(attention_in_integers(), {"q": q, "k": k, "v": v})
    assert np.abs(found - wanted).mean() < 0.03 * np.abs(wanted).mean()


def test_attention_of_an_utterance_does_not_depend_on_the_others() -> None:
    generator = np.random.default_rng(1)
    model = attention_in_integers()
    feeds = {name: generator.standard_normal((2, 50, WIDTH), np.float32) for name in ("q", "k", "v")}
    feeds["k"][1] *= 20  # of another scale than the first
    alone = run(model, {name: array[:1] for name, array in feeds.items()})
    np.testing.assert_array_equal(run(model, feeds)[:1], alone)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, demo_base: Path, demo_adapters: dict[str, Path]) -> Path:
    folder = make_bundle(demo_base, demo_adapters, tmp_path_factory.mktemp("integers") / "bundle")
    write_variant(folder, "int8", read_manifest(folder).dimensions)
    return folder


@pytest.mark.parametrize("part", [1.0, 0.25])
def test_the_whole_encoder_stays_close(bundle: Path, part: float) -> None:
    exact, rounded = (onnxruntime.InferenceSession(bundle / folder / "encoder.onnx") for folder in (".", "int8"))
    features = np.random.default_rng(2).standard_normal((1, 80, int(800 * part)), np.float32)
    dims = read_manifest(bundle).dimensions
    names = [[output.name for output in session.get_outputs()] for session in (exact, rounded)]
    wanted = dict(zip(names[0], exact.run(None, {"features": features}), strict=True))
    found = dict(zip(names[1], rounded.run(None, {"features": features}), strict=True))
    assert found.keys() == {spec.name for spec in integer_cross_specs(dims)}
    for name, tensor in wanted.items():
        middle = 128 if name.startswith("cross_k") else 0
        values = (found[name].astype(np.float32) - middle) * found[f"{name[:7]}_scale{name[7:]}"]
        if name.startswith("cross_v"):
            values = values.transpose(0, 1, 3, 2)
        assert values.shape == tensor.shape
        assert np.abs(values - tensor).mean() <= 0.08 * np.abs(tensor).mean(), name


def test_only_the_first_convolution_stays_float32(bundle: Path) -> None:
    graph = onnx.load(bundle / "int8" / "encoder.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("Conv") == 1
    assert not {"Attention", "MatMul"} & set(kinds)
