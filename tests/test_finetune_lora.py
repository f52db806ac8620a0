"""Adapters: what is saved is what was trained, on the original base; the same seed, and a kill, change nothing."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from das_asr.export.checkpoint import load_checkpoint
from das_asr.runtime.adapters import stack_adapters
from das_asr.runtime.errors import AdapterError, OptionError, TrainingError
from das_asr.runtime.peft_checkpoint import LINEAGE_NAME, SUPPORTED_MODULES, read_adapter
from das_asr.training.finetune import LoraOptions, LoraResult, TrainOptions, compress_adapter, train_lora
from das_asr.training.finetune.adapter_file import read_factors
from das_asr.training.finetune.base import load_base
from das_asr.training.finetune.workspace import work_folder
from tests.checkpoints import make_adapter, make_base, quiet
from tests.spoken import lora_options, make_folder

# Python 3.12 warns that a process with threads was forked; the child runs on one thread and is killed.
pytestmark = [pytest.mark.usefixtures("one_torch_thread"), pytest.mark.filterwarnings("ignore:This process")]

WEIGHTS = "adapter_model.safetensors"
KINDS = [(init, rslora) for init in ("pissa", "olora", "plain") for rslora in (True, False)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), d_model=32, seconds=2, text_positions=48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("spoken") / "data", range(24))


@pytest.fixture(scope="module")
def trained(base: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], LoraResult]:
    """One adapter of every kind."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        (init, rslora): train_lora(lora_options(base, folder, root / f"{init}-{rslora}", init=init, rslora=rslora))
        for init, rslora in KINDS
    }


def logits(model: Any) -> torch.Tensor:
    """Of random windows and tokens."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 80, 200, generator=generator)
    tokens = torch.randint(0, 250, (2, 10), generator=generator)
    with torch.no_grad():
        scores: torch.Tensor = model.eval()(input_features=features, decoder_input_ids=tokens).logits
    return scores


def original(base: Path) -> Any:
    return load_base(base).load_model()


def with_adapters(base: Path, *directories: Path) -> Any:
    """The original base with adapters as PEFT loads them, named by their number."""
    from peft import PeftModel

    with quiet():
        model = PeftModel.from_pretrained(original(base), directories[0], adapter_name="0")
        for number, directory in enumerate(directories[1:], start=1):
            model.load_adapter(directory, adapter_name=str(number))
    return model


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_trained_model_is_original_base_plus_saved_adapter(
    base: Path, trained: dict[tuple[str, bool], LoraResult], kind: tuple[str, bool]
) -> None:
    result = trained[kind]
    wanted, untrained = logits(result.trained.model), logits(original(base))
    difference = (logits(with_adapters(base, result.output)) - wanted).abs().max()
    assert difference < 1e-4, f"largest difference {difference}"
    assert (wanted - untrained).abs().max() > 0.01
    assert result.rank == (4 if kind[0] == "plain" else 8)
    losses = [entry["loss"] for entry in result.trained.history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_adapters_stack_on_one_base(base: Path, trained: dict[tuple[str, bool], LoraResult]) -> None:
    chosen = [trained["pissa", True], trained["olora", False], trained["plain", True]]
    model = with_adapters(base, *(result.output for result in chosen))
    for number, result in enumerate(chosen):
        model.set_adapter(str(number))
        assert torch.allclose(logits(model), logits(result.trained.model), atol=1e-4)
    checkpoint = load_checkpoint(base)
    adapters = [
        read_adapter(result.output, f"a{number}", checkpoint.dimensions, checkpoint.sha256, checkpoint.id)
        for number, result in enumerate(chosen)
    ]
    assert stack_adapters(adapters, checkpoint.dimensions).rank == 8
    assert {len(adapter.target_modules) for adapter in adapters} == {4}


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initial_factors_are_those_of_peft(base: Path, tmp_path: Path, init: str) -> None:
    from peft import LoraConfig, get_peft_model

    from das_asr.training.finetune.initial import initialise

    settings = {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": SUPPORTED_MODULES}
    with quiet():
        theirs = get_peft_model(original(base), LoraConfig(init_lora_weights=init, **settings))  # type: ignore[arg-type]
        ours = get_peft_model(original(base), LoraConfig(**settings))
    initialise(ours, init, tmp_path / "start.safetensors")
    expected = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        if "base_layer.weight" in name:
            assert torch.allclose(weight, expected[name], atol=1e-5), name
    assert torch.allclose(logits(ours), logits(original(base)), atol=1e-4)


def test_lineage(base: Path, folder: Path, trained: dict[tuple[str, bool], LoraResult]) -> None:
    lineage = json.loads((trained["pissa", True].output / LINEAGE_NAME).read_text())
    assert lineage["base_sha256"] == load_checkpoint(base).sha256
    assert lineage["data"][0]["source"] == str(folder)
    assert lineage["recipe"]["init"] == "pissa"
    assert lineage["recipe"]["learning_rate"] == 0.01
    assert lineage["final_loss"] > 0
    assert lineage["versions"]["torch"] == torch.__version__
    other = "0" * 64
    with pytest.raises(AdapterError, match="trained on a base with sha256"):
        read_adapter(trained["pissa", True].output, "a", load_checkpoint(base).dimensions, other)


# --- Sameness ---


def test_same_seed_same_file(base: Path, folder: Path, tmp_path: Path) -> None:
    files = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train_lora(lora_options(base, folder, tmp_path / name, seed=seed, dropout=0.1, epochs=1))
        files.append((tmp_path / name / WEIGHTS).read_bytes())
    assert files[0] == files[1]
    assert files[0] != files[2]


@pytest.mark.parametrize(("checkpoint_steps", "killed_at"), [(None, 5), (2, 6)])
def test_resumed_run_is_an_uninterrupted_one(
    base: Path, folder: Path, tmp_path: Path, checkpoint_steps: int | None, killed_at: int
) -> None:
    """24 utterances in batches of 8: epochs have 3 steps, so step 4 lies inside the second one."""
    changes = {"checkpoint_steps": checkpoint_steps, "dropout": 0.2}
    train_lora(lora_options(base, folder, tmp_path / "whole", **changes))
    killed = lora_options(base, folder, tmp_path / "killed", **changes)
    run_until_killed(killed, killed_at)
    assert not killed.output.exists()
    result = train_lora(killed)
    assert result.trained.resumed_step == (4 if checkpoint_steps else 3)
    assert (tmp_path / "killed" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert not work_folder(killed.output).exists()


def run_until_killed(options: LoraOptions, step: int) -> None:
    """Runs in a child that gets SIGKILL in the middle of an optimiser step."""
    child = os.fork()
    if child == 0:
        count = 0
        before = torch.optim.AdamW.step

        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return before(self, *args, **kwargs)

        torch.optim.AdamW.step = counted  # type: ignore[method-assign]
        train_lora(options)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_other_options_do_not_resume(base: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "music"
    run_until_killed(lora_options(base, folder, output), 5)
    with pytest.raises(TrainingError, match=r"rank \(4 then, 2 now\).*--restart"):
        train_lora(lora_options(base, folder, output, rank=2))
    elsewhere = make_base(tmp_path / "base", d_model=32, seconds=2, text_positions=48, seed=1)
    with pytest.raises(TrainingError, match="base_sha256"):
        train_lora(lora_options(elsewhere, folder, output))
    result = train_lora(lora_options(base, folder, output, rank=2, restart=True, epochs=1))
    assert result.trained.resumed_step == 0


def test_torn_checkpoint_is_passed_over(base: Path, folder: Path, tmp_path: Path) -> None:
    options = lora_options(base, folder, tmp_path / "music", checkpoint_steps=2)
    run_until_killed(options, 6)
    torn = work_folder(options.output) / "checkpoint-5"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_step": ')
    assert train_lora(options).trained.resumed_step == 4


def test_accumulated_batch_is_the_whole_one(base: Path, folder: Path, tmp_path: Path) -> None:
    """Plain SGD-like check: with equally long labels, four parts give the gradient of the whole."""
    changes = {"epochs": 1, "warmup": 0.0, "max_grad_norm": 0.0, "init": "plain"}
    norms = []
    for parts in (1, 2):
        options = lora_options(base, folder, tmp_path / str(parts), accumulation=parts, log_steps=1, **changes)
        history = train_lora(options).trained.history
        norms.append([entry["loss"] for entry in history if "loss" in entry])
    # Means of parts weigh tokens by part, so they differ a little; a factor of 2 would be a bug.
    np.testing.assert_allclose(norms[0], norms[1], rtol=0.1)


def test_equal_shares_of_several_domains(base: Path, folder: Path, tmp_path: Path) -> None:
    other = make_folder(tmp_path / "other", range(30, 36))
    result = train_lora(lora_options(base, folder, tmp_path / "multi", sources=(folder, other), multi=True, epochs=1))
    lineage = json.loads((result.output / LINEAGE_NAME).read_text())
    assert (lineage["domains"], lineage["multi"], result.trained.steps) == ([24, 6], True, 4)


def test_development_set_keeps_the_best(base: Path, folder: Path, tmp_path: Path) -> None:
    """A rate that spoils the model after the first epoch."""
    dev = make_folder(tmp_path / "dev", range(40, 46))
    changes = {"eval_sources": (dev,), "eval_wer": True, "tensorboard": tmp_path / "board", "epochs": 2}
    result = train_lora(lora_options(base, folder, tmp_path / "music", **changes))
    rates = [entry["eval_wer"] for entry in result.trained.history if "eval_wer" in entry]
    assert len(rates) == 2
    assert result.trained.best == min(rates)
    assert [entry for entry in result.trained.history if "eval_loss" in entry]
    assert list((tmp_path / "board").glob("events.*"))
    difference = (logits(with_adapters(base, result.output)) - logits(result.trained.model)).abs().max()
    assert difference < 1e-4


def test_bfloat16_trains(base: Path, folder: Path, tmp_path: Path) -> None:
    result = train_lora(lora_options(base, folder, tmp_path / "a", precision="bfloat16", epochs=1))
    assert np.isfinite(result.trained.final_loss)


def test_extra_loss_is_added_and_logged(base: Path, folder: Path, tmp_path: Path) -> None:
    from das_asr.training.finetune.dataset import prepare_data
    from das_asr.training.finetune.trainer import run_training

    loaded, options = load_base(base), lora_options(base, folder, tmp_path / "x")
    model = loaded.load_model()
    model.requires_grad_(False)
    bias = model.model.decoder.layer_norm.bias.requires_grad_(True)
    data = prepare_data(loaded, options.data, model=model, encoder_states=True)
    train = TrainOptions(learning_rate=1e-3, epochs=1, batch_size=8, device="cpu", log_steps=1)
    found = run_training(model, data, train, work=tmp_path / "w", extra_loss=lambda: 5.0 + 0.0 * bias.sum())
    entries = [entry for entry in found.history if "loss" in entry]
    assert [entry["extra_loss"] for entry in entries] == [5.0] * 3
    assert all(entry["loss"] > 5.0 for entry in entries)


# --- Compression ---


def test_compression_has_the_error_it_reports(
    base: Path, trained: dict[tuple[str, bool], LoraResult], tmp_path: Path
) -> None:
    before = trained["pissa", True].output
    result = compress_adapter(before, tmp_path / "small", 4)
    old, _ = read_factors(before)
    new, config = read_factors(tmp_path / "small")
    assert (config["r"], new.scale) == (4, pytest.approx(old.scale))
    for module, (a, b) in new.modules.items():
        wanted = old.modules[module][1].astype(np.float64) @ old.modules[module][0]
        error = np.linalg.norm(b.astype(np.float64) @ a - wanted) / np.linalg.norm(wanted)
        values = np.linalg.svd(wanted, compute_uv=False)
        assert error == pytest.approx(result.errors[module], abs=1e-5)
        assert error == pytest.approx(np.linalg.norm(values[4:]) / np.linalg.norm(values), abs=1e-5)
    assert json.loads((tmp_path / "small" / LINEAGE_NAME).read_text())["compression"]["rank"] == 4
    logits(with_adapters(base, tmp_path / "small"))


def test_compression_while_training(base: Path, folder: Path, tmp_path: Path) -> None:
    result = train_lora(lora_options(base, folder, tmp_path / "a", compress_rank=4, epochs=1))
    assert result.rank == 4
    assert result.compression is not None
    lineage = json.loads((result.output / LINEAGE_NAME).read_text())
    assert lineage["compression"]["largest_error"] == max(result.compression.values())


def test_compression_of_patterns(base: Path, tmp_path: Path) -> None:
    """Modules of different ranks and scales come out with the same product."""
    adapter = make_adapter(
        base, tmp_path / "a", rank=8, alpha=16, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 4}
    )
    dims = load_checkpoint(base).dimensions
    compress_adapter(adapter, tmp_path / "b", 7)
    before, after = (read_adapter(tmp_path / name, name, dims).weights for name in "ab")
    for key in (key for key in before if "sq_a" in key):
        other = key.replace("_a", "_b")
        np.testing.assert_allclose(after[key] @ after[other], before[key] @ before[other], atol=1e-4)


@pytest.mark.parametrize("rank", [0, 8, 9])
def test_compression_to_no_smaller_rank(trained: dict[tuple[str, bool], LoraResult], tmp_path: Path, rank: int) -> None:
    with pytest.raises(OptionError, match="has rank 8"):
        compress_adapter(trained["pissa", True].output, tmp_path / "b", rank)


# --- What is refused ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "--rank"),
        ({"alpha": 0.0}, "--alpha"),
        ({"init": "eva"}, "--init"),
        ({"dropout": 1.0}, "--dropout"),
        ({"compress_rank": 8}, "--compress-rank is 8"),
        ({"eval_wer": True}, "--eval-data"),
    ],
)
def test_lora_options_out_of_range(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        lora_options(tmp_path, tmp_path, tmp_path / "x", **changes)


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ("no_such", TrainingError, "No module"),
        (r".*\.q_proj", TrainingError, "also matches model.encoder"),
        ("(", OptionError, "not a regular expression"),
    ],
)
def test_targets_that_cannot_be_used(
    base: Path, folder: Path, tmp_path: Path, targets: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train_lora(lora_options(base, folder, tmp_path / "a", targets=targets))
    assert not list(tmp_path.iterdir())


def test_output_exists(base: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(TrainingError, match="exists"):
        train_lora(lora_options(base, folder, tmp_path / "a"))


def test_divergence_is_an_error(base: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="diverged"):
        train_lora(lora_options(base, folder, tmp_path / "a", learning_rate=1e30, max_grad_norm=0.0, log_steps=1))
    assert not (tmp_path / "a").exists()
