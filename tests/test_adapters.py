"""Adapters: PEFT itself is the oracle for what is read, and everything that is not understood must be refused."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from das_asr.runtime.adapters import (
    Adapter,
    Stack,
    check_names,
    load_adapter,
    save_adapter,
    select_rows,
    stack_adapters,
)
from das_asr.runtime.contract import TARGETS, lora_specs
from das_asr.runtime.errors import AdapterError, BundleError, OptionError
from das_asr.runtime.manifest import Dimensions
from das_asr.runtime.peft_checkpoint import SUPPORTED_MODULES, AdapterWarning, read_adapter
from tests.checkpoints import DECODER_TARGETS, edit_config, make_adapter, make_base, quiet

Array = npt.NDArray[np.float32]
Edit = Callable[[dict[str, Array]], None]

DIMS = Dimensions(
    mels=80,
    audio_positions=250,
    text_positions=64,
    vocabulary=558,
    d_model=32,
    encoder_layers=2,
    encoder_heads=4,
    encoder_ffn=128,
    decoder_layers=2,
    decoder_heads=4,
    decoder_ffn=128,
)
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model.model.decoder.layers"
PLAIN_MODEL = DECODER_TARGETS.removeprefix(r"model\.")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base", d_model=32, seconds=5)


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("plain") / "plain")


@pytest.fixture
def broken(plain: Path, tmp_path: Path) -> Path:
    """A copy of a good adapter, to be damaged."""
    return Path(shutil.copytree(plain, tmp_path / "broken"))


def edit_weights(directory: Path, edit: Edit, metadata: dict[str, str] | None = None) -> Path:
    tensors = load_file(directory / WEIGHTS)
    edit(tensors)
    save_file(tensors, directory / WEIGHTS, metadata=metadata)
    return directory


def product_of(adapter: Adapter, key: str) -> Array:
    """Delta of one module as PEFT lays it out, [out, in]."""
    a = adapter.weights[key]
    return np.asarray((a @ adapter.weights[key.replace("_a", "_b")]).T)


def oracle(base: Path, directory: Path, wrap: str) -> dict[str, Array]:
    """PEFT's own delta of each module, by the key of its A in `Adapter.weights`."""
    import transformers
    from peft import PeftModel

    short = {"self_attn.q": "sq", "self_attn.v": "sv", "encoder_attn.q": "cq", "encoder_attn.v": "cv"}
    with quiet():
        model = PeftModel.from_pretrained(getattr(transformers, wrap).from_pretrained(base), directory)
    deltas = {}
    for name, layer in model.named_modules():
        match = re.search(r"decoder\.layers\.(\d+)\.(\w+\.[qv])_proj$", name)
        if match and hasattr(layer, "get_delta_weight"):
            deltas[f"lora_{short[match[2]]}_a{match[1]}"] = layer.get_delta_weight("default").detach().numpy()
    return deltas


# --- Reading agrees with PEFT ---

ATTENTION = r"model\.decoder\.layers\.\d+\."
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank 1": {"rank": 1},
    "rank above the width": {"rank": 48},
    "float alpha": {"alpha": 2.75},
    "negative alpha": {"alpha": -3},
    "rslora": {"rslora": True},
    "rank pattern": {"rank_pattern": {"self_attn.q_proj": 2, r"decoder\.layers\.1\..*v_proj": 7}},
    "alpha pattern": {"alpha_pattern": {"v_proj": 1.5, r".*layers\.0\.encoder_attn\.q_proj": 32}},
    "anchored pattern": {"alpha_pattern": {"^model.decoder.layers.1.self_attn.q_proj": 32}},
    "suffix is not a module": {"alpha_pattern": {"attn.q_proj": 32, "proj": 16}},
    "first pattern wins": {"rank_pattern": {r".*layers\.0\.self_attn\.q_proj": 6, "q_proj": 2}},
    "both patterns, rslora": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"self_attn.*": 5}, "rslora": True},
    "bf16": {"dtype": "bfloat16"},
    "fp16": {"dtype": "float16"},
    "q only": {"targets": ATTENTION + r"(self_attn|encoder_attn)\.q_proj"},
    "v only": {"targets": ATTENTION + r"(self_attn|encoder_attn)\.v_proj"},
    "self only": {"targets": ATTENTION + r"self_attn\.(q_proj|v_proj)"},
    "cross only": {"targets": ATTENTION + r"encoder_attn\.(q_proj|v_proj)"},
    "one layer": {"targets": DECODER_TARGETS.replace(r"\d+", "1")},
    "one module": {"targets": r"model\.decoder\.layers\.0\.encoder_attn\.v_proj"},
    "list and exclusion": {"targets": ["q_proj", "v_proj"], "exclude_modules": r".*\.encoder\..*"},
    "some layers": {
        "targets": ["q_proj"],
        "exclude_modules": r".*\.encoder\..*",
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "gaussian": {"init": "gaussian", "lora_dropout": 0.1},
    "orthogonal": {"init": "orthogonal"},
    "mica": {"init": "mica"},
    "no init": {"init": False},
    "pissa": {"init": "pissa"},
    "pissa, rslora": {"init": "pissa", "rslora": True, "alpha": 64},
    "pissa, patterns": {"init": "pissa", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "fast pissa": {"init": "pissa_niter_4"},
    "olora": {"init": "olora"},
    "seq2seq": {"task_type": "SEQ_2_SEQ_LM"},
    "feature extraction": {"task_type": "FEATURE_EXTRACTION"},
    "WhisperModel": {"wrap": "WhisperModel", "targets": PLAIN_MODEL},
    "WhisperModel, patterns": {
        "wrap": "WhisperModel",
        "targets": PLAIN_MODEL,
        "rank_pattern": {"^decoder.layers.0.self_attn.q_proj": 3, "model.decoder.layers.1.self_attn.q_proj": 5},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_peft(case: str, base: Path, tmp_path: Path) -> None:
    arguments = CASES[case]
    directory = make_adapter(base, tmp_path / "adapter", **arguments)
    adapter = read_adapter(directory, "x", DIMS, base_id=str(base))
    expected = oracle(base, directory, arguments.get("wrap", "WhisperForConditionalGeneration"))
    assert {key for key in adapter.weights if "_a" in key} == expected.keys() != set()
    assert len(adapter.weights) == 2 * len(expected)
    for key, delta in expected.items():
        assert np.abs(delta).max() > 1e-2
        np.testing.assert_allclose(product_of(adapter, key), delta, atol=1e-6, rtol=1e-6)
    for tensor in adapter.weights.values():
        assert tensor.dtype == np.float32
        assert tensor.flags.c_contiguous


def test_logits_of_a_base_with_our_products_added_are_those_of_peft(base: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import WhisperForConditionalGeneration

    directory = make_adapter(base, tmp_path / "a", init="pissa", rslora=True)
    adapter = read_adapter(directory, "a", DIMS)
    paths = ("self_attn.q_proj", "self_attn.v_proj", "encoder_attn.q_proj", "encoder_attn.v_proj")
    features = torch.randn(1, 80, 500, generator=torch.Generator().manual_seed(0))
    inputs = {"input_features": features, "decoder_input_ids": torch.arange(9)[None]}
    with quiet(), torch.no_grad():
        merged = WhisperForConditionalGeneration.from_pretrained(base)
        before = merged(**inputs).logits
        for layer in range(2):
            for target, path in zip(TARGETS, paths, strict=True):
                weight = merged.get_submodule(f"model.decoder.layers.{layer}.{path}").weight
                weight += torch.from_numpy(product_of(adapter, f"lora_{target}_a{layer}"))
        peft = PeftModel.from_pretrained(WhisperForConditionalGeneration.from_pretrained(base), directory)
        expected, logits = peft(**inputs).logits, merged(**inputs).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert (before - expected).abs().max() > 0.1


def test_what_an_adapter_says_about_itself(base: Path, tmp_path: Path) -> None:
    targets = CASES["self only"]["targets"]
    directory = make_adapter(
        base,
        tmp_path / "a",
        rank=4,
        alpha=8,
        rslora=True,
        rank_pattern={"q_proj": 6},
        targets=targets,
    )
    adapter = read_adapter(directory, "music", DIMS)
    assert (adapter.name, adapter.rank, adapter.scale) == ("music", 6, 4.0)
    assert adapter.target_modules == ("self_attn.q_proj", "self_attn.v_proj")
    assert adapter.base_model == str(base)
    assert adapter.lineage == {}
    assert adapter.weights["lora_sq_a0"].shape == (32, 6)
    assert adapter.weights["lora_sv_b1"].shape == (4, 32)


def test_reading_needs_neither_torch_nor_peft(plain: Path) -> None:
    code = (
        "import sys; from das_asr.runtime.peft_checkpoint import read_adapter\n"
        "from das_asr.runtime.manifest import Dimensions\n"
        f"read_adapter({str(plain)!r}, 'x', Dimensions(**{dataclasses.asdict(DIMS)!r}))\n"
        "assert not {'torch', 'peft', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- Refusals: what the adapter adapts ---


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["q_proj", "v_proj"], "model.encoder.layers.0.self_attn.q_proj"),
        (r".*encoder\.layers\.1\.fc1", "model.encoder.layers.1.fc1"),
        (r".*encoder\.conv1", "model.encoder.conv1"),
        (ATTENTION + r"self_attn\.k_proj", "model.decoder.layers.0.self_attn.k_proj"),
        (ATTENTION + r"encoder_attn\.out_proj", "model.decoder.layers.0.encoder_attn.out_proj"),
        (ATTENTION + "fc1", "model.decoder.layers.0.fc1"),
        (ATTENTION + "(fc2|self_attn.q_proj)", "model.decoder.layers.0.fc2"),
        ("proj_out", "proj_out"),
        (r"model\.decoder\.embed_tokens", "model.decoder.embed_tokens"),
    ],
)
def test_other_modules_are_refused_by_name(targets: str | list[str], named: str, base: Path, tmp_path: Path) -> None:
    directory = make_adapter(base, tmp_path / "a", targets=targets)
    with pytest.raises(AdapterError, match=rf"(?s){re.escape(named)}\b.*{re.escape(SUPPORTED_MODULES)}"):
        read_adapter(directory, "a", DIMS)


def test_the_regex_we_recommend_makes_a_readable_adapter(base: Path, tmp_path: Path) -> None:
    adapter = read_adapter(make_adapter(base, tmp_path / "a", targets=SUPPORTED_MODULES), "a", DIMS)
    assert len(adapter.weights) == 2 * len(TARGETS) * DIMS.decoder_layers


# --- Refusals: configuration ---


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"modules_to_save": ["proj_out"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_dora": True}, "use_dora"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"init": "pissa", "convert": False}, "path_initial_model_for_weight_conversion"),
        ({"init": "pissa_niter_2", "convert": False}, "path_initial_model_for_weight_conversion"),
        ({"init": "olora", "convert": False}, "path_initial_model_for_weight_conversion"),
    ],
)
def test_peft_features_that_are_not_supported(
    arguments: dict[str, Any], named: str, base: Path, tmp_path: Path
) -> None:
    directory = make_adapter(base, tmp_path / "a", **arguments)
    with pytest.raises(AdapterError, match=named):
        read_adapter(directory, "a", DIMS)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"peft_type": "LOHA"}, "'LOHA'"),
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"peft_type": ...}, "None"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"target_parameters": ["fc1.weight"]}, "target_parameters"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"kasa_config": {"beta": 0.1}}, "kasa_config"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config"),
        ({"megatron_config": {"x": 1}}, "megatron_config"),
        ({"monteclora_config": {"num_samples": 2}}, "monteclora_config"),
        ({"velora_config": {"num_groups": 2}}, "velora_config"),
        ({"a_field_of_tomorrow": "x"}, "a_field_of_tomorrow='x'"),
        ({"a_field_of_tomorrow": 0.5}, "a_field_of_tomorrow=0.5"),
        ({"init_lora_weights": "corda"}, "corda.*path_initial"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga.*path_initial"),
        ({"init_lora_weights": "PiSSA"}, "path_initial"),
        ({"init_lora_weights": "loftq"}, "loftq.*init_lora_weights=True"),
        ({"init_lora_weights": "init_of_tomorrow"}, "init_of_tomorrow"),
        ({"init_lora_weights": 3}, "init_lora_weights=3"),
        ({"r": 5}, "rank 4.*says 5"),
        ({"r": "4"}, "rank '4'"),
        ({"r": 0}, "rank 0"),
        ({"r": True}, "rank True"),
        ({"r": ...}, "rank None"),
        ({"lora_alpha": ...}, "lora_alpha None"),
        ({"lora_alpha": float("inf")}, "lora_alpha inf"),
        ({"lora_alpha": 1e31}, "lora_alpha 1e.31.*within"),
        ({"lora_alpha": 10**400}, "lora_alpha 1000"),
        ({"lora_alpha": 0}, "changes nothing"),
        ({"rank_pattern": {"q_proj": 8}}, "rank 4.*says 8"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": None}}, "lora_alpha None"),
        ({"alpha_pattern": {"q_(proj": 8}}, "not a valid pattern"),
    ],
)
def test_configurations_that_are_refused(changes: dict[str, Any], named: str, broken: Path) -> None:
    edit_config(broken, **changes)
    with pytest.raises(AdapterError, match=f"(?s){named}"):
        read_adapter(broken, "a", DIMS)


def test_fields_that_say_nothing_about_inference_may_have_any_value(broken: Path, plain: Path) -> None:
    edit_config(
        broken,
        lora_dropout=0.5,
        task_type="SEQ_2_SEQ_LM",
        inference_mode=False,
        peft_version="99.0",
        eva_config={"rho": 2.0},
        corda_config={"corda_method": "kpm"},
        qalora_group_size=32,
        megatron_core="x",
        revision="main",
        a_field_of_tomorrow=None,
        another=False,
        a_third=[],
    )
    weights = read_adapter(broken, "a", DIMS).weights
    for key, tensor in read_adapter(plain, "a", DIMS).weights.items():
        np.testing.assert_array_equal(weights[key], tensor)


def test_every_field_of_the_installed_peft_is_classified_once() -> None:
    from peft import LoraConfig

    from das_asr.runtime import lora_config

    tables = [lora_config._INTERPRETED, lora_config._IRRELEVANT, frozenset(lora_config._REFUSED)]
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields - frozenset().union(*tables) == set()
    assert sum(map(len, tables)) == len(frozenset().union(*tables))


# --- Refusals: tensors ---


def drop(name: str) -> Edit:
    def edit(tensors: dict[str, Array]) -> None:
        del tensors[f"{PREFIX}.{name}"]

    return edit


def put(name: str, value: Array, prefix: str = f"{PREFIX}.") -> Edit:
    def edit(tensors: dict[str, Array]) -> None:
        tensors[f"{prefix}{name}"] = value

    return edit


Q_A, Q_B = "0.self_attn.q_proj.lora_A.weight", "0.self_attn.q_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (drop(Q_A), "q_proj has no lora_A"),
        (drop(Q_B), "q_proj has no lora_B"),
        (put("0.self_attn.q_proj.lora_magnitude_vector", np.ones(32, np.float32)), "lora_magnitude_vector"),
        (put("0.self_attn.q_proj.lora_B.bias", np.ones(32, np.float32)), "lora_B.bias"),
        (put("0.self_attn.q_proj.weight", np.ones((32, 32), np.float32)), "q_proj.weight"),
        (put("surprise", np.ones(1, np.float32), ""), "tensor surprise"),
        (put(Q_A, np.ones((4, 32), np.float32), "base_model.model.decoder.layers."), "are the same tensor"),
        (put(Q_A, np.ones((3, 32), np.float32)), r"\[3, 32\].*\[32, 4\]"),
        (put(Q_A, np.ones((4, 32, 1), np.float32)), "disagree in rank"),
        (put(Q_A, np.ones((4, 48), np.float32)), "48.*d_model 32"),
        (put(Q_B, np.ones((48, 4), np.float32)), "48.*d_model 32"),
        (put(Q_A, np.full((4, 32), np.nan, np.float32)), f"{re.escape(Q_A)}.*NaN"),
        (put(Q_B, np.full((32, 4), np.inf, np.float32)), f"{re.escape(Q_B)}.*NaN or infinity"),
        (put(Q_B, np.full((32, 4), 3e38, np.float32)), "overflows float32 with its scale 2.0"),
        (put(Q_A, np.ones((4, 32), np.int8)), f"{re.escape(Q_A)} has dtype I8"),
        (put("7.self_attn.q_proj.lora_A.weight", np.ones((4, 32), np.float32)), "q_proj has no lora_B"),
        (dict.clear, "no tensors"),
    ],
)
def test_tensors_that_are_refused(edit: Edit, named: str, broken: Path) -> None:
    edit_weights(broken, edit)
    with pytest.raises(AdapterError, match=named):
        read_adapter(broken, "a", DIMS)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"d_model": 64}, "width 32 to 32.*d_model 64"), ({"decoder_layers": 1}, "decoder layer 1.* 1 decoder layers")],
)
def test_an_adapter_of_another_base_is_refused_with_both_numbers(
    changes: dict[str, int], named: str, plain: Path
) -> None:
    with pytest.raises(AdapterError, match=named):
        read_adapter(plain, "a", dataclasses.replace(DIMS, **changes))


@pytest.mark.parametrize("arguments", [{"scale_b": 0.0}, {"scale_b": 0.0, "init": "pissa"}])
def test_an_adapter_that_changes_nothing_is_refused(arguments: dict[str, Any], base: Path, tmp_path: Path) -> None:
    directory = make_adapter(base, tmp_path / "a", **arguments)
    if "init" in arguments:  # what an untrained PiSSA leaves: [B, -B] [A; A]
        edit_weights(directory, lambda tensors: tensors.update({n: mirror(n, t) for n, t in tensors.items()}))
    with pytest.raises(AdapterError, match="changes nothing"):
        read_adapter(directory, "a", DIMS)


def mirror(name: str, tensor: Array) -> Array:
    values = np.random.default_rng(0).normal(size=tensor.shape).astype(np.float32)
    if "lora_A" in name:
        return np.concatenate([values[:4], values[:4]])
    return np.concatenate([values[:, :4], -values[:, :4]], axis=1)


def test_a_pissa_that_was_barely_trained_is_accepted(base: Path, tmp_path: Path) -> None:
    directory = make_adapter(base, tmp_path / "a", init="pissa")
    edit_weights(directory, lambda tensors: tensors.update({n: mirror(n, t) for n, t in tensors.items()}))
    edit_weights(
        directory, lambda tensors: tensors[f"{PREFIX}.{Q_B}"].__imul__(np.linspace(1, 1.0001, 8, dtype=np.float32))
    )
    assert read_adapter(directory, "a", DIMS).rank == 8


def test_one_module_that_changes_something_is_enough(broken: Path) -> None:
    edit_weights(
        broken, lambda t: t.update({n: x * 0 for n, x in t.items() if "lora_B" in n and f"{PREFIX}.{Q_B}" != n})
    )
    assert read_adapter(broken, "a", DIMS).rank == 4


# --- Refusals: files ---


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda d: (d / "adapter_config.json").unlink(), "no adapter_config.json"),
        (lambda d: (d / "adapter_config.json").write_text("{"), "adapter_config.json cannot be read"),
        (lambda d: (d / "adapter_config.json").write_bytes(b"\xff\xfe"), "adapter_config.json cannot be read"),
        (lambda d: (d / "adapter_config.json").write_text("[]"), "holds a list"),
        (lambda d: (d / WEIGHTS).unlink(), f"no {WEIGHTS}"),
        (lambda d: (d / WEIGHTS).rename(d / "adapter_model.bin"), "adapter_model.bin.*safe_serialization=True"),
        (lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-1]), "cannot be read as safetensors"),
        (lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:20]), "cannot be read as safetensors"),
        (lambda d: (d / WEIGHTS).write_bytes(b""), "cannot be read as safetensors"),
        (lambda d: (d / WEIGHTS).write_bytes(b"PK\x03\x04 a pickle"), "cannot be read as safetensors"),
        (lambda d: (d / "das_lineage.json").write_text("nonsense"), "das_lineage.json"),
    ],
)
def test_files_that_are_missing_or_damaged(damage: Callable[[Path], object], named: str, broken: Path) -> None:
    damage(broken)
    with pytest.raises(AdapterError, match=named):
        read_adapter(broken, "a", DIMS)


# --- Which base it belongs to ---


def test_a_recorded_hash_of_another_base_is_an_error(broken: Path) -> None:
    edit_weights(broken, lambda _: None, {"das_base_sha256": "aa"})
    assert read_adapter(broken, "a", DIMS, base_sha256="AA").lineage == {"base_sha256": "aa"}
    with pytest.raises(AdapterError, match=r"sha256 aa.* has bb"):
        read_adapter(broken, "a", DIMS, base_sha256="bb")


def test_the_lineage_file_is_carried_and_checked(broken: Path) -> None:
    lineage = {"base_sha256": "aa", "seed": 7, "corpus": "radio"}
    (broken / "das_lineage.json").write_text(json.dumps(lineage), encoding="utf-8")
    with warnings.catch_warnings():  # the hash proves the base, so another name is no reason to warn
        warnings.simplefilter("error")
        adapter = read_adapter(broken, "a", DIMS, base_sha256="aa", base_id="somewhere/else")
    assert adapter.lineage == {"base_sha256": "aa", "seed": "7", "corpus": "radio"}
    with pytest.raises(AdapterError, match="sha256 aa"):
        read_adapter(broken, "a", DIMS, base_sha256="bb")
    edit_weights(broken, lambda _: None, {"das_base_sha256": "cc"})
    with pytest.raises(AdapterError, match=r"different bases \(aa, cc\)"):
        read_adapter(broken, "a", DIMS)


@pytest.mark.parametrize(
    ("recorded", "base_id", "warns"),
    [
        ("openai/whisper-base", "openai/whisper-base", False),
        ("openai/whisper-base", "/models/Whisper-Base/", False),
        (r"C:\models\whisper-base", "whisper-base", False),
        ("/c/hub/models--openai--whisper-base/snapshots/0a1b", "openai/whisper-base", False),
        (None, "openai/whisper-base", False),
        ("openai/whisper-base", None, False),
        ("openai/whisper-base", "openai/whisper-base.en", True),
        ("openai/whisper-small", "/models/whisper-base", True),
    ],
)
def test_another_base_name_only_warns(recorded: str | None, base_id: str | None, warns: bool, broken: Path) -> None:
    edit_config(broken, base_model_name_or_path=recorded)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_adapter(broken, "a", DIMS, base_id=base_id)
    assert [item.category for item in caught] == [AdapterWarning] * warns
    assert all(item.filename == __file__ for item in caught)


# --- Names ---


@pytest.mark.parametrize(
    "names", [[], ["a"], ["music", "Weather-2", "v1.0_b"], ["x" * 64], [f"a{i}" for i in range(64)]]
)
def test_good_names(names: list[str]) -> None:
    check_names(names)


@pytest.mark.parametrize(
    ("names", "named"),
    [
        ([""], "''"),
        (["base"], "'base'"),
        (["Base"], "'Base'"),
        (["../x"], "'../x'"),
        (["a/b"], "'a/b'"),
        ([".hidden"], "'.hidden'"),
        (["dot."], "'dot.'"),
        (["a b"], "'a b'"),
        (["a\n"], "a"),
        (["münchen"], "münchen"),
        (["x" * 65], "64"),
        (["a", "b", "a"], "Two adapters are named 'a'"),
        (["Music", "music"], "case is ignored"),
        ([f"a{i}" for i in range(65)], "65 adapters were given, at most 64"),
    ],
)
def test_bad_names(names: list[str], named: str) -> None:
    with pytest.raises(OptionError, match=named):
        check_names(names)


# --- The bundle's own form ---


def test_saving_and_loading_gives_the_same_adapter_and_the_same_bytes(base: Path, tmp_path: Path) -> None:
    directory = make_adapter(base, tmp_path / "a", rank_pattern={"q_proj": 7}, dtype="bfloat16")
    (directory / "das_lineage.json").write_text('{"a": "1", "b": "2"}', encoding="utf-8")
    adapter = read_adapter(directory, "a", DIMS)
    save_adapter(adapter, tmp_path / "1.safetensors")
    loaded = load_adapter(tmp_path / "1.safetensors", "a", DIMS)
    assert dataclasses.replace(loaded, weights={}) == dataclasses.replace(adapter, weights={})
    assert loaded.weights.keys() == adapter.weights.keys()
    for key, tensor in adapter.weights.items():
        np.testing.assert_array_equal(loaded.weights[key], tensor)
    save_adapter(loaded, tmp_path / "2.safetensors")
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


def about(**changes: Any) -> dict[str, str]:
    fields = {"rank": 2, "scale": 1.0, "target_modules": ["self_attn.q_proj"], "base_model": None, "lineage": {}}
    fields |= changes
    return {"das_adapter": json.dumps({key: value for key, value in fields.items() if value is not ...})}


GOOD = {"lora_sq_a0": np.ones((32, 2), np.float32), "lora_sq_b0": np.ones((2, 32), np.float32)}


@pytest.mark.parametrize(
    ("weights", "metadata", "named"),
    [
        (GOOD | {"lora_sq_b0": np.ones((3, 32), np.float32)}, about(), "no counterpart"),
        ({"lora_sq_a0": GOOD["lora_sq_a0"]}, about(), "no counterpart"),
        ({key.replace("0", "2"): tensor for key, tensor in GOOD.items()}, about(), "lora_sq_a2.*2 decoder layers"),
        (GOOD | {"extra": np.ones(1, np.float32)}, about(), "extra"),
        ({key: tensor.T.copy() for key, tensor in GOOD.items()}, about(), r"shape \[2, 32\].*d_model 32"),
        ({key: tensor * np.nan for key, tensor in GOOD.items()}, about(), "NaN"),
        ({}, about(), "no tensors"),
        (GOOD, {}, "das_adapter"),
        (GOOD, {"das_adapter": "{"}, "description"),
        (GOOD, {"das_adapter": "[]"}, "description"),
        (GOOD, about(surprise=1), "surprise"),
        (GOOD, about(scale=...), "scale"),
        (GOOD, about(scale="1"), "does not fit"),
        (GOOD, about(rank=3), "does not fit"),
        (GOOD, about(target_modules=["self_attn.v_proj"]), "does not fit"),
        (GOOD, about(base_model=3), "does not fit"),
        (GOOD, about(lineage={"a": 1}), "does not fit"),
    ],
)
def test_a_bundled_adapter_is_read_strictly(
    weights: dict[str, Array], metadata: dict[str, str], named: str, tmp_path: Path
) -> None:
    save_file(GOOD, tmp_path / "good.safetensors", metadata=about())
    assert load_adapter(tmp_path / "good.safetensors", "a", DIMS).rank == 2
    save_file(weights, tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(BundleError, match=named):
        load_adapter(tmp_path / "a.safetensors", "a", DIMS)


def test_a_bundled_adapter_that_is_missing_or_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(BundleError, match="cannot be read"):
        load_adapter(path, "a", DIMS)
    save_file(GOOD, path, metadata=about())
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(BundleError, match="cannot be read"):
        load_adapter(path, "a", DIMS)


# --- The stack ---

SMALL = dataclasses.replace(DIMS, d_model=8, decoder_heads=2)
KEYS = [f"{target}_x{layer}" for layer in range(SMALL.decoder_layers) for target in TARGETS]


def small_adapter(name: str, ranks: dict[str, int], seed: int) -> Adapter:
    """An adapter of random weights with the given rank for each key such as `sq_x0`."""
    random = np.random.default_rng(seed)
    weights = {}
    for key, rank in ranks.items():
        weights[f"lora_{key.replace('x', 'a')}"] = random.normal(size=(8, rank)).astype(np.float32)
        weights[f"lora_{key.replace('x', 'b')}"] = random.normal(size=(rank, 8)).astype(np.float32)
    return Adapter(name, max(ranks.values()), 1.0, (), None, weights)


ranks = st.dictionaries(st.sampled_from(KEYS), st.integers(1, 5), min_size=1)
stacks = st.lists(ranks, max_size=4).map(
    lambda chosen: [small_adapter(f"a{index}", modules, index) for index, modules in enumerate(chosen)]
)


def row_product(stack: Stack, row: int, key: str) -> Array:
    """A B of one row, with the heads of cross-attention values put together again."""
    a = stack.tensors[f"lora_{key.replace('x', 'a')}"][0, row]
    b = stack.tensors[f"lora_{key.replace('x', 'b')}"][0, row]
    if key.startswith("cv"):
        b = np.concatenate(list(b), axis=1)  # [H, r, d] -> [r, D]
    return np.asarray(a @ b)


def check_stack(stack: Stack, adapters: list[Adapter]) -> None:
    sizes: dict[int | str, int] = {"groups": 1, "rows": len(adapters) + 1, "rank": stack.rank}
    assert stack.rows == len(adapters) + 1
    assert list(stack.tensors) == [spec.name for spec in lora_specs(SMALL)]
    for spec in lora_specs(SMALL):
        tensor = stack.tensors[spec.name]
        assert tensor.shape == tuple(sizes.get(size, size) for size in spec.shape)
        assert tensor.dtype == np.float32
        assert tensor.flags.c_contiguous
        assert not tensor[:, 0].any()
    for row, adapter in enumerate(adapters, start=1):
        for key in KEYS:
            a = adapter.weights.get(f"lora_{key.replace('x', 'a')}", np.zeros((8, 1), np.float32))
            b = adapter.weights.get(f"lora_{key.replace('x', 'b')}", np.zeros((1, 8), np.float32))
            np.testing.assert_allclose(row_product(stack, row, key), a @ b, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(stacks)
def test_each_row_of_a_stack_is_its_adapter_whatever_the_padding(adapters: list[Adapter]) -> None:
    stack = stack_adapters(adapters, SMALL)
    assert stack.names == tuple(adapter.name for adapter in adapters)
    assert stack.rank == max((adapter.rank for adapter in adapters), default=1)
    check_stack(stack, adapters)


@settings(max_examples=40, deadline=None)
@given(stacks, st.data())
def test_selecting_rows_keeps_their_products_in_the_given_order(adapters: list[Adapter], data: st.DataObject) -> None:
    stack = stack_adapters(adapters, SMALL)
    chosen = data.draw(st.permutations(adapters).flatmap(lambda order: st.sampled_from([order[:n] for n in range(5)])))
    selected = select_rows(stack, [adapter.name for adapter in chosen])
    assert selected.names == tuple(adapter.name for adapter in chosen)
    assert selected.rank == stack.rank
    check_stack(selected, list(chosen))
    for tensor in selected.tensors.values():
        tensor[:] = 9
    check_stack(stack, adapters)


def test_selecting_what_a_stack_does_not_have() -> None:
    stack = stack_adapters([small_adapter("a", {"sq_x0": 2}, 0)], SMALL)
    with pytest.raises(OptionError, match=r"no adapter 'b'; the bundle has: a\."):
        select_rows(stack, ["b"])
    with pytest.raises(OptionError, match="Two adapters"):
        select_rows(stack, ["a", "a"])
    with pytest.raises(OptionError, match="the bundle has: none"):
        select_rows(stack_adapters([], SMALL), ["a"])


def test_a_stack_refuses_repeated_names_and_adapters_of_another_base() -> None:
    adapter = small_adapter("a", {"cv_x1": 3}, 0)
    with pytest.raises(OptionError, match="Two adapters"):
        stack_adapters([adapter, adapter], SMALL)
    with pytest.raises(AdapterError, match=r"'a'.*d_model 32"):
        stack_adapters([adapter], DIMS)
    with pytest.raises(AdapterError, match=r"'a'.*1 decoder layers"):
        stack_adapters([adapter], dataclasses.replace(SMALL, decoder_layers=1))


def test_values_of_cross_attention_are_split_by_head() -> None:
    adapter = small_adapter("a", {"cv_x0": 3}, 0)
    split = stack_adapters([adapter], SMALL).tensors["lora_cv_b0"]
    assert split.shape == (1, 2, 2, 3, 4)
    for head in range(2):
        np.testing.assert_array_equal(split[0, 1, head], adapter.weights["lora_cv_b0"][:, 4 * head : 4 * head + 4])
