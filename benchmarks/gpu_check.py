"""Everything that has to be tried on a GPU, in pieces that fit ten minutes each, into one JSON file.

    python -m das_asr.benchmarks.gpu_check environment --output gpu.json
    python -m das_asr.benchmarks.gpu_check tests --output gpu.json
    python -m das_asr.benchmarks.gpu_check floor --output gpu.json
    python -m das_asr.benchmarks.gpu_check table --precision fp16 --batch 1 --output gpu.json
    python -m das_asr.benchmarks.gpu_check rtx --output gpu.json
    python -m das_asr.benchmarks.gpu_check all --output gpu.json

Each piece adds its part to the file, the table record by record. What cannot run is part of the result, with the
reason; the exit status is 0 as long as the file could be written. It needs torch, transformers, peft and onnx, and of
this package nothing installed: `PYTHONPATH=typings` in a checkout will do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from das_asr.benchmarks.children import run_child
from das_asr.benchmarks.output import check_folders, write_whole
from das_asr.runtime.backends import BackendOptions
from das_asr.runtime.console import Group
from das_asr.runtime.errors import DasError, OptionError

__all__ = ["main", "missing_device", "run_piece"]

_MOST_BYTES = 1_000_000  # of the result file
_LENGTHS = (6000, 1000, 200, 50)  # that texts and lists of numbers are cut to where the file would be larger
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_KEPT_OUTPUT = 6000  # characters of what a test run or a trial printed

Keep = Callable[[Any], None]
Piece = Callable[[Keep], Any]
"""Does its work and returns the result; what it hands to `Keep` before that is in the file at once."""


def _one_gpu(_: click.Context, parameter: click.Parameter, value: str) -> str:
    """Makes the chosen GPU the only one: tests, engine builders and libraries have no say in which one they take."""
    try:
        options = BackendOptions(value)
    except OptionError as error:
        raise click.BadParameter(str(error), param=parameter) from error
    if ":" not in value:
        return value
    chosen = str(options.device_id)
    if _VISIBLE in os.environ:  # N then counts among those that are visible; beyond them there is none
        chosen = dict(enumerate(os.environ[_VISIBLE].split(","))).get(options.device_id, "-1")
    os.environ[_VISIBLE] = chosen
    return "cuda"


OUTPUT = click.option(
    "--output", "-o", required=True, type=click.Path(dir_okay=False, path_type=Path), help="JSON file to add to."
)
DEVICE = click.option(
    "--device", default="cuda", show_default=True, callback=_one_gpu, help="cuda, cuda:N, or cpu to try the code."
)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Tries and measures on a GPU what can be tried and measured there only."""


def _list(_: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    items = tuple(item.strip() for item in value.split(",") if item.strip())
    if not items:
        raise click.BadParameter(f"{value!r} names nothing.", param=parameter)
    return items


@main.command()
@OUTPUT
@DEVICE
def environment(output: Path, device: str) -> None:
    """The GPU, its driver, and the versions of everything that matters."""
    run_piece(output, "environment", device, lambda _: _environment(device))


@main.command()
@OUTPUT
@DEVICE
@click.option("--select", default="", help="Of the tests, as pytest's -k.")
def tests(output: Path, device: str, select: str) -> None:
    """The tests that need a GPU."""
    run_piece(output, f"tests {select}".strip(), device, lambda _: _tests(select))


@main.command()
@OUTPUT
@DEVICE
def floor(output: Path, device: str) -> None:
    """Copy bandwidth and the time of an empty node in a CUDA graph."""

    def measure(_: Keep) -> dict[str, float]:
        from das_asr.benchmarks.gpu.clock import Device
        from das_asr.benchmarks.gpu.floor import measure_device

        return measure_device(Device(device))

    run_piece(output, "floor", device, measure)


@main.command()
@OUTPUT
@DEVICE
@click.option("--model", default="whisper-base-random", show_default=True, help="Checkpoint, or this random one.")
@click.option("--precision", "precisions", default="fp16,fp32", show_default=True, callback=_list)
@click.option("--batch", "batches", default="1,16", show_default=True, callback=_list, help="Utterances at a time.")
@click.option("--domains", default="0,1,2,3,10,25", show_default=True, callback=_list, help="Numbers of adapters.")
@click.option("--system", "systems", default="", help="Comma-separated; by default all.")
@click.option("--tokens", default=30, show_default=True, help="New tokens, forced on every system.")
@click.option("--repeats", default=5, show_default=True, help="Repeats that count.")
@click.option("--warmup", default=2, show_default=True, help="Repeats before them that do not.")
def table(output: Path, device: str, **options: Any) -> None:
    """The papers' table: time and memory over the number of domains."""
    said = {name: ",".join(value) if isinstance(value, tuple) else value for name, value in options.items()}
    name = " ".join(["table", *(f"{option}={value}" for option, value in said.items() if value != ""), device])
    run_piece(output, name, device, lambda keep: _table(device, keep, **options))


@main.command()
@OUTPUT
@DEVICE
def rtx(output: Path, device: str) -> None:
    """What TensorRT for RTX says on this GPU: builds an engine for it, and opens and runs one."""
    run_piece(output, "rtx", device, lambda _: _rtx(device))


@main.command(name="all")
@OUTPUT
@DEVICE
def everything(output: Path, device: str) -> None:
    """All pieces, one after the other; that may take longer than a machine is lent for."""
    for command in (environment, tests, floor, table, rtx):
        command.main(["--output", str(output), "--device", device], standalone_mode=False)


def run_piece(output: Path, name: str, device: str, piece: Piece) -> None:
    """Runs a piece and adds what came of it to the file: figures, or why there are none.

    Raises:
        OptionError: the file cannot be written.
    """
    check_folders(output=output)
    started = time.perf_counter()
    outcome: dict[str, Any] = {}

    def keep(found: Any) -> None:
        """Whoever is killed loses no more than what was under way."""
        outcome["result"] = found
        _add(output, name, {**outcome, "unfinished": True})

    if reason := missing_device(device):
        outcome["skipped"] = reason
    else:
        try:
            outcome["result"] = piece(keep)
        except Exception as error:  # noqa: BLE001  # one piece must not keep the others from being tried
            outcome["failed"] = f"{type(error).__name__}: {error}"[:_KEPT_OUTPUT]
    outcome["seconds"] = round(time.perf_counter() - started, 1)
    _add(output, name, outcome)
    click.echo(f"{name}: {_said(outcome)}", err=True)


def _add(output: Path, name: str, outcome: Mapping[str, Any]) -> None:
    """Replaces the file by one that has this piece too; what makes it too large is cut, and `cut_to` says so."""
    results: dict[str, Any] = {"kind": "gpu", "schema": 1, "pieces": {}}
    if output.is_file():
        results = json.loads(output.read_text(encoding="utf-8"))
    results["pieces"][name] = outcome
    text = json.dumps(results, indent=1)
    for most in _LENGTHS:
        if len(text) > _MOST_BYTES:
            text = json.dumps({**results, "cut_to": most, "pieces": _cut(results["pieces"], most)}, indent=1)
    write_whole(output, text + "\n")


def _cut(value: Any, most: int) -> Any:
    """The same with texts and lists of numbers of at most that length."""
    if isinstance(value, Mapping):
        return {name: _cut(item, most) for name, item in value.items()}
    if isinstance(value, str):
        return value[:most]
    if isinstance(value, list):
        numbers = all(isinstance(item, int | float) for item in value)
        return value[:most] if numbers else [_cut(item, most) for item in value]
    return value


def missing_device(device: str) -> str | None:
    """Why there is nothing to run on, or None."""
    if device == "cpu":
        return None
    from das_asr.runtime.backends.cuda_device import gpu_target

    if gpu_target() is None:
        shown = f" ({_VISIBLE} is {os.environ[_VISIBLE]})" if _VISIBLE in os.environ else ""
        return f"no CUDA device: {device!r} is not there{shown}, or has no driver"
    import torch

    return None if torch.cuda.is_available() else f"no CUDA device for PyTorch {torch.__version__}, which measures"


def _said(outcome: Mapping[str, Any]) -> str:
    for word in ("skipped", "failed"):
        if word in outcome:
            return f"{word}: {outcome[word].splitlines()[0]}"
    return f"done in {outcome['seconds']} s"


# --- The pieces ---


def _environment(device: str) -> dict[str, Any]:
    import onnxruntime
    import torch

    from das_asr.benchmarks.machine import describe_run
    from das_asr.runtime.backends.cuda_device import gpu_target
    from das_asr.runtime.backends.tensorrt_library import installed_libraries

    gpu: dict[str, Any] = {"target": gpu_target(), "tensorrt": installed_libraries()}
    if device != "cpu":
        properties = torch.cuda.get_device_properties(device)
        gpu |= {"name": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
        gpu["driver"] = _printed(["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem", "--format=csv"])
    providers = onnxruntime.get_available_providers()
    return {**describe_run(), "gpu": gpu, "providers": providers}


def _tests(select: str) -> dict[str, Any]:
    root = Path(__file__).resolve().parent.parent
    if not (root / "tests" / "test_gpu.py").is_file():
        raise DasError(f"{root} has no tests/test_gpu.py. Run this in a checkout.")
    chosen = ["-k", select] if select else []
    marked = (file for file in sorted(root.glob("tests/test_*.py")) if "pytest.mark.gpu" in file.read_text("utf-8"))
    options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", *(str(file.relative_to(root)) for file in marked)]
    done = run_child([sys.executable, "-m", "pytest", *options, *chosen], cwd=root)
    return {"status": done.returncode, "output": (done.stdout + done.stderr)[-_KEPT_OUTPUT:]}


def _table(device: str, keep: Keep, model: str, systems: str, **options: Any) -> list[dict[str, Any]]:
    from das_asr.benchmarks.gpu.table import GPU_SYSTEMS, Plan, measure_table
    from das_asr.benchmarks.machine import quiet_libraries
    from das_asr.benchmarks.models import resolve_model

    options |= {name: tuple(map(int, options[name])) for name in ("batches", "domains")}
    names = tuple(item.strip() for item in systems.split(",") if item.strip()) or GPU_SYSTEMS
    records: list[dict[str, Any]] = []
    with quiet_libraries():
        plan = Plan(resolve_model(model), device, systems=names, **options)
        for record in measure_table(plan, lambda text: click.echo(text, err=True)):
            records.append(record)
            keep(records)
    return records


def _rtx(device: str) -> dict[str, Any]:
    """Each step of a trial with what came of it; the first that fails ends it."""
    from das_asr.benchmarks.gpu.ours import build_engine, prepared_bundle
    from das_asr.benchmarks.models import resolve_model
    from das_asr.export import verify_bundle

    log: list[str] = []
    bundle = prepared_bundle(resolve_model("whisper-base-random"), ("fp32", "fp16"), log.append)
    for precision in ("fp16", "fp32"):
        try:
            log.append(f"built {build_engine(bundle, precision, device, 'tensorrt-rtx')}")
            log.append(f"verified: {verify_bundle(bundle, device=device).engines}")
        except DasError as error:
            log.append(f"{type(error).__name__}: {error}")
    return {"log": log}


def _printed(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


if __name__ == "__main__":
    main()
