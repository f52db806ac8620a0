"""`das-train lora`, `das-train full` and `das-train compress`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from das_asr.runtime.console import Command
from das_asr.training.finetune.flags import (
    base_flags,
    data_flags,
    data_options,
    overridden,
    told,
    train_flags,
    train_options,
)
from das_asr.training.finetune.recipes import RECIPES

__all__ = ["compress", "full", "lora"]

_INITS = ("pissa", "olora", "plain")
_as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")


@click.command(cls=Command)
@base_flags
@data_flags
@train_flags
@click.option("--rank", type=int, help="Rank of every module while it trains.  [default: the recipe's]")
@click.option("--alpha", type=float, help="Scale is alpha / r, or alpha / sqrt(r).  [default: the recipe's]")
@click.option("--rslora/--no-rslora", default=None, help="Which of the two.  [default: the recipe's]")
@click.option("--init", type=click.Choice(_INITS), help="Initial factors.  [default: the recipe's]")
@click.option("--dropout", type=float, help="On the adapter's input.  [default: the recipe's]")
@click.option("--targets", help="Regular expression of module names.  [default: all that can be used]")
@click.option("--compress-rank", type=int, help="Bring the adapter down to this rank before it is saved.")
@_as_json
def lora(as_json: bool, **flags: Any) -> None:
    """Train one domain's adapter on the decoder's query and value projections.

    The adapter fits the original base, however it was initialised. Killed, the same command goes on where it stopped.
    """
    from das_asr.training.finetune.lora import LoraOptions, train_lora

    recipe = RECIPES[flags.pop("recipe")]
    data, train = data_options(flags), train_options(flags, recipe, recipe.learning_rate)
    flags |= overridden(recipe, flags, "rank", "alpha", "rslora", "init", "dropout")
    given = {name: value for name, value in flags.items() if value is not None}
    with told():
        result = train_lora(LoraOptions(data=data, train=train, **given))
    _show(result, as_json)
    if not as_json and result.compression is not None:
        _show_errors(result.compression)


@click.command(cls=Command)
@base_flags
@data_flags
@train_flags
@click.option("--components", default="decoder", help="decoder, decoder-last-N or encoder-decoder.")
@click.option(
    "--save-dtype", type=click.Choice(("float32", "float16")), default="float32", help="Of the saved weights."
)
@_as_json
def full(as_json: bool, **flags: Any) -> None:
    """Fine-tune the base itself: its decoder, its last layers, or all of it."""
    from das_asr.training.finetune.full import FullOptions, train_full

    recipe = RECIPES[flags.pop("recipe")]
    data, train = data_options(flags), train_options(flags, recipe, recipe.full_learning_rate)
    with told():
        result = train_full(FullOptions(data=data, train=train, **flags))
    _show(result, as_json)


@click.command(cls=Command)
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--rank", type=int, required=True, help="Below that of ADAPTER.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Adapter to write; must not exist.")
@_as_json
def compress(adapter: Path, rank: int, output: Path, as_json: bool) -> None:
    """Bring ADAPTER down to a smaller rank, with the smallest error that rank allows."""
    from das_asr.training.finetune.compress import compress_adapter

    result = compress_adapter(adapter, output, rank)
    if as_json:
        click.echo(_json({**dataclasses.asdict(result), "largest_error": result.largest_error}))
        return
    click.echo(f"Wrote {output}: rank {result.rank_before} to {result.rank}")
    _show_errors(result.errors)


def _show(result: Any, as_json: bool) -> None:
    """A `LoraResult` or `FullResult`."""
    trained = dataclasses.replace(result.trained, model=None)
    if as_json:
        document = {**vars(result), "trained": {k: v for k, v in vars(trained).items() if k != "model"}}
        click.echo(_json(document))
        return
    click.echo(
        f"Wrote {result.output}: {result.parameters} parameters trained on {result.utterances} utterances in "
        f"{trained.steps} steps and {trained.seconds:.1f} s, final loss {trained.final_loss:.4g}"
    )
    if trained.best is not None:
        click.echo(f"Best on the development set: {trained.best:.4g}")


def _show_errors(errors: dict[str, float]) -> None:
    worst = max(errors, key=errors.__getitem__)
    click.echo(f"Relative error of B A: {errors[worst]:.3g} at most ({worst}); in all modules:")
    for module, error in errors.items():
        click.echo(f"  {error:.3g}  {module}")


def _json(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2, default=str)
