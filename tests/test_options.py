"""Options that contradict each other are refused before anything runs, with a message that names both."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from das_asr.runtime import DecodingOptions, OptionError, SelectionRule
from das_asr.runtime.backends import BackendOptions
from das_asr.runtime.selection import RULES, check_rule


class OwnRule:
    name = "own"
    needs_logits = False

    def choose(self, step: Any) -> Any:
        return np.zeros(len(step.candidates), np.int64)


SHARED = [*(rule for rule in RULES if rule != "hypothesis"), OwnRule()]


@pytest.mark.parametrize("rule", SHARED, ids=str)
@pytest.mark.parametrize(("name", "value"), [("score", "total"), ("base_bias", 0.5), ("include_base", False)])
def test_scoring_and_a_shared_history_exclude_each_other(rule: Any, name: str, value: Any) -> None:
    shown = rule if isinstance(rule, str) else "own"
    with pytest.raises(OptionError, match=rf"{name} belongs to rule='hypothesis', but rule is '{shown}'"):
        DecodingOptions(rule=rule, **{name: value})
    assert getattr(DecodingOptions(rule="hypothesis", **{name: value}), name) == value


def test_scoring_is_checked_against_the_bundles_rule_when_none_is_given() -> None:
    options = DecodingOptions(score="total")
    options.check_scoring("hypothesis")
    with pytest.raises(OptionError, match="score belongs to rule='hypothesis', but rule is 'paper' by the bundle's"):
        options.check_scoring("paper")


def test_excluding_the_base_and_all_adapters_leaves_nothing() -> None:
    with pytest.raises(OptionError, match=r"include_base=False .* adapters=\(\)"):
        DecodingOptions(include_base=False, adapters=())
    DecodingOptions(include_base=False, adapters=("music",))


def test_a_logprob_threshold_needs_the_no_speech_threshold() -> None:
    with pytest.raises(OptionError, match=r"logprob_threshold=-2.* no_speech_threshold, which is None"):
        DecodingOptions(logprob_threshold=-2, no_speech_threshold=None)
    DecodingOptions(logprob_threshold=-2)
    DecodingOptions(no_speech_threshold=None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("tau", -0.1),
        ("tau", 1.1),
        ("tau", math.nan),
        ("base_bias", math.inf),
        ("base_bias", math.nan),
        ("logprob_threshold", math.nan),
        ("no_speech_threshold", 1.5),
        ("no_speech_threshold", math.nan),
        ("task", "summarise"),
        ("score", "median"),
        ("rule", "best"),
        ("rule", 3),
        ("rule", SimpleNamespace(name="half a rule")),
        ("adapters", "music"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_name_and_value(name: str, value: Any) -> None:
    with pytest.raises(OptionError) as refusal:
        DecodingOptions(**{name: value})
    assert name in str(refusal.value)
    assert str(value) in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("tau", 0), ("tau", 1), ("max_tokens", 1), ("no_speech_threshold", 0), ("no_speech_threshold", 1)],
)
def test_the_ends_of_a_range_belong_to_it(name: str, value: Any) -> None:
    assert getattr(DecodingOptions(**{name: value}), name) == value


def test_lists_are_kept_as_tuples_so_that_options_stay_frozen() -> None:
    options = DecodingOptions(adapters=["music", "sports"], suppress_tokens=[3, 4])  # type: ignore[arg-type]
    assert (options.adapters, options.suppress_tokens) == (("music", "sports"), (3, 4))
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.tau = 0.5  # type: ignore[misc]


def test_every_known_rule_and_any_object_with_the_interface_is_a_rule() -> None:
    own: SelectionRule = OwnRule()
    assert [check_rule(rule) for rule in (*RULES, own)] == [*RULES, own]


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:-1", "cpu:0", "", "CPU"])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(OptionError, match="expected 'cpu', 'cuda' or 'cuda:N'"):
        BackendOptions(device)


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:0", "cuda:12"])
def test_known_devices_are_taken(device: str) -> None:
    assert BackendOptions(device).device == device


def test_less_than_one_thread_is_refused() -> None:
    with pytest.raises(OptionError, match="threads is 0"):
        BackendOptions(threads=0)
