"""Hugging Face tokenizer files of real Whisper vocabularies, built from the ranks that openai-whisper ships.

The layout is that of the openai/whisper-* checkpoints: the text tokens, then `<|endoftext|>`, `<|startoftranscript|>`,
the languages, the tasks and the rest, then 1501 timestamps that are declared as ordinary tokens.
"""

from __future__ import annotations

import base64
import functools
import importlib.metadata
import itertools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Whisper's languages in the order of their tokens; "yue" came with large-v3.
_CODES = """
en zh de es ru ko fr ja pt tr pl ca nl ar sv it id hi fi vi he uk el ms cs ro da hu ta no th ur hr bg lt la mi ml cy
sk te fa lv bn sr az sl kn et mk br eu is hy ne mn bs kk sq sw gl mr pa si km sn yo so af oc ka be tg sd gu am yi lo
uz fo ht ps tk nn mt sa lb my bo tl mg as tt haw ln ha ba jw su yue
"""
LANGUAGES = _CODES.split()

PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


@dataclass(frozen=True)
class Vocabulary:
    """One of the three vocabularies that Whisper checkpoints use."""

    asset: str  # .tiktoken file of openai-whisper
    languages: int
    no_speech: str
    multilingual: bool

    @functools.cached_property
    def ranks(self) -> dict[bytes, int]:
        """Text token -> id."""
        files = importlib.metadata.files("openai-whisper") or []
        path = next(Path(str(file.locate())) for file in files if file.name == f"{self.asset}.tiktoken")
        lines = (line.split() for line in path.read_bytes().splitlines() if line)
        return {base64.b64decode(token): int(rank) for token, rank in lines}

    @functools.cached_property
    def specials(self) -> dict[str, int]:
        """Special token or timestamp -> id."""
        contents = [
            *("<|endoftext|>", "<|startoftranscript|>"),
            *(f"<|{code}|>" for code in LANGUAGES[: self.languages]),
            *(
                "<|translate|>",
                "<|transcribe|>",
                "<|startoflm|>",
                "<|startofprev|>",
                self.no_speech,
                "<|notimestamps|>",
            ),
            *(f"<|{step * 0.02:.2f}|>" for step in range(1501)),
        ]
        return {content: len(self.ranks) + offset for offset, content in enumerate(contents)}

    @property
    def size(self) -> int:
        """Number of ids."""
        return len(self.ranks) + len(self.specials)

    @functools.cached_property
    def directory(self) -> Path:
        """A folder with tokenizer.json, tokenizer_config.json, generation_config.json and config.json."""
        directory = Path(_scratch().name) / f"{self.asset}-{self.languages}"
        directory.mkdir()
        for name, content in {
            "tokenizer.json": self._tokenizer(),
            "tokenizer_config.json": self._tokenizer_config(),
            "generation_config.json": self.generation_config,
            "config.json": self.config,
        }.items():
            (directory / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        return directory

    @property
    def tokenizer_file(self) -> Path:
        """Path of tokenizer.json."""
        return self.directory / "tokenizer.json"

    @property
    def generation_config(self) -> dict[str, Any]:
        """What the checkpoint's generation_config.json says about tokens."""
        common = {
            "decoder_start_token_id": self.specials["<|startoftranscript|>"],
            "eos_token_id": self.specials["<|endoftext|>"],
            "is_multilingual": self.multilingual,
            "no_timestamps_token_id": self.specials["<|notimestamps|>"],
        }
        if not self.multilingual:
            return common
        languages = {f"<|{code}|>": self.specials[f"<|{code}|>"] for code in LANGUAGES[: self.languages]}
        tasks = {task: self.specials[f"<|{task}|>"] for task in ("transcribe", "translate")}
        return {**common, "lang_to_id": languages, "task_to_id": tasks}

    @property
    def config(self) -> dict[str, Any]:
        """What the checkpoint's config.json says about tokens."""
        return {"model_type": "whisper", "vocab_size": self.size}

    def _tokenizer(self) -> dict[str, Any]:
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [_added(content, token) for content, token in self.specials.items()],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": self._post_processor(),
            "decoder": {**byte_level, "add_prefix_space": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "byte_fallback": False,
                "vocab": {printable(token): rank for token, rank in self.ranks.items()},
                "merges": [[printable(left), printable(right)] for left, right in merges(self.ranks)],
            },
        }

    def _post_processor(self) -> dict[str, Any]:
        prefix, end = ["<|startoftranscript|>", "<|notimestamps|>"], "<|endoftext|>"
        tokens = {name: {"id": name, "ids": [self.specials[name]], "tokens": [name]} for name in sorted([*prefix, end])}
        single = [
            *({"SpecialToken": {"id": name, "type_id": 0}} for name in prefix),
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": end, "type_id": 0}},
        ]
        return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": tokens}

    def _tokenizer_config(self) -> dict[str, Any]:
        ends = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>")
        special = [content for content in self.specials if not _is_timestamp(content)]
        return {"tokenizer_class": "WhisperTokenizer", "additional_special_tokens": special, **ends}


MULTILINGUAL = Vocabulary("multilingual", 99, "<|nocaptions|>", multilingual=True)
MULTILINGUAL_V3 = Vocabulary("multilingual", 100, "<|nospeech|>", multilingual=True)
ENGLISH = Vocabulary("gpt2", 99, "<|nocaptions|>", multilingual=False)


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge rules, in order, that make each token of several bytes out of two earlier ones."""
    return [_halves(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]


def printable(token: bytes) -> str:
    """Bytes as byte-level BPE files write them."""
    return token.decode("latin-1").translate(_alphabet())


def _halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Merges the bytes of a token with all the rules before its own; two parts are left."""
    parts = [token[index : index + 1] for index in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
        best = min(range(len(joined)), key=joined.__getitem__)
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def _added(content: str, token: int) -> dict[str, Any]:
    timestamp = _is_timestamp(content)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": timestamp, "special": not timestamp}
    return {"id": token, "content": content, **flags}


def _is_timestamp(content: str) -> bool:
    return content[2].isdigit()


@functools.cache
def _alphabet() -> dict[int, int]:
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: 0x100 + place for place, byte in enumerate(hidden)}


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """Lives as long as the process; removed with it."""
    return tempfile.TemporaryDirectory(prefix="das-vocabularies-")
