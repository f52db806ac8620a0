"""Normalisers on tables of cases, wake words, and the counting of errors."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from das_asr.benchmarks.wordcounts import count_errors
from das_asr.benchmarks.wording import Wording, paper_rules
from das_asr.runtime.errors import DataError, OptionError


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Play some Jazz!", "play some jazz"),
        ("what's up?", "whats up"),
        ("what\u2019s up", "whats up"),
        ("twenty-one and/or 3.5", "twenty one and or 35"),
        ("  tabs\tand\nlines ", "tabs and lines"),
        ("«Zo\u0065\u0308» — ok…", "zoë ok"),
        ("$5 & 20%", "$5 20"),
        ("?!", ""),
    ],
)
def test_the_papers_rules(text: str, words: str) -> None:
    assert " ".join(paper_rules(text)) == words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Um, won't Mr. Smith go?", "will not mister smith go"),
        ("twenty-one dollars", "$21"),
        ("the colour [noise] (laughs) is grey", "the color is gray"),
        ("it's 10,000 miles", "it is 10000 miles"),
    ],
)
def test_whispers_rules(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "normalizer.json").write_text(json.dumps({"colour": "color", "grey": "gray"}))
    for source in (tmp_path, tmp_path / "normalizer.json"):
        assert " ".join(Wording("whisper", spellings=source).normalizer()(text)) == words


def test_a_checkpoint_without_spellings_leaves_them(tmp_path: Path) -> None:
    assert Wording("whisper", spellings=tmp_path).normalizer()("The colour") == ("the", "colour")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Olly, play jazz", "play jazz"),
        ("hey olly olly play", "play"),
        ("ollyver plays", "ollyver plays"),
        ("play it olly", "play it olly"),
        ("hey play", "hey play"),
        ("olly", ""),
    ],
)
@pytest.mark.parametrize("style", ["paper", "whisper"])
def test_wake_words_go_at_the_start_as_whole_words(text: str, words: str, style: str) -> None:
    assert " ".join(Wording(style, ("olly", "Hey, Olly")).normalizer()(text)) == words


def test_wordings_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="paper or whisper"):
        Wording("plain")
    with pytest.raises(OptionError, match="whisper"):
        Wording("paper", spellings=tmp_path)
    with pytest.raises(OptionError, match="several"):
        Wording(wake_words="olly")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="empty"):
        Wording(wake_words=("!",)).normalizer()
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(DataError, match="map"):
        Wording("whisper", spellings=tmp_path / "list.json").normalizer()


def _distance(reference: tuple[str, ...], hypothesis: tuple[str, ...]) -> int:
    row = list(range(len(hypothesis) + 1))
    for place, word in enumerate(reference, start=1):
        before, row[0] = row[0], place
        for column, other in enumerate(hypothesis, start=1):
            before, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, before + (word != other))
    return row[-1]


def test_errors_are_those_of_the_shortest_edit() -> None:
    generator = random.Random(3)
    references = [tuple(generator.choices("abc", k=generator.randint(1, 7))) for _ in range(200)]
    hypotheses = [tuple(generator.choices("abc", k=generator.randint(0, 7))) for _ in range(200)]
    counts = count_errors(references, hypotheses)
    assert counts.sum(axis=1).tolist() == list(map(_distance, references, hypotheses))
    # Insertions minus deletions is the difference in length whatever the alignment.
    lengths = [len(one) - len(other) for one, other in zip(hypotheses, references, strict=True)]
    assert (counts[:, 1] - counts[:, 2]).tolist() == lengths


def test_kinds_of_errors() -> None:
    references = [("a", "b", "c"), ("a", "b"), ("a",), ("a", "b")]
    hypotheses = [("a", "x", "c"), ("a", "b", "c", "d"), (), ("a", "b")]
    assert count_errors(references, hypotheses).tolist() == [[1, 0, 0], [0, 2, 0], [0, 0, 1], [0, 0, 0]]
    assert count_errors([], []).shape == (0, 3)
