"""Every module says what is public, completely and in order."""

from __future__ import annotations

import ast
import re
import types
from pathlib import Path

import pytest

import das_asr.runtime

FOLDERS = ("runtime", "export", "training", "benchmarks")
ROOT = Path(__file__).resolve().parent.parent

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _public_modules() -> list[Path]:
    """Files with a public name and code in them; an `__init__.py` that is empty or a docstring exports nothing."""
    files = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    named = (path for path in files if path.name == "__init__.py" or not path.name.startswith("_"))
    return [path for path in named if any(not isinstance(node, ast.Expr) for node in _parse(path).body)]


def _parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def _exported(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(ast.unparse(target) == "__all__" for target in node.targets):
            names = ast.literal_eval(node.value)
            return [str(name) for name in names]
    return None


def _bound(tree: ast.Module) -> set[str]:
    """Names that the module's top level binds, imports included."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, Definition):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names.update(ast.unparse(target) for target in node.targets)
        elif isinstance(node, ast.AnnAssign):
            names.add(ast.unparse(node.target))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
    return names


def _is_public(node: Definition) -> bool:
    """Subcommands of a click group are not: the group is how they are reached."""
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    subcommand = any(re.match(r"(?!click\.)\w+\.(command|group)\b", text) for text in decorators)
    return not node.name.startswith("_") and not subcommand


def _order(name: str) -> tuple[int, str]:
    """Constants, then classes, then the rest: the order that ruff keeps."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


@pytest.mark.parametrize("path", _public_modules(), ids=str)
def test_all_is_complete_and_sorted(path: Path) -> None:
    tree = _parse(path)
    names = _exported(tree)
    assert names is not None, f"{path} has no __all__"
    assert names == sorted(set(names), key=_order)
    assert set(names) <= _bound(tree)
    public = {node.name for node in tree.body if isinstance(node, Definition) and _is_public(node)}
    assert public <= set(names), f"{path}: public, but not in __all__: {sorted(public - set(names))}"


def test_the_runtime_exports_its_public_names() -> None:
    values = {name: getattr(das_asr.runtime, name) for name in dir(das_asr.runtime) if not name.startswith("_")}
    public = {name for name, value in values.items() if not isinstance(value, types.ModuleType)}
    assert public == set(das_asr.runtime.__all__)
