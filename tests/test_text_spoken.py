"""Written forms become spoken ones, and numbers become words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from das_asr.training.text.number_words import cardinal, ordinal, year
from das_asr.training.text.spoken import is_spoken, spoken
from das_asr.training.text.words import words_of

SPOKEN = {
    # unchanged
    "play some jazz": "play some jazz",
    "what's on, Anna?": "what's on, Anna?",
    "Beyoncé's twenty-one songs": "Beyoncé's twenty-one songs",
    "rock 'n' roll by Guns N' Roses": "rock 'n' roll by Guns N' Roses",
    # numbers
    "set it to 70": "set it to seventy",
    "1,500 people": "one thousand five hundred people",
    "3.5 miles": "three point five miles",
    "12,345.67": "twelve thousand three hundred and forty five point six seven",
    "-5 outside": "minus five outside",
    "agent 007": "agent zero zero seven",
    "call 911": "call nine one one",
    "call 555-1234": "call five five five one two three four",
    "(212) 555-0100": "two one two five five five zero one zero zero",
    "version 2.0.1": "version two point zero point one",
    "5-10 minutes": "five to ten minutes",
    "won 3\u20132": "won three to two",
    "2x speed": "two times speed",
    "#1 hit": "number one hit",
    "No. 5": "number five",
    # ordinals
    "the 1st and the 22nd": "the first and the twenty second",
    "my 40th, your 100th": "my fortieth, your one hundredth",
    "the 12th": "the twelfth",
    # fractions
    "1/2 cup": "one half cup",
    "1 1/2 cups": "one and a half cups",
    "2½ cups": "two and a half cups",
    "3/4": "three quarters",
    "24/7": "twenty four seven",
    # years
    "in 1999": "in nineteen ninety nine",
    "in 1905": "in nineteen oh five",
    "in 2005": "in two thousand and five",
    "in 2024": "in twenty twenty four",
    "the 1980s": "the nineteen eighties",
    "'90s or 80s": "nineties or eighties",
    # money
    "$5": "five dollars",
    "$1": "one dollar",
    "$5.50": "five dollars and fifty cents",
    "$0.99": "ninety nine cents",
    "$1.2 million": "one point two million dollars",
    "$3B": "three billion dollars",
    "£20 or €1": "twenty pounds or one euro",
    "$10-20": "ten to twenty dollars",
    "$5/month": "five dollars per month",
    "50¢": "fifty cents",
    # percent
    "20% off": "twenty percent off",
    "2.5 %": "two point five percent",
    # times
    "at 7:30": "at seven thirty",
    "at 7:05 a.m. today": "at seven oh five a m today",
    "7pm": "seven p m",
    "10:15 PM": "ten fifteen p m",
    "at 7:00": "at seven o'clock",
    "at 12:00 pm": "at twelve p m",
    "19:45": "nineteen forty five",
    "3 o'clock": "three o'clock",
    # dates
    "3/14/2024": "March fourteenth twenty twenty four",
    "2024-03-14": "March fourteenth twenty twenty four",
    "March 3rd, 2024": "March third twenty twenty four",
    "Mar. 5": "March fifth",
    "3 March": "the third of March",
    "the 3rd of May": "the third of May",
    # units
    "5 km": "five kilometers",
    "1 kg": "one kilogram",
    "a 5-mile run": "a five mile run",
    "72°F": "seventy two degrees fahrenheit",
    "-5 °C": "minus five degrees celsius",
    "1°": "one degree",
    "100 km/h": "one hundred kilometers per hour",
    "set a timer for 5 min": "set a timer for five minutes",
    "120 bpm": "one hundred and twenty beats per minute",
    "6'2 tall": "six foot two tall",
    # symbols
    "salt & pepper": "salt and pepper",
    "2 + 2 = 4": "two plus two equals four",
    "me@mail.com": "me at mail dot com",
    "www.bbc.com": "www dot bbc dot com",
    "#love": "hashtag love",
    "**Play** \u201cHello\u201d \U0001f3b5": "Play Hello",
    "and/or": "and or",
    "wait\u2026 what": "wait, what",
    # abbreviations
    "Dr. Smith vs. Mr. Jones": "doctor Smith versus mister Jones",
    "St. Louis on Main St.": "Saint Louis on Main street",
    "e.g. rock etc.": "for example rock et cetera",
    "the U.S. news": "the U S news",
    "J. Cole": "J. Cole",
    "play AC/DC": "play A C D C",
    "the NBA on TV": "the N B A on T V",
    "NASA and ESPN": "NASA and E S P N",
    "I'm OK": "I'm okay",
    "World War II": "World War two",
    "an MP3 by U2": "an M P three by U two",
    "Blink-182": "Blink one hundred and eighty two",
    "PLAY IT LOUD NOW": "PLAY IT LOUD NOW",
}


@pytest.mark.parametrize(("written", "said"), SPOKEN.items(), ids=list(SPOKEN))
def test_written_becomes_spoken(written: str, said: str) -> None:
    assert spoken(written) == said
    assert is_spoken(said)
    assert spoken(said) == said


@pytest.mark.parametrize("text", ["", "...", "5 apples", "a & b", "caf\u00e9 \U0001f600"])
def test_what_is_not_spoken(text: str) -> None:
    assert not is_spoken(text)


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=40))
def test_no_digit_or_symbol_is_left_of_anything(text: str) -> None:
    said = spoken(text)
    assert not any(letter in "0123456789$%&@#*+=/\u20ac<>{}[]()" for letter in said)
    assert said == " ".join(said.split())


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (85, "eighty five"),
        (100, "one hundred"),
        (101, "one hundred and one"),
        (1001, "one thousand and one"),
        (1_234_567, "one million two hundred and thirty four thousand five hundred and sixty seven"),
        (10**12, "one trillion"),
        (-8, "minus eight"),
        (10**15, "one zero zero zero zero zero zero zero zero zero zero zero zero zero zero zero"),
    ],
)
def test_cardinals(number: int, words: str) -> None:
    assert cardinal(number) == words


def test_all_cardinals_differ() -> None:
    assert len({cardinal(number) for number in range(12_000)}) == 12_000


def test_ordinals() -> None:
    numbers = (1, 2, 3, 4, 5, 8, 9, 12, 20, 21, 30, 100, 1000)
    assert [ordinal(number) for number in numbers] == [
        *("first", "second", "third", "fourth", "fifth", "eighth", "ninth", "twelfth", "twentieth", "twenty first"),
        *("thirtieth", "one hundredth", "one thousandth"),
    ]


def test_years() -> None:
    assert [year(number) for number in (1066, 1900, 2000, 2009, 2010, 3000)] == [
        *("ten sixty six", "nineteen hundred", "two thousand", "two thousand and nine", "twenty ten"),
        "three thousand",
    ]


def test_words_are_the_same_however_they_are_written() -> None:
    assert words_of("What's on at 7:30 p.m.?") == words_of("whats on at seven thirty P M") != ()
