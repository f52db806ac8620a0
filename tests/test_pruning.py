"""Rows that stop early: who, when, that nobody notices where it is said to be exact, and that results tell it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from das_asr.runtime import BackendError, DecodingOptions, OptionError, Transcriber, Transcription, live_rows
from das_asr.runtime.backends.base import LoadedStack, Step
from das_asr.runtime.backends.onnxruntime import OnnxRuntimeBackend, OnnxRuntimeBatch
from das_asr.runtime.decoding import DecodedBatch, decode
from das_asr.runtime.live_rows import LiveRows
from das_asr.runtime.pruning import PRUNE_AFTER, Pruning, RowJudge
from das_asr.runtime.scores import token_values
from tests.test_decoding import END, ScriptedBatch, plan, prompts, script

Clips = list[tuple[Path, str, str]]


def pruning(rule: str = "hypothesis", **choices: Any) -> Pruning:
    made = Pruning.of(DecodingOptions(rule=rule, **choices), rule)
    assert made is not None
    return made


def stops_of(judge: RowJudge, steps: Any, own: bool = True) -> list[list[int]]:
    """Rows of one utterance that stop at each step; a step is its rows' log-probabilities, None once a row has ended.

    With a shared history a step is (log-probability, whether the row agrees) of every row.
    """
    rows = len(steps[0])
    alive, found = np.ones((1, rows), np.bool_), []
    for values in steps:
        wrote = alive.copy()
        if own:
            ends = np.array([[isinstance(value, tuple) for value in values]])
            numbers = [value[0] if isinstance(value, tuple) else value or 0.0 for value in values]
            candidate = np.zeros((1, rows), np.int64)
            alive = alive & ~ends
        else:
            numbers = [value for value, _ in values]
            candidate = np.array([[0 if agrees else 1 for _, agrees in values]])
        step = Step(np.zeros(1, np.int64), candidate, np.array([numbers], np.float32))
        stops = judge.judge(step, np.zeros((1, rows), np.int64), wrote, alive)
        alive = alive & ~stops
        found.append(np.flatnonzero(stops[0]).tolist())
    return found


# --- Who stops ---


def test_nobody_stops_early_unless_it_is_asked_for_or_changes_nothing() -> None:
    assert Pruning.of(DecodingOptions(), "hypothesis") is None
    assert Pruning.of(DecodingOptions(score="root"), "hypothesis") is None
    assert Pruning.of(DecodingOptions(score="total", switch_cost=1.0), "hypothesis") is None  # it may lend its words
    assert Pruning.of(DecodingOptions(), "paper") is None
    assert pruning(score="total").exact
    assert pruning(max_active_rows=2).after == PRUNE_AFTER


def test_a_total_below_that_of_a_finished_text_cannot_win() -> None:
    judge = RowJudge(pruning(score="total"), (1, 3))
    # Row 1 ends with -2.0; row 2 falls behind with the third token, the base stays whatever it has.
    assert stops_of(judge, [[-5, -1, -1], [-5, (-1,), -0.5], [-5, None, -0.4], [-5, None, -0.2]]) == [[], [], [], [2]]


def test_a_running_text_is_no_bound() -> None:
    judge = RowJudge(pruning(score="total"), (1, 3))
    assert stops_of(judge, [[-5, -1, -3], [-5, -1, -3]]) == [[], []]


def test_an_equal_total_may_still_win() -> None:
    judge = RowJudge(pruning(score="total"), (1, 3))
    assert stops_of(judge, [[-5, -1, (-2,)], [-5, -1, None], [-5, -0.5, None]]) == [[], [], [1]]


def test_the_base_bounds_only_where_it_may_win_and_with_its_bias() -> None:
    steps = [[(-1,), -2], [None, -2]]
    assert stops_of(RowJudge(pruning(score="total"), (1, 2)), steps) == [[1], []]
    assert stops_of(RowJudge(pruning(score="total", base_bias=-1.5), (1, 2)), steps) == [[], [1]]
    assert stops_of(RowJudge(pruning(score="total", include_base=False), (1, 2)), steps) == [[], []]


def test_rows_further_behind_than_the_margin_stop_after_so_many_tokens() -> None:
    judge = RowJudge(pruning(prune_margin=1.0, prune_after=2), (1, 3))
    # Means: -1 -1 -4; then -1 -1.5 -2.5; then -1 -2.33 and row 2 is gone.
    assert stops_of(judge, [[-1, -1, -4], [-1, -2, -1], [-1, -4, -1]]) == [[], [2], [1]]


@pytest.mark.parametrize(("score", "kept"), [("mean", 2), ("root", 1)])
def test_the_best_adapters_by_the_running_score_stay(score: Any, kept: int) -> None:
    judge = RowJudge(pruning(score=score, max_active_rows=2, prune_after=2), (1, 3))
    lines = [[-1, 0.0, -2.0], [-1, -4.2, -2.0]]  # one doubtful token spoils `root` less
    means = token_values(np.array(lines, np.float32), score).mean(axis=0)
    assert (means[1] > means[2]) == (kept == 1)
    assert stops_of(judge, lines) == [[], [3 - kept]]


def test_of_equals_the_lowest_row_stays_and_a_finished_text_is_never_taken_back() -> None:
    judge = RowJudge(pruning(max_active_rows=2, prune_after=2), (1, 4))
    assert stops_of(judge, [[-1, -1, -1, (-9,)], [-1, -1, -1, None]]) == [[], [2]]


def test_shared_history_keeps_the_rows_that_the_chosen_tokens_are_likeliest_under() -> None:
    judge = RowJudge(pruning("paper", max_active_rows=3, prune_after=2), (1, 4))
    sure, unsure = float(np.log(0.9)), float(np.log(0.4))
    # Row 1 wanted something else and was sure of it (at most 0.1 for the chosen token); row 2 was not (at most 0.4).
    steps = [[(sure, True), (sure, False), (unsure, False), (unsure, True)], [(sure, True)] * 4]
    assert stops_of(judge, steps, own=False) == [[], [1]]


def test_utterances_are_judged_each_for_itself() -> None:
    judge = RowJudge(pruning(max_active_rows=2, prune_after=1), (2, 3))
    step = Step(np.zeros(2, np.int64), np.zeros((2, 3), np.int64), np.array([[-1, -1, -2], [-1, -2, -1]], np.float32))
    everybody = np.ones((2, 3), np.bool_)
    stops = judge.judge(step, step.candidate, everybody, everybody)
    assert stops.tolist() == [[False, False, True], [False, True, False]]


# --- Who leaves the batch ---


def needed(*rows: int, of: int = 8, batch: int = 2) -> NDArray[np.bool_]:
    found = np.zeros((batch, of), np.bool_)
    found[0, list(rows)] = True
    return found


def test_rows_leave_when_half_of_them_can_and_the_base_never() -> None:
    live, everybody = LiveRows(2, 8, END), np.ones((2, 8), np.bool_)
    assert live.cut(needed(1, 2, 4, 7), everybody, at_once=False) is None  # 5 of 8
    cut = live.cut(needed(2, 4, 7), everybody, at_once=False)
    assert cut is not None
    assert cut.rows == (0, 2, 4, 7)
    assert cut.places.tolist() == [0, 2, 4, 7]
    assert live.cut(needed(2, 7), everybody, at_once=False) is None  # 3 of 4
    cut = live.cut(needed(2, 7), everybody, at_once=True)
    assert cut is not None
    assert cut.rows == (0, 2, 7)
    assert cut.places.tolist() == [0, 1, 3]  # among those that were left
    assert cut.row_mask.shape == (2, 3)


def test_a_single_line_is_never_left_of_a_product() -> None:
    everybody = np.ones((1, 4), np.bool_)
    cut = LiveRows(1, 4, END).cut(needed(0, of=4, batch=1), everybody, at_once=False)
    assert cut is not None
    assert cut.rows == (0, 1)
    cut = LiveRows(2, 4, END).cut(needed(0, of=4), np.ones((2, 4), np.bool_), at_once=False)
    assert cut is not None
    assert cut.rows == (0,)


def test_rows_that_are_left_are_reported_under_their_own_indices() -> None:
    live = LiveRows(1, 4, END)
    live.cut(needed(0, 2, of=4, batch=1), np.ones((1, 4), np.bool_), at_once=False)
    step = live.widened(Step(np.array([1]), np.array([[5, 6]]), np.array([[-0.1, -0.2]], np.float32)))
    assert step.row.tolist() == [2]
    assert step.candidate.tolist() == [[5, END, 6, END]]
    assert step.logprob[0, [0, 2]].tolist() == pytest.approx([-0.1, -0.2])


class NarrowingBatch(ScriptedBatch):
    """Says only what the rows that are left say."""

    kept: NDArray[np.int64] | None = None
    masks: list[NDArray[np.bool_]]

    def run(
        self, position: NDArray[np.int64], prompt_last: NDArray[np.int64],
        ids: NDArray[np.int64] | None = None, *, logits: bool = False,
    ) -> Step:  # fmt: skip
        step = super().run(position, prompt_last, ids, logits=logits)
        if self.kept is None:
            return step
        row = np.searchsorted(self.kept, step.row)
        return Step(row, step.candidate[:, self.kept], step.logprob[:, self.kept], step.logits)

    def keep_rows(self, places: NDArray[np.int64], row_mask: NDArray[np.bool_], stack: LoadedStack) -> None:
        self.kept = places if self.kept is None else self.kept[places]
        assert stack.rows == len(self.kept) == row_mask.shape[1]
        self.masks = [*getattr(self, "masks", []), row_mask]


def narrowed(told: Any, batch: int, rule: str = "hypothesis", **choices: Any) -> tuple[DecodedBatch, NarrowingBatch]:
    decoder = NarrowingBatch(told)
    rows = told.candidates.shape[2]
    made = dataclasses.replace(
        plan(batch, rows, rule),
        pruning=Pruning.of(DecodingOptions(rule=rule, **choices), rule),
        subset=lambda kept: LoadedStack(len(kept), {}),
    )
    return decode(decoder, prompts(*[2] * batch), made), decoder


def test_a_row_that_has_ended_in_every_utterance_leaves() -> None:
    said = [
        [[1, END, END, 3], [1, 2, END, 3]],
        [[1, 8, 8, 3], [1, END, 8, 3]],
        [[1, 8, 8, END], [END, 8, 8, 3]],
        [[END, 8, 8, 8], [8, 8, 8, END]],
    ]
    told = script(said, own=True)
    decoded, decoder = narrowed(told, 2)
    whole = decode(ScriptedBatch(told), prompts(2, 2), plan(2, 4, "hypothesis"))
    assert decoded.step_rows == (4, 2, 2)
    assert decoder.kept is not None
    assert decoder.kept.tolist() == [0, 3]
    assert decoded.lengths.tolist() == whole.lengths.tolist() == [[3, 0, 0, 2], [2, 1, 0, 3]]
    assert decoded.finished.all()
    assert (decoded.pruned == -1).all()


def test_a_pruned_row_is_cut_where_it_stopped_and_has_not_finished() -> None:
    scores = [[[-1, -1, -3]]] * 3
    decoded, _ = narrowed(script([[[1, 2, 3]], [[1, 2, 3]], [[END] * 3]], own=True, logprobs=scores), 1,
                          max_active_rows=2, prune_after=1)  # fmt: skip
    assert decoded.pruned.tolist() == [[-1, -1, 1]]
    assert decoded.lengths.tolist() == [[2, 2, 1]]
    assert decoded.finished.tolist() == [[True, True, False]]
    assert decoded.step_rows == (2, 2)


def test_with_a_shared_history_pruned_rows_are_masked_where_another_utterance_needs_them() -> None:
    scores = [[[-1, -1, -3], [-1, -3, -1]]] * 3
    told = script([[[1] * 3] * 2, [[1] * 3] * 2, [[END] * 3] * 2], logprobs=scores)
    decoded, decoder = narrowed(told, 2, "paper", max_active_rows=2, prune_after=1)
    assert decoded.pruned.tolist() == [[-1, -1, 1], [-1, 1, -1]]
    assert decoded.step_rows == (3, 3)
    assert [mask.tolist() for mask in decoder.masks] == [[[True, True, False], [True, False, True]]]
    assert decoded.lengths.tolist() == [[2] * 3] * 2


# --- On the demo ---


@pytest.fixture(scope="module")
def transcriber(demo_bundle: Path) -> Iterator[Transcriber]:
    with Transcriber.load(demo_bundle, threads=1) as loaded:
        yield loaded


def plainly(monkeypatch: pytest.MonkeyPatch, transcriber: Transcriber, *args: Any, **choices: Any) -> Any:
    """`transcribe_batch` with every row in the batch until the end."""
    with monkeypatch.context() as patch:
        patch.setattr(OnnxRuntimeBackend, "prunes", False)
        return transcriber.transcribe_batch(*args, **choices)


def written(result: Transcription) -> tuple[Any, ...]:
    """What was written, by whom, and what the others wrote: all but scores and times."""
    rows = [(item.adapter, item.text, item.tokens, item.finished) for item in result.hypotheses]
    return result.text, result.tokens, result.adapter, [token.candidates for token in result.provenance], rows


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize(
    "choices", [{}, {"score": "total"}, {"score": "root", "switch_cost": 0.5}], ids=["mean", "total", "spliced"]
)
def test_rows_that_leave_change_nothing(
    transcriber: Transcriber, demo_audio: Clips, monkeypatch: pytest.MonkeyPatch, size: int, choices: dict[str, Any]
) -> None:
    # With `total` rows that cannot win stop early on both sides, which differ in who is in the batch.
    monkeypatch.setattr(live_rows, "_WORTH_A_CUT", 0.99)  # whoever can leave does
    left = 0
    for start in range(0, len(demo_audio), size):
        clips = [path for path, _, _ in demo_audio[start : start + size]]
        thinned = transcriber.transcribe_batch(clips, language="en", **choices)
        whole = plainly(monkeypatch, transcriber, clips, language="en", **choices)
        for one, other in zip(thinned, whole, strict=True):
            assert written(one) == written(other)
            pairs = zip(one.hypotheses, other.hypotheses, strict=True)
            assert all(abs(ours.score - theirs.score) < 1e-6 for ours, theirs in pairs)
        rows = thinned[0].timings.step_rows
        assert len(rows) == thinned[0].timings.step_count == len(whole[0].timings.step_rows)
        assert list(rows) == sorted(rows, reverse=True)
        left += sum(whole[0].timings.step_rows) - sum(rows)
    assert left > 0  # somebody did leave


def test_the_logits_of_the_rows_that_stay_are_bit_for_bit_the_same(
    transcriber: Transcriber, demo_audio: Clips, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities may differ in their last bit: the engine sums in an order that depends on a row's address."""
    logged: list[NDArray[np.float32]] = []
    run = OnnxRuntimeBatch.run

    def logging(self: Any, position: Any, prompt_last: Any, ids: Any = None, *, logits: bool = False) -> Step:
        step = run(self, position, prompt_last, ids, logits=True)
        assert step.logits is not None
        logged.append(step.logits)
        return Step(step.row, step.candidate, step.logprob, step.logits if logits else None)

    monkeypatch.setattr(OnnxRuntimeBatch, "run", logging)
    monkeypatch.setattr(live_rows, "_WORTH_A_CUT", 0.99)
    compared = 0
    for path, _, _ in demo_audio:
        transcriber.transcribe(path, language="en", no_speech_threshold=None)
        thinned = logged.copy()
        logged.clear()
        plainly(monkeypatch, transcriber, [path], language="en", no_speech_threshold=None)
        for few, all_rows in zip(thinned, logged, strict=True):
            if few.shape != all_rows.shape:
                places = {row.tobytes() for row in all_rows[0]}
                assert all(row.tobytes() in places for row in few[0])
                compared += 1
        logged.clear()
    assert compared > 0


@pytest.mark.parametrize(
    "choices",
    [
        {"adapters": "auto:1", "prune_after": 4},
        {"prune_margin": 0.05, "prune_after": 3},
        {"rule": "gain", "adapters": "auto:1", "prune_after": 3},
        {"rule": "paper", "max_active_rows": 3, "prune_after": 2},
        {"score": "root", "switch_cost": 0.5, "max_active_rows": 2, "prune_after": 4},
    ],
    ids=["auto", "margin", "gain", "paper", "spliced"],
)
def test_pruned_utterances_are_decoded_as_alone(
    transcriber: Transcriber, demo_audio: Clips, choices: dict[str, Any]
) -> None:
    clips = [path for path, _, _ in demo_audio]
    alone = [transcriber.transcribe(clip, language="en", **choices) for clip in clips]
    together = transcriber.transcribe_batch(clips, language="en", **choices)
    assert [result.pruned for result in together] == [result.pruned for result in alone]
    assert [result.tokens for result in together] == [result.tokens for result in alone]
    assert [result.adapter for result in together] == [result.adapter for result in alone]
    assert any(count is not None for result in alone for count in result.pruned)


def test_results_tell_who_was_left_out_and_when(transcriber: Transcriber, demo_audio: Clips) -> None:
    results = [
        transcriber.transcribe(path, language="en", adapters="auto:1", prune_after=4) for path, _, _ in demo_audio
    ]
    for result in results:
        assert result.pruned[0] is None
        assert set(result.pruned) <= {None, 4}
        assert result.pruned.count(None) >= 2
        for row, stopped in enumerate(result.pruned):
            if stopped is not None:
                assert len(result.hypotheses[row].tokens) == 4
                assert not result.hypotheses[row].finished
                assert result.adapter != result.rows[row]
                assert all((token.candidates[row] is None) == (step >= 4) for step, token in
                           enumerate(result.provenance))  # fmt: skip
                assert all(token.confidences[row] is None for token in result.provenance[4:])
        if any(count is not None for count in result.pruned):
            assert max(result.timings.step_rows[4:]) <= 2
    shared = transcriber.transcribe(demo_audio[0][0], language="en", rule="gain", adapters="auto:1", prune_after=3)
    assert shared.pruned.count(3) == 2
    gone = [row for row, stopped in enumerate(shared.pruned) if stopped is not None]
    assert all((token.candidates[row] is None) == (step >= 3) for step, token in enumerate(shared.provenance)
               for row in gone)  # fmt: skip
    assert not {token.row for token in shared.provenance[3:]} & set(gone)


def test_an_adapter_that_is_unloaded_meanwhile_stays_in_the_batch_that_has_it(
    demo_bundle: Path, demo_adapters: dict[str, Path], demo_audio: Clips, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = OnnxRuntimeBackend.start
    clip = demo_audio[0][0]
    with Transcriber.load(demo_bundle, threads=1) as loaded:
        loaded.load_adapter("again", demo_adapters["sports"])
        before = loaded.transcribe(clip, language="en", adapters="auto:2", prune_after=2)

        def unloading(self: Any, *args: Any) -> Any:
            if "again" in loaded.adapters:
                loaded.unload_adapter("again")
            return start(self, *args)

        monkeypatch.setattr(OnnxRuntimeBackend, "start", unloading)
        after = loaded.transcribe(clip, language="en", adapters="auto:2", prune_after=2)
        assert loaded.adapters == ("music", "weather", "sports")
        assert written(after) == written(before)
        assert after.pruned == before.pruned


# --- Options ---


def test_auto_is_short_for_a_number_of_rows() -> None:
    options = DecodingOptions(adapters="auto:3", prune_after=5)
    assert (options.adapters, options.adapter_names, options.max_active_rows) == (None, None, 4)
    assert options == DecodingOptions(max_active_rows=4, prune_after=5)
    assert options == dataclasses.replace(options)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"adapters": "auto:3", "max_active_rows": 2}, "both say how many rows go on"),
        ({"adapters": "auto:0"}, "or 'auto:3'"),
        ({"adapters": "auto"}, "or 'auto:3'"),
        ({"max_active_rows": 1}, "expected at least 2: the base and an adapter"),
        ({"prune_margin": -0.1}, "finite number of at least 0"),
        ({"prune_margin": float("nan")}, "finite number of at least 0"),
        ({"prune_after": 4}, "Give max_active_rows or prune_margin"),
        ({"prune_after": 0, "max_active_rows": 2}, "at least 1 token"),
        ({"prune_margin": 1.0, "rule": "paper"}, "prune_margin belongs to rule='hypothesis', but rule is 'paper'"),
    ],
)
def test_options_that_make_no_sense_are_refused(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DecodingOptions(**choices)


def test_a_rule_of_ones_own_sees_all_rows(transcriber: Transcriber, demo_audio: Clips) -> None:
    class First:
        name, needs_logits = "first", False

        def choose(self, step: Any) -> Any:
            return np.zeros(len(step.candidates), np.int64)

    with pytest.raises(OptionError, match="max_active_rows is for the rules that have a name, but rule is 'first'"):
        DecodingOptions(rule=First(), max_active_rows=2)
    result = transcriber.transcribe(demo_audio[0][0], language="en", rule=First())
    assert set(result.timings.step_rows) == {4}


def test_submit_and_devices_without_cuts_refuse_to_prune(
    transcriber: Transcriber, demo_audio: Clips, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OptionError, match="`submit` does not prune"):
        transcriber.submit(demo_audio[0][0], max_active_rows=2)
    with pytest.raises(BackendError, match="on the CPU only"):
        plainly(monkeypatch, transcriber, [demo_audio[0][0]], max_active_rows=2)


def test_dropping_what_cannot_win_changes_no_result(
    transcriber: Transcriber, demo_audio: Clips, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = [path for path, _, _ in demo_audio]
    bounded = transcriber.transcribe_batch(clips, language="en", score="total")
    with monkeypatch.context() as patch:
        patch.setattr(Pruning, "of", lambda *_: None)
        whole = transcriber.transcribe_batch(clips, language="en", score="total")
    assert any(count is not None for result in bounded for count in result.pruned)
    for one, other in zip(bounded, whole, strict=True):
        assert (one.text, one.tokens, one.adapter) == (other.text, other.tokens, other.adapter)
        assert [word.differs_from_base for word in one.words] == [word.differs_from_base for word in other.words]


def test_submit_drops_what_cannot_win_just_as_well(transcriber: Transcriber, demo_audio: Clips) -> None:
    clips = [path for path, _, _ in demo_audio[:6]]
    futures = [transcriber.submit(clip, language="en", score="total") for clip in clips]
    for clip, future in zip(clips, futures, strict=True):
        assert written(future.result()) == written(transcriber.transcribe(clip, language="en", score="total"))
        assert set(future.result().timings.step_rows) == {4}
