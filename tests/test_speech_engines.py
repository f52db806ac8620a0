"""Speech engines: real programs, a command of the test's own, and an endpoint on the loopback interface."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import sys
import threading
import wave
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import soundfile

from das_asr.runtime.errors import OptionError, SynthesisError
from das_asr.training.speech.command import CommandEngine
from das_asr.training.speech.endpoint import EndpointEngine
from das_asr.training.speech.engines import ENGINES, Engine, EngineFailure, Samples, Voice, create_engine, speak_16k

TEXT = "play the song yellow submarine in the kitchen please"

PROGRAMS = {"espeak-ng": "en-us", "flite": "slt", "festival": "kal_diphone", "pico": "en-US"}

PYTHON = f"'{sys.executable}' -S"


def _is_installed(engine: str) -> bool:
    found = importlib.util.find_spec("ttspico") if engine == "pico" else shutil.which(engine)
    return found is not None


@pytest.fixture(params=PROGRAMS, scope="module")
def program(request: pytest.FixtureRequest) -> Iterator[tuple[Engine, str, str]]:
    """(engine, its name, a voice)."""
    if not _is_installed(request.param):
        pytest.skip(f"{request.param} is not installed")
    engine = create_engine(request.param)
    yield engine, request.param, PROGRAMS[request.param]
    engine.close()


def _pitch(samples: Samples) -> float:
    """Median fundamental of 40 ms frames at 16 kHz in Hz, by autocorrelation."""
    found = []
    for start in range(0, len(samples) - 640, 320):
        frame = samples[start : start + 640] - samples[start : start + 640].mean()
        correlation = np.correlate(frame, frame, "full")[639:]
        lag = 40 + int(correlation[40:266].argmax())
        if np.abs(frame).max() > 0.05 and correlation[lag] > 0.6 * correlation[0]:
            found.append(16000 / lag)
    return float(np.median(found))


def test_a_program_speaks_at_its_speed_and_pitch(program: tuple[Engine, str, str]) -> None:
    engine, name, voice = program
    engine.check(Voice(name, voice))
    normal = speak_16k(engine, TEXT, Voice(name, voice))
    fast = speak_16k(engine, TEXT, Voice(name, voice, speed=1.5))
    high = speak_16k(engine, TEXT, Voice(name, voice, pitch=1.3))
    assert normal.dtype == np.float32
    assert normal.ndim == 1
    assert 2 < len(normal) / 16000 < 5
    assert len(normal) / len(fast) == pytest.approx(1.5, rel=0.15)
    assert _pitch(high) / _pitch(normal) == pytest.approx(1.25, abs=0.13)


@pytest.mark.parametrize(
    "text", ["-v", "--help me", 'say "hi" \\ (now) $HOME `ls`; {x}', "two\nlines\0and \ud800 more", "@f"]
)
def test_a_program_speaks_what_a_shell_or_parser_would_take_for_something_else(
    program: tuple[Engine, str, str], text: str
) -> None:
    engine, name, voice = program
    samples = speak_16k(engine, text, Voice(name, voice))
    assert np.abs(samples).max() > 0.05


def test_a_program_has_nothing_to_say_without_letters(program: tuple[Engine, str, str]) -> None:
    engine, name, voice = program
    for text in ("", "...", " \n\0"):
        with pytest.raises(EngineFailure) as failure:
            engine.speak(text, Voice(name, voice))
        assert failure.value.reason == "empty"


def test_an_unknown_voice_is_refused_with_the_known_ones(program: tuple[Engine, str, str]) -> None:
    engine, name, voice = program
    with pytest.raises(SynthesisError, match=rf"no voice 'nobody'.*{voice}"):
        engine.check(Voice(name, "nobody"))


def test_a_program_speaks_the_same_in_several_threads(program: tuple[Engine, str, str]) -> None:
    engine, name, voice = program
    texts = [f"number {number} of them" for number in range(6)]
    alone = [engine.speak(text, Voice(name, voice))[0] for text in texts]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda text: engine.speak(text, Voice(name, voice))[0], texts))
    for left, right in zip(alone, together, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.skipif(shutil.which("festival") is None, reason="festival is not installed")
def test_festival_speaks_on_after_it_crashed() -> None:
    engine, voice = create_engine("festival"), Voice("festival", "kal_diphone")
    before = speak_16k(engine, TEXT, voice)
    with pytest.raises(EngineFailure, match="crashed"):
        engine.speak("日本", voice)
    np.testing.assert_array_equal(before, speak_16k(engine, TEXT, voice))
    with pytest.raises(EngineFailure, match="no voice"):
        engine.speak(TEXT, Voice("festival", 'x) (system "true"'))
    engine.close()


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_espeak_refuses_variants_and_speeds_that_it_would_ignore() -> None:
    engine = create_engine("espeak-ng")
    engine.check(Voice("espeak-ng", "en-gb+f3"))
    with pytest.raises(SynthesisError, match=r"no variant 'zz'.*f3"):
        engine.check(Voice("espeak-ng", "en-gb+zz"))
    with pytest.raises(SynthesisError, match="80 to 450"):
        engine.check(Voice("espeak-ng", "en-gb", speed=0.3))


@pytest.mark.skipif(shutil.which("flite") is None, reason="flite is not installed")
def test_flite_refuses_a_pitch_that_the_voice_would_ignore() -> None:
    with pytest.raises(SynthesisError, match="has one pitch"):
        create_engine("flite").check(Voice("flite", "rms", pitch=1.1))


@pytest.mark.skipif(not _is_installed("pico"), reason="pico is not installed")
def test_pico_takes_markup_for_text_and_refuses_pitches_beyond_its_own() -> None:
    engine = create_engine("pico")
    spoken = engine.speak("a pause <break time='9s'/> of none", Voice("pico", "en-GB"))[0]
    assert 1 < len(spoken) / 16000 < 6
    engine.check(Voice("pico", "en-GB", pitch=2.0))
    with pytest.raises(SynthesisError, match=r"takes factors from 0\.5 to 2\.0"):
        engine.check(Voice("pico", "en-GB", pitch=2.5))


def test_missing_programs_packages_and_models_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("espeak-ng", "flite", "festival"):
        with pytest.raises(SynthesisError, match=f"{name} was not found.*apt install {name}"):
            create_engine(name)
    with pytest.raises(SynthesisError, match="needs a voice model"):
        create_engine("sherpa-onnx")
    monkeypatch.setitem(sys.modules, "sherpa_onnx", None)
    with pytest.raises(SynthesisError, match="pip install sherpa-onnx"):
        create_engine("sherpa-onnx", model=str(tmp_path))
    monkeypatch.setitem(sys.modules, "ttspico", None)
    with pytest.raises(SynthesisError, match=r"pip install 'das-asr\[pico\]'"):
        create_engine("pico")
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(SynthesisError, match="pip install openai"):
        create_engine("openai", base_url="http://127.0.0.1:1")


def test_options_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(OptionError, match=rf"no speech engine 'siri'.*{ENGINES[0]}"):
        create_engine("siri")
    with pytest.raises(OptionError, match="model='x' was given for flite"):
        create_engine("flite", model="x")
    with pytest.raises(OptionError, match="only openai"):
        create_engine("flite", base_url="x")
    with pytest.raises(OptionError, match="speed was 9"):
        Voice("flite", "rms", speed=9)


def test_a_sherpa_folder_must_hold_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sherpa_onnx", type(sys)("sherpa_onnx"))
    with pytest.raises(SynthesisError, match=r"no tokens\.txt"):
        create_engine("sherpa-onnx", model=str(tmp_path))
    (tmp_path / "tokens.txt").write_text("_ 0\n")
    with pytest.raises(SynthesisError, match=r"holds no \.onnx file"):
        create_engine("sherpa-onnx", model=str(tmp_path))


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], str]:
    """Source of a program with `tone(seconds)` -> the bytes of a WAV file; returns the command that runs it."""
    head = """
import io, math, struct, sys, time, wave
def tone(seconds, rate=22050):
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, rate, 0, "NONE", ""))
        out.writeframes(b"".join(struct.pack("<h", int(9000 * math.sin(i / 20))) for i in range(int(seconds * rate))))
    return file.getvalue()
"""

    def write(body: str) -> str:
        path = tmp_path / "my tts.py"
        path.write_text(head + body)
        return f"{PYTHON} '{path}'"

    return write


def test_a_command_speaks_through_pipes_or_files(script: Callable[[str], str]) -> None:
    engine = CommandEngine(timeout=20)
    pipe = script("assert sys.stdin.read() == 'hi there'\nsys.stdout.buffer.write(tone(0.5))\n")
    samples, rate = engine.speak("hi\nthere", Voice("command", pipe))
    assert (len(samples), rate) == (11025, 22050)

    file = script(
        "assert sys.argv[1] == 'say {output} now', sys.argv\nopen(sys.argv[2], 'wb').write(tone(float(sys.argv[3])))\n"
    )
    voice = Voice("command", f"{file} {{text}} {{output}} {{speed}}", speed=0.75)
    engine.check(voice)
    assert len(engine.speak("say {output} now", voice)[0]) == int(0.75 * 22050)


def test_a_command_that_fails_says_why(script: Callable[[str], str], tmp_path: Path) -> None:
    engine = CommandEngine(timeout=0.5)
    cases = {
        "sys.exit('no voice today')": ("engine", "status 1: no voice today"),
        "pass": ("empty", "gave no audio"),
        "print('hello')": ("engine", "no audio"),
        "sys.stdout.buffer.write(tone(0))": ("empty", "without samples"),
        "time.sleep(60)": ("timeout", "more than 0.5 s"),
    }
    for body, (reason, message) in cases.items():
        with pytest.raises(EngineFailure, match=message) as failure:
            engine.speak("hi", Voice("command", script(body)))
        assert failure.value.reason == reason
    with pytest.raises(EngineFailure, match="wrote no file"):
        engine.speak("hi", Voice("command", script("pass") + " {output}"))
    with pytest.raises(SynthesisError, match="program nothing-here was not found"):
        engine.check(Voice("command", "nothing-here {text}"))
    with pytest.raises(SynthesisError, match=r"has no \{pitch\}"):
        engine.check(Voice("command", PYTHON, pitch=1.2))
    with pytest.raises(SynthesisError, match="cannot be split"):
        engine.check(Voice("command", "say 'hi"))


class _Handler(BaseHTTPRequestHandler):
    """Speaks a second of tone; a text that is a number is answered with that status."""

    asked: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append({**body, "path": self.path, "key": self.headers["Authorization"]})
        status = int(body["input"]) if body["input"].isdecimal() else 200
        answer = json.dumps({"error": {"message": "not today"}}).encode() if status != 200 else _streamed_wav()
        if body["input"] == "nothing":
            answer = b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class names it
        """Not on standard error."""


def _streamed_wav() -> bytes:
    """A second of tone at 24 kHz whose header does not know the length, as servers that stream send it."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, 24000, 0, "NONE", ""))
        out.writeframes((9000 * np.sin(np.arange(24000) / 20)).astype("<i2").tobytes())
    data = bytearray(file.getvalue())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    return bytes(data)


@pytest.fixture
def endpoint() -> Iterator[str]:
    """Address of a speech endpoint."""
    _Handler.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()


def test_an_endpoint_is_asked_as_openai_is(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    engine = create_engine("openai", model="kokoro")
    assert len(speak_16k(engine, TEXT, Voice("openai", "nova", speed=1.2))) == 16000
    speak_16k(engine, TEXT, Voice("openai", "nova"))
    engine.close()
    asked = {"model": "kokoro", "voice": "nova", "input": TEXT, "response_format": "wav", "path": "/v1/audio/speech"}
    assert _Handler.asked[0] == {**asked, "speed": 1.2, "key": "Bearer secret"}
    assert "speed" not in _Handler.asked[1]


def test_an_endpoint_fails_for_a_text_or_for_all(endpoint: str) -> None:
    engine = EndpointEngine(None, endpoint, None, timeout=20, retries=0)
    for text, reason in (("400", "engine"), ("500", "engine"), ("nothing", "empty")):
        with pytest.raises(EngineFailure) as failure:
            engine.speak(text, Voice("openai", "alloy"))
        assert failure.value.reason == reason
    for text in ("401", "404", "429"):
        with pytest.raises(SynthesisError, match=f"status {text}.*not today"):
            engine.speak(text, Voice("openai", "alloy"))
    with pytest.raises(SynthesisError, match="cannot change pitch"):
        engine.check(Voice("openai", "alloy", pitch=1.1))
    engine.close()


def test_an_endpoint_that_is_not_there_or_has_no_key_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(SynthesisError, match="OPENAI_API_KEY"):
        create_engine("openai")
    engine = EndpointEngine(None, "http://127.0.0.1:9/v1", None, timeout=20, retries=0)
    with pytest.raises(SynthesisError, match=r"127\.0\.0\.1:9.*does not answer"):
        engine.speak("hi", Voice("openai", "alloy"))
    engine.close()


def test_stereo_is_mixed_and_other_rates_are_resampled(script: Callable[[str], str], tmp_path: Path) -> None:
    stereo = np.stack([np.full(44100, 0.5), np.zeros(44100)], axis=1).astype(np.float32)
    soundfile.write(tmp_path / "stereo.wav", stereo, 44100)
    command = script(f"sys.stdout.buffer.write(open({str(tmp_path / 'stereo.wav')!r}, 'rb').read())")
    samples = speak_16k(CommandEngine(timeout=20), "hi", Voice("command", command))
    assert len(samples) == 16000
    assert samples[8000] == pytest.approx(0.25, abs=0.01)
