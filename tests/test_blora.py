"""Gaussian matrices, their KL divergence and their estimators; the layer made of them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl

from das_asr.training.blora.gaussian import ESTIMATORS, GaussianMatrix, kl_divergence, mean_kl, rho_of
from das_asr.training.blora.layer import BayesLoraLinear
from das_asr.training.blora.options import ESTIMATOR_NAMES, BloraOptions, PosteriorOptions
from das_asr.training.finetune.options import DataOptions, TrainOptions

pytestmark = pytest.mark.usefixtures("one_torch_thread")

DRAWS = 3000


def _options(estimator: str = "weight", dropout: float = 0.0) -> BloraOptions:
    """Rank 2, scale 3."""
    return BloraOptions(
        base="base",
        output=Path("adapter"),
        data=DataOptions(sources=(Path("data"),)),
        train=TrainOptions(learning_rate=1e-3),
        posterior=PosteriorOptions(estimator=estimator),
        rank=2,
        alpha=6.0,
        rslora=False,
        dropout=dropout,
    )


def _matrix(estimator: str = "weight", out: int = 3, width: int = 5, dtype: torch.dtype = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(out * width)
    mean = torch.randn(out, width, generator=generator, dtype=dtype)
    matrix = GaussianMatrix(mean, 0.3, 0.7, estimator)
    with torch.no_grad():
        matrix.rho += torch.randn(out, width, generator=generator, dtype=dtype) / 2
    return matrix


@pytest.mark.parametrize("sigma", [1e-12, 1e-4, 0.005, 1.0, 20.0])
def test_rho_is_the_inverse_of_softplus(sigma: float) -> None:
    softplus = nn.functional.softplus(torch.tensor(rho_of(sigma), dtype=torch.float64))
    assert float(softplus) == pytest.approx(sigma, rel=1e-9)


def test_kl_is_that_of_torch() -> None:
    mean, sigma, prior_mean, prior_sigma = torch.rand(4, 6, 7, dtype=torch.float64) + 0.1
    expected = torch_kl(Normal(mean, sigma), Normal(prior_mean, prior_sigma))
    found = kl_divergence(mean, sigma, prior_mean, prior_sigma)
    assert torch.allclose(found, expected, rtol=1e-12), (found - expected).abs().max()


def test_kl_of_the_prior_itself_is_zero() -> None:
    matrix = _matrix()
    assert mean_kl([matrix]) > 0.1
    matrix.hold_to_itself()
    assert abs(mean_kl([matrix])) < 1e-15


def test_mean_kl_averages_over_elements_and_adds_up_matrices() -> None:
    """Matrices of several sizes, one of them with a prior of its own."""
    matrices = [_matrix(out=3), _matrix(out=4), _matrix(out=5, width=3)]
    matrices[1].hold_to_itself()
    matrices[1].mean.data += 0.1
    expected = sum(torch_kl(Normal(m.mean, m.sigma), Normal(m.prior_mean, m.prior_sigma)).mean() for m in matrices)
    assert torch.allclose(mean_kl(matrices), torch.as_tensor(expected), rtol=1e-12)


def test_kl_has_the_right_gradient() -> None:
    matrix = _matrix()

    def kl(mean: Tensor, rho: Tensor) -> Tensor:
        return torch.func.functional_call(_Kl(matrix), {"matrix.mean": mean, "matrix.rho": rho}, ())

    assert torch.autograd.gradcheck(kl, (matrix.mean, matrix.rho))


class _Kl(nn.Module):
    def __init__(self, matrix: GaussianMatrix) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self) -> Tensor:
        return mean_kl([self.matrix])


def test_the_names_of_the_estimators_are_in_step() -> None:
    assert tuple(ESTIMATORS) == (*ESTIMATOR_NAMES, "mean")


@pytest.mark.parametrize("estimator", ESTIMATOR_NAMES)
@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 5)], ids=str)
def test_estimators_have_the_right_gradient(estimator: str, shape: tuple[int, ...]) -> None:
    """With the noise held, in x, mean and rho."""
    matrix = _matrix(estimator)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def sample(x: Tensor, mean: Tensor, rho: Tensor) -> Tensor:
        torch.manual_seed(3)
        return ESTIMATORS[estimator](x, mean, nn.functional.softplus(rho))

    assert sample(x, matrix.mean, matrix.rho).shape == (*shape[:-1], 3)
    assert torch.autograd.gradcheck(sample, (x, matrix.mean, matrix.rho))


def _assert_moments(draws: Tensor, mean: Tensor, variance: Tensor) -> None:
    """Within five standard errors; the variance's assumes tails up to twice those of a Gaussian."""
    count = len(draws)
    off = ((draws.mean(dim=0) - mean).abs() / (variance / count).sqrt()).max()
    assert off < 5, f"mean is {off:.1f} standard errors off"
    off = ((draws.var(dim=0) / variance - 1).abs() / math.sqrt(4 / count)).max()
    assert off < 5, f"variance is {off:.1f} standard errors off"


@pytest.mark.parametrize("estimator", ESTIMATOR_NAMES)
def test_estimators_have_the_exact_moments_of_a_random_matrix(estimator: str) -> None:
    torch.manual_seed(0)
    matrix = _matrix(estimator)
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        draws = torch.stack([matrix(x) for _ in range(DRAWS)])
        _assert_moments(draws, x @ matrix.mean.T, x.square() @ matrix.sigma.square().T)


@pytest.mark.parametrize("estimator", ESTIMATOR_NAMES)
def test_estimators_have_the_exact_moments_of_the_product(estimator: str) -> None:
    """B A x with both random: variance sum_k mu_b^2 v_k + sigma_b^2 (m_k^2 + v_k), where h = A x ~ (m, v)."""
    torch.manual_seed(0)
    a, b = _matrix(estimator, 4, 5), _matrix(estimator, 3, 4)
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        m, v = x @ a.mean.T, x.square() @ a.sigma.square().T
        variance = v @ b.mean.square().T + (m.square() + v) @ b.sigma.square().T
        draws = torch.stack([b(a(x)) for _ in range(DRAWS)])
        _assert_moments(draws, m @ b.mean.T, variance)


def _correlations(estimator: str) -> tuple[float, float]:
    """Correlation of the noise between two positions with the same input: in one row, and in two rows."""
    torch.manual_seed(0)
    matrix = _matrix(estimator)
    x = torch.randn(1, 1, 5, dtype=torch.float64).expand(2, 2, 5)
    with torch.no_grad():
        draws = torch.stack([matrix(x)[..., 0] for _ in range(DRAWS)])
    return tuple(float(np.corrcoef(draws[:, 0, 0], draws[:, i, j])[0, 1]) for i, j in ((0, 1), (1, 0)))  # type: ignore[return-value]


def test_estimators_differ_in_what_shares_a_sample() -> None:
    """The whole batch; a row; nothing."""
    for estimator, expected in {"weight": (1, 1), "flipout": (1, 0), "local": (0, 0)}.items():
        assert _correlations(estimator) == pytest.approx(expected, abs=0.12), estimator


def test_local_has_a_gradient_at_zero_input() -> None:
    matrix = _matrix("local")
    matrix(torch.zeros(1, 2, 5, dtype=torch.float64)).sum().backward()
    assert matrix.rho.grad is not None
    assert torch.isfinite(matrix.rho.grad).all()


def test_evaluation_takes_the_mean() -> None:
    matrix = _matrix().eval()
    x = torch.randn(2, 5, dtype=torch.float64)
    assert torch.equal(matrix(x), x @ matrix.mean.T)


@pytest.mark.parametrize("estimator", ESTIMATOR_NAMES)
def test_the_layer_starts_as_its_base_and_trains_four_tensors(estimator: str) -> None:
    base = nn.Linear(6, 4).to(torch.bfloat16)
    layer = BayesLoraLinear(base, _options(estimator))
    x = torch.randn(2, 3, 6, dtype=torch.bfloat16)
    assert torch.equal(layer.eval()(x), base(x))
    with torch.autocast("cpu", torch.bfloat16):
        output = layer.train()(x)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    trained = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert trained == {"a.mean", "a.rho", "b.mean", "b.rho"}
    assert all(parameter.dtype == torch.float32 for parameter in (layer.a.mean, layer.a.rho, layer.b.mean))


def test_the_layer_is_the_scaled_product_of_the_means() -> None:
    layer = BayesLoraLinear(nn.Linear(6, 4), _options(dropout=0.5)).eval()
    nn.init.normal_(layer.b.mean)
    x = torch.randn(5, 6)
    expected = layer.base(x) + x @ (3.0 * layer.b.mean @ layer.a.mean).T
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_plain_lora_is_the_same_layer_without_noise() -> None:
    options = replace(_options(), method="lora")
    layer = BayesLoraLinear(nn.Linear(6, 4), options).train()
    nn.init.normal_(layer.b.mean)
    x = torch.randn(5, 6)
    assert torch.equal(layer(x), layer.eval()(x))
    assert not layer.a.rho.requires_grad
