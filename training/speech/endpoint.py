"""Speech endpoints that talk as OpenAI's does: POST {base_url}/audio/speech -> a WAV file."""

from __future__ import annotations

import os

from das_asr.runtime.errors import SynthesisError
from das_asr.training.speech.processes import decode, plain_text
from das_asr.training.speech.voices import EngineFailure, Samples, Voice

__all__ = ["EndpointEngine"]

_MODEL = "tts-1"
_RETRIES = 5  # with growing pauses, as the endpoint asks for them

# What every other utterance would meet too: a bad key, no right, no such model, no more requests.
_FATAL_STATUS = frozenset({401, 403, 404, 429})


class EndpointEngine:
    """The name of a voice is the endpoint's; only speaking one tells whether it is there."""

    default_voice: str | None = "alloy"

    def __init__(
        self, model: str | None, base_url: str | None, api_key: str | None, timeout: float, retries: int = _RETRIES
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise SynthesisError(
                "The package openai is not installed. Install it with `pip install openai`."
            ) from error
        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        api_key = api_key or os.environ.get("OPENAI_API_KEY")
        if not (api_key or base_url):
            raise SynthesisError(
                "The speech endpoint needs a key in the environment variable OPENAI_API_KEY, "
                "or an address of your own as base_url or OPENAI_BASE_URL."
            )
        # Servers of one's own mostly want no key, but the client wants to send one.
        self._client = openai.OpenAI(base_url=base_url, api_key=api_key or "none", timeout=timeout, max_retries=retries)
        self._model = model or _MODEL

    def check(self, voice: Voice) -> None:
        """Refuses a changed pitch, which the protocol has no word for; see `Engine.check`."""
        if voice.pitch != 1:
            raise SynthesisError(f"A pitch of {voice.pitch} was asked, but speech endpoints cannot change pitch.")

    def speak(self, text: str, voice: Voice) -> tuple[Samples, int]:
        """Asks the endpoint; see `Engine.speak`."""
        import openai

        line = plain_text(text)
        try:
            if voice.speed == 1:  # not every server knows the field
                answer = self._client.audio.speech.create(
                    model=self._model, voice=voice.name, input=line, response_format="wav"
                )
            else:
                answer = self._client.audio.speech.create(
                    model=self._model, voice=voice.name, input=line, response_format="wav", speed=voice.speed
                )
        except openai.APITimeoutError as error:
            raise EngineFailure("timeout", "the speech endpoint took too long") from error
        except openai.APIConnectionError as error:
            raise SynthesisError(
                f"The speech endpoint {self._client.base_url} does not answer: {error}. Check its address; "
                "started again, the run goes on where it stopped."
            ) from error
        except openai.APIStatusError as error:
            raise self._status_error(error.status_code, str(error)) from error
        return decode(answer.content, "the speech endpoint")

    def _status_error(self, status: int, message: str) -> SynthesisError | EngineFailure:
        if status in _FATAL_STATUS:
            return SynthesisError(
                f"The speech endpoint {self._client.base_url} refuses requests (status {status}): {message}. Check the "
                f"key, address and model ({self._model}); started again, the run goes on where it stopped."
            )
        return EngineFailure("engine", f"the speech endpoint answered with status {status}: {message}")

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()
