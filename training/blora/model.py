"""Whisper with a Gaussian low-rank update in some of its linear maps, and that posterior on disk."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from das_asr.runtime.errors import OptionError, TrainingError
from das_asr.runtime.peft_checkpoint import SUPPORTED_MODULES
from das_asr.training.blora.gaussian import GaussianMatrix, mean_kl
from das_asr.training.blora.layer import BayesLoraLinear
from das_asr.training.blora.options import BloraOptions
from das_asr.training.finetune.adapter_file import Factors

__all__ = ["POSTERIOR", "BayesModel", "check_posterior"]

POSTERIOR = "posterior.safetensors"
"""Means and rhos, beside an adapter: what training can go on from."""


class BayesModel(nn.Module):
    """A frozen network whose target modules have become `BayesLoraLinear`s.

    Called as the network is. Its state is the posterior alone, so that checkpoints do not repeat the network.
    """

    _keys_to_ignore_on_save = None  # transformers' trainer looks for it when it resumes

    def __init__(self, network: nn.Module, options: BloraOptions) -> None:
        """Changes `network`; A's means come from torch's global random state.

        Raises:
            OptionError: the targets are not a regular expression, match nothing or what cannot be adapted; the network
                is then as it was.
        """
        super().__init__()
        targets = dict(_targets(network, options.targets))
        self.network = network.requires_grad_(False)
        for name, base in targets.items():
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, BayesLoraLinear(base, options))
        self.scale = options.scale

    def forward(self, **given: Any) -> Any:
        """What the network makes of it."""
        return self.network(**given)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Means and rhos of the posterior."""
        state = super().state_dict(*args, **kwargs)
        return {name: tensor for name, tensor in state.items() if name.endswith((".mean", ".rho"))}

    @property
    def matrices(self) -> dict[str, GaussianMatrix]:
        """By name: the name of the target module in the network, plus `.a` or `.b`."""
        return {name: module for name, module in self.network.named_modules() if isinstance(module, GaussianMatrix)}

    def kl(self) -> Tensor:
        """KL of the posterior to its prior, see `mean_kl`; a scalar with a gradient."""
        return mean_kl(self.matrices.values())

    def factors(self) -> Factors:
        """The posterior's means as a plain LoRA."""
        parts = {name: matrix.mean.detach().float().cpu().numpy() for name, matrix in self.matrices.items()}
        names = [name.removesuffix(".a") for name in parts if name.endswith(".a")]
        return Factors({name: (parts[f"{name}.a"], parts[f"{name}.b"]) for name in names}, self.scale)

    def save_posterior(self, directory: Path) -> None:
        """Writes `POSTERIOR` into an existing folder."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._posterior().items()}
        save_file(tensors, directory / POSTERIOR, metadata={"format": "pt"})

    def load_posterior(self, directory: Path, *, as_prior: bool) -> None:
        """Takes means and rhos from a folder that `save_posterior` wrote into; `as_prior` also makes them the prior.

        Raises:
            TrainingError: the folder has no posterior, or one of other modules or another rank.
        """
        stored, own = _read_posterior(directory), self._posterior()
        if {name: tensor.shape for name, tensor in stored.items()} != {name: own[name].shape for name in own}:
            raise TrainingError(
                f"{directory / POSTERIOR} is of other modules or of another rank. Give the same --targets and --rank."
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(stored[name])
        if as_prior:
            for matrix in self.matrices.values():
                matrix.hold_to_itself()

    def _posterior(self) -> dict[str, Tensor]:
        parts = (
            (name, part, getattr(matrix, part)) for name, matrix in self.matrices.items() for part in ("mean", "rho")
        )
        return {f"{name}.{part}": tensor for name, part, tensor in parts}


def _targets(network: nn.Module, pattern: str) -> Iterator[tuple[str, nn.Linear]]:
    try:
        named = [(name, module) for name, module in network.named_modules() if re.fullmatch(pattern, name)]
    except re.error as error:
        raise OptionError(f"--targets {pattern!r} is not a regular expression ({error}).") from error
    if not named:
        raise OptionError(
            f"--targets {pattern!r} matches no module of the base. Names look like "
            "model.decoder.layers.0.self_attn.q_proj; leave --targets out to train all that can be used."
        )
    for name, module in named:
        if not re.fullmatch(SUPPORTED_MODULES, name) or not isinstance(module, nn.Linear):
            raise OptionError(
                f"--targets {pattern!r} also matches {name}. Only q_proj and v_proj of the decoder's attention can be "
                "decoded jointly; leave --targets out to train all of those."
            )
        yield name, module


def check_posterior(directory: Path) -> None:
    """Refuses a folder without a posterior.

    Raises:
        TrainingError: there is none.
    """
    if not (directory / POSTERIOR).is_file():
        raise TrainingError(f"{directory} has no {POSTERIOR}. Give a folder that `das-train blora` wrote.")


def _read_posterior(directory: Path) -> Mapping[str, Tensor]:
    check_posterior(directory)
    try:
        tensors: Mapping[str, Tensor] = load_file(directory / POSTERIOR)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{directory / POSTERIOR} cannot be read ({error}). Copy it again.") from error
    return tensors
