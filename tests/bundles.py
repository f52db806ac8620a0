"""Bundles without the parity gate, in a fraction of a second; that the graphs are right is what other tests prove.

bundle = make_bundle(base, {"music": adapter}, tmp_path / "bundle")
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from das_asr.export.checkpoint import load_checkpoint
from das_asr.export.onnx import opset, write_graphs
from das_asr.runtime.adapters import Adapter, Stack, save_adapter, stack_adapters
from das_asr.runtime.manifest import (
    SCHEMA_VERSION,
    AdapterEntry,
    BaseModel,
    Dimensions,
    Manifest,
    sha256_of,
    write_manifest,
)
from das_asr.runtime.peft_checkpoint import read_adapter
from das_asr.runtime.results import Transcription
from das_asr.runtime.tokenizer import special_tokens
from tests.checkpoints import make_adapter, make_base


def make_bundle(base: Path, adapters: Mapping[str, Path], output: Path, *, rule: str = "hypothesis") -> Path:
    """Exports `base` with `adapters` in their order and returns `output`."""
    checkpoint = load_checkpoint(base)
    dims = checkpoint.dimensions
    read = [read_adapter(directory, name, dims) for name, directory in adapters.items()]
    (output / "adapters").mkdir(parents=True)
    write_graphs(checkpoint, dims, stack_adapters(read, dims), output, {})
    shutil.copyfile(base / "tokenizer.json", output / "tokenizer.json")
    entries = tuple(_entry(adapter, output) for adapter in read)
    files = {path.relative_to(output).as_posix(): sha256_of(path) for path in output.rglob("*") if path.is_file()}
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        base=BaseModel(str(base), None, checkpoint.sha256),
        dimensions=dims,
        audio=checkpoint.audio,
        tokens=special_tokens(base / "tokenizer.json", checkpoint.generation_config, checkpoint.config),
        adapters=entries,
        rule=rule,
        tau=0.025,
        suppress_tokens=checkpoint.suppress_tokens,
        begin_suppress_tokens=checkpoint.begin_suppress_tokens,
        precisions=("fp32",),
        opset=opset(),
        tools={},
        parity={},
        files=files,
        created="2024-01-01T00:00:00Z",
    )
    write_manifest(manifest, output)
    return output


def _entry(adapter: Adapter, output: Path) -> AdapterEntry:
    path = output / "adapters" / f"{adapter.name}.safetensors"
    save_adapter(adapter, path)
    targets = tuple(adapter.target_modules)
    return AdapterEntry(adapter.name, adapter.rank, adapter.scale, targets, sha256_of(path), adapter.base_model)


def small_graphs(folder: Path, output: Path, metadata: Mapping[str, str]) -> tuple[Dimensions, Stack]:
    """Writes float32 graphs of a small base with two adapters of different rank into `output`."""
    base = make_base(folder / "base", d_model=32, seconds=2, text_positions=24)
    checkpoint = load_checkpoint(base)
    dims = checkpoint.dimensions
    adapters = [
        read_adapter(make_adapter(base, folder / name, rank=rank, seed=rank), name, dims)
        for name, rank in (("music", 4), ("weather", 2))
    ]
    stack = stack_adapters(adapters, dims)
    output.mkdir(exist_ok=True)
    write_graphs(checkpoint, dims, stack, output, metadata)
    return dims, stack


def texts(results: Sequence[Transcription]) -> list[Any]:
    """What was written, and by which rows."""
    return [(result.tokens, result.adapter, [token.row for token in result.provenance]) for result in results]
