"""Stage 2: tailored instructions, several for each skill, without examples, so that none is copied (CodecLM)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from das_asr.runtime.errors import SynthesisError
from das_asr.training.text.chat import Asker
from das_asr.training.text.prompt_file import Request
from das_asr.training.text.reading import read_list

__all__ = ["Instruction", "Lane", "write_instructions"]


@dataclass(frozen=True)
class Lane:
    """One skill and what it is for."""

    use_case: str
    skill: str


@dataclass(frozen=True)
class Instruction:
    """How sentences for a skill are to be."""

    lane: Lane
    text: str
    stage: str  # `instructions`, or `rubrics N` after N actions


def write_instructions(lanes: Sequence[Lane], count: int, asker: Asker, seed: int) -> list[Instruction]:
    """Asks for `count` instructions per lane.

    Raises:
        SynthesisError: the model cannot be had, or no answer is a list.
    """
    requests = [
        Request.make("instructions", seed, index, {"use_case": lane.use_case, "skill": lane.skill, "count": count})
        for index, lane in enumerate(lanes)
    ]
    written = [
        Instruction(lane, text, "instructions")
        for lane, texts in zip(lanes, asker.ask(requests, read_list), strict=True)
        for text in dict.fromkeys((texts or [])[:count])
    ]
    if not written:
        raise SynthesisError(
            f"{asker.model.model} wrote no list of instructions for any of {len(lanes)} skills. Take another model."
        )
    return written
