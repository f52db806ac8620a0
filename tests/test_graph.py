"""The graphs as written: they are what the contract says, readable, valid, and choose rows as the rules say."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto

from das_asr.export.builder import GraphBuilder, WeightFile
from das_asr.export.checkpoint import load_checkpoint
from das_asr.export.decoder import DECODER_OPSET
from das_asr.export.onnx import check_adapters_used, write_graphs
from das_asr.export.selection import Candidates, select
from das_asr.runtime.adapters import Adapter, Stack, stack_adapters
from das_asr.runtime.contract import (
    DECODER_FILE,
    DECODER_STATIC_FILE,
    ENCODER_FILE,
    RULE_CODES,
    TensorSpec,
    cache_names,
    cross_specs,
    decoder_inputs,
    decoder_outputs,
    encoder_inputs,
    encoder_outputs,
    static_decoder_inputs,
    static_decoder_outputs,
)
from das_asr.runtime.errors import ParityError
from das_asr.runtime.manifest import Dimensions
from das_asr.runtime.peft_checkpoint import read_adapter
from tests.checkpoints import make_adapter, make_base

TYPES = {TensorProto.FLOAT: "float32", TensorProto.INT64: "int64", TensorProto.BOOL: "bool"}
FILES = (ENCODER_FILE, DECODER_FILE, DECODER_STATIC_FILE)


@dataclass(frozen=True)
class Exported:
    """Graphs with two adapters, and what they were made from."""

    directory: Path
    dims: Dimensions
    stack: Stack
    adapters: list[Adapter]

    def load(self, name: str) -> onnx.ModelProto:
        return onnx.load(self.directory / name, load_external_data=False)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("graphs")
    base = make_base(folder / "base", d_model=32, seconds=2, text_positions=24)
    checkpoint = load_checkpoint(base)
    adapters = [
        read_adapter(make_adapter(base, folder / name, rank=rank, seed=rank), name, checkpoint.dimensions)
        for name, rank in (("music", 4), ("weather", 2))
    ]
    stack = stack_adapters(adapters, checkpoint.dimensions)
    output = folder / "graphs"
    output.mkdir()
    write_graphs(checkpoint, checkpoint.dimensions, stack, output, {"das.base": "base"})
    return Exported(output, checkpoint.dimensions, stack, adapters)


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


# --- The contract ---


def spec_of(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return TensorSpec(value.name, TYPES[tensor.elem_type], shape)  # type: ignore[arg-type]


def test_encoder_is_the_contract(exported: Exported) -> None:
    graph = exported.load(ENCODER_FILE).graph
    assert [spec_of(value) for value in graph.input] == encoder_inputs(exported.dims)
    assert [spec_of(value) for value in graph.output] == encoder_outputs(exported.dims)


def test_decoder_is_the_contract(exported: Exported) -> None:
    graph = exported.load(DECODER_FILE).graph
    assert [spec_of(value) for value in graph.input] == decoder_inputs(exported.dims)
    assert [spec_of(value) for value in graph.output] == decoder_outputs(exported.dims)


def test_static_decoder_is_the_contract(exported: Exported) -> None:
    graph = exported.load(DECODER_STATIC_FILE).graph
    assert [spec_of(value) for value in graph.input] == static_decoder_inputs(exported.dims)
    assert [spec_of(value) for value in graph.output] == static_decoder_outputs(exported.dims)


def test_the_encoder_gives_what_the_decoder_takes(exported: Exported) -> None:
    for taken in (decoder_inputs(exported.dims), static_decoder_inputs(exported.dims)):
        assert all(spec in taken for spec in encoder_outputs(exported.dims))


# --- The files ---


@pytest.mark.parametrize("name", FILES)
def test_files_are_valid_onnx(exported: Exported, name: str) -> None:
    onnx.checker.check_model(str(exported.directory / name), full_check=True)


@pytest.mark.parametrize("name", FILES)
def test_files_tell_what_they_are(exported: Exported, name: str) -> None:
    model = exported.load(name)
    assert model.producer_name == "das-asr"
    assert {prop.key: prop.value for prop in model.metadata_props} == {"das.base": "base"}
    assert model.graph.doc_string
    assert model.graph.name == Path(name).stem


@pytest.mark.parametrize("name", FILES)
def test_every_tensor_has_a_name_of_its_own_that_means_something(exported: Exported, name: str) -> None:
    graph = exported.load(name).graph
    made = [output for node in graph.node for output in node.output]
    given_ = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    assert len(set(made)) == len(made)
    assert not given_ & set(made)
    nodes = [node.name for node in graph.node]
    assert len(set(nodes)) == len(nodes)
    for tensor in (*made, *given_, *nodes):
        assert tensor
        assert not re.search(r"(^|/)(val|t|tmp|var|node|n)?_?\d+$", tensor), tensor


@pytest.mark.parametrize("name", FILES)
def test_weights_keep_their_names_and_lie_outside(exported: Exported, name: str) -> None:
    for tensor in exported.load(name).graph.initializer:
        assert tensor.name.startswith(("model.", "lora_", "const/")), tensor.name
        outside = tensor.data_location == TensorProto.EXTERNAL
        assert outside != tensor.name.startswith("const/"), tensor.name
        if outside:
            about = {entry.key: entry.value for entry in tensor.external_data}
            assert about["location"] == f"{DECODER_FILE if name == DECODER_STATIC_FILE else name}.data"
            assert int(about["offset"]) % 4096 == 0


def test_both_decoders_read_the_same_weights(exported: Exported) -> None:
    growing, static = (
        {item.name: item for item in exported.load(name).graph.initializer if item.external_data}
        for name in (DECODER_FILE, DECODER_STATIC_FILE)
    )
    assert growing == static
    assert not (exported.directory / f"{DECODER_STATIC_FILE}.data").exists()


def test_the_graph_file_itself_stays_small(exported: Exported) -> None:
    assert all((exported.directory / name).stat().st_size < 200_000 for name in FILES)


@pytest.mark.parametrize("name", FILES)
def test_every_node_is_needed(exported: Exported, name: str) -> None:
    graph = exported.load(name).graph
    needed = {value.name for value in graph.output}
    for node in reversed(graph.node):
        assert needed & set(node.output), f"{node.name} computes what nobody reads"
        needed |= set(node.input)


@pytest.mark.parametrize("name", FILES)
def test_shape_inference_finds_every_shape(exported: Exported, name: str) -> None:
    """With the declared output shapes taken away, inference finds the same ranks and fixed sizes."""
    model = exported.load(name)
    declared = {value.name: spec_of(value).shape for value in model.graph.output}
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    for value in onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph.output:
        found = spec_of(value).shape
        assert len(found) == len(declared[value.name])
        assert all(
            not isinstance(dim, int) or dim in (0, want) for dim, want in zip(found, declared[value.name], strict=True)
        )


# --- Adapters as inputs ---


def decoder_feeds(exported: Exported, rows: int, random: np.random.Generator) -> dict[str, NDArray[Any]]:
    """Random inputs of a prefill of two utterances, without the adapters."""
    audio = exported.dims.audio_positions
    sizes = {"batch": 2, "rows": rows, "new": 3, "past": 0, "audio": audio, "rank": exported.stack.rank}
    known = {spec.name for spec in cross_specs(exported.dims)} | {past for past, _ in cache_names(exported.dims)}
    feeds: dict[str, NDArray[Any]] = {
        spec.name: random.standard_normal([sizes.get(dim, dim) for dim in spec.shape]).astype(np.float32)  # type: ignore[arg-type]
        for spec in decoder_inputs(exported.dims)
        if spec.name in known
    }
    vocabulary = exported.dims.vocabulary
    return feeds | {
        "ids": random.integers(vocabulary, size=(2, rows, 3)),
        "position": np.zeros(2, np.int64),
        "first_valid": np.zeros(2, np.int64),
        "prompt_last": np.full(2, 2),
        "rule": np.ones(2, np.int64),
        "tau": np.full(2, 0.025, np.float32),
        "token_bias": np.zeros((2, vocabulary), np.float32),
        "first_token_bias": np.zeros((2, vocabulary), np.float32),
        "row_mask": np.ones((2, rows), np.bool_),
    }


def test_adapters_are_inputs_with_a_default(exported: Exported) -> None:
    names = set()
    for name in FILES:
        made = session(exported.directory / name)
        names |= {item.name for item in made.get_overridable_initializers()}
        assert not any(item.name.startswith("lora_") for item in made.get_inputs())
    assert names == exported.stack.tensors.keys()


def test_feeding_adapters_is_the_same_as_baking_them_in(exported: Exported) -> None:
    decoder = session(exported.directory / DECODER_FILE)
    feeds = decoder_feeds(exported, 3, np.random.default_rng(0))
    fed = {name: tensor for name, tensor in exported.stack.tensors.items() if not name.startswith("lora_cv_a")}
    np.testing.assert_array_equal(decoder.run(["logits"], feeds)[0], decoder.run(["logits"], feeds | fed)[0])


def test_other_adapters_can_be_fed(exported: Exported) -> None:
    """Row 2 of both adapters together is row 1 when the second adapter is fed alone."""
    decoder = session(exported.directory / DECODER_FILE)
    feeds = decoder_feeds(exported, 3, np.random.default_rng(0))
    both = decoder.run(["logits"], feeds)[0]
    rows = [0, 2]
    of_rows = {
        name: feeds[name][:, rows]
        for name in ("ids", "row_mask", *(n for n in feeds if n.startswith(("past_", "cross_u"))))
    }
    fed = {name: t[:, rows] for name, t in exported.stack.tensors.items() if not name.startswith("lora_cv_a")}
    alone = decoder.run(["logits"], feeds | of_rows | fed)[0]
    np.testing.assert_allclose(alone, both[:, rows], rtol=0, atol=1e-5)


def fed_to(specs: list[TensorSpec], stack: Stack, like: Stack) -> dict[str, NDArray[np.float32]]:
    """The tensors of a stack that a graph takes, padded with zeros to the rows and the rank of another."""
    made = {}
    for name in {spec.name for spec in specs} & stack.tensors.keys():
        made[name] = np.zeros_like(like.tensors[name])
        made[name][tuple(map(slice, stack.tensors[name].shape))] = stack.tensors[name]
    return made


@pytest.mark.parametrize("name", FILES)
def test_each_utterance_may_have_adapters_of_its_own(exported: Exported, name: str) -> None:
    """One run with a stack for each utterance gives each of them what a run with its stack for all gives it."""
    random, dims = np.random.default_rng(1), exported.dims
    if name == ENCODER_FILE:
        specs, output = encoder_inputs(dims), "cross_u0"
        feeds: dict[str, Any] = {"features": random.standard_normal((2, dims.mels, dims.frames)).astype(np.float32)}
    else:
        specs, output = decoder_inputs(dims), "logits"
        feeds = decoder_feeds(exported, 3, random)
        if name == DECODER_STATIC_FILE:
            feeds |= {"attended": np.array([3])} | {
                past: np.zeros((6, dims.decoder_heads, dims.text_positions, dims.head_size), np.float32)
                for past, _ in cache_names(dims)
            }
    music, weather = exported.adapters
    stacks = [stack_adapters(chosen, dims) for chosen in ([music, weather], [weather, music], [weather])]
    graph = session(exported.directory / name)
    fed = [fed_to(specs, stack, stacks[0]) for stack in stacks]
    shared = [graph.run([output], feeds | tensors)[0] for tensors in fed]
    for first, second in ((0, 1), (2, 0), (1, 2)):
        own = {key: np.concatenate([fed[first][key], fed[second][key]]) for key in fed[0]}
        found = graph.run([output], feeds | own)[0]
        np.testing.assert_array_equal(found[0], shared[first][0])
        np.testing.assert_array_equal(found[1], shared[second][1])
        assert not np.array_equal(found[0], shared[second][0])


def test_unread_adapter_tensors_are_refused(exported: Exported) -> None:
    check_adapters_used(exported.adapters, exported.directory)
    weights = {**exported.adapters[0].weights, "lora_sk_a0": np.zeros((32, 4), np.float32)}
    stranger = Adapter("music", 4, 1.0, (), None, weights)
    with pytest.raises(ParityError, match=r"'music'.*lora_sk_a0"):
        check_adapters_used([stranger], exported.directory)


# --- The selection rules ---


@pytest.fixture(scope="module")
def selector(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The selection alone: log-probabilities and candidates of each row in, row and next ids out."""
    folder = tmp_path_factory.mktemp("selection")
    weights = WeightFile(folder / "unused.data")
    g = GraphBuilder("selection", "", weights, DECODER_OPSET)
    rows = Candidates(
        token=g.input(TensorSpec("candidate", "int64", ("batch", "rows"))),
        logprob=g.input(TensorSpec("logprob", "float32", ("batch", "rows"))),
    )
    rule, tau = g.input(TensorSpec("rule", "int64", ("batch",))), g.input(TensorSpec("tau", "float32", ("batch",)))
    mask = g.input(TensorSpec("row_mask", "bool", ("batch", "rows")))
    row, following = select(g, rows, rule=rule, tau=tau, row_mask=mask)
    g.output(TensorSpec("row", "int64", ("batch",)), row)
    g.output(TensorSpec("next_ids", "int64", ("batch", "rows", 1)), following)
    weights.close()
    path = folder / "selection.onnx"
    onnx.save(g.model({}), path)
    return session(path)


def expected_row(rule: str, confidence: NDArray[np.float32], tau: np.float32, mask: NDArray[np.bool_]) -> int:
    """The rules as the paper and the table of `runtime.selection` put them, one utterance at a time."""
    rows = [row for row in range(len(confidence)) if mask[row]]
    best = max(rows, key=lambda row: (confidence[row], -row))
    worst = min(rows, key=lambda row: (confidence[row], row))
    above = confidence[best] - confidence[0] >= tau
    below = confidence[worst] - confidence[0] <= -tau
    choices = {
        "base": 0,
        "paper": best if above else worst if below else 0,
        "gain": best if above else 0,
        "deviation-max": best if above or below else 0,
        "hypothesis": 0,
    }
    return choices[rule]


# Few distinct values, so that ties between rows and with tau are common.
CONFIDENCES = st.sampled_from([0.125, 0.25, 0.5, 0.53, 0.55, 0.75, 1.0])
UTTERANCES = st.integers(1, 6).flatmap(
    lambda rows: st.lists(
        st.tuples(
            st.sampled_from(sorted(RULE_CODES)),
            st.lists(CONFIDENCES, min_size=rows, max_size=rows),
            st.sampled_from([0.0, 0.025, 0.25, 0.5, 1.0]),
            st.lists(st.booleans(), min_size=rows, max_size=rows),
        ),
        min_size=1,
        max_size=4,
    )
)


@settings(max_examples=200, deadline=None)
@given(UTTERANCES)
@example([("paper", [0.5, 0.25, 0.25], 0.25, [True] * 3)])  # exactly -tau, and a tie for the least confident
@example([("paper", [0.25, 0.5, 0.5], 0.25, [True] * 3)])  # exactly tau, and a tie for the most confident
@example([("paper", [0.5, 1.0, 0.125], 0.25, [True, False, True])])  # the most confident row is masked
@example([("gain", [0.5], 0.0, [True])])
def test_selection_is_the_rule(selector: Any, utterances: list[tuple[str, list[float], float, list[bool]]]) -> None:
    rules, confidences, taus, masks = (list(column) for column in zip(*utterances, strict=True))
    logprob = np.log(np.array(confidences, np.float32))
    mask = np.array(masks)
    mask[:, 0] = True  # the runtime never masks the base
    tau = np.array(taus, np.float32)
    candidate = np.arange(logprob.size).reshape(logprob.shape)
    feeds = {"candidate": candidate, "logprob": logprob, "tau": tau, "row_mask": mask}
    row, following = selector.run(
        ["row", "next_ids"], feeds | {"rule": np.array([RULE_CODES[rule] for rule in rules], np.int64)}
    )
    # The graph's own confidences, so that a rounding of exp(log c) is not taken for another decision.
    confidence = np.exp(logprob)
    for index, rule in enumerate(rules):
        assert row[index] == expected_row(rule, confidence[index], tau[index], mask[index])
        own = rule == "hypothesis"
        assert following[index, :, 0].tolist() == (
            candidate[index].tolist() if own else [candidate[index, row[index]]] * len(candidate[index])
        )
