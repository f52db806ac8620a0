"""Selection rules: the ones the graph knows, and the interface for a rule of one's own.

Rules with a shared history choose, at every step, the row whose token all rows go on with (ADML; paper, Algorithm 1):

`base`           row 0, always.
`paper`          Eq. 3: the most confident row if max c - c_0 >= tau, else the LEAST confident row if
                 min c - c_0 <= -tau, else row 0.
`gain`           the most confident row if max c - c_0 >= tau, else row 0.
`deviation-max`  the most confident row if either condition of `paper` holds, else row 0.

with c_i the largest softmax value of row i after suppression; ties go to the lowest row. `hypothesis` lets every row
write its own text in the same batch, and the text with the best score wins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from das_asr.runtime.contract import RULE_CODES
from das_asr.runtime.errors import OptionError

__all__ = ["HYPOTHESIS", "RULES", "SelectionRule", "StepCandidates", "check_rule", "choose_rows"]

RULES = tuple(RULE_CODES)
HYPOTHESIS = "hypothesis"


@dataclass(frozen=True)
class StepCandidates:
    """What a rule of one's own sees at one step: B utterances, R rows, V tokens. Row 0 is the base."""

    step: int  # 0 for the first token after the prompt
    candidates: NDArray[np.int64]  # [B, R]: each row's best token after suppression
    logprobs: NDArray[np.float32]  # [B, R]: its natural log-probability
    logits: NDArray[np.float32] | None  # [B, R, V] before suppression, only for a rule with `needs_logits`


@runtime_checkable
class SelectionRule(Protocol):
    """A rule of one's own, run on the host between steps; it shares one history among the rows.

    `needs_logits` fetches the logits of all rows at every step: R * V * 4 bytes per utterance and step, 830 kB for
    three adapters on a multilingual Whisper. Without it a rule costs a few microseconds.

        class MostConfident:
            name = "most-confident"
            needs_logits = False

            def choose(self, step):
                return step.logprobs.argmax(axis=1)

        transcriber.transcribe("request.wav", rule=MostConfident())
    """

    name: str
    needs_logits: bool

    def choose(self, step: StepCandidates) -> NDArray[np.integer]:
        """The row [B] whose token every row goes on with, in 0 .. R - 1."""
        ...


def check_rule(rule: object) -> str | SelectionRule:
    """Returns `rule` if it is a known name or has the interface of a rule.

    Raises:
        OptionError: it is neither.
    """
    if isinstance(rule, str):
        if rule not in RULE_CODES:
            raise OptionError(f"rule is {rule!r}, expected one of {', '.join(RULES)} or a SelectionRule object.")
        return rule
    if isinstance(rule, type) or not isinstance(rule, SelectionRule):
        raise OptionError(f"rule is {rule!r}: a rule object needs `name`, `needs_logits` and `choose(step)`.")
    return rule


def choose_rows(rule: SelectionRule, step: StepCandidates) -> NDArray[np.int64]:
    """Asks a rule of the user's and checks its answer.

    Raises:
        OptionError: the answer is not one row index per utterance.
    """
    batch, rows = step.candidates.shape
    answer = np.asarray(rule.choose(step))
    if answer.shape != (batch,) or not np.issubdtype(answer.dtype, np.integer):
        raise OptionError(
            f"rule {rule.name!r} returned {answer.dtype} of shape {answer.shape}, expected one integer row for each of "
            f"{batch} utterances."
        )
    if answer.min() < 0 or answer.max() >= rows:
        raise OptionError(f"rule {rule.name!r} returned row {answer.tolist()}, expected 0 to {rows - 1}.")
    return answer.astype(np.int64)
