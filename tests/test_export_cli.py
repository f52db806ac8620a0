"""`das-export`: thin over the API; a user's mistake is one message and exit status 1, a bug of ours shows its trace."""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from das_asr.export import ExportOptions, Verification
from das_asr.export.cli import main
from das_asr.export.options import PRECISIONS
from das_asr.runtime.contract import RULE_CODES
from das_asr.runtime.errors import ParityError
from das_asr.runtime.manifest import Manifest, ParityReport, read_manifest
from tests.bundles import make_bundle
from tests.checkpoints import edit_config, make_adapter, make_base

REPORT = ParityReport(3e-5, 2e-6, 20.0, 2e-5, {"music": 7.0}, 6, 318, 1, ("paper", "hypothesis"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("cli") / "base", d_model=32, seconds=5, text_positions=16)


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return make_adapter(base, base.parent / "music")


@pytest.fixture(scope="module")
def bundle(base: Path, adapter: Path) -> Path:
    return make_bundle(base, {"music": adapter}, base.parent / "bundle")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> list[ExportOptions]:
    """Replaces the export itself; collects what it was asked for."""
    asked: list[ExportOptions] = []

    def export_bundle(options: ExportOptions) -> Manifest:
        asked.append(options)
        logging.getLogger("das_asr.export.bundle").info("writing graphs")
        return dataclasses.replace(read_manifest(bundle), parity={"fp32": REPORT})

    monkeypatch.setattr("das_asr.export.cli.export_bundle", export_bundle)
    return asked


# --- onnx ---


def test_export_for_real(base: Path, adapter: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    done = run("onnx", "--base", base, "--adapter", f"music={adapter}", "--output", output)
    assert done.exit_code == 0, done.output
    assert "Parity fp32: logits differ by at most" in done.stdout
    assert "adapter music moves the base's logits" in done.stdout
    assert done.stdout.endswith(f"Wrote {output}: base, music\n")
    assert "comparing logits of 2 rows" in done.stderr
    again = run("verify", output)
    assert again.exit_code == 0, again.output
    assert "9 files are as the manifest says" in again.stdout


def test_options_reach_the_exporter(exports: list[ExportOptions], tmp_path: Path) -> None:
    words = (
        "onnx --base openai/whisper-tiny --revision main --adapter a=x --adapter b=y=z --rule paper --tau 0.5 --force"
    )
    done = run(*words.split(), "--output", tmp_path, "--sample-audio", "one.wav", "--sample-audio", "two.wav")
    assert done.exit_code == 0, done.output
    (options,) = exports
    assert (options.base, options.revision, options.output) == ("openai/whisper-tiny", "main", tmp_path)
    assert [(item.name, item.directory) for item in options.adapters] == [("a", Path("x")), ("b", Path("y=z"))]
    assert (options.rule, options.tau, options.force) == ("paper", 0.5, True)
    assert options.sample_audio == (Path("one.wav"), Path("two.wav"))


def test_the_command_has_the_defaults_of_the_options(exports: list[ExportOptions]) -> None:
    assert run("onnx", "--base", "base", "--output", "bundle").exit_code == 0
    assert exports == [ExportOptions(base="base", output=Path("bundle"))]


def test_an_export_tells_what_was_measured(exports: list[ExportOptions]) -> None:
    done = run("onnx", "--base", "base", "--output", "bundle")
    assert done.stdout.splitlines() == [
        "Parity fp32: logits differ by at most 3e-05 (1.5e-06 of the largest, 2e-05 allowed), on average by 2e-06",
        "  adapter music moves the base's logits by up to 7",
        "  318 tokens compared (rules paper, hypothesis), 1 where PyTorch itself is undecided",
        "Wrote bundle: base, music",
    ]
    assert done.stderr == "writing graphs\n"


def test_an_export_as_json_is_one_document(exports: list[ExportOptions], bundle: Path) -> None:
    done = run("onnx", "--base", "base", "--output", "bundle", "--json")
    document = json.loads(done.stdout)
    assert document["output"] == "bundle"
    assert document["manifest"]["parity"]["fp32"]["tokens_compared"] == 318
    assert document["manifest"].keys() == {field.name for field in dataclasses.fields(Manifest)}
    assert done.stderr == ""


def test_warnings_are_one_line(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = make_adapter(base, tmp_path / "stranger", seed=1)
    edit_config(stranger, base_model_name_or_path="somebody/else")
    monkeypatch.setattr("das_asr.export.parity.check_parity", lambda *_: REPORT)
    done = run("onnx", "--base", base, "--adapter", f"a={stranger}", "--output", tmp_path / "bundle", "--json")
    assert done.exit_code == 0, done.output
    (warning,) = done.stderr.splitlines()
    assert warning.startswith("Warning: ")
    assert "somebody/else" in warning


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "nowhere"], "nowhere"),
        (["--base", "x", "--adapter", "a=x", "--adapter", "a=y"], "Two adapters are named 'a'"),
        (["--base", "x", "--adapter", "a/b=x"], "cannot name an adapter"),
        (["--base", "x", "--tau", "2"], "--tau is 2.0"),
    ],
)
def test_mistakes_are_one_message(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = run("onnx", *arguments, "--output", tmp_path / "bundle")
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["music", "=music", "music=", ""])
def test_an_adapter_needs_a_name_and_a_folder(tmp_path: Path, text: str) -> None:
    done = run("onnx", "--base", "x", "--output", tmp_path / "bundle", "--adapter", text)
    assert done.exit_code == 2
    assert "NAME=DIR is expected" in done.stderr


def test_an_adapters_folder_may_hold_an_equals_sign(tmp_path: Path) -> None:
    done = run("onnx", "--base", "nowhere", "--output", tmp_path / "bundle", "--adapter", "music=a=b")
    assert done.exit_code == 1  # past the parsing: it is the base that is missing


@pytest.mark.parametrize("arguments", [[], ["--base", "x"], ["--base", "x", "--output", "y", "--rule", "best"]])
def test_wrong_usage_is_clicks_own_error(arguments: list[str]) -> None:
    done = run("onnx", *arguments)
    assert done.exit_code == 2
    assert "Usage:" in done.stderr


def test_failed_parity_is_a_message(base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gate(*_: Any) -> ParityReport:
        raise ParityError("logits differ by 5")

    monkeypatch.setattr("das_asr.export.parity.check_parity", gate)
    done = run("onnx", "--base", base, "--output", tmp_path / "bundle", "--json")
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", "Error: logits differ by 5\n")
    assert not list(tmp_path.iterdir())


def test_a_bug_shows_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def export_bundle(_: ExportOptions) -> Manifest:
        raise KeyError("bug")

    monkeypatch.setattr("das_asr.export.cli.export_bundle", export_bundle)
    done = run("onnx", "--base", "base", "--output", "bundle")
    assert isinstance(done.exception, KeyError)


def test_the_process_is_as_before_afterwards(exports: list[ExportOptions]) -> None:
    log, handler = logging.getLogger("das_asr.export"), signal.getsignal(signal.SIGTERM)
    before = (log.level, list(log.handlers))
    run("onnx", "--base", "base", "--output", "bundle")
    assert (log.level, log.handlers) == before
    assert signal.getsignal(signal.SIGTERM) is handler


# --- inspect, verify, help ---


def test_inspect_shows_the_manifest(bundle: Path, base: Path) -> None:
    done = run("inspect", bundle)
    assert done.exit_code == 0
    for part in (str(base), "d_model 32", "hypothesis, tau 0.025", "row 1:      music, rank 4", "de, en, fr"):
        assert part in done.stdout.replace("en, de, fr", "de, en, fr")


def test_inspect_as_json_is_the_manifest(bundle: Path) -> None:
    document = json.loads(run("inspect", bundle, "--json").stdout)
    assert document == json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_what_is_no_bundle_is_told(tmp_path: Path, command: str) -> None:
    done = run(command, tmp_path)
    assert done.exit_code == 1
    assert done.stderr.startswith(f"Error: {tmp_path} is not a bundle")


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, str | None]]:
    asked: list[tuple[Path, str | None]] = []

    def verify_bundle(bundle: Path, base: str | None) -> Verification:
        asked.append((bundle, base))
        return Verification(8, {"fp32": REPORT}, base, None) if base else Verification(8, {}, None, "it is gone")

    monkeypatch.setattr("das_asr.export.cli.verify_bundle", verify_bundle)
    return asked


def test_verify_tells_what_was_checked(verified: list[tuple[Path, str | None]]) -> None:
    done = run("verify", "bundle", "--base", "base")
    assert verified == [(Path("bundle"), "base")]
    assert "318 tokens compared" in done.stdout
    assert "bundle: 8 files are as the manifest says" in done.stdout
    assert json.loads(run("verify", "bundle", "--base", "base", "--json").stdout) == json.loads(
        json.dumps(dataclasses.asdict(Verification(8, {"fp32": REPORT}, "base", None)))
    )


def test_verify_tells_what_was_not_checked(verified: list[tuple[Path, str | None]]) -> None:
    done = run("verify", "bundle")
    assert "The graphs were not compared with PyTorch: it is gone." in done.stdout


def test_help_names_every_choice() -> None:
    text = run("onnx", "--help").stdout
    assert all(choice in text for choice in (*PRECISIONS, *RULE_CODES))
    assert {"onnx", "inspect", "verify"} <= set(run("--help").stdout.split())
