"""Stage 4: sentences for an instruction, a persona and a style.

The prompts are a fixed sequence: the i-th depends on the seed, i and the instructions alone, and each instruction comes
once before any comes again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from das_asr.training.text.candidate import Candidate
from das_asr.training.text.domain import Domain
from das_asr.training.text.instructions import Instruction
from das_asr.training.text.prompt_file import Request
from das_asr.training.text.reading import read_list

__all__ = ["Task", "read_sentences", "tasks"]

_STYLES = {"request": "a request, an order or a wish", "question": "a question"}
_SEEDS = 3  # to set the tone


@dataclass(frozen=True)
class Task:
    """What one request asks for."""

    request: Request
    instruction: Instruction
    persona: str
    style: str

    def candidate(self, text: str) -> Candidate:
        """A sentence of the answer."""
        return Candidate(
            text,
            skill=self.instruction.lane.skill,
            style=self.style,
            stage=self.instruction.stage,
            persona=self.persona,
            instruction=self.instruction.text,
            prompt_sha256=self.request.prompt_sha256,
        )


def tasks(
    domain: Domain, instructions: Sequence[Instruction], per_request: int, seed: int, shard: tuple[int, int]
) -> Iterator[Task]:
    """Yields tasks without end; of a shard (i, n), every n-th."""
    part, parts = shard
    index = part
    while True:
        turn, place = divmod(index, len(instructions))
        order = list(range(len(instructions)))
        random.Random(f"{seed} order {turn}").shuffle(order)  # noqa: S311
        yield _task(domain, instructions[order[place]], per_request, seed, index)
        index += parts


def _task(domain: Domain, instruction: Instruction, per_request: int, seed: int, index: int) -> Task:
    rng = random.Random(f"{seed} task {index}")  # noqa: S311
    persona, style = rng.choice(domain.personas), rng.choice(domain.styles)
    tone = rng.sample(domain.seeds, min(_SEEDS, len(domain.seeds)))
    values: dict[str, object] = {
        "use_case": instruction.lane.use_case,
        "skill": instruction.lane.skill,
        "instruction": instruction.text,
        "persona": persona,
        "style": _STYLES[style],
        "examples": _examples(tone),
        "count": per_request,
        "shortest": domain.words_min,
        "longest": domain.words_max,
    }
    return Task(Request.make("sentences", seed, index, values), instruction, persona, style)


def _examples(tone: Sequence[str]) -> str:
    if not tone:
        return ""
    return "For the tone only, not to be repeated or varied: " + " / ".join(tone) + "\n"


def read_sentences(answer: str) -> list[str] | None:
    """The sentences of an answer, or None."""
    return read_list(answer)
