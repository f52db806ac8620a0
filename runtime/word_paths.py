"""One text out of several: at word borders the rows' own texts may take over from each other.

The words of all rows are aligned in columns, as for ROVER (Fiscus, ASRU 1997), but not voted on: a word always comes
with the confidence it had in its own row's history. A path goes through the columns from left to right, taking in each
what its present row has there. Behind a column it may go on in any row that has the same word there, free of cost,
since the histories agree up to a word; in any other row at `switch_cost`. With an infinite cost and nothing in common
the best path is the best row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Column", "Piece", "align_rows", "best_path"]

Column = tuple[int | None, ...]
"""For each of R rows the index of its word in this column; None where it has none."""


@dataclass(frozen=True)
class Piece:
    """A word of one row: what tells whether another row has the same, its value, and how many tokens it has."""

    key: str
    value: float
    tokens: int


@dataclass(frozen=True)
class _Way:
    """A path up to some column."""

    value: float
    tokens: int
    back: _Way | None = None
    place: tuple[int, int] | None = None  # (row, word) taken last

    def gain(self, rate: float) -> float:
        """Value above `rate` per token."""
        return self.value - rate * self.tokens

    def places(self) -> list[tuple[int, int]]:
        """Every (row, word), from the first to the last."""
        found, way = [], self
        while way.back is not None and way.place is not None:
            found.append(way.place)
            way = way.back
        return found[::-1]


def align_rows(lines: Sequence[Sequence[str]], order: Sequence[int]) -> list[Column]:
    """Columns of the words of R rows; each word stands in exactly one, in its row's order.

    Rows are put in one after the other, each by an alignment with the fewest edits against the columns so far.

    Args:
        lines: the keys of the words of every row; rows may be empty.
        order: row indices, the first is what the others are aligned with.
    """
    columns: list[list[int | None]] = []
    keys: list[set[str | None]] = []  # what stands in each column, None for a row without a word there
    for place, row in enumerate(order):
        merged: list[list[int | None]] = []
        merged_keys: list[set[str | None]] = []
        for column, word in _align(keys, lines[row]):
            entry: list[int | None] = [None] * len(lines) if column is None else columns[column]
            known: set[str | None] = set(keys[column]) if column is not None else {None} if place else set()
            if word is not None:
                entry[row] = word
            merged.append(entry)
            known.add(None if word is None else lines[row][word])
            merged_keys.append(known)
        columns, keys = merged, merged_keys
    return [tuple(column) for column in columns]


def _align(columns: Sequence[set[str | None]], words: Sequence[str]) -> list[tuple[int | None, int | None]]:
    """Pairs (column, word) with the fewest edits; None is a new column, or no word for this one."""
    costs = _edit_costs(columns, words)
    i, j = len(columns), len(words)
    pairs: list[tuple[int | None, int | None]] = []
    while i or j:
        if i and j and costs[i][j] == costs[i - 1][j - 1] + (words[j - 1] not in columns[i - 1]):
            i, j = i - 1, j - 1
            pairs.append((i, j))
        elif i and costs[i][j] == costs[i - 1][j] + (None not in columns[i - 1]):
            i -= 1
            pairs.append((i, None))
        else:
            j -= 1
            pairs.append((None, j))
    return pairs[::-1]


def _edit_costs(columns: Sequence[set[str | None]], words: Sequence[str]) -> list[list[int]]:
    """Edits between the first i columns and the first j words; passing a column that some row passed too is free."""
    costs = [list(range(len(words) + 1))]
    for known in columns:
        above, passing = costs[-1], None not in known
        line = [above[0] + passing]
        for j, word in enumerate(words):
            line.append(min(above[j] + (word not in known), above[j + 1] + passing, line[j] + 1))
        costs.append(line)
    return costs


def best_path(
    lines: Sequence[Sequence[Piece]], columns: Sequence[Column], switch_cost: float, *, per_token: bool
) -> list[tuple[int, int]]:
    """The places (row, word) of the path with the highest value, minus `switch_cost` for every switch that costs.

    A path stays in its row where a switch gains nothing, and ends in the first of equally good rows.

    Args:
        lines: the words of R rows.
        columns: where they stand, as from `align_rows`, followed by one in which every row ends.
        switch_cost: in the unit of the values, at least 0.
        per_token: compare value / tokens instead of values. The best ratio is found after Dinkelbach (1967): the path
            with the most value above a rate has a higher rate, until it is the highest.
    """
    if not per_token:
        return _most_gain(lines, columns, switch_cost, 0.0).places()
    rate = max(sum(piece.value for piece in line) / max(sum(piece.tokens for piece in line), 1) for line in lines)
    best = _most_gain(lines, columns, switch_cost, rate)
    while best.gain(rate) > 1e-9 * (1 + abs(best.value)):
        rate = best.value / best.tokens
        best = _most_gain(lines, columns, switch_cost, rate)
    return best.places()


def _most_gain(lines: Sequence[Sequence[Piece]], columns: Sequence[Column], switch_cost: float, rate: float) -> _Way:
    """The path with the most value above `rate` per token."""
    ways = [_Way(0.0, 0)] * len(lines)
    for column in columns:
        ways = [_step(way, row, word, lines) for row, (way, word) in enumerate(zip(ways, column, strict=True))]
        ways = _switch(ways, column, lines, switch_cost, rate)
    return max(ways, key=lambda way: way.gain(rate))


def _step(way: _Way, row: int, word: int | None, lines: Sequence[Sequence[Piece]]) -> _Way:
    if word is None:
        return way
    piece = lines[row][word]
    return _Way(way.value + piece.value, way.tokens + piece.tokens, way, (row, word))


def _switch(
    ways: Sequence[_Way], column: Column, lines: Sequence[Sequence[Piece]], switch_cost: float, rate: float
) -> list[_Way]:
    """The best way to go on with in each row behind a column; a row keeps its own unless another is better."""
    keys = [None if word is None else lines[row][word].key for row, word in enumerate(column)]
    leader = max(ways, key=lambda way: way.gain(rate))
    paid = _Way(leader.value - switch_cost, leader.tokens, leader.back, leader.place)
    alike: dict[str, _Way] = {}  # the best way with this word
    for way, key in zip(ways, keys, strict=True):
        if key is not None and (key not in alike or way.gain(rate) > alike[key].gain(rate)):
            alike[key] = way
    entered = []
    for own, key in zip(ways, keys, strict=True):
        best = own
        for other in (own if key is None else alike[key], paid):
            if other.gain(rate) > best.gain(rate) + 1e-9:
                best = other
        entered.append(best)
    return entered
