"""What the language models have in common, and the asking: kept answers first, malformed ones asked once more."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from das_asr.runtime.errors import SynthesisError
from das_asr.runtime.jsonl import JsonLines
from das_asr.training.text.prompt_file import Request

__all__ = ["Answer", "Answers", "Asker", "ChatModel", "Failure", "Keep", "Reply"]

T = TypeVar("T")

_FAILURES_IN_A_ROW = 3  # the endpoint is gone, rather than a prompt refused
_SHOWN = 20  # malformed answers in the report
_EXCERPT = 200  # characters


@dataclass(frozen=True)
class Answer:
    """What a model wrote."""

    content: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Failure:
    """A prompt that the model refuses, or does not answer after many tries."""

    reason: str


Reply = Answer | Failure
Keep = Callable[[Request, Answer], None]


class ChatModel(Protocol):
    """A back end. `whole`: what it answers depends on the other requests of the window, so a window is asked whole."""

    name: str
    model: str
    window: int  # requests it wants at once
    whole: bool

    def ask(self, requests: Sequence[Request], keep: Keep) -> Generator[Reply, None, None]:
        """Yields the replies in order; `keep` is called for each answer as soon as it is there, from any thread.

        Raises:
            SynthesisError: the model cannot be had; asking again would not help.
        """
        ...


class Answers:
    """The answers on disk, so that nothing is asked, and paid for, twice."""

    def __init__(self, file: JsonLines, scope: str) -> None:
        self._file = file
        self._scope = scope
        self._lock = threading.Lock()
        self._replies = {row["key"]: _reply(row) for row in file.rows if "key" in row}
        self.asked: list[Answer] = []  # by this run

    def get(self, request: Request) -> Reply | None:
        """The reply to this request, if it is there."""
        return self._replies.get(self._key(request))

    def keep(self, request: Request, answer: Answer) -> None:
        """Puts an answer on disk; one that is there already stays."""
        with self._lock:
            self.asked.append(answer)
            self._put(request, answer, {"stage": request.stage, **vars(answer)})

    def keep_failure(self, request: Request, failure: Failure) -> None:
        """Puts it on disk that there is no answer: a run that goes on must skip what this one skipped."""
        with self._lock:
            self._put(request, failure, {"stage": request.stage, "failed": failure.reason})

    def _put(self, request: Request, reply: Reply, columns: dict[str, Any]) -> None:
        key = self._key(request)
        if key not in self._replies:
            self._file.append({"key": key, **columns})
            self._replies[key] = reply

    def _key(self, request: Request) -> str:
        return f"{self._scope}:{request.prompt_sha256}:{request.seed}"


def _reply(row: dict[str, Any]) -> Reply:
    if "failed" in row:
        return Failure(str(row["failed"]))
    return Answer(str(row["content"]), int(row["prompt_tokens"]), int(row["completion_tokens"]))


class Asker:
    """Asks a model and reads its answers."""

    def __init__(self, model: ChatModel, answers: Answers) -> None:
        self.model = model
        self._answers = answers
        self._streak: list[tuple[Request, Failure]] = []  # failures since the last answer, not on disk yet
        self._problems: list[dict[str, str]] = []
        self._counts: Counter[str] = Counter()

    def ask(self, requests: Sequence[Request], read: Callable[[str], T | None]) -> Generator[T | None, None, None]:
        """Yields what `read` makes of each answer, in order; None where there is none that it can read.

        Raises:
            SynthesisError: the model cannot be had, or fails again and again.
        """
        for start in range(0, len(requests), self.model.window):
            window = requests[start : start + self.model.window]
            with closing(self._replies(window)) as replies:
                for request, reply in zip(window, replies, strict=True):
                    yield self._value(request, reply, read)

    def _replies(self, window: Sequence[Request]) -> Generator[Reply, None, None]:
        missing = [request for request in window if self._answers.get(request) is None]
        self._counts["reused"] += len(window) - len(missing)
        if missing and self.model.whole:
            missing = list(window)
        with closing(self.model.ask(missing, self._answers.keep)) as fresh:
            waiting = set(missing)
            for request in window:
                reply = next(fresh) if request in waiting else None
                yield self._answers.get(request) or reply or Failure("no answer")

    def _value(self, request: Request, reply: Reply, read: Callable[[str], T | None]) -> T | None:
        if isinstance(reply, Answer) and (value := read(reply.content)) is not None:
            self._answered()
            return value
        if isinstance(reply, Answer):
            self._counts["asked again"] += 1
            request = request.again
            return self._last_value(request, next(self._replies([request])), read)
        self._failed(request, reply)
        return None

    def _last_value(self, request: Request, reply: Reply, read: Callable[[str], T | None]) -> T | None:
        if isinstance(reply, Failure):
            self._failed(request, reply)
            return None
        self._answered()
        value = read(reply.content)
        if value is None:
            self._skip("malformed", request, reply.content)
        return value

    def _answered(self) -> None:
        for request, failure in self._streak:
            self._answers.keep_failure(request, failure)
        self._streak.clear()

    def _failed(self, request: Request, failure: Failure) -> None:
        self._skip("failed", request, failure.reason)
        if self._answers.get(request) is None:
            self._streak.append((request, failure))
        if len(self._streak) >= _FAILURES_IN_A_ROW:
            raise SynthesisError(
                f"{len(self._streak)} requests in a row got no answer from {self.model.model}; the last: "
                f"{failure.reason}. What was answered is kept: started again, the run goes on from there."
            )

    def _skip(self, kind: str, request: Request, detail: str) -> None:
        self._counts[kind] += 1
        if len(self._problems) < _SHOWN:
            self._problems.append({"kind": kind, "stage": request.stage, "prompt_sha256": request.prompt_sha256})
            self._problems[-1]["detail"] = detail[:_EXCERPT]

    def facts(self) -> dict[str, Any]:
        """Requests and tokens of this run, and what could not be used."""
        asked = list(self._answers.asked)
        return {
            "requests": len(asked),
            "reused": self._counts["reused"],
            "prompt_tokens": sum(answer.prompt_tokens for answer in asked),
            "completion_tokens": sum(answer.completion_tokens for answer in asked),
            "asked_again": self._counts["asked again"],
            "malformed": self._counts["malformed"],
            "failed": self._counts["failed"],
            "problems": self._problems,
        }
