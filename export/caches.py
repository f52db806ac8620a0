"""The self-attention caches of the decoder graph: one that grows with every run, and one of fixed size.

Both compute the same. The decoder asks its cache for the mask, and what to attend to; it does not know which it has.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from das_asr.export.builder import GraphBuilder, Value
from das_asr.runtime.manifest import Dimensions

__all__ = ["Cache", "GrowingCache", "StaticCache"]

_MASKED = -1e9  # finite: a padding query sees no key at all, and its softmax must not become NaN


class Cache(Protocol):
    """How the self-attention cache lives in the graph."""

    def mask(self) -> Value:
        """Additive attention mask, broadcastable to [B, R, H, n, keys]."""
        ...

    def append(self, name: str, new: Value) -> tuple[Value, Value]:
        """Adds new keys or values [B, R, H, n, d] to the cache `name`, such as "k0".

        Returns:
            `present_<name>`, and what attention reads: [B, R, H, keys, d].
        """
        ...


class GrowingCache:
    """Concatenates past and new: `present` is one longer than `past` after every step. The fast form on a CPU."""

    def __init__(self, g: GraphBuilder, inputs: dict[str, Value]) -> None:
        self._g, self._inputs = g, inputs

    def mask(self) -> Value:
        """A slot is visible from its utterance's first valid one up to the query's own: [B, 1, 1, n, T + n]."""
        g = self._g
        new = g.dimension(self._inputs["ids"], 2, name="new_tokens")
        past = g.dimension(self._inputs["past_k0"], 3, name="past_tokens")
        zero, one = g.constant("zero", 0), g.constant("step", 1)
        slots = g.op("Range", zero, g.op("Add", past, new, name="total_tokens"), one, name="slots")
        own = g.op("Add", past, g.op("Range", zero, new, one, name="offsets"), name="own_slots")
        own = g.op("Unsqueeze", own, g.constant("axis_last", [-1]), name="own_slot_rows")  # [n, 1]
        return _mask(g, slots, own, self._inputs["first_valid"])

    def append(self, name: str, new: Value) -> tuple[Value, Value]:
        """Present = concat(past, new) along the slots; all of it is read."""
        both = self._g.op("Concat", self._inputs[f"past_{name}"], new, name=f"all_{name[0]}", axis=3)
        return both, both


class StaticCache:
    """Writes the new slots into a buffer [lanes, H, Tmax, d], in place where past and present are bound to one.

    Each utterance has its own place to write at, so utterances of any age share a run. Attention reads the first
    `attended` slots only: a run costs what its oldest utterance needs, not Tmax.
    """

    def __init__(self, g: GraphBuilder, inputs: dict[str, Value], dims: Dimensions) -> None:
        self._g, self._inputs = g, inputs
        with g.scope("cache"):
            new = g.op("Shape", inputs["ids"], name="new", start=2, end=3)
            lead = g.op("Shape", inputs["ids"], name="lead", start=0, end=2)
            before, behind = g.constant("lanes_heads", [-1, dims.decoder_heads]), g.constant("head", [dims.head_size])
            self._by_lane = g.op("Concat", before, new, behind, name="by_lane", axis=0)  # lanes, H, n, d
            behind = g.constant("heads_slots_head", [dims.decoder_heads, -1, dims.head_size])
            self._by_row = g.op("Concat", lead, behind, name="by_row", axis=0)  # B, R, H, attended, d
            first = g.op("Add", inputs["position"], inputs["first_valid"], name="first_slot")
            self._first = g.op("Unsqueeze", first, g.constant("axis_last", [-1]), name="first_slot_column")  # [B, 1]
            of_rows = g.op("Expand", self._first, lead, name="first_slot_rows")
            self._write_at = g.op("Reshape", of_rows, g.constant("flat", [-1]), name="write_at")  # [lanes]

    def mask(self) -> Value:
        """A slot is visible from its utterance's first valid one up to the query's own: [B, 1, 1, n, attended]."""
        g = self._g
        zero, one = g.constant("zero", 0), g.constant("step", 1)
        slots = g.op(
            "Range", zero, g.op("Squeeze", self._inputs["attended"], name="attended_scalar"), one, name="slots"
        )
        new = g.dimension(self._inputs["ids"], 2, name="new_tokens")
        own = g.op("Add", self._first, g.op("Range", zero, new, one, name="offsets"), name="own_slots")  # [B, n]
        own = g.op("Unsqueeze", own, g.constant("axes_rows_heads_slots", [1, 2, 4]), name="own_slot_rows")
        return _mask(g, slots, own, self._inputs["first_valid"])

    def append(self, name: str, new: Value) -> tuple[Value, Value]:
        """Present = past with the new slots overwritten; its first `attended` slots are read."""
        g, part = self._g, name[0]
        new = g.op("Reshape", new, self._by_lane, name=f"new_{part}")
        present = g.op("TensorScatter", self._inputs[f"past_{name}"], new, self._write_at, name=f"all_{part}", axis=2)
        ends = (g.constant("from_slot_0", [0]), self._inputs["attended"], g.constant("axis_slots", [2]))
        read = g.op("Slice", present, *ends, name=f"attended_{part}")
        return present, g.op("Reshape", read, self._by_row, name=f"attended_{part}_by_row")


def _mask(g: GraphBuilder, slots: Value, own: Value, first_valid: Value) -> Value:
    """0 where first_valid [B] <= slot <= own, else very low; own slots are broadcastable to [B, 1, 1, n, 1]."""
    first = g.op("Reshape", first_valid, g.constant("to_batch_5d", [-1, 1, 1, 1, 1]), name="first")
    visible = g.op(
        "And",
        g.op("LessOrEqual", slots, own, name="not_ahead"),
        g.op("GreaterOrEqual", slots, first, name="not_padding"),
        name="visible",
    )
    allow, forbid = g.constant("allow", 0.0, np.float32), g.constant("forbid", _MASKED, np.float32)
    return g.op("Where", visible, allow, forbid, name="mask")
