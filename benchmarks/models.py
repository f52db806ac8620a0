"""Random Whisper checkpoints and random adapters: real shapes, no download, so that speed can be measured anywhere.

A benchmark of speed needs the true sizes of every tensor, not sensible text. The weights are drawn so that greedy
decoding does not run into one repeated token and the rows disagree: only then do equal tokens of two systems prove
that both compute the same thing.

Everything is written in the layout that `save_pretrained` of transformers and PEFT uses, and cached under
`cache_root()`; a folder there is whole or absent.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from das_asr.benchmarks.vocabulary import Vocabulary, write_tokenizer
from das_asr.runtime.errors import CheckpointError, OptionError

__all__ = [
    "BASE_RANDOM",
    "TARGET_PATTERN",
    "WHISPER_BASE",
    "RandomShape",
    "adapter_folders",
    "cache_root",
    "check_length",
    "is_multilingual",
    "make_adapters",
    "make_checkpoint",
    "prompt_ids",
    "publish",
    "read_json",
    "resolve_model",
]

BASE_RANDOM = "whisper-base-random"
TARGET_PATTERN = r"model\.decoder\.layers\.\d+\.(self_attn|encoder_attn)\.(q_proj|v_proj)"
"""Decoder only: a list of suffixes would also hit the encoder, which all rows share."""

RECIPE = 1  # part of every cache key; raise it when the drawing of weights changes

SAMPLE_RATE = 16_000  # Hz, of every Whisper
HOP = 160  # samples between two mel frames; two frames make one encoder position

# Found by trial: with less, the tied embedding makes the last token win again and again, whatever the audio.
LINEAR_GAIN = 2.0  # standard deviation of linear weights, times the root of d_model
POSITION_SPREAD = 2.0  # standard deviation of the decoder's position embeddings
LOGIT_SPREAD = 4.0  # standard deviation of the logits: the winner is then about as sure as a trained model's
SPECIAL_SHRINK = 1e-3
LORA_SHARE = 0.2  # rms of an update relative to the weight it changes, as seen in trained adapters


@dataclass(frozen=True)
class RandomShape:
    """Sizes of a random Whisper; the defaults are those of whisper-base."""

    d_model: int = 512
    layers: int = 6  # of the encoder and of the decoder
    heads: int = 8
    ffn: int = 2048
    mels: int = 80
    window_seconds: int = 30
    text_positions: int = 448
    vocabulary: Vocabulary = field(default_factory=Vocabulary)

    @property
    def audio_positions(self) -> int:
        """Encoder positions of one window."""
        return self.window_seconds * SAMPLE_RATE // (2 * HOP)


WHISPER_BASE = RandomShape()


def cache_root() -> Path:
    """The user's cache folder of this package, following the XDG convention."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "das-asr"


def resolve_model(name: str, cache: Path | None = None, flag: str = "--model") -> Path:
    """A checkpoint directory: the given one, or the cached random whisper-base; `flag` is the option that named it.

    Raises:
        OptionError: neither a directory nor the name of the random model.
    """
    if name == BASE_RANDOM:
        return make_checkpoint((cache or cache_root()) / f"{BASE_RANDOM}-v{RECIPE}", WHISPER_BASE)
    path = Path(name)
    if not (path / "config.json").is_file():
        raise OptionError(
            f"{flag} {name!r} is neither {BASE_RANDOM!r} nor a Whisper checkpoint directory (no config.json in it). "
            "Give the directory that transformers' save_pretrained wrote."
        )
    return path


def make_checkpoint(directory: Path, shape: RandomShape, seed: int = 0) -> Path:
    """Writes a random checkpoint in the Hugging Face layout, unless it is there already."""
    return publish(directory, lambda folder: _write_checkpoint(folder, shape, seed))


def adapter_folders(checkpoint: Path, rank: int, count: int, cache: Path | None = None) -> list[Path]:
    """Folders of `count` random adapters of one rank for a checkpoint, made in the cache on first use."""
    from das_asr.runtime.manifest import sha256_of

    digest = sha256_of(checkpoint / "config.json")[:8]
    name = f"{checkpoint.name}-{digest}-adapters-v{RECIPE}-r{rank}"
    return make_adapters(checkpoint, (cache or cache_root()) / name, rank, count)


def make_adapters(checkpoint: Path, directory: Path, rank: int, count: int) -> list[Path]:
    """Writes the adapters `domain01`, `domain02`, ... that are not there yet and returns the first `count` folders.

    The seed of each is its number, so that the first three of twenty-five are the same as three of three.
    """
    folders = [directory / f"domain{number:02d}" for number in range(1, count + 1)]
    missing = [folder for folder in folders if not folder.is_dir()]
    if missing:
        model = _load_model(checkpoint)
        for folder in missing:
            seed = int(folder.name.removeprefix("domain"))
            model = _publish_adapter(folder, model, rank, seed)
    return folders


def prompt_ids(checkpoint: Path) -> list[int]:
    """The decoder's prompt for English transcription without timestamps, from the generation config."""
    config = read_json(checkpoint / "generation_config.json")
    start = [int(config["decoder_start_token_id"])]
    if is_multilingual(config):
        start += [config["lang_to_id"]["<|en|>"], config["task_to_id"]["transcribe"]]
    return [*start, int(config["no_timestamps_token_id"])]


def check_length(checkpoint: Path, tokens: int) -> None:
    """Refuses more tokens than fit behind the prompt.

    Raises:
        OptionError: saying how many do.
    """
    longest = int(read_json(checkpoint / "config.json")["max_target_positions"]) - len(prompt_ids(checkpoint))
    if tokens > longest:
        raise OptionError(f"--tokens {tokens}: this model writes at most {longest} after its prompt. Ask for fewer.")


def is_multilingual(generation_config: dict[str, Any]) -> bool:
    """Whether language and task are chosen by tokens of the prompt."""
    return bool(generation_config.get("is_multilingual", "lang_to_id" in generation_config))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint.

    Raises:
        CheckpointError: the file is missing or is not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}). Give a complete checkpoint.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, expected a JSON object.")
    return data


def publish(directory: Path, build: Callable[[Path], None]) -> Path:
    """Builds a folder under a temporary name beside its destination and renames it, unless it is there already."""
    if directory.is_dir():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as scratch:
        folder = Path(scratch) / directory.name
        folder.mkdir()
        build(folder)
        try:
            folder.rename(directory)
        except OSError:
            # Another process was first; both are complete, so either will do.
            if not directory.is_dir():
                raise
    return directory


def _write_checkpoint(folder: Path, shape: RandomShape, seed: int) -> None:
    import torch
    from transformers import WhisperForConditionalGeneration

    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(_config(shape)).eval()
    _spread(model, shape.vocabulary.text_tokens)
    model.save_pretrained(folder)
    write_tokenizer(folder, shape.vocabulary, shape.window_seconds)
    _dump(folder / "generation_config.json", _generation_config(shape))
    _dump(folder / "preprocessor_config.json", _preprocessor_config(shape))


def _config(shape: RandomShape) -> Any:
    from transformers import WhisperConfig

    ids = shape.vocabulary.special_ids(shape.window_seconds)
    end = ids["<|endoftext|>"]
    return WhisperConfig(
        vocab_size=shape.vocabulary.size(shape.window_seconds),
        d_model=shape.d_model,
        encoder_layers=shape.layers,
        decoder_layers=shape.layers,
        encoder_attention_heads=shape.heads,
        decoder_attention_heads=shape.heads,
        encoder_ffn_dim=shape.ffn,
        decoder_ffn_dim=shape.ffn,
        num_mel_bins=shape.mels,
        max_source_positions=shape.audio_positions,
        max_target_positions=shape.text_positions,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=ids["<|startoftranscript|>"],
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )


def _spread(model: Any, text_tokens: int) -> None:
    """Draws the decisive weights anew so that logits are not flat and tokens vary; see the constants above."""
    import torch

    decoder = model.get_decoder()
    embedding, positions = decoder.embed_tokens.weight, decoder.embed_positions.weight
    with torch.no_grad():
        for module in model.modules():
            # The output projection is the embedding itself and is drawn as such.
            if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
                module.weight.normal_(0.0, LINEAR_GAIN * embedding.shape[1] ** -0.5)
        embedding.normal_(0.0, LOGIT_SPREAD * embedding.shape[1] ** -0.5)
        # Special tokens and timestamps never win: systems differ in which of them they suppress.
        embedding[text_tokens:].mul_(SPECIAL_SHRINK)
        positions.normal_(0.0, POSITION_SPREAD)


def _generation_config(shape: RandomShape) -> dict[str, Any]:
    ids = shape.vocabulary.special_ids(shape.window_seconds)
    return {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "decoder_start_token_id": ids["<|startoftranscript|>"],
        "prev_sot_token_id": ids["<|startofprev|>"],
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "is_multilingual": True,
        "lang_to_id": {f"<|{code}|>": ids[f"<|{code}|>"] for code in shape.vocabulary.languages},
        "task_to_id": {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
        "max_initial_timestamp_index": 50,
        "max_length": shape.text_positions,
        "return_timestamps": False,
        "suppress_tokens": [],
        "begin_suppress_tokens": [],
    }


def _preprocessor_config(shape: RandomShape) -> dict[str, Any]:
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "WhisperProcessor",
        "chunk_length": shape.window_seconds,
        "feature_size": shape.mels,
        "hop_length": HOP,
        "n_fft": 400,
        "n_samples": shape.window_seconds * SAMPLE_RATE,
        "nb_max_frames": shape.window_seconds * SAMPLE_RATE // HOP,
        "sampling_rate": SAMPLE_RATE,
        "dither": 0.0,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
    }


def _dump(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _load_model(checkpoint: Path) -> Any:
    from transformers import WhisperForConditionalGeneration

    return WhisperForConditionalGeneration.from_pretrained(checkpoint, local_files_only=True).eval()


def _publish_adapter(folder: Path, model: Any, rank: int, seed: int) -> Any:
    """Draws one adapter, writes it, and hands back the base model without it for the next."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, use_rslora=True, lora_dropout=0.0, bias="none", target_modules=TARGET_PATTERN
    )
    adapted = get_peft_model(model, config).eval()
    _draw(adapted, seed)
    publish(folder, lambda path: adapted.save_pretrained(str(path)))
    return adapted.unload()


def _draw(adapted: Any, seed: int) -> None:
    """Fills A and B of every LoRA layer so that the update's rms is `LORA_SHARE` of the base weight's."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in (module for module in adapted.modules() if hasattr(module, "lora_A")):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            a.normal_(0.0, a.shape[1] ** -0.5, generator=generator)
            b.normal_(0.0, 1.0, generator=generator)
            share = layer.get_base_layer().weight.std() / layer.get_delta_weight("default").std()
            b.mul_(LORA_SHARE * share)
