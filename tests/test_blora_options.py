"""Options of BLoRA: what is refused, and beta over the steps."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from das_asr.runtime.errors import OptionError
from das_asr.training.blora.options import BloraOptions, PosteriorOptions
from das_asr.training.finetune.options import DataOptions, TrainOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior_sigma": 0.0}, "--prior-sigma is 0.0, expected a standard deviation above 0"),
        ({"sigma_init": -1.0}, "--sigma-init is -1.0"),
        ({"sigma_init_b": math.nan}, "--sigma-init-b is nan"),
        ({"beta": -0.1}, "--beta is -0.1, expected at least 0"),
        ({"beta": math.inf}, "--beta is inf"),
        ({"beta_warmup": 1.5}, "--beta-warmup is 1.5, expected a share"),
        ({"estimator": "guess"}, "--estimator is 'guess', expected weight, flipout or local"),
        ({"prior": "none"}, "--prior is 'none', expected fixed or previous"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        PosteriorOptions(**options)


def test_beta_rises_to_its_value() -> None:
    options = PosteriorOptions(beta=2.0, beta_warmup=0.5)
    assert [options.beta_at(progress) for progress in (0, 0.25, 0.5, 1)] == [0, 1, 2, 2]
    assert PosteriorOptions(beta=2.0).beta_at(0) == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rank": 0}, "--rank is 0"),
        ({"alpha": 0.0}, "--alpha is 0.0"),
        ({"dropout": 1.0}, "--dropout is 1.0"),
        ({"method": "full"}, "--method is 'full', expected blora or lora"),
    ],
    ids=str,
)
def test_sizes_out_of_range_are_refused(changed: dict[str, Any], message: str) -> None:
    data, train = DataOptions(sources=(Path("data"),)), TrainOptions(learning_rate=1e-3)
    options = BloraOptions(base="base", output=Path("adapter"), data=data, train=train)
    with pytest.raises(OptionError, match=message):
        replace(options, **changed)
