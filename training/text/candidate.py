"""A sentence that a source proposes, and where it comes from."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Candidate", "Source"]


@dataclass(frozen=True)
class Candidate:
    """A proposed sentence with its lineage."""

    text: str
    skill: str
    style: str | None
    stage: str  # what wrote its instruction: `instructions` or `rubrics N`; or `grammar`
    persona: str | None = None
    instruction: str | None = None
    prompt_sha256: str | None = None
    template: dict[str, Any] | None = None  # index and slots, for grammars


class Source(Protocol):
    """Proposes sentences: the same ones in the same order whenever it is made with the same options."""

    patience: int  # batches without anything new, after which there is no hope for more
    unit: str  # what a batch is, in an error
    model: str | None

    def batches(self, missing: Callable[[], int]) -> Generator[list[Candidate], None, None]:
        """Yields batches, without end; how many rows are still `missing` may bound what is asked ahead."""
        ...

    def facts(self) -> dict[str, Any]:
        """What the report says about it, such as tokens."""
        ...
