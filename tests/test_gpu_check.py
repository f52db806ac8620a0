"""The comparison for a GPU: its code runs on the CPU with a small model, and without a GPU it says so and ends well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from das_asr.benchmarks import gpu_check, machine, models
from das_asr.benchmarks.baselines import SequentialLora as OneUtterance
from das_asr.benchmarks.gpu import ours
from das_asr.benchmarks.gpu.ours import prepared_bundle
from das_asr.benchmarks.gpu.pytorch import Task, paper_rows
from das_asr.benchmarks.gpu.report import TITLES, render_gpu, render_gpu_table
from das_asr.benchmarks.gpu.table import GPU_SYSTEMS, Plan, measure_table, step_needs
from das_asr.benchmarks.kinds import read_results
from das_asr.benchmarks.systems import Work
from das_asr.benchmarks.torchloop import paper_row
from das_asr.benchmarks.vocabulary import Vocabulary
from das_asr.runtime.backends.cuda_device import gpu_target
from das_asr.runtime.errors import BackendError, OptionError
from das_asr.runtime.manifest import check_files, read_manifest

SMALL = models.RandomShape(
    d_model=64, layers=2, heads=4, ffn=128, window_seconds=2, text_positions=32,
    vocabulary=Vocabulary(text_tokens=400, languages=("en", "de")),
)  # fmt: skip
SYSTEMS = ("transformers", "sequential-lora", "peft-mixed", "das-onnxruntime")
TOKENS = 12


@pytest.fixture(autouse=True)
def quiet(one_torch_thread: None) -> Iterator[None]:
    with machine.quiet_libraries():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small base; what is made of it goes into a cache of its own."""
    folder = tmp_path_factory.mktemp("gpu-check")
    with pytest.MonkeyPatch.context() as patch, machine.quiet_libraries():
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield models.make_checkpoint(folder / "small", SMALL)


@pytest.fixture(scope="module")
def records(checkpoint: Path) -> list[dict[str, Any]]:
    plan = Plan(checkpoint, "cpu", ("fp32",), (1, 3), (0, 2), SYSTEMS, rank=4, tokens=TOKENS, repeats=2, warmup=1)
    return list(measure_table(plan, [].append))


# --- The comparison ---


def test_every_system_runs_where_it_has_something_to_do(records: list[dict[str, Any]]) -> None:
    failed = {(r["system"], r["domains"], r["batch"]) for r in records if "error" in r}
    assert failed == {("peft-mixed", 0, 1), ("peft-mixed", 0, 3), ("transformers", 2, 1), ("transformers", 2, 3)}
    assert len(records) == 2 * 2 * len(SYSTEMS)
    for record in records:
        if "error" not in record:
            assert len(record["tokens"]) == TOKENS
            assert record["total_ms"]["median"] > 0
            audio = record["batch"] * SMALL.window_seconds
            assert record["rtf"] == pytest.approx(record["total_ms"]["median"] / 1e3 / audio)


@pytest.mark.parametrize("domains", [0, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_all_write_the_same(records: list[dict[str, Any]], domains: int, batch: int) -> None:
    written = {
        record["system"]: record["tokens"]
        for record in records
        if (record["domains"], record["batch"]) == (domains, batch) and "error" not in record
    }
    assert len(written) == 3
    assert len(set(map(tuple, written.values()))) == 1, written


def test_the_loop_for_batches_writes_what_the_loop_for_one_writes(
    records: list[dict[str, Any]], checkpoint: Path
) -> None:
    from das_asr.benchmarks.audio import window_audio

    adapters = tuple(models.adapter_folders(checkpoint, 4, 2))
    expected = OneUtterance(Work(checkpoint, adapters, TOKENS)).transcribe(window_audio(checkpoint)).tokens
    (record,) = (r for r in records if (r["system"], r["domains"], r["batch"]) == ("sequential-lora", 2, 3))
    assert tuple(record["tokens"]) == expected


def test_a_system_that_fails_is_a_record_and_the_others_go_on(checkpoint: Path) -> None:
    """TensorRT cannot run on a CPU."""
    systems = ("das-tensorrt", "transformers")
    plan = Plan(checkpoint, "cpu", ("fp32",), (1,), (0,), systems, tokens=6, repeats=1, warmup=0)
    failed, ran = measure_table(plan, [].append)
    assert failed["system"] == "das-tensorrt"
    assert failed["error"].startswith(("BackendError: ", "OptionError: "))
    assert (ran["system"], len(ran["tokens"])) == ("transformers", 6)


def test_the_records_make_a_report(records: list[dict[str, Any]], tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    gpu_check.run_piece(output, "table tokens=12 cpu", "cpu", lambda _: records)
    (result,) = read_results([output])
    table = render_gpu_table([result])
    for record in (record for record in records if "error" not in record):
        assert f"{record['rtf']:.5f} ({record['step_ms']['median']:.2f})" in table
    report = render_gpu([result])
    assert table in report
    for record in (record for record in records if "error" in record):
        assert record["error"] in report
    assert set(TITLES) == set(GPU_SYSTEMS)


def test_what_a_step_needs_is_told_for_the_adapters_of_the_task(checkpoint: Path) -> None:
    """Only on a GPU is it part of a record."""
    adapters = tuple(models.adapter_folders(checkpoint, 4, 2))
    plan = Plan(checkpoint, "cpu", rank=4)
    bundle = prepared_bundle(checkpoint, ("fp16", "fp32"), [].append)
    found = {
        (precision, len(chosen)): step_needs(plan, Task(checkpoint, chosen, precision, "cpu"), 3, bundle).bytes
        for precision in ("fp32", "fp16")
        for chosen in ((), adapters)
    }
    assert found["fp32", 2] > found["fp32", 0]
    assert found["fp16", 2] == pytest.approx(found["fp32", 2] / 2, rel=2e-2)


def test_the_rule_on_the_device_is_the_papers() -> None:
    confidences = np.random.default_rng(0).random((500, 4)).astype(np.float32)
    confidences[:250] = 0.5 + 0.03 * confidences[:250]  # close enough for the base to win
    rows = paper_rows(torch.from_numpy(confidences), 0.025).tolist()
    assert rows == [paper_row(row.tolist(), 0.025) for row in confidences]
    assert set(rows) == {0, 1, 2, 3}


def test_plans_that_make_no_sense() -> None:
    with pytest.raises(OptionError, match="--system 'abacus' is not one of"):
        Plan(Path(), "cpu", systems=("abacus",))
    with pytest.raises(OptionError, match="At least 6 tokens"):
        Plan(Path(), "cpu", tokens=2)


# --- The command ---


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "das_asr.benchmarks.gpu_check", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"})


@pytest.mark.skipif(gpu_target() is not None, reason="is about a machine without a GPU")
def test_without_a_gpu_every_piece_says_so(tmp_path: Path) -> None:
    done = run("all", "--output", tmp_path / "gpu.json")
    assert done.returncode == 0, done.stderr
    pieces = json.loads((tmp_path / "gpu.json").read_text())["pieces"]
    assert [name.split()[0] for name in pieces] == ["environment", "tests", "floor", "table", "rtx"]
    for name, outcome in pieces.items():
        assert outcome["skipped"].startswith("no CUDA device"), name
        assert f"{name}: skipped: no CUDA device" in done.stderr


def test_pieces_add_to_one_file(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    assert run("environment", "--device", "cpu", "--output", output).returncode == 0
    table = (
        "--precision",
        "fp32",
        "--batch",
        "1",
        "--domains",
        "0",
        "--repeats",
        "1",
        "--warmup",
        "0",
        "--tokens",
        "6",
    )
    done = run("table", "--device", "cpu", "--model", checkpoint, "--system", "transformers", *table, "-o", output)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert results["kind"] == "gpu"
    assert "torch" in results["pieces"]["environment"]["result"]["versions"]
    (name,) = (name for name in results["pieces"] if name.startswith("table "))
    told = {"precisions=fp32", "domains=0", "systems=transformers", "tokens=6", f"model={checkpoint}", "cpu"}
    assert told <= set(name.split())
    piece = results["pieces"][name]
    (record,) = piece["result"]
    assert (record["system"], len(record["tokens"])) == ("transformers", 6)
    assert "unfinished" not in piece


def test_a_piece_that_fails_is_told_and_does_not_end_the_run(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    kept = []

    def broken(keep: gpu_check.Keep) -> None:
        keep(["a record"])
        kept.append(json.loads(output.read_text())["pieces"]["trial"])
        raise ValueError("it broke")

    gpu_check.run_piece(output, "trial", "cpu", broken)
    assert kept == [{"result": ["a record"], "unfinished": True}]  # what a kill would have left
    piece = json.loads(output.read_text())["pieces"]["trial"]
    assert (piece["failed"], piece["result"]) == ("ValueError: it broke", ["a record"])
    assert "unfinished" not in piece


def test_a_file_that_would_be_too_large_is_cut_in_detail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "_MOST_BYTES", 5000)
    output = tmp_path / "gpu.json"
    records = [{"system": "das-onnxruntime", "error": "e" * 3000, "tokens": list(range(300))} for _ in range(4)]
    gpu_check.run_piece(output, "long", "cpu", lambda _: records)
    assert output.stat().st_size <= 5000
    results = json.loads(output.read_text())
    assert results["cut_to"] == 50
    wanted = {"system": "das-onnxruntime", "error": "e" * 50, "tokens": list(range(50))}
    assert results["pieces"]["long"]["result"] == [wanted] * 4


@pytest.mark.parametrize(
    ("device", "before", "after"),
    [
        ("cpu", None, None),
        ("cuda", "2,3", "2,3"),
        ("cuda:1", None, "1"),
        ("cuda:1", "2,3", "3"),
        ("cuda:2", "2,3", "-1"),
    ],
)
def test_the_chosen_gpu_is_the_only_one(
    device: str, before: str | None, after: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before or "")
    if before is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    seen = []
    monkeypatch.setattr(gpu_check, "run_piece", lambda *arguments: seen.append(arguments[2]))
    gpu_check.main(["floor", "--device", device, "--output", str(tmp_path / "g")], standalone_mode=False)
    assert seen == ["cpu" if device == "cpu" else "cuda"]
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == after


def test_bundles_for_engines_have_the_hashes_of_every_precision(checkpoint: Path) -> None:
    bundle = prepared_bundle(checkpoint, ("fp16", "fp32"), [].append)
    manifest = read_manifest(bundle)
    assert manifest.precisions == ("fp32", "fp16")
    assert "fp16/decoder_static.onnx" in manifest.files
    check_files(manifest, bundle)


def test_tensorrt_for_rtx_is_not_replaced_by_the_other_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "installed_libraries", lambda: ("tensorrt",))
    monkeypatch.setattr(ours, "gpu_target", lambda _: "sm86")
    with pytest.raises(BackendError, match="a GPU and tensorrt-rtx are needed"):
        ours.build_engine(tmp_path, "fp16", "cuda", "tensorrt-rtx")


@pytest.mark.skipif(gpu_target() is not None, reason="is about a machine without a GPU")
def test_the_tests_of_all_files_are_found() -> None:
    """Each of them says why it does not run here."""
    done = gpu_check._tests("test_the_gpu_says_what_it_is or test_an_engine_for_this_gpu_runs_and_is_marked")
    assert done["status"] == 0
    assert "2 skipped" in done["output"]
