"""The KL term of the loss, weighted by how far the run is; imported on demand, for it needs transformers."""
# ruff: noqa: ARG002 - transformers fixes the parameters of its callbacks

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from das_asr.training.blora.options import PosteriorOptions

__all__ = ["KlTerm"]


class KlTerm(TrainerCallback):  # type: ignore[misc]  # transformers is not typed for mypy
    """Called for beta * KL after every forward; as a callback it learns the step and logs the parts of the loss.

    Entries of the history with a `loss` get `ce`, `kl` (both means since the entry before) and `beta`; so does
    TensorBoard.
    """

    def __init__(self, kl: Callable[[], Any], options: PosteriorOptions, tensorboard: Path | None) -> None:
        self._kl, self._options, self._folder = kl, options, tensorboard
        self._writer: Any = None
        self._beta = options.beta_at(0.0)
        self._sum, self._count = 0.0, 0

    def __call__(self) -> Any:
        """The weighted KL, a scalar with a gradient."""
        kl = self._kl()
        self._sum, self._count = self._sum + kl.detach(), self._count + 1
        return self._beta * kl

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sets beta for the step, also where a run goes on in the middle."""
        self._beta = self._options.beta_at(state.global_step / state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Splits the loss into its parts."""
        if not logs or "loss" not in logs or not self._count:
            return
        parts = {
            "ce": logs["loss"] - logs["extra_loss"],
            "kl": float(self._sum) / self._count,
            "beta": self._beta,
        }
        self._sum, self._count = 0.0, 0
        state.log_history[-1].update(parts)
        self._show(parts, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes the event file."""
        if self._writer is not None:
            self._writer.close()

    def _show(self, parts: dict[str, float], state: Any) -> None:
        if self._folder is None or not state.is_world_process_zero:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # A file of its own in the same folder: TensorBoard reads them as one run.
            self._writer = SummaryWriter(log_dir=str(self._folder), filename_suffix=".blora")
        for name, value in parts.items():
            self._writer.add_scalar(f"train/{name}", value, state.global_step)
