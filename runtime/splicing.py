"""The best path through what the rows of one utterance wrote, as (row, step) of its tokens.

Steps and log-probabilities become words with values here; `word_paths` finds the path.
"""

from __future__ import annotations

from collections.abc import Sequence

from das_asr.runtime.decoding import DecodedBatch
from das_asr.runtime.options import DecodingOptions
from das_asr.runtime.scores import token_values
from das_asr.runtime.tokenizer import Tokenizer
from das_asr.runtime.word_paths import Piece, align_rows, best_path

__all__ = ["splice", "word_key"]

_END = "\n"  # key of the last piece; no word is a line break


def word_key(word: str) -> str:
    """Words that differ in case, spaces and punctuation alone are the same; marks alone are themselves."""
    plain = word.strip()
    return "".join(letter for letter in plain.casefold() if letter.isalnum()) or plain


def splice(
    decoded: DecodedBatch,
    index: int,
    order: Sequence[int],
    tokenizer: Tokenizer,
    language: str | None,
    options: DecodingOptions,
) -> list[tuple[int, int]]:
    """The (row, step) of every token of the best path of utterance `index`, the end-of-text counted.

    Args:
        decoded: what was written.
        index: of the utterance.
        order: the rows that may take part, the best first.
        tokenizer: splits the texts into words.
        language: see `Tokenizer.split_words`.
        options: `score`, `base_bias`, and `switch_cost`, which is not None.
    """
    assert options.switch_cost is not None
    spans = [_spans(decoded, index, row, tokenizer, language) for row in order]
    lines = [_pieces(decoded, index, row, span, options) for row, span in zip(order, spans, strict=True)]
    keys = [[piece.key for piece in line[:-1]] for line in lines]
    # The ends stand in one column: aligned among words, a path could go on behind the end of a text.
    columns = [*align_rows(keys, range(len(keys))), tuple(len(line) for line in keys)]
    path = best_path(lines, columns, options.switch_cost, per_token=options.score != "total")
    return [(order[line], step) for line, word in path for step in range(*spans[line][word][1])]


def _spans(
    decoded: DecodedBatch, index: int, row: int, tokenizer: Tokenizer, language: str | None
) -> list[tuple[str, tuple[int, int]]]:
    """(key, (first step, step behind the last)) of the words of a row and of its end; every step is in one of them."""
    length, finished = int(decoded.lengths[index, row]), bool(decoded.finished[index, row])
    found, start = [], 0
    for word in tokenizer.split_words(decoded.candidates[:length, index, row].tolist(), language):
        stop = word.tokens[-1] + 1
        found.append((word_key(word.text), (start, stop)))
        start = stop
    return [*found, (_END, (start, length + finished))]


def _pieces(
    decoded: DecodedBatch,
    index: int,
    row: int,
    spans: Sequence[tuple[str, tuple[int, int]]],
    options: DecodingOptions,
) -> list[Piece]:
    """The words of a row with their values; `base_bias` is spread over the base's tokens."""
    steps = spans[-1][1][1]
    values = token_values(decoded.logprobs[:steps, index, row], options.score)
    if row == 0:
        values += options.base_bias / (steps if options.score == "total" and steps else 1)
    return [Piece(key, float(values[slice(*span)].sum()), span[1] - span[0]) for key, span in spans]
