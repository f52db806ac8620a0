"""Greedy decoding of a batch inside training; imported on demand, for it needs PyTorch.

transformers' own `generate` starts from log-mels and one prompt for all rows. Here the encoder's outputs may come from
the cache, and every row has the prompt of its own labels.
"""

from __future__ import annotations

from typing import Any

import torch

from das_asr.training.finetune.base import Base

__all__ = ["greedy_texts"]


@torch.no_grad()
def greedy_texts(model: Any, batch: dict[str, Any], base: Base) -> list[str]:
    """The most likely token, step by step, until every row has ended or the history is full.

    Args:
        model: a `WhisperForConditionalGeneration`, with or without PEFT, in evaluation mode.
        batch: from `collate`, on the model's device; of the labels only the prompts are used.
        base: its tokenizer and limits.
    """
    labels = batch["labels"]
    rows, end = labels.shape[0], base.tokenizer.special.end_of_text
    start = torch.full((rows, 1), base.tokenizer.special.start_of_transcript, device=labels.device)
    ids = torch.cat([start, labels[:, : _prompt_length(base) - 1]], dim=1)  # [B, prompt]
    suppressed = [token for token in base.generation_config.get("suppress_tokens") or [] if token >= 0]
    given = {name: value for name, value in batch.items() if name != "labels"}
    written: list[Any] = []
    cache: Any = None
    ended = torch.zeros(rows, dtype=torch.bool, device=labels.device)
    while not ended.all() and ids.shape[1] + len(written) < base.dimensions.text_positions:
        latest = ids if cache is None else written[-1][:, None]
        output = model(**given, decoder_input_ids=latest, past_key_values=cache, use_cache=True)
        given = {"encoder_outputs": (output.encoder_last_hidden_state,)}
        cache = output.past_key_values
        scores = output.logits[:, -1].float()
        scores[:, suppressed] = -torch.inf
        token = scores.argmax(dim=-1).masked_fill(ended, end)
        ended |= token == end
        written.append(token)
    texts = torch.stack(written, dim=1).tolist() if written else [[] for _ in range(rows)]
    return [base.tokenizer.decode(text[: text.index(end)] if end in text else text) for text in texts]


def _prompt_length(base: Base) -> int:
    """Tokens before the text; the same for every language and task."""
    languages = base.tokenizer.special.languages
    return len(base.tokenizer.prompt(next(iter(languages), None), "transcribe", None, 0)[0])
