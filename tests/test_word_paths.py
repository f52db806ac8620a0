"""Rows that take over from each other within a text: alignment and path against brute force, and what is read of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from das_asr.runtime import DecodingOptions, OptionError
from das_asr.runtime.decoding import DecodedBatch
from das_asr.runtime.scores import token_values
from das_asr.runtime.splicing import word_key
from das_asr.runtime.tokenizer import Tokenizer, special_tokens
from das_asr.runtime.transcript import Transcript, read_own_histories
from das_asr.runtime.word_paths import Column, Piece, align_rows, best_path
from tests.checkpoints import generation_settings, make_tokenizer

NAMES = ("base", "music", "sports")
WORDS = st.lists(st.sampled_from("abc"), max_size=4)


# --- Alignment ---


def texts_of(columns: Sequence[Column], lines: Sequence[Sequence[str]]) -> list[str]:
    """One string per row, `-` where it has no word."""
    return ["".join("-" if c[row] is None else lines[row][c[row]] for c in columns) for row in range(len(lines))]  # type: ignore[index]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["abc", "abc"], ["abc", "abc"]),
        (["abc", "ac"], ["abc", "a-c"]),
        (["ac", "abc", "abc"], ["a-c", "abc", "abc"]),
        (["abc", "xbc", "xc"], ["abc", "xbc", "x-c"]),
        (["", "ab"], ["--", "ab"]),
        (["", ""], ["", ""]),
    ],
)
def test_equal_words_share_a_column(lines: list[str], expected: list[str]) -> None:
    assert texts_of(align_rows(lines, range(len(lines))), lines) == expected


def edits(a: Sequence[str], b: Sequence[str]) -> int:
    """The plain recursion."""
    if not a or not b:
        return len(a) + len(b)
    return min(edits(a[1:], b[1:]) + (a[0] != b[0]), edits(a[1:], b) + 1, edits(a, b[1:]) + 1)


@settings(max_examples=150, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=4), st.randoms())
def test_every_word_stands_in_one_column_in_its_order(lines: list[list[str]], random: Any) -> None:
    order = random.sample(range(len(lines)), len(lines))
    columns = align_rows(lines, order)
    for row, line in enumerate(lines):
        assert [column[row] for column in columns if column[row] is not None] == list(range(len(line)))
    assert all(any(word is not None for word in column) for column in columns)


@settings(max_examples=100, deadline=None)
@given(WORDS, WORDS)
def test_two_rows_are_aligned_with_the_fewest_edits(first: list[str], second: list[str]) -> None:
    columns = align_rows([first, second], [0, 1])
    differing = sum(a is None or b is None or first[a] != second[b] for a, b in columns)
    assert differing == edits(first, second)


# --- The path ---


def brute_force(lines: Sequence[Sequence[Piece]], columns: Sequence[Column], cost: float, *, per_token: bool) -> float:
    """The highest value over every sequence of rows."""
    best = -math.inf
    for rows in itertools.product(range(len(lines)), repeat=len(columns)):
        value, tokens = 0.0, 0
        for place, (row, column) in enumerate(zip(rows, columns, strict=True)):
            if (word := column[row]) is not None:
                value, tokens = value + lines[row][word].value, tokens + lines[row][word].tokens
            if place + 1 < len(columns) and rows[place + 1] != row:
                other = column[rows[place + 1]]
                same = word is not None and other is not None
                same = same and lines[row][word].key == lines[rows[place + 1]][other].key  # type: ignore[index]
                value -= 0 if same else cost
        best = max(best, value / max(tokens, 1) if per_token else value)
    return best


def value_of(
    path: Sequence[tuple[int, int]], lines: Sequence[Sequence[Piece]], columns: Sequence[Column], cost: float
) -> tuple[float, int]:
    """The highest value and the tokens of a path whose places are known; where it has none, any row may be passed."""
    here = {place: row for row, word in path for place, column in enumerate(columns) if column[row] == word}
    ways = {row: 0.0 for row in range(len(lines)) if (here[0] == row if 0 in here else columns[0][row] is None)}
    for place in range(1, len(columns)):
        left = columns[place - 1]
        keys = [None if word is None else lines[row][word].key for row, word in enumerate(left)]
        ways = {
            new: max(
                v - (0 if new == old or (keys[new] and keys[new] == keys[old]) else cost) for old, v in ways.items()
            )
            for new in range(len(lines))
            if here.get(place, new) == new and (place in here or columns[place][new] is None)
        }
    pieces = [lines[row][word] for row, word in path]
    return sum(piece.value for piece in pieces) + max(ways.values()), sum(piece.tokens for piece in pieces)


@st.composite
def lattices(draw: st.DrawFn) -> tuple[list[list[Piece]], list[Column]]:
    rows = draw(st.integers(1, 3))
    keys = [[*draw(st.lists(st.sampled_from("ab"), max_size=2)), "."] for _ in range(rows)]
    lines = [[Piece(key, -draw(st.integers(0, 8)) / 4, draw(st.integers(1, 2))) for key in line] for line in keys]
    inner = align_rows([line[:-1] for line in keys], range(rows))
    return lines, [*inner, tuple(len(line) - 1 for line in keys)]


@settings(max_examples=200, deadline=None)
@given(lattices(), st.sampled_from([0.0, 0.3, 1.0, 50.0]), st.booleans())
def test_the_path_is_the_best_of_all(lattice: Any, cost: float, per_token: bool) -> None:
    lines, columns = lattice
    path = best_path(lines, columns, cost, per_token=per_token)
    value, tokens = value_of(path, lines, columns, cost)
    found = value / tokens if per_token else value
    assert found == pytest.approx(brute_force(lines, columns, cost, per_token=per_token), abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(lattices())
def test_the_path_is_never_worse_than_a_row(lattice: Any) -> None:
    lines, columns = lattice
    path = best_path(lines, columns, 0.4, per_token=True)
    value, tokens = value_of(path, lines, columns, 0.4)
    means = [sum(piece.value for piece in line) / sum(piece.tokens for piece in line) for line in lines]
    assert value / tokens >= max(means) - 1e-6


# --- In a transcription ---


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    generation = generation_settings(make_tokenizer(folder, 1, None, True), True, True)
    path: Path = folder / "tokenizer.json"
    return Tokenizer.from_file(path, special_tokens(path, generation, {}))


Row = list[tuple[str, float]]


def read(tokenizer: Tokenizer, rows: Sequence[Row], unfinished: Sequence[int] = (), **options: Any) -> Transcript:
    """Rows of (word, log-probability of each of its tokens); the end-of-text has -0.1 everywhere."""
    ids, scores = [], []
    for row in rows:
        words = [(tokenizer.encode(" " + word), value) for word, value in row]
        ids.append([token for tokens, _ in words for token in tokens])
        scores.append([value for tokens, value in words for _ in tokens])
    steps = max(map(len, ids)) + 1
    end = tokenizer.special.end_of_text
    candidates = np.array([line + [end] * (steps - len(line)) for line in ids])
    logprobs = np.array([line + [-0.1] * (steps - len(line)) for line in scores], np.float32)
    decoded = DecodedBatch(
        candidates=candidates.T[:, None],
        logprobs=logprobs.T[:, None],
        rows=np.zeros((steps, 1), np.int64),
        lengths=np.array([[len(line) for line in ids]]),
        finished=np.array([[row not in unfinished for row in range(len(rows))]]),
        pruned=np.full((1, len(rows)), -1),
        prefill_seconds=0.0,
        step_seconds=(),
        step_rows=(),
    )
    return read_own_histories(decoded, 0, NAMES, tokenizer, "en", DecodingOptions(rule="hypothesis", **options))


CAT: list[Row] = [
    [("play", -0.05), ("sum", -2.0), ("jazz", -0.2)],
    [("play", -0.1), ("some", -0.1), ("chess", -2.5)],
    [("lay", -3.0), ("some", -2.0), ("jazz", -3.0)],
]


def test_each_word_comes_from_the_row_that_is_surest_of_it(tokenizer: Tokenizer) -> None:
    assert read(tokenizer, CAT).text == "play sum jazz"
    transcript = read(tokenizer, CAT, switch_cost=0.5)
    assert transcript.text == "play some jazz"
    assert transcript.adapter is None
    assert [word.adapter for word in transcript.words] == ["base", "music", "base"]
    assert [word.differs_from_base for word in transcript.words] == [False, True, False]


def test_provenance_names_the_row_and_its_step(tokenizer: Tokenizer) -> None:
    transcript = read(tokenizer, CAT, switch_cost=0.5)
    assert [token.id for token in transcript.provenance] == [*transcript.tokens, tokenizer.special.end_of_text]
    for token in transcript.provenance:
        assert token.adapter == NAMES[token.row]
        assert token.candidates[token.row] == token.id
        assert token.confidences[token.row] == pytest.approx(math.exp(token.logprob))
    scores = [token.logprob for token in transcript.provenance]
    assert transcript.avg_logprob == pytest.approx(sum(scores) / len(scores))
    assert transcript.finished


def test_a_high_cost_keeps_to_the_row_that_wins_alone(tokenizer: Tokenizer) -> None:
    apart: list[Row] = [[("one", -1.0), ("two", -0.2)], [("three", -0.2), ("four", -2.0)], [("x", -2.0), ("y", -2.0)]]
    for score in ("mean", "total", "root"):
        alone, spliced = read(tokenizer, apart, score=score), read(tokenizer, apart, score=score, switch_cost=1e6)
        assert (spliced.text, spliced.adapter, spliced.tokens) == (alone.text, alone.adapter, alone.tokens)
        assert spliced.provenance == alone.provenance
    assert read(tokenizer, apart, switch_cost=0.0).text == "three two"


def test_a_row_that_was_excluded_gives_no_words(tokenizer: Tokenizer) -> None:
    transcript = read(tokenizer, CAT, switch_cost=0.0, include_base=False)
    assert {token.row for token in transcript.provenance} <= {1, 2}
    assert transcript.hypotheses[0].text == "play sum jazz"


def test_favouring_the_base_enough_gives_its_text(tokenizer: Tokenizer) -> None:
    for score in ("mean", "total"):
        transcript = read(tokenizer, CAT, score=score, switch_cost=0.5, base_bias=100.0)
        assert transcript.adapter == "base"
        assert transcript.text == "play sum jazz"


def test_a_path_may_end_in_a_text_that_was_cut(tokenizer: Tokenizer) -> None:
    rows: list[Row] = [[("a", -0.1), ("b", -0.1)], [("a", -3.0), ("c", -3.0)], [("d", -4.0)]]
    assert not read(tokenizer, rows, unfinished=[0], switch_cost=1.0).finished
    assert read(tokenizer, rows, unfinished=[1], switch_cost=1.0).finished


def test_nothing_written_is_an_empty_text(tokenizer: Tokenizer) -> None:
    transcript = read(tokenizer, [[], [], []], switch_cost=0.5)
    assert (transcript.text, transcript.words, transcript.adapter) == ("", (), "base")


def test_root_counts_one_doubtful_token_less(tokenizer: Tokenizer) -> None:
    rows: list[Row] = [[("a", -0.5), ("b", -0.5), ("c", -0.5)], [("a", -0.1), ("b", -0.1), ("d", -1.6)], [("e", -9.0)]]
    assert read(tokenizer, rows, score="mean").adapter == "base"
    transcript = read(tokenizer, rows, score="root")
    assert transcript.adapter == "music"
    values = [-math.sqrt(-token.logprob) for token in transcript.provenance]
    assert transcript.hypotheses[1].score == pytest.approx(np.mean(values))


def test_token_values_are_never_above_zero() -> None:
    values = token_values(np.array([-4.0, 0.0, 1e-7], np.float32), "root")
    assert values.tolist() == [-2.0, 0.0, 0.0]
    assert token_values(np.array([-4.0], np.float32), "mean").tolist() == [-4.0]


@pytest.mark.parametrize(("word", "key"), [(" Jazz,", "jazz"), (" it's", "its"), (" ...", "..."), ("", "")])
def test_case_and_punctuation_make_no_other_word(word: str, key: str) -> None:
    assert word_key(word) == key


@pytest.mark.parametrize("cost", [-0.1, math.inf, math.nan])
def test_a_switch_cost_is_finite_and_not_negative(cost: float) -> None:
    with pytest.raises(OptionError, match="switch_cost is"):
        DecodingOptions(switch_cost=cost)


def test_switching_needs_rows_with_their_own_history() -> None:
    with pytest.raises(OptionError, match="switch_cost belongs to rule='hypothesis', but rule is 'gain'"):
        DecodingOptions(rule="gain", switch_cost=0.5)
