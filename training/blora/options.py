"""What BLoRA adds to the options of LoRA, checked where it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from das_asr.runtime.errors import OptionError
from das_asr.runtime.peft_checkpoint import SUPPORTED_MODULES
from das_asr.training.finetune.options import DataOptions, TrainOptions

__all__ = ["ESTIMATOR_NAMES", "METHODS", "PRIORS", "BloraOptions", "PosteriorOptions"]

METHODS = ("blora", "lora")
"""`lora` leaves out the noise and the KL term, and nothing else: what BLoRA is to be compared with."""

ESTIMATOR_NAMES = ("weight", "flipout", "local")
"""How a training step samples, see `das_asr.training.blora.gaussian`."""

PRIORS = ("fixed", "previous")
"""What training that goes on from a posterior is held to: N(0, prior_sigma^2), or that posterior."""


@dataclass(frozen=True, kw_only=True)
class PosteriorOptions:
    """Prior, initial posterior, estimator, and the weight of the KL term.

    The loss is cross-entropy + beta * KL, where KL is the mean over the elements of each matrix, summed over matrices.

    Attributes:
        prior_sigma: standard deviation of the prior of every element; its mean is 0.
        sigma_init: standard deviations that the posterior of A starts with.
        sigma_init_b: the same for B.
        estimator: one of `ESTIMATOR_NAMES`.
        beta: weight of the KL term; 0 leaves it out.
        beta_warmup: share of the steps over which beta rises linearly from 0.
        prior: one of `PRIORS`.
    """

    prior_sigma: float = 0.01
    sigma_init: float = 0.005
    # While B's means are zero its noise alone reaches the output, and A, drawn as in LoRA, is several times larger than
    # the prior: with 0.005 the noise on a whole Whisper's queries would not be small.
    sigma_init_b: float = 0.001
    estimator: str = "flipout"
    beta: float = 0.01
    beta_warmup: float = 0.0
    prior: str = "fixed"

    def __post_init__(self) -> None:
        for name in ("prior_sigma", "sigma_init", "sigma_init_b"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise OptionError(f"{_flag(name)} is {value}, expected a standard deviation above 0.")
        if not 0 <= self.beta < math.inf:
            raise OptionError(f"--beta is {self.beta}, expected at least 0; 0 leaves the KL term out.")
        if not 0 <= self.beta_warmup <= 1:
            raise OptionError(f"--beta-warmup is {self.beta_warmup}, expected a share of the steps, 0 to 1.")
        _check_choice("estimator", self.estimator, ESTIMATOR_NAMES)
        _check_choice("prior", self.prior, PRIORS)

    def beta_at(self, progress: float) -> float:
        """Weight of the KL term when the share `progress` of the steps is done, 0 to 1."""
        return self.beta if progress >= self.beta_warmup else self.beta * progress / self.beta_warmup


@dataclass(frozen=True, kw_only=True)
class BloraOptions:
    """Options of `train_blora`.

    Attributes:
        base: folder of a Hugging Face Whisper checkpoint, or a hub id.
        output: the adapter to write; must not exist.
        data: what to train on.
        train: how.
        posterior: what is Bayesian about it.
        method: "blora", or "lora" for the same run without noise and KL term.
        start: folder of an earlier run of either method, whose posterior this one starts from.
        revision: branch, tag or commit of a hub id.
        rank: r of every module.
        alpha: the scale is alpha / r, or alpha / sqrt(r) with rsLoRA.
        rslora: which of the two.
        dropout: on the input of A.
        targets: regular expression of full module names; only modules of `SUPPORTED_MODULES` can be used later.
        restart: throw away an unfinished run that would be continued.
    """

    base: str
    output: Path
    data: DataOptions
    train: TrainOptions
    posterior: PosteriorOptions = field(default_factory=PosteriorOptions)
    method: str = "blora"
    start: Path | None = None
    revision: str | None = None
    rank: int = 32
    alpha: float = 64.0
    rslora: bool = True
    dropout: float = 0.0
    targets: str = SUPPORTED_MODULES
    restart: bool = False

    def __post_init__(self) -> None:
        _check_choice("method", self.method, METHODS)
        if self.rank < 1:
            raise OptionError(f"--rank is {self.rank}, expected at least 1.")
        if not 0 < self.alpha < math.inf:
            raise OptionError(f"--alpha is {self.alpha}, expected a number above 0.")
        if not 0 <= self.dropout < 1:
            raise OptionError(f"--dropout is {self.dropout}, expected a probability: at least 0 and below 1.")
        if self.train.eval_wer and not self.data.eval_sources:
            raise OptionError("--eval-wer measures on a development set, but no --eval-data was given.")

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise OptionError(f"{_flag(name)} is {value!r}, expected {', '.join(choices[:-1])} or {choices[-1]}.")
