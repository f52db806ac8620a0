"""An encoder that hears the audio and a margin: the graph against transformers, and the option end to end."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from das_asr.export.onnx import ENCODER_FILE
from das_asr.runtime import BundleError, DecodingOptions, OptionError, Transcriber
from das_asr.runtime.backends.onnxruntime import OnnxRuntimeBackend
from das_asr.runtime.features import LogMel
from das_asr.runtime.manifest import AudioFrontEnd, read_manifest

Clips = list[tuple[Path, str, str]]

FRONT_END = AudioFrontEnd(sample_rate=16_000, n_fft=400, hop_length=160, window_samples=8 * 16_000)


def noise(seconds: float, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(0, 0.1, round(16_000 * seconds)).astype(np.float32)


# --- Features ---


@pytest.mark.parametrize(
    ("seconds", "margin", "frames"),
    [((1.0,), 0.0, 200), ((0.98,), 0.0, 100), ((1.0,), 1.0, 200), ((1.0, 2.5), 0.5, 300), ((7.5,), 2.0, 800)],
)
def test_features_of_a_part_are_those_of_the_window(seconds: tuple[float, ...], margin: float, frames: int) -> None:
    """A whole number of seconds that holds the longest with its margin, never more than the window."""
    features, utterances = LogMel(FRONT_END, 80), [noise(length, seed) for seed, length in enumerate(seconds)]
    part, window = features.batch(utterances, margin), features.batch(utterances)
    assert part.shape == (len(seconds), 80, frames)
    assert window.shape[2] == 800
    assert np.array_equal(part, window[:, :, :frames])


# --- The graph ---


def test_fewer_frames_give_what_transformers_gives(demo_bundle: Path, demo_base: Path) -> None:
    import torch
    from transformers import WhisperModel

    dims, frames = read_manifest(demo_bundle).dimensions, 260
    features = LogMel(FRONT_END, dims.mels).batch([noise(2.0), noise(1.2, 1)])[:, :, :frames]
    model = WhisperModel.from_pretrained(demo_base, dtype=torch.float32).eval()
    encoder, attention = model.get_encoder(), model.decoder.layers[0].encoder_attn
    # transformers refuses other lengths than its position table has.
    encoder.embed_positions = torch.nn.Embedding.from_pretrained(encoder.embed_positions.weight[: frames // 2])
    encoder.config.max_source_positions = frames // 2
    with torch.no_grad():
        heard = encoder(torch.from_numpy(features)).last_hidden_state
        keys = attention.k_proj(heard).reshape(2, frames // 2, dims.decoder_heads, dims.head_size)
    expected = keys.permute(0, 2, 1, 3).numpy() * dims.head_size**-0.5
    session = onnxruntime.InferenceSession(demo_bundle / ENCODER_FILE)
    (found,) = session.run(["cross_k0"], {"features": features})
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


# --- The option ---


@pytest.fixture(scope="module")
def transcriber(demo_bundle: Path) -> Iterator[Transcriber]:
    with Transcriber.load(demo_bundle, threads=1) as loaded:
        yield loaded


def test_a_window_full_of_audio_and_margin_is_the_window(transcriber: Transcriber, demo_audio: Clips) -> None:
    for path, _, _ in demo_audio[:3]:
        whole = transcriber.transcribe(path, language="en")
        fitted = transcriber.transcribe(path, language="en", audio_context="fit", audio_margin=30.0)
        assert (fitted.text, fitted.provenance) == (whole.text, whole.provenance)


def test_the_demo_model_understands_as_much_without_the_rest_of_the_window(
    transcriber: Transcriber, demo_audio: Clips, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[int] = []
    encode = OnnxRuntimeBackend.encode

    def noting(self: Any, features: Any, stack: Any) -> Any:
        heard.append(features.shape[2])
        return encode(self, features, stack)

    monkeypatch.setattr(OnnxRuntimeBackend, "encode", noting)
    clips = [path for path, _, _ in demo_audio]
    whole = [transcriber.transcribe(clip, language="en").text for clip in clips]
    assert set(heard) == {800}
    heard.clear()
    fitted = [transcriber.transcribe(clip, language="en", audio_context="fit").text for clip in clips]
    assert set(heard) <= {300, 400, 500}
    assert sum(one == other for one, other in zip(fitted, whole, strict=True)) >= len(clips) - 2


def test_a_batch_hears_as_much_as_its_longest_utterance_needs(transcriber: Transcriber, demo_audio: Clips) -> None:
    clips = [path for path, _, _ in demo_audio]
    together = transcriber.transcribe_batch(clips, language="en", audio_context="fit")
    longest = max(together, key=lambda result: result.duration)
    alone = transcriber.transcribe(clips[together.index(longest)], language="en", audio_context="fit")
    assert alone.tokens == longest.tokens


def test_submitted_utterances_share_a_lane_with_those_of_their_length(
    transcriber: Transcriber, demo_audio: Clips
) -> None:
    clips = [path for path, _, _ in demo_audio[:6]]
    contexts: list[dict[str, Any]] = [{"audio_context": "fit"}, {}]
    futures = [transcriber.submit(clip, language="en", **choice) for clip in clips for choice in contexts]
    expected = [transcriber.transcribe(clip, language="en", **choice) for clip in clips for choice in contexts]
    assert [future.result().tokens for future in futures] == [result.tokens for result in expected]


def test_a_bundle_that_takes_whole_windows_says_so(
    demo_bundle: Path, demo_audio: Clips, tmp_path: Path, transcriber: Transcriber
) -> None:
    manifest = read_manifest(demo_bundle)
    shutil.copytree(demo_bundle, tmp_path / "older")
    model = onnx.load(demo_bundle / ENCODER_FILE, load_external_data=False)
    shape = next(given for given in model.graph.input if given.name == "features").type.tensor_type.shape
    shape.dim[2].Clear()
    shape.dim[2].dim_value = manifest.dimensions.frames
    onnx.save(model, tmp_path / "older" / ENCODER_FILE)
    clip = demo_audio[0][0]
    with Transcriber.load(tmp_path / "older", threads=1, verify_files=False) as older:
        assert older.transcribe(clip, language="en").text == transcriber.transcribe(clip, language="en").text
        with pytest.raises(BundleError, match=r"whole windows of 800 frames, not 300\. Export it again"):
            older.transcribe(clip, language="en", audio_context="fit")


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"audio_context": "short"}, "audio_context is 'short', expected one of window, fit"),
        ({"audio_context": "fit", "audio_margin": -1.0}, "expected seconds, 0 or more"),
        ({"audio_margin": 2.0}, "belongs to audio_context='fit', but that is 'window'"),
    ],
)
def test_options_that_make_no_sense_are_refused(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DecodingOptions(**choices)
