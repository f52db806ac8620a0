"""Imports go one way, and heavy packages are imported by the file or the function that uses them."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

FOLDERS = ("runtime", "export", "training", "benchmarks")
HEAVY = {
    "accelerate",
    "cuda",
    "datasets",
    "huggingface_hub",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openai",
    "peft",
    "sherpa_onnx",
    "tensorrt",
    "tensorrt_rtx",
    "tensorrt_rtx_bindings",
    "torch",
    "transformers",
    "ttspico",
}

MAY_IMPORT = {
    "runtime": {"runtime"},
    "export": {"runtime", "export"},
    "training": {"runtime", "export", "training"},  # the checkpoint as export reads it
    "benchmarks": {"runtime", "export", "training", "benchmarks"},
}
NOT_IN_RUNTIME = {"huggingface_hub", "matplotlib", "onnx", "onnxscript", "peft", "torch", "transformers"}

# Files whose purpose is the package they import at module level. They are imported on demand themselves: importing the
# runtime or asking a command for its help loads none of them, see the tests below.
AT_MODULE_LEVEL = {
    "runtime/backends/binding.py": {"onnxruntime"},
    "runtime/backends/cuda_memory.py": {"cuda"},
    "runtime/backends/onnxruntime.py": {"onnxruntime"},
    "runtime/backends/onnxruntime_static.py": {"onnxruntime"},
    "runtime/backends/sessions.py": {"onnxruntime"},
    "export/builder.py": {"onnx"},
    "export/decoder.py": {"onnx"},
    "export/half.py": {"onnx"},
    "export/block_products.py": {"onnx"},
    "export/integer_cross.py": {"onnx"},
    "export/integer_encoder.py": {"onnx"},
    "export/rewriting.py": {"onnx"},
    "export/row_products.py": {"onnx"},
    "export/precision.py": {"onnx"},
    "training/base/augment.py": {"torch"},
    "training/base/batches.py": {"torch"},
    "training/base/muon.py": {"torch"},
    "training/base/network.py": {"torch", "transformers"},
    "training/base/pretrain.py": {"torch"},
    "training/blora/gaussian.py": {"torch"},
    "training/blora/layer.py": {"torch"},
    "training/blora/model.py": {"torch"},
    "training/blora/objective.py": {"transformers"},
    "training/finetune/callbacks.py": {"transformers"},
    "training/finetune/greedy.py": {"torch"},
    "training/finetune/hf_trainer.py": {"torch", "transformers"},
    "training/finetune/initial.py": {"torch"},
    "training/speech/pico_program.py": {"ttspico"},
    "benchmarks/baselines.py": {"torch"},
    "benchmarks/gpu/clock.py": {"torch"},
    "benchmarks/gpu/floor.py": {"torch"},
    "benchmarks/gpu/pytorch.py": {"torch"},
    "benchmarks/lora.py": {"torch"},
    "benchmarks/peers/openai.py": {"torch"},
    "benchmarks/torchloop.py": {"torch"},
}

LIGHT_COMMANDS = [
    "das-transcribe",
    "das-export",
    "das-export onnx",
    "das-export engine",
    "das-synth",
    "das-synth text",
    "das-synth speech",
    "das-train",
    "das-train lora",
    "das-train blora",
    "das-train base",
    "das-bench",
    "das-bench rtf",
    "das-bench peers",
    "das-bench wer",
    "das-bench prune",
]
HELP_SECONDS = 2.0  # of processor time: other work on the machine must not decide this


@dataclass(frozen=True)
class Import:
    """One imported module, and whether it is imported when the file is."""

    module: str
    line: int
    at_once: bool


def _imports(path: Path) -> Iterator[Import]:
    yield from _walk(ast.parse(path.read_text(encoding="utf-8")), at_once=True)


def _walk(node: ast.AST, *, at_once: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, at_once) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, f"line {child.lineno}: relative import, write das_asr...."
            yield Import(f"{child.module}", child.lineno, at_once)
            yield from (Import(f"{child.module}.{alias.name}", child.lineno, at_once) for alias in child.names)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _for_type_checkers(child):
            yield from _walk(child, at_once=False)
        else:
            yield from _walk(child, at_once=at_once)


def _for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _files(repo: Path, *folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (repo / folder).rglob("*.py"))


def _top(module: str) -> str:
    return module.partition(".")[0]


def _sibling(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "das_asr" and len(parts) > 1 else None


def test_imports_go_one_way(repo: Path) -> None:
    wrong = [
        f"{path.relative_to(repo)}:{item.line} imports {item.module}"
        for folder in FOLDERS
        for path in _files(repo, folder)
        for item in _imports(path)
        if (sibling := _sibling(item.module)) is not None and sibling not in MAY_IMPORT[folder]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_file_imports_a_second_copy(repo: Path) -> None:
    """`import export` works in the repository root and loads modules that are not those of `das_asr.export`."""
    wrong = [
        f"{path.relative_to(repo)}:{item.line} imports {item.module}"
        for path in _files(repo, *FOLDERS, "tests")
        for item in _imports(path)
        if _top(item.module) in FOLDERS
    ]
    assert not wrong, "\n".join(wrong)


def test_the_runtime_never_imports_what_only_exporting_needs(repo: Path) -> None:
    wrong = [
        f"{path.relative_to(repo)}:{item.line} imports {item.module}"
        for path in _files(repo, "runtime")
        for item in _imports(path)
        if _top(item.module) in NOT_IN_RUNTIME or "torch" in item.module.split(".")
    ]
    assert not wrong, "\n".join(wrong)


def test_heavy_packages_are_imported_on_demand(repo: Path) -> None:
    found: dict[str, set[str]] = {}
    for path in _files(repo, *FOLDERS):
        heavy = {_top(item.module) for item in _imports(path) if item.at_once} & HEAVY
        if heavy:
            found[path.relative_to(repo).as_posix()] = heavy
    assert found == AT_MODULE_LEVEL


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_runtime_imports_with_heavy_packages_blocked(repo: Path) -> None:
    demand = {path for path, heavy in AT_MODULE_LEVEL.items() if heavy}
    paths = (path.relative_to(repo) for path in _files(repo, "runtime"))
    modules = [".".join(("das_asr", *path.with_suffix("").parts)) for path in paths if path.as_posix() not in demand]
    names = [module.removesuffix(".__init__") for module in modules if not module.endswith("__main__")]
    code = f"""
import importlib, sys
for name in {sorted(HEAVY)}:
    sys.modules[name] = None
for name in {names}:
    importlib.import_module(name)
"""
    done = _python(code)
    assert done.returncode == 0, done.stderr


def test_the_runtime_loads_no_heavy_package() -> None:
    done = _python(f"import sys, das_asr.runtime; print(sorted(sys.modules.keys() & {sorted(HEAVY)}))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", LIGHT_COMMANDS)
def test_help_is_instant(command: str) -> None:
    script, *arguments = command.split()
    code = f"""
import importlib.metadata, sys
(entry,) = importlib.metadata.entry_points(group="console_scripts", name={script!r})
main = entry.load()
sys.argv = [{script!r}, *{arguments!r}, "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print(sorted(sys.modules.keys() & {sorted(HEAVY)}))
"""
    before = _child_seconds()
    done = _python(code)
    seconds = _child_seconds() - before
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert seconds < HELP_SECONDS


def _child_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
