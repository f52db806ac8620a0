"""Selection rules that tests plug in, and choices of options that differ."""

from __future__ import annotations

import threading
from typing import Any

from das_asr.runtime import StepCandidates

CHOICES: list[dict[str, Any]] = [
    {"rule": "hypothesis"},
    {"rule": "paper", "tau": 0.05},
    {"rule": "gain", "adapters": ("sports", "music")},
    {"rule": "hypothesis", "adapters": ("weather",), "score": "total"},
    {"rule": "base", "max_tokens": 4},
    {"rule": "deviation-max", "prompt": "bruno mars", "no_speech_threshold": None},
]
"""Options of requests that differ in rule, adapters and more."""

LONG_PROMPT = "play some music and tell me about the weather in the town where the game is on tonight " * 3
"""More tokens than one run takes with the static cache."""


class Gate:
    """Chooses the most confident row; halts at one of its steps until it is opened."""

    name = "gate"
    needs_logits = False

    def __init__(self, step: int = 0) -> None:
        self.step = step
        self.reached, self.opened = threading.Event(), threading.Event()

    def choose(self, step: StepCandidates) -> Any:
        if step.step == self.step:
            self.reached.set()
            assert self.opened.wait(30)
        return step.logprobs.argmax(axis=1)
