"""What the documents say holds: links resolve, commands parse, the first example runs, the table is what was measured.

The example is README's Python block that begins with `from das_asr.runtime import Transcriber`. It runs in a folder
that has `benchmarks/` and, under the name the block gives to `Transcriber`, the demo bundle. What it prints must be the
comment on, or right below, each line with a `print`; without such comments, the `text` block that follows.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from das_asr.benchmarks.kinds import KINDS, read_results
from das_asr.benchmarks.report import replace_between_markers

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    path for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "export/**/*.md") for path in ROOT.glob(pattern)
)
README = ROOT / "README.md"
COMMANDS = ("das-transcribe", "das-export", "das-synth", "das-train", "das-bench")
FIRST_LINE = "from das_asr.runtime import Transcriber"

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    language: str
    text: str


def _blocks(path: Path) -> list[Block]:
    found = re.findall(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [Block(language, text) for _, language, text in found]


def _prose(path: Path) -> str:
    """A document without its fenced blocks and code spans, where brackets are not links."""
    text = re.sub(r"^ *```.*?^ *```", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "`code`", text)


def _links(path: Path) -> Iterator[str]:
    text = _prose(path)
    for target in re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text):
        if not re.match(r"[a-z]+:", target):
            yield target


@cache
def _anchors(path: Path) -> set[str]:
    """Anchors that GitHub gives to the headings of a document."""
    text = re.sub(r"^ *```.*?^ *```", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.+?) *#*$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(document: Path) -> None:
    broken = []
    for link in _links(document):
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        whole = target.exists() and target.resolve().is_relative_to(ROOT)
        if not whole or (anchor and target.suffix == ".md" and anchor not in _anchors(target)):
            broken.append(link)
    assert not broken


def _command_lines(path: Path) -> Iterator[str]:
    """Command lines of `console` blocks (after the prompt), `bash` and `sh` blocks, with continuations joined."""
    for block in _blocks(path):
        lines = block.text.replace("\\\n", " ").splitlines()
        if block.language == "console":
            yield from (line.strip().removeprefix("$ ") for line in lines if line.strip().startswith("$ "))
        elif block.language in ("bash", "sh"):
            yield from (line.strip() for line in lines)


def _words(line: str) -> list[str]:
    """The words of a command line up to the first `|`, `>`, `&&` or `;`."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words = list(lexer)
    end = next((index for index, word in enumerate(words) if set(word) <= set("|&;<>")), len(words))
    return words[:end]


def _all_commands(*names: str) -> list[tuple[str, ...]]:
    lines = (_words(line) for document in DOCUMENTS for line in _command_lines(document) if line)
    return sorted({tuple(words) for words in lines if words and words[0] in names})


@cache
def _help(run_script: Run, *command: str) -> str:
    return run_script(*command, "--help").stdout


def _subcommands(text: str) -> set[str]:
    """Names under `Commands:` of a click group's help; empty for a plain command."""
    return set(re.findall(r"^  ([\w-]+)", text.partition("\nCommands:\n")[2], flags=re.MULTILINE))


@pytest.mark.parametrize("words", _all_commands(*COMMANDS), ids=" ".join)
def test_commands_parse(words: tuple[str, ...], run_script: Run) -> None:
    command = words[:1]
    subcommands = _subcommands(_help(run_script, *command))
    if subcommands and words[1:2] != ("--help",):
        assert words[1] in subcommands
        command = words[:2]
    text = _help(run_script, *command)
    options = [word.partition("=")[0] for word in words[len(command) :] if re.match(r"--?[a-zA-Z]", word)]
    unknown = [option for option in options if not re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text)]
    assert not unknown


@pytest.mark.parametrize("words", _all_commands("make"), ids=" ".join)
def test_make_targets_exist(words: tuple[str, ...]) -> None:
    done = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _example() -> tuple[str, str]:
    """README's first example and what it should print."""
    blocks = _blocks(README)
    index = next(i for i, block in enumerate(blocks) if block.text.startswith(FIRST_LINE))
    code = blocks[index].text
    shown = "\n".join(_shown(code.splitlines()))
    if not shown and blocks[index + 1 : index + 2] and blocks[index + 1].language == "text":
        shown = blocks[index + 1].text
    return code, shown.strip()


def _shown(lines: list[str]) -> Iterator[str]:
    after_print = False
    for line in lines:
        code, mark, comment = line.partition("# ")
        if code.strip():
            after_print = "print(" in code
        if after_print and mark:
            yield comment.strip()


def test_the_first_example_runs(demo_bundle: Path, tmp_path: Path) -> None:
    code, shown = _example()
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    names = re.findall(r"Transcriber(?:\.\w+)?\(\s*\"([^\"]+)\"", code)
    assert names, "the example must open a bundle by a literal path"
    bundle = tmp_path / names[0]
    bundle.parent.mkdir(parents=True, exist_ok=True)
    bundle.symlink_to(demo_bundle)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == shown


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_is_what_was_measured(kind: str) -> None:
    paths = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    paths = [path for path in paths if json.loads(path.read_text("utf-8")).get("kind") == kind]
    text, markers = README.read_text("utf-8"), KINDS[kind].markers
    assert bool(paths) == (markers[0] in text), f"results of `{KINDS[kind].command}` and a place for them go together"
    if paths:
        assert replace_between_markers(text, KINDS[kind].table(read_results(paths)), markers) == text
