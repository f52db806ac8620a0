"""Stage 1: what the assistant is for and which skills it needs; given by the domain, or found from its seeds.

CodecLM encodes each seed into a use case and at most three skills that carry over to other requests; DAS starts from
hand-written ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from das_asr.runtime.errors import SynthesisError
from das_asr.training.text.chat import Asker
from das_asr.training.text.domain import Domain
from das_asr.training.text.prompt_file import Request
from das_asr.training.text.reading import read_object

__all__ = ["Metadata", "find_metadata"]

_MOST_SKILLS = 3


@dataclass(frozen=True)
class Metadata:
    """A use case and the skills it needs."""

    use_case: str
    skills: tuple[str, ...]


def find_metadata(domain: Domain, asker: Asker, seed: int) -> list[Metadata]:
    """The domain's own, or one of each seed that the model understands.

    Raises:
        SynthesisError: the model cannot be had, or understands no seed.
    """
    if domain.skills:
        return [Metadata(domain.use_case, domain.skills)]
    requests = [
        Request.make("metadata", seed, index, {"request": request}) for index, request in enumerate(domain.seeds)
    ]
    found = [metadata for metadata in asker.ask(requests, _read) if metadata is not None]
    if not found:
        raise SynthesisError(
            f"{asker.model.model} found no use case and skills in any of the {len(domain.seeds)} seeds of "
            f"{domain.name}. Take another model, or write use_case and skills into the domain file."
        )
    return _distinct(found)


def _read(answer: str) -> Metadata | None:
    found = read_object(answer) or {}
    use_case, skills = found.get("use_case"), found.get("skills")
    if isinstance(skills, str):
        skills = skills.split(",")
    if not (isinstance(use_case, str) and use_case.strip() and isinstance(skills, list)):
        return None
    named = [" ".join(skill.lower().split()) for skill in skills if isinstance(skill, str) and skill.strip()]
    return Metadata(" ".join(use_case.split()), tuple(named[:_MOST_SKILLS])) if named else None


def _distinct(found: list[Metadata]) -> list[Metadata]:
    """Every skill once, with the use case that came first."""
    seen: set[str] = set()
    kept = []
    for metadata in found:
        new = tuple(dict.fromkeys(skill for skill in metadata.skills if skill not in seen))
        seen.update(new)
        if new:
            kept.append(Metadata(metadata.use_case, new))
    return kept
