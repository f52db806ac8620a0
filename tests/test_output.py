"""What results say of paths."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from das_asr.benchmarks.output import plain_options, plain_path


@dataclass(frozen=True)
class Options:
    bundle: Path
    audio: tuple[Path, ...]
    tools: dict[str, Path | None]
    threads: int = 1


def test_paths_within_the_working_folder_are_relative_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert plain_path(tmp_path / "build" / "bundle") == "build/bundle"
    assert plain_path(Path("build/bundle")) == "build/bundle"


def test_of_paths_elsewhere_only_the_name_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert plain_path(tmp_path / "there" / "bundle") == "bundle"


def test_options_are_plain_at_any_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = Options(Path("/elsewhere/bundle"), (Path("a.wav"), tmp_path / "b.wav"), {"one": Path("x/y"), "two": None})
    assert plain_options(options) == {
        "bundle": "bundle",
        "audio": ["a.wav", "b.wav"],
        "tools": {"one": "x/y", "two": None},
        "threads": 1,
    }
