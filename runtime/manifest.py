"""The bundle's manifest: frozen dataclasses, their JSON form, and the checks made before anything is loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from das_asr.runtime.errors import BundleError, OptionError

__all__ = [
    "MANIFEST_NAME",
    "SCHEMA_VERSION",
    "AdapterEntry",
    "AudioFrontEnd",
    "BaseModel",
    "Dimensions",
    "EngineEntry",
    "Manifest",
    "ParityReport",
    "SpecialTokens",
    "VariantReport",
    "check_files",
    "from_plain",
    "read_manifest",
    "sha256_of",
    "write_manifest",
]

SCHEMA_VERSION = 3
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class Dimensions:
    """Every size of the network, from the checkpoint's config; nothing is typed in twice."""

    mels: int
    audio_positions: int  # S: encoder positions of one window, half the mel frames
    text_positions: int
    vocabulary: int
    d_model: int
    encoder_layers: int
    encoder_heads: int
    encoder_ffn: int
    decoder_layers: int
    decoder_heads: int
    decoder_ffn: int

    @property
    def frames(self) -> int:
        """Mel frames of one window: the second convolution has stride 2."""
        return 2 * self.audio_positions

    @property
    def head_size(self) -> int:
        """Width d of one decoder head."""
        return self.d_model // self.decoder_heads


@dataclass(frozen=True)
class AudioFrontEnd:
    """How audio becomes features; from the checkpoint's `preprocessor_config.json`."""

    sample_rate: int  # Hz
    n_fft: int  # samples
    hop_length: int  # samples
    window_samples: int  # one model window; a multiple of hop_length

    @property
    def window_seconds(self) -> float:
        """Length of one model window in seconds."""
        return self.window_samples / self.sample_rate


@dataclass(frozen=True)
class BaseModel:
    """The base checkpoint a bundle was made from."""

    id: str  # directory name or hub id, as given
    revision: str | None  # hub commit, None for a local directory
    sha256: str  # of the weights, see `export.checkpoint`


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that steer the decoder; None where a checkpoint has none."""

    end_of_text: int
    start_of_transcript: int
    start_of_previous: int | None
    no_timestamps: int | None
    no_speech: int | None
    transcribe: int | None
    translate: int | None
    languages: dict[str, int]  # code ("en") -> id; empty for English-only models
    first_timestamp: int | None  # ids from here to the end of the vocabulary are timestamps


@dataclass(frozen=True)
class AdapterEntry:
    """One adapter of a bundle."""

    name: str
    rank: int  # largest rank of its modules
    scale: float  # alpha / r or alpha / sqrt(r); already folded into the stored B
    target_modules: tuple[str, ...]  # e.g. "self_attn.q_proj"
    sha256: str  # of adapters/<name>.safetensors
    base_model: str | None  # what the checkpoint says it was trained on
    lineage: dict[str, str] = field(default_factory=dict)  # free-form provenance carried by the checkpoint


@dataclass(frozen=True)
class ParityReport:
    """What the parity gate measured, see `export.parity`."""

    max_logit_difference: float  # absolute, over every row, utterance and step
    mean_logit_difference: float
    largest_logit: float  # absolute; differences are judged relative to it
    tolerance: float  # relative
    adapter_effects: dict[str, float]  # adapter -> largest absolute logit difference to the base
    steps: int
    tokens_compared: int
    tokens_differing: int  # accepted only where the reference's own margin is below the tolerance
    rules: tuple[str, ...]


@dataclass(frozen=True)
class VariantReport:
    """How a precision variant differs from float32, see `export.variants`."""

    tokens_compared: int  # that float32 wrote, on all rows of all sample clips
    tokens_differing: int  # insertions, deletions and substitutions
    words: int  # of the labelled speech; 0 without any
    wer: float | None  # as a fraction
    wer_fp32: float | None
    not_compared: str | None = None  # why there was no comparison; the figures then say nothing

    @property
    def disagreement(self) -> float:
        """Share of the tokens that differ."""
        return self.tokens_differing / max(1, self.tokens_compared)


@dataclass(frozen=True)
class EngineEntry:
    """A pair of compiled graphs in `engines/<name>`; `engine.json` beside them says what they were built for."""

    files: dict[str, str]  # path in that folder -> sha256; checked when the engine is used, not at every load
    verified: bool  # whether it has run on a GPU and wrote what float32 writes
    report: VariantReport | None  # what was measured then


@dataclass(frozen=True)
class Manifest:
    """All that the runtime must know about a bundle before it opens a graph."""

    schema_version: int
    base: BaseModel
    dimensions: Dimensions
    audio: AudioFrontEnd
    tokens: SpecialTokens
    adapters: tuple[AdapterEntry, ...]
    rule: str  # default selection rule
    tau: float  # probability units, paper Eq. 3
    suppress_tokens: tuple[int, ...]
    begin_suppress_tokens: tuple[int, ...]
    precisions: tuple[str, ...]  # the first is the runtime's default
    opset: int
    tools: dict[str, str]  # package -> version
    parity: dict[str, ParityReport]  # precision -> report
    files: dict[str, str]  # relative POSIX path -> sha256
    created: str  # UTC, ISO 8601
    variants: dict[str, VariantReport] = field(default_factory=dict)  # precision -> report, for all but fp32
    engines: dict[str, EngineEntry] = field(default_factory=dict)  # name -> engine, see `backends.engine_files`

    def graphs(self, directory: Path, precision: str | None) -> Path:
        """The folder with the graphs of a precision; None is the default.

        Raises:
            OptionError: the bundle does not have it.
        """
        chosen = precision or self.precisions[0]
        if chosen not in self.precisions:
            raise OptionError(
                f"precision is {chosen!r}; {directory} has {', '.join(self.precisions)}. "
                f"Export it again with --precision {','.join([*self.precisions, chosen])}."
            )
        return directory if chosen == "fp32" else directory / chosen

    @property
    def rows(self) -> int:
        """R = K + 1."""
        return len(self.adapters) + 1


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as lower-case hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_manifest(manifest: Manifest, directory: Path) -> None:
    """Writes or replaces `manifest.json`, whole or not at all; call it last, a folder without it is not a bundle."""
    text = json.dumps(dataclasses.asdict(manifest), indent=2, ensure_ascii=False)
    partial = directory / f".{MANIFEST_NAME}.partial"
    try:
        with partial.open("w", encoding="utf-8") as handle:
            handle.write(text + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(directory / MANIFEST_NAME)
    finally:
        partial.unlink(missing_ok=True)


def read_manifest(directory: Path) -> Manifest:
    """Reads and checks `manifest.json`.

    Raises:
        BundleError: not a bundle, another schema version, or a field that is missing, unknown or of a wrong type.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise BundleError(f"{directory} is not a bundle: it has no {MANIFEST_NAME}. Make one with `das-export onnx`.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is not valid JSON ({error}). Export the bundle again.") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {version!r}, this runtime reads version {SCHEMA_VERSION}. "
            "Export the bundle again with this version of das-asr."
        )
    try:
        return from_plain(Manifest, data, MANIFEST_NAME)
    except (TypeError, ValueError) as error:
        raise BundleError(f"{path} does not fit schema version {SCHEMA_VERSION}: {error}. Export it again.") from error


def check_files(manifest: Manifest, directory: Path) -> None:
    """Compares every file of a bundle with the hash in its manifest.

    Raises:
        BundleError: a file is missing, lies outside the bundle, or was changed.
    """
    root = directory.resolve()
    for name, expected in manifest.files.items():
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise BundleError(f"{directory}: the manifest names {name!r}, outside the bundle. Do not use this bundle.")
        if not path.is_file():
            raise BundleError(f"{directory}: {name} is missing. Copy the whole bundle, or export it again.")
        if sha256_of(path) != expected:
            raise BundleError(f"{directory}: {name} differs from the hash in {MANIFEST_NAME}. Copy or export it again.")


T = TypeVar("T")


def from_plain(cls: type[T], data: object, where: str) -> T:
    """Makes a frozen dataclass from plain JSON, refusing unknown, missing and mistyped fields."""
    if not isinstance(data, dict):
        raise TypeError(f"{where} must be an object, not {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(data.keys() - fields.keys()):
        raise ValueError(f"{where} has unknown field(s) {', '.join(unknown)}")
    optional = {
        name
        for name, item in fields.items()
        if item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING
    }
    if missing := sorted(fields.keys() - data.keys() - optional):
        raise ValueError(f"{where} lacks field(s) {', '.join(missing)}")
    return cls(**{name: _convert(hints[name], value, f"{where}.{name}") for name, value in data.items()})


def _convert(hint: Any, value: object, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_plain(typing.cast("type[Any]", hint), value, where)
    if origin is types.UnionType:
        return None if value is None else _convert(arguments[0], value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _convert(arguments[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(hint, type) or not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise TypeError(f"{where} must be {hint}, not {value!r}")
    return value
