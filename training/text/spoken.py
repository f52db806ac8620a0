"""Written English to what is said: digits, symbols and abbreviations become words.

    spoken("Wake me at 7:05 a.m. on 3/14 & play AC/DC")
    # Wake me at seven oh five a m on March fourteenth and play A C D C

A list of rules, each a pattern and what is said instead, from the special to the general: a rule leaves no digits
behind of what it knew, and the next sees only the rest. Case and the punctuation of speech (. , ? ! ; : ' -) are kept.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from das_asr.training.text.number_words import cardinal, decimal, digits, ordinal, year
from das_asr.training.text.written import (
    ABBREVIATIONS,
    CURRENCIES,
    FRACTIONS,
    MAGNITUDES,
    MONTHS,
    ROMAN,
    SAID_AS_WORDS,
    SPELLED,
    SYMBOLS,
    UNITS,
)

__all__ = ["is_spoken", "spoken"]

Found = re.Match[str]
Said = Callable[[Found], str]

_NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
_MONTH = "|".join(sorted((rf"{name}\b\.?" for name in MONTHS), key=len, reverse=True))
_UNIT = "|".join(sorted(map(re.escape, UNITS), key=len, reverse=True))
_PLAIN = re.compile(r"[A-Za-z]?[a-z' ]*[.?!]?")
_SPEAKABLE = re.compile(r"(?:[^\W\d_]|[\u0300-\u036f .,?!;:'-])*")


def spoken(text: str) -> str:
    """The text without digits and symbols; unchanged where there are none."""
    if _PLAIN.fullmatch(text):
        return " ".join(text.split())
    text = unicodedata.normalize("NFKC", text.translate(_TYPOGRAPHY))
    for pattern, said in _RULES:
        text = pattern.sub(said, text)
    return _tidy(text)


def is_spoken(text: str) -> bool:
    """Whether only letters, spaces and the punctuation of speech are left, and any letter at all."""
    return bool(_SPEAKABLE.fullmatch(text)) and any(letter.isalpha() for letter in text)


_TYPOGRAPHY = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u02bc\u00b4`", "'"),
        **dict.fromkeys('\u201c\u201d\u201e\u00ab\u00bb"', " "),
        **dict.fromkeys("\u2014\u2015", ", "),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-"),
        **dict.fromkeys("\u200b\u200c\u200d\ufe0f\u2122\u00ae\u00a9", ""),
        **{letter: f" {written}" for letter, written in zip("\u00bd\u00bc\u00be", ("1/2", "1/4", "3/4"), strict=True)},
        "\u2026": ", ",
    }
)


def _tidy(text: str) -> str:
    text = re.sub(r"[^\w\u0300-\u036f .,?!;:'-]|_", " ", text)
    text = re.sub(r"(?<!\w)'+(?=\s|$)|(?<![\w'])-+(?=\s|$)|^[\s,;:.-]+", " ", text)
    text = re.sub(r"\s+([.,?!;:])", r"\1", text)
    text = re.sub(r"([.,;:])(?:\s*[.,;:])+", r"\1", text)
    return " ".join(text.split()).rstrip(" ,;:-")


def _clock(found: Found) -> str:
    hour, minute, half = int(found["hour"]), int(found["minute"] or 0), found["half"]
    if hour > 24 or minute > 59:
        return f"{cardinal(hour)} {cardinal(minute)}"
    if half:
        return " ".join((cardinal(hour), _minutes(minute), half.lower(), "m")).replace("  ", " ")
    if minute:
        return f"{cardinal(hour)} {_minutes(minute)}"
    return f"{cardinal(hour)} o'clock" if 1 <= hour <= 12 else f"{cardinal(hour)} hundred"


def _minutes(minute: int) -> str:
    if minute == 0:
        return ""
    return f"oh {cardinal(minute)}" if minute < 10 else cardinal(minute)


def _date(month: str, day: str, written_year: str | None) -> str:
    name = MONTHS.get(month.lower().rstrip("."), month) if not month.isdecimal() else _month_name(int(month))
    said = [name, ordinal(int(day))]
    if written_year:
        said.append(year(int(written_year)))
    return " ".join(said)


def _month_name(number: int) -> str:
    return list(dict.fromkeys(MONTHS.values()))[number - 1]


def _numeric_date(found: Found) -> str:
    month, day = int(found["month"]), int(found["day"])
    if month > 12 and day <= 12:
        month, day = day, month
    if not (1 <= month <= 12 and 1 <= day <= 31):
        return " ".join(cardinal(int(part)) for part in re.findall(r"\d+", found[0]))
    return _date(str(month), str(day), found["year"])


def _money(found: Found) -> str:
    amount, magnitude = found["amount"].replace(",", ""), found["magnitude"]
    one, many, small_one, small_many = CURRENCIES[found["sign"]]
    if magnitude:
        return f"{decimal(amount)} {MAGNITUDES[magnitude.lower()]} {many}"
    whole, _, cents = amount.partition(".")
    said = []
    if int(whole or 0) or not cents:
        said.append(f"{cardinal(int(whole or 0))} {one if int(whole or 0) == 1 else many}")
    if small := int(cents.ljust(2, "0")[:2] or 0):
        said.append(f"{cardinal(small)} {small_one if small == 1 else small_many}")
    return " and ".join(said) or f"zero {many}"


def _unit(found: Found) -> str:
    one, many = UNITS[found["unit"] if found["unit"] in UNITS else found["unit"].lower()]
    return f"{decimal(found['number'])} {one if found['number'] == '1' else many}"


def _degrees(found: Found) -> str:
    scale = {"C": " celsius", "F": " fahrenheit"}.get((found["scale"] or "").upper(), "")
    return f"{decimal(found['number'])} degree{'' if found['number'].lstrip('-') == '1' else 's'}{scale}"


def _decade(found: Found) -> str:
    said = year(int(found["century"] + found["tens"])) if found["century"] else cardinal(int(found["tens"]))
    return said.removesuffix("y") + "ies" if said.endswith("y") else f"{said}s"


def _fraction(found: Found) -> str:
    whole, top, bottom = found["whole"], int(found["top"]), int(found["bottom"])
    if (top, bottom) == (24, 7) or bottom not in FRACTIONS or not 0 < top < bottom:
        return " ".join(cardinal(int(part)) for part in re.findall(r"\d+", found[0]))
    one, many = FRACTIONS[bottom]
    part = f"{cardinal(top)} {one if top == 1 else many}"
    if not whole:
        return part
    return f"{cardinal(int(whole))} and {'a half' if part == 'one half' else part}"


def _number(found: Found) -> str:
    written = found[0]
    plain = written.isdecimal()
    if plain and (len(written) >= 7 or (len(written) > 1 and written[0] == "0") or written in ("911", "999", "411")):
        return digits(written)
    if plain and len(written) == 4 and 1100 <= int(written) <= 2099:
        return year(int(written))
    return decimal(written)


def _letters(found: Found) -> str:
    return " ".join(letter for letter in found[0] if letter.isalpha())


def _acronym(found: Found) -> str:
    word, end = found["word"], "s" if found["plural"] else ""
    if word in ROMAN:
        return cardinal(ROMAN[word])
    if word in SAID_AS_WORDS:
        return SAID_AS_WORDS[word] + end
    short = len(word) <= 3 or not set(word) & set("AEIOUY") or word in SPELLED
    return " ".join(word) + (f"'{end}" if end else "") if short and not _shouted(found.string) else found[0]


def _shouted(text: str) -> bool:
    """Written in capitals altogether, so that capitals tell nothing."""
    return not any(letter.islower() for letter in text) and len(text.split()) > 2


def _rule(pattern: str, said: Said | str, flags: re.RegexFlag = re.IGNORECASE) -> tuple[re.Pattern[str], Said]:
    return re.compile(pattern, flags), (lambda _: said) if isinstance(said, str) else said


def _exactly(pattern: str, said: Said | str) -> tuple[re.Pattern[str], Said]:
    return _rule(pattern, said, re.NOFLAG)


_ADDRESSES = (
    _rule(r"\bhttps?://", ""),
    _rule(r"\bwww\.(?=\w)", "www dot "),
    _rule(r"(?<=[a-z0-9])\.(?=(?:com|org|net|edu|gov|io|fm|tv|co|uk|de)\b)", " dot "),
    _rule(r"\b[\w.]+@[\w ]+\b", lambda found: found[0].replace("@", " at ").replace(".", " dot ").replace("_", " ")),
)
_TIMES = (
    _rule(
        r"\b(?P<hour>\d{1,2})(?:[:.](?P<minute>\d{2}))?\s*(?P<half>[ap])(?:\.\s?m\b\.?|m\b)(?:\.(?=\s+[a-z]))?", _clock
    ),
    _rule(r"\b(?P<hour>\d{1,2}):(?P<minute>[0-5]\d)(?::\d{2})?(?P<half>)\b(?!\.\d)", _clock),
    _rule(r"(?<=\d):(?=\d)", " to "),
)
_DATES = (
    _rule(r"\b(?P<year>\d{4})-(?P<month>\d{1,2})-(?P<day>\d{1,2})\b", _numeric_date),
    _rule(r"\b(?P<month>\d{1,2})[/.](?P<day>\d{1,2})[/.](?P<year>\d{4})\b", _numeric_date),
    _rule(
        rf"\b(?P<month>{_MONTH})\s+(?:the\s+)?(?P<day>\d{{1,2}})(?:st|nd|rd|th)?\b(?![:.]\d|\s*[ap]\.?m\b)"
        r"(?:,?\s+(?P<year>\d{4})\b)?",
        lambda found: _date(found["month"], found["day"], found["year"]),
    ),
    _rule(
        rf"\b(?P<the>the\s+)?(?P<day>\d{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?(?P<month>{_MONTH})(?:,?\s+(?P<year>\d{{4}})\b)?",
        lambda found: (
            f"{found['the'] or 'the '}{ordinal(int(found['day']))} of "
            + MONTHS.get(found["month"].lower().rstrip("."), found["month"])
            + (f" {year(int(found['year']))}" if found["year"] else "")
        ),
    ),
)
_AMOUNTS = (
    _rule(
        rf"(?P<sign>[$£€¥₹])\s?(?P<low>{_NUMBER})\s?-\s?[$£€¥₹]?(?P<high>{_NUMBER})\b(?!\s?[kmb]\b)",
        lambda found: f"{decimal(found['low'])} to {decimal(found['high'])} {CURRENCIES[found['sign']][1]}",
    ),
    _rule(
        rf"(?P<sign>[$£€¥₹])\s?(?P<amount>{_NUMBER})(?:\s?(?P<magnitude>k|m|mn|bn|b|thousand|million|billion|trillion)\b)?",
        _money,
    ),
    _rule(r"\b1\s?¢", "one cent"),
    _rule(r"\b(?P<number>\d+)\s?¢", lambda found: f"{cardinal(int(found['number']))} cents"),
    _rule(
        rf"(?P<sign>(?<![\w.])-)?(?P<number>{_NUMBER})\s?%",
        lambda found: f"{'minus ' if found['sign'] else ''}{decimal(found['number'])} percent",
    ),
    _rule(r"%", " percent "),
    _rule(rf"(?P<number>(?:(?<![\w.])-)?(?:{_NUMBER}))\s?°\s?(?P<scale>[cf]\b)?", _degrees),
    _rule(r"°\s?(?P<scale>[cf]\b)?", " degrees "),
    _exactly(
        rf"(?<![\w.])(?P<number>{_NUMBER})[ -]?(?P<unit>{_UNIT})\b",
        _unit,
    ),
)
_COUNTS = (
    _rule(r"\b(?P<number>\d{1,3}(?:,\d{3})+|\d+)(?:st|nd|rd|th)\b", lambda found: _as_ordinal(found["number"])),
    _rule(r"(?<!\w)'?(?P<century>1\d|20)?(?P<tens>\d0)'?s\b", _decade),
    _rule(r"\(?\b\d{3}\)?[-. ]\d{3}[-.]\d{4}\b|\b\d{3}-\d{4}\b", lambda found: digits(re.sub(r"\D", "", found[0]))),
    _rule(r"(?<=\d)'\s?(?=\d{1,2}\b)", " foot "),
    _rule(r"(?<=\d)\s?-\s?(?=\d)", " to "),
    _rule(r"\b(?:(?P<whole>\d+)\s+)?(?P<top>\d+)\s?/\s?(?P<bottom>\d+)\b", _fraction),
    _rule(r"#\s?(?=\d)|\bno\.\s?(?=\d)|\bnr\.\s?(?=\d)", "number "),
    _rule(r"#(?=\w)", "hashtag "),
    _rule(r"\b(?P<number>\d+)x\b", lambda found: f"{cardinal(int(found['number']))} times"),
)
_SHORTENED = (
    _rule(r"(?<=\w)\s?/\s?(?=(?:month|day|week|hour|year|night|person|mile|minute|second)\b)", " per "),
    _exactly(r"\bSt\.(?=\s+[A-Z])", "Saint"),
    *(_rule(rf"(?<![\w.]){written}", said) for written, said in ABBREVIATIONS),
    _rule(r"\b(?:[a-z]\.){2,}(?:[a-z]\b)?|\b(?:[a-z]\.)+[a-z]\b\.?", _letters),
    _exactly(r"\b[A-Z]{1,4}/[A-Z]{1,4}\b", _letters),
)
_REST = (
    _rule(r"(?<=[a-z])-?(?=\d)|(?<=\d)-?(?=[a-z])", " "),
    _rule(r"(?<![\w.])-(?=\d)", "minus "),
    _rule(r"\b\d+(?:\.\d+){2,}\b", lambda found: " point ".join(cardinal(int(part)) for part in found[0].split("."))),
    _rule(_NUMBER, _number),
    _exactly(r"\b(?P<word>[A-Z]{2,5})(?P<plural>'?s)?\b", _acronym),
    *(_rule(re.escape(symbol), f" {said} ") for symbol, said in SYMBOLS.items()),
)


def _as_ordinal(number: str) -> str:
    return ordinal(int(number.replace(",", "")))


_RULES = (*_ADDRESSES, *_TIMES, *_DATES, *_AMOUNTS, *_COUNTS, *_SHORTENED, *_REST)
