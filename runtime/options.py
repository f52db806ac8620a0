"""What can be chosen per call, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from das_asr.runtime.errors import OptionError
from das_asr.runtime.selection import HYPOTHESIS, SelectionRule, check_rule

__all__ = ["DecodingOptions"]


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """Options of `Transcriber.transcribe`; where None is allowed it means the bundle's or the model's default.

    Attributes:
        language: code or English name; None detects it with the base (multilingual models only).
        task: `transcribe`, or `translate` into English.
        prompt: text that came before, or a list of words to expect; the decoder sees it as its history.
        max_tokens: limit of written tokens per hypothesis; None is what the decoder has room for.
        adapters: which adapters decode along with the base, in this order; None is all of them.
        rule: a name from `selection.RULES` or a `SelectionRule`.
        tau: threshold of the rule in probability units (paper, Eq. 3).
        suppress_tokens: ids never written, on top of the checkpoint's own list.
        score: how `hypothesis` scores a row's text: `mean` log-probability per token (end-of-text counted), or `total`.
        base_bias: nats added to the base's score, in the unit of `score`; above 0 favours the base.
        include_base: whether the base's own text may win under `hypothesis`.
        no_speech_threshold: with `logprob_threshold`, audio with a higher no-speech probability and a lower average
            log-probability is transcribed as empty. None skips the measurement, which costs one more decoder step.
        logprob_threshold: see `no_speech_threshold`.
    """

    language: str | None = None
    task: Literal["transcribe", "translate"] = "transcribe"
    prompt: str | None = None
    max_tokens: int | None = None
    adapters: tuple[str, ...] | None = None
    rule: str | SelectionRule | None = None
    tau: float | None = None
    suppress_tokens: tuple[int, ...] = ()
    score: Literal["mean", "total"] = "mean"
    base_bias: float = 0.0
    include_base: bool = True
    no_speech_threshold: float | None = 0.6
    logprob_threshold: float = -1.0

    def __post_init__(self) -> None:
        if self.rule is not None:
            check_rule(self.rule)
        self._check_numbers()
        if self.task not in ("transcribe", "translate"):
            raise OptionError(f"task is {self.task!r}, expected 'transcribe' or 'translate'.")
        if self.score not in ("mean", "total"):
            raise OptionError(f"score is {self.score!r}, expected 'mean' or 'total'.")
        if not self.include_base and self.adapters == ():
            raise OptionError("include_base=False leaves nothing to choose from with adapters=(). Name an adapter.")
        self._check_hypothesis_only()

    def _check_numbers(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise OptionError(f"max_tokens is {self.max_tokens}, expected at least 1, or None.")
        if self.tau is not None and not 0 <= self.tau <= 1:
            raise OptionError(f"tau is {self.tau}, expected a probability between 0 and 1.")
        if not math.isfinite(self.base_bias):
            raise OptionError(f"base_bias is {self.base_bias}, expected a finite number of nats.")
        threshold = self.no_speech_threshold
        if threshold is not None and not 0 <= threshold <= 1:
            raise OptionError(f"no_speech_threshold is {threshold}, expected a probability, or None.")

    def _check_hypothesis_only(self) -> None:
        """`score`, `base_bias` and `include_base` mean nothing when the rows share one history."""
        if self.rule is None or self.rule == HYPOTHESIS:
            return
        defaults = {"score": "mean", "base_bias": 0.0, "include_base": True}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                raise OptionError(f"{name} belongs to rule='hypothesis', but rule is {self.rule!r}. Drop one of them.")
