"""LoRA in plain PyTorch, as the DAS paper's "sequential" baseline has it.

The base product is batched over the K + 1 rows; the K low-rank products are computed one after the other and added to
their rows. Row 0 has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from das_asr.benchmarks.models import read_json
from das_asr.runtime.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LoopedLora", "Pairs", "SharedRows", "adapter_pairs", "loop_adapters", "share_cross_rows"]

Pairs = Sequence[tuple["Tensor", "Tensor"]]
"""Of each adapter A [D, r] and B [r, D], the scale folded into B."""

Wrap = Callable[[str, nn.Module, Pairs], nn.Module]

PREFIX = "base_model.model."
"""What PEFT puts before a module's name in a checkpoint."""


class SharedRows(nn.Module):
    """A linear layer that computes once what is the same in every row.

    All rows attend to the same encoder states, which arrive expanded (row stride 0): without this, the baselines would
    compute K and the base part of V of the cross-attention K + 1 times, which no sensible implementation does.
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """[R, n, D] -> [R, n, D], owned memory: the caller may add to single rows in place."""
        if x.shape[0] > 1 and x.stride(0) == 0:
            shared: Tensor = self.linear(x[:1])
            return shared.repeat(x.shape[0], 1, 1)
        result: Tensor = self.linear(x)
        return result


class LoopedLora(nn.Module):
    """`y[i] = W x[i] + (x[i] A_i) B_i`: one batched base product, then a loop over the adapters."""

    def __init__(self, linear: nn.Module, pairs: Pairs) -> None:
        """Wraps a linear layer.

        Args:
            linear: The base layer.
            pairs: Of each adapter A [D, r] and B [r, D], the scale folded into B.
        """
        super().__init__()
        self.base = SharedRows(linear)
        self.pairs = list(pairs)

    def forward(self, x: Tensor) -> Tensor:
        """[R, n, D] -> [R, n, D] with R = len(pairs) + 1."""
        out: Tensor = self.base(x)
        for row, (a, b) in enumerate(self.pairs, start=1):
            out[row].addmm_(x[row] @ a, b)
        return out


def _looped(_: str, linear: nn.Module, pairs: Pairs) -> nn.Module:
    return LoopedLora(linear, pairs)


def loop_adapters(model: nn.Module, folders: Sequence[Path], wrap: Wrap = _looped) -> None:
    """Replaces every adapted projection of a model by one with all adapters, in place.

    Args:
        model: A `WhisperForConditionalGeneration`.
        folders: PEFT checkpoints in the order of the rows; all must adapt the same modules.
        wrap: from a module's name, the module and its pairs to what replaces it; by default a `LoopedLora`.

    Raises:
        AdapterError: an adapter lacks a module that another has.
    """
    adapters = [dict(adapter_pairs(folder)) for folder in folders]
    names = set().union(*adapters)
    for folder, adapter in zip(folders, adapters, strict=True):
        if missing := sorted(names - adapter.keys()):
            raise AdapterError(f"{folder} does not adapt {missing[0]} while others do. Use adapters with one target.")
    for name in names:
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        setattr(model.get_submodule(parent), child, wrap(name, linear, [adapter[name] for adapter in adapters]))


def share_cross_rows(model: Any) -> None:
    """Lets cross-attention keys, and base values where PEFT has wrapped them, be computed once for all rows."""
    for layer in model.get_decoder().layers:
        attention = layer.encoder_attn
        attention.k_proj = SharedRows(attention.k_proj)
        if hasattr(attention.v_proj, "base_layer"):
            attention.v_proj.base_layer = SharedRows(attention.v_proj.base_layer)


def adapter_pairs(folder: Path) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Module name and (A [D, r], B [r, D]) of every adapted module, the scale folded into B."""
    from safetensors.torch import load_file

    scale = _scale(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            a, b = tensors[key].float(), tensors[key.replace(".lora_A.", ".lora_B.")].float()
            name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            yield name, (a.T.contiguous(), (scale * b.T).contiguous())


def _scale(folder: Path) -> float:
    config = read_json(folder / "adapter_config.json")
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
