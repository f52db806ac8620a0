"""The tiny base: corpus, voices, batches, network, optimiser, and a run that is killed and goes on."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from das_asr.runtime.errors import DataError, OptionError, TrainingError
from das_asr.runtime.jsonl import Row, read_rows
from das_asr.training.base import prepared
from das_asr.training.base.augment import SILENCE, Augmentation, augmented, normalized
from das_asr.training.base.batches import Example, collate, epoch_batches
from das_asr.training.base.corpus import DOMAIN_WORDS, CorpusOptions, make_corpus
from das_asr.training.base.muon import Muon, orthogonalized
from das_asr.training.base.network import Shape, TinyWhisper, make_config
from das_asr.training.base.phonemes import phonemes
from das_asr.training.base.prepared import SHARD, load_prepared, prepare, raw_features
from das_asr.training.base.pretrain import Progress, Schedule, train
from das_asr.training.base.recipe import BaseOptions, is_held_out, train_base
from das_asr.training.base.snippets import Sources, natural_snippets, plain_words
from das_asr.training.base.tokens import SPECIAL_TOKENS, prompt_ids, train_tokenizer
from das_asr.training.base.voices import HELD_OUT_VARIANTS, HELD_OUT_VOICES, draw_take

needs_voices = pytest.mark.skipif(
    not (all(map(shutil.which, ("espeak-ng", "flite", "festival"))) and importlib.util.find_spec("ttspico")),
    reason="espeak-ng, flite, festival and Pico speak the training set",
)

SMALL = Shape(width=32, layers=1, heads=2, mels=20, audio_positions=100, text_positions=32)


def sources(root: Path) -> Sources:
    """Texts in the places of a Debian machine."""
    (root / "games/fortunes").mkdir(parents=True)
    (root / "wordnet").mkdir()
    (root / "dict").mkdir()
    (root / "games/fortunes/wisdom").write_text(
        "Never trust a computer you cannot lift (even 2).\n%\nIt's a long way home, my friend!\n%\nIt rains daily.\n"
    )
    (root / "wordnet/data.noun").write_text('0001 03 n 01 entity | a thing; "the quick fox jumped over it"; "no"\n')
    (root / "dict/american-english").write_text("zebra\nZurich\napple\nsong\nwalking\nfox's\n")
    return Sources(root)


# ---- text ----


def test_snippets_are_plain_short_sentences_of_every_source(tmp_path: Path) -> None:
    found = [pair for pair in natural_snippets(sources(tmp_path)) if pair[0] != "python"]
    assert ("fortunes", "never trust a computer you cannot lift") in found
    assert ("fortunes", "it's a long way home my friend") in found
    assert ("wordnet", "the quick fox jumped over it") in found
    assert all("2" not in text for _, text in found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't worry, be happy", ["don't", "worry", "be", "happy"]),
        ("'quoted' words", ["quoted", "words"]),
        ("agent 007", None),
        ("a/b", None),
    ],
)
def test_plain_words(text: str, words: list[str] | None) -> None:
    assert plain_words(text) == words


def test_the_corpus_is_distinct_free_of_domain_words_and_the_same_for_a_seed(tmp_path: Path) -> None:
    options = CorpusOptions(count=2000, seed=3, sources=sources(tmp_path))
    rows = make_corpus(options)
    texts = [row["text"] for row in rows]
    assert len(set(texts)) == len(texts) == 2000
    assert not [text for text in texts if DOMAIN_WORDS & set(text.replace("'", " ").split())]
    assert {row["source"] for row in rows} >= {"requests", "words", "python"}
    assert rows == make_corpus(options)
    assert rows != make_corpus(CorpusOptions(count=2000, seed=4, sources=options.sources))


def test_a_missing_source_names_its_package(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="apt-get install fortunes wordnet-base wamerican"):
        make_corpus(CorpusOptions(sources=Sources(tmp_path)))


# ---- speech ----


def test_held_out_voices_are_never_drawn() -> None:
    rng = random.Random(0)
    takes = [draw_take(rng) for _ in range(20_000)]
    drawn = {(take.voice.engine, take.voice.name) for take in takes}
    assert not drawn & {(voice.engine, voice.name) for voice in HELD_OUT_VOICES}
    variants = {name.partition("+")[2] for engine, name in drawn if engine == "espeak-ng"}
    assert not variants & set(HELD_OUT_VARIANTS)
    assert len(variants) > 60
    assert {engine for engine, _ in drawn} == {"espeak-ng", "flite", "festival", "pico"}


def test_raw_features_normalise_to_what_the_runtime_computes() -> None:
    from das_asr.runtime.features import LogMel
    from das_asr.runtime.manifest import AudioFrontEnd

    samples = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    front_end = AudioFrontEnd(sample_rate=16_000, n_fft=400, hop_length=160, window_samples=32_000)
    expected = LogMel(front_end, 80)(samples)
    power = torch.from_numpy(raw_features(samples, 80).astype(np.float32).T)
    ours = normalized(torch.nn.functional.pad(power, (0, 200 - power.shape[1]), value=SILENCE)[None])[0].numpy()
    # The last two frames differ: here the mirrored end of a short window, there silence.
    assert np.abs(ours[:, :98] - expected[:, :98]).max() < 2e-3


@needs_voices
def test_phonemes_belong_to_their_sentences() -> None:
    texts = ["hello there", "set an alarm for six", "it was the best of times", "zebra"]
    together = phonemes(texts)
    assert together == [phonemes([text])[0] for text in texts]
    assert all(symbol and not set(symbol) & set("',_:") for row in together for symbol in row)


@needs_voices
def test_preparing_goes_on_after_a_stop(tmp_path: Path) -> None:
    rows = [{"id": f"b{number:06d}", "text": f"number {number}", "source": "requests"} for number in range(SHARD + 4)]
    steps = list(prepare(rows[SHARD:], tmp_path / "one", mels=20, seconds=7.9, workers=1))
    assert steps == [0, 4]
    first = load_prepared(tmp_path / "one")
    assert [row["id"] for row in first.rows] == [row["id"] for row in rows[SHARD:]]
    assert [len(features) for features in first.features] == [row["frames"] for row in first.rows]
    assert list(prepare(rows[SHARD:], tmp_path / "one", mels=20, seconds=7.9, workers=1)) == [4]


@needs_voices
def test_no_engine_runs_on_after_a_shard(tmp_path: Path) -> None:
    names = (f"b{number:06d}" for number in itertools.count())
    by_festival = [name for name in itertools.islice(names, 500) if _engine_of(name) == "festival"][:2]
    before = _children()
    prepared._write_shard([_row(name) for name in by_festival], tmp_path / "shard", 20, 7.9)
    assert [row["voice"].partition("/")[0] for row in read_rows(tmp_path / "shard/rows.jsonl")] == ["festival"] * 2
    assert _children() == before


def _engine_of(name: str) -> str:
    return draw_take(random.Random(f"take {name}")).voice.engine


def _row(name: str) -> Row:
    return {"id": name, "text": "good morning", "source": "requests"}


def _children() -> set[str]:
    return set(" ".join(path.read_text() for path in Path("/proc/self/task").glob("*/children")).split())


# ---- network and optimiser ----


def small_model(seed: int = 0) -> TinyWhisper:
    torch.manual_seed(seed)
    return TinyWhisper(make_config(SMALL, 309, 300, 301), phonemes=5).eval()


def test_the_encoder_equals_transformers_on_a_full_window() -> None:
    model = small_model()
    features = torch.randn(2, SMALL.mels, 2 * SMALL.audio_positions)
    with torch.no_grad():
        expected = model.whisper.model.encoder(features).last_hidden_state
        assert (model.encode(features) - expected).abs().max() < 1e-5


def test_the_loss_is_that_of_transformers() -> None:
    model = small_model()
    features = torch.randn(2, SMALL.mels, 2 * SMALL.audio_positions)
    tokens = torch.tensor([[301, 302, 304, 308, 5, 6, 300], [301, 302, 304, 308, 7, 300, -100]])
    noisy = tokens[:, :-1].clamp(min=0)
    frames, ones = torch.tensor([200, 200]), torch.tensor([1, 1])
    with torch.no_grad():
        entropy, ctc = model.losses(features, frames, tokens, noisy, torch.tensor([[1], [2]]), ones)
        theirs = model.whisper(input_features=features, decoder_input_ids=noisy, labels=tokens[:, 1:]).loss
    assert abs(entropy - theirs) < 1e-5
    assert ctc > 0


def test_greedy_decoding_equals_transformers_generate() -> None:
    model = small_model(1)
    features = torch.randn(2, SMALL.mels, 2 * SMALL.audio_positions)
    prompt = [301, 302, 304, 308]
    ids = torch.tensor([prompt, prompt])
    with torch.no_grad():
        for _ in range(8):
            logits = model.whisper(input_features=features, decoder_input_ids=ids).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    expected = [row[: row.index(300)] if 300 in row else row for row in ids[:, 4:].tolist()]
    assert model.greedy(features, prompt, 300, 8) == expected


def test_muon_updates_are_nearly_orthogonal() -> None:
    torch.manual_seed(0)
    for shape in ((3, 16, 16), (2, 8, 24), (2, 24, 8)):
        values = torch.linalg.svdvals(orthogonalized(torch.randn(shape)).float())
        assert values.min() > 0.5, values
        assert values.max() < 1.4, values


def test_muon_descends() -> None:
    torch.manual_seed(0)
    target = torch.randn(8, 12)
    parameter = torch.nn.Parameter(torch.zeros(8, 12))
    optimizer = Muon([parameter], lr=0.2, weight_decay=0.0)
    losses = []
    for _ in range(60):
        loss = (parameter - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


# ---- batches ----


def test_every_utterance_is_in_one_batch_of_bounded_size() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(40, 700) for _ in range(5000)]
    batches = epoch_batches(lengths, 4000, "seed")
    assert sorted(itertools.chain.from_iterable(batches)) == list(range(5000))
    assert all(max(lengths[index] for index in batch) * len(batch) <= 4000 for batch in batches)
    assert batches == epoch_batches(lengths, 4000, "seed")
    assert batches != epoch_batches(lengths, 4000, "another")


def example(frames: int, tokens: int) -> Example:
    return Example(np.full((frames, SMALL.mels), -3, np.float16), [*range(tokens)], [1] * (tokens - 1))


def test_collate_pads_with_silence_and_ignored_targets() -> None:
    batch = collate([example(30, 4), example(51, 7)], random.Random(1))
    assert batch.power.shape[0] == 2
    assert batch.power.shape[2] % 2 == 0
    for row, frames in zip(batch.power, batch.frames.tolist(), strict=True):
        assert (row[:, frames:] == SILENCE).all()
    assert [(row == -3).any(0).sum().item() for row in batch.power] == [30, 51]
    assert batch.tokens[0].tolist() == [0, 1, 2, 3, -100, -100, -100, -100]
    assert batch.lengths.tolist() == [3, 6]


def test_augmentation_changes_everything_at_full_strength_and_nothing_at_none() -> None:
    generator = torch.Generator().manual_seed(0)
    power = torch.randn(6, 40, 120, generator=generator) - 3
    frames = torch.full((6,), 110)
    same, still = augmented(power, frames, Augmentation(strength=0), generator)
    assert same is power
    assert still is frames
    changed, lengths = augmented(power, frames, Augmentation(), generator)
    assert changed.shape[:2] == power.shape[:2]
    assert torch.isfinite(changed).all()
    assert (lengths != 110).any()
    assert ((lengths >= 0.86 * 110) & (lengths <= 1.16 * 110)).all()


def test_the_schedule_warms_up_and_ends_at_zero() -> None:
    schedule = Schedule(total=100_000)
    rates = [schedule.rate(seen) for seen in range(0, 100_001, 500)]
    assert rates[0] < 0.01
    assert max(rates) == 1
    assert rates[-1] == 0
    assert schedule.strength(0) == 0
    assert schedule.strength(10**6) == 1
    assert schedule.frames(0) < schedule.frames(99_999)


# ---- the whole ----


def test_the_tokenizer_is_whispers(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["set an alarm for the morning", "start a timer", "play it again please"] * 20, 280)
    assert len(tokenizer) == 280 + len(SPECIAL_TOKENS)
    ids = tokenizer("set an alarm").input_ids
    assert ids[:4] == prompt_ids(tokenizer)
    assert ids[-1] == tokenizer.eos_token_id == 280
    assert tokenizer.decode(tokenizer(" play it again", add_special_tokens=False).input_ids) == " play it again"


def made_examples() -> list[Example]:
    rng = np.random.default_rng(0)
    return [
        Example(
            rng.normal(-3, 1, (int(rng.integers(40, 90)), SMALL.mels)).astype(np.float16),
            [301, 302, 304, 308, *rng.integers(0, 300, 5).tolist(), 300],
            rng.integers(1, 6, 4).tolist(),
        )
        for _ in range(60)
    ]


SCHEDULE = Schedule(total=400, warmup=50, few_frames=400, many_frames=800, many_from=150, clean_until=100, save_every=0)


def weights(model: TinyWhisper) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_training_learns(tmp_path: Path, one_torch_thread: None) -> None:
    torch.manual_seed(0)
    model = TinyWhisper(make_config(SMALL, 309, 300, 301), phonemes=5)
    curve: list[Progress] = []
    train(
        model, made_examples(), Schedule(total=3000, warmup=50, few_frames=400, many_frames=400), tmp_path, curve.append
    )
    assert curve[-1].entropy < 0.8 * curve[0].entropy
    assert len((tmp_path / "curve.jsonl").read_text().splitlines()) == len(curve)


class _StopError(Exception):
    """Ends a run where the test wants it."""


def test_a_stopped_run_ends_with_the_same_weights(tmp_path: Path, one_torch_thread: None) -> None:
    def run(folder: Path, stop_after: int | None = None) -> TinyWhisper:
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model = TinyWhisper(make_config(SMALL, 309, 300, 301), phonemes=5)
        examples = made_examples()
        if stop_after is not None:
            examples = _Stopping(examples, stop_after)
        train(model, examples, SCHEDULE, folder, lambda _: None)
        return model

    whole = run(tmp_path / "whole")
    with pytest.raises(_StopError):
        run(tmp_path / "stopped", stop_after=230)
    resumed = run(tmp_path / "stopped")
    assert all(torch.equal(one, other) for one, other in zip(weights(whole), weights(resumed), strict=True))


class _Stopping(list[Example]):
    """A training set that fails after so many utterances were taken."""

    def __init__(self, examples: list[Example], left: int) -> None:
        super().__init__(examples)
        self.left = left

    def __getitem__(self, index):  # type: ignore[no-untyped-def,override]
        self.left -= 1
        if self.left < 0:
            raise _StopError
        return super().__getitem__(index)


def options(tmp_path: Path, **changes: int) -> BaseOptions:
    return BaseOptions(
        tmp_path / "base", tmp_path / "work", **{"sentences": 1000, "heard": 40, "workers": 1, **changes}
    )


def test_bad_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="sentences=5"):
        options(tmp_path, sentences=5)
    (tmp_path / "base").mkdir()
    with pytest.raises(OptionError, match="exists"):
        options(tmp_path)


def test_a_working_folder_of_other_options_is_refused(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work/options.json").write_text(json.dumps({"sentences": 5000, "vocabulary": 1200, "seed": 0}))
    with pytest.raises(TrainingError, match="5000"):
        train_base(options(tmp_path), print)


@needs_voices
@pytest.mark.soak
def test_a_killed_recipe_goes_on_and_writes_a_checkpoint(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from das_asr.training.base.recipe import BaseOptions, train_base
train_base(BaseOptions(Path({str(tmp_path / "base")!r}), Path({str(tmp_path / "work")!r}),
                       sentences=1000, heard=400, workers=2), print)
"""
    running = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 120
    while not list((tmp_path / "work/prepared").glob("shard-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    running.kill()
    running.wait()
    assert not (tmp_path / "base").exists()
    subprocess.run([sys.executable, "-c", code], check=True)
    config = json.loads((tmp_path / "base/config.json").read_text())
    assert config["d_model"] == 192
    assert sum(path.stat().st_size for path in (tmp_path / "base").iterdir()) < 12e6
    rows = load_prepared(tmp_path / "work/prepared").rows
    assert 980 <= len(rows) <= 1000
    assert any(is_held_out(row) for row in rows)
