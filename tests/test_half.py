"""Half precision: what computes in float32 all the same, what true fp16 arithmetic makes of it, and the variants."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from das_asr.export import AdapterSource, ExportOptions, export_bundle
from das_asr.export.cli import main
from das_asr.export.half import HALF_PRECISIONS, write_half
from das_asr.export.teacher import GrowingDecoder
from das_asr.runtime import Transcriber
from das_asr.runtime.adapters import rounded_tensors, stack_adapters
from das_asr.runtime.audio import load_audio
from das_asr.runtime.contract import (
    DECODER_FILE,
    DECODER_STATIC_FILE,
    ENCODER_FILE,
    DType,
    TensorSpec,
    cache_names,
    decoder_inputs,
    decoder_outputs,
    encoder_inputs,
    encoder_outputs,
    static_decoder_inputs,
    static_decoder_outputs,
)
from das_asr.runtime.errors import AdapterError, BackendError, ExportError
from das_asr.runtime.features import LogMel
from das_asr.runtime.manifest import Dimensions, read_manifest
from das_asr.runtime.peft_checkpoint import read_adapter
from tests.bundles import small_graphs

Feeds = dict[str, NDArray[Any]]

FILES = (ENCODER_FILE, DECODER_FILE, DECODER_STATIC_FILE)
TYPES: dict[int, DType] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.INT64: "int64",
    TensorProto.BOOL: "bool",
}
ROWS, PROMPT = 3, 5


@dataclass(frozen=True)
class Exported:
    """Float32 graphs with two adapters, and both variants of them."""

    directory: Path
    dims: Dimensions

    def load(self, precision: str, file: str) -> onnx.ModelProto:
        return onnx.load(self.directory / precision / file)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("half")
    dims, _ = small_graphs(folder, folder / "graphs", {"das.base": "base"})
    for precision in HALF_PRECISIONS:
        write_half(folder / "graphs", precision, dims, folder / "graphs" / precision)
    return Exported(folder / "graphs", dims)


# --- What is written ---


def types_of(model: onnx.ModelProto) -> dict[str, DType]:
    """Type of every tensor."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    values = {
        value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)
    }
    return {name: TYPES[kind] for name, kind in (values | {t.name: t.data_type for t in graph.initializer}).items()}


def spec_of(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    return TensorSpec(value.name, TYPES[tensor.elem_type], tuple(d.dim_param or d.dim_value for d in tensor.shape.dim))


@pytest.mark.parametrize("precision", HALF_PRECISIONS)
def test_graphs_are_the_contract(exported: Exported, precision: str) -> None:
    dtype = HALF_PRECISIONS[precision]
    for file, inputs, outputs in (
        (ENCODER_FILE, encoder_inputs, encoder_outputs),
        (DECODER_FILE, decoder_inputs, decoder_outputs),
        (DECODER_STATIC_FILE, static_decoder_inputs, static_decoder_outputs),
    ):
        model = exported.load(precision, file)
        assert [spec_of(value) for value in model.graph.input] == inputs(exported.dims, dtype)
        assert [spec_of(value) for value in model.graph.output] == outputs(exported.dims, dtype)
        assert {item.key: item.value for item in model.metadata_props} == {"das.base": "base"}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("precision", HALF_PRECISIONS)
def test_norms_and_the_selection_compute_in_float32_and_all_else_in_halves(
    exported: Exported, precision: str, file: str
) -> None:
    model = exported.load(precision, file)
    types, half = types_of(model), HALF_PRECISIONS[precision]
    norms, selection, network = 0, 0, set()
    for node in model.graph.node:
        touched = {types[name] for name in (*node.input, *node.output)} - {"int64", "bool"}
        if node.op_type == "LayerNormalization":
            assert touched == {"float32"}, node.name
            norms += 1
        elif node.name.startswith("selection/"):
            assert touched <= {"float32"}, node.name
            selection += 1
        elif node.op_type != "Cast":
            assert touched <= {half}, node.name
            network |= {node.op_type} if touched else set()
    dims = exported.dims
    assert norms == (2 * dims.encoder_layers + 1 if file == ENCODER_FILE else 3 * dims.decoder_layers + 1)
    assert {"MatMul", "Gelu", "Add"} <= network
    assert (selection > 20) == (file != ENCODER_FILE)
    if file != ENCODER_FILE:
        (exp,) = (node for node in model.graph.node if node.name == "selection/exp")
        assert (types["logits"], types[exp.input[0]]) == ("float32", "float32")


@pytest.mark.parametrize("precision", HALF_PRECISIONS)
def test_weights_are_rounded_once_and_stay_finite(exported: Exported, precision: str) -> None:
    for file in FILES:
        exact = {item.name: numpy_helper.to_array(item) for item in exported.load("", file).graph.initializer}
        for item in exported.load(precision, file).graph.initializer:
            found, wanted = numpy_helper.to_array(item), exact.pop(item.name)
            assert np.isfinite(found.astype(np.float64)).all(), item.name
            if "norm" in item.name or wanted.dtype != np.float32 or found.dtype == np.float32:
                np.testing.assert_array_equal(found, wanted)
            elif item.name != "const/forbid":
                np.testing.assert_array_equal(found, wanted.astype(found.dtype), err_msg=item.name)
        assert not exact


def test_nothing_sees_what_is_masked(exported: Exported) -> None:
    constants = {item.name: item for item in exported.load("fp16", DECODER_FILE).graph.initializer}
    forbid = numpy_helper.to_array(constants["const/forbid"])
    assert forbid == -6e4
    assert np.exp(forbid + np.float16(1000)) == 0


@pytest.mark.parametrize("precision", HALF_PRECISIONS)
def test_both_decoders_of_a_variant_read_the_same_weights(exported: Exported, precision: str) -> None:
    folder = exported.directory / precision
    growing, static = (
        {item.name: item for item in onnx.load(folder / file, load_external_data=False).graph.initializer}
        for file in (DECODER_FILE, DECODER_STATIC_FILE)
    )
    assert all(static[name] == item for name, item in growing.items() if item.external_data)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*FILES, f"{ENCODER_FILE}.data", f"{DECODER_FILE}.data"]
    )


def test_a_bundle_without_a_static_decoder_has_variants_without(exported: Exported, tmp_path: Path) -> None:
    for name in (ENCODER_FILE, DECODER_FILE):
        for file in (name, f"{name}.data"):
            shutil.copyfile(exported.directory / file, tmp_path / file)
    write_half(tmp_path, "fp16", exported.dims, tmp_path / "fp16")
    found = {path.name: path.read_bytes() for path in (tmp_path / "fp16").iterdir()}
    assert DECODER_STATIC_FILE not in found
    assert found[DECODER_FILE] == (exported.directory / "fp16" / DECODER_FILE).read_bytes()


def scale_weight(path: Path, name: str, factor: float) -> None:
    """Changes one float32 tensor where it lies in the external data."""
    (tensor,) = (item for item in onnx.load(path, load_external_data=False).graph.initializer if item.name == name)
    about = {entry.key: entry.value for entry in tensor.external_data}
    data = np.memmap(path.with_name(about["location"]), np.float32, "r+", int(about["offset"]), tuple(tensor.dims))
    data *= factor
    data.flush()


def copied(exported: Exported, target: Path) -> Path:
    shutil.copytree(exported.directory, target, ignore=shutil.ignore_patterns(*HALF_PRECISIONS))
    return target


def test_a_weight_beyond_the_range_is_refused(exported: Exported, tmp_path: Path) -> None:
    graphs = copied(exported, tmp_path / "graphs")
    scale_weight(graphs / DECODER_FILE, "model.decoder.layers.1.fc1.weight", 1e6)
    with pytest.raises(ExportError, match=r"model\.decoder\.layers\.1\.fc1\.weight has values up to .*Take bf16"):
        write_half(graphs, "fp16", exported.dims, graphs / "fp16")
    write_half(graphs, "bf16", exported.dims, graphs / "bf16")


# --- True fp16 arithmetic ---


def evaluate(model: onnx.ModelProto, names: list[str], feeds: Feeds) -> list[NDArray[Any]]:
    """The operators as the standard defines them, in the types that the graph has."""
    with np.errstate(over="ignore", invalid="ignore"):
        values: Any = ReferenceEvaluator(model).run(names, feeds)
    return list(values)


def run(path: Path, names: list[str], feeds: Feeds) -> list[NDArray[Any]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return list(session.run(names, feeds))


def without_casts_around_norms(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with layer norms in fp16, as a converter makes it that knows no better."""
    graph = model.graph
    makers = {output: node for node in graph.node for output in node.output}
    readers = {name: node for node in graph.node for name in node.input}
    weights = {item.name: item for item in graph.initializer}
    for norm in [node for node in graph.node if node.op_type == "LayerNormalization"]:
        into, out_of = makers[norm.input[0]], readers[norm.output[0]]
        assert (into.op_type, out_of.op_type) == ("Cast", "Cast")
        norm.input[0], norm.output[0] = into.input[0], out_of.output[0]
        graph.node.remove(into)
        graph.node.remove(out_of)
        for name in norm.input[1:]:
            half = numpy_helper.to_array(weights[name]).astype(np.float16)
            weights[name].CopyFrom(numpy_helper.from_array(half, name))
    onnx.checker.check_model(model, full_check=True)
    return model


def prompt(dims: Dimensions, cross: Feeds, dtype: Any) -> Feeds:
    """A prefill of one utterance, with as many rows as `cross` has."""
    rows = cross["cross_u0"].shape[1]
    empty = np.zeros((1, rows, dims.decoder_heads, 0, dims.head_size), dtype)
    bias = np.zeros((1, dims.vocabulary), np.float32)
    bias[:, ::2] = -1e30
    return {
        "ids": np.broadcast_to(np.arange(PROMPT) * 7, (1, rows, PROMPT)),
        "position": np.zeros(1, np.int64),
        "first_valid": np.zeros(1, np.int64),
        "prompt_last": np.array([PROMPT - 1]),
        "rule": np.ones(1, np.int64),
        "tau": np.full(1, 0.025, np.float32),
        "token_bias": bias,
        "first_token_bias": bias,
        "row_mask": np.ones((1, rows), np.bool_),
        **{name: tensor.astype(dtype) for name, tensor in cross.items()},
        **{past: empty for past, _ in cache_names(dims)},
    }


def error(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Largest difference relative to the largest value; infinite where something is not finite."""
    difference = np.abs(found.astype(np.float64) - wanted).max() / np.abs(wanted).max()
    return float(difference) if np.isfinite(difference) else np.inf


@pytest.fixture(scope="module")
def loud(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Hidden states of several hundred, whose squares are beyond fp16, though they themselves are not."""
    graphs = copied(exported, tmp_path_factory.mktemp("loud") / "graphs")
    for file, part in ((ENCODER_FILE, "encoder"), (DECODER_FILE, "decoder")):
        scale_weight(graphs / file, f"model.{part}.embed_positions.weight", 400)
    write_half(graphs, "fp16", exported.dims, graphs / "fp16")
    return dataclasses.replace(exported, directory=graphs)


def test_loud_hidden_states_in_the_encoder(loud: Exported) -> None:
    features = np.random.default_rng(0).uniform(-1, 1.5, (1, loud.dims.mels, loud.dims.frames)).astype(np.float32)
    names = [spec.name for spec in encoder_outputs(loud.dims)]
    exact = run(loud.directory / ENCODER_FILE, names, {"features": features})
    safe = evaluate(loud.load("fp16", ENCODER_FILE), names, {"features": features})
    naive = evaluate(without_casts_around_norms(loud.load("fp16", ENCODER_FILE)), names, {"features": features})
    assert all(value.dtype == np.float16 for value in safe)
    assert max(map(error, safe, exact)) < 0.01
    assert min(map(error, naive, exact)) > 0.3


def test_loud_hidden_states_in_the_decoder(loud: Exported) -> None:
    random = np.random.default_rng(0)
    sizes = {"batch": 1, "rows": ROWS, "audio": loud.dims.audio_positions, "rank": 4}
    cross = {
        spec.name: random.standard_normal([sizes.get(str(size), size) for size in spec.shape]).astype(np.float16)  # type: ignore[arg-type]
        for spec in encoder_outputs(loud.dims)
    }
    names = ["logits", "logprob", "candidate", "row", "next_ids"]
    exact = run(loud.directory / DECODER_FILE, names, prompt(loud.dims, cross, np.float32))
    feeds = prompt(loud.dims, cross, np.float16)
    safe = evaluate(loud.load("fp16", DECODER_FILE), names, feeds)
    naive = evaluate(without_casts_around_norms(loud.load("fp16", DECODER_FILE)), names, feeds)
    assert (safe[0].dtype, safe[1].dtype) == (np.float32, np.float32)
    assert error(safe[0], exact[0]) < 0.01
    assert np.abs(safe[1] - exact[1]).max() < 0.1
    for found, wanted in zip(safe[2:], exact[2:], strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert error(naive[0], exact[0]) > 0.3


@pytest.mark.parametrize("file", [DECODER_FILE, DECODER_STATIC_FILE])
def test_the_demo_in_true_fp16(bundle: Path, demo_audio: list[tuple[Path, str, str]], file: str) -> None:
    """The prompt of a real clip, through a trained network with its adapters, by either decoder."""
    manifest = read_manifest(bundle)
    dims, names = manifest.dimensions, [spec.name for spec in encoder_outputs(manifest.dimensions)]
    audio = load_audio(demo_audio[0][0], target_rate=manifest.audio.sample_rate)
    features = LogMel(manifest.audio, dims.mels).batch([audio])
    cross = dict(zip(names, run(bundle / ENCODER_FILE, names, {"features": features}), strict=True))
    wanted = ["logits", "logprob", "candidate"]
    exact = run(bundle / DECODER_FILE, wanted, prompt(dims, cross, np.float32))
    feeds = prompt(dims, cross, np.float16)
    if file == DECODER_STATIC_FILE:
        slots = np.zeros((manifest.rows, dims.decoder_heads, dims.text_positions, dims.head_size), np.float16)
        feeds |= {past: slots for past, _ in cache_names(dims)} | {"attended": np.array([8])}
    halves = evaluate(onnx.load(bundle / "fp16" / file), wanted, feeds)
    assert error(halves[0], exact[0]) < 0.005
    assert np.abs(halves[1] - exact[1]).max() < 0.05
    np.testing.assert_array_equal(halves[2], exact[2])
    runtime = run(bundle / "fp16" / file, wanted, feeds)
    assert error(runtime[0], exact[0]) < 0.005
    np.testing.assert_array_equal(runtime[2], exact[2])


def rounded_behind_every_node(model: onnx.ModelProto) -> onnx.ModelProto:
    """The bf16 graph in float32 with everything that a node computes rounded to bf16, which a CPU can run."""
    graph, kind, types = model.graph, TensorProto.BFLOAT16, types_of(model)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == kind:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for item in graph.initializer:
        if item.data_type == kind:
            item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item).astype(np.float32), item.name))
    nodes = []
    for node in graph.node:
        halves = [name for name in node.output if types[name] == "bfloat16"]
        if node.op_type == "Cast" and halves:
            node.attribute[0].i = TensorProto.FLOAT
        node.output[:] = [f"{name}/exact" if name in halves else name for name in node.output]
        nodes.append(node)
        for name in halves:
            nodes.append(onnx.helper.make_node("Cast", [f"{name}/exact"], [f"{name}/rounded"], to=kind))
            nodes.append(onnx.helper.make_node("Cast", [f"{name}/rounded"], [name], to=TensorProto.FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def test_the_demo_with_the_rounding_of_bf16(
    bundle: Path, demo_audio: list[tuple[Path, str, str]], tmp_path: Path
) -> None:
    manifest = read_manifest(bundle)
    dims, names = manifest.dimensions, [spec.name for spec in encoder_outputs(manifest.dimensions)]
    for file in (ENCODER_FILE, DECODER_FILE):
        onnx.save(rounded_behind_every_node(onnx.load(bundle / "bf16" / file)), tmp_path / file)
    audio = load_audio(demo_audio[0][0], target_rate=manifest.audio.sample_rate)
    features = LogMel(manifest.audio, dims.mels).batch([audio])

    def prefill(folder: Path) -> list[NDArray[Any]]:
        cross = dict(zip(names, run(folder / ENCODER_FILE, names, {"features": features}), strict=True))
        return run(folder / DECODER_FILE, ["logits", "candidate"], prompt(dims, cross, np.float32))

    exact, rounded = prefill(bundle), prefill(tmp_path)
    assert 1e-4 < error(rounded[0], exact[0]) < 0.03  # it does round, to 8 bits
    np.testing.assert_array_equal(rounded[1], exact[1])


# --- Variants of a bundle ---


@pytest.fixture(scope="module")
def bundle(
    demo_base: Path, demo_adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, one_torch_thread: None
) -> Path:
    output = tmp_path_factory.mktemp("variants") / "bundle"
    sources = tuple(AdapterSource(name, folder) for name, folder in demo_adapters.items())
    precisions = ("fp32", *HALF_PRECISIONS)
    export_bundle(ExportOptions(base=str(demo_base), adapters=sources, output=output, precisions=precisions))
    return output


def test_fp16_is_compared_on_the_cpu_and_bf16_says_that_it_is_not(bundle: Path) -> None:
    fp16, bf16 = (read_manifest(bundle).variants[name] for name in ("fp16", "bf16"))
    assert fp16.tokens_compared > 100
    assert fp16.disagreement < 0.03
    assert fp16.not_compared is None
    assert (bf16.tokens_compared, bf16.tokens_differing) == (0, 0)
    assert bf16.not_compared is not None
    shown = CliRunner().invoke(main, ["inspect", str(bundle)]).stdout
    assert f"Precision fp16: {fp16.tokens_differing} of {fp16.tokens_compared} tokens" in shown
    assert f"Precision bf16: not compared with fp32, for {bf16.not_compared}" in shown


def test_fp16_writes_what_fp32_writes(bundle: Path, demo_audio: list[tuple[Path, str, str]]) -> None:
    """Alone, in a batch, with continuous batching, and with adapters that were loaded, not exported."""
    clips = [path for path, _, _ in demo_audio[:4]]
    with Transcriber.load(bundle, precision="fp32") as transcriber:
        exact = [transcriber.transcribe(clip) for clip in clips]
    with Transcriber.load(bundle, precision="fp16") as transcriber:
        together = transcriber.transcribe_batch(clips)
        submitted = [future.result() for future in [transcriber.submit(clip) for clip in clips]]
        reloaded = transcriber.transcribe_batch(clips, adapters=("music", "weather", "sports")[::-1])
    for found in (together, submitted, reloaded):
        assert [result.text for result in found] == [result.text for result in exact]
        for result, wanted in zip(found, exact, strict=True):
            assert max(h.score for h in result.hypotheses) == pytest.approx(
                max(h.score for h in wanted.hypotheses), abs=0.02
            )


def test_a_variant_has_half_the_size(bundle: Path) -> None:
    for precision in HALF_PRECISIONS:
        for file in (ENCODER_FILE, DECODER_FILE):
            halves, exact = ((bundle / folder / f"{file}.data").stat().st_size for folder in (precision, ""))
            assert halves < 0.52 * exact


def test_bf16_is_refused_on_a_cpu(bundle: Path) -> None:
    """Should this load one day, bf16 can be compared here, see `variants.NEEDS_A_GPU`."""
    with pytest.raises(BackendError, match="bf16 needs a GPU"):
        Transcriber.load(bundle, precision="bf16")


def test_the_gate_says_which_engine_it_needs(bundle: Path) -> None:
    """bfloat16 stands for whatever an engine lacks."""
    with pytest.raises(ExportError, match=r"cannot run .*bf16/decoder\.onnx.*need onnxruntime 1\.25"):
        GrowingDecoder(bundle / "bf16", read_manifest(bundle).dimensions)


def test_adapters_beyond_the_range_are_refused(demo_adapters: dict[str, Path], bundle: Path) -> None:
    dims = read_manifest(bundle).dimensions
    adapter = read_adapter(demo_adapters["music"], "music", dims)
    loud = {key: tensor * 1e6 if key == "lora_sv_b1" else tensor for key, tensor in adapter.weights.items()}
    stack = stack_adapters([dataclasses.replace(adapter, weights=loud)], dims)
    with pytest.raises(AdapterError, match=r"'music': lora_sv_b1 has values up to .*range of float16"):
        rounded_tensors(stack, np.dtype(np.float16))
    kept = rounded_tensors(stack, np.dtype(np.float32))
    assert all(kept[key] is tensor for key, tensor in stack.tensors.items())
