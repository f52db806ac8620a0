"""Muon: momentum whose update is orthogonalised, for the matrices of a network (K. Jordan et al., 2024).

Every other parameter (embeddings, norms, biases, convolutions) goes to AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Muon", "orthogonalized"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic Newton-Schulz iteration with the largest slope at 0
_ITERATIONS = 5


def orthogonalized(update: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: singular values come out between about 0.7 and 1.2.

    Args:
        update: [N, rows, columns].
    """
    a, b, c = _COEFFICIENTS
    matrix = update.bfloat16()
    tall = matrix.shape[-2] > matrix.shape[-1]
    if tall:
        matrix = matrix.mT
    matrix = matrix / (matrix.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = matrix @ matrix.mT
        matrix = a * matrix + (b * gram + c * gram @ gram) @ matrix
    result: Tensor = matrix.mT if tall else matrix
    return result.to(update.dtype)


class Muon(torch.optim.Optimizer):
    """Muon with decoupled weight decay; parameters of the same shape are updated in one batch of matrices."""

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates every matrix that has a gradient."""
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                self._update(parameters, max(shape) ** 0.5, group)

    def _momentum(self, parameter: Tensor) -> Tensor:
        buffer: Tensor = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
        return buffer

    def _update(self, parameters: list[Tensor], longest: float, group: dict[str, Any]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        buffers = [
            self.state[parameter].setdefault("momentum", torch.zeros_like(parameter)) for parameter in parameters
        ]
        for buffer, gradient in zip(buffers, gradients, strict=True):
            buffer.lerp_(gradient, 1 - group["momentum"])
        ahead = [gradient.lerp(buffer, group["momentum"]) for gradient, buffer in zip(gradients, buffers, strict=True)]
        updates = orthogonalized(torch.stack(ahead)).unbind()
        for parameter, update in zip(parameters, updates, strict=True):
            # 0.2 sqrt(longer side): the size of an AdamW update, so that both groups bear similar learning rates.
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * 0.2 * longest)
