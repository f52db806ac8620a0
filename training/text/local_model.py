"""Chat models in this process, by transformers: a folder or a hub id with a chat template."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import cached_property
from typing import Any

from das_asr.runtime.errors import SynthesisError
from das_asr.training.text.chat import Answer, Keep, Reply
from das_asr.training.text.options import TextOptions
from das_asr.training.text.prompt_file import Request

__all__ = ["LocalModel"]

_MOST_TOKENS = 1024  # of an answer


class LocalModel:
    """Answers in batches; loaded at the first request that has no answer yet.

    A batch draws from one random generator, so its answers depend on all its prompts, and it is asked as a whole.
    """

    name = "transformers"
    whole = True

    def __init__(self, options: TextOptions) -> None:
        assert options.model is not None
        self.model = options.model
        self.window = options.batch_size
        self._device = options.device
        self._most_tokens = options.max_tokens or _MOST_TOKENS
        self._temperature = options.temperature

    def ask(self, requests: Sequence[Request], keep: Keep) -> Generator[Reply, None, None]:
        """See `ChatModel.ask`."""
        for start in range(0, len(requests), self.window):
            batch = requests[start : start + self.window]
            answers = self._answers(batch)
            for request, answer in zip(batch, answers, strict=True):
                keep(request, answer)
            yield from answers

    def _answers(self, batch: Sequence[Request]) -> list[Answer]:
        import torch

        tokenizer, model = self._loaded
        prompts = [
            tokenizer.apply_chat_template(request.messages, tokenize=False, add_generation_prompt=True)
            for request in batch
        ]
        given = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        given.pop("token_type_ids", None)
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(batch[0].seed)
            written = model.generate(**given, **self._settings(tokenizer))[:, given["input_ids"].shape[1] :]
        asked = given["attention_mask"].sum(dim=1).tolist()
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        lengths = (written != tokenizer.pad_token_id).sum(dim=1).tolist()
        return [Answer(*parts) for parts in zip(texts, asked, lengths, strict=True)]

    def _settings(self, tokenizer: Any) -> dict[str, Any]:
        chosen: dict[str, Any] = {"max_new_tokens": self._most_tokens, "pad_token_id": tokenizer.pad_token_id}
        if self._temperature == 0:
            return {**chosen, "do_sample": False}
        if self._temperature is None:
            return chosen
        return {**chosen, "do_sample": True, "temperature": self._temperature}

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """Tokenizer and model.

        Raises:
            SynthesisError: there is no such model, or it is no chat model.
        """
        try:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise SynthesisError(
                "The packages torch and transformers are not installed. Install them with "
                "`pip install 'das-asr[training]'`."
            ) from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.model, padding_side="left")
            model: Any = AutoModelForCausalLM.from_pretrained(self.model, dtype="auto")
        except (OSError, ValueError) as error:
            raise SynthesisError(
                f"The chat model {self.model} cannot be loaded: {error}. A folder or a hub id is expected."
            ) from error
        if not tokenizer.chat_template:
            raise SynthesisError(f"{self.model} has no chat template. Take a model that is tuned for chat.")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        device = self._device if self._device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        try:
            return tokenizer, model.to(device).eval()
        except (RuntimeError, AssertionError) as error:
            raise SynthesisError(f"The device {device} cannot hold {self.model}: {error}.") from error
