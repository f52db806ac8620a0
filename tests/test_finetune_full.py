"""Full fine-tuning: what moves and what stays, and that the result is a base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from das_asr.export.checkpoint import load_checkpoint
from das_asr.runtime.errors import OptionError
from das_asr.runtime.peft_checkpoint import LINEAGE_NAME
from das_asr.training.finetune import FullOptions, train_full
from das_asr.training.finetune.base import load_base
from tests.checkpoints import make_base
from tests.spoken import lora_options, make_folder

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    return make_base(directory, d_model=32, seconds=2, text_positions=48, dtype="float16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("spoken") / "data", range(12))


def full_options(base: Path, folder: Path, output: Path, **changes: Any) -> FullOptions:
    like = lora_options(base, folder, output, learning_rate=1e-3, **changes)
    own = {name: changes[name] for name in FullOptions.__dataclass_fields__ if name in changes}
    return FullOptions(base=str(base), output=output, data=like.data, train=like.train, **own)


def changed_weights(before: Path, after: Path) -> set[str]:
    """Names of the weights that differ."""
    old, new = (load_base(directory).load_model().state_dict() for directory in (before, after))
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


@pytest.mark.parametrize("components", ["decoder", "decoder-last-1", "encoder-decoder"])
def test_only_the_chosen_components_move(base: Path, folder: Path, tmp_path: Path, components: str) -> None:
    result = train_full(full_options(base, folder, tmp_path / "out", components=components))
    changed = changed_weights(base, result.output)
    layers = {name for name in changed if name.startswith("model.decoder.layers.")}
    encoder = {name for name in changed if name.startswith("model.encoder.")}
    assert {name.split(".")[3] for name in layers} == ({"1"} if components == "decoder-last-1" else {"0", "1"})
    assert bool(encoder) == (components == "encoder-decoder")
    assert "model.encoder.embed_positions.weight" not in encoder
    if components == "decoder-last-1":
        assert changed == layers
    else:
        assert "model.decoder.embed_tokens.weight" in changed


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_result_is_a_base_and_the_trained_model(base: Path, folder: Path, tmp_path: Path, dtype: str) -> None:
    result = train_full(full_options(base, folder, tmp_path / "out", save_dtype=dtype, epochs=1))
    checkpoint = load_checkpoint(result.output)
    assert {entry.dtype for file in checkpoint.tensors.values() for entry in file.entries.values()} == {
        {"float32": "F32", "float16": "F16"}[dtype]
    }
    assert checkpoint.suppress_tokens == load_checkpoint(base).suppress_tokens
    wanted = result.trained.model.state_dict()
    for name, weight in load_base(result.output).load_model().state_dict().items():
        assert torch.allclose(weight, wanted[name], atol=0.0 if dtype == "float32" else 2e-3), name
    assert (result.output / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    lineage = json.loads((result.output / LINEAGE_NAME).read_text())
    assert lineage["base_sha256"] == load_checkpoint(base).sha256 != checkpoint.sha256


def test_same_seed_same_weights(base: Path, folder: Path, tmp_path: Path) -> None:
    for name in "ab":
        train_full(full_options(base, folder, tmp_path / name, epochs=1, components="encoder-decoder"))
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"components": "encoder"}, "--components"),
        ({"components": "decoder-last-0"}, "--components"),
        ({"save_dtype": "int8"}, "--save-dtype"),
    ],
)
def test_full_options_that_mean_nothing(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        full_options(tmp_path, tmp_path, tmp_path / "x", **changes)


def test_more_layers_than_there_are(base: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"has 2 layers.*decoder-last-2"):
        train_full(full_options(base, folder, tmp_path / "x", components="decoder-last-3"))
