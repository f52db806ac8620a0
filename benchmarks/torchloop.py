"""Greedy decoding in PyTorch with a shared token history and the DAS paper's selection rule (Algorithm 1, Eq. 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Choice", "Decoded", "Suppression", "choose", "greedy", "paper_row"]


@dataclass(frozen=True)
class Choice:
    """One step's token and the row it came from."""

    token: int
    row: int
    confidence: float  # probability the row gave its token


@dataclass(frozen=True)
class Suppression:
    """Ids that may not be written, as int64 tensors."""

    always: Tensor
    first: Tensor  # at the first step, on top of the others

    @classmethod
    def of(cls, generation_config: Mapping[str, Any], vocabulary: int, device: str = "cpu") -> Suppression:
        """The checkpoint's own lists, end-of-text, and timestamps, which follow `<|notimestamps|>`."""
        timestamps = range(int(generation_config["no_timestamps_token_id"]) + 1, vocabulary)
        listed = generation_config.get("suppress_tokens") or []
        always = [*listed, int(generation_config["eos_token_id"]), *timestamps]
        first = generation_config.get("begin_suppress_tokens") or []
        return cls(torch.tensor(always, device=device), torch.tensor(first, dtype=torch.int64, device=device))

    def apply(self, logits: Tensor, step: int) -> None:
        """Changes logits [R, V] in place, before any softmax, in every row alike."""
        logits.index_fill_(1, self.always, -torch.inf)
        if not step:
            logits.index_fill_(1, self.first, -torch.inf)


@dataclass(frozen=True)
class Decoded:
    """One finished decode."""

    choices: tuple[Choice, ...]
    selection: float  # seconds

    @property
    def tokens(self) -> tuple[int, ...]:
        """New tokens, without the prompt."""
        return tuple(choice.token for choice in self.choices)

    @property
    def rows(self) -> tuple[int, ...]:
        """The row that chose each token."""
        return tuple(choice.row for choice in self.choices)


def paper_row(confidences: Sequence[float], tau: float) -> int:
    """The row that Eq. 3 picks, read literally; ties go to the lowest row.

    Args:
        confidences: c_i = max softmax of row i; row 0 is the base.
        tau: Threshold in units of probability.
    """
    rows = range(len(confidences))
    best, worst = max(rows, key=confidences.__getitem__), min(rows, key=confidences.__getitem__)
    if confidences[best] - confidences[0] >= tau:
        return best
    if confidences[worst] - confidences[0] <= -tau:
        return worst
    return 0


def choose(logits: Tensor, tau: float) -> Choice:
    """Applies the rule to one step's logits [R, V]."""
    top, ids = logits.max(dim=-1)
    # Softmax of the winner only: the other V - 1 probabilities are never needed.
    confidences = (logits - top[:, None]).exp_().sum(dim=-1).reciprocal_().tolist()
    row = paper_row(confidences, tau)
    return Choice(int(ids[row]), row, confidences[row])


def greedy(
    model: Any, states: Tensor, prompt: Sequence[int], *, count: int, suppression: Suppression, tau: float
) -> Decoded:
    """Writes exactly `count` tokens, feeding each chosen token to every row.

    Args:
        model: A `WhisperForConditionalGeneration`.
        states: Encoder states [R, S, D]; expanded from one row, so that they cost no memory.
        prompt: Ids of the prompt, the same in every row.
        count: New tokens to write.
        suppression: What may not be written, end-of-text included, so that all systems write equally much.
        tau: Threshold of the paper's rule.
    """
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    decoder, head = model.get_decoder(), model.get_output_embeddings()
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    rows, seconds = states.shape[0], 0.0
    ids = torch.tensor([list(prompt)]).expand(rows, -1)
    choices = []
    for step in range(count):
        output = decoder(input_ids=ids, encoder_hidden_states=states, past_key_values=cache, use_cache=True)
        # Only the last position's logits are needed: the head is a third of a step.
        logits = head(output.last_hidden_state[:, -1])
        started = perf_counter()
        suppression.apply(logits, step)
        choice = choose(logits, tau)
        seconds += perf_counter() - started
        choices.append(choice)
        ids = torch.full((rows, 1), choice.token)
    return Decoded(tuple(choices), seconds)
