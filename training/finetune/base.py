"""The base to train: a local Hugging Face folder or a hub id -> sizes, front end, tokenizer, hash and model.

base = load_base("openai/whisper-base")
model = base.load_model()      # WhisperForConditionalGeneration in float32
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from das_asr.runtime.errors import CheckpointError
from das_asr.runtime.manifest import AudioFrontEnd, Dimensions, SpecialTokens
from das_asr.runtime.tensor_file import TensorFile
from das_asr.runtime.tokenizer import Tokenizer, special_tokens

__all__ = ["FRONT_END_FILES", "TOKENIZER_FILES", "Base", "load_base"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "normalizer.json",
    "added_tokens.json",
    "special_tokens_map.json",
)
FRONT_END_FILES = ("preprocessor_config.json", "processor_config.json")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DOWNLOADS = (
    *("config.json", "generation_config.json", *FRONT_END_FILES, *TOKENIZER_FILES),
    *(_SINGLE, _INDEX, "model-*-of-*.safetensors"),
)
_SIZES = {
    "mels": "num_mel_bins",
    "audio_positions": "max_source_positions",
    "text_positions": "max_target_positions",
    "vocabulary": "vocab_size",
    "d_model": "d_model",
    "encoder_layers": "encoder_layers",
    "encoder_heads": "encoder_attention_heads",
    "encoder_ffn": "encoder_ffn_dim",
    "decoder_layers": "decoder_layers",
    "decoder_heads": "decoder_attention_heads",
    "decoder_ffn": "decoder_ffn_dim",
}


@dataclass(frozen=True)
class Base:
    """A Whisper checkpoint that can be trained; its weights are read on demand."""

    id: str  # directory or hub id, as given
    directory: Path
    dimensions: Dimensions
    front_end: AudioFrontEnd
    config: dict[str, Any]
    generation_config: dict[str, Any]
    special: SpecialTokens
    tensors: Mapping[str, TensorFile]  # name as `WhisperForConditionalGeneration` spells it -> file that holds it

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the weights as bundles record it, independent of how they are split into files.

        Over all tensors in the order of their names: the line `name dtype shape` (shape as `2x3`), then the bytes as
        stored. Names are those of `WhisperForConditionalGeneration`.
        """
        return self._hash("")

    @cached_property
    def encoder_sha256(self) -> str:
        """The same over the encoder alone."""
        return self._hash("model.encoder.")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Text to ids and back."""
        return Tokenizer(json.loads(_tokenizer_json(self.directory)), self.special)

    def load_model(self) -> Any:
        """The `WhisperForConditionalGeneration` in float32, in training form: eager attention, no cache.

        On a CPU the backward pass of eager attention takes half the time of `scaled_dot_product_attention`'s.
        """
        import torch
        from transformers import WhisperForConditionalGeneration

        from das_asr.training.finetune.noise import quiet_libraries

        with quiet_libraries():
            model = WhisperForConditionalGeneration.from_pretrained(
                self.directory, dtype=torch.float32, attn_implementation="eager", local_files_only=True
            )
        model.config.use_cache = False
        return model

    def _hash(self, prefix: str) -> str:
        digest = hashlib.sha256()
        for name in sorted(name for name in self.tensors if name.startswith(prefix)):
            file = self.tensors[name]
            stored = name if name in file.entries else name.removeprefix("model.")
            entry = file.entries[stored]
            digest.update(f"{name} {entry.dtype} {'x'.join(map(str, entry.shape))}\n".encode())
            for chunk in file.chunks(stored):
                digest.update(chunk)
        return digest.hexdigest()


def load_base(id_or_dir: str | Path, revision: str | None = None) -> Base:
    """Opens a base and checks what training relies on; no weight is read yet.

    Args:
        id_or_dir: a Hugging Face folder, or else a hub id, which is downloaded or taken from the local cache.
        revision: branch, tag or commit of a hub id.

    Raises:
        CheckpointError: it cannot be found or is not a complete Whisper checkpoint.
    """
    directory = Path(id_or_dir) if Path(id_or_dir).is_dir() else _download(str(id_or_dir), revision)
    config = _read_json(directory / "config.json")
    dims = _dimensions(config, directory)
    generation = directory / "generation_config.json"
    generation_config = _read_json(generation) if generation.is_file() else {}
    return Base(
        id=str(id_or_dir),
        directory=directory,
        dimensions=dims,
        front_end=_front_end(directory, dims),
        config=config,
        generation_config=generation_config,
        special=_special(directory, generation_config, config),
        tensors=_open_tensors(directory),
    )


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    transport: Any = HfHubHTTPError.__base__  # of whichever HTTP client this version of the library uses
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(_DOWNLOADS)))
    except (HFValidationError, LocalEntryNotFoundError, transport, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{repository} is neither a folder nor a checkpoint that the hub or its local cache gives ({reason}). "
            "Check the path or name."
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as JSON ({error}). Give the folder of a Hugging Face Whisper checkpoint."
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, expected a JSON object. Save it again.")
    return data


def _dimensions(config: Mapping[str, Any], directory: Path) -> Dimensions:
    if (kind := config.get("model_type")) != "whisper":
        raise CheckpointError(f"{directory}: model_type is {kind!r}, only 'whisper' can be trained here.")
    sizes = {field: config.get(name) for field, name in _SIZES.items()}
    for field, size in sizes.items():
        if type(size) is not int or size < 1:
            raise CheckpointError(f"{directory}: {_SIZES[field]} in config.json is {size!r}, expected at least 1.")
    return Dimensions(**sizes)  # type: ignore[arg-type]


def _front_end(directory: Path, dims: Dimensions) -> AudioFrontEnd:
    given: Any = None
    for name in FRONT_END_FILES:
        if (directory / name).is_file():
            given = _read_json(directory / name)
            given = given.get("feature_extractor") if name.startswith("processor") else given
            break
    fields = ("sampling_rate", "n_fft", "hop_length", "chunk_length", "feature_size")
    if not isinstance(given, dict) or any(type(given.get(field)) is not int for field in fields):
        raise CheckpointError(
            f"{directory} has no preprocessor_config.json with {', '.join(fields)}. Copy it from the base's origin."
        )
    samples = given["chunk_length"] * given["sampling_rate"]
    if (given["feature_size"], samples) != (dims.mels, dims.frames * given["hop_length"]):
        raise CheckpointError(
            f"{directory}: preprocessor_config.json describes {given['feature_size']} mel bins and a window of "
            f"{given['chunk_length']} s, config.json asks for {dims.mels} bins and {dims.frames} frames. They do not "
            "belong together."
        )
    return AudioFrontEnd(given["sampling_rate"], given["n_fft"], given["hop_length"], samples)


def _special(directory: Path, generation: Mapping[str, Any], config: Mapping[str, Any]) -> SpecialTokens:
    with tempfile.NamedTemporaryFile("w", suffix="-tokenizer.json", encoding="utf-8") as file:
        file.write(_tokenizer_json(directory))
        file.flush()
        return special_tokens(file.name, generation, config)


def _tokenizer_json(directory: Path) -> str:
    """Text of tokenizer.json; made from vocab.json and merges.txt where there is none."""
    path = directory / "tokenizer.json"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if not all((directory / name).is_file() for name in ("vocab.json", "merges.txt")):
        raise CheckpointError(f"{directory} has no tokenizer.json, nor vocab.json and merges.txt. Copy them there.")
    from transformers import WhisperTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

    tokenizer = WhisperTokenizerFast.from_pretrained(directory, local_files_only=True)
    return str(tokenizer.backend_tokenizer.to_str())


def _open_tensors(directory: Path) -> dict[str, TensorFile]:
    if (directory / _SINGLE).is_file():
        paths = [directory / _SINGLE]
    elif (directory / _INDEX).is_file():
        names = set(_read_json(directory / _INDEX).get("weight_map", {}).values())
        paths = [directory / name for name in sorted(names)]
    else:
        raise CheckpointError(
            f"{directory} has no {_SINGLE}. Pickled weights can run code; convert them once with "
            "WhisperForConditionalGeneration.from_pretrained(...).save_pretrained(...)."
        )
    files = [TensorFile.open(path, CheckpointError, "Copy or download it again.") for path in paths]
    return {_canonical(name): file for file in files for name in file.entries}


def _canonical(name: str) -> str:
    """`WhisperModel` alone saves without the prefix that `WhisperForConditionalGeneration` gives."""
    return f"model.{name}" if name.startswith(("encoder.", "decoder.")) else name
