"""Benchmarks: random checkpoints, the PyTorch baselines against each other, measuring, and the tables."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from das_asr.benchmarks import machine, models, report
from das_asr.benchmarks.audio import window_audio
from das_asr.benchmarks.baselines import MixedBatch, SequentialDecodes, SequentialLora, TransformersGenerate
from das_asr.benchmarks.bundles import bundle_for
from das_asr.benchmarks.free import FreeOptions
from das_asr.benchmarks.kinds import read_results
from das_asr.benchmarks.memory import measure_memory, peak_memory
from das_asr.benchmarks.rtf import RtfOptions, agreement, interleave
from das_asr.benchmarks.systems import Work, open_system, system_names
from das_asr.benchmarks.torchloop import choose, paper_row
from das_asr.benchmarks.vocabulary import Vocabulary
from das_asr.runtime.errors import OptionError
from das_asr.runtime.manifest import read_manifest, write_manifest

SMALL = models.RandomShape(
    d_model=64, layers=2, heads=4, ffn=128, window_seconds=2, text_positions=32,
    vocabulary=Vocabulary(text_tokens=400, languages=("en", "de")),
)  # fmt: skip
TOKENS = 12
RANK = 4


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    threads = torch.get_num_threads()  # the baselines set them
    with machine.quiet_libraries():
        yield
    torch.set_num_threads(threads)


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
        "<|translate|>": 50358, "<|transcribe|>": 50359, "<|startofprev|>": 50361, "<|notimestamps|>": 50363,
        "<|0.00|>": 50364, "<|30.00|>": 51864,
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


def test_all_systems_write_on_where_the_model_would_end(work: Work, tmp_path: Path) -> None:
    audio = window_audio(work.checkpoint)
    tokens = TransformersGenerate(work).transcribe(audio).tokens
    checkpoint = tmp_path / "early"
    shutil.copytree(work.checkpoint, checkpoint)
    config = models.read_json(checkpoint / "generation_config.json")
    (checkpoint / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": tokens[3]}))
    free = TransformersGenerate(Work(checkpoint, (), None)).transcribe(audio).tokens
    assert free == tokens[: tokens.index(tokens[3])]
    forced = Work(checkpoint, (), TOKENS)
    written = [system(forced).transcribe(audio).tokens for system in (TransformersGenerate, SequentialLora)]
    assert written[0] == written[1]
    assert len(written[0]) == TOKENS
    assert tokens[3] not in written[0]


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
    assert utterance.host > 0
    # What is missing is the decoder's own time.
    assert utterance.features + utterance.encoder + utterance.host + (utterance.selection or 0) < utterance.total
    assert (utterance.selection is None) == (name == "transformers")


# The runtime beside them


@pytest.fixture(scope="module")
def exported(work: Work, tmp_path_factory: pytest.TempPathFactory) -> Work:
    """The same work with a bundle."""
    cache = tmp_path_factory.mktemp("cache") / "das-asr"
    with machine.quiet_libraries():
        bundle = bundle_for(work.checkpoint, work.adapters, RANK, lambda _: None, cache)
    return dataclasses.replace(work, bundle=bundle)


def test_the_runtime_writes_what_the_baselines_write(exported: Work) -> None:
    audio = window_audio(exported.checkpoint)
    taken = interleave({name: open_system(name, exported) for name in system_names(2)}, audio, 1, 0)
    counted = agreement(taken, 2)
    assert {name: item["with"] for name, item in counted.items()} == {
        "transformers": "transformers", "sequential-lora": "sequential-lora",
        "sequential-decodes": "sequential-decodes", "peft-mixed": "sequential-lora",
        "peft-forward": "sequential-lora", "das": "sequential-lora", "das-hypothesis": "sequential-decodes",
    }  # fmt: skip
    assert all(item["equal"] == item["of"] == TOKENS for item in counted.values())
    assert taken["das"][0].rows == taken["sequential-lora"][0].rows
    ours = taken["das"][0]
    assert len(ours.steps) == TOKENS - 1
    assert min(ours.features, ours.encoder, ours.prefill, *ours.steps) > 0
    assert ours.features + ours.encoder + ours.prefill + sum(ours.steps) < ours.total
    assert ours.host is not None
    assert ours.host > 0
    assert ours.features + ours.encoder + ours.host < ours.total


def test_bundles_are_kept_until_what_they_are_made_of_changes(exported: Work, tmp_path: Path) -> None:
    assert exported.bundle is not None
    cache, said = exported.bundle.parent.parent, []
    assert bundle_for(exported.checkpoint, exported.adapters, RANK, said.append, cache) == exported.bundle
    assert not said
    outdated = tmp_path / "bundles" / "small-k0-r4-0123456789ab"
    outdated.mkdir(parents=True)
    fresh = bundle_for(exported.checkpoint, (), RANK, said.append, tmp_path)
    assert list((tmp_path / "bundles").iterdir()) == [fresh]
    assert len(said) == 1


def test_the_precision_that_is_asked_for_is_opened(exported: Work, tmp_path: Path) -> None:
    """Not the bundle's first, which has no graphs here."""
    assert exported.bundle is not None
    bundle = tmp_path / "bundle"
    shutil.copytree(exported.bundle, bundle)
    write_manifest(dataclasses.replace(read_manifest(bundle), precisions=("int8", "fp32")), bundle)
    system = open_system("das", dataclasses.replace(exported, bundle=bundle))
    assert len(system.transcribe(window_audio(exported.checkpoint)).tokens) == TOKENS
    system.close()
    like = RtfOptions(precision="int8")
    free = FreeOptions.of([tmp_path], bundle, like)
    assert free is not None
    assert free.precision == "int8"
    with pytest.raises(OptionError, match="precision is 'int8'"):
        FreeOptions.of([tmp_path], exported.bundle, like)


def test_silence_is_measured_too(exported: Work) -> None:
    system = open_system("das", dataclasses.replace(exported, tokens=None))
    utterance = system.transcribe(np.zeros(16000, np.float32))
    assert (utterance.tokens, utterance.steps, utterance.prefill) == ((), (), 0)


# Measuring


def test_peak_memory_is_of_the_process_alone(exported: Work) -> None:
    weight = np.ones(600 * 2**20 // 8)  # a child that took over its parent's mark would show at least this
    # Without torch in its process the runtime stays far below any PyTorch system.
    assert 20 < measure_memory("das", exported) < 250
    del weight
    assert peak_memory() > 600


# The command


def test_rtf_command_measures_in_its_own_process(exported: Work, tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    for name in ("a.wav", "b.wav"):
        soundfile.write(clips / name, window_audio(exported.checkpoint)[:16000], 16000)
    output = tmp_path / "r.json"
    command = [
        sys.executable,
        "-m",
        "das_asr.benchmarks.cli",
        "rtf",
        "--model",
        exported.checkpoint,
        "--output",
        output,
    ]
    command += ["--domains", "2", "--rank", RANK, "--tokens", 5, "--repeats", 2, "--warmup", 0, "--no-memory"]
    command += ["--audio", clips, "--bundle", exported.bundle]
    assert exported.bundle is not None
    cache = exported.bundle.parent.parent
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache.parent)}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"output": str(output), "runs": 7}
    # The same adapters, drawn again, so the same bundle is used again.
    assert list(cache.glob("bundles/*-k2-*")) == [exported.bundle]
    (result,) = read_results([output])
    assert all(run["agreement"]["equal"] == 5 and run["repeatable"] for run in result["runs"])
    assert result["free_running"]["files"] == 2
    assert result["free_running"]["audio_seconds"] == 2
    assert "DAS, own histories" in report.render_report([result])
    refused = subprocess.run(
        [*map(str, command), "--tokens", "99"], capture_output=True, text=True, check=False, env=environment
    )
    assert refused.returncode == 1
    assert refused.stderr.strip() == "Error: --tokens 99: this model writes at most 28 after its prompt. Ask for fewer."
