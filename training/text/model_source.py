"""Sentences from a language model: metadata -> instructions -> Self-Rubrics -> sentences (DAS paper, after CodecLM)."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from contextlib import closing
from itertools import islice
from typing import Any

from das_asr.training.text.candidate import Candidate
from das_asr.training.text.chat import Asker
from das_asr.training.text.domain import Domain
from das_asr.training.text.instructions import Instruction, Lane, write_instructions
from das_asr.training.text.metadata import find_metadata
from das_asr.training.text.options import TextOptions
from das_asr.training.text.rubrics import improve_instructions
from das_asr.training.text.sentences import read_sentences, tasks

__all__ = ["ModelSource"]


class ModelSource:
    """Asks a chat model for a batch of sentences at a time."""

    patience = 50
    unit = "requests"

    def __init__(self, domain: Domain, options: TextOptions, asker: Asker) -> None:
        self._domain = domain
        self._options = options
        self._asker = asker
        self._instructions: list[Instruction] = []
        self.model: str | None = asker.model.model

    def batches(self, missing: Callable[[], int]) -> Generator[list[Candidate], None, None]:
        """See `Source.batches`."""
        options = self._options
        self._instructions = self._prepare()
        planned = tasks(self._domain, self._instructions, options.per_request, options.seed, options.shard)
        while True:
            ahead = max(1, min(self._asker.model.window, -(-missing() // options.per_request)))
            window = list(islice(planned, ahead))
            answers = self._asker.ask([task.request for task in window], read_sentences)
            with closing(answers):
                for task, texts in zip(window, answers, strict=True):
                    yield [task.candidate(text) for text in texts or []]

    def facts(self) -> dict[str, Any]:
        """Instructions, requests and tokens."""
        return {"instructions": len(self._instructions), **self._asker.facts()}

    def _prepare(self) -> list[Instruction]:
        """As many instructions as there can be requests for, and no more."""
        options = self._options
        metadata = find_metadata(self._domain, self._asker, options.seed)
        lanes = [Lane(one.use_case, skill) for one in metadata for skill in one.skills]
        random.Random(f"{options.seed} lanes").shuffle(lanes)  # noqa: S311
        requests = -(-options.count // options.per_request)
        lanes = lanes[:requests]
        count = max(1, min(options.instructions, requests // len(lanes)))
        written = write_instructions(lanes, count, self._asker, options.seed)
        return improve_instructions(written, options.iterations, self._asker, options.seed)
