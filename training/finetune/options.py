"""What a training run is asked to do: how to optimise, and on which data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from das_asr.runtime.errors import OptionError
from das_asr.runtime.tokenizer import TASKS

__all__ = ["DEVICES", "PRECISIONS", "DataOptions", "TrainOptions"]

PRECISIONS = ("float32", "bfloat16")
DEVICES = ("auto", "cpu")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How the weights are optimised: AdamW, linear warm-up, then linear decay to zero.

    Attributes:
        epochs: passes over the data.
        batch_size: utterances per optimiser step, over all processes and accumulated parts together.
        accumulation: parts that a batch is computed in, one after the other, to save memory.
        learning_rate: peak of the schedule.
        warmup: fraction of all steps in which the rate rises from zero.
        weight_decay: decoupled, of AdamW.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
        seed: of initial weights, order of the data and dropout.
        precision: "bfloat16" computes under autocast; the weights stay float32.
        device: "auto" takes a GPU where there is one.
        threads: of PyTorch on the CPU; None leaves its choice.
        log_steps: steps between two entries of the history; None makes about 50 of them.
        checkpoint_steps: steps between two resumable checkpoints; None writes one per epoch.
        eval_wer: measure the word error rate on the development set too, and keep the best by it.
        tensorboard: folder for TensorBoard's event files.
        progress: show a bar.
    """

    learning_rate: float
    epochs: int = 10
    batch_size: int = 16
    accumulation: int = 1
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    seed: int = 0
    precision: str = "float32"
    device: str = "auto"
    threads: int | None = None
    log_steps: int | None = None
    checkpoint_steps: int | None = None
    eval_wer: bool = False
    tensorboard: Path | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        for flag, value in (
            ("--epochs", self.epochs),
            ("--batch-size", self.batch_size),
            ("--accumulation", self.accumulation),
            ("--threads", self.threads),
            ("--log-steps", self.log_steps),
            ("--checkpoint-steps", self.checkpoint_steps),
        ):
            if value is not None and value < 1:
                raise OptionError(f"{flag} is {value}, expected at least 1.")
        if self.batch_size % self.accumulation:
            raise OptionError(
                f"--batch-size {self.batch_size} cannot be computed in --accumulation {self.accumulation} equal parts. "
                "Choose a divisor."
            )
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise OptionError(f"--lr is {self.learning_rate}, expected a number above 0.")
        if not 0 <= self.warmup < 1:
            raise OptionError(f"--warmup is {self.warmup}, expected a fraction of all steps: at least 0 and below 1.")
        for flag, number in (("--weight-decay", self.weight_decay), ("--max-grad-norm", self.max_grad_norm)):
            if not (math.isfinite(number) and number >= 0):
                raise OptionError(f"{flag} is {number}, expected a number of at least 0.")
        if not 0 <= self.seed < 2**32:
            raise OptionError(f"--seed is {self.seed}, expected 0 to 4294967295.")
        _check_choice("--precision", self.precision, PRECISIONS)
        _check_choice("--device", self.device, DEVICES)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which sentences to train on, and how they become labels.

    Attributes:
        sources: AudioFolders or JSON Lines manifests, one per domain.
        multi: every batch takes an equal share of each source; otherwise the sources are one set.
        eval_sources: development set; what does best on it is kept.
        language: code or English name of what is spoken; a column `language` of the data goes before it. None is
            enough for a base that knows one language.
        task: "transcribe" or "translate".
        leading_space: whether a transcript begins with a space, as in OpenAI's own training; None asks the base.
        skip_bad: leave out utterances that cannot be used, instead of refusing to train.
        cache: folder for features; None takes `default_cache()`.
        cache_encoder: keep the encoder's outputs where the encoder is not trained, instead of computing them in every
            step.
    """

    sources: tuple[Path, ...]
    multi: bool = False
    eval_sources: tuple[Path, ...] = ()
    language: str | None = None
    task: str = "transcribe"
    leading_space: bool | None = None
    skip_bad: bool = False
    cache: Path | None = None
    cache_encoder: bool = True

    def __post_init__(self) -> None:
        if not self.sources:
            raise OptionError("No --data was given. Give a folder with metadata.jsonl, or a JSON Lines manifest.")
        if self.multi and len(self.sources) < 2:
            raise OptionError(
                "--multi draws equal shares from several --data, but one was given. Leave --multi out, or give one "
                "--data per domain."
            )
        _check_choice("--task", self.task, TASKS)


def _check_choice(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"{flag} is {value!r}, expected {' or '.join(allowed)}.")
