"""Initial LoRA factors, and what they do to the base; imported on demand, for it needs PyTorch.

    plain    A random, B zero; the base stays
    pissa    A, B from the r largest singular values of W (arXiv 2404.02948); W -> W - s B A
    olora    A, B from the first r rows and columns of W = Q R (arXiv 2406.01775); W -> W - s B A

PiSSA and OLoRA change the base, and their adapters would fit no other one. The initial factors are therefore kept, and
`converted` makes of them and the trained ones the factors of a plain LoRA on the original base, exactly:

    W - s B0 A0 + s B A  =  W + s [B, -B0] [A; A0]
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from das_asr.training.finetune.adapter_file import Factors

__all__ = ["converted", "initialise"]

_PREFIX = "base_model.model."
_ADAPTER = "default"


def initialise(model: Any, kind: str, start: Path) -> None:
    """Sets the factors of a fresh PEFT model and takes them out of the base's weights.

    Args:
        model: a `PeftModel` with plain initial factors.
        kind: "plain", "pissa" or "olora".
        start: safetensors file that keeps the factors; where it exists they are taken from it, because another machine
            may compute others.
    """
    if kind == "plain":
        return
    kept = load_file(start) if start.is_file() else _decompose(model, kind)
    if not start.is_file():
        temporary = start.with_suffix(".tmp")
        save_file(kept, temporary)
        temporary.replace(start)
    with torch.no_grad():
        for name, layer in _layers(model):
            a, b, weight = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight, layer.base_layer.weight
            a.copy_(kept[f"{name}.A"])
            b.copy_(kept[f"{name}.B"])
            weight -= layer.scaling[_ADAPTER] * (b @ a)


def converted(model: Any, start: Path) -> Factors:
    """The trained factors as a plain LoRA on the original base; twice the rank where `start` exists."""
    initial = load_file(start) if start.is_file() else {}
    modules = {}
    scale = 1.0
    for name, layer in _layers(model):
        a, b = (part[_ADAPTER].weight.detach().float().cpu() for part in (layer.lora_A, layer.lora_B))
        if initial:
            a, b = torch.cat([a, initial[f"{name}.A"]]), torch.cat([b, -initial[f"{name}.B"]], dim=1)
        modules[name] = (a.contiguous().numpy(), b.contiguous().numpy())
        scale = float(layer.scaling[_ADAPTER])
    return Factors(modules, scale)


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Name in the base, and PEFT's layer, of every adapted module."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield name.removeprefix(_PREFIX), module


def _decompose(model: Any, kind: str) -> dict[str, torch.Tensor]:
    factors = {}
    for name, layer in _layers(model):
        weight, rank = layer.base_layer.weight.detach().float().cpu(), layer.r[_ADAPTER]
        a, b = _pissa(weight, rank, layer.scaling[_ADAPTER]) if kind == "pissa" else _olora(weight, rank)
        factors[f"{name}.A"], factors[f"{name}.B"] = a.contiguous(), b.contiguous()
    return factors


def _pissa(weight: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, in] and B [out, r] with s B A the best approximation of W [out, in] of that rank."""
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * vt[:rank], u[:, :rank] * root


def _olora(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, in] and B [out, r], orthonormal columns in B."""
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]
