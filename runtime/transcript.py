"""From what the loop wrote to results: the winning row, words, provenance and scores."""

from __future__ import annotations

import dataclasses
import difflib
import math
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from das_asr.runtime.decoding import DecodedBatch
from das_asr.runtime.options import DecodingOptions
from das_asr.runtime.results import Hypothesis, TokenProvenance, Word
from das_asr.runtime.scores import text_score, token_values
from das_asr.runtime.splicing import splice
from das_asr.runtime.tokenizer import Tokenizer
from das_asr.runtime.tokenizer import Word as TextWord

__all__ = ["Transcript", "compression_ratio", "empty_transcript", "read_own_histories", "read_shared_history"]


@dataclass(frozen=True)
class Transcript:
    """One utterance's text with its provenance."""

    text: str
    tokens: tuple[int, ...]
    words: tuple[Word, ...]
    provenance: tuple[TokenProvenance, ...]
    avg_logprob: float
    finished: bool
    adapter: str | None
    hypotheses: tuple[Hypothesis, ...]
    pruned: tuple[int | None, ...]  # of each row, the tokens after which it stopped


def empty_transcript(avg_logprob: float) -> Transcript:
    """No speech."""
    return Transcript("", (), (), (), avg_logprob, finished=True, adapter=None, hypotheses=(), pruned=())


def compression_ratio(text: str) -> float:
    """Bytes of UTF-8 over bytes after zlib; text that repeats itself compresses well."""
    data = text.encode("utf-8")
    return len(data) / len(zlib.compress(data))


def read_shared_history(
    decoded: DecodedBatch, index: int, names: Sequence[str], tokenizer: Tokenizer, language: str | None
) -> Transcript:
    """Utterance `index` of a batch whose rows shared one history."""
    length, finished = int(decoded.lengths[index, 0]), bool(decoded.finished[index, 0])
    steps = range(length + finished)
    provenance = tuple(_shared_token(decoded, step, index, int(decoded.rows[step, index]), names) for step in steps)
    tokens = tuple(token.id for token in provenance[:length])
    differs = [token.id != token.candidates[0] for token in provenance[:length]]
    return Transcript(
        text=tokenizer.decode(tokens).strip(),
        tokens=tokens,
        words=_words(provenance[:length], differs, tokenizer, language),
        provenance=provenance,
        avg_logprob=_mean([token.logprob for token in provenance]),
        finished=finished,
        adapter=None,
        hypotheses=(),
        pruned=_pruned(decoded, index),
    )


def read_own_histories(
    decoded: DecodedBatch,
    index: int,
    names: Sequence[str],
    tokenizer: Tokenizer,
    language: str | None,
    options: DecodingOptions,
) -> Transcript:
    """Utterance `index` of a batch in which every row wrote its own text.

    The best score wins, ties go to the lowest row; with a `switch_cost` it is the best path through the rows' texts.
    Rows that were pruned take no part.
    """
    hypotheses = tuple(_hypothesis(decoded, index, row, names, tokenizer, options) for row in range(len(names)))
    first = 0 if options.include_base else 1
    eligible = [row for row in range(first, len(names)) if decoded.pruned[index, row] < 0]
    winner = max(eligible, key=lambda row: hypotheses[row].score)
    path = _whole(decoded, index, winner)
    if options.switch_cost is not None:
        order = sorted(eligible, key=lambda row: -hypotheses[row].score)
        path = splice(decoded, index, order, tokenizer, language, options) or path
    provenance = tuple(_own_token(decoded, step, index, row, names) for row, step in path)
    finished = bool(decoded.finished[index, path[-1][0]])
    spoken = provenance[: len(provenance) - finished]
    words = _words(spoken, [False] * len(spoken), tokenizer, language)
    tokens = tuple(token.id for token in spoken)
    return Transcript(
        text=tokenizer.decode(tokens).strip(),
        tokens=tokens,
        words=_mark_departures(words, tokenizer.split_words(hypotheses[0].tokens, language)),
        provenance=provenance,
        avg_logprob=_mean([token.logprob for token in provenance]),
        finished=finished,
        adapter=provenance[0].adapter if len({token.row for token in provenance}) == 1 else None,
        hypotheses=hypotheses,
        pruned=_pruned(decoded, index),
    )


def _pruned(decoded: DecodedBatch, index: int) -> tuple[int | None, ...]:
    return tuple(None if tokens < 0 else tokens for tokens in decoded.pruned[index].tolist())


def _whole(decoded: DecodedBatch, index: int, row: int) -> list[tuple[int, int]]:
    """Every (row, step) of one row's text, the end-of-text counted."""
    return [(row, step) for step in range(int(decoded.lengths[index, row] + decoded.finished[index, row]))]


def _shared_token(decoded: DecodedBatch, step: int, index: int, row: int, names: Sequence[str]) -> TokenProvenance:
    pruned = decoded.pruned[index]
    return _token(decoded, step, index, row, names, live=(pruned < 0) | (step < pruned))


def _own_token(decoded: DecodedBatch, step: int, index: int, winner: int, names: Sequence[str]) -> TokenProvenance:
    live = step < decoded.lengths[index] + decoded.finished[index]
    return _token(decoded, step, index, winner, names, live=live)


def _token(
    decoded: DecodedBatch, step: int, index: int, row: int, names: Sequence[str], *, live: NDArray[np.bool_]
) -> TokenProvenance:
    """What `row` wrote at a step, beside what the live rows [R] would have written."""
    candidates, logprobs = decoded.candidates[step, index].tolist(), decoded.logprobs[step, index].tolist()
    return TokenProvenance(
        id=candidates[row],
        adapter=names[row],
        row=row,
        logprob=logprobs[row],
        candidates=tuple(token if writes else None for token, writes in zip(candidates, live, strict=True)),
        confidences=tuple(math.exp(value) if writes else None for value, writes in zip(logprobs, live, strict=True)),
    )


def _hypothesis(
    decoded: DecodedBatch, index: int, row: int, names: Sequence[str], tokenizer: Tokenizer, options: DecodingOptions
) -> Hypothesis:
    """Text and score of one row; the end-of-text counts as a token of the score."""
    length, finished = int(decoded.lengths[index, row]), bool(decoded.finished[index, row])
    logprobs = decoded.logprobs[: length + finished, index, row]
    tokens = tuple(decoded.candidates[:length, index, row].tolist())
    bias = options.base_bias if row == 0 else 0.0
    total = float(np.sum(token_values(logprobs, options.score), dtype=np.float64))
    score = text_score(total, max(len(logprobs), 1), options.score) + bias
    mean = float(np.sum(logprobs, dtype=np.float64)) / max(len(logprobs), 1)
    return Hypothesis(names[row], tokenizer.decode(tokens).strip(), tokens, score, mean, finished)


def _words(
    provenance: Sequence[TokenProvenance], differs: Sequence[bool], tokenizer: Tokenizer, language: str | None
) -> tuple[Word, ...]:
    words = []
    for part in tokenizer.split_words([token.id for token in provenance], language):
        tokens = [provenance[place] for place in part.tokens]
        words.append(
            Word(
                word=part.text,
                probability=_mean([math.exp(token.logprob) for token in tokens]),
                adapter=Counter(token.adapter for token in tokens).most_common(1)[0][0],
                confidences=tuple(map(_mean_or_none, zip(*(token.confidences for token in tokens), strict=True))),
                differs_from_base=any(differs[place] for place in part.tokens),
                tokens=tuple(token.id for token in tokens),
            )
        )
    return tuple(words)


def _mark_departures(words: tuple[Word, ...], base: Sequence[TextWord]) -> tuple[Word, ...]:
    """Marks the words of the winner that the base's own text does not have at that place."""
    theirs = [word.text.strip() for word in base]
    matcher = difflib.SequenceMatcher(a=theirs, b=[word.word.strip() for word in words], autojunk=False)
    same = {place for block in matcher.get_matching_blocks() for place in range(block.b, block.b + block.size)}
    return tuple(dataclasses.replace(word, differs_from_base=place not in same) for place, word in enumerate(words))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _mean(known) if known else None
