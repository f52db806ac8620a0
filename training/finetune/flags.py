"""What the training commands have in common on the command line, and how flags become options.

@main.command()
@data_flags
@train_flags
def lora(**flags): ...
    data, train = data_options(flags), train_options(flags, learning_rate)
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from das_asr.runtime.tokenizer import TASKS
from das_asr.training.finetune.options import DEVICES, PRECISIONS, DataOptions, TrainOptions
from das_asr.training.finetune.recipes import RECIPES, Recipe

__all__ = ["base_flags", "data_flags", "data_options", "overridden", "told", "train_flags", "train_options"]

F = TypeVar("F", bound=Callable[..., Any])

_PATH = click.Path(path_type=Path)

_BASE = (
    click.option("--base", required=True, help="Folder of a Hugging Face Whisper checkpoint, or a hub id."),
    click.option("--revision", help="Branch, tag or commit of a hub id."),
    click.option("--output", required=True, type=_PATH, help="What to write; must not exist."),
    click.option("--restart", is_flag=True, help="Throw away an unfinished run instead of going on with it."),
)
_DATA = (
    click.option(
        "--data", "sources", multiple=True, type=_PATH, help="AudioFolder or JSON Lines manifest; repeatable."
    ),
    click.option("--multi", is_flag=True, help="Draw an equal share of every batch from each --data."),
    click.option("--eval-data", "eval_sources", multiple=True, type=_PATH, help="Development set; the best is kept."),
    click.option("--language", help="Spoken language; needed for a base that knows several."),
    click.option("--task", type=click.Choice(TASKS), default="transcribe", help="What the transcripts are."),
    click.option(
        "--leading-space/--no-leading-space", default=None, help="Form of a transcript.  [default: the base's]"
    ),
    click.option("--skip-bad", is_flag=True, help="Leave out utterances that cannot be used."),
    click.option("--cache", type=_PATH, help="Folder for features.  [default: the user's cache folder]"),
    click.option("--cache-encoder/--no-cache-encoder", default=True, help="Keep the outputs of a frozen encoder."),
)
_TRAIN = (
    click.option("--recipe", type=click.Choice(tuple(RECIPES)), default="paper", help="Preset of all numbers."),
    click.option("--lr", "learning_rate", type=float, help="Peak learning rate.  [default: the recipe's]"),
    click.option("--epochs", type=int, help="Passes over the data.  [default: the recipe's]"),
    click.option("--batch-size", type=int, help="Utterances per step, over all processes.  [default: the recipe's]"),
    click.option("--warmup", type=float, help="Fraction of steps with a rising rate.  [default: the recipe's]"),
    click.option("--accumulation", type=int, default=1, help="Parts to compute a batch in."),
    click.option("--weight-decay", type=float, default=0.01, help="Of AdamW."),
    click.option("--max-grad-norm", type=float, default=1.0, help="Largest norm of the gradients; 0 for any."),
    click.option("--seed", type=int, default=0, help="The same seed gives the same weights."),
    click.option("--precision", type=click.Choice(PRECISIONS), default="float32", help="Of the computation."),
    click.option("--device", type=click.Choice(DEVICES), default="auto", help="auto takes a GPU where there is one."),
    click.option("--threads", type=int, help="Threads of PyTorch on the CPU."),
    click.option("--log-steps", type=int, help="Steps between log entries.  [default: about 50 entries]"),
    click.option("--checkpoint-steps", type=int, help="Steps between checkpoints.  [default: one per epoch]"),
    click.option(
        "--eval-wer", is_flag=True, help="Measure the word error rate on --eval-data, and keep the best by it."
    ),
    click.option("--tensorboard", type=_PATH, help="Folder for TensorBoard."),
    click.option("--progress/--no-progress", default=None, help="Show a bar.  [default: on a terminal]"),
)


def _all(decorators: tuple[Callable[[Any], Any], ...], command: F) -> F:
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def base_flags(command: F) -> F:
    """Adds --base, --revision, --output and --restart."""
    return _all(_BASE, command)


def data_flags(command: F) -> F:
    """Adds what `data_options` reads."""
    return _all(_DATA, command)


def train_flags(command: F) -> F:
    """Adds --recipe and what `train_options` reads."""
    return _all(_TRAIN, command)


def data_options(flags: dict[str, Any]) -> DataOptions:
    """Takes the data's flags out of `flags`."""
    names = ("sources", "multi", "eval_sources", "language", "task", "leading_space", "skip_bad", "cache")
    return DataOptions(**{name: flags.pop(name) for name in (*names, "cache_encoder")})


def train_options(flags: dict[str, Any], recipe: Recipe, learning_rate: float) -> TrainOptions:
    """Takes the optimisation's flags out of `flags`; what was not given comes from the recipe.

    Args:
        flags: those of the command.
        recipe: of the command's choice.
        learning_rate: the recipe's, for what is trained.
    """
    preset = {"learning_rate": learning_rate, **overridden(recipe, {}, "epochs", "batch_size", "warmup")}
    chosen = {name: flags.pop(name) for name in preset}
    others = ("accumulation", "weight_decay", "max_grad_norm", "seed", "precision", "device", "threads", "log_steps")
    rest = {name: flags.pop(name) for name in (*others, "checkpoint_steps", "eval_wer", "tensorboard")}
    progress = flags.pop("progress")
    rest["progress"] = sys.stderr.isatty() if progress is None else progress
    return TrainOptions(**{name: preset[name] if value is None else value for name, value in chosen.items()}, **rest)


def overridden(recipe: Recipe, flags: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The recipe's values of `names`, but for those that `flags` gives."""
    return {name: getattr(recipe, name) if flags.get(name) is None else flags[name] for name in names}


class _Echo(logging.Handler):
    """Shows progress on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Shows one message."""
        click.echo(record.getMessage(), err=True)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Shows our progress on stderr, and warnings as one line each."""
    log, handler = logging.getLogger("das_asr.training"), _Echo()
    level = log.level
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: click.echo(f"Warning: {message}", err=True)
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        try:
            yield
        finally:
            log.removeHandler(handler)
            log.setLevel(level)
