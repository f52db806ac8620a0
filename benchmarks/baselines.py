"""The PyTorch systems that the runtime is compared with.

transformers        `generate` of transformers on the base model alone
sequential-lora     the paper's baseline: all rows in one pass, base products batched, LoRA products one after the other
sequential-decodes  K + 1 whole decodes, one after the other, each with its own history; the likeliest is kept
peft-mixed          PEFT's mixed batch: all rows in one pass, `adapter_names` saying which row has which adapter
peft-forward        the same through PEFT's public `forward`, as a user's own loop has to call it at every step

All run the encoder once per utterance, in fp32, with PyTorch's fused attention and a key-value cache.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from das_asr.benchmarks.lora import loop_adapters, share_cross_rows
from das_asr.benchmarks.models import SAMPLE_RATE, is_multilingual, prompt_ids, read_json
from das_asr.benchmarks.systems import Work
from das_asr.benchmarks.timing import ModelClock, Utterance
from das_asr.benchmarks.torchloop import Decoded, Suppression, greedy
from das_asr.runtime.errors import OptionError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = [
    "BASELINES",
    "Baseline",
    "MixedBatch",
    "MixedForward",
    "PeftBaseline",
    "SequentialDecodes",
    "SequentialLora",
    "TransformersGenerate",
    "generate_options",
]


class Baseline(ABC):
    """A PyTorch system: features, then whatever `_decode` does."""

    name: str

    def __init__(self, work: Work) -> None:
        from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

        self.work = work
        torch.set_num_threads(work.threads)
        self.model: Any = WhisperForConditionalGeneration.from_pretrained(
            work.checkpoint, local_files_only=True, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self._extractor = WhisperFeatureExtractor.from_pretrained(work.checkpoint, local_files_only=True)
        self._generation_config = read_json(work.checkpoint / "generation_config.json")
        self._prompt = prompt_ids(work.checkpoint)
        self._suppression = Suppression.of(self._generation_config, self.model.config.vocab_size)
        self._adapt()
        self._clock = ModelClock(self.model)

    def transcribe(self, audio: NDArray[np.float32]) -> Utterance:
        """Transcribes one window.

        Args:
            audio: float32 [samples] at 16 kHz.
        """
        self._clock.reset()
        start = perf_counter()
        features = self._extractor(audio, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
        extracted = perf_counter()
        with torch.inference_mode():
            tokens, rows, selection = self._decode(features)
        return self._clock.utterance(
            tokens, rows, start=start, features=extracted - start, end=perf_counter(), selection=selection
        )

    def close(self) -> None:
        """Lets the weights go."""
        del self.model

    def _adapt(self) -> None:  # noqa: B027 - the base model has no adapters, and that is no omission
        """Puts the adapters into the model."""

    @abstractmethod
    def _decode(self, features: Tensor) -> tuple[Sequence[int], Sequence[int], float | None]:
        """Features [1, mels, frames] -> tokens, the row of each, and seconds spent on selection."""

    def _states(self, features: Tensor, rows: int) -> Tensor:
        """Encoder states [rows, S, D], computed once and expanded without a copy."""
        states: Tensor = self.model.get_encoder()(features).last_hidden_state
        return states.expand(rows, -1, -1)

    def _greedy(self, states: Tensor, model: Any = None) -> Decoded:
        """Decodes with the paper's rule; `model` is what `greedy` calls, by default this system's own."""
        work, model = self.work, model or self.model
        if work.tokens is None:
            raise OptionError(f"{self.name!r} writes a forced number of tokens only. Give --tokens.")
        return greedy(model, states, self._prompt, count=work.tokens, suppression=self._suppression, tau=work.tau)


class TransformersGenerate(Baseline):
    """`generate` on the base: what a user of transformers has today, and the yardstick of all ratios."""

    name = "transformers"

    def _decode(self, features: Tensor) -> tuple[Sequence[int], Sequence[int], float | None]:
        options = generate_options(self._generation_config, self.work.tokens)
        ids = self.model.generate(features, **options)[0].tolist()
        end = self.model.generation_config.eos_token_id
        return [token for token in ids if token != end], (), None


class SequentialLora(Baseline):
    """The paper's sequential LoRA inside ADML; with no adapters it is the plain base in the same loop."""

    name = "sequential-lora"

    def _adapt(self) -> None:
        loop_adapters(self.model, self.work.adapters)
        share_cross_rows(self.model)

    def _decode(self, features: Tensor) -> tuple[Sequence[int], Sequence[int], float | None]:
        decoded = self._greedy(self._states(features, len(self.work.adapters) + 1))
        return decoded.tokens, decoded.rows, decoded.selection


class PeftBaseline(Baseline):
    """A baseline whose adapters PEFT has injected."""

    peft: Any

    def _adapt(self) -> None:
        from peft import PeftModel

        names = [folder.name for folder in self.work.adapters]
        self.peft = PeftModel.from_pretrained(self.model, self.work.adapters[0], adapter_name=names[0])
        for name, folder in zip(names[1:], self.work.adapters[1:], strict=True):
            self.peft.load_adapter(folder, adapter_name=name)
        self.peft.eval()
        self._names = names

    def close(self) -> None:
        """Lets the weights go."""
        del self.peft
        super().close()


class SequentialDecodes(PeftBaseline):
    """K + 1 whole decodes: the base, then each adapter, all from one encoder run."""

    name = "sequential-decodes"

    def _decode(self, features: Tensor) -> tuple[Sequence[int], Sequence[int], float | None]:
        states = self._states(features, 1)
        hypotheses = self.hypotheses(states)
        best = max(range(len(hypotheses)), key=lambda row: _log_probability(hypotheses[row]))
        tokens = hypotheses[best].tokens
        return tokens, [best] * len(tokens), sum(decoded.selection for decoded in hypotheses)

    def hypotheses(self, states: Tensor) -> list[Decoded]:
        """Every row's own greedy hypothesis, the base's first."""
        with self.peft.disable_adapter():
            decoded = [self._greedy(states)]
        for name in self._names:
            self.peft.set_adapter(name)
            decoded.append(self._greedy(states))
        return decoded


class MixedBatch(PeftBaseline):
    """PEFT's mixed batch in the ADML loop."""

    name = "peft-mixed"

    def _adapt(self) -> None:
        super()._adapt()
        share_cross_rows(self.model)

    def _decode(self, features: Tensor) -> tuple[Sequence[int], Sequence[int], float | None]:
        with self.mixed():
            decoded = self._greedy(self._states(features, len(self._names) + 1))
        return decoded.tokens, decoded.rows, decoded.selection

    def mixed(self) -> contextlib.AbstractContextManager[None]:
        """Row 0 the base, row i adapter i, for as long as the context lasts.

        `PeftModel.generate` opens the same context once per call; `PeftModel.forward` would open it at every step.
        """
        context: contextlib.AbstractContextManager[None] = self.peft._enable_peft_forward_hooks(
            adapter_names=["__base__", *self._names]
        )
        return context


class MixedForward(PeftBaseline):
    """PEFT's mixed batch by its public `forward(adapter_names=...)`, nothing shared and nothing opened once for all."""

    name = "peft-forward"

    def _decode(self, features: Tensor) -> tuple[Sequence[int], Sequence[int], float | None]:
        decoded = self._greedy(self._states(features, len(self._names) + 1), _PublicForward(self.peft, self._names))
        return decoded.tokens, decoded.rows, decoded.selection


class _PublicForward:
    """A PEFT model in the shape that `greedy` asks for; its "hidden states" are already logits."""

    def __init__(self, peft: Any, names: Sequence[str]) -> None:
        self._peft, self._names = peft, ["__base__", *names]

    def get_decoder(self) -> Any:
        return self._forward

    def get_output_embeddings(self) -> Any:
        return torch.nn.Identity()

    def _forward(self, input_ids: Tensor, encoder_hidden_states: Tensor, **cache: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        encoded = BaseModelOutput(last_hidden_state=encoder_hidden_states)
        output = self._peft(decoder_input_ids=input_ids, encoder_outputs=encoded, adapter_names=self._names, **cache)
        return BaseModelOutput(last_hidden_state=output.logits)


def generate_options(generation_config: dict[str, Any], tokens: int | None) -> dict[str, Any]:
    """Arguments of `generate` for greedy English transcription without timestamps, to exactly so many tokens if any."""
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "return_timestamps": False, "use_cache": True}
    if is_multilingual(generation_config):
        options |= {"language": "en", "task": "transcribe"}
    if tokens is not None:
        options |= {"min_new_tokens": tokens, "max_new_tokens": tokens}
    return options


def _log_probability(decoded: Decoded) -> float:
    return sum(math.log(choice.confidence) for choice in decoded.choices)


BASELINES: dict[str, type[Baseline]] = {
    system.name: system
    for system in (TransformersGenerate, SequentialLora, SequentialDecodes, MixedBatch, MixedForward)
}
"""By name, in the order of the tables."""
