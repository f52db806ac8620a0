"""The selection rules of the graph against a reference in NumPy, on what the demo bundle really decodes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from das_asr.runtime import OptionError, StepCandidates, Transcriber, Transcription
from das_asr.runtime.selection import HYPOTHESIS, RULES, choose_rows

SHARED = tuple(rule for rule in RULES if rule != HYPOTHESIS)
TAUS = (0.0, 0.025, 0.3, 1.0)
Clips = list[tuple[Path, str, str]]


def reference_row(rule: str, confidences: NDArray[np.float32], tau: float) -> int:
    """The rules as the paper's Eq. 3 and its variants say them, for one utterance: confidences [R]."""
    gain = confidences.max() - confidences[0]
    loss = confidences.min() - confidences[0]
    above, below = gain >= np.float32(tau), loss <= -np.float32(tau)
    best, worst = int(confidences.argmax()), int(confidences.argmin())  # the first of equals
    if rule == "paper":
        return best if above else worst if below else 0
    if rule == "gain":
        return best if above else 0
    if rule == "deviation-max":
        return best if above or below else 0
    return 0


class OnHost:
    """A rule of the graph, as a user would write it."""

    needs_logits = False

    def __init__(self, rule: str, tau: float) -> None:
        self.name, self._rule, self._tau = f"{rule} on the host", rule, tau

    def choose(self, step: StepCandidates) -> Any:
        return np.array([reference_row(self._rule, row, self._tau) for row in np.exp(step.logprobs)])


@pytest.fixture(scope="module")
def demo(demo_bundle: Path) -> Iterator[Transcriber]:
    with Transcriber.load(demo_bundle, threads=1) as transcriber:
        yield transcriber


@pytest.fixture(scope="module")
def decoded(demo: Transcriber, demo_audio: Clips) -> dict[tuple[str, float], list[Transcription]]:
    """Five clips under every rule and threshold."""
    paths = [path for path, _, _ in demo_audio[::3]]
    return {(rule, tau): demo.transcribe_batch(paths, rule=rule, tau=tau) for rule in SHARED for tau in TAUS}


# --- The reference itself ---


@pytest.mark.parametrize(
    ("confidences", "tau", "paper", "gain", "deviation"),
    [
        ([0.5, 0.6, 0.7], 0.1, 2, 2, 2),
        ([0.5, 0.35, 0.45], 0.1, 1, 0, 0),  # the least confident row
        ([0.5, 0.55, 0.3], 0.1, 2, 0, 1),
        ([0.5, 0.45, 0.55], 0.1, 0, 0, 0),
        ([0.5, 0.7, 0.7], 0.1, 1, 1, 1),  # ties go to the lowest row
        ([0.5, 0.3, 0.3], 0.1, 1, 0, 0),
        ([0.5, 0.5, 0.5], 0.0, 0, 0, 0),
        ([0.5, 0.75, 0.5], 0.25, 1, 1, 1),  # the threshold itself suffices
        ([0.5, 0.25, 0.5], 0.25, 1, 0, 0),
        ([0.5], 0.0, 0, 0, 0),
    ],
)
def test_the_reference_reads_the_equation_literally(
    confidences: list[float], tau: float, paper: int, gain: int, deviation: int
) -> None:
    array = np.array(confidences, np.float32)
    assert [reference_row(rule, array, tau) for rule in SHARED] == [0, paper, gain, deviation]


# --- Replay ---


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("rule", SHARED)
def test_the_recorded_confidences_give_the_recorded_row(
    decoded: dict[tuple[str, float], list[Transcription]], rule: str, tau: float
) -> None:
    steps = [token for result in decoded[rule, tau] for token in result.provenance]
    assert len(steps) > 30
    for token in steps:
        row = reference_row(rule, np.array(token.confidences, np.float32), tau)
        assert (token.row, token.id) == (row, token.candidates[row])


def test_the_replay_has_seen_every_branch(decoded: dict[tuple[str, float], list[Transcription]]) -> None:
    def rows(rule: str, tau: float) -> set[str]:
        branches = set()
        for token in (token for result in decoded[rule, tau] for token in result.provenance):
            confidences = np.array(token.confidences, np.float32)
            best, worst = int(confidences.argmax()), int(confidences.argmin())
            branches.add("base" if token.row == 0 else "best" if token.row == best else f"other {token.row == worst}")
        return branches

    assert rows("paper", 0.025) == {"base", "best", "other True"}
    assert rows("gain", 0.025) == rows("deviation-max", 0.025) == {"base", "best"}
    assert rows("base", 0.025) == rows("paper", 1.0) == {"base"}
    assert [result.tokens for result in decoded["base", 0.0]] != [result.tokens for result in decoded["gain", 0.0]]
    assert [result.tokens for result in decoded["gain", 0.025]] != [result.tokens for result in decoded["paper", 0.025]]


# --- In the graph = on the host ---


@pytest.mark.parametrize(("rule", "tau"), [(rule, tau) for rule in SHARED for tau in (0.025, 0.3)])
def test_a_rule_in_the_graph_writes_what_the_same_rule_on_the_host_writes(
    demo: Transcriber,
    demo_audio: Clips,
    decoded: dict[tuple[str, float], list[Transcription]],
    rule: str,
    tau: float,
) -> None:
    paths = [path for path, _, _ in demo_audio[::3]]
    for graph, host in zip(decoded[rule, tau], demo.transcribe_batch(paths, rule=OnHost(rule, tau)), strict=True):
        assert host.tokens == graph.tokens
        assert [token.row for token in host.provenance] == [token.row for token in graph.provenance]
        assert [token.candidates for token in host.provenance] == [token.candidates for token in graph.provenance]
        assert host.rule == f"{rule} on the host"


def test_hypothesis_is_every_row_decoded_alone(demo: Transcriber, demo_audio: Clips) -> None:
    for path, _, _ in demo_audio[:3]:
        together = demo.transcribe(path, rule="hypothesis")
        for row, name in enumerate(demo.adapters, start=1):
            alone = demo.transcribe(path, rule=_Row(1), adapters=(name,))
            assert alone.tokens == together.hypotheses[row].tokens
            assert alone.avg_logprob == pytest.approx(together.hypotheses[row].avg_logprob, abs=1e-4)


class _Row:
    """Always one row."""

    needs_logits = False

    def __init__(self, row: int) -> None:
        self.name, self._row = f"row {row}", row

    def choose(self, step: StepCandidates) -> Any:
        return np.full(len(step.candidates), self._row)


def test_logits_are_those_that_the_candidates_come_from(demo: Transcriber, demo_audio: Clips) -> None:
    class Checking(_Row):
        needs_logits = True
        steps = 0

        def choose(self, step: StepCandidates) -> Any:
            assert step.logits is not None
            self.steps += 1
            best = step.logits.max(axis=2, keepdims=True)
            logprob = -np.log(np.exp(step.logits - best).sum(axis=2))
            certain = step.logits.argmax(axis=2) == step.candidates  # false only where a token is suppressed
            assert certain.any()
            assert step.logprobs[certain] == pytest.approx(logprob[certain], abs=0.05)
            return super().choose(step)

    rule = Checking(0)
    result = demo.transcribe(demo_audio[0][0], rule=rule)
    assert rule.steps == len(result.provenance)
    assert result.tokens == demo.transcribe(demo_audio[0][0], rule="base").tokens


# --- Answers of a rule ---


def step(batch: int = 2, rows: int = 3) -> StepCandidates:
    return StepCandidates(0, np.zeros((batch, rows), np.int64), np.zeros((batch, rows), np.float32), None)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_any_integer_array_is_an_answer(dtype: type) -> None:
    class Answer(_Row):
        def choose(self, step: StepCandidates) -> Any:
            return np.array([0, 2], dtype)

    rows = choose_rows(Answer(0), step())
    assert (rows.tolist(), rows.dtype) == ([0, 2], np.int64)


def test_a_row_that_does_not_exist_is_refused_with_the_range() -> None:
    with pytest.raises(OptionError, match=r"rule 'row 3' returned row \[3, 3\], expected 0 to 2"):
        choose_rows(_Row(3), step())
