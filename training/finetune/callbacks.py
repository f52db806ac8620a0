"""What watches a run: the order of the data, a progress bar, TensorBoard. Imported on demand: it needs transformers."""
# ruff: noqa: ARG002 - transformers fixes the parameters of its callbacks

from __future__ import annotations

from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from das_asr.training.finetune.batches import Batches
from das_asr.training.finetune.options import TrainOptions

__all__ = ["own_callbacks"]

_SHOWN = ("loss", "extra_loss", "eval_loss", "eval_wer")  # beside the bar


def own_callbacks(options: TrainOptions, batches: Batches) -> list[TrainerCallback]:
    """The callbacks that the options ask for."""
    callbacks: list[TrainerCallback] = [_EpochOrder(batches)]
    if options.progress:
        callbacks.append(_Bar())
    if options.tensorboard is not None:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations.integration_utils import TensorBoardCallback

        callbacks.append(TensorBoardCallback(SummaryWriter(log_dir=str(options.tensorboard))))
    return callbacks


class _EpochOrder(TrainerCallback):  # type: ignore[misc]
    """Tells the sampler the epoch, also where accelerate's wrappers do not pass it on."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """`state.epoch` is whole at the beginning of an epoch, and a fraction where a run goes on inside one."""
        self._batches.set_epoch(int(state.epoch + 1e-6))


class _Bar(TrainerCallback):  # type: ignore[misc]
    """A progress bar with the newest loss."""

    def __init__(self) -> None:
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Opens it."""
        if state.is_world_process_zero:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", mininterval=1.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves it."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Shows losses and error rates."""
        shown = {name: f"{value:.4g}" for name, value in (logs or {}).items() if name in _SHOWN}
        if self._bar is not None and shown:
            self._bar.set_postfix(shown, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes it."""
        if self._bar is not None:
            self._bar.close()
