"""From a base checkpoint and its adapters to a bundle.

    music = AdapterSource("music", Path("adapters/music"))
    manifest = export_bundle(ExportOptions(base="base", output=Path("bundle"), adapters=(music,)))

Everything is read and checked first, then written into a folder beside the destination, compared with PyTorch, and
given its name at last: a bundle is whole or absent.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from das_asr.export.checkpoint import Checkpoint, load_checkpoint, tokenizer_json
from das_asr.export.clips import load_clips
from das_asr.export.onnx import check_adapters_used, opset, write_graphs
from das_asr.export.options import AdapterSource, ExportOptions
from das_asr.export.staging import check_target, staged
from das_asr.export.variants import check_variant, compare_variant, read_speech
from das_asr.runtime.adapters import Adapter, save_adapter, stack_adapters
from das_asr.runtime.errors import ExportError, ParityError
from das_asr.runtime.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    AdapterEntry,
    BaseModel,
    Manifest,
    ParityReport,
    VariantReport,
    check_files,
    sha256_of,
    write_manifest,
)
from das_asr.runtime.peft_checkpoint import read_adapter
from das_asr.runtime.tokenizer import special_tokens
from das_asr.runtime.utterances import Utterance

__all__ = ["export_bundle"]

_TOOLS = ("das-asr", "numpy", "onnx", "peft", "safetensors", "tokenizers", "torch", "transformers")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Sources:
    """Everything an export reads, checked."""

    checkpoint: Checkpoint
    adapters: tuple[Adapter, ...]
    folders: tuple[Path, ...]  # PEFT checkpoints of the adapters
    samples: Sequence[NDArray[np.float32]]  # [n] each
    speech: Sequence[Utterance]  # labelled, to compare precisions


def export_bundle(options: ExportOptions) -> Manifest:
    """Writes a bundle and proves it against transformers and PEFT.

    Args:
        options: what to export, and where to.

    Returns:
        The manifest of the bundle that is now at `options.output`.

    Raises:
        CheckpointError: the base is broken, cannot be had, or is not a Whisper that can be exported.
        AdapterError: an adapter is broken, unsupported, or made for another base.
        AudioError: a sample cannot be used.
        DataError: the labelled speech cannot be used.
        ParityError: the exported graphs do not compute what PyTorch computes, an adapter changes nothing, or a
            precision differs too much from float32.
        ExportError: the output exists, cannot be written, or the disk is full; the base cannot have a precision; or
            this ONNX Runtime cannot run the graphs.
    """
    check_target(options.output, force=options.force)
    sources = _read(options)
    with staged(options.output, force=options.force) as directory:
        return _write(options, sources, directory)


def _read(options: ExportOptions) -> _Sources:
    checkpoint = load_checkpoint(options.base, options.revision)
    _log.info("base %s: %s", options.base, _sizes(checkpoint))
    adapters = tuple(_read_adapter(source, checkpoint) for source in options.adapters)
    folders = tuple(source.directory for source in options.adapters)
    samples, speech = load_clips(options.sample_audio, checkpoint.audio), read_speech(options.eval_manifest)
    return _Sources(checkpoint, adapters, folders, samples, speech)


def _read_adapter(source: AdapterSource, checkpoint: Checkpoint) -> Adapter:
    adapter = read_adapter(source.directory, source.name, checkpoint.dimensions, checkpoint.sha256, checkpoint.id)
    _log.info("adapter %s: rank %d, %s", adapter.name, adapter.rank, ", ".join(adapter.target_modules))
    return adapter


def _sizes(checkpoint: Checkpoint) -> str:
    dims = checkpoint.dimensions
    return (
        f"d_model {dims.d_model}, {dims.encoder_layers} + {dims.decoder_layers} layers, vocabulary {dims.vocabulary}, "
        f"window {checkpoint.audio.window_seconds:g} s"
    )


# --- Writing ---


def _write(options: ExportOptions, sources: _Sources, directory: Path) -> Manifest:
    """Fills the staging folder; the manifest that counts comes last."""
    checkpoint = sources.checkpoint
    _log.info("writing graphs")
    stack = stack_adapters(sources.adapters, checkpoint.dimensions)
    write_graphs(checkpoint, checkpoint.dimensions, stack, directory, _graph_metadata(checkpoint, stack.names))
    check_adapters_used(sources.adapters, directory)
    smaller = [precision for precision in options.precisions if precision != "fp32"]
    _write_variants(smaller, checkpoint, directory)
    _write_adapters(sources.adapters, directory)
    _write_settings(checkpoint, directory)
    draft = _manifest(options, sources, directory)
    write_manifest(draft, directory)  # the gate decodes with the runtime, which wants a manifest
    parity = {"fp32": _gate(draft, sources, directory)}
    variants = {name: _judge(name, draft, sources, directory, force=options.force) for name in smaller}
    manifest = dataclasses.replace(draft, parity=parity, variants=variants)
    write_manifest(manifest, directory)
    check_files(manifest, directory)
    return manifest


def _write_variants(precisions: Sequence[str], checkpoint: Checkpoint, directory: Path) -> None:
    from das_asr.export.half import HALF_PRECISIONS, write_half
    from das_asr.export.precision import write_variant

    for precision in precisions:
        _log.info("writing %s", precision)
        if precision in HALF_PRECISIONS:
            write_half(directory, precision, checkpoint.dimensions, directory / precision)
        else:
            write_variant(directory, precision, checkpoint.dimensions)


def _gate(draft: Manifest, sources: _Sources, directory: Path) -> ParityReport:
    from das_asr.export.parity import check_parity
    from das_asr.export.reference import peft_row

    openers = [peft_row(folder) for folder in sources.folders]
    return check_parity(directory, draft, sources.samples, sources.checkpoint.directory, openers)


def _judge(precision: str, draft: Manifest, sources: _Sources, directory: Path, *, force: bool) -> VariantReport:
    _log.info("comparing %s with fp32", precision)
    report = compare_variant(directory, draft, precision, sources.samples, sources.speech)
    try:
        check_variant(precision, report)
    except ParityError as error:
        if not force:
            raise
        warnings.warn(f"Kept because of --force: {error}", stacklevel=1)
    return report


def _graph_metadata(checkpoint: Checkpoint, adapters: Sequence[str]) -> dict[str, str]:
    """Model properties, so that a graph file tells what it is without its bundle."""
    return {
        "das.schema_version": str(SCHEMA_VERSION),
        "das.version": metadata.version("das-asr"),
        "das.base": checkpoint.id,
        "das.base_sha256": checkpoint.sha256,
        "das.adapters": json.dumps(list(adapters)),
        "das.dimensions": json.dumps(dataclasses.asdict(checkpoint.dimensions)),
    }


def _write_adapters(adapters: Sequence[Adapter], directory: Path) -> None:
    (directory / "adapters").mkdir()
    for adapter in adapters:
        path = directory / _adapter_file(adapter.name)
        try:
            save_adapter(adapter, path)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise ExportError(f"{path.name} cannot be written: {error}. Free some space and export again.") from error


def _adapter_file(name: str) -> str:
    return f"adapters/{name}.safetensors"


def _write_settings(checkpoint: Checkpoint, directory: Path) -> None:
    """The small files, under the names that the Hugging Face hub knows them by."""
    (directory / "tokenizer.json").write_text(tokenizer_json(checkpoint), encoding="utf-8")
    _write_json(directory / "generation_config.json", checkpoint.generation_config)
    _write_json(directory / "preprocessor_config.json", _front_end(checkpoint))


def _front_end(checkpoint: Checkpoint) -> dict[str, Any]:
    """What transformers' WhisperFeatureExtractor reads, written anew because a checkpoint may keep it elsewhere."""
    audio = checkpoint.audio
    return {
        "chunk_length": audio.window_samples // audio.sample_rate,
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": checkpoint.dimensions.mels,
        "hop_length": audio.hop_length,
        "n_fft": audio.n_fft,
        "n_samples": audio.window_samples,
        "nb_max_frames": checkpoint.dimensions.frames,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
        "sampling_rate": audio.sample_rate,
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- The manifest ---


def _manifest(options: ExportOptions, sources: _Sources, directory: Path) -> Manifest:
    """The manifest of the files in `directory`, still without a parity report."""
    checkpoint = sources.checkpoint
    files = dict(_hashes(directory))
    return Manifest(
        schema_version=SCHEMA_VERSION,
        base=BaseModel(checkpoint.id, checkpoint.revision, checkpoint.sha256),
        dimensions=checkpoint.dimensions,
        audio=checkpoint.audio,
        tokens=special_tokens(directory / "tokenizer.json", checkpoint.generation_config, checkpoint.config),
        adapters=tuple(_entry(adapter, files[_adapter_file(adapter.name)]) for adapter in sources.adapters),
        rule=options.rule,
        tau=options.tau,
        suppress_tokens=checkpoint.suppress_tokens,
        begin_suppress_tokens=checkpoint.begin_suppress_tokens,
        precisions=options.precisions,
        opset=opset(),
        tools=_tools(),
        parity={},
        files=files,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _entry(adapter: Adapter, sha256: str) -> AdapterEntry:
    return AdapterEntry(
        name=adapter.name,
        rank=adapter.rank,
        scale=adapter.scale,
        target_modules=adapter.target_modules,
        sha256=sha256,
        base_model=adapter.base_model,
        lineage=adapter.lineage,
    )


def _hashes(directory: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name != MANIFEST_NAME:
            yield name, sha256_of(path)


def _tools() -> dict[str, str]:
    """Versions of everything that had a part in the bundle; ONNX Runtime has several distributions of one module."""
    import onnxruntime

    versions = {name: metadata.version(name) for name in _TOOLS}
    return dict(sorted((versions | {"onnxruntime": onnxruntime.__version__}).items()))
