"""Domain files, shipped and one's own, and the grammars that belong to them."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml

from das_asr.runtime.errors import DataError
from das_asr.training.text.domain import load_domain, shipped_domains
from das_asr.training.text.grammar import load_grammar
from das_asr.training.text.grammar_source import domain_grammar
from das_asr.training.text.new_domain import write_domain, write_grammar
from das_asr.training.text.options import TextOptions

SHIPPED = ("cooking", "health", "music", "navigation", "news", "shopping", "smart_home", "sports", "travel", "weather")
SENTENCES = 200_000  # that a shipped grammar gives at least

GOOD: dict[str, Any] = {
    "name": "pizza",
    "use_case": "An assistant that orders pizza.",
    "skills": ["order a pizza", "ask for the price"],
    "personas": ["a hungry student"],
    "seeds": ["a large one please"],
    "wake_words": ["hey pizza"],
    "styles": ["request"],
    "words": {"min": 2, "max": 12},
}


def _file(folder: Path, **changes: Any) -> Path:
    values = {key: value for key, value in {**GOOD, **changes}.items() if value != "absent"}
    path = folder / "pizza.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def test_a_domain_file(tmp_path: Path) -> None:
    domain = load_domain(_file(tmp_path))
    assert (domain.name, domain.skills, domain.words_min, domain.words_max) == ("pizza", tuple(GOOD["skills"]), 2, 12)
    assert domain == load_domain(str(tmp_path / "pizza.yaml"))
    assert domain.sha256 != load_domain(_file(tmp_path, seeds=["another"])).sha256


def test_skills_may_be_left_to_the_seeds(tmp_path: Path) -> None:
    assert load_domain(_file(tmp_path, use_case="absent", skills="absent")).skills == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"personas": "absent"}, "has no personas"),
        ({"name": "absent", "words": "absent"}, "has no name, words"),
        ({"colour": "red"}, "unknown key colour"),
        ({"name": "Pizza Place"}, "'Pizza Place'"),
        ({"name": 3}, "name is 3; a text"),
        ({"personas": []}, "personas is empty"),
        ({"personas": "a student"}, "personas is 'a student'; a list"),
        ({"personas": [True]}, r"personas\[0\] is True; a text is expected. Put quotes"),
        ({"seeds": ["one", " "]}, "seeds holds an empty text"),
        ({"skills": ["a", "b", "a"]}, "skills names 'a' twice"),
        ({"styles": ["shout"]}, "styles is .'shout'.; one or more of request, question"),
        ({"styles": []}, "styles"),
        ({"words": {"min": 9, "max": 3}}, "min 9 and max 3"),
        ({"words": {"min": 0, "max": 3}}, "min 0"),
        ({"words": {"min": 1}}, "words is .* is expected"),
        ({"words": {"min": "1", "max": 3}}, "two whole numbers"),
        ({"words": 12}, "words is 12"),
        ({"skills": "absent"}, "has use_case but no skills"),
        ({"use_case": "absent"}, "has skills but no use_case"),
        ({"use_case": "absent", "skills": "absent", "seeds": "absent"}, "neither use_case and skills nor seeds"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_domain(_file(tmp_path, **changes))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"- a\n- b\n", "holds list"), (b"name: [", "is not YAML"), (b"\xff\xfe\xfa", "cannot be read")],
)
def test_what_is_no_domain_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "pizza.yaml"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_domain(path)


def test_an_unknown_domain_names_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no domain 'musik'.*music.*weather"):
        load_domain("musik")
    with pytest.raises(DataError, match="cannot be read"):
        load_domain(tmp_path / "absent.yaml")


def test_a_new_domain_is_accepted_as_it_is(tmp_path: Path) -> None:
    write_domain("garden_tools", tmp_path / "garden.yaml")
    write_grammar("garden_tools", tmp_path / "grammar.yaml")
    domain = load_domain(tmp_path / "garden.yaml")
    assert domain.name == "garden_tools"
    assert "garden tools" in domain.use_case
    grammar = domain_grammar(domain, TextOptions(grammar=tmp_path / "grammar.yaml"))
    assert {template.skill for template in grammar.templates} == set(domain.skills)


def test_a_new_domain_overwrites_nothing(tmp_path: Path) -> None:
    path = tmp_path / "pizza.yaml"
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(DataError, match="exists and is not overwritten"):
        write_domain("pizza", path)
    assert path.read_text(encoding="utf-8") == "mine"
    with pytest.raises(DataError, match="'Pi zza' cannot name a domain"):
        write_domain("Pi zza", tmp_path / "other.yaml")
    with pytest.raises(DataError, match="cannot be written"):
        write_domain("pizza", tmp_path / "absent" / "pizza.yaml")
    assert list(tmp_path.iterdir()) == [path]


def _grammar(folder: Path, text: str) -> Path:
    path = folder / "g.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slots: {}\ntemplates: []", "has no templates"),
        ("slots: {}\ntemplates: [{text: 'a {b}', skill: s}]", "uses {b}"),
        ("slots: {a: ['{b}'], b: ['{a}']}\ntemplates: [{text: '{a}', skill: s}]", "needs itself"),
        ("slots: {a: []}\ntemplates: [{text: '{a}', skill: s}]", "no fillers"),
        ("slots: {a: [1]}\ntemplates: [{text: '{a}', skill: s}]", "list of strings"),
        ("slots: {}\ntemplates: [{text: a, skill: s, style: shout}]", "'shout'"),
        ("slots: {}\ntemplates: [{text: a, skill: s, tone: x}]", "a template has"),
        ("slots: {}\ntemplates: [{text: 5, skill: s}]", "texts and a weight"),
        ("slots: {}\ntemplates: [{text: a, skill: s, weight: 0}]", "weight above 0"),
        ("slots: [a]\ntemplates: []", "must be a mapping"),
        ("slots: {", "is not YAML"),
    ],
)
def test_mistakes_of_grammars_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_grammar(_grammar(tmp_path, text))


def test_a_grammar_must_know_the_skills(tmp_path: Path) -> None:
    path = _grammar(tmp_path, "slots: {}\ntemplates: [{text: a b, skill: fly}, {text: c d, skill: order a pizza}]")
    domain = load_domain(_file(tmp_path))
    with pytest.raises(DataError, match="'fly', which are no skills of the domain pizza"):
        domain_grammar(domain, TextOptions(grammar=path))
    with pytest.raises(DataError, match="no grammar for the domain 'pizza'"):
        domain_grammar(domain, TextOptions())


def test_ten_domains_are_shipped() -> None:
    assert set(SHIPPED) <= set(shipped_domains())


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_domain_has_a_rich_grammar(name: str) -> None:
    domain = load_domain(name)
    assert domain.name == name
    assert all((domain.use_case, domain.skills, domain.personas, domain.seeds, domain.wake_words))
    grammar = domain_grammar(domain, TextOptions())  # refuses strange skills
    assert {template.style for template in grammar.templates} <= set(domain.styles)
    assert grammar.size() >= SENTENCES
    drawn = [sentence.text for sentence in islice(grammar.sentences(0), 20_000)]
    assert len(set(drawn)) >= 0.9 * len(drawn)


@pytest.mark.soak
@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_grammar_gives_200000_sentences(name: str) -> None:
    seen: set[str] = set()
    for sentence in islice(load_grammar(name).sentences(1), 4 * SENTENCES):
        seen.add(sentence.text)
        if len(seen) == SENTENCES:
            break
    assert len(seen) == SENTENCES
