"""Language models behind endpoints that talk as OpenAI's does: POST {base_url}/chat/completions."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from das_asr.runtime.errors import SynthesisError
from das_asr.training.text.chat import Answer, Failure, Keep, Reply
from das_asr.training.text.options import TextOptions
from das_asr.training.text.prompt_file import Request

__all__ = ["EndpointModel"]

_RETRIES = 6
_LONGEST_PAUSE = 60.0  # seconds, of ours
_LONGEST_ASKED_PAUSE = 600.0  # seconds, where the endpoint asks for it
_FATAL_STATUS = {401: "the key", 403: "the key's rights", 404: "the address and the model"}
_TRANSIENT_STATUS = frozenset({408, 409, 425, 429})  # and all from 500 on
_AHEAD = 4  # windows of `concurrency` requests: one slow answer must not leave the others idle


class _Trouble(Exception):  # noqa: N818
    """A request that may succeed when it is sent again after `pause` seconds, if the endpoint named them."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.pause = pause


class EndpointModel:
    """Sends `concurrency` requests at a time; the first one alone, so that a wrong key is refused only once."""

    name = "openai"
    whole = False

    def __init__(self, options: TextOptions, *, first_pause: float = 1.0) -> None:
        assert options.model is not None
        self.model = options.model
        self.window = options.concurrency * _AHEAD
        self._concurrency = options.concurrency
        self._first_pause = first_pause
        self._proven = False  # whether it has ever answered
        self._parameters: dict[str, Any] = {"model": options.model}
        if options.temperature is not None:
            self._parameters["temperature"] = options.temperature
        if options.max_tokens is not None:
            self._parameters["max_tokens"] = options.max_tokens
        self._client = _client(options)

    def ask(self, requests: Sequence[Request], keep: Keep) -> Generator[Reply, None, None]:
        """See `ChatModel.ask`."""
        stop = threading.Event()

        def one(request: Request) -> Reply:
            reply = self._reply(request, stop)
            if isinstance(reply, Answer):
                keep(request, reply)
            return reply

        rest = list(requests)
        if rest and not self._proven:
            yield one(rest.pop(0))
        with ThreadPoolExecutor(self._concurrency) as pool:
            try:
                yield from pool.map(one, rest)
            finally:  # also when nobody wants the rest
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)

    def _reply(self, request: Request, stop: threading.Event) -> Reply:
        reason = ""
        for attempt in range(_RETRIES + 1):
            if stop.is_set():
                return Failure("stopped")
            try:
                reply = self._once(request)
            except _Trouble as trouble:
                reason = trouble.reason
                if attempt < _RETRIES:
                    stop.wait(self._pause(attempt, trouble.pause))
            else:
                self._proven = True
                return reply
        return Failure(f"{reason}, {_RETRIES + 1} times")

    def _pause(self, attempt: int, asked: float | None) -> float:
        own = min(_LONGEST_PAUSE, self._first_pause * 2.0**attempt) * random.uniform(0.5, 1.0)  # noqa: S311
        return max(own, min(asked or 0.0, _LONGEST_ASKED_PAUSE))

    def _once(self, request: Request) -> Reply:
        """Sends a request.

        Raises:
            _Trouble: it may succeed later.
            SynthesisError: nothing will succeed.
        """
        import openai

        try:
            completion = self._client.chat.completions.create(
                messages=request.messages, seed=request.seed, **self._parameters
            )
        except openai.APITimeoutError as error:
            raise _Trouble("no answer in time") from error
        except openai.APIConnectionError as error:
            if not self._proven and _cannot_connect(error):
                raise self._fatal(
                    f"cannot be reached ({error.__cause__})", "its address, and whether it runs"
                ) from error
            raise _Trouble(f"the connection broke ({error.__cause__})") from error
        except openai.APIStatusError as error:
            return self._refusal(error)
        except ValueError as error:  # half an answer
            raise _Trouble("an answer that is no JSON") from error
        return _answer(completion)

    def _refusal(self, error: Any) -> Failure:
        status, message = error.status_code, str(error)
        if status in _FATAL_STATUS or "insufficient_quota" in f"{error.code} {error.type} {message}":
            raise self._fatal(
                f"refuses requests (status {status}): {message}", _FATAL_STATUS.get(status, "the account")
            ) from error
        if status in _TRANSIENT_STATUS or status >= 500:
            raise _Trouble(f"status {status}", _asked_pause(error.response.headers)) from error
        if not self._proven:  # such as an unknown parameter: every request would meet it
            raise self._fatal(f"refuses the first request (status {status}): {message}", "the options") from error
        return Failure(f"status {status}: {message}")

    def _fatal(self, what: str, check: str) -> SynthesisError:
        return SynthesisError(
            f"The endpoint {self._client.base_url} {what}. Check {check}; what was answered is kept, and the run goes "
            f"on from there when it is started again. The model asked for is {self.model}."
        )


def _client(options: TextOptions) -> Any:
    try:
        import openai
    except ImportError as error:
        raise SynthesisError("The package openai is not installed. Install it with `pip install openai`.") from error
    base_url = options.base_url or os.environ.get("OPENAI_BASE_URL")
    api_key = options.api_key or os.environ.get("OPENAI_API_KEY")
    if not (api_key or base_url):
        raise SynthesisError(
            "The endpoint needs a key in the environment variable OPENAI_API_KEY, or an address of your own as "
            "--base-url or OPENAI_BASE_URL."
        )
    # Servers of one's own mostly want no key, but the client wants to send one. Retries are ours, to be bounded by the
    # pauses that the endpoint asks for, and to stop at once when another request met a fatal answer.
    return openai.OpenAI(base_url=base_url, api_key=api_key or "none", timeout=options.timeout, max_retries=0)


def _cannot_connect(error: Exception) -> bool:
    cause = error.__cause__
    return cause is not None and type(cause).__name__ in {"ConnectError", "UnsupportedProtocol", "InvalidURL"}


def _asked_pause(headers: Any) -> float | None:
    try:
        return float(headers.get("retry-after", ""))
    except ValueError:  # absent, or a date
        return None


def _answer(completion: Any) -> Answer:
    """The text and the tokens; what has none is sent again."""
    choices = getattr(completion, "choices", None)
    content = getattr(choices[0].message, "content", None) if choices else None
    if not isinstance(content, str):
        raise _Trouble("an answer without a message")
    usage = completion.usage
    if usage is None:
        return Answer(content)
    return Answer(content, usage.prompt_tokens or 0, usage.completion_tokens or 0)
