"""Trains a prepared model on prepared data: transformers' trainer with exact resumption.

    data = prepare_data(base, data_options, model=model, encoder_states=True)
    trained = run_training(model, data, TrainOptions(learning_rate=2e-4), work=Path("music.partial"))
    trained.model, trained.history, trained.final_loss

Everything that a run needs to go on after a kill lies in its work folder: call it again with the same arguments. On a
CPU, with the same number of threads, the weights are then those of an uninterrupted run, bit for bit.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from das_asr.runtime.errors import TrainingError
from das_asr.training.finetune.base import Base
from das_asr.training.finetune.batches import Batches
from das_asr.training.finetune.dataset import TrainingData
from das_asr.training.finetune.noise import quiet_libraries
from das_asr.training.finetune.options import TrainOptions
from das_asr.training.finetune.processes import is_main_process, process_count

__all__ = ["TrainOptions", "Trained", "configure_torch", "newest_checkpoint", "run_training"]

_STATE = "trainer_state.json"  # the last file that transformers writes into a checkpoint


@dataclass(frozen=True)
class Trained:
    """What a run leaves behind."""

    model: Any  # the model that was given, trained; the best checkpoint where there is a development set
    history: tuple[
        dict[str, float], ...
    ]  # transformers' log: step, epoch, loss, learning_rate, grad_norm, eval_loss...
    steps: int
    final_loss: float  # the last one logged, the extra loss included
    best: float | None  # the smallest value of the metric on the development set
    seconds: float  # of training in this process, without the preparation
    resumed_step: int  # 0 for a fresh run


def configure_torch(options: TrainOptions) -> Any:
    """Sets threads and seeds before a model is made; returns the device that it shall be on."""
    import torch
    from transformers import set_seed

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    set_seed(options.seed)
    return torch.device("cuda" if options.device == "auto" and torch.cuda.is_available() else "cpu")


def run_training(
    model: Any,
    data: TrainingData,
    options: TrainOptions,
    *,
    work: Path,
    extra_loss: Callable[[], Any] | None = None,
    callbacks: Sequence[Any] = (),
    base: Base | None = None,
) -> Trained:
    """Trains `model` in place, or goes on where a killed run in `work` stopped.

    Args:
        model: takes what `collate` makes and returns a loss; a transformers or PEFT model, or any module with a
            `state_dict`. Its frozen parameters stay as they are.
        data: from `prepare_data`.
        options: the optimisation.
        work: folder for checkpoints; made if need be, and left for the caller to remove.
        extra_loss: called after every training forward; its scalar is added to the loss, and logged as `extra_loss`.
        callbacks: `transformers.TrainerCallback`s.
        base: what `model` is made from; needed for `options.eval_wer`, and for nothing else.

    Raises:
        TrainingError: the loss became NaN or infinite, or the batch cannot be split among the processes.
    """
    from das_asr.training.finetune.callbacks import own_callbacks
    from das_asr.training.finetune.hf_trainer import DomainTrainer, training_arguments

    if options.batch_size % (process_count() * options.accumulation):
        raise TrainingError(
            f"--batch-size {options.batch_size} cannot be split among {process_count()} processes with --accumulation "
            f"{options.accumulation}. Choose a multiple of {process_count() * options.accumulation}."
        )
    batches = Batches(data.sizes, options.batch_size // options.accumulation, options.seed)
    steps = math.ceil(len(batches) / options.accumulation) * options.epochs
    checkpoint = newest_checkpoint(work)
    with quiet_libraries():
        trainer = DomainTrainer(
            model=model,
            args=training_arguments(options, work, steps, evaluate=data.eval is not None),
            data=data,
            batches=batches,
            extra_loss=extra_loss,
            base=base if options.eval_wer else None,
            callbacks=[*own_callbacks(options, batches), *callbacks],
        )
        start = time.monotonic()
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Trained(
        model=model,
        history=tuple(trainer.state.log_history),
        steps=trainer.state.global_step,
        final_loss=losses[-1],
        best=trainer.state.best_metric,
        seconds=time.monotonic() - start,
        resumed_step=0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2]),
    )


def newest_checkpoint(work: Path) -> Path | None:
    """The newest complete checkpoint in a work folder; what a kill left incomplete is removed."""
    found: list[tuple[int, Path]] = []
    for path in work.glob("checkpoint-*"):
        if _is_complete(path):
            found.append((int(path.name.rpartition("-")[2]), path))
        elif is_main_process():
            shutil.rmtree(path, ignore_errors=True)
    return max(found)[1] if found else None


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
