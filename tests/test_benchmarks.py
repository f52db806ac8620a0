"""Benchmarks: random checkpoints, the PyTorch baselines against each other, measuring, and the tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from das_asr.benchmarks import machine, models, report
from das_asr.benchmarks.baselines import MixedBatch, SequentialDecodes, SequentialLora, TransformersGenerate
from das_asr.benchmarks.cli import main
from das_asr.benchmarks.memory import measure_memory
from das_asr.benchmarks.rtf import RtfOptions, agreement, interleave, window_audio
from das_asr.benchmarks.systems import SYSTEMS, Work, open_system, system_names
from das_asr.benchmarks.timing import Utterance, percentile, summarize
from das_asr.benchmarks.torchloop import choose, paper_row
from das_asr.benchmarks.vocabulary import Vocabulary
from das_asr.runtime.errors import DasError, OptionError

REPOSITORY = Path(__file__).resolve().parent.parent
SMALL = models.RandomShape(
    d_model=64, layers=2, heads=4, ffn=128, window_seconds=2, text_positions=32,
    vocabulary=Vocabulary(text_tokens=400, languages=("en", "de")),
)  # fmt: skip
TOKENS = 12
RANK = 4


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with machine.quiet_libraries():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with machine.quiet_libraries():
        return models.make_checkpoint(tmp_path_factory.mktemp("models") / "small", SMALL)


@pytest.fixture(scope="module")
def work(checkpoint: Path) -> Work:
    with machine.quiet_libraries():
        folders = models.make_adapters(checkpoint, checkpoint.parent / "adapters", RANK, 2)
    return Work(checkpoint, tuple(folders), TOKENS)


# Random models


def test_default_vocabulary_has_the_published_ids() -> None:
    vocabulary = Vocabulary()
    ids = vocabulary.special_ids(30)
    published = {
        "<|endoftext|>": 50257, "<|startoftranscript|>": 50258, "<|en|>": 50259, "<|su|>": 50357, 
        "<|translate|>": 50358, "<|transcribe|>": 50359, "<|startofprev|>": 50361, "<|notimestamps|>": 50363, "<|0.00|>": 50364,
        "<|30.00|>": 51864,
    }  # fmt: skip
    assert {name: ids[name] for name in published} == published
    assert vocabulary.size(30) == 51865
    assert models.WHISPER_BASE.audio_positions == 1500


def test_checkpoint_is_complete_and_its_files_agree(checkpoint: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(checkpoint)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == model.config.vocab_size == SMALL.vocabulary.size(2)
    assert models.prompt_ids(checkpoint) == [
        tokenizer.token_to_id(f"<|{name}|>") for name in ("startoftranscript", "en", "transcribe", "notimestamps")
    ]
    assert tokenizer.decode(tokenizer.encode("Grüße, 世界").ids) == "Grüße, 世界"
    extractor = WhisperFeatureExtractor.from_pretrained(checkpoint)
    assert extractor.nb_max_frames == 2 * model.config.max_source_positions


def test_checkpoint_and_adapters_are_made_once_and_repeatably(checkpoint: Path, work: Work, tmp_path: Path) -> None:
    before = (checkpoint / "model.safetensors").stat().st_mtime_ns
    assert models.make_checkpoint(checkpoint, SMALL) == checkpoint
    assert (checkpoint / "model.safetensors").stat().st_mtime_ns == before
    again = models.make_adapters(checkpoint, tmp_path / "again", RANK, 2)
    contents = [
        [(folder / "adapter_model.safetensors").read_bytes() for folder in set_] for set_ in (work.adapters, again)
    ]
    assert contents[0] == contents[1]
    assert contents[0][0] != contents[0][1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again"]
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["domain01", "domain02"]


def test_adapters_change_decoder_queries_and_values_only(work: Work) -> None:
    from safetensors.torch import load_file

    tensors = load_file(work.adapters[0] / "adapter_model.safetensors")
    modules = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors}
    expected = {
        f"model.decoder.layers.{layer}.{attention}.{projection}"
        for layer in range(SMALL.layers)
        for attention in ("self_attn", "encoder_attn")
        for projection in ("q_proj", "v_proj")
    }
    assert modules == expected
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())


def test_unknown_model_is_refused() -> None:
    with pytest.raises(OptionError, match="whisper-base-random"):
        models.resolve_model("/nowhere/at/all")


# The paper's rule


@pytest.mark.parametrize(
    ("confidences", "row"),
    [
        ((0.5,), 0),
        ((0.5, 0.5, 0.5), 0),
        ((0.5, 0.51, 0.49), 0),  # both within tau
        ((0.5, 0.6, 0.7), 2),  # the most confident
        ((0.5, 0.7, 0.7), 1),  # a tie goes to the lower row
        ((0.5, 0.4, 0.3), 2),  # only the second condition: the LEAST confident
        ((0.5, 0.3, 0.3), 1),
        ((0.5, 0.3, 0.6), 2),  # both conditions: the first one counts
        ((0.5, 0.625, 0.5), 1),  # exactly tau
        ((0.5, 0.375, 0.5), 1),
    ],
)
def test_paper_rule_is_read_literally(confidences: tuple[float, ...], row: int) -> None:
    assert paper_row(confidences, 0.125 if 0.625 in confidences or 0.375 in confidences else 0.025) == row


def test_choice_takes_token_and_confidence_of_the_chosen_row() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)) * 3
    confidences = logits.softmax(-1).max(-1)
    choice = choose(logits.clone(), 0.025)
    assert choice.row == paper_row(confidences.values.tolist(), 0.025)
    assert choice.token == confidences.indices[choice.row]
    assert choice.confidence == pytest.approx(float(confidences.values[choice.row]), rel=1e-5)


# The baselines


def _row_logits(model: Any, states: torch.Tensor, steps: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits [R, steps, V] of the last position of each run, every row fed the same ids."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    taken = []
    for ids in steps:
        fed = torch.tensor([list(ids)]).expand(len(states), -1)
        output = model.get_decoder()(input_ids=fed, encoder_hidden_states=states, past_key_values=cache, use_cache=True)
        taken.append(model.get_output_embeddings()(output.last_hidden_state[:, -1]))
    return torch.stack(taken, dim=1)


def test_all_baselines_compute_the_same_logits_in_every_row(work: Work) -> None:
    looped, mixed = SequentialLora(work), MixedBatch(work)
    plain = SequentialDecodes(work)
    steps = [models.prompt_ids(work.checkpoint), [7], [300], [41]]
    with torch.inference_mode():
        features = torch.randn(1, SMALL.mels, 200, generator=torch.Generator().manual_seed(0))
        states = plain.model.get_encoder()(features).last_hidden_state
        with plain.peft.disable_adapter():
            rows = [_row_logits(plain.model, states, steps)]
        for name in ("domain01", "domain02"):
            plain.peft.set_adapter(name)
            rows.append(_row_logits(plain.model, states, steps))
        reference = torch.cat(rows)
        by_loop = _row_logits(looped.model, states.expand(3, -1, -1), steps)
        with mixed.mixed():
            by_mix = _row_logits(mixed.model, states.expand(3, -1, -1), steps)
    scale = float(reference.abs().max())
    for row in (1, 2):
        assert float((reference[row] - reference[0]).abs().max()) > 0.02 * scale
    torch.testing.assert_close(by_loop, reference, rtol=0, atol=1e-5 * max(scale, 1))
    torch.testing.assert_close(by_mix, reference, rtol=0, atol=1e-5 * max(scale, 1))


def test_shared_history_baselines_write_the_same_tokens(work: Work) -> None:
    audio = window_audio(work.checkpoint)
    looped, mixed = (system.transcribe(audio) for system in (SequentialLora(work), MixedBatch(work)))
    assert looped.tokens == mixed.tokens
    assert looped.rows == mixed.rows
    assert len(looped.tokens) == TOKENS
    assert len(set(looped.tokens)) > 3
    assert len(set(looped.rows)) > 1


def test_base_decodes_of_all_baselines_equal_generate(work: Work) -> None:
    audio = window_audio(work.checkpoint)
    alone = Work(work.checkpoint, (), TOKENS)
    expected = TransformersGenerate(work).transcribe(audio).tokens
    assert len(expected) == TOKENS
    assert SequentialLora(alone).transcribe(audio).tokens == expected
    decodes = SequentialDecodes(work)
    with torch.inference_mode():
        features = decodes._extractor(audio, sampling_rate=16000, return_tensors="pt").input_features
        hypotheses = decodes.hypotheses(decodes._states(features, 1))
    assert hypotheses[0].tokens == expected
    assert len({hypothesis.tokens for hypothesis in hypotheses}) == 3


def test_cross_attention_is_not_computed_once_per_row(work: Work) -> None:
    system = SequentialLora(work)
    projection = system.model.get_decoder().layers[0].encoder_attn.k_proj
    seen: list[int] = []
    projection.linear.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    system.transcribe(window_audio(work.checkpoint))
    assert seen == [1]


@pytest.mark.parametrize("name", ["transformers", "sequential-lora", "sequential-decodes", "peft-mixed"])
def test_parts_of_an_utterance_add_up(work: Work, name: str) -> None:
    system = open_system(name, work)
    utterance = system.transcribe(window_audio(work.checkpoint))
    system.close()
    decodes = 3 if name == "sequential-decodes" else 1
    assert len(utterance.steps) == decodes * (TOKENS - 1)
    parts = [utterance.features, utterance.encoder, utterance.prefill, *utterance.steps]
    assert min(parts) > 0
    assert 0.5 * utterance.total < sum(parts) < utterance.total
    assert utterance.host is not None
    assert 0 < utterance.host < utterance.total
    assert (utterance.selection is None) == (name == "transformers")
