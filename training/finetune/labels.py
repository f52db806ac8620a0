"""Transcripts to labels: what the decoder has to write after `<|startoftranscript|>`.

    <|startoftranscript|> [<|language|> <|task|>] <|notimestamps|> text ... <|endoftext|>

The labels are this sequence without its first token, and the decoder's inputs are it without its last one:
`WhisperForConditionalGeneration` makes the inputs from the labels by putting the start token in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from das_asr.runtime.errors import DataError
from das_asr.training.finetune.base import Base

__all__ = ["IGNORED", "encode", "prefers_leading_space"]

IGNORED = -100
"""Label of a position that has no part in the loss."""


def encode(base: Base, text: str, language: str | None, task: str, *, leading_space: bool) -> list[int]:
    """Labels of one transcript.

    Raises:
        DataError: it is longer than the decoder's history.
        OptionError: the base does not know the language or the task.
    """
    prompt, _ = base.tokenizer.prompt(language, task, None, 0)
    content = base.tokenizer.encode(f"{' ' if leading_space else ''}{text.strip()}")
    labels = [*prompt[1:], *content, base.tokenizer.special.end_of_text]
    if len(labels) > (limit := base.dimensions.text_positions):
        raise DataError(f"its transcript takes {len(labels)} tokens, the decoder has room for {limit}")
    return labels


def prefers_leading_space(
    model: Any, base: Base, encoded: Any, texts: Sequence[str], languages: Sequence[str | None], task: str
) -> bool:
    """Whether the base finds transcripts that begin with a space likelier than the same ones without.

    Checkpoints differ in it, and a wrong choice is the first thing that fine-tuning would have to unlearn.

    Args:
        model: the base's `WhisperForConditionalGeneration`.
        base: the same.
        encoded: the encoder's outputs float32 [n, S, D].
        texts: n transcripts.
        languages: of each.
        task: as in `encode`.
    """
    import torch

    total = {True: 0.0, False: 0.0}
    with torch.no_grad():
        for row, text, language in zip(encoded, texts, languages, strict=True):
            for spaced in total:
                labels = torch.tensor([encode(base, text, language, task, leading_space=spaced)], device=row.device)
                loss = model(encoder_outputs=(row[None],), labels=labels).loss
                total[spaced] += float(loss) * labels.shape[1]  # of the whole transcript, not per token
    return total[True] < total[False]
