"""Text from grammars: what is drawn, what is turned away, what is written, and what a kill leaves."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from das_asr.runtime.errors import DataError, OptionError, SynthesisError
from das_asr.runtime.jsonl import Row, read_rows
from das_asr.training.text import sentence_file
from das_asr.training.text.diversity import measure_diversity
from das_asr.training.text.domain import Domain
from das_asr.training.text.evaluation_list import EvaluationList, ngram_overlap
from das_asr.training.text.generation import generate_text
from das_asr.training.text.grammar import load_grammar
from das_asr.training.text.near import NearIndex
from das_asr.training.text.options import TextOptions
from das_asr.training.text.report import TextReport, report_on
from das_asr.training.text.words import Words, words_of

GRAMMAR = """
slots:
  thing: [lamp, fan, heater, radio, oven, door, window, "big {device}", "small {device}"]
  device: [screen, speaker, clock]
  room: [kitchen, bath, hall, attic, cellar]
templates:
  - {text: "[please|] turn on the {thing} in the {room}", skill: switch}
  - {text: "[please|] turn off the {thing} in the {room} at {number}", skill: switch, weight: 2}
  - {text: "is the {thing} in the {room} on", skill: ask, style: question}
"""

DOMAIN = Domain(
    name="home",
    use_case="An assistant for the home.",
    skills=("switch", "ask"),
    personas=("a tenant",),
    seeds=(),
    wake_words=("hey home", "okay home computer"),
    styles=("request", "question"),
    words_min=3,
    words_max=16,
)


@pytest.fixture
def grammar(tmp_path: Path) -> Path:
    path = tmp_path / "home.yaml"
    path.write_text(GRAMMAR, encoding="utf-8")
    return path


def _domain(**changes: Any) -> Domain:
    return Domain(**{**vars(DOMAIN), **changes})


def _texts(path: Path) -> list[str]:
    return [row["text"] for row in read_rows(path)]


def test_rows_have_their_lineage(grammar: Path, tmp_path: Path) -> None:
    report = generate_text(DOMAIN, TextOptions(count=300, grammar=grammar, seed=5), tmp_path / "home.jsonl")
    rows = list(read_rows(tmp_path / "home.jsonl"))
    assert len(rows) == report.diversity["rows"] == 300
    assert len({row["id"] for row in rows}) == len({row["text"] for row in rows}) == 300
    templates = load_grammar(grammar).templates
    for row in rows:
        assert {row["domain"], row["backend"], row["stage"]} == {"home", "grammar"}
        assert (row["seed"], row["model"], row["persona"]) == (5, None, None)
        template = templates[row["template"]["index"]]
        assert (row["skill"], row["style"]) == (template.skill, template.style)
        assert all(filler in row["text"] for _, filler in row["template"]["slots"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("home.jsonl", "home.report.json", "home.settings.json", "home.yaml")
    ]


def test_the_same_seed_gives_the_same_file(grammar: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        generate_text(DOMAIN, TextOptions(count=100, grammar=grammar, seed=seed), tmp_path / f"{name}.jsonl")
    first, again, other = (_texts(tmp_path / f"{name}.jsonl") for name in "abc")
    assert first == again
    assert set(first) != set(other)


def test_a_longer_run_begins_like_a_shorter_one(grammar: Path, tmp_path: Path) -> None:
    for count in (50, 200):
        generate_text(DOMAIN, TextOptions(count=count, grammar=grammar), tmp_path / f"{count}.jsonl")
    assert _texts(tmp_path / "200.jsonl")[:50] == _texts(tmp_path / "50.jsonl")


def test_shards_together_are_the_whole(grammar: Path, tmp_path: Path) -> None:
    def rows(name: str, shard: tuple[int, int]) -> list[Row]:
        generate_text(DOMAIN, TextOptions(count=100, grammar=grammar, shard=shard), tmp_path / name)
        return list(read_rows(tmp_path / name))

    whole = rows("all.jsonl", (0, 1))
    parts = [rows(f"{index}.jsonl", (index, 3)) for index in range(3)]
    assert [len(part) for part in parts] == [34, 33, 33]
    for index, part in enumerate(parts):
        assert part == whole[index::3]


class _Killed(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("rows_before", [1, 57, 199])
def test_a_killed_run_goes_on(grammar: Path, tmp_path: Path, rows_before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = TextOptions(count=200, grammar=grammar, wake_words=0.5)
    generate_text(DOMAIN, options, tmp_path / "whole.jsonl")
    put = sentence_file.SentenceFile.put

    def stop(self: sentence_file.SentenceFile, row: Row) -> None:
        if len(self.rows) == rows_before:
            raise _Killed
        put(self, row)

    output = tmp_path / "home.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr(sentence_file.SentenceFile, "put", stop)
        with pytest.raises(_Killed):
            generate_text(DOMAIN, options, output)
    assert not output.exists()
    part = tmp_path / "home.jsonl.part"
    part.write_bytes(part.read_bytes() + b'{"id": "torn')  # what a kill leaves of a row
    report = generate_text(DOMAIN, options, output)
    assert report.run["resumed_rows"] == rows_before
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not part.exists()
    before = output.stat().st_mtime_ns
    assert generate_text(DOMAIN, options, output).diversity == report.diversity  # complete: nothing to do
    assert output.stat().st_mtime_ns == before


def test_other_options_are_refused(grammar: Path, tmp_path: Path) -> None:
    output = tmp_path / "home.jsonl"
    generate_text(DOMAIN, TextOptions(count=20, grammar=grammar), output)
    with pytest.raises(SynthesisError, match=r"begun with other options .count was 20, now 30"):
        generate_text(DOMAIN, TextOptions(count=30, grammar=grammar), output)
    with pytest.raises(SynthesisError, match="domain_sha256 was"):
        generate_text(_domain(words_max=12), TextOptions(count=20, grammar=grammar), output)
    grammar.write_text(GRAMMAR.replace("lamp", "light"), encoding="utf-8")
    with pytest.raises(SynthesisError, match="grammar was"):
        generate_text(DOMAIN, TextOptions(count=20, grammar=grammar), output)
    assert len(_texts(output)) == 20


def test_a_changed_unfinished_file_is_refused(grammar: Path, tmp_path: Path) -> None:
    output, part = tmp_path / "home.jsonl", tmp_path / "home.jsonl.part"
    generate_text(DOMAIN, TextOptions(count=20, grammar=grammar), output)
    lines = output.read_text(encoding="utf-8").splitlines(keepends=True)
    output.unlink()
    part.write_text("".join([lines[1], lines[0]]), encoding="utf-8")
    with pytest.raises(SynthesisError, match=r"Row 1 of .* is not what this run makes"):
        generate_text(DOMAIN, TextOptions(count=20, grammar=grammar), output)


def test_a_file_of_somebody_else_is_refused(grammar: Path, tmp_path: Path) -> None:
    output = tmp_path / "home.jsonl"
    output.write_text("mine", encoding="utf-8")
    with pytest.raises(SynthesisError, match="was not made by das-synth text"):
        generate_text(DOMAIN, TextOptions(count=20, grammar=grammar), output)
    assert output.read_text(encoding="utf-8") == "mine"
    with pytest.raises(SynthesisError, match="cannot be written"):
        generate_text(DOMAIN, TextOptions(count=20, grammar=grammar), grammar / "sub" / "home.jsonl")


def test_a_grammar_that_runs_dry_says_how_much_it_gave(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text("slots: {}\ntemplates: [{text: 'turn [on|off] the [lamp|fan|door]', skill: switch}]", "utf-8")
    with pytest.raises(SynthesisError, match=r"7 sentences were asked for, but after 6 distinct ones.*at most 6"):
        generate_text(DOMAIN, TextOptions(count=7, grammar=path), tmp_path / "home.jsonl")
    assert [file.name for file in tmp_path.iterdir()] == ["small.yaml"]
    generate_text(DOMAIN, TextOptions(count=6, grammar=path), tmp_path / "home.jsonl")


def test_lengths_and_styles_of_the_domain_hold(grammar: Path, tmp_path: Path) -> None:
    generate_text(
        _domain(words_max=8, styles=("request",)), TextOptions(count=90, grammar=grammar), tmp_path / "a.jsonl"
    )
    rows = list(read_rows(tmp_path / "a.jsonl"))
    assert {row["style"] for row in rows} == {"request"}
    assert max(len(words_of(row["text"])) for row in rows) == 8
    report = generate_text(
        DOMAIN, TextOptions(count=50, grammar=grammar, max_seconds=4, words_per_second=1.75), tmp_path / "b.jsonl"
    )
    assert max(map(int, report.diversity["lengths"])) == 7
    assert report.run["rejected"]["too long"] > 0


def test_wake_words_go_in_front_of_a_share(grammar: Path, tmp_path: Path) -> None:
    generate_text(DOMAIN, TextOptions(count=400, grammar=grammar, wake_words=0.25), tmp_path / "a.jsonl")
    generate_text(DOMAIN, TextOptions(count=400, grammar=grammar), tmp_path / "b.jsonl")
    called, plain = _texts(tmp_path / "a.jsonl"), _texts(tmp_path / "b.jsonl")
    count = sum(text.startswith(DOMAIN.wake_words) for text in called)
    assert 60 <= count <= 140
    assert [text.removeprefix("hey home ").removeprefix("okay home computer ") for text in called] == plain


def test_no_evaluation_sentence_is_written(grammar: Path, tmp_path: Path) -> None:
    generate_text(DOMAIN, TextOptions(count=300, grammar=grammar), tmp_path / "free.jsonl")
    free = _texts(tmp_path / "free.jsonl")
    listed = [f"Hey home, {text.capitalize()}!" for text in free[:50]]
    (tmp_path / "test.txt").write_text("\n".join(listed), encoding="utf-8")
    numbers = {"five": "5", "six": "6", "eleven": "11", "twelve": "12", "forty": "40", "ninety": "90"}
    said = next(text for text in free[50:] if text.rpartition(" at ")[2] in numbers)
    front, _, number = said.rpartition(" ")
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": f"{front} {numbers[number]}."}) + "\n", encoding="utf-8")
    exclude = (tmp_path / "test.txt", tmp_path / "test.jsonl")
    report = generate_text(DOMAIN, TextOptions(count=300, grammar=grammar, exclude=exclude), tmp_path / "home.jsonl")
    texts = set(_texts(tmp_path / "home.jsonl"))
    assert not texts & {*free[:50], said}
    assert report.run["rejected"]["evaluation sentence"] >= 51
    assert report.diversity["excluded"] == 0
    overlap = report.diversity["overlap"]
    assert (overlap["size"], overlap["of_list"] > 0.5, 0 < overlap["of_generated"] < 1) == (4, True, True)


def test_near_hits_are_kept_and_told(grammar: Path, tmp_path: Path) -> None:
    generate_text(DOMAIN, TextOptions(count=100, grammar=grammar), tmp_path / "free.jsonl")
    near = next(text for text in _texts(tmp_path / "free.jsonl") if len(text.split()) == 7)
    (tmp_path / "test.txt").write_text(" ".join(reversed(near.split())), encoding="utf-8")
    options = TextOptions(count=100, grammar=grammar, exclude=(tmp_path / "test.txt",))
    report = generate_text(DOMAIN, options, tmp_path / "home.jsonl")
    assert report.run["near_hits"] == report.diversity["near_excluded"] == 1
    assert report.run["near_hit_texts"] == [near]
    assert "sentences near to one: 1" in report.as_text()
    assert _texts(tmp_path / "home.jsonl") == _texts(tmp_path / "free.jsonl")


def _jaccard(one: Words, other: Words) -> float:
    bags = [{(word, words[:index].count(word)) for index, word in enumerate(words)} for words in (one, other)]
    return len(bags[0] & bags[1]) / len(bags[0] | bags[1])


def _sentences(count: int) -> Iterator[Words]:
    """Sentences of which many are nearly equal."""
    rng = random.Random(3)
    words: list[str] = []
    for _ in range(count):
        if not words or rng.random() < 0.2:
            words = [f"w{rng.randrange(30)}" for _ in range(rng.randint(2, 18))]
        words = [word for word in words if rng.random() > 0.05] or words
        if rng.random() < 0.5:
            words = [*words, f"w{rng.randrange(30)}"][:18]
        rng.shuffle(words)
        yield tuple(words)


@pytest.mark.parametrize("similarity", [1.0, 0.9, 0.8])
def test_near_duplicates_are_those_of_all_pairs(similarity: float) -> None:
    index, seen, found = NearIndex(similarity), list[Words](), 0
    for words in _sentences(400):
        near = any(_jaccard(words, other) >= similarity - 1e-9 for other in seen)
        assert index.finds(words) == near, words
        found += near
        index.add(words)
        seen.append(words)
    assert 20 <= found <= 380


def test_politeness_and_order_do_not_make_another_long_sentence() -> None:
    index = NearIndex(0.9)
    index.add(words_of("turn off the small speaker in the kitchen at five"))
    assert index.finds(words_of("please turn off the small speaker in the kitchen at five"))
    assert index.finds(words_of("at five turn the small speaker off in the kitchen"))
    assert not index.finds(words_of("turn off the small speaker in the cellar at five"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "magic"}, "no back end 'magic'"),
        ({"case": "upper"}, "case was 'upper'"),
        ({"count": 0}, "count was 0; 1 or more"),
        ({"similarity": 0.5}, "similarity was 0.5; 0.8 to 1"),
        ({"wake_words": 1.5}, "wake_words was 1.5; 0 to 1"),
        ({"iterations": 5}, "iterations was 5; 0 to 4"),
        ({"temperature": -1}, "temperature was -1"),
        ({"shard": (2, 2)}, "shard=2/2"),
        ({"model": "m"}, "back end is grammar"),
        ({"base_url": "http://x"}, "base_url belongs to the back end openai"),
        ({"backend": "openai"}, "openai needs the name of a model"),
        ({"backend": "openai", "model": "m", "grammar": Path("g")}, "grammar belongs to the back end grammar"),
        ({"answers": Path("a")}, "answers belongs to"),
    ],
)
def test_options_that_contradict_themselves(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        TextOptions(**changes)


def test_options_that_the_domain_cannot_serve(grammar: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="has no wake words"):
        generate_text(_domain(wake_words=()), TextOptions(grammar=grammar, wake_words=0.1), tmp_path / "a.jsonl")
    with pytest.raises(OptionError, match=r"no room for the 3 words"):
        generate_text(DOMAIN, TextOptions(grammar=grammar, max_seconds=1), tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"absent.txt cannot be read"):
        generate_text(DOMAIN, TextOptions(grammar=grammar, exclude=(tmp_path / "absent.txt",)), tmp_path / "a.jsonl")


def test_diversity_is_what_a_count_by_hand_gives(grammar: Path) -> None:
    template = {"index": 2, "slots": [["thing", "lamp"], ["room", "hall"]]}
    rows = [
        {"text": "Is the lamp on", "skill": "ask", "template": template},
        {"text": "is the lamp on?", "skill": "ask", "template": template},
        {"text": "turn it off", "skill": "switch"},
    ]
    figures = measure_diversity(rows, load_grammar(grammar))
    assert (figures.rows, figures.duplicates, figures.words, figures.vocabulary) == (3, 1, 11, 7)
    assert figures.mean_length == pytest.approx(11 / 3)
    assert figures.distinct == pytest.approx({"1": 7 / 11, "2": 5 / 8, "3": 3 / 5, "4": 1 / 2})
    assert figures.lengths == {"3": 1, "4": 2}
    assert figures.counts == {"skill": {"ask": 2, "switch": 1}}
    assert figures.slots == {"room": {"used": 1, "of": 5}, "thing": {"used": 1, "of": 13}}
    assert figures.templates == {"used": 1, "of": 3}
    assert (figures.overlap, figures.excluded) == (None, None)


def test_overlap_is_what_a_count_by_hand_gives() -> None:
    ours = [words_of("a b c d e"), words_of("x b c d e")]  # abcd bcde xbcd
    theirs = [words_of("b c d e f g"), words_of("too short")]  # bcde cdef defg
    assert ngram_overlap(ours, theirs) == pytest.approx(
        {"size": 4, "shared": 1, "of_generated": 1 / 3, "of_list": 1 / 3}
    )
    assert ngram_overlap([], theirs)["of_generated"] == 0


def test_the_report_is_read_again(grammar: Path, tmp_path: Path) -> None:
    output = tmp_path / "home.jsonl"
    report = generate_text(DOMAIN, TextOptions(count=200, grammar=grammar), output)
    kept = json.loads((tmp_path / "home.report.json").read_text(encoding="utf-8"))
    assert kept == report.as_json()
    assert TextReport.read(tmp_path / "home.report.json", output) == report
    text = report.as_text()
    for expected in ("200 sentences", "distinct n-grams", "switch", "question", "templates used: 3 of 3", "draws:"):
        assert expected in text
    assert report_on(output, load_grammar(grammar)).diversity == report.diversity
    (tmp_path / "home.report.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="is complete, but its report"):
        generate_text(DOMAIN, TextOptions(count=200, grammar=grammar), output)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="holds no rows"):
        report_on(tmp_path / "empty.jsonl")


def test_the_evaluation_list_knows_wake_words(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("okay home computer, what's on?\n\nturn it off\n", encoding="utf-8")
    listed = EvaluationList([path], DOMAIN.wake_words)
    assert listed.holds(words_of("whats on"))
    assert listed.holds(words_of("hey home what's on"))
    assert not listed.holds(words_of("what is on"))
    assert listed.nearly_holds(words_of("turn off it"))
    lengths = [len(words) for words in listed.sentences]
    assert lengths == [5, 3]
    assert all(one >= other for one, other in pairwise(lengths))
