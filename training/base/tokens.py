"""The tiny base's tokenizer: a small byte-level BPE in Whisper's layout, English only, without timestamps."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import WhisperTokenizer

__all__ = ["SPECIAL_TOKENS", "prompt_ids", "token_ids", "train_tokenizer"]

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|en|>",
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
)
_PROMPT = ("<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")


def train_tokenizer(texts: Iterable[str], size: int) -> WhisperTokenizer:
    """Trains `size` merges and bytes on the texts; special tokens follow them, as in OpenAI's vocabularies."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import WhisperTokenizer

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    # Whisper writes a space before every word, the first one too.
    learner.train_from_iterator((f" {text}" for text in texts), trainer)
    model = json.loads(learner.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for token in SPECIAL_TOKENS:
        vocabulary[token] = len(vocabulary)
    return WhisperTokenizer(
        vocab=vocabulary,
        merges=[tuple(pair) for pair in model["merges"]],
        language="en",
        task="transcribe",
        pad_token=SPECIAL_TOKENS[0],
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
    )


def prompt_ids(tokenizer: WhisperTokenizer) -> list[int]:
    """Ids of the tokens before the text."""
    return token_ids(tokenizer, _PROMPT)


def token_ids(tokenizer: WhisperTokenizer, tokens: Iterable[str]) -> list[int]:
    """Ids of special tokens."""
    ids: Any = tokenizer.convert_tokens_to_ids
    return [int(ids(token)) for token in tokens]
