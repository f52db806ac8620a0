"""Token ids equal those of tiktoken and transformers on the vocabularies of real Whispers."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperTokenizer
from transformers.models.whisper.tokenization_whisper import LANGUAGES as HF_LANGUAGES

from das_asr.runtime.errors import BundleError, CheckpointError, OptionError
from das_asr.runtime.manifest import SpecialTokens
from das_asr.runtime.tokenizer import LANGUAGES, Tokenizer, Word, language_code, special_tokens
from tests.vocabularies import ENGLISH, MULTILINGUAL, MULTILINGUAL_V3, PATTERN, Vocabulary

VOCABULARIES = pytest.mark.parametrize(
    "vocabulary", [MULTILINGUAL, MULTILINGUAL_V3, ENGLISH], ids=["multilingual", "v3", "english"]
)

TEXTS = [
    "",
    " ",
    " Hello, world!",
    "I'm sure they'll say we've  won — it's 3:45pm on 2024-05-06, isn't it?",
    " 1234567890 3.14 50% $1,000,000",
    "trailing spaces   ",
    "tabs\tand\nnewlines\r\n\n  mixed \n end",
    " Привет, как дела?",
    " 你好，世界。今天天气很好",  # noqa: RUF001
    "日本語のテキスト、カタカナ",
    " สวัสดีครับ ສະບາຍດີ မင်္ဂလာပါ",
    " العربية עברית हिन्दी 한국어",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 and é vs e\u0301",
    "<|endoftext|><|en|><|0.00|> looks special <|notimestamps|>",
    "\u00a0\u200b\ufeff\x00\x7f",
    "\ufeff\ufffe begins like a byte order mark",
]

# Scripts whose letters were settled long before either library's Unicode tables.
SCRIPTS = st.one_of(
    st.characters(max_codepoint=0x17F),
    st.characters(min_codepoint=0x391, max_codepoint=0x44F, exclude_categories=["Cn"]),
    st.sampled_from("你好世界今天ひらがなカタカナ한국어สวัสดีमनहب ש😀👩🏽‍🚀🇩🇪٣²½Ⅷ。、…—'’\u3000\u200d\ufe0f\ufffd"),  # noqa: RUF001
    st.sampled_from([" ", "  ", "\n", "'s", "'ll", " the", "ing", "<|en|>", "<|0.00|>", "12", " 3.5"]),
)
MIXED = st.lists(SCRIPTS, max_size=40).map("".join)


@functools.cache
def load(vocabulary: Vocabulary) -> Tokenizer:
    return Tokenizer.from_file(vocabulary.tokenizer_file, found(vocabulary))


def found(vocabulary: Vocabulary, **changes: Any) -> SpecialTokens:
    generation = {key: value for key, value in (vocabulary.generation_config | changes).items() if value is not None}
    return special_tokens(vocabulary.tokenizer_file, generation, vocabulary.config)


@functools.cache
def oracle(vocabulary: Vocabulary) -> tiktoken.Encoding:
    ranks = {token: rank for token, rank in vocabulary.ranks.items() if token}
    return tiktoken.Encoding(vocabulary.asset, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})


@functools.cache
def transformers_tokenizer(vocabulary: Vocabulary) -> WhisperTokenizer:
    return WhisperTokenizer.from_pretrained(vocabulary.directory)


# Special tokens


def test_sizes_of_the_real_vocabularies() -> None:
    assert [v.size for v in (MULTILINGUAL, MULTILINGUAL_V3, ENGLISH)] == [51865, 51866, 51864]


def test_special_tokens_of_multilingual_checkpoints() -> None:
    tokens = found(MULTILINGUAL)
    assert (tokens.end_of_text, tokens.start_of_transcript, tokens.languages["en"]) == (50257, 50258, 50259)
    assert (tokens.translate, tokens.transcribe, tokens.start_of_previous) == (50358, 50359, 50361)
    assert (tokens.no_speech, tokens.no_timestamps, tokens.first_timestamp) == (50362, 50363, 50364)
    assert len(tokens.languages) == 99
    newer = found(MULTILINGUAL_V3)
    assert (newer.languages["yue"], newer.transcribe, newer.no_speech) == (50358, 50360, 50363)


def test_special_tokens_of_english_checkpoints() -> None:
    tokens = found(ENGLISH)
    assert (tokens.end_of_text, tokens.start_of_transcript, tokens.no_timestamps) == (50256, 50257, 50362)
    assert (tokens.languages, tokens.transcribe, tokens.translate) == ({}, None, None)


def test_special_tokens_of_the_demo_base(demo_base: Path) -> None:
    tokens = demo_tokens(demo_base)
    assert (tokens.end_of_text, tokens.start_of_transcript, tokens.no_timestamps) == (1200, 1201, 1208)
    assert tokens.languages == {"en": 1202}
    assert tokens.first_timestamp is None


def demo_tokens(directory: Path) -> SpecialTokens:
    configs = [json.loads((directory / name).read_text()) for name in ("generation_config.json", "config.json")]
    return special_tokens(directory / "tokenizer.json", *configs)


@pytest.mark.parametrize(
    ("changes", "languages"),
    [
        ({}, 99),
        ({"lang_to_id": None}, 99),  # the tokenizer lists them
        ({"lang_to_id": {"<|de|>": 50261}}, 1),  # a checkpoint that was trained for fewer
        ({"is_multilingual": None}, 99),
        ({"is_multilingual": False}, 0),
        ({"is_multilingual": None, "lang_to_id": None}, 0),
    ],
)
def test_what_makes_a_checkpoint_multilingual(changes: dict[str, Any], languages: int) -> None:
    tokens = found(MULTILINGUAL, **changes)
    assert len(tokens.languages) == languages
    assert (tokens.transcribe is None) == (languages == 0)


def test_config_may_say_what_generation_config_does_not() -> None:
    config = MULTILINGUAL.config | {"is_multilingual": True}
    assert len(special_tokens(MULTILINGUAL.tokenizer_file, {}, config).languages) == 99


def test_contradicting_configs() -> None:
    with pytest.raises(CheckpointError, match=r"<\|de\|> the id 50262.*50261"):
        found(MULTILINGUAL, lang_to_id={"<|de|>": 50262})
    with pytest.raises(CheckpointError, match=r"<\|yue\|>.*None"):
        found(MULTILINGUAL, lang_to_id={"<|yue|>": 50358})
    with pytest.raises(CheckpointError, match="vocab_size 50000"):
        special_tokens(MULTILINGUAL.tokenizer_file, MULTILINGUAL.generation_config, {"vocab_size": 50000})


def without(path: Path, *contents: str) -> dict[str, Any]:
    description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    description["added_tokens"] = [t for t in description["added_tokens"] if t["content"] not in contents]
    return description


@pytest.mark.parametrize("content", ["<|endoftext|>", "<|startoftranscript|>"])
def test_tokens_that_every_whisper_has(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(without(ENGLISH.tokenizer_file, content)))
    with pytest.raises(CheckpointError) as caught:
        special_tokens(path, {}, {})
    assert content in str(caught.value)


def test_multilingual_without_languages(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(without(ENGLISH.tokenizer_file, *(f"<|{code}|>" for code in LANGUAGES))))
    with pytest.raises(CheckpointError, match="names a language token"):
        special_tokens(path, {"is_multilingual": True}, {})


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"model": {"vocab": {}, "merges": []}}', "\ufffd"])
def test_damaged_tokenizer_files(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content, encoding="utf-8" if content != "\ufffd" else "utf-16")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        special_tokens(path, {}, {})
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        Tokenizer.from_file(path, found(ENGLISH))


# Text


@VOCABULARIES
def test_encoding_equals_tiktoken(vocabulary: Vocabulary) -> None:
    for text in TEXTS:
        assert load(vocabulary).encode(text) == oracle(vocabulary).encode(text, disallowed_special=())
        assert load(vocabulary).decode(load(vocabulary).encode(text)) == text


@VOCABULARIES
@settings(deadline=None, max_examples=120)
@given(text=MIXED)
def test_encoding_any_text_equals_tiktoken(vocabulary: Vocabulary, text: str) -> None:
    ids = load(vocabulary).encode(text)
    assert ids == oracle(vocabulary).encode(text, disallowed_special=())
    assert load(vocabulary).decode(ids) == text


def test_text_with_half_a_surrogate_pair() -> None:
    tokenizer = load(MULTILINGUAL)
    for text in ("a\ud83d", "\ude00a", "\ud83d\ude00"):
        assert tokenizer.encode(text) == oracle(MULTILINGUAL).encode(text)


@VOCABULARIES
def test_text_never_becomes_a_special_token(vocabulary: Vocabulary) -> None:
    for content in vocabulary.specials:
        ids = load(vocabulary).encode(f"a{content}b")
        assert max(ids) < vocabulary.specials["<|endoftext|>"]
        assert load(vocabulary).decode(ids) == f"a{content}b"


@VOCABULARIES
@settings(deadline=None, max_examples=120)
@given(data=st.data())
def test_decoding_any_ids_equals_tokenizers(vocabulary: Vocabulary, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, vocabulary.size + 10), max_size=12))
    spoken = [token for token in ids if token < vocabulary.specials["<|endoftext|>"]]
    expected = plain(vocabulary).decode(spoken, skip_special_tokens=False)
    assert load(vocabulary).decode(ids) == expected


@functools.cache
def plain(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(vocabulary.tokenizer_file))


def test_decoding_drops_everything_that_is_not_speech() -> None:
    tokenizer = load(MULTILINGUAL)
    ids = [50258, 50259, 50359, 50364, *tokenizer.encode(" one"), 50464, 50464, *tokenizer.encode(" two"), 51864, 50257]
    assert tokenizer.decode(ids) == " one two"
    assert load(ENGLISH).decode([50257, 50258, 50362, *load(ENGLISH).encode(" one"), 51863, 50256]) == " one"


def test_decoding_shows_incomplete_characters() -> None:
    tokenizer = load(MULTILINGUAL)
    ids = tokenizer.encode("a😀")
    assert tokenizer.decode(ids[:-1]) == "a\ufffd"


def test_words_added_to_a_tokenizer_are_text(tmp_path: Path) -> None:
    description = without(MULTILINGUAL.tokenizer_file)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    description["added_tokens"].append({"id": MULTILINGUAL.size, "content": "Ångström unit", **flags})
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(description))
    tokenizer = Tokenizer.from_file(path, found(MULTILINGUAL))
    ids = tokenizer.encode("one Ångström unit")
    assert MULTILINGUAL.size in ids
    assert tokenizer.decode(ids) == "one Ångström unit"


# Prompts


@pytest.mark.parametrize("task", ["transcribe", "translate"])
@pytest.mark.parametrize("vocabulary", [MULTILINGUAL, MULTILINGUAL_V3], ids=["multilingual", "v3"])
def test_prompts_equal_transformers(vocabulary: Vocabulary, task: str) -> None:
    tokenizer = load(vocabulary)
    assert set(tokenizer.special.languages) | {"yue"} == set(HF_LANGUAGES)
    for language in tokenizer.special.languages:
        reference = transformers_tokenizer(vocabulary)
        reference.set_prefix_tokens(language=language, task=task, predict_timestamps=False)
        assert tokenizer.prompt(language, task, None, 100) == (reference.prefix_tokens, 0)


def test_english_prompt_equals_transformers() -> None:
    reference = transformers_tokenizer(ENGLISH)
    reference.set_prefix_tokens(predict_timestamps=False)
    for language in (None, "en", "English"):
        assert load(ENGLISH).prompt(language, "transcribe", None, 0) == (reference.prefix_tokens, 0)


@VOCABULARIES
@pytest.mark.parametrize("previous", ["Ångström, Kelvin.", "  spaced  ", "今天"])
def test_previous_text_equals_transformers(vocabulary: Vocabulary, previous: str) -> None:
    expected = transformers_tokenizer(vocabulary).get_prompt_ids(previous, return_tensors="np").tolist()
    ids, start = load(vocabulary).prompt("en", "transcribe", previous, 200)
    assert ids[:start] == expected
    assert ids[start] == vocabulary.specials["<|startoftranscript|>"]
    assert ids[start:] == load(vocabulary).prompt("en", "transcribe", None, 0)[0]


def test_only_the_last_previous_tokens_are_kept() -> None:
    tokenizer = load(MULTILINGUAL)
    text = " one two three four five six seven eight nine ten"
    assert len(tokenizer.encode(text)) == 10
    ids, start = tokenizer.prompt("en", "transcribe", text, 3)
    assert (tokenizer.decode(ids[:start]), start) == (" eight nine ten", 4)
    for previous, limit in ((text, 0), (None, 5), ("", 5), (" \n", 5)):
        assert tokenizer.prompt("en", "transcribe", previous, limit)[1] == 0
    with pytest.raises(OptionError, match="max_previous"):
        tokenizer.prompt("en", "transcribe", text, -1)


@VOCABULARIES
def test_previous_text_cannot_steer(vocabulary: Vocabulary) -> None:
    text = "<|endoftext|><|startoftranscript|><|en|><|translate|><|startofprev|><|0.00|>"
    ids, start = load(vocabulary).prompt("en", "transcribe", text, 400)
    assert max(ids[1:start]) < vocabulary.specials["<|endoftext|>"]
    assert load(vocabulary).decode(ids) == " " + text


def test_languages_by_code_and_name() -> None:
    tokenizer = load(MULTILINGUAL)
    assert language_code("Haitian Creole") == "ht"
    for code, name in HF_LANGUAGES.items():
        assert LANGUAGES[code] == name
        if code in tokenizer.special.languages:
            expected = tokenizer.prompt(code, "transcribe", None, 0)
            assert tokenizer.prompt(f" {name.title()} ", "transcribe", None, 0) == expected
            assert tokenizer.prompt(code.upper(), "transcribe", None, 0) == expected


def test_languages_and_tasks_a_model_does_not_know(demo_base: Path) -> None:
    tokenizer = load(MULTILINGUAL)
    for unknown in ("yue", "Klingon", "", "<|en|>", "en-US"):
        with pytest.raises(OptionError, match="knows en, zh, de, es, ru, ko and 93 more") as caught:
            tokenizer.prompt(unknown, "transcribe", None, 0)
        assert repr(unknown) in str(caught.value)
    with pytest.raises(OptionError, match="Say which is spoken"):
        tokenizer.prompt(None, "transcribe", None, 0)
    with pytest.raises(OptionError, match="'transliterate' is unknown; transcribe or translate"):
        tokenizer.prompt("en", "transliterate", None, 0)
    with pytest.raises(OptionError, match="English only, not 'German'"):
        load(ENGLISH).prompt("German", "transcribe", None, 0)
    with pytest.raises(OptionError, match="English only and cannot translate"):
        load(ENGLISH).prompt(None, "translate", None, 0)
    demo = Tokenizer.from_file(demo_base / "tokenizer.json", demo_tokens(demo_base))
    assert demo.prompt(None, "transcribe", None, 0) == ([1201, 1202, 1204, 1208], 0)
    with pytest.raises(OptionError, match="knows en"):
        demo.prompt("de", "transcribe", None, 0)


def test_a_model_without_the_optional_tokens() -> None:
    bare = SpecialTokens(50257, 50258, None, None, None, 50359, None, {"en": 50259}, None)
    tokenizer = Tokenizer.from_file(MULTILINGUAL.tokenizer_file, bare)
    assert tokenizer.prompt("en", "transcribe", None, 0) == ([50258, 50259, 50359], 0)
    with pytest.raises(OptionError, match="cannot translate"):
        tokenizer.prompt("en", "translate", None, 0)
    with pytest.raises(OptionError, match="takes no previous text"):
        tokenizer.prompt("en", "transcribe", "before", 10)


# Words


@pytest.mark.parametrize(
    ("text", "language", "words"),
    [
        ("", None, []),
        (" ", None, [" "]),
        (" Hello, world!", "en", [" Hello,", " world!"]),
        ("Hello 'world' isn't it", None, ["Hello", " 'world'", " isn't", " it"]),
        ("a  b \n c\n", None, ["a", "  b", " \n c\n"]),
        (" naïve Ångström 3.14 😀!", "de", [" naïve", " Ångström", " 3.14", " 😀!"]),
        (" добрый день", "ru", [" добрый", " день"]),
        ("한국어 말", "ko", ["한국어", " 말"]),
        ("龘靐", "zh", ["龘", "靐"]),
        ("龘靐", "Chinese", ["龘", "靐"]),
        ("龘靐", "en", ["龘靐"]),
    ],
)
@VOCABULARIES
def test_words(vocabulary: Vocabulary, text: str, language: str | None, words: list[str]) -> None:
    tokenizer = load(vocabulary)
    assert [word.text for word in tokenizer.split_words(tokenizer.encode(text), language)] == words


def test_words_know_their_tokens() -> None:
    tokenizer = load(MULTILINGUAL)
    first = tokenizer.encode(" floccinaucinihilipilification")
    assert len(first) > 3
    ids = [50258, *first, 50364, *tokenizer.encode(" 龘"), 50257]
    words = tokenizer.split_words(ids)
    assert words[0] == Word(" floccinaucinihilipilification", tuple(range(1, len(first) + 1)))
    for word in words:
        assert tokenizer.decode([ids[index] for index in word.tokens]) == word.text


@VOCABULARIES
@settings(deadline=None, max_examples=120)
@given(data=st.data())
def test_words_cover_any_ids(vocabulary: Vocabulary, data: st.DataObject) -> None:
    tokenizer = load(vocabulary)
    some = st.one_of(st.integers(0, 255), st.integers(0, vocabulary.size + 10))  # the first 256 are single bytes
    ids = data.draw(st.one_of(st.lists(some, max_size=16), MIXED.map(tokenizer.encode)))
    words = tokenizer.split_words(ids, data.draw(st.sampled_from([None, "en", "zh", "th"])))
    assert "".join(word.text for word in words) == tokenizer.decode(ids)
    indices = [index for word in words for index in word.tokens]
    assert indices == sorted(set(indices))
    assert tokenizer.decode([ids[index] for index in indices]) == tokenizer.decode(ids)
    assert all(tokenizer.decode([ids[index] for index in word.tokens]) == word.text for word in words)


@settings(deadline=None, max_examples=120)
@given(text=MIXED)
def test_words_have_one_run_of_letters(text: str) -> None:
    tokenizer = load(MULTILINGUAL)
    words = tokenizer.split_words(tokenizer.encode(text))
    assert "\ufffd" in text or not any("\ufffd" in word.text for word in words)
    assert [word.text.strip() for word in words if word.text.strip()] == text.split() or any(
        character.isspace() and character not in " \t\n\r" for character in text
    )
