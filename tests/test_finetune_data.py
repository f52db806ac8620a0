"""From AudioFolders to batches: labels, features, their cache, the order of utterances, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from das_asr.runtime.errors import CheckpointError, DataError, OptionError
from das_asr.training.finetune import DataOptions, TrainOptions
from das_asr.training.finetune.base import Base, load_base
from das_asr.training.finetune.batches import Batches
from das_asr.training.finetune.dataset import collate, prepare_data
from das_asr.training.finetune.feature_cache import pad_features, trim_features
from das_asr.training.finetune.labels import encode
from das_asr.training.finetune.wer import word_error_rate
from tests.checkpoints import edit_config, make_base, quiet
from tests.spoken import make_folder, noise, sentence, write_metadata
from tests.vocabularies import ENGLISH, MULTILINGUAL

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), d_model=32, seconds=2, text_positions=48)


@pytest.fixture(scope="module")
def base(small_base: Path) -> Base:
    return load_base(small_base)


@pytest.fixture(scope="module")
def model(base: Base) -> Any:
    return base.load_model().eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "data", range(6))


def options(folder: Path, **changes: Any) -> DataOptions:
    fields = {"sources": (folder,), "language": "en", "cache": folder.parent / "cache", "leading_space": False}
    return DataOptions(**{**fields, **changes})


# --- The base ---


def test_base_of_another_kind_is_refused(tmp_path: Path) -> None:
    directory = make_base(tmp_path / "base", d_model=32, seconds=2)
    edit_config(directory, "config.json", model_type="bart")
    with pytest.raises(CheckpointError, match=r"'bart'.*'whisper'"):
        load_base(directory)


def test_front_end_of_another_base_is_refused(tmp_path: Path) -> None:
    directory = make_base(tmp_path / "base", d_model=32, seconds=2)
    edit_config(directory, "preprocessor_config.json", chunk_length=30)
    with pytest.raises(CheckpointError, match=r"n_samples is 32000, but chunk_length \* sampling_rate is 480000"):
        load_base(directory)


# --- Labels ---


def test_labels_of_the_demo_base(demo_base: Path) -> None:
    base = load_base(demo_base)
    labels = encode(base, "play a song", None, "transcribe", leading_space=False)
    assert labels[:3] == [1202, 1204, 1208]  # <|en|> <|transcribe|> <|notimestamps|>
    assert labels[-1] == 1200
    assert base.tokenizer.decode(labels) == "play a song"


@pytest.mark.parametrize(
    ("vocabulary", "language", "expected"),
    [
        (MULTILINGUAL, "German", ["<|de|>", "<|transcribe|>", "<|notimestamps|>"]),
        (ENGLISH, None, ["<|notimestamps|>"]),
    ],
)
def test_labels_of_real_vocabularies(base: Base, vocabulary: Any, language: str | None, expected: list[str]) -> None:
    made = {"generation_config": vocabulary.generation_config, "config": vocabulary.config}
    real = replace(base, directory=vocabulary.directory, **made)
    labels = encode(real, "Hello world", language, "transcribe", leading_space=True)
    assert labels[: len(expected)] == [vocabulary.specials[content] for content in expected]
    assert real.tokenizer.decode(labels) == " Hello world"


def test_language_must_be_given_where_there_are_several(base: Base, model: Any, folder: Path) -> None:
    with pytest.raises(OptionError, match="knows 3 languages"):
        prepare_data(base, options(folder, language=None), model=model, encoder_states=False)


def test_language_column_goes_before_the_option(base: Base, model: Any, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "data", range(2), language="de")
    data = prepare_data(base, options(folder), model=model, encoder_states=False)
    assert data.train[0]["labels"][0] == base.tokenizer.special.languages["de"]


@pytest.mark.parametrize("encoder_states", [False, True])
def test_loss_is_that_of_a_computation_by_hand(base: Base, model: Any, folder: Path, encoder_states: bool) -> None:
    data = prepare_data(base, options(folder), model=model, encoder_states=encoder_states)
    batch = collate([data.train[index] for index in range(4)])
    with torch.no_grad():
        loss = float(model(**batch).loss)
        total, count = 0.0, 0
        for index in range(4):
            text = base.tokenizer.encode(sentence(index))
            special = base.tokenizer.special
            prompt = [special.start_of_transcript, special.languages["en"], special.transcribe, special.no_timestamps]
            tokens = torch.tensor([[*prompt, *text, special.end_of_text]])
            features = _features(base, folder / f"{index}.wav")
            logits = model(input_features=features, decoder_input_ids=tokens[:, :-1]).logits.double()
            wanted = tokens[0, 1:]
            total -= float(logits[0].log_softmax(-1)[range(len(wanted)), wanted].sum())
            count += len(wanted)
    assert loss == pytest.approx(total / count, rel=2e-3 if encoder_states else 1e-5)  # float16 states


def _features(base: Base, path: Path) -> torch.Tensor:
    """By transformers' own extractor."""
    import soundfile
    from transformers import WhisperFeatureExtractor

    with quiet():
        extractor = WhisperFeatureExtractor.from_pretrained(base.directory)
        samples, _ = soundfile.read(path, dtype="float32")
        features: torch.Tensor = extractor(samples, sampling_rate=16000, return_tensors="pt").input_features
    return features


def test_form_of_the_transcript_is_that_of_the_base(demo_base: Path, repo: Path, tmp_path: Path) -> None:
    base = load_base(demo_base)
    clips = DataOptions(sources=(repo / "benchmarks/demo/audio",), cache=tmp_path)
    data = prepare_data(base, clips, model=base.load_model(), encoder_states=True)
    written = _greedy(base, data)
    assert data.leading_space == written[0].startswith(" ")


def _greedy(base: Base, data: Any) -> list[str]:
    from das_asr.training.finetune.greedy import greedy_texts

    return greedy_texts(base.load_model().eval(), collate([data.train[0], data.train[1]]), base)


# --- Features and their cache ---


def test_trimmed_features_come_back(base: Base) -> None:
    from das_asr.runtime.features import LogMel

    features = LogMel(base.audio, base.dimensions.mels)(noise(1))
    trimmed = trim_features(features)
    assert trimmed.shape[1] < features.shape[1]
    np.testing.assert_array_equal(pad_features(trimmed, features.shape[1]), features)


def test_features_are_computed_once(base: Base, model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_data(base, options(folder), model=model, encoder_states=True)
    monkeypatch.setattr("das_asr.training.finetune.dataset.load_audio", _refuse)
    second = prepare_data(base, options(folder), model=model, encoder_states=True)
    np.testing.assert_array_equal(first.train[3]["features"], second.train[3]["features"])
    assert isinstance(second.train[3]["features"], np.memmap)


def _refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("audio was decoded again")


def test_encoder_states_of_another_encoder_are_not_taken(base: Base, model: Any, folder: Path, tmp_path: Path) -> None:
    other = load_base(make_base(tmp_path / "other", d_model=32, seconds=2, text_positions=48, seed=1))
    first = prepare_data(base, options(folder), model=model, encoder_states=True)
    second = prepare_data(other, options(folder), model=other.load_model(), encoder_states=True)
    assert not np.array_equal(first.train[0]["features"], second.train[0]["features"])


def test_no_cache_of_encoder_states(base: Base, model: Any, folder: Path) -> None:
    data = prepare_data(base, options(folder, cache_encoder=False), model=model, encoder_states=True)
    assert data.train[0]["features"].shape == (80, 200)


# --- The order of utterances ---


def test_an_epoch_is_a_permutation() -> None:
    batches = Batches((10,), 4, seed=5)
    batches.set_epoch(2)
    found = list(batches)
    assert [len(batch) for batch in found] == [4, 4, 2]
    assert len(batches) == 3
    assert sorted(index for batch in found for index in batch) == list(range(10))
    assert found == list(batches)
    batches.set_epoch(3)
    assert found != list(batches)


def test_domains_have_equal_shares_in_turn() -> None:
    sizes = (30, 10, 20)
    batches = Batches(sizes, 16, seed=0)
    domain_of = [domain for domain, size in enumerate(sizes) for _ in range(size)]
    shares = [sorted(Counter(domain_of[index] for index in batch).values()) for batch in _epochs(batches, 3)]
    assert all(share == [5, 5, 6] for share in shares)
    totals = Counter(domain_of[index] for batch in islice(_epochs(batches, 3), 12) for index in batch)
    assert set(totals.values()) == {64}


def test_each_domain_is_used_up_before_it_repeats() -> None:
    batches = Batches((12, 5), 4, seed=0)
    small = [index for batch in _epochs(batches, 5) for index in batch if index >= 12]
    assert len(small) >= 10
    assert all(sorted(small[start : start + 5]) == list(range(12, 17)) for start in range(0, len(small) - 4, 5))


def _epochs(batches: Batches, count: int) -> Iterator[list[int]]:
    for epoch in range(count):
        batches.set_epoch(epoch)
        yield from batches


def test_shares_are_those_of_the_sources(base: Base, model: Any, tmp_path: Path) -> None:
    sources = (make_folder(tmp_path / "a", range(4)), make_folder(tmp_path / "b", range(4, 10)))
    both = options(sources[0], sources=sources)
    assert prepare_data(base, replace(both, multi=True), model=model, encoder_states=False).sizes == (4, 6)
    assert prepare_data(base, both, model=model, encoder_states=False).sizes == (10,)


# --- What is refused ---


def test_all_offenders_are_in_one_message(base: Base, model: Any, tmp_path: Path) -> None:
    import soundfile

    folder = make_folder(tmp_path / "data", range(9))
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for number in range(4):
        soundfile.write(folder / f"{number}.wav", noise(number, 2.5), 16000)
    (folder / "4.wav").write_bytes(b"no audio")
    rows[5]["text"] = "word " * 100
    write_metadata(folder, rows)
    with pytest.raises(DataError) as caught:
        prepare_data(base, options(folder), model=model, encoder_states=True)
    message = str(caught.value)
    assert "6 of 9 utterances" in message
    assert "and 1 more" in message
    assert "--skip-bad" in message
    assert "0.wav" in message
    assert "2.50 s" in message
    assert "4.wav" in message
    kept = prepare_data(base, options(folder, skip_bad=True), model=model, encoder_states=True)
    assert (len(kept.train), kept.skipped) == (3, 6)


def test_nothing_left(base: Base, model: Any, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "data", range(2))
    rows = [{"file_name": f"{number}.wav", "text": "word " * 100} for number in range(2)]
    write_metadata(folder, rows)
    with pytest.raises(DataError, match="room for 48"):
        prepare_data(base, options(folder), model=model, encoder_states=True)
    with pytest.raises(DataError, match="None of the 2"):
        prepare_data(base, options(folder, skip_bad=True), model=model, encoder_states=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ()}, "--data"),
        ({"multi": True}, "--multi"),
        ({"task": "sing"}, "--task"),
    ],
)
def test_data_options_that_contradict_themselves(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DataOptions(**{"sources": (Path("x"),), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "--lr"),
        ({"epochs": 0}, "--epochs"),
        ({"batch_size": 16, "accumulation": 3}, "--accumulation 3"),
        ({"warmup": 1.0}, "--warmup"),
        ({"precision": "float16"}, "--precision"),
        ({"seed": -1}, "--seed"),
        ({"weight_decay": -1.0}, "--weight-decay"),
    ],
)
def test_train_options_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        TrainOptions(**{"learning_rate": 1e-4, **changes})


def test_word_error_rate_ignores_case_and_punctuation() -> None:
    assert word_error_rate(["Play 'Blue', please.", "..."], ["play blue please", "noise"]) == 0.0
    assert word_error_rate(["it's one two three"], ["it's one four three"]) == 0.25
