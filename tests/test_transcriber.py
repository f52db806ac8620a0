"""The public class on the demo bundle: what goes in, what comes out, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from das_asr.runtime import (
    AudioError,
    BackendError,
    BundleError,
    ClosedError,
    DecodingOptions,
    OptionError,
    Transcriber,
    Transcription,
)
from das_asr.runtime.backends import BackendOptions
from das_asr.runtime.backends.sessions import open_session
from das_asr.runtime.manifest import MANIFEST_NAME, read_manifest, write_manifest
from das_asr.runtime.selection import RULES
from tests.bundles import make_bundle
from tests.checkpoints import make_base

Clips = list[tuple[Path, str, str]]


@pytest.fixture(scope="module")
def demo(demo_bundle: Path) -> Iterator[Transcriber]:
    with Transcriber.load(demo_bundle, threads=1) as transcriber:
        yield transcriber


@pytest.fixture
def clip(demo_audio: Clips) -> Path:
    return demo_audio[4][0]


def said(result: Transcription) -> dict[str, Any]:
    """All of a result but its timings."""
    return {key: value for key, value in result.to_dict().items() if key != "timings"}


def noise(seconds: float, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 0.1, round(16000 * seconds)).astype(np.float32)


# --- What goes in ---


def test_a_path_a_file_bytes_and_samples_give_the_same(demo: Transcriber, clip: Path) -> None:
    samples, rate = soundfile.read(clip, dtype="float32")
    expected = said(demo.transcribe(clip))
    assert expected["text"]
    with clip.open("rb") as handle:
        assert said(demo.transcribe(handle)) == expected
    assert said(demo.transcribe(str(clip))) == expected
    assert said(demo.transcribe(clip.read_bytes())) == expected
    assert said(demo.transcribe(io.BytesIO(clip.read_bytes()))) == expected
    assert said(demo.transcribe(samples, sample_rate=rate)) == expected


def test_options_as_an_object_and_as_keywords_give_the_same(demo: Transcriber, clip: Path) -> None:
    as_object = demo.transcribe(clip, DecodingOptions(rule="gain", tau=0.1))
    assert said(as_object) == said(demo.transcribe(clip, rule="gain", tau=0.1))
    with pytest.raises(OptionError, match="options and language, tau were given"):
        demo.transcribe(clip, DecodingOptions(), tau=0.1, language="en")


@pytest.mark.parametrize("rule", ["hypothesis", "paper"])
def test_a_batch_of_different_lengths_is_what_each_would_be_alone(
    demo: Transcriber, demo_audio: Clips, rule: str
) -> None:
    paths = [path for path, _, _ in demo_audio[:4]]
    for together, path in zip(demo.transcribe_batch(paths, rule=rule), paths, strict=True):
        alone = demo.transcribe(path, rule=rule)
        assert together.text == alone.text
        assert together.tokens == alone.tokens
        assert [token.row for token in together.provenance] == [token.row for token in alone.provenance]
        assert [item.tokens for item in together.hypotheses] == [item.tokens for item in alone.hypotheses]
        scores = [[token.logprob for token in result.provenance] for result in (together, alone)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)
        assert together.duration == alone.duration


def test_an_empty_batch_has_no_results(demo: Transcriber) -> None:
    assert demo.transcribe_batch([]) == []


# --- Audio that cannot be transcribed ---


@pytest.mark.parametrize("rule", RULES)
def test_digital_silence_is_an_empty_text(demo: Transcriber, rule: str) -> None:
    result = demo.transcribe(np.zeros(16000, np.float32), sample_rate=16000, rule=rule)
    assert (result.text, result.tokens, result.words, result.provenance) == ("", (), (), ())
    assert result.finished
    assert result.no_speech_prob == 1.0
    assert (result.rule, result.language, result.duration) == (rule, "en", 1.0)
    json.dumps(result.to_dict(), allow_nan=False)


def test_silence_keeps_its_place_in_a_batch(demo: Transcriber, demo_audio: Clips) -> None:
    samples = [soundfile.read(path, dtype="float32")[0] for path, _, _ in demo_audio[:2]]
    silence = np.zeros(8000, np.float32)
    results = demo.transcribe_batch([silence, samples[0], silence, samples[1]], sample_rate=16000)
    alone = [demo.transcribe(utterance, sample_rate=16000).text for utterance in samples]
    assert [result.text for result in results] == ["", alone[0], "", alone[1]]
    assert results[2].duration == 0.5


def test_options_are_checked_for_silence_too(demo: Transcriber) -> None:
    silence = np.zeros(16000, np.float32)
    with pytest.raises(OptionError, match="klingon"):
        demo.transcribe(silence, sample_rate=16000, language="klingon")
    with pytest.raises(OptionError, match="suppress_tokens has 99999"):
        demo.transcribe(silence, sample_rate=16000, suppress_tokens=[99999])


def not_audio(kind: str, clip: Path, folder: Path) -> Any:
    """Something that is no utterance, by what is wrong with it."""
    path = folder / f"{kind}.wav"
    if kind == "short":
        return noise(0.01)
    if kind == "nan":
        samples = noise(1)
        samples[800] = math.nan
        return samples
    if kind == "long":
        return noise(8.01)
    if kind == "text":
        path.write_text("this is not audio, whatever its name says\n" * 20, encoding="utf-8")
    elif kind == "cut":
        path.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    elif kind == "empty":
        path.touch()
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("short", r"0\.010 s"),
        ("nan", "NaN"),
        ("long", r"8\.01 s, but this model hears 8 s"),
        ("text", r"text\.wav"),
        ("cut", r"cut\.wav"),
        ("empty", r"empty\.wav is empty"),
        ("missing", r"missing\.wav does not exist"),
    ],
)
def test_what_is_no_utterance_is_refused(
    demo: Transcriber, clip: Path, tmp_path: Path, kind: str, message: str
) -> None:
    audio = not_audio(kind, clip, tmp_path)
    rate = 16000 if isinstance(audio, np.ndarray) else None
    with pytest.raises(AudioError, match=message):
        demo.transcribe(audio, sample_rate=rate)
    assert demo.transcribe(clip).text  # and nothing is left broken


@pytest.mark.parametrize("seconds", [0.1, 8.0])
def test_the_shortest_and_the_longest_audio_are_transcribed(demo: Transcriber, seconds: float) -> None:
    result = demo.transcribe(noise(seconds), sample_rate=16000)
    assert result.duration == seconds
    assert result.provenance


# --- Options ---


def test_the_only_language_is_given_by_code_or_name_and_another_is_refused(demo: Transcriber, clip: Path) -> None:
    expected = said(demo.transcribe(clip))
    assert expected["language"] == "en"
    assert said(demo.transcribe(clip, language="en")) == expected
    assert said(demo.transcribe(clip, language="English")) == expected
    with pytest.raises(OptionError, match="'de' is unknown to this model, which knows en"):
        demo.transcribe(clip, language="german")


def scores(result: Transcription) -> list[float]:
    return [token.logprob for token in result.provenance]


def test_task_and_prompt_are_heard(demo: Transcriber, clip: Path) -> None:
    plain = scores(demo.transcribe(clip))
    assert scores(demo.transcribe(clip, task="translate")) != pytest.approx(plain, abs=1e-4)
    assert scores(demo.transcribe(clip, prompt="bruno mars")) != pytest.approx(plain, abs=1e-4)
    assert scores(demo.transcribe(clip, prompt="  ")) == plain
    assert demo.transcribe(clip, prompt="a very long story " * 50).provenance


@pytest.mark.parametrize("rule", RULES)
def test_a_suppressed_token_is_written_by_no_row(demo: Transcriber, clip: Path, rule: str) -> None:
    free = demo.transcribe(clip, rule=rule)
    banned = free.tokens[:3]
    held = demo.transcribe(clip, rule=rule, suppress_tokens=banned)
    assert held.provenance
    written = {token for step in held.provenance for token in step.candidates}
    written |= {token for item in held.hypotheses for token in item.tokens}
    assert not written & set(banned)


def test_what_the_bundle_suppresses_first_is_free_afterwards(demo_bundle: Path, tmp_path: Path, clip: Path) -> None:
    with Transcriber.load(demo_bundle, threads=1) as transcriber:
        first, *rest = transcriber.transcribe(clip, rule="base").tokens
    copy = shutil.copytree(demo_bundle, tmp_path / "bundle")
    write_manifest(dataclasses.replace(read_manifest(copy), begin_suppress_tokens=(first,)), copy)
    with Transcriber.load(copy, threads=1) as transcriber:
        assert transcriber.transcribe(clip, rule="base").tokens[0] != first
    write_manifest(dataclasses.replace(read_manifest(copy), begin_suppress_tokens=(rest[0],)), copy)
    with Transcriber.load(copy, threads=1) as transcriber:
        assert transcriber.transcribe(clip, rule="base").tokens == (first, *rest)


def test_max_tokens_cuts_the_text_short(demo: Transcriber, clip: Path) -> None:
    whole = demo.transcribe(clip)
    cut = demo.transcribe(clip, max_tokens=3)
    assert whole.finished
    assert not cut.finished
    assert [len(item.tokens) for item in cut.hypotheses] == [3] * 4
    assert cut.hypotheses[0].tokens == whole.hypotheses[0].tokens[:3]
    assert len(cut.provenance) == 3


@pytest.mark.parametrize("names", [("sports",), ("weather", "music"), ()], ids=["one", "reversed", "none"])
def test_a_subset_of_adapters_is_a_bundle_of_only_those(
    demo: Transcriber,
    demo_base: Path,
    demo_adapters: dict[str, Path],
    demo_audio: Clips,
    tmp_path: Path,
    names: tuple[str, ...],
) -> None:
    bundle = make_bundle(demo_base, {name: demo_adapters[name] for name in names}, tmp_path / "bundle")
    with Transcriber.load(bundle, threads=1) as only:
        for (path, _, _), rule in product(demo_audio[:3], ("hypothesis", "gain")):
            here, there = demo.transcribe(path, adapters=names, rule=rule), only.transcribe(path, rule=rule)
            assert here.rows == there.rows == ("base", *names)
            assert here.tokens == there.tokens
            assert [token.row for token in here.provenance] == [token.row for token in there.provenance]
            assert scores(here) == pytest.approx(scores(there), abs=1e-4)


def test_an_adapter_that_is_not_there_is_refused(demo: Transcriber, clip: Path) -> None:
    with pytest.raises(OptionError, match="no adapter 'cooking'; loaded: music, weather, sports"):
        demo.transcribe(clip, adapters=("music", "cooking"))
    with pytest.raises(OptionError, match="Two adapters are named 'music'"):
        demo.transcribe(clip, adapters=("music", "music"))


def test_the_base_cannot_be_left_out_where_there_is_nothing_else(demo_base: Path, tmp_path: Path, clip: Path) -> None:
    with Transcriber.load(make_bundle(demo_base, {}, tmp_path / "bundle"), threads=1) as transcriber:
        with pytest.raises(OptionError, match="include_base=False"):
            transcriber.transcribe(clip, include_base=False)
        assert transcriber.transcribe(clip).adapter == "base"


def test_scoring_is_refused_where_the_bundles_own_rule_has_none(demo_base: Path, tmp_path: Path, clip: Path) -> None:
    with Transcriber.load(make_bundle(demo_base, {}, tmp_path / "bundle", rule="paper"), threads=1) as transcriber:
        assert transcriber.transcribe(clip).rule == "paper"
        with pytest.raises(OptionError, match="score belongs to rule='hypothesis', but rule is 'paper'"):
            transcriber.transcribe(clip, score="total")


# --- What comes out ---


@pytest.mark.parametrize("rule", RULES)
def test_a_result_is_consistent_and_fits_json(demo: Transcriber, clip: Path, rule: str) -> None:
    result = demo.transcribe(clip, rule=rule)
    copy = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert copy["text"] == result.text == "".join(word.word for word in result.words).strip()
    assert tuple(token for word in result.words for token in word.tokens) == result.tokens
    assert tuple(token.id for token in result.provenance)[: len(result.tokens)] == result.tokens
    assert len(result.provenance) == len(result.tokens) + result.finished
    assert result.rows == ("base", "music", "weather", "sports")
    assert result.avg_logprob == pytest.approx(float(np.mean(scores(result))))
    for token in result.provenance:
        assert token.adapter == result.rows[token.row]
        assert token.candidates[token.row] == token.id
        assert token.confidences[token.row] == pytest.approx(math.exp(token.logprob))
    if rule == "hypothesis":
        winner = max(result.hypotheses, key=lambda item: item.score)
        assert (result.adapter, result.tokens) == (winner.adapter, winner.tokens)


def test_the_base_rule_is_the_base_alone(demo: Transcriber, clip: Path) -> None:
    result = demo.transcribe(clip, rule="base")
    assert {token.row for token in result.provenance} == {0}
    assert result.tokens == demo.transcribe(clip, adapters=(), rule="base").tokens
    assert result.tokens == demo.transcribe(clip, rule="hypothesis").hypotheses[0].tokens


@pytest.mark.parametrize("audio", ["clip", "silence", "batch"])
def test_timings_add_up(demo: Transcriber, clip: Path, audio: str) -> None:
    inputs: dict[str, list[Any]] = {"clip": [clip], "silence": [np.zeros(16000)], "batch": [clip, clip]}
    rate = 16000 if audio == "silence" else None
    results = demo.transcribe_batch(inputs[audio], sample_rate=rate)
    timings = results[0].timings
    parts = vars(timings).keys() - {"audio_duration", "step_count", "step_rows", "total"}
    stages = {name: getattr(timings, name) for name in parts}
    assert min(stages.values()) >= 0
    assert sum(stages.values()) == pytest.approx(timings.total, rel=1e-9)
    assert timings.audio > 0
    assert timings.audio_duration == pytest.approx(sum(result.duration for result in results))
    assert results[0].rtf == timings.total / timings.audio_duration
    runs = [len(item.tokens) + item.finished for item in results[0].hypotheses]
    assert timings.step_count == max(runs, default=1) - 1  # the first token is the prefill's


# --- Loading and closing ---


def test_nothing_works_after_close(demo_bundle: Path, demo_adapters: dict[str, Path], clip: Path) -> None:
    with Transcriber.load(demo_bundle, threads=1) as transcriber:
        assert transcriber.adapters == ("music", "weather", "sports")
    transcriber.close()
    for use in (
        lambda: transcriber.transcribe(clip),
        lambda: transcriber.transcribe_batch([]),
        lambda: transcriber.load_adapter("more", demo_adapters["music"]),
        lambda: transcriber.unload_adapter("music"),
        lambda: transcriber.adapters,
    ):
        with pytest.raises(ClosedError, match="closed"):
            use()


def test_a_context_manager_closes_after_an_error_too(demo_bundle: Path) -> None:
    def fail() -> None:
        with Transcriber.load(demo_bundle, threads=1) as transcriber:
            opened.append(transcriber)
            transcriber.transcribe("nowhere.wav")

    opened: list[Transcriber] = []
    with pytest.raises(AudioError):
        fail()
    with pytest.raises(ClosedError):
        opened[0].transcribe("nowhere.wav")


def test_any_changed_file_is_noticed_before_anything_runs(demo_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(demo_bundle, tmp_path / "bundle")
    names = read_manifest(copy).files
    assert {"encoder.onnx", "decoder.onnx", "tokenizer.json"} <= names.keys()
    for name in names:
        content = (copy / name).read_bytes()
        middle = len(content) // 2
        (copy / name).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        with pytest.raises(BundleError, match=f"{name} differs"):
            Transcriber.load(copy)
        (copy / name).write_bytes(content)


def test_a_graph_that_cannot_be_read_is_told_without_verification(demo_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(demo_bundle, tmp_path / "bundle")
    for content in (b"", b"no graph", (copy / "decoder.onnx").read_bytes()[:5000]):
        (copy / "decoder.onnx").write_bytes(content)
        with pytest.raises(BackendError, match=r"cannot load .*decoder\.onnx"):
            Transcriber.load(copy, verify_files=False)


def test_a_folder_without_a_manifest_is_no_bundle(demo_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(demo_bundle, tmp_path / "bundle")
    (copy / MANIFEST_NAME).unlink()
    with pytest.raises(BundleError, match="is not a bundle"):
        Transcriber.load(copy)


def test_an_unknown_backend_or_device_is_refused(demo_bundle: Path) -> None:
    with pytest.raises(OptionError, match="backend is 'tpu', expected one of: onnxruntime"):
        Transcriber.load(demo_bundle, backend="tpu")
    with pytest.raises(OptionError, match="device is 'gpu'"):
        Transcriber.load(demo_bundle, device="gpu")
    with pytest.raises(OptionError, match="threads is 0"):
        Transcriber.load(demo_bundle, threads=0)


def test_cuda_without_a_cuda_build_is_an_error_and_never_the_cpu(demo_bundle: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this build of ONNX Runtime has CUDA")
    with pytest.raises(BackendError, match=r"no CUDAExecutionProvider .*das-asr\[gpu\]"):
        Transcriber.load(demo_bundle, device="cuda")


def test_a_provider_that_does_not_come_up_is_an_error(demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    opened = onnxruntime.InferenceSession

    def without_cuda(path: Path, settings: Any, providers: list[Any]) -> Any:
        return opened(path, settings, providers=["CPUExecutionProvider"])  # what the engine itself falls back to

    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(onnxruntime, "InferenceSession", without_cuda)
    with pytest.raises(BackendError, match="CUDAExecutionProvider did not come up on device 'cuda:1'"):
        open_session(demo_bundle / "encoder.onnx", BackendOptions("cuda:1"), {provider: {} for provider in providers})


# --- Another window ---


def test_a_window_of_thirty_seconds(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", seconds=30, encoder_layers=1, decoder_layers=1, d_model=32, heads=2)
    with Transcriber.load(make_bundle(base, {}, tmp_path / "bundle"), threads=1) as transcriber:
        for seconds in (3.0, 30.0):
            result = transcriber.transcribe(noise(seconds), sample_rate=16000)
            assert result.provenance
            assert result.language in transcriber.manifest.tokens.languages
            assert 0 <= (result.no_speech_prob or 0) <= 1
        with pytest.raises(AudioError, match="hears 30 s"):
            transcriber.transcribe(noise(30.01), sample_rate=16000)
