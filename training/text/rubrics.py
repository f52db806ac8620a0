"""Stage 3: Self-Rubrics (CodecLM).

The model names criteria for good instructions and actions that serve them, and rewrites each instruction by one action
after the other, drawn at random. Every version is kept: the plain first ones and the demanding last ones make different
sentences.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from das_asr.training.text.chat import Asker
from das_asr.training.text.instructions import Instruction, Lane
from das_asr.training.text.prompt_file import Request
from das_asr.training.text.reading import read_list, read_object, read_text

__all__ = ["improve_instructions"]

Actions = dict[Lane, list[str]]


def improve_instructions(
    instructions: Sequence[Instruction], iterations: int, asker: Asker, seed: int
) -> list[Instruction]:
    """All versions of all instructions, the given ones first.

    An instruction whose rewriting cannot be read stays at its last version; so does one whose skill got no actions.
    """
    versions = list(instructions)
    if not iterations:
        return versions
    actions = _write_actions(list(dict.fromkeys(one.lane for one in instructions)), asker, seed)
    latest = versions
    for iteration in range(1, iterations + 1):
        latest = _improve(latest, actions, iteration, asker, seed)
        versions = versions + latest
    return versions


def _write_actions(lanes: Sequence[Lane], asker: Asker, seed: int) -> Actions:
    requests = [
        Request.make("rubrics", seed, index, {"use_case": lane.use_case, "skill": lane.skill})
        for index, lane in enumerate(lanes)
    ]
    return {lane: found for lane, found in zip(lanes, asker.ask(requests, _read_actions), strict=True) if found}


def _read_actions(answer: str) -> list[str] | None:
    """The actions of an object, or what is listed after the word."""
    listed = (read_object(answer) or {}).get("actions")
    if isinstance(listed, list):
        return [action.strip() for action in listed if isinstance(action, str) and action.strip()] or None
    _, heading, after = answer.lower().rpartition("actions")
    return read_list(answer[-len(after) :]) if heading and after else None


def _improve(
    instructions: Sequence[Instruction], actions: Actions, iteration: int, asker: Asker, seed: int
) -> list[Instruction]:
    able = [one for one in instructions if one.lane in actions]
    requests = []
    for index, one in enumerate(able):
        rng = random.Random(f"{seed} {iteration} {index}")  # noqa: S311
        values = {"skill": one.lane.skill, "instruction": one.text, "action": rng.choice(actions[one.lane])}
        requests.append(Request.make("improve", seed, iteration * 1_000_000 + index, dict(values)))
    return [
        Instruction(one.lane, text, f"rubrics {iteration}")
        for one, text in zip(able, asker.ask(requests, read_text), strict=True)
        if text is not None and text != one.text
    ]
