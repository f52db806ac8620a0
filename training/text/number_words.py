"""Numbers as they are said in English, without hyphens: 125 -> one hundred and twenty five."""

from __future__ import annotations

__all__ = ["cardinal", "decimal", "digits", "ordinal", "year"]

_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_GROUPS = ((10**12, "trillion"), (10**9, "billion"), (10**6, "million"), (10**3, "thousand"))
_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}


def cardinal(number: int) -> str:
    """Any whole number; from a thousand trillions on, digit by digit."""
    if number < 0:
        return f"minus {cardinal(-number)}"
    if number >= 10**15:
        return digits(str(number))
    words = []
    for size, name in _GROUPS:
        count, number = divmod(number, size)
        if count:
            words += [_below_thousand(count), name]
    if number or not words:
        if words and number < 100:
            words.append("and")
        words.append(_below_thousand(number))
    return " ".join(words)


def _below_thousand(number: int) -> str:
    hundreds, rest = divmod(number, 100)
    if not hundreds:
        return _below_hundred(rest)
    return f"{_SMALL[hundreds]} hundred" + (f" and {_below_hundred(rest)}" if rest else "")


def _below_hundred(number: int) -> str:
    if number < 20:
        return _SMALL[number]
    tens, unit = divmod(number, 10)
    return _TENS[tens] + (f" {_SMALL[unit]}" if unit else "")


def ordinal(number: int) -> str:
    """21 -> twenty first."""
    head, space, last = cardinal(number).rpartition(" ")
    if last in _ORDINALS:
        last = _ORDINALS[last]
    else:
        last = last.removesuffix("y") + "ieth" if last.endswith("y") else last.removesuffix("t") + "th"
    return head + space + last


def year(number: int) -> str:
    """1999 -> nineteen ninety nine, 2005 -> two thousand and five; what is no year of four digits is a cardinal."""
    century, rest = divmod(number, 100)
    if not 1000 <= number <= 2999 or (century % 10 == 0 and rest < 10):
        return cardinal(number)
    if rest < 10:
        return f"{_below_hundred(century)} " + (f"oh {_SMALL[rest]}" if rest else "hundred")
    return f"{_below_hundred(century)} {_below_hundred(rest)}"


def decimal(number: str) -> str:
    """`-3.05` -> minus three point zero five; commas between thousands are ignored."""
    sign = "minus " if number.startswith("-") else ""
    whole, _, fraction = number.lstrip("-").replace(",", "").partition(".")
    point = f" point {digits(fraction)}" if fraction else ""
    return sign + cardinal(int(whole or 0)) + point


def digits(number: str) -> str:
    """Digit by digit."""
    return " ".join(_SMALL[int(digit)] for digit in number)
