"""A matrix of independent Gaussians, and three ways to put activations through one sample of it.

Every element has a mean and a standard deviation sigma = softplus(rho). An estimator maps x to y = x W^T, W random:

    weight     one W for the whole batch
    flipout    one W for every row of the batch: the noise of a shared draw with random signs per row (Wen et al. 2018)
    local      a draw of y itself, for every position: y ~ N(x mean^T, x^2 (sigma^2)^T) (Kingma et al. 2015)

For one position all three have the same mean and variance; they differ in how positions and rows are correlated, hence
in the variance of the gradient.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ESTIMATORS", "GaussianMatrix", "kl_divergence", "mean_kl", "rho_of"]

Estimator = Callable[[Tensor, Tensor, Tensor], Tensor]


def rho_of(sigma: float) -> float:
    """The rho whose softplus is `sigma`; exact for small sigma too."""
    return sigma + math.log(-math.expm1(-sigma))


def _weight(x: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    return F.linear(x, mean + sigma * torch.randn_like(mean))


def _flipout(x: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    rows = x.shape[0]
    signs = _signs(mean, rows, mean.shape[0], 1) * _signs(mean, rows, 1, mean.shape[1])
    # A matrix per row is smaller than the activations of a row, on which the signs could be put as well.
    sampled = mean + signs * (sigma * torch.randn_like(mean))  # [rows, out, in]
    y = torch.bmm(x.reshape(rows, -1, x.shape[-1]), sampled.transpose(1, 2))
    return y.reshape(*x.shape[:-1], -1)


def _signs(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(0.5).mul_(2).sub_(1)


def _mean(x: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:  # noqa: ARG001
    return F.linear(x, mean)


def _local(x: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    expected = F.linear(x, mean)
    variance = F.linear(x.square(), sigma.square())
    # The root has no gradient at zero, which a zero input reaches.
    return expected + variance.clamp_min(torch.finfo(x.dtype).tiny).sqrt() * torch.randn_like(expected)


ESTIMATORS: dict[str, Estimator] = {"weight": _weight, "flipout": _flipout, "local": _local, "mean": _mean}
"""By name; `mean` samples nothing, which makes the low-rank update a plain LoRA."""


class GaussianMatrix(nn.Module):
    """N(mean, softplus(rho)^2) for every element of a matrix, and the Gaussian prior it is held to.

    In training a forward is one sample of x W^T, [..., in] -> [..., out]; in evaluation it is the mean's.
    The prior is N(0, prior_sigma^2) for every element until `hold_to_itself` is called.
    """

    def __init__(self, mean: Tensor, sigma: float, prior_sigma: float, estimator: str) -> None:
        super().__init__()
        self.mean = nn.Parameter(mean.detach().clone())  # [out, in]
        self.rho = nn.Parameter(torch.full_like(mean, rho_of(sigma)))  # [out, in]
        self.estimate = ESTIMATORS[estimator]
        self.prior_mean: Tensor
        self.prior_sigma: Tensor
        # Either scalars or [out, in]. Not state: a resumed run makes them again from its options.
        self.register_buffer("prior_mean", mean.new_zeros(()), persistent=False)
        self.register_buffer("prior_sigma", mean.new_tensor(prior_sigma), persistent=False)

    @property
    def sigma(self) -> Tensor:
        """Standard deviations, [out, in]."""
        return F.softplus(self.rho)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of the mean."""
        if self.training:
            return self.estimate(x, self.mean, self.sigma)
        return F.linear(x, self.mean)

    def hold_to_itself(self) -> None:
        """Makes the posterior of this moment the prior."""
        self.prior_mean = self.mean.detach().clone()
        self.prior_sigma = self.sigma.detach().clone()


def kl_divergence(mean: Tensor, sigma: Tensor, prior_mean: Tensor, prior_sigma: Tensor) -> Tensor:
    """KL(N(mean, sigma^2) || N(prior_mean, prior_sigma^2)) of each element; nats, the shape of `mean`."""
    spread = (sigma.square() + (mean - prior_mean).square()) / (2 * prior_sigma.square())
    return prior_sigma.log() - sigma.log() + spread - 0.5


def mean_kl(matrices: Iterable[GaussianMatrix]) -> Tensor:
    """KL to the prior: mean over the elements of each matrix, summed over the matrices. Scalar, nats.

    Matrices with the same number of elements are stacked, so that the cost is a few operations however many there are.
    """
    groups: dict[int, list[GaussianMatrix]] = defaultdict(list)
    for matrix in matrices:
        groups[matrix.mean.numel()].append(matrix)
    return torch.stack([_group_kl(group) for group in groups.values()]).sum()


def _group_kl(group: list[GaussianMatrix]) -> Tensor:
    mean, rho, prior_mean, prior_sigma = (
        torch.stack([getattr(matrix, name).expand_as(matrix.mean).reshape(-1) for matrix in group])
        for name in ("mean", "rho", "prior_mean", "prior_sigma")
    )
    return kl_divergence(mean, F.softplus(rho), prior_mean, prior_sigma).mean(dim=1).sum()
