"""`das-synth init`: a commented domain file, and a small grammar for it, to start from."""

from __future__ import annotations

import os
import re
from pathlib import Path

from das_asr.runtime.errors import DataError

__all__ = ["write_domain", "write_grammar"]

_DOMAIN = """\
# A domain of das-synth. Everything here is an example: replace it with your own, then
#   das-synth text {file} --output {name}.jsonl --backend openai --model NAME
name: {name}

# What the assistant is used for, in one sentence.
use_case: A voice assistant that answers requests about {words}.

# What it can do, each in two to five words. Leave out use_case and skills together, and the language model finds them
# from the seeds.
skills:
  - find something
  - change a setting
  - explain how something works

# Who speaks. The more they differ, the more the wording does.
personas:
  - a teenager in a hurry
  - a retired teacher with plenty of time
  - a parent with a child on the arm

# Things that people really said, or would say.
seeds:
  - what can you tell me about this
  - turn it up a little please

# Put in front of a share of the sentences (--wake-words 0.2); empty for none.
wake_words:
  - hey assistant

# request ("play some jazz"), question ("who sings this"), or both.
styles: [request, question]

# Length of a sentence in words; shorter and longer ones are dropped.
words: {{min: 3, max: 16}}
"""

_GRAMMAR = """\
# A grammar for the domain {name}: sentences without a language model.
#   das-synth text DOMAIN.yaml --grammar {file} --output {name}.jsonl --count 100
# {{slot}} draws one of the slot's fillers, [a|b|] one of the alternatives (the empty one leaves the part out). Slots
# for numbers, days, times, cities and names are always there ({{number}}, {{weekday}}, {{clock_time}}, {{city}}, ...).
slots:
  thing: [the first one, the last one, "number {{number}}", everything]
  polite: [please, could you, i want you to]

# skill is one of the domain's; style is request or question; weight (1 if left out) says how often it is drawn.
templates:
  - {{text: "[{{polite}}|] find {{thing}} [for me|]", skill: find something, style: request}}
  - {{text: "set {{thing}} to {{number}} [percent|]", skill: change a setting, style: request, weight: 2}}
  - {{text: "how does {{thing}} work", skill: explain how something works, style: question}}
  - {{text: "why did {{thing}} stop on {{weekday}}", skill: explain how something works, style: question}}
"""


def write_domain(name: str, path: Path) -> None:
    """Writes a domain file that `load_domain` accepts as it is.

    Raises:
        DataError: the name cannot be a domain's, or the file exists or cannot be written.
    """
    _write(path, _DOMAIN, name)


def write_grammar(name: str, path: Path) -> None:
    """Writes a grammar for the skills of `write_domain`; errors as there."""
    _write(path, _GRAMMAR, name)


def _write(path: Path, template: str, name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise DataError(f"{name!r} cannot name a domain. Lower-case letters, digits and underscores are expected.")
    text = template.format(name=name, file=path, words=name.replace("_", " "))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.link(temporary, path)  # unlike a rename, fails where the file exists
    except FileExistsError as error:
        raise DataError(f"{path} exists and is not overwritten. Name another file with --output.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}.") from error
    finally:
        temporary.unlink(missing_ok=True)
