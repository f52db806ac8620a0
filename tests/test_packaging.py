"""The wheel holds exactly what it should, installs, and says which version it is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

SOURCES = ("runtime", "export", "training", "benchmarks")
_TEXT = "das_asr.training.text"
DATA_PACKAGES = {
    "das_asr.export.samples",
    f"{_TEXT}.domains",
    f"{_TEXT}.grammars",
    f"{_TEXT}.prompts",
}  # folders without code that the wheel holds


@pytest.fixture(scope="module")
def project(repo: Path) -> dict[str, Any]:
    return tomllib.loads((repo / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def source(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git tracks or would track: building writes into the source tree, and ignored files do not ship."""
    if not (repo / ".git").exists():
        pytest.skip("needs a git checkout, to tell source files from ignored ones")
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=repo, check=True, capture_output=True, text=True).stdout.split("\0")
    copy = tmp_path_factory.mktemp("source")
    for name in filter(None, names):
        if (repo / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repo / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(output), str(source)]
    done = subprocess.run(command, cwd=output, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "absent from the `packages`" not in done.stderr, done.stderr
    (path,) = output.glob("*.whl")
    return path


def _expected(repo: Path) -> set[str]:
    """Names inside the wheel, without its metadata: code, type markers and the data that code reads."""
    patterns = ("**/*.py", "**/py.typed", "samples/*.flac", "text/*/*.yaml", "text/prompts/*.txt")
    found = {path for folder in SOURCES for pattern in patterns for path in (repo / folder).glob(pattern)}
    demo = repo / "benchmarks" / "demo"
    return {f"das_asr/{path.relative_to(repo).as_posix()}" for path in found if not path.is_relative_to(demo)}


def test_the_wheel_holds_exactly_the_expected_files(wheel: Path, repo: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = _expected(repo)
    assert names == expected, f"missing: {sorted(expected - names)}; too many: {sorted(names - expected)}"


def test_the_wheel_has_samples_markers_and_licence(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert sum(name.startswith("das_asr/export/samples/") for name in names) >= 3
    assert {f"das_asr/{folder}/py.typed" for folder in SOURCES} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_wheel_carries_the_readme(wheel: Path, repo: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    assert (repo / "README.md").read_text(encoding="utf-8").strip() in archive.read(name).decode()


def test_the_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 2_000_000  # no model, no demo data


def test_the_wheel_has_the_commands(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
    lines = archive.read(name).decode().splitlines()
    commands = {
        "das-transcribe": "das_asr.runtime.cli:main",
        "das-export": "das_asr.export.cli:main",
        "das-bench": "das_asr.benchmarks.cli:main",
        "das-synth": "das_asr.training.synth:main",
        "das-train": "das_asr.training.cli:main",
    }
    assert {f"{command} = {target}" for command, target in commands.items()} <= set(lines)


def test_every_package_is_listed(repo: Path, project: dict[str, Any]) -> None:
    setuptools = project["tool"]["setuptools"]
    found = {
        path.parent.relative_to(repo).as_posix() for name in SOURCES for path in (repo / name).rglob("__init__.py")
    }
    packages = {f"das_asr.{folder.replace('/', '.')}" for folder in found}
    assert set(setuptools["packages"]) == packages | DATA_PACKAGES
    assert setuptools["package-dir"] == {f"das_asr.{folder}": folder for folder in found if "/" not in folder}


def test_every_folder_of_code_is_a_package(repo: Path) -> None:
    demo = repo / "benchmarks" / "demo"
    folders = {path.parent for name in SOURCES for path in (repo / name).rglob("*.py")} - {demo}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


def test_the_installed_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(target)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    code = "import das_asr.runtime, das_asr.runtime.backends, das_asr.runtime.manifest as m; print(m.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(target)  # and not the editable install beside it


def test_the_newest_version_of_the_changelog_is_the_project_s(repo: Path, project: dict[str, Any]) -> None:
    text = (repo / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(\d[^\]]*)\]", text, flags=re.MULTILINE)
    assert versions[0] == project["project"]["version"]
