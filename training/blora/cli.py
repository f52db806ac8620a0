"""`das-train blora`: a LoRA with a Gaussian posterior, on one set of data or on domains one after the other."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from das_asr.runtime.console import Command, NamedFolder
from das_asr.runtime.errors import OptionError
from das_asr.training.blora.options import ESTIMATOR_NAMES, METHODS, PRIORS, BloraOptions, PosteriorOptions
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

if TYPE_CHECKING:
    from das_asr.training.blora.train import BloraResult

__all__ = ["blora"]

_DEFAULT = PosteriorOptions()
_POSTERIOR = tuple(field.name for field in dataclasses.fields(PosteriorOptions))


@click.command(cls=Command)
@base_flags
@data_flags
@train_flags
@click.option(
    "--sequence",
    type=NamedFolder(),
    multiple=True,
    help="A domain of several that are trained one after the other, instead of --data; more may follow it.",
)
@click.argument("domains", type=NamedFolder(), nargs=-1, metavar="[NAME=DIR]...")
@click.option("--start", type=click.Path(path_type=Path), help="An earlier output, whose posterior this starts from.")
@click.option("--method", type=click.Choice(METHODS), default="blora", help="lora: the same without noise and KL.")
@click.option("--beta", type=float, default=_DEFAULT.beta, help="Weight of the KL term.")
@click.option("--beta-warmup", type=float, default=_DEFAULT.beta_warmup, help="Fraction of steps with a rising beta.")
@click.option("--prior-sigma", type=float, default=_DEFAULT.prior_sigma, help="Standard deviation of the prior.")
@click.option("--prior", type=click.Choice(PRIORS), default=_DEFAULT.prior, help="Prior of what starts from another.")
@click.option("--sigma-init", type=float, default=_DEFAULT.sigma_init, help="Initial standard deviations of A.")
@click.option("--sigma-init-b", type=float, default=_DEFAULT.sigma_init_b, help="Initial standard deviations of B.")
@click.option("--estimator", type=click.Choice(ESTIMATOR_NAMES), default=_DEFAULT.estimator, help="How to sample.")
@click.option("--rank", type=int, help="Rank of every module.  [default: the recipe's]")
@click.option("--alpha", type=float, help="Scale is alpha / r, or alpha / sqrt(r).  [default: the recipe's]")
@click.option("--rslora/--no-rslora", default=None, help="Which of the two.  [default: the recipe's]")
@click.option("--dropout", type=float, help="On the adapter's input.  [default: the recipe's]")
@click.option("--targets", help="Regular expression of module names.  [default: all that can be used]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document per adapter on stdout.")
def blora(as_json: bool, **flags: Any) -> None:
    """Train a Bayesian LoRA, which forgets less; its mean is written as a plain PEFT adapter.

    Loss: cross-entropy + beta * KL(posterior || N(0, prior-sigma^2)), a Gaussian for every element of A and B.

    \b
    das-train blora --base openai/whisper-base --data synthetic/music --output adapters/music
    das-train blora --base openai/whisper-base --output chain --sequence music=synthetic/music weather=synthetic/weather
    """  # noqa: D301  # \b is click's mark of a paragraph to leave as it is
    sequence = (*flags.pop("sequence"), *flags.pop("domains"))
    if sequence:
        if flags["sources"]:
            raise OptionError("--data and --sequence were both given. Give one: all at once, or one after the other.")
        flags["sources"] = tuple(source for _, source in sequence)
    options = _options(flags)
    with told():
        for result in _train(options, [name for name, _ in sequence]):
            _show(result, as_json)


def _options(flags: dict[str, Any]) -> BloraOptions:
    recipe = RECIPES[flags.pop("recipe")]
    data, train = data_options(flags), train_options(flags, recipe, recipe.learning_rate)
    posterior = PosteriorOptions(**{name: flags.pop(name) for name in _POSTERIOR})
    flags |= overridden(recipe, flags, "rank", "alpha", "rslora", "dropout")
    given = {name: value for name, value in flags.items() if value is not None}
    return BloraOptions(data=data, train=train, posterior=posterior, **given)


def _train(options: BloraOptions, names: list[str]) -> Iterator[BloraResult]:
    from das_asr.training.blora.sequence import train_sequence
    from das_asr.training.blora.train import train_blora

    if names:
        yield from train_sequence(options, names)
    else:
        yield train_blora(options)


def _show(result: BloraResult, as_json: bool) -> None:
    from das_asr.training.blora.sparsity import measure_sparsity

    sparsity, trained = measure_sparsity(result.output), result.trained
    if as_json:
        run = {name: value for name, value in vars(trained).items() if name != "model"}
        click.echo(json.dumps({**vars(result), "trained": run, "sparsity": vars(sparsity)}, default=str))
        return
    click.echo(
        f"Wrote {result.output}: {result.parameters} parameters trained on {result.utterances} utterances in "
        f"{trained.steps} steps and {trained.seconds:.1f} s, final loss {trained.final_loss:.4g}, KL {result.kl:.4g}; "
        f"below {sparsity.threshold:g}: {sparsity.a:.1%} of A, {sparsity.b:.1%} of B"
    )
