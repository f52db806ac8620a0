"""The base checkpoint, read without torch: a local Hugging Face folder or a hub id -> sizes, settings and weights.

Everything is checked before anything is exported or trained: the configuration, the audio front end, the tokenizer's
presence, and that every tensor of a Whisper of these sizes is there with its shape. Weights stay on disk until
`Checkpoint.weight` asks for one, so that a large checkpoint needs no more memory than its largest tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from das_asr.runtime.errors import CheckpointError
from das_asr.runtime.manifest import AudioFrontEnd, Dimensions
from das_asr.runtime.tensor_file import TensorFile

__all__ = ["FRONT_END_FILES", "TOKENIZER_FILES", "Checkpoint", "expected_tensors", "load_checkpoint", "tokenizer_json"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
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
_DOWNLOADS = (
    *("config.json", "generation_config.json", *FRONT_END_FILES, *TOKENIZER_FILES, _SINGLE, _INDEX),
    "model-*-of-*.safetensors",  # not the `model.fp32-*` copies that some repositories carry as well
)
_FIELDS = {
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
# What the exported graphs compute; a checkpoint that says otherwise is another network.
_FIXED = {"model_type": "whisper", "activation_function": "gelu", "scale_embedding": False}
_EMBEDDING = "model.decoder.embed_tokens.weight"
_OUTPUT = "proj_out.weight"


@dataclass(frozen=True)
class Checkpoint:
    """A Whisper checkpoint that passed every check; its weights are read on demand."""

    id: str  # directory or hub id, as given
    revision: str | None  # hub commit, None for a local directory
    directory: Path
    dimensions: Dimensions
    audio: AudioFrontEnd
    config: dict[str, Any]
    generation_config: dict[str, Any]
    suppress_tokens: tuple[int, ...]
    begin_suppress_tokens: tuple[int, ...]
    tensors: Mapping[str, TensorFile]  # name as `WhisperForConditionalGeneration` spells it -> file that holds it

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the weights, independent of how they are split into files.

        Over all tensors in the order of their names: the line `name dtype shape` (shape as `2x3`), then the bytes as
        stored (little-endian, row-major). Names are those of `WhisperForConditionalGeneration`.
        """
        return self._hash("")

    @cached_property
    def encoder_sha256(self) -> str:
        """The same over the encoder's tensors alone."""
        return self._hash("model.encoder.")

    def has(self, name: str) -> bool:
        """Whether the checkpoint stores this tensor, e.g. `model.decoder.layers.0.fc1.weight`."""
        return name in self.tensors

    def weight(self, name: str) -> npt.NDArray[np.float32]:
        """Reads one tensor as contiguous float32 in its own shape; fp16 and bf16 are widened.

        Raises:
            CheckpointError: there is no such tensor, its dtype is not floating point, or it holds NaN or infinity.
        """
        file = self.tensors.get(name)
        if file is None:
            raise CheckpointError(f"{self.id} has no tensor {name}. Give a complete Whisper checkpoint.")
        return file.read(_stored(name, file), CheckpointError)

    def _hash(self, prefix: str) -> str:
        digest = hashlib.sha256()
        for name in sorted(name for name in self.tensors if name.startswith(prefix)):
            file = self.tensors[name]
            entry = file.entries[_stored(name, file)]
            digest.update(f"{name} {entry.dtype} {'x'.join(map(str, entry.shape))}\n".encode())
            for chunk in file.chunks(_stored(name, file)):
                digest.update(chunk)
        return digest.hexdigest()


def load_checkpoint(id_or_dir: str | Path, revision: str | None = None) -> Checkpoint:
    """Opens a base checkpoint and checks it; no tensor is read yet.

    Args:
        id_or_dir: a Hugging Face folder, or else a hub id, which is downloaded or taken from the local cache.
        revision: branch, tag or commit of a hub id.

    Raises:
        CheckpointError: it cannot be found or downloaded, is incomplete, or is not a Whisper that can be exported.
    """
    directory, commit = _locate(str(id_or_dir), revision)
    config = _read_json(directory / "config.json", "Give the folder of a Hugging Face Whisper checkpoint.")
    dims = _dimensions(config, directory)
    tensors = _open_tensors(directory)
    _check_tensors(tensors, dims, directory)
    _check_output(tensors, config, directory)
    _check_tokenizer(directory)
    generation = directory / "generation_config.json"
    generation_config = _read_json(generation, "Save it again.") if generation.exists() else {}
    # As transformers does: the lists in config.json count only where there is no generation_config.json.
    rules = generation_config if generation.exists() else config
    return Checkpoint(
        id=str(id_or_dir),
        revision=commit,
        directory=directory,
        dimensions=dims,
        audio=_front_end(directory, dims),
        config=config,
        generation_config=generation_config,
        suppress_tokens=_token_list("suppress_tokens", rules, dims, directory),
        begin_suppress_tokens=_token_list("begin_suppress_tokens", rules, dims, directory),
        tensors=tensors,
    )


def tokenizer_json(checkpoint: Checkpoint) -> str:
    """The checkpoint's tokenizer as the text of a `tokenizer.json`; made from vocab.json and merges.txt if need be.

    Raises:
        CheckpointError: the files of the tokenizer are damaged.
    """
    path = checkpoint.directory / "tokenizer.json"
    if path.is_file():
        _read_json(path, "Save the tokenizer again.")
        return path.read_text(encoding="utf-8")
    _check_merges(checkpoint.directory)
    from transformers import WhisperTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

    tokenizer = WhisperTokenizerFast.from_pretrained(checkpoint.directory, local_files_only=True)
    return str(tokenizer.backend_tokenizer.to_str())


def _check_merges(directory: Path) -> None:
    """Finds what the tokenizers library would stumble over without saying which file is meant."""
    vocabulary = _read_json(directory / "vocab.json", "Save the tokenizer again.")
    path = directory / "merges.txt"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). Save the tokenizer again.") from error
    for number, line in enumerate(lines, start=1):
        pair = line.split(" ")
        if not line or line.startswith("#version"):
            continue
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys():
            raise CheckpointError(
                f"{path}: line {number} ({line!r}) must be two tokens of vocab.json whose union is one too. Save the "
                "tokenizer again."
            )


# --- Finding it ---


def _locate(given: str, revision: str | None) -> tuple[Path, str | None]:
    """The folder of the checkpoint, and the commit when it came from the hub."""
    if not Path(given).is_dir():
        directory = _download(given, revision)
        return directory, directory.name
    if revision is not None:
        raise CheckpointError(f"{given} is a local folder, which has no revision {revision!r}. Leave the revision out.")
    return Path(given), None


def _download(repository: str, revision: str | None) -> Path:
    """Brings the needed files of a hub repository into the local cache; returns the folder of that commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # The base class of all errors of whichever HTTP client this version of the hub library uses.
    transport: Any = HfHubHTTPError.__base__
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(_DOWNLOADS)))
    except HFValidationError as error:
        problem, cause = "is neither an existing folder nor a valid hub id. Check the path", error
    except GatedRepoError as error:
        problem, cause = "is gated on the hub. Accept its terms there and log in with `hf auth login`", error
    except RepositoryNotFoundError as error:
        problem, cause = "is neither an existing folder nor a repository you can see on the hub. Check its name", error
    except RevisionNotFoundError as error:
        problem, cause = f"has no revision {revision!r} on the hub. Check the branch, tag or commit", error
    except LocalEntryNotFoundError as error:
        problem, cause = (
            "is not in the local cache, and the hub cannot be reached or refuses. Give a local folder",
            error,
        )
    except (transport, OSError) as error:
        problem, cause = f"cannot be downloaded from the hub ({error}). Try again, or give a local folder", error
    raise CheckpointError(f"{repository} {problem}.") from cause


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}. {remedy}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}). {remedy}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, expected a JSON object. {remedy}")
    return data


# --- Configuration ---


def _dimensions(config: Mapping[str, Any], directory: Path) -> Dimensions:
    for name, expected in _FIXED.items():
        if config.get(name, None if name == "model_type" else expected) != expected:
            raise CheckpointError(
                f"{directory}: {name} is {config.get(name)!r}, only {expected!r} can be exported. Give a Whisper "
                "checkpoint in the Hugging Face layout."
            )
    sizes = {field: config.get(name) for field, name in _FIELDS.items()}
    for field, size in sizes.items():
        if type(size) is not int or size < 1:
            raise CheckpointError(
                f"{directory}: {_FIELDS[field]} in config.json is {size!r}, expected an integer of at least 1."
            )
    dims = Dimensions(**sizes)  # type: ignore[arg-type]
    for side, heads in (("encoder", dims.encoder_heads), ("decoder", dims.decoder_heads)):
        if dims.d_model % heads:
            raise CheckpointError(f"{directory}: d_model {dims.d_model} cannot be split among {heads} {side} heads.")
    return dims


def _token_list(name: str, rules: Mapping[str, Any], dims: Dimensions, directory: Path) -> tuple[int, ...]:
    """Ids that must not be written, without the -1 of old exports and other ids outside the vocabulary."""
    tokens = rules.get(name) or []
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise CheckpointError(f"{directory}: {name} is {tokens!r}, expected a list of token ids or null.")
    return tuple(token for token in tokens if 0 <= token < dims.vocabulary)


def _front_end(directory: Path, dims: Dimensions) -> AudioFrontEnd:
    given, path = _front_end_config(directory)
    for name in ("sampling_rate", "hop_length", "n_fft", "chunk_length", "feature_size"):
        if type(given.get(name)) is not int or given[name] < 1:
            raise CheckpointError(
                f"{path}: {name} is {given.get(name)!r}, expected an integer of at least 1. Copy the base's own file."
            )
    rate, hop, n_fft = given["sampling_rate"], given["hop_length"], given["n_fft"]
    samples = given["chunk_length"] * rate
    facts = (
        ("feature_size", given["feature_size"], "num_mel_bins", dims.mels),
        ("n_samples", given.get("n_samples", samples), "chunk_length * sampling_rate", samples),
        ("frames of one window", samples / hop, "2 * max_source_positions", dims.frames),
        ("nb_max_frames", given.get("nb_max_frames", dims.frames), "2 * max_source_positions", dims.frames),
        ("padding_value", given.get("padding_value", 0), "that of every Whisper", 0),
        ("dither", given.get("dither", 0), "that of every Whisper", 0),
    )
    for name, value, other, expected in facts:
        if value != expected:
            raise CheckpointError(f"{path}: {name} is {value}, but {other} is {expected}. Copy the base's own file.")
    return AudioFrontEnd(sample_rate=rate, n_fft=n_fft, hop_length=hop, window_samples=samples)


def _front_end_config(directory: Path) -> tuple[dict[str, Any], Path]:
    """The feature extractor's settings: a file of their own, or a section of what newer processors save."""
    path = directory / "preprocessor_config.json"
    if path.is_file():
        return _read_json(path, "Copy the base's own."), path
    combined = directory / "processor_config.json"
    section = _read_json(combined, "").get("feature_extractor") if combined.is_file() else None
    if not isinstance(section, dict):
        raise CheckpointError(
            f"{directory} has neither preprocessor_config.json nor a feature_extractor in processor_config.json. Save "
            "it with WhisperProcessor.save_pretrained."
        )
    return section, combined


def _check_tokenizer(directory: Path) -> None:
    if (directory / "tokenizer.json").is_file():
        return
    if not all((directory / name).is_file() for name in ("vocab.json", "merges.txt")):
        raise CheckpointError(
            f"{directory} has no tokenizer.json, nor vocab.json and merges.txt. Save it with "
            "WhisperTokenizerFast.save_pretrained."
        )


# --- Weights ---


def _open_tensors(directory: Path) -> dict[str, TensorFile]:
    """Maps each tensor to the file that holds it, under the name that includes the `model.` prefix."""
    files = [TensorFile.open(path, CheckpointError, "Copy or download it again.") for path in _weight_files(directory)]
    return {_canonical(name): file for file in files for name in file.entries}


def _weight_files(directory: Path) -> list[Path]:
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    if (directory / _INDEX).is_file():
        shards = _read_json(directory / _INDEX, "Copy the checkpoint again.").get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise CheckpointError(f"{directory / _INDEX} has no weight_map. Copy the checkpoint again.")
        return [directory / name for name in sorted(set(shards.values()))]
    found = ", ".join(sorted(path.name for path in directory.glob("pytorch_model*"))) or "no weights"
    raise CheckpointError(
        f"{directory} has no {_SINGLE} (found {found}). Pickled weights can run code; convert them once with "
        "WhisperForConditionalGeneration.from_pretrained(...).save_pretrained(...)."
    )


def _canonical(name: str) -> str:
    """`WhisperModel` alone saves without the prefix that `WhisperForConditionalGeneration` gives."""
    return f"model.{name}" if name.startswith(("encoder.", "decoder.")) else name


def _stored(name: str, file: TensorFile) -> str:
    return name if name in file.entries else name.removeprefix("model.")


def expected_tensors(dims: Dimensions) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor a Whisper of these sizes stores; the output layer is tied to the embedding."""
    width = dims.d_model
    yield "model.encoder.conv1.weight", (width, dims.mels, 3)
    yield "model.encoder.conv1.bias", (width,)
    yield "model.encoder.conv2.weight", (width, width, 3)
    yield "model.encoder.conv2.bias", (width,)
    yield "model.encoder.embed_positions.weight", (dims.audio_positions, width)
    yield _EMBEDDING, (dims.vocabulary, width)
    yield "model.decoder.embed_positions.weight", (dims.text_positions, width)
    for side, layers, ffn, attentions in (
        ("encoder", dims.encoder_layers, dims.encoder_ffn, ("self_attn",)),
        ("decoder", dims.decoder_layers, dims.decoder_ffn, ("self_attn", "encoder_attn")),
    ):
        yield from _norm(f"model.{side}.layer_norm", width)
        for layer in range(layers):
            yield from _layer(f"model.{side}.layers.{layer}", width, ffn, attentions)


def _layer(prefix: str, width: int, ffn: int, attentions: tuple[str, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for attention in attentions:
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{prefix}.{attention}.{projection}.weight", (width, width)
            if projection != "k_proj":
                yield f"{prefix}.{attention}.{projection}.bias", (width,)
        yield from _norm(f"{prefix}.{attention}_layer_norm", width)
    yield f"{prefix}.fc1.weight", (ffn, width)
    yield f"{prefix}.fc1.bias", (ffn,)
    yield f"{prefix}.fc2.weight", (width, ffn)
    yield f"{prefix}.fc2.bias", (width,)
    yield from _norm(f"{prefix}.final_layer_norm", width)


def _norm(prefix: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.weight", (width,)
    yield f"{prefix}.bias", (width,)


def _check_tensors(tensors: Mapping[str, TensorFile], dims: Dimensions, directory: Path) -> None:
    for name, expected in expected_tensors(dims):
        file = tensors.get(name)
        if file is None:
            raise CheckpointError(
                f"{directory}: tensor {name} is missing; config.json asks for it with shape {list(expected)}. Give "
                "a complete WhisperForConditionalGeneration."
            )
        entry = file.entries[_stored(name, file)]
        if entry.shape != expected:
            raise CheckpointError(
                f"{directory}: tensor {name} has shape {list(entry.shape)}, config.json asks for {list(expected)}. The "
                "two files do not belong together."
            )
        if entry.dtype not in ("F32", "F16", "BF16"):
            raise CheckpointError(
                f"{directory}: tensor {name} has dtype {entry.dtype}, expected F32, F16 or BF16. Give the checkpoint "
                "as it was before it was quantised."
            )


def _check_output(tensors: Mapping[str, TensorFile], config: Mapping[str, Any], directory: Path) -> None:
    """The graphs use the token embedding as output layer, so a stored one has to be the same."""
    if (file := tensors.get(_OUTPUT)) is not None:
        tied = _same_tensor(file, _OUTPUT, tensors[_EMBEDDING], _stored(_EMBEDDING, tensors[_EMBEDDING]))
    else:
        tied = config.get("tie_word_embeddings", True) is not False
    if not tied:
        raise CheckpointError(
            f"{directory}: the output layer {_OUTPUT} is not tied to {_EMBEDDING} (tie_word_embeddings "
            f"{config.get('tie_word_embeddings', True)}). Only checkpoints with tied embeddings can be exported."
        )


def _same_tensor(file: TensorFile, name: str, other: TensorFile, other_name: str) -> bool:
    first, second = file.entries[name], other.entries[other_name]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return all(a == b for a, b in zip(file.chunks(name), other.chunks(other_name), strict=True))
