"""A frozen linear map plus a low-rank update whose two matrices are Gaussian."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from das_asr.training.blora.gaussian import GaussianMatrix
from das_asr.training.blora.options import BloraOptions

__all__ = ["BayesLoraLinear"]


class BayesLoraLinear(nn.Module):
    """x -> W x + bias + scale * B A x with independent Gaussians as the elements of A [r, in] and B [out, r].

    In evaluation mode A and B are the posterior's means, which is what a saved adapter holds.
    A's means start as in LoRA, uniform within +-1/sqrt(in), B's at zero: the mean model is the base.
    With the method "lora" there are means alone.
    """

    def __init__(self, base: nn.Linear, options: BloraOptions) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = options.scale
        self.dropout = nn.Dropout(options.dropout)
        # Float32 whatever the base is in: a step of the optimiser is smaller than what half precision resolves.
        mean_a = torch.empty(options.rank, base.in_features, device=base.weight.device, dtype=torch.float32)
        mean_b = mean_a.new_zeros(base.out_features, options.rank)
        nn.init.kaiming_uniform_(mean_a, a=math.sqrt(5))
        bayesian, posterior = options.method == "blora", options.posterior
        estimator = posterior.estimator if bayesian else "mean"
        self.a = GaussianMatrix(mean_a, posterior.sigma_init, posterior.prior_sigma, estimator)
        self.b = GaussianMatrix(mean_b, posterior.sigma_init_b, posterior.prior_sigma, estimator)
        for matrix in (self.a, self.b):
            matrix.rho.requires_grad_(bayesian)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of the base's output."""
        output: Tensor = self.base(x)
        # Squares of sigma underflow in half precision.
        with torch.autocast(x.device.type, enabled=False):
            update: Tensor = self.b(self.a(self.dropout(x.to(self.a.mean.dtype))))
        return output + (self.scale * update).to(output.dtype)
