"""The prompts: text files with `$names`, and the requests made of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from string import Template

__all__ = ["PROMPTS", "Request", "prompts_sha256", "render"]

_PROMPTS = "das_asr.training.text.prompts"
PROMPTS = ("metadata", "instructions", "rubrics", "improve", "sentences")


@dataclass(frozen=True)
class Request:
    """One prompt to be answered, with the seed that makes it differ from the same prompt asked again."""

    stage: str  # one of `PROMPTS`
    prompt: str
    seed: int

    @property
    def prompt_sha256(self) -> str:
        """Of the prompt."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()

    @property
    def again(self) -> Request:
        """The same prompt with another seed."""
        return replace(self, seed=self.seed ^ 1)

    @property
    def messages(self) -> list[dict[str, str]]:
        """As chat models take it. No system message: not every chat template has one."""
        return [{"role": "user", "content": self.prompt}]

    @staticmethod
    def make(stage: str, seed: int, index: int, values: dict[str, object]) -> Request:
        """The index-th request of a stage of a run."""
        digest = hashlib.sha256(f"{seed} {stage} {index}".encode()).digest()
        # 31 bits, as some servers want, the lowest left for `again`
        return Request(stage, render(stage, values), int.from_bytes(digest[:4]) >> 2 << 1)


def render(name: str, values: dict[str, object]) -> str:
    """A prompt with its names replaced; a name without a value is a bug."""
    return Template(_text(name)).substitute({key: str(value) for key, value in values.items()})


def prompts_sha256() -> str:
    """Of all prompt files."""
    return hashlib.sha256(json.dumps([_text(name) for name in PROMPTS]).encode()).hexdigest()


@cache
def _text(name: str) -> str:
    return (resources.files(_PROMPTS) / f"{name}.txt").read_text(encoding="utf-8")
