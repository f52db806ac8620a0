"""The loop and what is read from it, on a scripted decoder: no weights, every number known."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from das_asr.runtime import DecodingOptions, OptionError, Transcriber
from das_asr.runtime.backends.base import Control, Encoded, LoadedStack, Step
from das_asr.runtime.decoding import DecodedBatch, Plan, Prompt, decode
from das_asr.runtime.manifest import SCHEMA_VERSION, AdapterEntry, AudioFrontEnd, BaseModel, Dimensions, Manifest
from das_asr.runtime.selection import SelectionRule, StepCandidates
from das_asr.runtime.tokenizer import Tokenizer, special_tokens
from das_asr.runtime.transcript import Transcript, compression_ratio, read_own_histories, read_shared_history
from tests.checkpoints import generation_settings, make_tokenizer

END = 9
VOCABULARY = 20
POSITIONS = 12
NAMES = ("base", "music", "sports")


@dataclass
class Script:
    """What the rows say at each step: T steps, B utterances, R rows."""

    candidates: NDArray[np.int64]  # [T, B, R]
    rows: NDArray[np.int64]  # [T, B]: what the graph's own rule chooses
    logprobs: NDArray[np.float32]  # [T, B, R]
    own: bool = False
    probe_logits: NDArray[np.float32] | None = None  # [B, R, V]: then the prefill comes in two runs


def script(candidates: Any, rows: Any = None, logprobs: Any = None, **more: Any) -> Script:
    tokens = np.array(candidates, np.int64)
    chosen = np.zeros(tokens.shape[:2], np.int64) if rows is None else np.array(rows, np.int64)
    scores = np.full(tokens.shape, -0.5, np.float32) if logprobs is None else np.array(logprobs, np.float32)
    return Script(tokens, chosen, scores, **more)


@dataclass(frozen=True)
class Run:
    """Arguments of one run."""

    position: NDArray[np.int64]
    prompt_last: NDArray[np.int64]
    ids: NDArray[np.int64] | None
    logits: bool


@dataclass
class ScriptedBatch:
    """A `DecodingBatch` that speaks its script, feeds itself as the graph does, and remembers what each row was fed."""

    script: Script
    runs: list[Run] = field(default_factory=list)
    fed: dict[tuple[int, int], dict[int, int]] = field(default_factory=dict)  # (utterance, row) -> position -> token
    traffic: list[Any] = field(default_factory=list)

    def run(
        self, position: NDArray[np.int64], prompt_last: NDArray[np.int64],
        ids: NDArray[np.int64] | None = None, *, logits: bool = False,
    ) -> Step:  # fmt: skip
        self.runs.append(Run(position.copy(), prompt_last.copy(), None if ids is None else ids.copy(), logits))
        self._check(position, prompt_last)
        self._remember(position, self._following() if ids is None else ids)
        values = self._probe() if self._probing() else self._logits() if logits else None
        place = self._step()
        return Step(self.script.rows[place], self.script.candidates[place], self.script.logprobs[place], values)

    def _step(self) -> int:
        return max(0, len(self.runs) - 1 - (self.script.probe_logits is not None))

    def _probing(self) -> bool:
        return self.script.probe_logits is not None and len(self.runs) == 1

    def _probe(self) -> NDArray[np.float32] | None:
        return self.script.probe_logits if self.runs[-1].logits else None

    def _logits(self) -> NDArray[np.float32]:
        return np.full((*self.script.candidates.shape[1:], VOCABULARY), self._step(), np.float32)

    def _check(self, position: NDArray[np.int64], prompt_last: NDArray[np.int64]) -> None:
        batch = self.script.candidates.shape[1]
        for values in (position, prompt_last):
            assert values.shape == (batch,)
            assert values.dtype == np.int64

    def _following(self) -> NDArray[np.int64]:
        """The graph's `next_ids` [B, R, 1] of the run before."""
        said, row = self.script.candidates[self._step() - 1], self.script.rows[self._step() - 1]
        chosen = np.broadcast_to(np.take_along_axis(said, row[:, None], axis=1), said.shape)
        return (said if self.script.own else chosen)[:, :, None]

    def _remember(self, position: NDArray[np.int64], ids: NDArray[np.int64]) -> None:
        for utterance, row, offset in np.ndindex(ids.shape):
            place = int(position[utterance]) + offset
            if place >= 0:
                self.fed.setdefault((utterance, row), {})[place] = int(ids[utterance, row, offset])

    def history(self, utterance: int, row: int, length: int) -> list[int]:
        """The first `length` tokens that a row was fed, by position."""
        return [self.fed[utterance, row][place] for place in range(length)]


def plan(batch: int, rows: int = 3, rule: str | SelectionRule = "paper", **more: Any) -> Plan:
    zeros = np.zeros((batch, VOCABULARY), np.float32)
    control = Control(
        rule=np.zeros(batch, np.int64),
        tau=np.zeros(batch, np.float32),
        token_bias=zeros,
        first_token_bias=zeros,
        row_mask=np.ones((batch, rows), np.bool_),
        first_valid=np.zeros(batch, np.int64),
    )
    settings = {"max_tokens": None, "text_positions": POSITIONS, "probe": None, **more}
    return Plan(rule=rule, control=control, end_of_text=END, **settings)


def prompts(*lengths: int, behind: int = 1) -> list[Prompt]:
    """Prompts of distinct ids, with `behind` tokens after start-of-transcript."""
    return [Prompt(tuple(range(10, 10 + length)), length - 1 - behind) for length in lengths]


# --- Whose tokens a row is fed ---


def test_with_a_shared_history_all_rows_are_fed_the_chosen_token() -> None:
    batch = ScriptedBatch(script([[[1, 2, 3]], [[4, 5, 6]], [[END, 7, END]]], rows=[[2], [1], [0]]))
    decoded = decode(batch, prompts(2), plan(1))
    for row in range(3):
        assert batch.history(0, row, 4) == [10, 11, 3, 5]
    assert decoded.lengths.tolist() == [[2, 2, 2]]
    assert decoded.finished.tolist() == [[True, True, True]]
    assert len(batch.runs) == 3


def test_a_row_that_is_not_chosen_cannot_end_a_shared_history() -> None:
    batch = ScriptedBatch(script([[[END, 2, END]], [[1, END, 1]]], rows=[[1], [1]]))
    decoded = decode(batch, prompts(2), plan(1))
    assert decoded.lengths.tolist() == [[1, 1, 1]]


def test_with_own_history_every_row_goes_on_with_its_own_token_and_stops_at_its_own_end() -> None:
    said = [[[1, 2, 3]], [[4, END, 6]], [[5, 1, END]], [[END, 2, 2]]]
    batch = ScriptedBatch(script(said, own=True))
    decoded = decode(batch, prompts(2), plan(1, rule="hypothesis"))
    assert batch.history(0, 0, 5) == [10, 11, 1, 4, 5]
    assert batch.history(0, 1, 4) == [10, 11, 2, END]
    assert batch.history(0, 2, 5) == [10, 11, 3, 6, END]
    assert decoded.lengths.tolist() == [[3, 1, 2]]
    assert decoded.finished.all()
    assert len(batch.runs) == 4


def test_the_graph_feeds_itself_unless_the_host_chooses() -> None:
    batch = ScriptedBatch(script([[[1, 2, 3]]] * 2 + [[[END] * 3]]))
    decode(batch, prompts(2), plan(1))
    assert [run.ids is None for run in batch.runs] == [False, True, True]
    assert not any(run.logits for run in batch.runs)


def test_utterances_end_at_different_steps() -> None:
    said = [[[END] * 3, [1] * 3], [[4] * 3, [2] * 3], [[5] * 3, [END] * 3]]
    decoded = decode(ScriptedBatch(script(said)), prompts(2, 2), plan(2))
    assert decoded.lengths.tolist() == [[0] * 3, [2] * 3]
    assert decoded.finished.all()
    assert decoded.candidates.shape == (3, 2, 3)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_lengths_and_finished_are_those_of_the_first_end_of_text(data: st.DataObject) -> None:
    batch, rows = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    own = data.draw(st.booleans())
    token = st.sampled_from([1, 2, END])
    said = np.array(data.draw(st.lists(token, min_size=9 * batch * rows, max_size=9 * batch * rows)))
    said = said.reshape(9, batch, rows)
    choice = np.array(data.draw(st.lists(st.integers(0, rows - 1), min_size=9 * batch, max_size=9 * batch)))
    told = script(said, rows=choice.reshape(9, batch), own=own)
    decoded = decode(ScriptedBatch(told), prompts(*[3] * batch), plan(batch, rows, "hypothesis" if own else "gain"))
    written = said if own else np.repeat(np.take_along_axis(said, told.rows[:, :, None], axis=2), rows, axis=2)
    for utterance, row in np.ndindex(batch, rows):
        line = written[:, utterance, row].tolist()
        assert decoded.finished[utterance, row] == (END in line)
        assert decoded.lengths[utterance, row] == (line.index(END) if END in line else 9)  # 12 positions, 3 of prompt


# --- Limits ---


def endless(steps: int, batch: int = 1) -> Script:
    return script([[[1, 2, 3]] * batch] * steps)


def test_the_position_table_limits_the_text_and_marks_it_unfinished() -> None:
    batch = ScriptedBatch(endless(POSITIONS))
    decoded = decode(batch, prompts(5), plan(1))
    assert decoded.lengths.tolist() == [[POSITIONS - 5] * 3]
    assert not decoded.finished.any()
    assert max(run.position.max() for run in batch.runs) < POSITIONS


def test_max_tokens_limits_every_hypothesis() -> None:
    said = [[[1, END, 3]], [[4, 5, 6]], [[END, 5, END]], [[1, 1, 1]]]
    decoded = decode(ScriptedBatch(script(said, own=True)), prompts(2), plan(1, rule="hypothesis", max_tokens=2))
    assert decoded.lengths.tolist() == [[2, 0, 2]]
    assert decoded.finished.tolist() == [[False, True, False]]
    assert len(decoded.candidates) == 2


def test_max_tokens_above_the_table_does_not_lift_its_limit() -> None:
    decoded = decode(ScriptedBatch(endless(POSITIONS)), prompts(5), plan(1, max_tokens=100))
    assert decoded.lengths.tolist() == [[POSITIONS - 5] * 3]


def test_prompts_of_different_length_leave_different_room() -> None:
    batch = ScriptedBatch(endless(POSITIONS, batch=2))
    decoded = decode(batch, prompts(9, 4), plan(2))
    assert decoded.lengths[:, 0].tolist() == [3, 8]
    positions = np.array([run.position for run in batch.runs[1:]])
    assert positions[:, 0].tolist() == [9, 10, 11, 11, 11, 11, 11]  # ended, and still within the table
    assert positions[:, 1].tolist() == [4, 5, 6, 7, 8, 9, 10]


def test_end_of_text_at_once_is_an_empty_text() -> None:
    batch = ScriptedBatch(script([[[END] * 3]]))
    decoded = decode(batch, prompts(2), plan(1))
    assert len(batch.runs) == 1
    assert decoded.lengths.tolist() == [[0, 0, 0]]
    assert decoded.step_seconds == ()


# --- Prefill ---


def test_prompts_are_padded_on_the_left_to_one_length() -> None:
    batch = ScriptedBatch(script([[[1] * 3] * 3, [[END] * 3] * 3]))
    decode(batch, prompts(5, 2, 4), plan(3))
    prefill, step = batch.runs
    assert prefill.ids is not None
    assert prefill.ids.shape == (3, 3, 5)
    assert prefill.ids[1, 0].tolist() == [END, END, END, 10, 11]
    assert prefill.ids[2, 2].tolist() == [END, 10, 11, 12, 13]
    assert prefill.position.tolist() == [0, -3, -1]  # of the first column: negative under padding
    assert prefill.prompt_last.tolist() == step.prompt_last.tolist() == [4, 1, 3]
    assert step.position.tolist() == [5, 2, 4]
    assert batch.history(1, 0, 3) == [10, 11, 1]


def test_a_probe_sees_the_logits_at_start_of_transcript_and_may_change_what_follows() -> None:
    logits = np.arange(2 * 3 * VOCABULARY, dtype=np.float32).reshape(2, 3, VOCABULARY)
    batch = ScriptedBatch(script([[[1] * 3] * 2, [[END] * 3] * 2], probe_logits=logits))
    given_prompts = prompts(5, 3, behind=2)
    changed = [Prompt((*prompt.ids[:-1], 8), prompt.start) for prompt in given_prompts]
    seen: list[NDArray[np.float32]] = []

    def probe(values: NDArray[np.float32]) -> list[Prompt]:
        seen.append(values)
        return changed

    decode(batch, given_prompts, plan(2, probe=probe))
    assert np.array_equal(seen[0], logits)
    first, second, step = batch.runs
    assert [run.logits for run in batch.runs] == [True, False, False]
    assert first.position.tolist() == [0, -2]
    assert first.prompt_last.tolist() == [2, 0]  # start-of-transcript
    assert second.position.tolist() == [3, 1]
    assert second.prompt_last.tolist() == step.prompt_last.tolist() == [4, 2]
    assert batch.history(0, 1, 6) == [*changed[0].ids, 1]
    assert batch.history(1, 2, 4) == [*changed[1].ids, 1]


def test_a_probe_may_leave_the_prompts_alone() -> None:
    logits = np.zeros((1, 3, VOCABULARY), np.float32)
    batch = ScriptedBatch(script([[[END] * 3]], probe_logits=logits))
    decode(batch, prompts(4, behind=2), plan(1, probe=lambda _: None))
    assert batch.history(0, 0, 4) == [10, 11, 12, 13]


# --- A rule of one's own ---


@dataclass
class ScriptedRule:
    """Answers as told and remembers what it was shown."""

    answer: Callable[[StepCandidates], Any]
    needs_logits: bool = False
    name: str = "scripted"
    seen: list[StepCandidates] = field(default_factory=list)

    def choose(self, step: StepCandidates) -> Any:
        self.seen.append(step)
        return self.answer(step)


def test_a_rule_on_the_host_decides_what_all_rows_are_fed() -> None:
    answers = [[2, 0], [1, 1], [0, 2]]
    said = [[[1, 2, 3], [4, 5, 6]], [[1, 7, 3], [4, 8, 6]], [[END, 2, 3], [4, 5, END]]]
    batch = ScriptedBatch(script(said, rows=[[0, 0]] * 3))
    rule = ScriptedRule(lambda step: np.array(answers[step.step]))
    decoded = decode(batch, prompts(2, 2), plan(2, rule=rule))
    assert [batch.history(0, row, 4) for row in range(3)] == [[10, 11, 3, 7]] * 3
    assert [batch.history(1, row, 4) for row in range(3)] == [[10, 11, 4, 8]] * 3
    assert all(run.ids is not None and run.ids.dtype == np.int64 for run in batch.runs)
    assert decoded.rows.tolist() == answers
    assert decoded.lengths.tolist() == [[2] * 3] * 2


def test_a_rule_sees_candidates_and_scores_but_logits_only_if_it_needs_them() -> None:
    told = script([[[1, 2, 3]], [[END] * 3]], logprobs=[[[-1, -2, -3]], [[-4, -5, -6]]])
    rule = ScriptedRule(lambda _: [0])
    batch = ScriptedBatch(told)
    decode(batch, prompts(2), plan(1, rule=rule))
    assert [step.step for step in rule.seen] == [0, 1]
    assert rule.seen[1].candidates.tolist() == [[END] * 3]
    assert rule.seen[0].logprobs.tolist() == [[-1, -2, -3]]
    assert not any(run.logits for run in batch.runs)
    assert rule.seen[0].logits is None


def test_a_rule_that_needs_logits_gets_those_of_every_step() -> None:
    rule = ScriptedRule(lambda _: [0], needs_logits=True)
    batch = ScriptedBatch(script([[[1, 2, 3]], [[END] * 3]]))
    decode(batch, prompts(2), plan(1, rule=rule))
    assert all(run.logits for run in batch.runs)
    shown = [step.logits for step in rule.seen]
    assert [values is not None and values.shape == (1, 3, VOCABULARY) for values in shown] == [True, True]
    assert [float(values.max()) for values in shown if values is not None] == [0.0, 1.0]


@pytest.mark.parametrize(
    "answer",
    [[0], 0, [[0, 0]], [0.0, 0.0], [0, 0, 0], [0, 3], [-1, 0], None],
    ids=["short", "scalar", "matrix", "floats", "long", "beyond", "negative", "nothing"],
)
def test_an_answer_that_is_not_one_row_for_each_utterance_is_refused(answer: Any) -> None:
    rule = ScriptedRule(lambda _: answer)
    with pytest.raises(OptionError, match=r"rule 'scripted' returned .*expected"):
        decode(ScriptedBatch(endless(3, batch=2)), prompts(2, 2), plan(2, rule=rule))


# --- Reading the result ---


@pytest.fixture(scope="module")
def words_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    generation = generation_settings(make_tokenizer(folder, 1, None, True), True, True)
    path = folder / "tokenizer.json"
    return Tokenizer.from_file(path, special_tokens(path, generation, {}))


def decoded_texts(
    tokenizer: Tokenizer, texts: Sequence[str], logprobs: Sequence[float], unfinished: Sequence[int] = ()
) -> DecodedBatch:
    """One utterance with own histories: row i writes `texts[i]`, every token (and its end) with `logprobs[i]`."""
    ids = [tokenizer.encode(text) for text in texts]
    steps = max(len(line) for line in ids) + 1
    end = tokenizer.special.end_of_text
    lines = np.array([line + [end] * (steps - len(line)) for line in ids])  # [R, T]
    return DecodedBatch(
        candidates=lines.T[:, None],
        logprobs=np.repeat(np.array(logprobs, np.float32)[None, None], steps, axis=0),
        rows=np.zeros((steps, 1), np.int64),
        lengths=np.array([[len(line) for line in ids]]),
        finished=np.array([[row not in unfinished for row in range(len(ids))]]),
        pruned=np.full((1, len(ids)), -1),
        prefill_seconds=0.0,
        step_seconds=(),
        step_rows=(),
    )


def own(tokenizer: Tokenizer, decoded: DecodedBatch, **options: Any) -> Transcript:
    return read_own_histories(decoded, 0, NAMES, tokenizer, "en", DecodingOptions(rule="hypothesis", **options))


def test_the_mean_counts_the_end_of_text_as_a_token(words_tokenizer: Tokenizer) -> None:
    decoded = decoded_texts(words_tokenizer, ["12", "12", "1234"], [0, 0, 0])
    decoded.logprobs[:, 0, 0] = [-1, -1, -7, -90, -90]
    decoded.logprobs[:, 0, 1] = [-1, -1, -6, -90, -90]
    decoded.logprobs[:, 0, 2] = [-2, -2, -2, -2, -7]
    transcript = own(words_tokenizer, decoded)
    assert [item.score for item in transcript.hypotheses] == pytest.approx([-3.0, -8 / 3, -3.0])
    assert transcript.adapter == "music"
    assert transcript.avg_logprob == pytest.approx(-8 / 3)


def test_an_unfinished_text_has_no_end_of_text_to_count(words_tokenizer: Tokenizer) -> None:
    decoded = decoded_texts(words_tokenizer, ["12", "12", "12"], [0, 0, 0], unfinished=[0])
    decoded.logprobs[:, 0, 0] = [-1, -3, -90]
    first = own(words_tokenizer, decoded).hypotheses[0]
    assert first.score == pytest.approx(-2.0)
    assert not first.finished


def test_total_and_mean_may_choose_differently(words_tokenizer: Tokenizer) -> None:
    decoded = decoded_texts(words_tokenizer, ["1", "1234567", "123"], [-1.0, -0.5, -0.7])
    assert own(words_tokenizer, decoded).adapter == "music"
    total = own(words_tokenizer, decoded, score="total")
    assert total.adapter == "base"
    assert [item.score for item in total.hypotheses] == pytest.approx([-2.0, -4.0, -2.8])
    assert total.hypotheses[1].avg_logprob == pytest.approx(-0.5)  # whatever the score is


def test_base_bias_moves_the_base_alone(words_tokenizer: Tokenizer) -> None:
    decoded = decoded_texts(words_tokenizer, ["ab", "cd", "ef"], [-1.0, -0.6, -0.9])
    assert own(words_tokenizer, decoded).adapter == "music"
    favoured = own(words_tokenizer, decoded, base_bias=0.5)
    assert favoured.adapter == "base"
    assert [item.score for item in favoured.hypotheses] == pytest.approx([-0.5, -0.6, -0.9])
    assert favoured.avg_logprob == pytest.approx(-1.0)


def test_without_include_base_the_best_adapter_wins_and_the_base_is_still_reported(words_tokenizer: Tokenizer) -> None:
    decoded = decoded_texts(words_tokenizer, ["ab", "cd", "ef"], [-0.1, -0.9, -0.6])
    assert own(words_tokenizer, decoded).adapter == "base"
    transcript = own(words_tokenizer, decoded, include_base=False)
    assert transcript.adapter == "sports"
    assert transcript.text == "ef"
    assert transcript.hypotheses[0].text == "ab"


def test_ties_go_to_the_lowest_row(words_tokenizer: Tokenizer) -> None:
    decoded = decoded_texts(words_tokenizer, ["ab", "cd", "ef"], [-0.9, -0.5, -0.5])
    assert own(words_tokenizer, decoded).adapter == "music"
    level = decoded_texts(words_tokenizer, ["ab", "cd", "ef"], [-0.5, -0.5, -0.5])
    assert own(words_tokenizer, level).adapter == "base"


def test_words_that_the_base_does_not_have_are_marked(words_tokenizer: Tokenizer) -> None:
    texts = ["the black cat sat", "the blue cat sat down", "x"]
    transcript = own(words_tokenizer, decoded_texts(words_tokenizer, texts, [-0.5, -0.1, -0.9]))
    assert transcript.text == texts[1]
    assert "".join(word.word for word in transcript.words) == texts[1]
    assert [word.differs_from_base for word in transcript.words] == [False, True, False, False, True]


def test_when_the_base_wins_nothing_departs_from_it(words_tokenizer: Tokenizer) -> None:
    decoded = decoded_texts(words_tokenizer, ["the cat", "a dog", "x"], [-0.1, -0.5, -0.9])
    transcript = own(words_tokenizer, decoded)
    assert transcript.adapter == "base"
    assert not any(word.differs_from_base for word in transcript.words)


def test_own_provenance_ends_with_each_row(words_tokenizer: Tokenizer) -> None:
    decoded = decoded_texts(words_tokenizer, ["a", "bcd", "ef"], [-0.5, -0.1, -0.9], unfinished=[2])
    provenance = own(words_tokenizer, decoded).provenance
    end = words_tokenizer.special.end_of_text
    assert [token.id for token in provenance] == [*words_tokenizer.encode("bcd"), end]
    assert {(token.row, token.adapter) for token in provenance} == {(1, "music")}
    assert [token.candidates[0] for token in provenance] == [*words_tokenizer.encode("a"), end, None, None]
    assert [token.confidences[0] is None for token in provenance] == [False, False, True, True]
    assert [token.confidences[2] is None for token in provenance] == [False, False, True, True]  # cut: no end-of-text
    assert provenance[0].logprob == pytest.approx(-0.1)
    assert provenance[0].confidences[1] == pytest.approx(math.exp(-0.1))


def test_word_confidences_average_what_each_row_still_wrote(words_tokenizer: Tokenizer) -> None:
    decoded = decoded_texts(words_tokenizer, ["a", "bcd efg", "x"], [-0.5, -0.1, -0.9])
    first, second = own(words_tokenizer, decoded).words
    assert (first.word, second.word) == ("bcd", " efg")
    assert first.confidences == pytest.approx((math.exp(-0.5), math.exp(-0.1), math.exp(-0.9)))
    assert second.confidences == (None, pytest.approx(math.exp(-0.1)), None)
    assert second.probability == pytest.approx(math.exp(-0.1))


def shared(tokenizer: Tokenizer, text: str, rows: Sequence[int], base: str | None = None) -> Transcript:
    """Shared history that writes `text`, token t chosen by row `rows[t]`; row 0 would have written `base`."""
    decoded = decoded_texts(tokenizer, [base or text, text, text], [-0.5, -0.25, -0.75])
    length = len(tokenizer.encode(text))
    decoded.rows[:, 0] = rows
    return read_shared_history(
        dataclasses.replace(decoded, lengths=np.array([[length] * 3]), finished=np.array([[True] * 3])),
        0, NAMES, tokenizer, "en",
    )  # fmt: skip


def test_shared_provenance_names_the_row_of_every_token(words_tokenizer: Tokenizer) -> None:
    transcript = shared(words_tokenizer, "ab c", [0, 1, 2, 0, 1][: len(words_tokenizer.encode("ab c")) + 1])
    assert transcript.text == "ab c"
    assert [token.adapter for token in transcript.provenance] == [NAMES[token.row] for token in transcript.provenance]
    assert [token.row for token in transcript.provenance][:3] == [0, 1, 2]
    assert transcript.provenance[1].logprob == pytest.approx(-0.25)
    assert transcript.provenance[0].confidences == pytest.approx(tuple(map(math.exp, (-0.5, -0.25, -0.75))))
    assert transcript.provenance[-1].id == words_tokenizer.special.end_of_text
    scores = [token.logprob for token in transcript.provenance]
    assert transcript.avg_logprob == pytest.approx(sum(scores) / len(scores))
    assert transcript.adapter is None
    assert transcript.hypotheses == ()


def test_a_shared_word_departs_where_the_base_had_another_token(words_tokenizer: Tokenizer) -> None:
    steps = len(words_tokenizer.encode("xab xcd")) + 1
    transcript = shared(words_tokenizer, "xab xcd", [1] * steps, base="xab xce")
    assert [word.differs_from_base for word in transcript.words] == [False, True]
    assert {word.adapter for word in transcript.words} == {"music"}


def test_an_empty_text_reads_as_one() -> None:
    assert compression_ratio("") < 1


# --- Through the Transcriber ---


class ScriptedBackend:
    """A backend without graphs."""

    prunes = False

    def __init__(self, told: Script) -> None:
        self.script = told
        self.batches: list[ScriptedBatch] = []
        self.controls: list[Control] = []

    def load_stack(self, stack: Any) -> LoadedStack:
        return LoadedStack(3 if stack is None else stack.rows, {})

    def encode(self, features: NDArray[np.float32], stack: LoadedStack) -> Encoded:
        return Encoded(features.shape[0], {})

    def start(self, encoded: Encoded, stack: LoadedStack, control: Control) -> ScriptedBatch:
        self.controls.append(control)
        self.batches.append(ScriptedBatch(self.script))
        return self.batches[-1]

    def close(self) -> None: ...


def make_manifest(folder: Path, *, multilingual: bool = True) -> Manifest:
    tokens = make_tokenizer(folder, 1, None, True)
    special = special_tokens(folder / "tokenizer.json", generation_settings(tokens, multilingual, True), {})
    return Manifest(
        schema_version=SCHEMA_VERSION,
        base=BaseModel("scripted", None, "0"),
        dimensions=Dimensions(80, 50, 32, len(tokens), 8, 1, 1, 8, 1, 1, 8),
        audio=AudioFrontEnd(16000, 400, 160, 16000),
        tokens=special,
        adapters=tuple(AdapterEntry(name, 1, 1.0, (), "", None) for name in NAMES[1:]),
        rule="hypothesis",
        tau=0.025,
        suppress_tokens=(1,),
        begin_suppress_tokens=(2,),
        precisions=("fp32",),
        opset=23,
        tools={},
        parity={},
        files={},
        created="",
    )


def loud(seconds: float = 0.5) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(0, 0.1, int(16000 * seconds)).astype(np.float32)


def saying(manifest: Manifest, batch: int, own: bool = True, **probe: NDArray[np.float32]) -> Script:
    end = manifest.tokens.end_of_text
    return script([[[70, 71, 72]] * batch, [[end] * 3] * batch], own=own, probe_logits=probe.get("logits"))


def test_the_language_is_detected_by_the_base_for_each_utterance(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path)
    logits = np.zeros((2, 3, manifest.dimensions.vocabulary), np.float32)
    languages = manifest.tokens.languages
    logits[0, 0, languages["de"]] = logits[1, 0, languages["fr"]] = 2
    logits[:, 1:, languages["en"]] = 9  # the adapters are sure, and are not asked
    logits[:, 0, 0] = 20  # nor does a token matter that is no language
    backend = ScriptedBackend(saying(manifest, 2, logits=logits))
    transcriber = Transcriber(manifest, tmp_path, backend)
    results = transcriber.transcribe_batch([loud(), loud(0.3)], sample_rate=16000, no_speech_threshold=None)
    assert [result.language for result in results] == ["de", "fr"]
    special = manifest.tokens
    prompt = [special.start_of_transcript, languages["de"], special.transcribe, special.no_timestamps]
    assert backend.batches[0].history(0, 1, 4) == prompt
    assert backend.batches[0].history(1, 0, 2)[1] == languages["fr"]


def test_a_given_language_is_not_detected(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path)
    backend = ScriptedBackend(saying(manifest, 1))
    transcriber = Transcriber(manifest, tmp_path, backend)
    result = transcriber.transcribe(loud(), sample_rate=16000, language="French", no_speech_threshold=None)
    assert result.language == "fr"
    assert not any(run.logits for run in backend.batches[0].runs)


def no_speech(manifest: Manifest, probability: float) -> NDArray[np.float32]:
    logits = np.zeros((1, 3, manifest.dimensions.vocabulary), np.float32)
    assert manifest.tokens.no_speech is not None
    odds = probability / (1 - probability) * (logits.shape[2] - 1)
    logits[0, 0, manifest.tokens.no_speech] = math.log(odds)
    return logits


@pytest.mark.parametrize(
    ("threshold", "logprob", "empty"), [(0.6, -0.4, True), (0.8, -0.4, False), (0.6, -0.6, False), (None, -1.0, False)]
)
def test_audio_without_speech_is_empty_only_if_the_text_is_unsure_too(
    tmp_path: Path, threshold: float | None, logprob: float, empty: bool
) -> None:
    manifest = make_manifest(tmp_path)
    told = saying(manifest, 1, logits=no_speech(manifest, 0.7)) if threshold else saying(manifest, 1)
    transcriber = Transcriber(manifest, tmp_path, ScriptedBackend(told))
    result = transcriber.transcribe(
        loud(), sample_rate=16000, language="en", no_speech_threshold=threshold, logprob_threshold=logprob
    )
    assert result.avg_logprob == pytest.approx(-0.5)
    assert (result.text == "") is empty
    assert (result.tokens == ()) is empty
    assert result.no_speech_prob == (None if threshold is None else pytest.approx(0.7, abs=1e-6))


def test_the_bundle_and_the_options_reach_the_decoder_as_control_values(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path)
    backend = ScriptedBackend(saying(manifest, 1, own=False))
    transcriber = Transcriber(manifest, tmp_path, backend)
    options = {"rule": "paper", "tau": 0.25, "suppress_tokens": [5], "no_speech_threshold": None, "language": "en"}
    transcriber.transcribe(loud(), sample_rate=16000, **options)
    control = backend.controls[0]
    first_timestamp = manifest.tokens.first_timestamp
    assert first_timestamp is not None
    never = {1, 5, *range(first_timestamp, manifest.dimensions.vocabulary)}
    assert set(np.flatnonzero(control.token_bias[0]).tolist()) == never
    assert np.flatnonzero(control.first_token_bias[0]).tolist() == [2]
    assert (control.tau.tolist(), control.rule.tolist()) == ([0.25], [1])
    assert control.first_valid.tolist() == [0]
    assert control.row_mask.all()


def test_an_english_only_model_refuses_another_language(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path, multilingual=False)
    backend = ScriptedBackend(saying(manifest, 1))
    transcriber = Transcriber(manifest, tmp_path, backend)
    with pytest.raises(OptionError, match="de"):
        transcriber.transcribe(loud(), sample_rate=16000, language="de", no_speech_threshold=None)
    result = transcriber.transcribe(loud(), sample_rate=16000, language="en", no_speech_threshold=None)
    assert result.language is None
    assert result.tokens == (70,)
    assert backend.batches[0].history(0, 0, 2) == [manifest.tokens.start_of_transcript, manifest.tokens.no_timestamps]


def test_a_prompt_is_fed_before_start_of_transcript_within_half_the_table(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path)
    backend = ScriptedBackend(saying(manifest, 1))
    transcriber = Transcriber(manifest, tmp_path, backend)
    transcriber.transcribe(
        loud(), sample_rate=16000, language="en", prompt="xyz" * 40, no_speech_threshold=None, rule="hypothesis"
    )
    fed = backend.batches[0].history(0, 0, 20)
    assert fed[0] == manifest.tokens.start_of_previous
    assert fed.index(manifest.tokens.start_of_transcript) == manifest.dimensions.text_positions // 2
