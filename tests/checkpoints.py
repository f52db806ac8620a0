"""Small random Whisper checkpoints and PEFT adapters for the tests, made with transformers and PEFT themselves.

    base = make_base(tmp_path / "base", decoder_layers=2)
    adapter = make_adapter(base, tmp_path / "music", rank=4, rslora=True)

The weights are random but large enough that greedy tokens vary with the audio, and that an adapter changes them.
"""

from __future__ import annotations

import contextlib
import json
import string
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any

DECODER_TARGETS = r"model\.decoder\.layers\.\d+\.(self_attn|encoder_attn)\.(q_proj|v_proj)"
LANGUAGES = ("en", "de", "fr")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences what transformers and PEFT say about themselves, and their progress bars."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            for module in ("transformers", "peft", "torch", "huggingface_hub"):
                warnings.filterwarnings("ignore", module=rf"{module}(\..*)?")
            yield
    finally:
        if bars:
            logging.enable_progress_bar()


# --- Tokenizer ---


def byte_alphabet() -> list[str]:
    """The 256 printable characters by which byte-level BPE writes bytes, in the order of Whisper's vocabulary."""
    from tokenizers.pre_tokenizers import ByteLevel

    printable = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))]
    return printable + sorted(set(ByteLevel.alphabet()) - set(printable))


def special_tokens(seconds: int, timestamps: bool = True) -> tuple[list[str], list[str]]:
    """The control tokens and the timestamp tokens, in the order of real Whisper vocabularies."""
    control = ["<|endoftext|>", "<|startoftranscript|>", *(f"<|{language}|>" for language in LANGUAGES)]
    control += ["<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>"]
    control += ["<|notimestamps|>"]
    return control, [f"<|{step / 50:.2f}|>" for step in range(seconds * 50 + 1)] if timestamps else []


def make_tokenizer(directory: Path, seconds: int, vocabulary: int | None, timestamps: bool) -> dict[str, int]:
    """Writes `tokenizer.json` and `tokenizer_config.json`; returns all tokens with their ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    control, times = special_tokens(seconds, timestamps)
    alphabet = byte_alphabet()
    fixed = len(alphabet) + len(control) + len(times)
    wanted = fixed + 40 if vocabulary is None else vocabulary
    if wanted < fixed:
        raise ValueError(f"vocabulary={wanted} is below the {fixed} tokens that bytes and special tokens need")
    merges = list(islice(product("\u0120" + string.ascii_lowercase, string.ascii_lowercase), wanted - fixed))
    if len(merges) < wanted - fixed:
        raise ValueError(f"vocabulary={wanted} is above the {fixed + len(merges)} tokens that this helper can make")
    texts = {token: index for index, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=texts, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in times])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "WhisperTokenizer",
        "add_prefix_space": False,
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": 1024,
    }
    _write_json(directory / "tokenizer_config.json", settings)
    return {str(token): int(index) for token, index in tokenizer.get_vocab().items()}


# --- The base ---


def make_base(
    directory: Path,
    *,
    encoder_layers: int = 2,
    decoder_layers: int = 2,
    d_model: int = 64,
    heads: int = 4,
    encoder_heads: int | None = None,
    ffn: int | None = None,
    mels: int = 80,
    seconds: int = 8,
    text_positions: int = 64,
    vocabulary: int | None = None,
    multilingual: bool = True,
    timestamps: bool = True,
    suppress_tokens: Sequence[int] | None = (1, 2, 7),
    begin_suppress_tokens: Sequence[int] | None = None,
    dtype: str = "float32",
    shard: str | None = None,
    seed: int = 0,
) -> Path:
    """Writes a complete checkpoint in the layout of the Hugging Face hub and returns its folder.

    Args:
        directory: made if need be.
        encoder_heads, ffn: as the decoder's and 4 D without them.
        seconds: length of one window.
        vocabulary: its size; without it as large as 40 merges need.
        multilingual: False gives the generation config of an English-only checkpoint (the language tokens stay).
        timestamps: whether the vocabulary ends with timestamp tokens.
        suppress_tokens: ids for generation_config.json; None leaves them out.
        begin_suppress_tokens: the same for the first token; None means a blank and end-of-text, as in real checkpoints.
        dtype: "float32", "float16" or "bfloat16".
        shard: largest shard, e.g. "200KB"; None writes one file.
    """
    import torch
    from transformers import WhisperForConditionalGeneration

    directory.mkdir(parents=True, exist_ok=True)
    tokens = make_tokenizer(directory, seconds, vocabulary, timestamps)
    sizes = {"encoder_layers": encoder_layers, "decoder_layers": decoder_layers, "d_model": d_model}
    sizes |= {"encoder_attention_heads": encoder_heads or heads, "decoder_attention_heads": heads}
    sizes |= {"encoder_ffn_dim": ffn or 4 * d_model, "decoder_ffn_dim": ffn or 4 * d_model, "num_mel_bins": mels}
    sizes |= {"max_source_positions": seconds * 50, "max_target_positions": text_positions}
    config = _config(tokens, **sizes)
    with quiet():
        model = _random_model(WhisperForConditionalGeneration, config, seed)
        options = {} if shard is None else {"max_shard_size": shard}
        model.to(getattr(torch, dtype)).save_pretrained(directory, **options)
    generation = generation_settings(tokens, multilingual, timestamps) | {"max_length": text_positions}
    if suppress_tokens is not None:
        generation["suppress_tokens"] = list(suppress_tokens)
    first = (tokens["\u0120"], tokens["<|endoftext|>"]) if begin_suppress_tokens is None else begin_suppress_tokens
    _write_json(directory / "generation_config.json", generation | {"begin_suppress_tokens": list(first)})
    _write_json(directory / "preprocessor_config.json", front_end(mels, seconds))
    return directory


def _config(tokens: dict[str, int], **sizes: int) -> Any:
    from transformers import WhisperConfig

    end = tokens["<|endoftext|>"]
    return WhisperConfig(
        vocab_size=len(tokens),
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=tokens["<|startoftranscript|>"],
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **sizes,
    )


def _random_model(cls: Any, config: Any, seed: int) -> Any:
    """A model whose residual branches outweigh its embeddings, so that tokens depend on the audio and the history."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    model = cls(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "encoder.embed_positions" in name:  # sinusoids, fixed in every Whisper
                continue
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(noise * 0.1 + (1.0 if name.endswith("weight") else 0.0))
            elif name.endswith("bias"):
                weight.copy_(noise * 0.1)
            elif "embed_tokens" in name:
                weight.copy_(noise * 0.3)  # also the output layer: logits get a standard deviation of 0.3 sqrt(D)
            elif "embed_positions" in name:
                weight.copy_(noise)
            else:
                # Sharp attention picks single frames and tokens; averages of random values would all be alike.
                gain = 3.0 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.5
                weight.copy_(noise * gain / weight[0].numel() ** 0.5)
    return model


def generation_settings(tokens: dict[str, int], multilingual: bool, timestamps: bool) -> dict[str, Any]:
    """What `generation_config.json` holds in the hub's Whisper checkpoints, but for the suppressed tokens."""
    end = tokens["<|endoftext|>"]
    values: dict[str, Any] = {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": tokens["<|startoftranscript|>"],
        "is_multilingual": multilingual,
        "no_timestamps_token_id": tokens["<|notimestamps|>"],
        "prev_sot_token_id": tokens["<|startofprev|>"],
        "return_timestamps": False,
    }
    if multilingual:
        values["lang_to_id"] = {f"<|{language}|>": tokens[f"<|{language}|>"] for language in LANGUAGES}
        values["task_to_id"] = {task: tokens[f"<|{task}|>"] for task in ("transcribe", "translate")}
    if timestamps:
        values["max_initial_timestamp_index"] = 50
    return values


def front_end(mels: int, seconds: int) -> dict[str, Any]:
    """What `preprocessor_config.json` holds."""
    return {
        "chunk_length": seconds,
        "dither": 0.0,
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": mels,
        "hop_length": 160,
        "n_fft": 400,
        "n_samples": seconds * 16000,
        "nb_max_frames": seconds * 100,
        "padding_side": "right",
        "padding_value": 0.0,
        "processor_class": "WhisperProcessor",
        "return_attention_mask": False,
        "sampling_rate": 16000,
    }


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2), encoding="utf-8")


# --- Adapters ---


def make_adapter(
    base: Path,
    directory: Path,
    *,
    rank: int = 4,
    alpha: float = 8,
    rslora: bool = False,
    targets: str | list[str] = DECODER_TARGETS,
    seed: int = 0,
    scale_b: float = 0.3,
    dtype: str = "float32",
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    init: bool | str = True,
    convert: bool = True,
    wrap: str = "WhisperForConditionalGeneration",
    **config: Any,
) -> Path:
    """Writes a PEFT LoRA checkpoint with random, visible weights through PEFT's own `save_pretrained`.

    Args:
        rank, alpha, rslora, targets, init: PEFT's r, lora_alpha, use_rslora, target_modules and init_lora_weights.
        scale_b: standard deviation of B times sqrt(r); 0 makes an adapter that changes nothing.
        dtype: of the saved tensors.
        convert: whether "pissa" and "olora", which change the base, are converted to a plain LoRA when saved.
        wrap: transformers class that PEFT wraps; "WhisperModel" gives other tensor names.
        config: further fields of LoraConfig.
    """
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    with quiet():
        model = getattr(transformers, wrap).from_pretrained(base, dtype=torch.float32)
        patterns = {"rank_pattern": rank_pattern or {}, "alpha_pattern": alpha_pattern or {}}
        settings = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            use_rslora=rslora,
            target_modules=targets,
            init_lora_weights=init,
            **patterns,
            **config,
        )
        peft = get_peft_model(model, settings)
        converted = convert and str(init).startswith(("pissa", "olora"))
        start = directory.parent / f"{directory.name}-start"
        if converted:
            _save_start(peft, start, init)
        _randomise(peft, seed, scale_b, getattr(torch, dtype))
        options = {"path_initial_model_for_weight_conversion": str(start)} if converted else {}
        peft.save_pretrained(directory, **options)
    return directory


def _save_start(peft: Any, directory: Path, init: bool | str) -> None:
    """Saves the adapter as initialised, which the conversion later subtracts; its config must not subtract again."""
    settings = peft.peft_config["default"]
    settings.init_lora_weights = True
    peft.save_pretrained(directory)
    settings.init_lora_weights = init


def _randomise(peft: Any, seed: int, scale_b: float, dtype: Any) -> None:
    """Gives A and B random values; B alone starts as zeros, which would change nothing."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, weight in peft.named_parameters():
        if "lora_A" in name:
            weight.data = (torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5).to(dtype)
        elif name.endswith("lora_B.default.weight"):
            weight.data = (torch.randn(weight.shape, generator=generator) * scale_b / weight.shape[1] ** 0.5).to(dtype)


def edit_config(directory: Path, name: str = "adapter_config.json", **changes: Any) -> Path:
    """Changes fields of a JSON file in place; `...` as value removes the field."""
    path = directory / name
    data = json.loads(path.read_text(encoding="utf-8"))
    data.update(changes)
    _write_json(path, {key: value for key, value in data.items() if value is not ...})
    return directory
