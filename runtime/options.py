"""What can be chosen per call, checked once."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from das_asr.runtime.errors import OptionError
from das_asr.runtime.selection import HYPOTHESIS, SelectionRule, check_rule

__all__ = ["AUDIO_CONTEXTS", "SCORES", "DecodingOptions"]

SCORES = ("mean", "total", "root")
AUDIO_CONTEXTS = ("window", "fit")

_AUTO = re.compile(r"auto:([1-9][0-9]{0,2})")
_OF_HYPOTHESIS = (
    ("score", "mean"),
    ("switch_cost", None),
    ("base_bias", 0.0),
    ("include_base", True),
    ("prune_margin", None),
)


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """Options of `Transcriber.transcribe`; where None is allowed it means the bundle's or the model's default.

    Attributes:
        language: code or English name; None detects it with the base (multilingual models only).
        task: `transcribe`, or `translate` into English.
        prompt: text that came before, or a list of words to expect; the decoder sees it as its history.
        max_tokens: limit of written tokens per hypothesis; None is what the decoder has room for.
        adapters: which adapters decode along with the base, in this order; None is all of them. `"auto:3"` starts with
            all and keeps the 3 most telling ones: it means `max_active_rows=4`.
        rule: a name from `selection.RULES` or a `SelectionRule`.
        tau: threshold of the rule in probability units (paper, Eq. 3); rules without a threshold ignore it.
        suppress_tokens: ids never written, on top of the checkpoint's own list.
        score: how `hypothesis` scores a row's text: `mean` log-probability per token (end-of-text counted), `total`, or
            `root`, the mean over tokens of -sqrt(-log-probability), which a single doubtful token spoils less.
        switch_cost: lets rows take over from each other within a text of `hypothesis`, see `word_paths`: free behind
            a word that both wrote, else at this cost, in the unit of a token's score. None keeps to one row.
        base_bias: added to the base's score, in the unit of `score`; above 0 favours the base.
        include_base: whether the base's own text may win under `hypothesis`.
        no_speech_threshold: with `logprob_threshold`, audio with a higher no-speech probability and a lower average
            log-probability is transcribed as empty. None skips the measurement, which costs one more decoder step.
        logprob_threshold: see `no_speech_threshold`.
        audio_context: what the encoder hears: the whole `window`, as the model was trained, or with `fit` the longest
            utterance of the batch and `audio_margin`. Less work, but not every checkpoint tolerates it: `das-bench
            context` tells.
        audio_margin: seconds of silence that `fit` keeps behind the audio.
        max_active_rows: rows of an utterance that go on after `prune_after` tokens: the base and the most telling
            adapters, see `pruning.py` for what that is. None keeps all.
        prune_margin: with `hypothesis`, a row whose running score is further than this behind the best one stops, from
            `prune_after` tokens on; in the unit of `score`. None keeps all.
        prune_after: tokens; None is `PRUNE_AFTER`.
    """

    language: str | None = None
    task: Literal["transcribe", "translate"] = "transcribe"
    prompt: str | None = None
    max_tokens: int | None = None
    adapters: tuple[str, ...] | str | None = None
    rule: str | SelectionRule | None = None
    tau: float | None = None
    suppress_tokens: tuple[int, ...] = ()
    score: Literal["mean", "total", "root"] = "mean"
    switch_cost: float | None = None
    base_bias: float = 0.0
    include_base: bool = True
    no_speech_threshold: float | None = 0.6
    logprob_threshold: float = -1.0
    audio_context: Literal["window", "fit"] = "window"
    audio_margin: float = 1.0
    max_active_rows: int | None = None
    prune_margin: float | None = None
    prune_after: int | None = None

    def __post_init__(self) -> None:
        self._expand_auto()
        self._check_sequences()
        self._check_numbers()
        if self.task not in ("transcribe", "translate"):
            raise OptionError(f"task is {self.task!r}, expected 'transcribe' or 'translate'.")
        if self.score not in SCORES:
            raise OptionError(f"score is {self.score!r}, expected one of {', '.join(SCORES)}.")
        if not self.include_base and self.adapters == ():
            raise OptionError("include_base=False leaves nothing to choose from with adapters=(). Name an adapter.")
        if self.logprob_threshold != -1.0 and self.no_speech_threshold is None:
            raise OptionError(
                f"logprob_threshold={self.logprob_threshold} works along with no_speech_threshold, which is None. "
                "Give both, or neither."
            )
        self._check_context()
        self._check_pruning()
        if self.rule is not None:
            self.check_scoring(check_rule(self.rule))

    @property
    def margin(self) -> float | None:
        """Seconds of silence behind the audio; None is the rest of the window."""
        return self.audio_margin if self.audio_context == "fit" else None

    @property
    def adapter_names(self) -> tuple[str, ...] | None:
        """Names of the adapters that begin; None is all."""
        assert not isinstance(self.adapters, str)
        return self.adapters

    @property
    def prunes(self) -> bool:
        """Whether rows may stop that could still have won."""
        return self.max_active_rows is not None or self.prune_margin is not None

    def _expand_auto(self) -> None:
        """Turns `adapters="auto:m"` into what it means."""
        if not isinstance(self.adapters, str) or not (found := _AUTO.fullmatch(self.adapters)):
            return
        if self.max_active_rows is not None:
            raise OptionError(
                f"adapters={self.adapters!r} and max_active_rows={self.max_active_rows} both say how many rows go on. "
                "Drop either."
            )
        object.__setattr__(self, "max_active_rows", int(found[1]) + 1)
        object.__setattr__(self, "adapters", None)

    def _check_pruning(self) -> None:
        rows, margin, after = self.max_active_rows, self.prune_margin, self.prune_after
        if rows is not None and rows < 2:
            raise OptionError(f"max_active_rows is {rows}, expected at least 2: the base and an adapter; or None.")
        if margin is not None and not 0 <= margin < math.inf:
            raise OptionError(f"prune_margin is {margin}, expected a finite number of at least 0, or None.")
        if after is not None and after < 1:
            raise OptionError(f"prune_after is {after}, expected at least 1 token, or None.")
        if after is not None and not self.prunes:
            raise OptionError(
                f"prune_after={after} says when, but nothing is pruned. Give max_active_rows or prune_margin as well."
            )

    def _check_context(self) -> None:
        if self.audio_context not in AUDIO_CONTEXTS:
            raise OptionError(f"audio_context is {self.audio_context!r}, expected one of {', '.join(AUDIO_CONTEXTS)}.")
        if not 0 <= self.audio_margin < math.inf:
            raise OptionError(f"audio_margin is {self.audio_margin}, expected seconds, 0 or more.")
        if self.audio_margin != 1.0 and self.audio_context != "fit":
            raise OptionError(
                f"audio_margin={self.audio_margin} belongs to audio_context='fit', but that is "
                f"{self.audio_context!r}. Drop either."
            )

    def _check_sequences(self) -> None:
        if isinstance(self.adapters, str):
            raise OptionError(
                f"adapters is {self.adapters!r}, expected several names, as in ({self.adapters!r},), or 'auto:3'."
            )
        for name in ("adapters", "suppress_tokens"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))

    def _check_numbers(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise OptionError(f"max_tokens is {self.max_tokens}, expected at least 1, or None.")
        if self.tau is not None and not 0 <= self.tau <= 1:
            raise OptionError(f"tau is {self.tau}, expected a probability between 0 and 1.")
        for name in ("base_bias", "logprob_threshold"):
            if not math.isfinite(getattr(self, name)):
                raise OptionError(f"{name} is {getattr(self, name)}, expected a finite number of nats.")
        if self.switch_cost is not None and not 0 <= self.switch_cost < math.inf:
            raise OptionError(f"switch_cost is {self.switch_cost}, expected a finite number of at least 0, or None.")
        threshold = self.no_speech_threshold
        if threshold is not None and not 0 <= threshold <= 1:
            raise OptionError(f"no_speech_threshold is {threshold}, expected a probability, or None.")

    def check_scoring(self, rule: str | SelectionRule) -> None:
        """Refuses options of `hypothesis` where the rows share one history: nothing is scored then.

        Args:
            rule: the rule that will be used; without `rule` that is the bundle's.

        Raises:
            OptionError: naming the option that would have no effect.
        """
        if rule == HYPOTHESIS:
            return
        shown = repr(rule if isinstance(rule, str) else rule.name)
        source = " by the bundle's default" if self.rule is None else ""
        if self.prunes and not isinstance(rule, str):
            raise OptionError(f"max_active_rows is for the rules that have a name, but rule is {shown}. Drop either.")
        for name, default in _OF_HYPOTHESIS:
            if getattr(self, name) != default:
                raise OptionError(f"{name} belongs to rule='hypothesis', but rule is {shown}{source}. Drop either.")
