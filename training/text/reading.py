"""Reads what language models answer: lists and objects, in whatever form they come.

A JSON list, a JSON object around it, Python's quotes, fenced code, prose before and after, trailing commas, a list
that was cut off, numbers, bullets, one item per line. What has none of these forms is None, and the caller asks again.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from typing import Any

__all__ = ["read_list", "read_object", "read_text"]

_THOUGHT = re.compile(r"<(think|thinking|reasoning)>.*?(?:</\1>|\Z)", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(r"```[\w-]*\n(.*?)(?:```|\Z)", re.DOTALL)
_ITEM = re.compile(r"^\s*(?:\(?\d{1,3}[.):\]]|[-*\u2022\u2013])\s+(\S.*)$", re.MULTILINE)
_STRING = re.compile(r'"((?:[^"\\\n]|\\.)*)"')
_ADJACENT = re.compile(r"""(["'])\s+\1""")
_LABEL = re.compile(r"^(?:\*\*)?[A-Za-z][A-Za-z ]{0,30}:(?:\*\*)?\s*")
_QUOTES = "\"'\u201c\u201d\u2018\u2019`* "
_FEWEST_LINES = 3  # bare lines are a list from here on; fewer are prose
_LONGEST_LINE = 30  # words


def read_list(answer: str) -> list[str] | None:
    """The items of a list, or None."""
    text = _THOUGHT.sub("", answer).strip()
    for part in (*_FENCE.findall(text), text):
        for reader in (_json_list, _torn_list, _marked_lines):
            if items := reader(part):
                return items
    return _bare_lines(text)


def read_object(answer: str) -> dict[str, Any] | None:
    """A JSON object, or None."""
    text = _THOUGHT.sub("", answer).strip()
    for part in (*_FENCE.findall(text), text):
        for value in _values(part, "{"):
            if isinstance(value, dict) and value:
                return value
    return None


def read_text(answer: str) -> str | None:
    """A single paragraph: without quotes, fences and a label such as `New brief:` around it; or None."""
    text = _THOUGHT.sub("", answer).strip()
    if found := read_object(text):
        text = next((value for value in found.values() if isinstance(value, str)), "")
    elif fenced := _FENCE.findall(text):
        text = fenced[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        lines = lines[1:]
    line = _LABEL.sub("", lines[0]).strip(_QUOTES) if lines else ""
    return line or None


def _json_list(text: str) -> list[str] | None:
    for value in _values(text, "["):
        if isinstance(value, list) and (items := _texts(value)):
            return items
    return None


def _texts(values: list[Any]) -> list[str]:
    """Strings, and the first string of each object: `[{"sentence": "..."}]`."""
    found = []
    for value in values:
        if isinstance(value, dict):
            value = next((inner for inner in value.values() if isinstance(inner, str)), None)
        if isinstance(value, str) and value.strip():
            found.append(" ".join(value.split()))
    return found


def _values(text: str, bracket: str) -> Iterator[Any]:
    """JSON or Python values that begin with this bracket, in order; what one of them spans is not looked at again."""
    closing = {"[": "]", "{": "}"}[bracket]
    start = text.find(bracket)
    while start >= 0:
        end = _closing(text, start, bracket, closing)
        value = None if end is None else _parse(text[start : end + 1])
        if value is not None:
            yield value
        start = text.find(bracket, start + 1 if value is None or end is None else end + 1)


def _closing(text: str, start: int, opening: str, closing: str) -> int | None:
    """Index of the bracket that closes the one at `start`; brackets inside double quotes do not count."""
    depth, quoted, escaped = 0, False, False
    for index in range(start, len(text)):
        letter = text[index]
        if escaped or (quoted and letter == "\\"):
            escaped = not escaped
        elif letter == '"':
            quoted = not quoted
        elif not quoted and letter in (opening, closing):
            depth += 1 if letter == opening else -1
            if not depth:
                return index
    return None


def _parse(text: str) -> Any:
    straight = text.translate({0x201C: '"', 0x201D: '"'})
    for form in (text, straight, re.sub(r",(\s*[\]}])", r"\1", straight)):
        try:
            return json.loads(form, strict=False)
        except ValueError:
            continue
    if _ADJACENT.search(text):  # Python would make one string of the two
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _torn_list(text: str) -> list[str] | None:
    """The whole strings of a list that has no end, or that is broken somewhere."""
    start = text.find("[")
    if start < 0 or '"' not in text[start:]:
        return None
    found = []
    for match in _STRING.finditer(text, start):
        following = text[match.end() : match.end() + 20].lstrip()
        if not following.startswith(":"):  # a key
            item = _parse(match[0])
            found.append(" ".join(str(item if item is not None else match[1]).split()))
    return [item for item in found if item] or None


def _marked_lines(text: str) -> list[str] | None:
    return [item for found in _ITEM.findall(text) if (item := found.strip().rstrip(",").strip(_QUOTES))] or None


def _bare_lines(text: str) -> list[str] | None:
    lines = [line.strip().strip(_QUOTES) for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if line and not line.endswith(":") and not line.startswith("```")]
    listed = len(lines) >= _FEWEST_LINES and all(len(line.split()) <= _LONGEST_LINE for line in lines)
    return lines if listed and not any(set(line) & set("{}[]<>") for line in lines) else None
