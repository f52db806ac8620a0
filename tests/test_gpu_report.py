"""Tables of what `gpu_check` measures: every figure in its place, and what did not run told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from das_asr.benchmarks.cli import main
from das_asr.benchmarks.figures import summary
from das_asr.benchmarks.gpu.report import GPU_MARKERS, render_gpu, render_gpu_table
from das_asr.benchmarks.gpu_check import run_piece
from das_asr.runtime.errors import OptionError


def _record(system: str, domains: int, total: float, step: float, **more: Any) -> dict[str, Any]:
    """A record as `measure_table` writes it, of so many milliseconds."""
    return {
        "precision": "fp16", "domains": domains, "batch": 16, "system": system, "total_ms": summary([total], 1.0),
        "step_ms": summary([step], 1.0), "rtf": total / 1e6, "memory_bytes": None, "tokens": [1], **more,
    }  # fmt: skip


def _failed(system: str, domains: int, error: str) -> dict[str, Any]:
    return {"precision": "fp16", "domains": domains, "batch": 16, "system": system, "error": error}


RECORDS = [
    _record("transformers", 0, 400, 10),
    _record("sequential-lora", 0, 400, 10),
    _failed("peft-mixed", 0, "has no adapters to mix"),
    _record("das-onnxruntime", 0, 200, 2, demand={"step": {"bytes": 10**9, "fp32": 1, "int8": 0}}, step_kernels=100),
    _failed("transformers", 3, "decodes the base alone; its figures are those of 0 domains"),
    _record("sequential-lora", 3, 500, 14),
    _record("peft-mixed", 3, 600, 16),
    _record("das-onnxruntime", 3, 210, 2.5, memory_bytes=3 << 30),
    _failed("das-tensorrt", 3, "BackendError: TensorRT is not installed\nmore"),
    _failed("das-tensorrt", 10, "BackendError: TensorRT is not installed\nmore"),
]
ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00", "versions": {"python": "3.11", "torch": "1.0", "onnxruntime-gpu": "2.0"},
    "machine": {"processor": "a processor"}, "gpu": {"name": "A GPU"},
}  # fmt: skip
FLOOR = {"copy_bytes_per_second": 1e12, "graph_node_seconds": 2e-6}

TABLE = """\
A GPU; medians of the repeats; `table tokens=30 cuda`; torch 1.0, onnxruntime-gpu 2.0; 2026-01-02.

fp16, 16 utterances at a time:

| RTF (ms per step) by domains | 0 | 3 |
| --- | --- | --- |
| transformers, base only | 0.00040 (10.00) | - |
| PyTorch, sequential LoRA | 0.00040 (10.00) | 0.00050 (14.00) |
| PEFT, mixed batch | - | 0.00060 (16.00) |
| DAS, ONNX Runtime | 0.00020 (2.00) | 0.00021 (2.50) |

Overhead over 0 domains, beside Table VI of the DAS paper (arXiv 2501.12501, on a V100 GPU):

| domains | parallel, DAS paper | sequential, DAS paper | PyTorch, sequential LoRA | PEFT, mixed batch | \
DAS, ONNX Runtime |
| --- | --- | --- | --- | --- | --- |
| 3 | 9.4 % | 38.1 % | 25.0 % | 50.0 % | 5.0 % |

The floor: this GPU reads and writes 1000 GB/s when it copies, and an empty node of a CUDA graph takes 2.00 us. A step \
takes at least the longer of the two times; the shares say how close it comes.

| system | precision | batch | domains | ms per step | MB read | ms at that rate | % | kernels | ms of empty ones | % |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| DAS, ONNX Runtime | fp16 | 16 | 0 | 2.000 | 1000.0 | 1.000 | 50 | 100 | 0.200 | 10 |"""


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """A file of three pieces, put together as `gpu_check` does."""
    output = tmp_path / "gpu.json"
    found = {"environment": ENVIRONMENT, "floor": FLOOR, "table tokens=30 cuda": RECORDS}
    for name in found:
        run_piece(output, name, "cpu", lambda _, name=name: found[name])  # type: ignore[misc]
    return output


def test_the_table_has_every_figure_in_its_place(result: Path) -> None:
    assert render_gpu_table([json.loads(result.read_text())]) == TABLE


def test_the_report_tells_the_rest(result: Path) -> None:
    report = render_gpu([json.loads(result.read_text())])
    assert TABLE in report
    for line in (
        "| DAS, ONNX Runtime | - | 3072 |",
        "| PEFT, mixed batch | fp16, batch 16, 0 domains | has no adapters to mix |",
        "| DAS, TensorRT | fp16, batch 16, 3 domains; fp16, batch 16, 10 domains | BackendError: TensorRT is not "
        "installed |",
    ):
        assert line in report.splitlines()
    assert "| `floor` | done in " in report


def test_the_command_puts_it_where_it_belongs(result: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n" + "\n".join(GPU_MARKERS) + "\nafter\n")
    done = CliRunner().invoke(main, ["report", str(result), "--readme", str(readme)])
    assert done.exit_code == 0, done.output
    assert readme.read_text() == f"before\n{GPU_MARKERS[0]}\n{TABLE}\n{GPU_MARKERS[1]}\nafter\n"
    refused = CliRunner().invoke(main, ["report", str(result), "--plot", str(tmp_path / "gpu.png")])
    assert refused.exit_code == 1
    assert "there is no picture of what `python -m das_asr.benchmarks.gpu_check` measures" in refused.output


def test_a_table_without_its_surroundings_says_so(tmp_path: Path) -> None:
    run_piece(tmp_path / "gpu.json", "table cuda", "cpu", lambda _: RECORDS)
    text = render_gpu_table([json.loads((tmp_path / "gpu.json").read_text())])
    assert text.startswith("On a machine that the file does not describe (no piece `environment`); `table cuda`.")
    assert "The floor" not in text


def test_a_file_without_figures_is_refused(tmp_path: Path) -> None:
    def broken(_: object) -> None:
        raise ValueError("it broke")

    run_piece(tmp_path / "gpu.json", "table cuda", "cpu", broken)
    with pytest.raises(OptionError, match=r"no piece `table` with figures\. Run `python -m das_asr"):
        render_gpu([json.loads((tmp_path / "gpu.json").read_text())])
