"""The PyTorch systems of the comparison on a GPU, for batches of utterances.

transformers           `generate` on the base alone
transformers-compiled  the same with a static cache and `torch.compile`, as its documentation says
sequential-lora        the paper's baseline: all rows in one pass, base products batched, LoRA products in a loop
peft-mixed             PEFT's mixed batch: all rows in one pass, `adapter_names` saying which row has which adapter

Row r of utterance b is at b * R + r. Cross-attention keys, and the base's values, are computed once per utterance. The
paper's rule runs on the device, and nothing waits for the host until the last token is written.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from das_asr.benchmarks.baselines import generate_options
from das_asr.benchmarks.lora import Pairs, loop_adapters
from das_asr.benchmarks.models import prompt_ids, read_json
from das_asr.benchmarks.torchloop import Suppression

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = [
    "PYTORCH_SYSTEMS",
    "CompiledGenerate",
    "Generate",
    "LoopedRows",
    "PeftMixed",
    "PerUtterance",
    "RowSystem",
    "SequentialLora",
    "Task",
    "TorchSystem",
    "paper_rows",
]

TAU = 0.025


@dataclass(frozen=True)
class Task:
    """What every system of a comparison has to do."""

    checkpoint: Path
    adapters: tuple[Path, ...]  # K PEFT folders
    precision: str  # fp32 or fp16
    device: str  # cpu, cuda or cuda:N

    @property
    def rows(self) -> int:
        """R = K + 1."""
        return len(self.adapters) + 1


class TorchSystem(ABC):
    """A transformers Whisper on a device."""

    def __init__(self, task: Task) -> None:
        from transformers import WhisperForConditionalGeneration

        self.task = task
        dtype = {"fp32": torch.float32, "fp16": torch.float16}[task.precision]
        self.model: Any = WhisperForConditionalGeneration.from_pretrained(
            task.checkpoint, local_files_only=True, dtype=dtype, attn_implementation="sdpa"
        ).eval()
        self._config = read_json(task.checkpoint / "generation_config.json")
        self._prompt = torch.tensor(prompt_ids(task.checkpoint), device=task.device)
        self._suppression = Suppression.of(self._config, self.model.config.vocab_size, task.device)
        self._adapt()
        self.model.to(task.device)

    def transcribe(self, features: NDArray[np.float32], tokens: int) -> list[list[int]]:
        """Writes exactly so many tokens for features [B, mels, frames]."""
        with torch.inference_mode():
            return self._decode(torch.from_numpy(features).to(self.task.device, self.model.dtype), tokens)

    def close(self) -> None:
        """Lets the weights go."""
        del self.model

    def _adapt(self) -> None:  # noqa: B027 - the base model has no adapters, and that is no omission
        """Puts the adapters into the model."""

    @abstractmethod
    def _decode(self, features: Tensor, tokens: int) -> list[list[int]]: ...


class Generate(TorchSystem):
    """`generate` on the base."""

    def _decode(self, features: Tensor, tokens: int) -> list[list[int]]:
        written = self.model.generate(features, **generate_options(self._config, tokens))
        return [utterance[-tokens:] for utterance in written.tolist()]


class CompiledGenerate(Generate):
    """`generate` with a static cache and a compiled forward."""

    def _adapt(self) -> None:
        self.model.generation_config.cache_implementation = "static"
        self.model.forward = torch.compile(self.model.forward, mode="reduce-overhead", fullgraph=True)


class RowSystem(TorchSystem):
    """A system that decodes all rows in one pass, with the paper's rule."""

    def _decode(self, features: Tensor, tokens: int) -> list[list[int]]:
        states = self.model.get_encoder()(features).last_hidden_state.repeat_interleave(self.task.rows, dim=0)
        with self._rows(len(features)):
            return self._write(states, tokens).tolist()

    def _rows(self, utterances: int) -> contextlib.AbstractContextManager[Any]:
        """A context in which each row has its adapter."""
        del utterances
        return contextlib.nullcontext()

    def _write(self, states: Tensor, tokens: int) -> Tensor:
        """Greedy decoding with shared histories: states [B * R, S, D] -> tokens [B, tokens]."""
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        decoder, head, rows = self.model.get_decoder(), self.model.get_output_embeddings(), self.task.rows
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        ids, written = self._prompt.expand(len(states), -1), []
        for step in range(tokens):
            output = decoder(input_ids=ids, encoder_hidden_states=states, past_key_values=cache, use_cache=True)
            logits = head(output.last_hidden_state[:, -1]).float()
            self._suppression.apply(logits, step)
            top, best = logits.max(dim=-1)
            confidences = (logits - top[:, None]).exp_().sum(dim=-1).reciprocal_().view(-1, rows)
            row = paper_rows(confidences, TAU)
            written.append(best.view(-1, rows).gather(1, row[:, None]))  # [B, 1]
            ids = written[-1].repeat_interleave(rows, dim=0)
        return torch.cat(written, dim=1)


class SequentialLora(RowSystem):
    """The paper's sequential LoRA."""

    def _adapt(self) -> None:
        loop_adapters(self.model, self.task.adapters, self._wrap)
        _share_keys(self.model, self.task.rows)

    def _wrap(self, name: str, linear: nn.Module, pairs: Pairs) -> nn.Module:
        shared = PerUtterance(linear, self.task.rows) if name.endswith("encoder_attn.v_proj") else linear
        return LoopedRows(shared, pairs, self.model.dtype)


class PeftMixed(RowSystem):
    """PEFT's mixed batch, its hooks opened once for all steps."""

    def _adapt(self) -> None:
        from peft import PeftModel

        self._names = [folder.name for folder in self.task.adapters]
        self._peft: Any = PeftModel.from_pretrained(self.model, self.task.adapters[0], adapter_name=self._names[0])
        for name, folder in zip(self._names[1:], self.task.adapters[1:], strict=True):
            self._peft.load_adapter(folder, adapter_name=name)
        self._peft.eval().to(self.model.dtype)
        for layer in self.model.get_decoder().layers:
            value = layer.encoder_attn.v_proj
            value.base_layer = PerUtterance(value.base_layer, self.task.rows)
        _share_keys(self.model, self.task.rows)

    def _rows(self, utterances: int) -> contextlib.AbstractContextManager[Any]:
        names = ["__base__", *self._names] * utterances
        return self._peft._enable_peft_forward_hooks(adapter_names=names)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Lets the weights go."""
        del self._peft
        super().close()


class PerUtterance(nn.Module):
    """A linear layer over encoder states, which are the same in all rows of an utterance: computed for one of them."""

    def __init__(self, linear: nn.Module, rows: int) -> None:
        super().__init__()
        self.linear, self.rows = linear, rows

    def forward(self, x: Tensor) -> Tensor:
        """[B * R, S, D] -> [B * R, S, D]."""
        result: Tensor = self.linear(x[:: self.rows]).repeat_interleave(self.rows, dim=0)
        return result


class LoopedRows(nn.Module):
    """`y[b, i] = W x[b, i] + (x[b, i] A_i) B_i`: one batched base product, then a loop over the adapters."""

    def __init__(self, base: nn.Module, pairs: Pairs, dtype: torch.dtype) -> None:
        """Wraps a layer; of each adapter A [D, r] and B [r, D], the scale folded into B."""
        super().__init__()
        self.base = base
        self.a, self.b = (
            nn.ParameterList([nn.Parameter(pair[side].to(dtype), requires_grad=False) for pair in pairs])
            for side in (0, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B * R, n, D] -> [B * R, n, D]."""
        out: Tensor = self.base(x)
        by_row, outputs = (tensor.view(-1, len(self.a) + 1, *tensor.shape[1:]) for tensor in (x, out))
        for row, (a, b) in enumerate(zip(self.a, self.b, strict=True), start=1):
            outputs[:, row] += by_row[:, row] @ a @ b
        return out


def paper_rows(confidences: Tensor, tau: float) -> Tensor:
    """The row [B] that Eq. 3 picks from confidences [B, R], without the host."""
    best, worst = confidences.argmax(dim=1), confidences.argmin(dim=1)
    base, zero = confidences[:, 0], torch.zeros_like(best)
    low = torch.where(confidences.amin(dim=1) - base <= -tau, worst, zero)
    return torch.where(confidences.amax(dim=1) - base >= tau, best, low)


def _share_keys(model: Any, rows: int) -> None:
    for layer in model.get_decoder().layers:
        layer.encoder_attn.k_proj = PerUtterance(layer.encoder_attn.k_proj, rows)


PYTORCH_SYSTEMS: dict[str, type[TorchSystem]] = {
    "transformers": Generate,
    "transformers-compiled": CompiledGenerate,
    "sequential-lora": SequentialLora,
    "peft-mixed": PeftMixed,
}
