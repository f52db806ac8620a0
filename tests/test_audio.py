"""Audio in: every format and kind of array gives the same samples, and everything else a message."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from das_asr.runtime.audio import MIN_SECONDS, check_duration, is_silent, load_audio
from das_asr.runtime.errors import AudioError, OptionError
from das_asr.runtime.manifest import AudioFrontEnd

RATE = 16000
WINDOW = AudioFrontEnd(sample_rate=RATE, n_fft=400, hop_length=160, window_samples=8 * RATE)


def tone(hertz: float, seconds: float, rate: int = RATE, level: float = 0.5) -> NDArray[np.float32]:
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def encoded(samples: NDArray[np.generic], rate: int, format_: str = "WAV", subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format_, subtype=subtype)
    return buffer.getvalue()


def loudest(samples: NDArray[np.float32]) -> tuple[float, float]:
    """Frequency in Hz and amplitude of the strongest sine."""
    window = np.hanning(len(samples))
    spectrum = np.abs(np.fft.rfft(samples * window)) * 2 / window.sum()
    best = int(spectrum.argmax())
    return best * RATE / len(samples), float(spectrum[best])


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("format_", ["WAV", "FLAC"])
def test_lossless_files_of_any_rate_and_channels(tmp_path: Path, format_: str, rate: int, channels: int) -> None:
    # The channels differ, and their average is the tone.
    sound = np.outer(tone(1000, 1.5, rate, level=0.2), np.linspace(0.5, 1.5, channels) if channels > 1 else [1.0])
    path = tmp_path / f"sound.{format_.lower()}"
    soundfile.write(path, sound, rate, format=format_)
    samples = load_audio(path)
    assert samples.dtype == np.float32
    assert samples.shape == (24000,)
    assert samples.flags.c_contiguous
    frequency, amplitude = loudest(samples)
    assert frequency == pytest.approx(1000, abs=1)
    assert amplitude == pytest.approx(0.2, rel=0.01)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("format_", "rate"), [("OGG", 22050), ("OGG", 44100), ("MP3", 16000), ("MP3", 44100)])
def test_lossy_files(tmp_path: Path, format_: str, rate: int, channels: int) -> None:
    path = tmp_path / "sound"
    soundfile.write(path, np.repeat(tone(440, 2, rate)[:, None], channels, axis=1), rate, format=format_)
    samples = load_audio(str(path))
    assert len(samples) == 2 * RATE
    frequency, amplitude = loudest(samples)
    assert frequency == pytest.approx(440, abs=1)
    assert amplitude == pytest.approx(0.5, rel=0.05)


def test_opus() -> None:
    samples = load_audio(encoded(tone(440, 2, 48000), 48000, "OGG", "OPUS"))
    assert len(samples) == 2 * RATE
    assert loudest(samples)[0] == pytest.approx(440, abs=1)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_every_sample_width_has_the_same_full_scale(subtype: str) -> None:
    samples = load_audio(encoded(tone(440, 1), RATE, subtype=subtype))
    np.testing.assert_allclose(samples, tone(440, 1), atol=2**-7 if subtype == "PCM_U8" else 2**-15)


@pytest.mark.parametrize("rate", [24000, 44100, 48000, 96000])
def test_resampling_removes_what_the_new_rate_cannot_hold(rate: int) -> None:
    # Left in, 10.5 kHz would come back as 5.5 kHz.
    samples = load_audio(tone(10500, 1, rate, level=0.9), rate)
    middle = samples[1000:-1000]  # the tone's sudden start and end are heard at every rate
    assert np.abs(middle).max() < 1e-4


def test_resampling_keeps_time() -> None:
    # A click after 0.7 s is still after 0.7 s.
    click = np.zeros(44100, np.float32)
    click[30870] = 1.0
    assert np.abs(load_audio(click, 44100)).argmax() == 11200


@settings(deadline=None, max_examples=40)
@given(rate=st.integers(8000, 96000), seconds=st.floats(0.05, 1.0), hertz=st.floats(100, 3000))
def test_resampling_keeps_length_and_level(rate: int, seconds: float, hertz: float) -> None:
    sound = tone(hertz, seconds, rate, level=0.5)
    samples = load_audio(sound, rate)
    assert abs(len(samples) - len(sound) * RATE / rate) <= 1
    assert np.abs(samples).max() < 0.6
    expected = tone(hertz, 1.1, RATE)[: len(samples)]
    np.testing.assert_allclose(samples[200:-200], expected[200:-200], atol=2e-3)


def test_target_rate() -> None:
    assert len(load_audio(tone(440, 1, 16000), 16000, target_rate=8000)) == 8000


def test_path_object_file_object_and_bytes_agree(tmp_path: Path) -> None:
    data = encoded(tone(440, 1, 22050), 22050)
    path = tmp_path / "sound.wav"
    path.write_bytes(data)
    reference = load_audio(path)
    with path.open("rb") as file:
        np.testing.assert_array_equal(load_audio(file), reference)
    for other in (str(path), data, io.BytesIO(data), tone_array(data)):
        np.testing.assert_array_equal(load_audio(*other) if isinstance(other, tuple) else load_audio(other), reference)


def tone_array(data: bytes) -> tuple[NDArray[np.int16], int]:
    samples, rate = soundfile.read(io.BytesIO(data), dtype="int16")
    return samples, rate


def test_the_name_of_a_file_does_not_matter(tmp_path: Path) -> None:
    for suffix in ("mp3", "raw", "txt"):  # libsndfile would take .raw for headerless audio
        path = tmp_path / f"sound.{suffix}"
        path.write_bytes(encoded(tone(440, 1), RATE))
        assert len(load_audio(path)) == RATE


@pytest.mark.parametrize(
    ("dtype", "silence", "scale"),
    [("uint8", 128, 128), ("int16", 0, 2**15), ("int32", 0, 2**31), (">i2", 0, 2**15), ("float32", 0, 1), ("f8", 0, 1)],
)
def test_arrays_of_every_type(dtype: str, silence: int, scale: int) -> None:
    values = np.array([-0.5, 0, 0.25, 0.75])
    array = (values * scale + silence).astype(dtype)
    np.testing.assert_array_equal(load_audio(array, RATE), values.astype(np.float32))
    stereo = np.stack([array, np.full(4, silence, dtype)], axis=1)
    np.testing.assert_array_equal(load_audio(stereo, RATE), (values / 2).astype(np.float32))


def test_array_of_one_channel_and_views() -> None:
    sound = tone(440, 1)
    np.testing.assert_array_equal(load_audio(sound[:, None], RATE), sound)
    np.testing.assert_array_equal(load_audio(np.repeat(sound, 2)[::2], np.int64(RATE)), sound)  # type: ignore[arg-type]


def test_the_rate_of_an_array_is_asked_for() -> None:
    with pytest.raises(OptionError, match="sample_rate"):
        load_audio(tone(440, 1))
    for wrong in (True, 16000.0, "16000"):
        with pytest.raises(OptionError, match="whole number"):
            load_audio(tone(440, 1), wrong)  # type: ignore[arg-type]


def test_the_rate_of_a_file_is_its_own() -> None:
    with pytest.raises(OptionError, match="Leave it out"):
        load_audio(encoded(tone(440, 1), RATE), RATE)


@pytest.mark.parametrize("rate", [-16000, 0, 16, 999, 768001, 2**31, 10**30])
def test_absurd_rates(rate: int) -> None:
    with pytest.raises(AudioError, match="sample rate"):
        load_audio(tone(440, 1), rate)


@pytest.mark.parametrize("rate", [1, 100, 1_000_000, 2**31 - 1])
def test_absurd_rates_in_a_header(rate: int) -> None:
    data = bytearray(encoded(tone(440, 1), RATE))
    data[24:28] = struct.pack("<I", rate)
    with pytest.raises(AudioError, match="sample rate"):
        load_audio(bytes(data))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((), 0.5, np.float32), "shape"),
        (np.zeros((10, 2, 2), np.float32), "shape"),
        (np.zeros(0, np.float32), "no samples"),
        (np.zeros((0, 2), np.float32), "no samples"),
        (np.zeros((100, 0), np.float32), "no samples"),
        (np.zeros((2, 16000), np.float32), "Transpose"),
        (np.zeros(100, np.int8), "dtype int8"),
        (np.zeros(100, np.int64), "dtype int64"),
        (np.zeros(100, np.uint16), "dtype uint16"),
        (np.zeros(100, bool), "dtype bool"),
        (np.zeros(100, complex), "dtype complex"),
        (np.array(["a", "b"]), "dtype"),
        (np.array([None, 1.0]), "dtype object"),
        (np.array([0.0, np.nan, 0.0]), "not finite"),
        (np.array([0.0, np.inf]), "not finite"),
        (np.array([0.0, -np.inf], np.float32), "not finite"),
        (np.array([[np.inf, -np.inf], [0.0, 0.0]]), "not finite"),
        (np.array([0.0, 1e300]), "not finite"),
        (np.full((2, 2), 3e38, np.float32), "not finite"),
        (tone(440, 1) * 32768, "Divide"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arrays_that_are_no_audio(array: NDArray[np.generic], message: str) -> None:
    with pytest.raises(AudioError, match=message):
        load_audio(array, RATE)


def test_missing_file_directory_and_pipe(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"missing\.wav does not exist"):
        load_audio(tmp_path / "missing.wav")
    with pytest.raises(AudioError, match="is a directory"):
        load_audio(tmp_path)
    with pytest.raises(AudioError, match="does not exist"):
        load_audio("sound\0.wav")
    os.mkfifo(tmp_path / "pipe.wav")  # reading it would wait for ever
    with pytest.raises(AudioError, match="not a regular file"):
        load_audio(tmp_path / "pipe.wav")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"this is a text\n" * 1000, "cannot be decoded"),
        (b"RIFF", "cannot be decoded"),
        (bytes(range(256)) * 100, "cannot be decoded"),
    ],
)
def test_files_that_are_no_audio(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "sound.wav"
    path.write_bytes(content)
    for source in (path, content, io.BytesIO(content)):
        with pytest.raises(AudioError, match=message) as caught:
            load_audio(source)
        assert "BytesIO" not in str(caught.value)
    with pytest.raises(AudioError, match=str(path)):
        load_audio(path)


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.6, 0.999])
@pytest.mark.parametrize("format_", ["WAV", "FLAC", "MP3"])
def test_files_that_are_cut_off(format_: str, kept: float) -> None:
    noise = (0.1 * np.random.default_rng(0).standard_normal(3 * RATE)).astype(np.float32)
    data = encoded(noise, RATE, format_)
    assert len(load_audio(data)) == len(noise)
    with pytest.raises(AudioError, match="cut off"):
        load_audio(data[: int(len(data) * kept)])


@pytest.mark.parametrize("total", [16001, 2**33, 2**36 - 1])
def test_flac_header_that_promises_too_much(total: int) -> None:
    data = bytearray(encoded(tone(440, 1), RATE, "FLAC"))
    fields = int.from_bytes(data[18:26], "big")  # the low 36 bits of these are the number of samples
    assert fields & (2**36 - 1) == RATE
    data[18:26] = (fields >> 36 << 36 | total).to_bytes(8, "big")
    with pytest.raises(AudioError, match="cut off"):
        load_audio(bytes(data))


def wav_claiming(size: int) -> bytes:
    data = bytearray(encoded(tone(440, 1), RATE))
    at = data.index(b"data") + 4
    assert struct.unpack_from("<I", data, at) == (2 * RATE,)
    struct.pack_into("<I", data, at, size)
    return bytes(data)


@pytest.mark.parametrize("size", [2 * RATE + 2, 2**31 - 1, 2**32 - 16])
def test_wav_header_that_promises_too_much(size: int) -> None:
    with pytest.raises(AudioError, match="cut off"):
        load_audio(wav_claiming(size))


def test_wav_that_is_cut_off_after_other_chunks() -> None:
    whole = wav_claiming(2 * RATE)
    odd = whole[:36] + b"note" + struct.pack("<I", 3) + b"abc\0" + whole[36:]  # chunks are padded to even sizes
    assert len(load_audio(odd)) == RATE
    with pytest.raises(AudioError, match="cut off"):
        load_audio(odd[:-100])


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFF000])
def test_wav_of_unknown_length_as_pipes_have(size: int) -> None:
    assert len(load_audio(wav_claiming(size))) == RATE


@pytest.mark.parametrize("format_", ["WAV", "FLAC"])
def test_file_without_samples(format_: str) -> None:
    with pytest.raises(AudioError):
        load_audio(encoded(np.zeros(0, np.float32), RATE, format_))
    if format_ == "WAV":
        with pytest.raises(AudioError, match="no samples"):
            load_audio(encoded(np.zeros(0, np.float32), RATE, format_))


def test_float_file_with_impossible_samples() -> None:
    for wrong in (np.nan, np.inf, -np.inf):
        sound = tone(440, 1)
        sound[77] = wrong
        with pytest.raises(AudioError, match="not finite"):
            load_audio(encoded(sound, 44100, subtype="FLOAT"))


def test_file_objects_that_give_no_bytes(tmp_path: Path) -> None:
    path = tmp_path / "sound.txt"
    path.write_text("text")
    with path.open() as file, pytest.raises(AudioError, match="binary mode"):
        load_audio(file)  # type: ignore[arg-type]
    with path.open("rb") as closed:
        pass
    with pytest.raises(AudioError, match="closed"):
        load_audio(closed)


@pytest.mark.parametrize("audio", [None, 3, np.float32(0.5), [0.0, 0.1], {"path": "a.wav"}])
def test_other_kinds_of_input(audio: object) -> None:
    with pytest.raises(AudioError, match="Give a path"):
        load_audio(audio, RATE)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_damaged_files_never_crash(data: st.DataObject) -> None:
    whole = bytearray(encoded(tone(440, 0.05), RATE, data.draw(st.sampled_from(["WAV", "FLAC", "OGG"]))))
    for _ in range(data.draw(st.integers(1, 5))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        samples = load_audio(bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    except AudioError:
        return
    assert samples.ndim == 1
    assert np.isfinite(samples).all()


def test_duration_limits() -> None:
    least = round(MIN_SECONDS * RATE)
    check_duration(np.zeros(least, np.float32), WINDOW)
    check_duration(np.zeros(WINDOW.window_samples, np.float32), WINDOW)
    with pytest.raises(AudioError, match=r"at least 0\.1 s"):
        check_duration(np.zeros(least - 1, np.float32), WINDOW)
    with pytest.raises(AudioError, match=r"hears 8 s.*long-form.*Split") as caught:
        check_duration(np.zeros(WINDOW.window_samples + 1, np.float32), WINDOW)
    assert "8.00 s" in str(caught.value)


def test_silence() -> None:
    assert is_silent(np.zeros(RATE, np.float32))
    assert is_silent(np.zeros(0, np.float32))
    assert is_silent(np.full(RATE, -0.9 / 32768, np.float32))
    step = np.zeros(RATE, np.float32)
    step[5] = -1 / 32768
    assert not is_silent(step)
