"""`das-train`: flags reach the options, results are printed, failures are messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from das_asr.training.cli import main
from das_asr.training.finetune.recipes import RECIPES
from tests.checkpoints import make_base
from tests.spoken import make_folder

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), d_model=32, seconds=2, text_positions=48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("spoken") / "data", range(16))


def common(base: Path, folder: Path, output: Path) -> list[str]:
    given = {"--base": base, "--data": folder, "--output": output, "--cache": folder.parent / "cache"}
    given |= {"--language": "en", "--device": "cpu", "--epochs": 1, "--batch-size": 8, "--threads": 1}
    return [str(part) for pair in given.items() for part in pair]


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(main, list(arguments))


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "peft", "accelerate", "datasets", "jiwer")
    script = (
        "import sys\n"
        "from das_asr.training.cli import main\n"
        "for command in main.commands:\n"
        "    main([command, '--help'], standalone_mode=False)\n"
        f"print('heavy:', [name for name in {heavy!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_lora_and_compress(base: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "music"
    flags = ["--recipe", "tiny", "--rank", "4", "--compress-rank", "6", "--no-rslora", "--seed", "7", "--json"]
    done = invoke("lora", *common(base, folder, output), *flags)
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert (document["rank"], document["utterances"], document["trained"]["steps"]) == (6, 16, 2)
    recipe = json.loads((output / "das_lineage.json").read_text())["recipe"]
    assert (recipe["learning_rate"], recipe["seed"], recipe["rslora"]) == (RECIPES["tiny"].learning_rate, 7, False)
    done = invoke("compress", str(output), "--rank", "2", "--output", str(tmp_path / "small"))
    assert done.exit_code == 0, done.output
    assert "rank 6 to 2" in done.output
    assert "self_attn.q_proj" in done.output


def test_full_prints_what_it_wrote(base: Path, folder: Path, tmp_path: Path) -> None:
    done = invoke("full", *common(base, folder, tmp_path / "out"), "--components", "decoder-last-1")
    assert done.exit_code == 0, done.output
    assert "16 utterances in 2 steps" in done.output
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_failure_is_a_message(base: Path, tmp_path: Path) -> None:
    done = invoke("lora", *common(base, tmp_path / "missing", tmp_path / "out"))
    assert done.exit_code == 1
    assert "missing is neither a folder" in done.output
    assert not list(tmp_path.iterdir())


def test_paper_recipe() -> None:
    paper = RECIPES["paper"]
    assert (paper.rank, paper.alpha, paper.rslora, paper.init) == (32, 64.0, True, "pissa")
    assert (paper.learning_rate, paper.epochs, paper.batch_size, paper.warmup) == (3e-6, 10, 16, 0.1)


@pytest.mark.soak
def test_two_processes_train_one_adapter(base: Path, folder: Path, tmp_path: Path) -> None:
    """Data-parallel on two processes is the same training: the same batches, split."""
    scripts = Path(sysconfig.get_path("scripts"))
    train = [str(scripts / "das-train"), "lora"]
    launch = [str(scripts / "accelerate"), "launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    losses = []
    for name, command in (("one", train), ("two", [*launch, *train])):
        arguments = [*common(base, folder, tmp_path / name), "--recipe", "tiny", "--log-steps", "1"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        losses.append(json.loads((tmp_path / name / "das_lineage.json").read_text())["final_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
