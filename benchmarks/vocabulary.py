"""A placeholder vocabulary: Whisper's special tokens at their true ids, and as many text tokens as asked for.

Layout of the ids, as in the multilingual Whisper models: text tokens, `<|endoftext|>`, `<|startoftranscript|>`, the
languages, `<|translate|>`, `<|transcribe|>`, `<|startoflm|>`, `<|startofprev|>`, `<|nospeech|>`, `<|notimestamps|>`,
and one timestamp per encoder position of the window plus one for its end.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

__all__ = ["WHISPER_LANGUAGES", "Vocabulary", "write_tokenizer"]

# Order is meaning: the n-th code has id 50259 + n in the published checkpoints.
# fmt: off
WHISPER_LANGUAGES = (
    "en", "zh", "de", "es", "ru", "ko", "fr", "ja", "pt", "tr", "pl", "ca", "nl", "ar", "sv", "it", "id", "hi",
    "fi", "vi", "he", "uk", "el", "ms", "cs", "ro", "da", "hu", "ta", "no", "th", "ur", "hr", "bg", "lt", "la",
    "mi", "ml", "cy", "sk", "te", "fa", "lv", "bn", "sr", "az", "sl", "kn", "et", "mk", "br", "eu", "is", "hy",
    "ne", "mn", "bs", "kk", "sq", "sw", "gl", "mr", "pa", "si", "km", "sn", "yo", "so", "af", "oc", "ka", "be",
    "tg", "sd", "gu", "am", "yi", "lo", "uz", "fo", "ht", "ps", "tk", "nn", "mt", "sa", "lb", "my", "bo", "tl",
    "mg", "as", "tt", "haw", "ln", "ha", "ba", "jw", "su",
)
# fmt: on
TIMESTAMPS_PER_SECOND = 50


@dataclass(frozen=True)
class Vocabulary:
    """How many text tokens and which languages; the defaults give the 51865 ids of whisper-base."""

    text_tokens: int = 50_257
    languages: tuple[str, ...] = WHISPER_LANGUAGES

    def specials(self) -> list[str]:
        """Special tokens in the order of their ids, from `<|endoftext|>` to `<|notimestamps|>`."""
        tasks = ["translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps"]
        names = ["endoftext", "startoftranscript", *self.languages, *tasks]
        return [f"<|{name}|>" for name in names]

    def special_ids(self, window_seconds: int) -> dict[str, int]:
        """Special tokens and timestamps with their ids."""
        names = self.specials() + _timestamps(window_seconds)
        return {name: self.text_tokens + offset for offset, name in enumerate(names)}

    def size(self, window_seconds: int) -> int:
        """Ids in all."""
        return self.text_tokens + len(self.special_ids(window_seconds))


def write_tokenizer(folder: Path, vocabulary: Vocabulary, window_seconds: int) -> None:
    """Writes `tokenizer.json` (byte-level BPE without merges) and `tokenizer_config.json`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    text = _text_tokens(vocabulary.text_tokens)
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(text)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in vocabulary.specials()])
    # Published checkpoints declare timestamps as added but not special tokens, so that they can be shown.
    tokenizer.add_tokens([AddedToken(name, special=False) for name in _timestamps(window_seconds)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "WhisperTokenizer",
        "processor_class": "WhisperProcessor",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "add_prefix_space": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _timestamps(window_seconds: int) -> list[str]:
    count = window_seconds * TIMESTAMPS_PER_SECOND + 1
    return [f"<|{index / TIMESTAMPS_PER_SECOND:.2f}|>" for index in range(count)]


def _text_tokens(count: int) -> list[str]:
    """The 256 byte symbols, so that any text can be encoded, then numbered placeholder words."""
    from tokenizers import pre_tokenizers

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    return symbols + [f"Ġw{number}" for number in range(count - len(symbols))]
