"""Natural English for the tiny base: short sentences of the texts that a Debian machine has.

Sources: the fortune cookies (packages fortunes, fortunes-min), WordNet's usage examples (wordnet-base) and the
docstrings of Python's own library. Everything is lower-cased letters and apostrophes; what holds digits or symbols is
dropped.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from das_asr.runtime.errors import DataError

__all__ = ["Sources", "dictionary_words", "natural_snippets", "plain_words"]

_FEWEST, _MOST = 3, 13  # words of a snippet

_CLAUSE_END = re.compile(r"[.;:!?%()\[\]\"]+|--+|\n\s*\n")
_PLAIN = re.compile(r"[a-z]+(?:'[a-z]+)?")
_QUOTED = re.compile(r'"([^"]+)"')
_IGNORED = str.maketrans(",\n\t*_\u2019\u2018`", "     '''")


class Sources:
    """Where the texts are; the defaults are Debian's places."""

    def __init__(self, root: Path = Path("/usr/share")) -> None:
        self.fortunes = root / "games/fortunes"
        self.wordnet = root / "wordnet"
        self.dictionary = root / "dict/american-english"

    def check(self) -> None:
        """Raises DataError when a source is not installed."""
        packages = {"fortunes": self.fortunes, "wordnet-base": self.wordnet, "wamerican": self.dictionary}
        missing = [package for package, path in packages.items() if not path.exists()]
        if missing:
            raise DataError(
                f"Text to train on is missing: {', '.join(missing)}. On Debian: apt-get install {' '.join(missing)}."
            )


def natural_snippets(sources: Sources) -> Iterator[tuple[str, str]]:
    """Yields (source, snippet), in an order that depends on the files alone; snippets may repeat."""
    for path in _fortune_files(sources.fortunes):
        for snippet in _snippets(path.read_text(encoding="utf-8", errors="replace")):
            yield "fortunes", snippet
    for path in sorted(sources.wordnet.glob("data.*")):
        for example in _examples(path):
            for snippet in _snippets(example):
                yield "wordnet", snippet
    for text in _docstrings():
        for snippet in _snippets(text):
            yield "python", snippet


def plain_words(text: str) -> list[str] | None:
    """Lower-case words of a text, or None when it holds anything but letters, apostrophes, commas and spaces."""
    words = text.translate(_IGNORED).lower().replace(" '", " ").replace("' ", " ").strip(" '-").split()
    return words if all(_PLAIN.fullmatch(word) for word in words) else None


def _snippets(text: str) -> Iterator[str]:
    for clause in _CLAUSE_END.split(text):
        words = plain_words(clause)
        if words and _FEWEST <= len(words) <= _MOST:
            yield " ".join(words)


def _fortune_files(folder: Path) -> list[Path]:
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and not path.is_symlink())
    return [path for path in files if not path.suffix and path.name != "ascii-art"]


def _examples(path: Path) -> Iterator[str]:
    """The quoted examples of a WordNet data file, whose glosses follow a bar."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        _, bar, gloss = line.partition(" | ")
        if bar:
            yield from _QUOTED.findall(gloss)


def _docstrings() -> Iterator[str]:
    """Docstrings of the top-level modules of Python's library."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                yield text


def dictionary_words(sources: Sources) -> list[str]:
    """Lower-case words of the system's dictionary, without possessives."""
    lines = sources.dictionary.read_text(encoding="utf-8").splitlines()
    return [word for word in lines if re.fullmatch(r"[a-z]{2,12}", word)]
