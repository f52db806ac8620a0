"""The autoregressive loop over the K + 1 rows of a batch of utterances, and what it wrote.

Shared history is ADML (DAS paper, Algorithm 1): at every step one row's token is chosen and fed to all rows. With own
history (`hypothesis`) each row goes on with its own token in the same batch, so both cost the same per step. The graph
chooses and feeds the next ids itself; the host only looks for the end. Rows that nobody needs any more leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from das_asr.runtime.backends.base import Control, DecodingBatch, LoadedStack, Step
from das_asr.runtime.live_rows import Cut, LiveRows
from das_asr.runtime.pruning import Pruning, RowJudge
from das_asr.runtime.selection import HYPOTHESIS, SelectionRule, StepCandidates, choose_rows

__all__ = ["DecodedBatch", "Plan", "Prompt", "Writing", "decode", "prefill", "wants_logits"]


@dataclass(frozen=True)
class Prompt:
    """Decoder prompt of one utterance: ids, and the index of start-of-transcript in them."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Plan:
    """How to decode a batch. `probe`, if given, sees the logits at start-of-transcript and may change the prompts."""

    rule: str | SelectionRule
    control: Control
    end_of_text: int
    max_tokens: int | None
    text_positions: int
    probe: (
        Callable[[NDArray[np.float32]], list[Prompt] | None] | None
    )  # logits [B, R, V] -> prompts of the same lengths
    pruning: Pruning | None = None
    subset: Callable[[tuple[int, ...]], LoadedStack] | None = None
    """Adapters of some rows only, by their index; None: rows that are not needed any more stay in the batch."""

    @property
    def host_rule(self) -> SelectionRule | None:
        """The user's own rule, if that is what chooses."""
        return None if isinstance(self.rule, str) else self.rule


@dataclass(frozen=True)
class DecodedBatch:
    """Everything that was written: T steps, B utterances, R rows."""

    candidates: NDArray[np.int64]  # [T, B, R]
    logprobs: NDArray[np.float32]  # [T, B, R]
    rows: NDArray[np.int64]  # [T, B]: the row that chose; meaningless with own history
    lengths: NDArray[np.int64]  # [B, R]: tokens before end-of-text; with shared history the same in every row
    finished: NDArray[np.bool_]  # [B, R]: ended with end-of-text, neither by the limit nor pruned
    pruned: NDArray[np.int64]  # [B, R]: tokens after which the row stopped early, -1 if it did not
    prefill_seconds: float
    step_seconds: tuple[float, ...]
    step_rows: tuple[int, ...]  # rows in the batch at each step


def decode(batch: DecodingBatch, prompts: Sequence[Prompt], plan: Plan) -> DecodedBatch:
    """Runs the loop until every utterance has ended."""
    started = perf_counter()
    prompts, step = prefill(batch, prompts, plan)
    prefilled = perf_counter()
    transcript = Writing(plan, np.array([len(prompt.ids) for prompt in prompts]))
    step_seconds = []
    while transcript.write(step):
        began = perf_counter()
        if plan.subset is not None and (cut := transcript.cut()) is not None:
            batch.keep_rows(cut.places, cut.row_mask, plan.subset(cut.rows))
        step = batch.run(
            transcript.position(), transcript.prompt_last, transcript.next_ids(), logits=wants_logits(plan)
        )
        step_seconds.append(perf_counter() - began)
    return transcript.finish(prefilled - started, tuple(step_seconds))


def wants_logits(plan: Plan) -> bool:
    """Whether the rule that chooses asks for the logits of every step."""
    return plan.host_rule is not None and plan.host_rule.needs_logits


def prefill(batch: DecodingBatch, prompts: Sequence[Prompt], plan: Plan) -> tuple[Sequence[Prompt], Step]:
    """Feeds the prompts, left-padded to one length; with a probe in two runs, so that it can look in between."""
    padded = _padded(prompts, plan)
    width = padded.ids.shape[1]
    if plan.probe is None:
        return prompts, _feed(batch, prompts, plan, 0, width, logits=wants_logits(plan))
    probed = padded.start + 1
    step = _feed(batch, prompts, plan, 0, probed, logits=True)
    assert step.logits is not None
    prompts = plan.probe(step.logits) or prompts
    if probed < width:
        step = _feed(batch, prompts, plan, probed, width, logits=wants_logits(plan))
    return prompts, step


@dataclass(frozen=True)
class _PaddedPrompts:
    ids: NDArray[np.int64]  # [B, width]
    pads: NDArray[np.int64]  # [B]
    start: int  # column of start-of-transcript


def _padded(prompts: Sequence[Prompt], plan: Plan) -> _PaddedPrompts:
    width = max(len(prompt.ids) for prompt in prompts)
    ids = np.full((len(prompts), width), plan.end_of_text, np.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[width - len(prompt.ids) :] = prompt.ids
    pads = np.array([width - len(prompt.ids) for prompt in prompts])
    columns = {int(pad) + prompt.start for pad, prompt in zip(pads, prompts, strict=True)}
    assert len(columns) == 1, "prompts differ in length behind start-of-transcript"
    return _PaddedPrompts(ids, pads, columns.pop())


def _feed(batch: DecodingBatch, prompts: Sequence[Prompt], plan: Plan, begin: int, end: int, *, logits: bool) -> Step:
    """One run over the prompt columns [begin, end)."""
    padded = _padded(prompts, plan)
    rows = plan.control.row_mask.shape[1]
    ids = np.repeat(padded.ids[:, None, begin:end], rows, axis=1)
    return batch.run(begin - padded.pads, end - 1 - padded.pads, ids, logits=logits)


class Writing:
    """What a batch has written so far, and who is still writing."""

    def __init__(self, plan: Plan, prompt_lengths: NDArray[np.int64]) -> None:
        self._plan = plan
        self._prompt_lengths = prompt_lengths  # [B]
        self.prompt_last = prompt_lengths - 1
        room = plan.text_positions - prompt_lengths
        self._limits = room if plan.max_tokens is None else np.minimum(room, plan.max_tokens)  # [B]
        self._shortest = int(self._limits.min())
        batch, rows = plan.control.row_mask.shape
        shape = (batch, rows)
        self._own = plan.rule == HYPOTHESIS
        self._utterances = np.arange(batch)
        self._alive: NDArray[np.bool_] = np.ones(shape, np.bool_)
        self._judge = None if plan.pruning is None else RowJudge(plan.pruning, shape)
        self._pruned: NDArray[np.int64] = np.full(shape, -1, np.int64)
        self._rows_in_batch = LiveRows(batch, rows, plan.end_of_text)
        self._widths: list[int] = []
        self._steps: list[Step] = []
        self._rows: list[NDArray[np.int64]] = []
        self._written: list[NDArray[np.int64]] = []  # [B, R] each

    def write(self, step: Step) -> bool:
        """Takes the outcome of a step; False once nobody is writing any more.

        It does as little as it can: a step of the decoder leaves nothing of ours in the CPU's cache, and each array
        operation here costs ten times what it does in a loop of its own.
        """
        self._widths.append(step.candidate.shape[1])
        step = self._rows_in_batch.widened(step)
        row = self._choose(step)
        chosen = step.candidate[self._utterances, row]  # [B]
        written = step.candidate if self._own else np.broadcast_to(chosen[:, None], step.candidate.shape)
        self._steps.append(step)
        self._rows.append(row)
        self._written.append(written)
        wrote = self._alive
        ended = np.equal(written, self._plan.end_of_text)
        if ended.any():
            self._alive = self._alive & ~ended
        if len(self._steps) >= self._shortest:
            self._alive = self._alive & (len(self._steps) < self._limits)[:, None]
        if self._judge is not None:
            stops = self._judge.judge(step, written, wrote, self._alive)
            self._pruned[stops] = len(self._steps)
            self._alive = self._alive & ~stops
        return bool(self._alive.any())

    def cut(self) -> Cut | None:
        """The rows to go on with, if fewer are worth it or others take part in the selection."""
        at_once = self._judge is not None and self._judge.caps
        return self._rows_in_batch.cut(self._alive, self._pruned < 0, at_once=at_once)

    def _choose(self, step: Step) -> NDArray[np.int64]:
        rule = self._plan.host_rule
        if rule is None:
            return step.row
        return choose_rows(rule, StepCandidates(len(self._steps), step.candidate, step.logprob, step.logits))

    def position(self) -> NDArray[np.int64]:
        """Position [B] of the token written last; an utterance that has ended stays within the table."""
        return np.minimum(self._prompt_lengths + len(self._steps) - 1, self._plan.text_positions - 1)

    @property
    def written(self) -> NDArray[np.int64]:
        """Ids [B, R] that every row wrote last."""
        return self._written[-1]

    def next_ids(self) -> NDArray[np.int64] | None:
        """Ids [B, R, 1] to feed when the host has chosen; None leaves it to the graph's own binding."""
        return None if self._plan.host_rule is None else self.written[:, :, None]

    def finish(self, prefill_seconds: float, step_seconds: tuple[float, ...]) -> DecodedBatch:
        """All steps as arrays, and where each row's text ends in them."""
        written = np.stack(self._written)  # [T, B, R]
        within = np.arange(len(written))[:, None, None] < self._limits[:, None]
        ends = within & (written == self._plan.end_of_text)
        finished = ends.any(axis=0)
        lengths = np.where(finished, ends.argmax(axis=0), self._limits[:, None])
        if self._own:
            stopped = self._pruned >= 0
            finished, lengths = finished & ~stopped, np.where(stopped, self._pruned, lengths)
        return DecodedBatch(
            candidates=np.stack([step.candidate for step in self._steps]),
            logprobs=np.stack([step.logprob for step in self._steps]),
            rows=np.stack(self._rows),
            lengths=lengths,
            finished=finished,
            pruned=self._pruned,
            prefill_seconds=prefill_seconds,
            step_seconds=step_seconds,
            step_rows=tuple(self._widths[1:]),
        )
