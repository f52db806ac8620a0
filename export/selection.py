"""Suppression, per-row candidates and the selection rule, as part of the decoder graph.

The rule is the paper's Eq. 3 read literally: with c_i the largest softmax value of row i, the most confident row
chooses if max_i c_i - c_0 >= tau; else the least confident row if min_i c_i - c_0 <= -tau; else row 0. Ties go to the
lowest row. `gain` keeps the first condition only, `deviation-max` lets the most confident row choose under either.
Rows outside `row_mask` enter neither maximum nor minimum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from das_asr.export.builder import GraphBuilder, Value
from das_asr.runtime.contract import RULE_CODES

__all__ = ["Candidates", "candidates", "select"]


@dataclass(frozen=True)
class Candidates:
    """Each row's best token: ids and natural log-probabilities, both [B, R]."""

    token: Value
    logprob: Value


def candidates(g: GraphBuilder, logits: Value, bias: Value) -> Candidates:
    """Best token of each row of `logits` [B, R, V] after adding `bias` [B, V].

    TopK and a plain exp-sum: ONNX Runtime's ReduceLogSumExp and Softmax cost several times as much here, and adding a
    bias costs a tenth of a Where.
    """
    last = g.constant("axis_last", [-1])
    bias = g.op("Unsqueeze", bias, g.constant("axis_1", [1]), name="bias_rows")
    masked = g.op("Add", logits, bias, name="suppressed")
    peak, token = g.ops("TopK", (masked, g.constant("one", [1])), ("peak", "token"), axis=-1)
    shifted = g.op("Exp", g.op("Sub", masked, peak, name="shifted"), name="exp")
    total = g.op("ReduceSum", shifted, last, name="total", keepdims=0)  # [B, R]
    return Candidates(
        token=g.op("Squeeze", token, last, name="candidate"),
        logprob=g.op("Neg", g.op("Log", total), name="logprob"),
    )


def select(g: GraphBuilder, rows: Candidates, *, rule: Value, tau: Value, row_mask: Value) -> tuple[Value, Value]:
    """The rule of each utterance: (row [B], next_ids [B, R, 1])."""
    row = _chosen_row(g, g.op("Exp", rows.logprob, name="confidence"), rule, tau, row_mask)
    last = g.constant("axis_last", [-1])
    column = g.op("Unsqueeze", row, last, name="row_column")
    token = g.op("GatherElements", rows.token, column, name="selected", axis=1)  # [B, 1]
    own = g.op("Unsqueeze", _is_rule(g, rule, "hypothesis"), last, name="own_history")
    following = g.op("Where", own, rows.token, token, name="following")  # [B, R]
    return row, g.op("Unsqueeze", following, last, name="next")


def _is_rule(g: GraphBuilder, rule: Value, name: str) -> Value:
    return g.op("Equal", rule, g.constant(f"rule_{name}", RULE_CODES[name]), name=f"is_{name}")


def _chosen_row(g: GraphBuilder, confidence: Value, rule: Value, tau: Value, row_mask: Value) -> Value:
    """Row index [B] under the utterance's rule."""
    highest = g.op("Where", row_mask, confidence, g.constant("below_any", -1.0, np.float32), name="for_maximum")
    lowest = g.op("Where", row_mask, confidence, g.constant("above_any", 2.0, np.float32), name="for_minimum")
    axis = g.constant("axis_1", [1])
    base = g.op("Gather", confidence, g.constant("row_0", 0), name="base_confidence", axis=1)
    gain = g.op("Sub", g.op("ReduceMax", highest, axis, keepdims=0), base, name="gain")
    loss = g.op("Sub", g.op("ReduceMin", lowest, axis, keepdims=0), base, name="loss")
    above = g.op("GreaterOrEqual", gain, tau, name="above")
    below = g.op("LessOrEqual", loss, g.op("Neg", tau, name="minus_tau"), name="below")
    best = g.op("ArgMax", highest, axis=1, keepdims=0)
    worst = g.op("ArgMin", lowest, axis=1, keepdims=0)
    zero = g.constant("row_0", 0)
    paper = g.op("Where", above, best, g.op("Where", below, worst, zero, name="paper_second"), name="paper_row")
    gain_row = g.op("Where", above, best, zero, name="gain_row")
    deviation = g.op("Where", g.op("Or", above, below, name="deviates"), best, zero, name="deviation_row")
    row = g.op("Where", _is_rule(g, rule, "deviation-max"), deviation, zero, name="row_or_base")
    row = g.op("Where", _is_rule(g, rule, "gain"), gain_row, row, name="row_or_gain")
    return g.op("Where", _is_rule(g, rule, "paper"), paper, row, name="chosen_row")
