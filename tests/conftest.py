"""Fixtures that all tests share: the repository, the demo data, and the demo bundle, exported once per session."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_configure(config: pytest.Config) -> None:
    """Keeps tests off the network, in this process and in those it starts, before anything imports the hub client."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """Models this small are slower with two threads, and much slower when another process wants the second core."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def repo() -> Path:
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def demo_base(repo: Path) -> Path:
    return repo / "benchmarks" / "demo" / "base"


@pytest.fixture(scope="session")
def demo_adapters(repo: Path) -> dict[str, Path]:
    """Adapter directories by name, in the order of their rows in the demo bundle."""
    return {name: repo / "benchmarks" / "demo" / "adapters" / name for name in ("music", "weather", "sports")}


@pytest.fixture(scope="session")
def demo_audio(repo: Path) -> list[tuple[Path, str, str]]:
    """The demo clips as (file, words, domain)."""
    folder = repo / "benchmarks" / "demo" / "audio"
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [(folder / clip["file_name"], clip["text"], clip["domain"]) for clip in map(json.loads, lines)]


@pytest.fixture(scope="session")
def run_script() -> Run:
    """Runs an installed command (`das-export`, ...) with arguments; fails the test when it exits non-zero."""
    scripts = Path(sysconfig.get_path("scripts"))

    def run(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [str(scripts / name), *map(str, arguments)]
        environment = {**os.environ, "COLUMNS": "200"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            pytest.fail(f"{' '.join(command)} exited {done.returncode}:\n{done.stdout}{done.stderr}")
        return done

    return run


@pytest.fixture(scope="session")
def demo_bundle(
    tmp_path_factory: pytest.TempPathFactory, run_script: Run, demo_base: Path, demo_adapters: dict[str, Path]
) -> Path:
    """The bundle of the demo base and its three adapters, as `make demo` exports it. Read-only: all tests share it."""
    output = tmp_path_factory.mktemp("demo") / "bundle"
    adapters = [part for name, path in demo_adapters.items() for part in ("--adapter", f"{name}={path}")]
    run_script("das-export", "onnx", "--base", demo_base, *adapters, "--output", output)
    return output
