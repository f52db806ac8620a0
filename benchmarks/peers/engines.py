"""The peers by name: what each is, which of its precisions are compared, and where its code is.

A peer converts a Hugging Face checkpoint with its own tool into a folder, and opens that folder. Nothing heavy is
imported here: a peer's file imports its packages in the process that runs it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Protocol

from das_asr.benchmarks.systems import System, Work
from das_asr.runtime.errors import DasError

__all__ = ["ENGINES", "NOT_COMPARED", "Engine", "EngineInfo", "Tools", "UnavailableError", "load_engine", "versions_of"]


class UnavailableError(DasError):
    """A peer cannot run this checkpoint here; the message is the reason that the report gives."""


@dataclass(frozen=True)
class Tools:
    """What some peers need beside their packages.

    Attributes:
        pythons: interpreters of peers whose packages do not go together with ours, by the peer's name.
        whisper_cpp: a checkout of whisper.cpp, whose converter is not part of its Python package.
    """

    pythons: Mapping[str, Path] = field(default_factory=dict)
    whisper_cpp: Path | None = None


class Engine(Protocol):
    """One peer."""

    def convert(self, checkpoint: Path, precision: str, folder: Path, whisper_cpp: Path | None) -> None:
        """Writes what `open` needs into an empty folder.

        Raises:
            UnavailableError: this checkpoint cannot be converted.
        """
        ...

    def open(self, work: Work, folder: Path) -> System:
        """Loads what `convert` made.

        Raises:
            UnavailableError: this peer cannot do the work.
        """
        ...


@dataclass(frozen=True)
class EngineInfo:
    """What a peer is."""

    title: str
    precisions: tuple[str, ...]
    distributions: tuple[str, ...]  # installed packages that it is made of
    code: str  # module of this package : its `Engine`
    domains: bool = False  # whether it decodes with adapters


OURS = ("fp32", "int8")

ENGINES: dict[str, EngineInfo] = {
    "transformers": EngineInfo("transformers", ("fp32",), ("transformers", "torch"), "hugging_face:ENGINE"),
    "openai-whisper": EngineInfo("openai-whisper", ("fp32",), ("openai-whisper", "torch"), "openai:ENGINE"),
    "ctranslate2": EngineInfo("CTranslate2", ("fp32", "int8"), ("ctranslate2",), "ctranslate:ENGINE"),
    "faster-whisper": EngineInfo(
        "faster-whisper", ("fp32", "int8"), ("faster-whisper", "ctranslate2"), "faster:ENGINE"
    ),
    "whisper-cpp": EngineInfo("whisper.cpp", ("fp16",), ("pywhispercpp",), "whisper_cpp:ENGINE"),
    "optimum-onnx": EngineInfo(
        "optimum-onnx", ("fp32",), ("optimum-onnx", "transformers", "onnxruntime"), "optimum:ENGINE"
    ),
    "das": EngineInfo("DAS, shared history", OURS, ("onnxruntime",), "ours:SHARED", domains=True),
    "das-hypothesis": EngineInfo("DAS, own histories", OURS, ("onnxruntime",), "ours:OWN", domains=True),
}
"""In the order of the tables."""

NOT_COMPARED = {
    "sherpa-onnx": "writes until end-of-text, so no number of tokens can be asked for; and its exporter reads OpenAI's "
    "own checkpoints alone",
}
"""Peers that are not run, and why."""


def load_engine(name: str) -> Engine:
    """Imports a peer's code.

    Raises:
        UnavailableError: a package is missing.
    """
    versions_of(name)
    module, _, attribute = ENGINES[name].code.partition(":")
    engine: Engine = getattr(importlib.import_module(f"das_asr.benchmarks.peers.{module}"), attribute)
    return engine


def versions_of(name: str) -> dict[str, str]:
    """Versions of the packages that a peer is made of, in this interpreter.

    Raises:
        UnavailableError: a package is missing.
    """
    try:
        return {package: metadata.version(package) for package in ENGINES[name].distributions}
    except metadata.PackageNotFoundError as error:
        raise UnavailableError(f"the package {error.name} is not installed; see the extra `peers`") from error
