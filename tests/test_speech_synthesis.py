"""Runs of speech synthesis: what is in the folder, what stops a run, and what goes on after a kill."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from das_asr.runtime.errors import DataError, OptionError, SynthesisError
from das_asr.runtime.jsonl import Row, read_rows
from das_asr.runtime.utterances import read_utterances
from das_asr.training.speech import progress
from das_asr.training.speech.casting import cast
from das_asr.training.speech.cli import merge, speech
from das_asr.training.speech.folder import SpeechFolder
from das_asr.training.speech.merge import merge_shards
from das_asr.training.speech.noise import COLORS, add_noise
from das_asr.training.speech.options import SpeechOptions
from das_asr.training.speech.sentences import identified, read_sentences
from das_asr.training.speech.synthesis import synthesize

needs_flite = pytest.mark.skipif(shutil.which("flite") is None, reason="flite is not installed")

# Speaks every text as 0.3 s of tone whose height depends on the text; a text with one of these words goes wrong.
SCRIPT = """
import io, math, pathlib, struct, sys, time, wave
text = sys.stdin.read()
if "crash" in text and not pathlib.Path(__file__).with_name("mended").exists():
    sys.exit("out of luck")
level, seconds = 9000, 0.3
if "silent" in text: level = 0
if "clip" in text: level = 10 ** 6
if "long" in text: seconds = 2.5
if "slow" in text: time.sleep(0.1)
step = (sum(text.encode()) % 50 + 20) / 500
wave_of = lambda i: max(-32768, min(32767, int(level * math.sin(i * step))))
file = io.BytesIO()
with wave.open(file, "wb") as out:
    out.setparams((1, 2, 16000, 0, "NONE", ""))
    out.writeframes(b"".join(struct.pack("<h", wave_of(i)) for i in range(int(seconds * 16000))))
sys.stdout.buffer.write(file.getvalue())
"""


@pytest.fixture
def options(tmp_path: Path) -> SpeechOptions:
    """An engine that fails for some texts."""
    script = tmp_path / "tts.py"
    script.write_text(SCRIPT)
    command = f"'{sys.executable}' -S '{script}'"
    return SpeechOptions(engine="command", voices=(command,), max_seconds=2.0, workers=2, max_failures=1.0)


def _rows(count: int, **columns: Any) -> list[Row]:
    return [
        {"id": f"s{number}", "text": f"play track {number}", "domain": "music", **columns} for number in range(count)
    ]


def _texts(*texts: str) -> list[Row]:
    return [{"text": text} for text in texts]


def _snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@needs_flite
def test_the_folder_holds_flac_and_lineage(tmp_path: Path) -> None:
    rows = [*_rows(6, source="grammar", seed=7), {"text": "no id and no domain"}]
    report = synthesize(rows, SpeechOptions(engine="flite", voices=("slt",), workers=2), tmp_path / "out")
    assert (report.sentences, report.spoken, report.resumed, report.failed) == (7, 7, 0, 0)
    assert report.audio_seconds == report.total_seconds > 7
    written = list(read_rows(tmp_path / "out" / "metadata.jsonl"))
    assert [row["text"] for row in written] == [row["text"] for row in rows]
    assert written[0].items() >= {
        "id": "s0", "domain": "music", "engine": "flite", "voice": "slt", "speed": 1.0, "pitch": 1.0,
        "noise_db": None, "seed": 0, "source": "grammar", "text_seed": 7, "source_row": 0,
    }.items()  # fmt: skip
    assert written[6]["domain"] is None
    assert len(written[6]["id"]) == 16
    for row, utterance in zip(written, read_utterances(tmp_path / "out"), strict=True):
        info = soundfile.info(utterance.audio)
        assert (info.format, info.subtype, info.samplerate, info.channels) == ("FLAC", "PCM_16", 16000, 1)
        assert info.duration == pytest.approx(row["duration"], abs=1e-3)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["audio", "metadata.jsonl", "synthesis.json"]


@needs_flite
def test_datasets_opens_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = [*_rows(5), {"text": "oh", "id": "short"}]
    options = SpeechOptions(engine="flite", voices=("slt",), workers=2, max_seconds=2.5, max_failures=1.0)
    report = synthesize(
        [*rows, {"text": "much too long a sentence to be spoken within two seconds and a half"}],
        options,
        tmp_path / "out",
    )
    assert report.failures == {"too long": 1}
    # The package asks for this module's encoder even for files that are only named.
    codec = types.ModuleType("torchcodec.encoders")
    codec.AudioEncoder = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.encoders", codec)
    loaded = datasets.load_dataset(
        "audiofolder", data_dir=str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache")
    ).cast_column("audio", datasets.Audio(decode=False))
    assert loaded["text"][:] == [row["text"] for row in rows]
    assert soundfile.info(loaded[5]["audio"]["path"]).duration == pytest.approx(loaded[5]["duration"], abs=1e-3)


def test_failures_are_counted_listed_and_skipped(tmp_path: Path, options: SpeechOptions) -> None:
    rows = _texts("fine", "crash now", "silent night", "clip it", "long way", "fine too")
    report = synthesize(rows, options, tmp_path / "out")
    assert report.failures == {"engine": 1, "empty": 1, "clipped": 1, "too long": 1}
    assert [row["text"] for row in read_rows(tmp_path / "out" / "metadata.jsonl")] == ["fine", "fine too"]
    listed = {row["text"]: row for row in read_rows(tmp_path / "out" / "failures.jsonl")}
    assert {text: row["reason"] for text, row in listed.items()} == {
        "crash now": "engine", "silent night": "empty", "clip it": "clipped", "long way": "too long",
    }  # fmt: skip
    assert "out of luck" in listed["crash now"]["detail"]
    assert len(list((tmp_path / "out").glob("audio/*/*"))) == 2

    (tmp_path / "mended").touch()
    report = synthesize(rows, options, tmp_path / "out")
    assert (report.resumed, report.spoken, report.failed) == (2, 1, 3)
    assert [row["text"] for row in read_rows(tmp_path / "out" / "metadata.jsonl")] == ["fine", "crash now", "fine too"]


def test_too_many_failures_stop_the_run_and_keep_what_was_spoken(tmp_path: Path, options: SpeechOptions) -> None:
    strict = dataclasses.replace(options, max_failures=0.02)
    rows = [{"text": f"crash {number}" if number % 10 == 0 else f"fine {number}"} for number in range(400)]
    with pytest.raises(SynthesisError, match=r"of \d\d sentences could not be spoken \(\d engine\).*at most 2%"):
        synthesize(rows, strict, tmp_path / "out")
    assert not (tmp_path / "out" / "metadata.jsonl").exists()
    assert 40 < len(list(read_rows(tmp_path / "out" / ".journal.jsonl"))) < 70

    with pytest.raises(SynthesisError, match=r"1 of 10 sentences"):  # too few to stop early: at the end
        synthesize(rows[:10], strict, tmp_path / "few")
    (tmp_path / "mended").touch()
    report = synthesize(rows[:10], strict, tmp_path / "few")
    assert (report.resumed, report.spoken) == (9, 1)


def test_a_voice_that_cannot_speak_is_refused_before_anything_is_written(
    tmp_path: Path, options: SpeechOptions
) -> None:
    broken = dataclasses.replace(options, voices=(f"'{sys.executable}' -c 'import sys; sys.exit(3)'",))
    with pytest.raises(SynthesisError, match=r"cannot say 'one two three'.*status 3"):
        synthesize(_rows(2), broken, tmp_path / "out")
    with pytest.raises(SynthesisError, match="has no voice of its own"):
        synthesize(_rows(2), SpeechOptions(engine="command"), tmp_path / "out")
    with pytest.raises(SynthesisError, match="program nothing was not found"):
        synthesize(_rows(2), SpeechOptions(engine="command", voices=("nothing",)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_others_or_of_other_options_is_refused(tmp_path: Path, options: SpeechOptions) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").touch()
    with pytest.raises(SynthesisError, match="not empty and was not made by das-synth speech"):
        synthesize(_rows(2), options, output)
    with pytest.raises(SynthesisError, match="is a file"):
        synthesize(_rows(2), options, output / "thesis.txt")
    (output / "thesis.txt").unlink()
    synthesize(_rows(3), options, output)
    before = _snapshot(output)
    with pytest.raises(SynthesisError, match=r"of other options.*seed was 0, now 1"):
        synthesize(_rows(3), dataclasses.replace(options, seed=1), output)
    with pytest.raises(SynthesisError, match=r"1 utterances that are not among the sentences, such as 'play track 2'"):
        synthesize(_rows(2), options, output)
    with pytest.raises(SynthesisError, match="not among the sentences"):
        synthesize([{"id": "s0", "text": "changed"}, *_rows(3)[1:]], options, output)
    assert _snapshot(output) == before
    shutil.rmtree(output / "audio")
    assert synthesize(_rows(3), options, output).spoken == 3  # files that went missing are spoken again
    assert _snapshot(output) == before


def test_two_runs_do_not_share_a_folder(tmp_path: Path, options: SpeechOptions) -> None:
    named = {name: {**row, "source_row": 0} for name, row in identified(_rows(2)).items()}
    folder = SpeechFolder.open(tmp_path / "out", options, named)
    with pytest.raises(SynthesisError, match="Another run is writing to"):
        synthesize(_rows(2), options, tmp_path / "out")
    folder.close()
    assert synthesize(_rows(2), options, tmp_path / "out").spoken == 2


def test_sentences_may_be_added_to_a_finished_run(tmp_path: Path, options: SpeechOptions) -> None:
    synthesize(_rows(3), options, tmp_path / "out")
    report = synthesize([{"text": "new first"}, *_rows(3)], options, tmp_path / "out")
    assert (report.resumed, report.spoken) == (3, 1)
    rows = list(read_rows(tmp_path / "out" / "metadata.jsonl"))
    assert [(row["text"], row["source_row"]) for row in rows][:2] == [("new first", 0), ("play track 0", 1)]


RUN = """
import json, pathlib, sys
from das_asr.training.speech.options import SpeechOptions
from das_asr.training.speech.synthesis import synthesize
rows, command, output = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
options = SpeechOptions(engine="command", voices=(command,), max_seconds=2.0, workers=3, noise_db=(5.0, 20.0))
synthesize(rows, options, output)
"""


def test_a_killed_run_goes_on_without_loss_or_doubles(tmp_path: Path, options: SpeechOptions) -> None:
    rows = [{"text": f"slow {number}"} for number in range(24)]
    output, command = tmp_path / "out", options.voices[0]
    for spoken in (3, 12):
        process = subprocess.Popen([sys.executable, "-c", RUN, json.dumps(rows), command, str(output)])
        _wait_until(lambda: len(list(output.glob("audio/*/*.flac"))) >= spoken, process)  # noqa: B023
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (output / "metadata.jsonl").exists()
    # What a kill can leave at worst: a torn row, a file without a row, files half-written under temporary names.
    with (output / ".journal.jsonl").open("ab") as journal:
        journal.write(b'{"id": "torn", "te')
    (output / "audio" / "00").mkdir(exist_ok=True)
    (output / "audio" / "00" / ".0000.flac.tmp").write_bytes(b"half")
    (output / ".metadata.jsonl.1.tmp").write_bytes(b"half")

    noisy = dataclasses.replace(options, noise_db=(5.0, 20.0))
    report = synthesize(rows, noisy, output)
    assert report.resumed >= 10
    assert report.resumed + report.spoken == 24
    synthesize(rows, dataclasses.replace(noisy, workers=6), tmp_path / "whole")
    assert _snapshot(output) == _snapshot(tmp_path / "whole")


def _wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_shards_together_are_the_whole(tmp_path: Path, options: SpeechOptions) -> None:
    rows = [*_rows(20), {"text": "crash and burn"}]
    noisy = dataclasses.replace(options, noise_db=(0.0, 30.0), seed=5)
    synthesize(rows, noisy, tmp_path / "whole")
    parts = [tmp_path / f"part{part}" for part in range(3)]
    counts = [
        synthesize(rows, dataclasses.replace(noisy, shard=(part, 3)), folder).sentences
        for part, folder in enumerate(parts)
    ]
    assert sum(counts) == 21
    assert min(counts) > 0

    with pytest.raises(SynthesisError, match=r"hold the shards 0/3, 1/3; each of 3"):
        merge_shards(parts[:2], tmp_path / "merged")
    with pytest.raises(SynthesisError, match="exists"):
        merge_shards(parts, tmp_path / "whole")
    with pytest.raises(SynthesisError, match="no folder that das-synth speech made"):
        merge_shards([*parts, tmp_path], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()

    assert merge_shards(parts[::-1], tmp_path / "merged") == 20
    whole, merged = _snapshot(tmp_path / "whole"), _snapshot(tmp_path / "merged")
    assert merged == whole
    assert synthesize(rows, noisy, tmp_path / "merged").resumed == 20

    (parts[1] / ".journal.jsonl").touch()
    with pytest.raises(SynthesisError, match="part1 is not finished"):
        merge_shards(parts, tmp_path / "again")
    shutil.rmtree(parts[1])
    synthesize(rows, dataclasses.replace(noisy, shard=(1, 3), seed=6), parts[1])
    with pytest.raises(SynthesisError, match="part1 was made with other options"):
        merge_shards(parts, tmp_path / "again")


def test_a_delivery_depends_on_seed_and_id_alone() -> None:
    one = SpeechOptions(engine="flite", voices=("slt", "awb"), speed=(0.9, 1.1), pitch=(0.8, 1.2), noise_db=(5, 25))
    drawn = [cast(f"id{number}", one) for number in range(200)]
    assert drawn == [cast(f"id{number}", one) for number in range(200)]
    assert {delivery.voice.name for delivery in drawn} == {"slt", "awb"}
    assert {delivery.noise_color for delivery in drawn} == set(COLORS)
    for values, (low, high) in (
        ([each.voice.speed for each in drawn], one.speed),
        ([each.voice.pitch for each in drawn], one.pitch),
        ([each.noise_db or 0.0 for each in drawn], (5, 25)),
    ):
        assert low <= min(values) < low + 0.1 * (high - low)
        assert high >= max(values) > high - 0.1 * (high - low)
    assert drawn != [cast(f"id{number}", dataclasses.replace(one, seed=1)) for number in range(200)]
    plain = [cast(f"id{number}", dataclasses.replace(one, noise_db=None)) for number in range(200)]
    assert [each.voice for each in plain] == [each.voice for each in drawn]
    assert (plain[0].noise_db, plain[0].noise_color) == (None, None)


@pytest.mark.parametrize(("color", "octave_db"), [("white", 0.0), ("pink", -3.01), ("brown", -6.02)])
def test_noise_has_its_level_and_color(color: str, octave_db: float) -> None:
    speech = (0.3 * np.sin(np.arange(64000) / 9)).astype(np.float32)
    noise = add_noise(speech, 16000, 12.0, color, seed=3) - speech
    assert 10 * np.log10(np.mean(speech**2) / np.mean(noise**2)) == pytest.approx(12.0, abs=0.05)
    power = np.abs(np.fft.rfft(noise)) ** 2  # bins of 0.25 Hz
    slope = 10 * np.log10(power[8000:12000].mean() / power[4000:6000].mean())
    assert slope == pytest.approx(octave_db, abs=0.6)


def test_sentences_come_from_json_lines_or_plain_text(tmp_path: Path) -> None:
    plain = tmp_path / "music.txt"
    plain.write_text("\ufeffplay some jazz\n\n  stop  \nplay some jazz\n", encoding="utf-8")
    rows = read_sentences(plain, "music")
    assert rows[1] == {"text": "stop", "domain": "music"}
    found = identified(rows)
    assert [row["text"] for row in found.values()] == ["play some jazz", "stop"]

    lines = tmp_path / "music.jsonl"
    lines.write_text('{"text": "stop", "model": "m"}\n{"text": "go", "id": 4, "domain": "sports"}\n')
    rows = read_sentences(lines, "music")
    assert [row["domain"] for row in rows] == ["music", "sports"]
    again = identified(rows)
    assert list(again) == [list(found)[1], "4"]

    for bad, message in (
        ([], "no sentences"),
        ([{"id": "a"}], "Sentence 1 has no `text`"),
        ([{"text": "a", "id": "x"}, {"text": "b", "id": "x"}], "'x' of another"),
    ):
        with pytest.raises(DataError, match=message):
            identified(bad)
    with pytest.raises(DataError, match="cannot be read"):
        read_sentences(tmp_path / "nothing.txt")
    plain.write_text("\n")
    with pytest.raises(DataError, match="holds no sentences"):
        read_sentences(plain)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"engine": "siri"}, "There are: espeak-ng"),
        ({"voices": ("a", "a")}, "one twice"),
        ({"speed": (1.2, 0.8)}, "speed was 1.2 to 0.8"),
        ({"pitch": (1.0, 9.0)}, "pitch was 1 to 9"),
        ({"noise_db": (float("nan"), 3.0)}, "noise_db was nan"),
        ({"max_seconds": 0.0}, "max_seconds was 0"),
        ({"workers": 0}, "1 or more"),
        ({"shard": (4, 4)}, "shard=4/4"),
    ],
)
def test_options_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SpeechOptions(**wrong)


def test_the_commands_speak_and_merge(tmp_path: Path, options: SpeechOptions) -> None:
    sentences = tmp_path / "music.txt"
    sentences.write_text("".join(f"play track {number}\n" for number in range(8)))

    def run(command: click.Command, *arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(command, [str(argument) for argument in arguments])
        return result.exit_code, result.output

    common = (sentences, "--engine", f"command:{options.voices[0]}", "--domain", "music", "--workers", 2)
    for part in range(2):
        status, said = run(speech, *common, "--output", tmp_path / f"p{part}", "--shard", f"{part}/2", "--quiet")
        assert status == 0, said
        assert "0 failed" in said
    status, said = run(merge, tmp_path / "all", tmp_path / "p0", tmp_path / "p1")
    assert (status, said) == (0, f"{tmp_path / 'all'}: 8 utterances.\n")
    assert {utterance.domain for utterance in read_utterances(tmp_path / "all")} == {"music"}

    for arguments, message in (
        ((tmp_path / "no.txt", "--output", tmp_path / "x"), "no.txt cannot be read"),
        ((sentences, "--output", tmp_path / "x", "--engine", "siri"), "There is no speech engine 'siri'"),
        ((sentences, "--output", tmp_path / "x", "--engine", "command:nothing"), "program nothing was not found"),
        ((sentences, "--output", tmp_path / "x", "--shard", "2/2"), "shard=2/2"),
        ((*common, "--output", tmp_path / "p0"), "of other options"),
    ):
        status, said = run(speech, *arguments)
        assert status == 1
        assert message in said
    assert run(speech, sentences, "--output", tmp_path / "x", "--shard", "two")[0] == 2
    assert not (tmp_path / "x").exists()


def test_progress_is_lines_where_there_is_no_terminal(
    tmp_path: Path, options: SpeechOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(sys, "stderr", error := io.StringIO())
    synthesize(_texts("one", "two", "crash"), options, tmp_path / "out", quiet=False)
    lines = error.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[-1].startswith("3/3 spoken, ")
    assert lines[-1].endswith("1 failed, 0:00:00 left")

    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    synthesize(_texts("one", "two"), dataclasses.replace(options, seed=1), tmp_path / "bar", quiet=False)
    assert "2/2" in terminal.getvalue()


def test_help_needs_no_heavy_package() -> None:
    code = (
        "import sys; from das_asr.training.speech.cli import speech; speech(['--help'], standalone_mode=False); "
        "print({'torch', 'openai', 'tqdm', 'sherpa_onnx', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--noise-db" in done.stdout
    assert done.stdout.endswith("set()\n")
