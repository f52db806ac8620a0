"""What a run of text generation is told."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from das_asr.runtime.errors import DataError, OptionError

__all__ = ["BACKENDS", "CASES", "TextOptions"]

BACKENDS = ("grammar", "openai", "transformers")
CASES = ("lower", "keep")

_MOST_ITERATIONS = 4  # of Self-Rubrics (CodecLM, section 3)


@dataclass(frozen=True)
class TextOptions:
    """How the sentences of a domain are made. By default its grammar writes them, without any model.

    Raises:
        OptionError: a value is out of range, or an option does not go with the back end.
    """

    count: int = 44_000
    backend: str = "grammar"  # one of `BACKENDS`
    grammar: Path | None = None  # grammar: a YAML file; None: the shipped one of the domain's name
    model: str | None = None  # openai: its name at the endpoint; transformers: folder or hub id
    base_url: str | None = None  # openai: address of the endpoint; None: OPENAI_BASE_URL
    api_key: str | None = None  # openai: None: OPENAI_API_KEY
    concurrency: int = 8  # openai: requests at a time
    timeout: float = 120.0  # openai: seconds that an answer may take
    batch_size: int = 8  # transformers: prompts at a time
    device: str = "auto"  # transformers: cpu, cuda, or auto
    temperature: float | None = 1.0  # None leaves it to the model
    max_tokens: int | None = None  # of an answer; None: the endpoint's limit, or 1024 with transformers
    instructions: int = 5  # per skill
    iterations: int = _MOST_ITERATIONS  # of Self-Rubrics; 0 does without
    per_request: int = 10  # sentences asked for in one request
    similarity: float = 0.9  # of near duplicates, see `NearIndex`
    max_seconds: float = 30.0  # of speech, as the model's window allows
    words_per_second: float = 2.0  # a slow speaker
    case: str = "keep"  # one of `CASES`
    wake_words: float = 0.0  # share of the sentences with a wake word in front
    exclude: tuple[Path, ...] = ()  # files of evaluation sentences
    seed: int = 0
    shard: tuple[int, int] = (0, 1)  # (i, n): the i-th of n parts, counted from 0
    answers: Path | None = None  # file of the model's answers; None: beside the output

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise OptionError(f"There is no back end {self.backend!r}. There are: {', '.join(BACKENDS)}.")
        if self.case not in CASES:
            raise OptionError(f"case was {self.case!r}; one of {', '.join(CASES)} is expected.")
        self._check_backend()
        for name in ("count", "concurrency", "batch_size", "instructions", "per_request"):
            self._check_range(name, 1, math.inf)
        self._check_range("iterations", 0, _MOST_ITERATIONS)
        self._check_range("similarity", 0.8, 1)
        self._check_range("wake_words", 0, 1)
        for name in ("timeout", "max_seconds", "words_per_second"):
            self._check_range(name, 1e-3, 1e6)
        self._check_range("temperature", 0, 2)
        self._check_range("max_tokens", 1, math.inf)
        part, parts = self.shard
        if not 0 <= part < parts:
            raise OptionError(f"shard={part}/{parts} was given; i/n with i from 0 to n - 1 is expected, such as 0/4.")

    def _check_backend(self) -> None:
        belongs = {"grammar": ("grammar",), "base_url": ("openai",), "api_key": ("openai",), "answers": BACKENDS[1:]}
        for name, backends in belongs.items():
            if getattr(self, name) is not None and self.backend not in backends:
                raise OptionError(
                    f"{name} belongs to the back end {' or '.join(backends)}, but the back end is {self.backend}."
                )
        if self.backend == "grammar" and self.model is not None:
            raise OptionError(
                f"model={self.model!r} was given, but the back end is grammar. Choose openai or transformers for it."
            )
        if self.backend != "grammar" and not self.model:
            raise OptionError(f"The back end {self.backend} needs the name of a model.")

    def _check_range(self, name: str, lowest: float, highest: float) -> None:
        value = getattr(self, name)
        if value is not None and not lowest <= value <= highest:
            limits = f"{lowest:g} to {highest:g}" if highest < 1e6 else f"{lowest:g} or more"
            raise OptionError(f"{name} was {value}; {limits} is expected.")

    @property
    def lower_case(self) -> bool:
        """Whether capitals are taken out."""
        return self.case == "lower"

    @property
    def part(self) -> int:
        """Rows of this shard."""
        index, parts = self.shard
        return self.count // parts + (index < self.count % parts)

    def identity(self) -> dict[str, Any]:
        """What the rows depend on, as JSON; files by their content.

        Raises:
            DataError: a file of evaluation sentences cannot be read.
        """
        common = {
            "count": self.count,
            "backend": self.backend,
            "seed": self.seed,
            "shard": list(self.shard),
            "similarity": self.similarity,
            "longest": self.max_seconds * self.words_per_second,
            "case": self.case,
            "wake_words": self.wake_words,
            "exclude": [_file_sha256(path) for path in self.exclude],
        }
        if self.backend == "grammar":
            return common
        names = ("model", "temperature", "max_tokens", "instructions", "iterations", "per_request")
        batch = {"batch_size": self.batch_size} if self.backend == "transformers" else {}
        return {**common, **{name: getattr(self, name) for name in names}, **batch}


def _file_sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}. A file of sentences is expected.") from error
