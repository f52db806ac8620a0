"""BLoRA on the demo base: what is saved, what is logged, going on after a kill, domains one after the other, errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file

from das_asr.runtime.errors import AdapterError, DataError, OptionError, TrainingError
from das_asr.runtime.peft_checkpoint import read_adapter
from das_asr.training.blora.cli import blora
from das_asr.training.blora.model import POSTERIOR, BayesModel
from das_asr.training.blora.objective import KlTerm
from das_asr.training.blora.options import BloraOptions, PosteriorOptions
from das_asr.training.blora.sequence import stage_folders, train_sequence
from das_asr.training.blora.sparsity import measure_sparsity
from das_asr.training.blora.train import BloraResult, train_blora
from das_asr.training.finetune.adapter_file import Factors, write_adapter
from das_asr.training.finetune.base import load_base
from das_asr.training.finetune.noise import quiet_libraries
from das_asr.training.finetune.options import DataOptions, TrainOptions

pytestmark = pytest.mark.usefixtures("one_torch_thread")

Make = Callable[..., BloraOptions]


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory, repo: Path) -> tuple[Path, Path]:
    """Manifests of four clips each: music, weather."""
    folder, audio = tmp_path_factory.mktemp("data"), repo / "benchmarks" / "demo" / "audio"
    rows = [json.loads(line) for line in (audio / "metadata.jsonl").read_text("utf-8").splitlines()]
    for name in ("music", "weather"):
        lines = [
            json.dumps({**row, "file_name": str(audio / row["file_name"])}) for row in rows if row["domain"] == name
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "music.jsonl", folder / "weather.jsonl"


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, demo_base: Path, domains: tuple[Path, Path]) -> Make:
    """Options for two epochs of two steps, in a new folder each."""
    cache = tmp_path_factory.mktemp("cache")

    def options(*, posterior: PosteriorOptions | None = None, seed: int = 0, **changed: Any) -> BloraOptions:
        train = TrainOptions(learning_rate=1e-2, epochs=2, batch_size=2, seed=seed, log_steps=1, checkpoint_steps=1)
        given: dict[str, Any] = {
            "base": str(demo_base),
            "output": tmp_path_factory.mktemp("run") / "adapter",
            "data": DataOptions(sources=domains[:1], cache=cache),
            "train": replace(train, device="cpu"),
            "posterior": posterior or PosteriorOptions(),
            "rank": 4,
        }
        return BloraOptions(**{**given, **changed})

    return options


@pytest.fixture(scope="module")
def first(make: Make, tmp_path_factory: pytest.TempPathFactory) -> BloraResult:
    options = make()
    return train_blora(replace(options, train=replace(options.train, tensorboard=tmp_path_factory.mktemp("events"))))


def _tensors(adapter: Path) -> dict[str, Any]:
    return {**load_file(adapter / "adapter_model.safetensors"), **load_file(adapter / POSTERIOR)}


def _differences(one: Path, other: Path) -> list[str]:
    left, right = _tensors(one), _tensors(other)
    assert left.keys() == right.keys()
    return [name for name in left if not np.array_equal(left[name], right[name])]


def test_peft_computes_what_the_mean_does(first: BloraResult, demo_base: Path) -> None:
    from peft import PeftModel

    base = load_base(demo_base).load_model()
    given = {
        "input_features": torch.randn(1, 80, 800),
        "decoder_input_ids": torch.tensor([[1201, 1202, 1204, 1208, 5]]),
    }
    with torch.no_grad():
        plain = base(**given).logits
        expected = first.trained.model.eval()(**given).logits
        with quiet_libraries():
            found = PeftModel.from_pretrained(base, first.output).eval()(**given).logits
    assert (found - plain).abs().max() > 1e-2
    assert (found - expected).abs().max() < 1e-5


def test_the_runtime_reads_the_adapter(first: BloraResult, demo_base: Path) -> None:
    base = load_base(demo_base)
    adapter = read_adapter(first.output, "music", base.dimensions, base.sha256, base.id)
    assert adapter.rank == 4
    assert adapter.scale == pytest.approx(64 / 4**0.5)
    recipe = json.loads(adapter.lineage["recipe"])
    assert (recipe["what"], recipe["beta"], recipe["start"]) == ("blora", PosteriorOptions().beta, None)


def test_two_numbers_are_trained_per_element(first: BloraResult) -> None:
    modules, width = 16, 192
    assert first.parameters == 2 * modules * 2 * 4 * width


def test_checkpoints_hold_the_posterior_alone(first: BloraResult) -> None:
    names = first.trained.model.state_dict().keys()
    assert len(names) == 16 * 4
    assert {name.rpartition(".")[2] for name in names} == {"mean", "rho"}


def test_the_parts_of_the_loss_are_logged(first: BloraResult) -> None:
    entries = [entry for entry in first.trained.history if "loss" in entry]
    assert len(entries) == first.trained.steps == 4
    for entry in entries:
        assert entry["loss"] == pytest.approx(entry["ce"] + entry["beta"] * entry["kl"], rel=1e-5)
    assert entries[0]["kl"] > 0 < entries[0]["ce"]


def test_tensorboard_has_the_parts_too(make: Make) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = make()
    folder = options.output.parent / "events"
    train_blora(replace(options, train=replace(options.train, epochs=1, tensorboard=folder)))
    tags = set()
    for path in folder.glob("events*"):
        tags |= set(EventAccumulator(str(path)).Reload().Tags()["scalars"])
    assert {"train/loss", "train/ce", "train/kl", "train/beta"} <= tags


def test_the_same_seed_gives_the_same_posterior(first: BloraResult, make: Make) -> None:
    assert not _differences(train_blora(make()).output, first.output)


def test_another_seed_gives_another(first: BloraResult, make: Make) -> None:
    assert len(_differences(train_blora(make(seed=1)).output, first.output)) == 16 * 6


def test_a_killed_run_goes_on_to_the_same_posterior(
    first: BloraResult, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, calls = make(), []

    def killed(self: KlTerm) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return self._beta * self._kl()

    with monkeypatch.context() as patched:
        patched.setattr(KlTerm, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            train_blora(options)
    assert not options.output.exists()
    result = train_blora(options)
    assert result.trained.resumed_step == 3
    assert not _differences(result.output, first.output)


def test_a_large_beta_pulls_the_means_to_the_prior(make: Make) -> None:
    def longer(beta: float) -> BloraResult:
        options = make(posterior=PosteriorOptions(beta=beta))
        return train_blora(replace(options, train=replace(options.train, epochs=6)))

    pulled, usual = longer(1000.0), longer(PosteriorOptions().beta)
    assert pulled.kl < 0.8 * usual.kl
    assert np.abs(_largest_a(pulled.output)) < _largest_a(usual.output)


def _largest_a(adapter: Path) -> float:
    return max(float(np.abs(value).max()) for name, value in _tensors(adapter).items() if "lora_A" in name)


def test_plain_lora_leaves_out_noise_and_kl(make: Make) -> None:
    result = train_blora(make(method="lora"))
    assert not any("kl" in entry for entry in result.trained.history)
    sigmas = [np.log1p(np.exp(value)) for name, value in _tensors(result.output).items() if name.endswith("a.rho")]
    assert np.allclose(sigmas, PosteriorOptions().sigma_init)


# --- Sequences ---


@pytest.fixture(scope="module")
def chain(make: Make, domains: tuple[Path, Path]) -> tuple[BloraOptions, list[BloraResult]]:
    options = make(posterior=PosteriorOptions(prior="previous"))
    options = replace(options, data=replace(options.data, sources=domains))
    return options, list(train_sequence(options, ["music", "weather"]))


def test_every_stage_is_kept_and_starts_from_the_one_before(
    chain: tuple[BloraOptions, list[BloraResult]], make: Make, domains: tuple[Path, Path]
) -> None:
    options, stages = chain
    folders = stage_folders(options.output, ["music", "weather"])
    assert [folder.name for folder in folders] == ["stage-1-music", "stage-2-weather"]
    assert [stage.output for stage in stages] == folders
    alone = make(posterior=options.posterior, start=folders[0])
    alone = replace(alone, data=replace(alone.data, sources=domains[1:]))
    assert not _differences(train_blora(alone).output, folders[1])


def test_the_previous_posterior_can_be_the_prior(chain: tuple[BloraOptions, list[BloraResult]]) -> None:
    _, (music, weather) = chain
    kls = [[entry["kl"] for entry in stage.trained.history if "kl" in entry] for stage in (music, weather)]
    assert kls[0][0] > 10
    assert kls[1][0] == pytest.approx(0, abs=1e-3)
    assert kls[1][-1] > 1e-3


def test_a_finished_stage_is_not_trained_again(chain: tuple[BloraOptions, list[BloraResult]], tmp_path: Path) -> None:
    options, _ = chain
    copy = tmp_path / "chain"
    shutil.copytree(options.output, copy)
    shutil.rmtree(copy / "stage-2-weather")
    (again,) = train_sequence(replace(options, output=copy), ["music", "weather"])
    assert again.output == copy / "stage-2-weather"
    assert not _differences(again.output, options.output / "stage-2-weather")


def test_another_sequence_does_not_go_on_there(chain: tuple[BloraOptions, list[BloraResult]]) -> None:
    options, _ = chain
    changed = replace(options, rank=8)
    with pytest.raises(TrainingError, match=r"other options: rank \(4 then, 8 now\)"):
        train_sequence(changed, ["music", "weather"])


def test_a_foreign_folder_is_left_alone(make: Make, domains: tuple[Path, Path], tmp_path: Path) -> None:
    options = make(output=tmp_path, restart=True)
    options = replace(options, data=replace(options.data, sources=domains))
    with pytest.raises(TrainingError, match="exists"):
        train_sequence(options, ["music", "weather"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["music"], "1 names were given for 2 sources"),
        (["music", "music"], "'music' twice"),
        (["music", "../weather"], "the name '../weather'"),
    ],
    ids=str,
)
def test_bad_names_are_refused(make: Make, domains: tuple[Path, Path], names: list[str], message: str) -> None:
    options = make()
    options = replace(options, data=replace(options.data, sources=domains))
    with pytest.raises(OptionError, match=message):
        train_sequence(options, names)
    assert not options.output.exists()


def test_missing_data_is_refused_before_the_first_stage(make: Make, domains: tuple[Path, Path], tmp_path: Path) -> None:
    options = make()
    options = replace(options, data=replace(options.data, sources=(domains[0], tmp_path / "absent")))
    with pytest.raises(DataError, match="absent"):
        train_sequence(options, ["music", "absent"])
    assert not options.output.exists()


# --- What is refused ---


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("(", "is not a regular expression"),
        ("no_such_module", "matches no module"),
        (r"model\.encoder\..*q_proj", "also matches model.encoder.layers.0.self_attn.q_proj"),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused(make: Make, targets: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        train_blora(make(targets=targets))


def test_a_prior_needs_a_posterior_before_it(make: Make) -> None:
    with pytest.raises(OptionError, match="--prior previous"):
        train_blora(make(posterior=PosteriorOptions(prior="previous")))


def test_a_start_without_a_posterior_is_refused(make: Make, demo_adapters: dict[str, Path]) -> None:
    with pytest.raises(TrainingError, match=f"has no {POSTERIOR}"):
        train_blora(make(start=demo_adapters["music"]))


def test_a_start_of_another_rank_is_refused(make: Make, first: BloraResult) -> None:
    with pytest.raises(TrainingError, match="of another rank"):
        train_blora(make(start=first.output, rank=8))


def test_a_damaged_start_is_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / POSTERIOR).write_bytes(b"not tensors")
    with pytest.raises(TrainingError, match="cannot be read"):
        train_blora(make(start=tmp_path))


# --- Sparsity ---


def test_sparsity_counts_a_b_and_the_update(tmp_path: Path) -> None:
    a = np.array([[1.0, 1e-4, 0.0, 2e-3]], np.float32)
    b = np.array([[1e-4], [1.0]], np.float32)
    write_adapter(tmp_path, Factors({"m": (a, b)}, scale=20.0), {"peft_type": "LORA"}, {})
    found = measure_sparsity(tmp_path)
    assert (found.a, found.b, found.both) == (0.5, 0.5, 0.5)
    assert found.update == 4 / 8  # 20 x [[1e-4, 1e-8, 0, 2e-7], [1, 1e-4, 0, 2e-3]]
    assert measure_sparsity(tmp_path, threshold=10).b == 1


def test_sparsity_needs_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        measure_sparsity(tmp_path)


# --- The command ---


def test_the_command_trains_and_says_what_it_did(make: Make, domains: tuple[Path, Path]) -> None:
    options = make()
    given = ["--base", options.base, "--data", str(domains[0]), "--output", str(options.output), "--device", "cpu"]
    sizes = ["--rank", "4", "--epochs", "1", "--lr", "0.01", "--batch-size", "4", "--cache", str(options.data.cache)]
    done = CliRunner().invoke(blora, [*given, *sizes, "--beta", "0.5", "--estimator", "local", "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["trained"]["history"][0]["beta"] == 0.5
    assert document["sparsity"].keys() >= {"a", "b", "update"}
    assert (options.output / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "x", "--beta", "-1"], "--beta is -1.0"),
        (["--data", "x", "--prior-sigma", "0"], "--prior-sigma is 0.0"),
        (["--data", "x", "--sequence", "a=x"], "--data and --sequence were both given"),
        (["--sequence", "a=x"], "at least two NAME=DIR"),
        (["--sequence", "x", "y"], "NAME=DIR"),
        ([], "No --data"),
    ],
    ids=str,
)
def test_the_command_refuses(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(blora, ["--base", "nowhere", "--output", str(tmp_path / "out"), *arguments])
    assert done.exit_code
    assert message in done.output
    assert not isinstance(done.exception, OptionError)


def test_the_model_is_whole_when_targets_are_refused(make: Make, demo_base: Path) -> None:
    network = load_base(demo_base).load_model()
    with pytest.raises(OptionError):
        BayesModel(network, replace(make(), targets=r".*\.q_proj"))
    assert all(parameter.requires_grad for name, parameter in network.named_parameters() if "q_proj" in name)
