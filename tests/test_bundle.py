"""A bundle is whole or absent, says what it holds, and can be checked again."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import soundfile

from das_asr.export import AdapterSource, ExportOptions, export_bundle, inspect_bundle, verify_bundle
from das_asr.export.clips import load_clips
from das_asr.export.staging import check_target, staged
from das_asr.runtime.adapters import load_adapter
from das_asr.runtime.errors import (
    AdapterError,
    AudioError,
    BundleError,
    CheckpointError,
    DasError,
    ExportError,
    OptionError,
    ParityError,
)
from das_asr.runtime.manifest import AudioFrontEnd, Manifest, ParityReport, check_files, sha256_of
from das_asr.runtime.peft_checkpoint import read_adapter
from tests.checkpoints import edit_config, make_adapter, make_base, quiet

REPORT = ParityReport(1e-6, 1e-7, 10.0, 2e-5, {}, 6, 10, 0, ("paper", "hypothesis"))
FILES = {
    "adapters/music.safetensors",
    "adapters/weather.v2.safetensors",
    "decoder.onnx",
    "decoder.onnx.data",
    "decoder_static.onnx",
    "encoder.onnx",
    "encoder.onnx.data",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
}


@dataclasses.dataclass(frozen=True)
class Sources:
    base: Path
    adapters: tuple[AdapterSource, ...]

    def options(self, output: Path, **changes: Any) -> ExportOptions:
        return ExportOptions(**{"base": str(self.base), "adapters": self.adapters, "output": output} | changes)


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    folder = tmp_path_factory.mktemp("sources")
    base = make_base(folder / "base", d_model=32, seconds=5, text_positions=16)
    adapters = tuple(
        AdapterSource(name, make_adapter(base, folder / name, seed=seed, rank=4 - seed))
        for seed, name in enumerate(("music", "weather.v2"))
    )
    return Sources(base, adapters)


@pytest.fixture(scope="module")
def bundle(sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported for real; read-only."""
    options = sources.options(tmp_path_factory.mktemp("whole") / "bundle", rule="gain", tau=0.1)
    export_bundle(options)
    return options.output


@pytest.fixture
def no_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests about files: the gate passes at once."""
    monkeypatch.setattr("das_asr.export.parity.check_parity", lambda *_: REPORT)


def contents(folder: Path) -> set[str]:
    """Everything under a folder, hidden files included."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


# --- What a bundle holds ---


def test_a_bundle_holds_the_files_of_its_manifest(bundle: Path) -> None:
    manifest = inspect_bundle(bundle)
    assert manifest.files.keys() == FILES
    assert contents(bundle) == FILES | {"manifest.json", "adapters"}
    check_files(manifest, bundle)


def test_the_manifest_tells_where_the_bundle_comes_from(bundle: Path, sources: Sources) -> None:
    manifest = inspect_bundle(bundle)
    assert (manifest.base.id, manifest.base.revision) == (str(sources.base), None)
    assert (manifest.rule, manifest.tau, manifest.precisions) == ("gain", 0.1, ("fp32",))
    assert manifest.suppress_tokens == (1, 2, 7)
    assert len(manifest.begin_suppress_tokens) == 2
    assert (manifest.dimensions.d_model, manifest.audio.window_seconds) == (32, 5)
    assert manifest.tools.keys() >= {"das-asr", "onnx", "onnxruntime", "peft", "torch", "transformers"}
    assert datetime.fromisoformat(manifest.created).tzinfo is not None
    assert manifest.parity["fp32"].adapter_effects.keys() == {"music", "weather.v2"}
    opsets = [
        onnx.load(bundle / f"{name}.onnx", load_external_data=False).opset_import for name in ("encoder", "decoder")
    ]
    assert manifest.opset == max(opset.version for (opset,) in opsets)


def test_the_manifest_describes_the_adapters(bundle: Path) -> None:
    manifest = inspect_bundle(bundle)
    assert [(entry.name, entry.rank, entry.scale) for entry in manifest.adapters] == [
        ("music", 4, 2.0),
        ("weather.v2", 3, 8 / 3),
    ]
    assert all(len(entry.target_modules) == 4 for entry in manifest.adapters)
    assert all(entry.sha256 == manifest.files[f"adapters/{entry.name}.safetensors"] for entry in manifest.adapters)


def test_adapters_are_kept_as_they_were_read(bundle: Path, sources: Sources) -> None:
    dims = inspect_bundle(bundle).dimensions
    for source in sources.adapters:
        kept = load_adapter(bundle / "adapters" / f"{source.name}.safetensors", source.name, dims)
        read = read_adapter(source.directory, source.name, dims)
        assert dataclasses.replace(kept, weights={}) == dataclasses.replace(read, weights={})
        assert all(np.array_equal(kept.weights[key], read.weights[key]) for key in read.weights)


def test_graphs_tell_where_they_come_from(bundle: Path, sources: Sources) -> None:
    model = onnx.load(bundle / "decoder.onnx", load_external_data=False)
    about = {prop.key: prop.value for prop in model.metadata_props}
    manifest = inspect_bundle(bundle)
    assert about["das.base"] == str(sources.base)
    assert about["das.base_sha256"] == manifest.base.sha256
    assert json.loads(about["das.adapters"]) == ["music", "weather.v2"]
    assert json.loads(about["das.dimensions"]) == dataclasses.asdict(manifest.dimensions)
    assert about["das.version"] == manifest.tools["das-asr"]


def test_transformers_reads_the_front_end(bundle: Path, sources: Sources) -> None:
    from transformers import WhisperFeatureExtractor

    with quiet():
        ours, theirs = (WhisperFeatureExtractor.from_pretrained(folder) for folder in (bundle, sources.base))
    audio = np.random.default_rng(0).standard_normal(16000).astype(np.float32) * 0.1
    first, second = (extractor(audio, sampling_rate=16000)["input_features"] for extractor in (ours, theirs))
    np.testing.assert_array_equal(first, second)


@pytest.mark.usefixtures("no_gate")
def test_the_same_sources_make_the_same_files(sources: Sources, bundle: Path, tmp_path: Path) -> None:
    again = export_bundle(sources.options(tmp_path / "again"))
    assert again.files == inspect_bundle(bundle).files


def test_the_bundle_is_readable_by_everyone_who_may(bundle: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    assert bundle.stat().st_mode & 0o777 == 0o777 & ~umask
    assert all(path.stat().st_mode & 0o444 & ~umask for path in bundle.rglob("*"))


# --- Where it is written ---


@pytest.mark.usefixtures("no_gate")
def test_missing_folders_above_are_made(sources: Sources, tmp_path: Path) -> None:
    export_bundle(sources.options(tmp_path / "a" / "b" / "bundle"))
    assert contents(tmp_path / "a") == {"b", "b/bundle"} | {
        f"b/bundle/{name}" for name in contents(tmp_path / "a/b/bundle")
    }


@pytest.mark.usefixtures("no_gate")
def test_force_replaces_a_bundle(sources: Sources, tmp_path: Path) -> None:
    options = sources.options(tmp_path / "bundle")
    export_bundle(options)
    (options.output / "extra").write_text("from the old bundle")
    manifest = export_bundle(dataclasses.replace(options, force=True, rule="base"))
    assert inspect_bundle(options.output) == manifest
    assert manifest.rule == "base"
    assert contents(options.output) == FILES | {"manifest.json", "adapters"}
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def not_forced(output: Path) -> dict[str, Any]:
    output.mkdir()
    return {}


def no_bundle(output: Path) -> dict[str, Any]:
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    return {"force": True}


def a_file(output: Path) -> dict[str, Any]:
    output.write_text("years of work")
    return {"force": True}


def below_a_file(output: Path) -> dict[str, Any]:
    output.write_text("years of work")
    return {"force": True, "output": output / "bundle"}


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (not_forced, "exists.*--force"),
        (no_bundle, "not a bundle"),
        (a_file, "not a folder"),
        (below_a_file, "No folder can be made"),
    ],
)
@pytest.mark.usefixtures("no_gate")
def test_what_is_no_bundle_is_never_replaced(
    sources: Sources, tmp_path: Path, prepare: Callable[[Path], dict[str, Any]], message: str
) -> None:
    output = tmp_path / "bundle"
    changes = prepare(output)
    before = contents(tmp_path)
    with pytest.raises(ExportError, match=message):
        export_bundle(sources.options(**{"output": output} | changes))
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("no_gate")
def test_force_takes_an_empty_folder(sources: Sources, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    export_bundle(sources.options(tmp_path / "bundle", force=True))
    assert contents(tmp_path / "bundle") >= FILES


def test_a_target_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "bundle"

    def write() -> None:
        with staged(target, force=False) as folder:
            (folder / "ours").touch()
            target.mkdir()
            (target / "theirs").touch()

    with pytest.raises(ExportError, match="exists"):
        write()
    assert contents(tmp_path) == {"bundle", "bundle/theirs"}


def test_a_link_is_written_through(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (real / "manifest.json").touch()
    (tmp_path / "link").symlink_to(real)
    with staged(tmp_path / "link", force=True) as folder:
        (folder / "new").touch()
    assert contents(real) == {"new"}
    assert (tmp_path / "link").is_symlink()


def test_a_dangling_link_is_not_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ExportError, match="exists"):
        check_target(tmp_path / "link", force=False)


def test_the_old_bundle_stays_when_renaming_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "manifest.json").write_text("old")
    rename = Path.rename

    def failing(path: Path, new: Path) -> Path:
        if ".partial-" in path.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, new)

    def write() -> None:
        with staged(target, force=True) as folder:
            (folder / "manifest.json").write_text("new")

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        write()
    assert contents(tmp_path) == {"bundle", "bundle/manifest.json"}
    assert (target / "manifest.json").read_text() == "old"


# --- Nothing is left behind ---


def bad_base(sources: Sources, folder: Path) -> dict[str, Any]:
    return {"base": str(folder / "nothing")}


def truncated_base(sources: Sources, folder: Path) -> dict[str, Any]:
    base = shutil.copytree(sources.base, folder / "base")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return {"base": str(base)}


def pickled_adapter(sources: Sources, folder: Path) -> dict[str, Any]:
    adapter = shutil.copytree(sources.adapters[0].directory, folder / "adapter")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    return {"adapters": (AdapterSource("music", adapter),)}


def broken_adapter(sources: Sources, folder: Path) -> dict[str, Any]:
    adapter = shutil.copytree(sources.adapters[0].directory, folder / "adapter")
    (adapter / "adapter_model.safetensors").write_bytes(b"\x00" * 100)
    return {"adapters": (AdapterSource("music", adapter),)}


def encoder_adapter(sources: Sources, folder: Path) -> dict[str, Any]:
    adapter = make_adapter(sources.base, folder / "adapter", targets=["q_proj"])
    return {"adapters": (AdapterSource("music", adapter),)}


def no_tokenizer(sources: Sources, folder: Path) -> dict[str, Any]:
    base = shutil.copytree(sources.base, folder / "base")
    (base / "tokenizer.json").unlink()
    return {"base": str(base)}


def no_end_of_text(sources: Sources, folder: Path) -> dict[str, Any]:
    """Only found while the bundle is being written."""
    base = shutil.copytree(sources.base, folder / "base")
    tokenizer = base / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|endoftext|>", "<|end|>"))
    return {"base": str(base)}


def not_finite(sources: Sources, folder: Path) -> dict[str, Any]:
    """Only found while the weights are being written."""
    from safetensors.numpy import load_file, save_file

    base = shutil.copytree(sources.base, folder / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.decoder.layers.1.fc2.bias"][0] = np.nan
    save_file(weights, base / "model.safetensors")
    return {"base": str(base)}


def long_clip(sources: Sources, folder: Path) -> dict[str, Any]:
    soundfile.write(folder / "long.wav", np.full(16000 * 6, 0.1), 16000)
    return {"sample_audio": (folder / "long.wav",)}


def silent_clip(sources: Sources, folder: Path) -> dict[str, Any]:
    soundfile.write(folder / "silent.wav", np.zeros(16000), 16000)
    return {"sample_audio": (folder / "silent.wav",)}


FAULTS: list[tuple[Callable[[Sources, Path], dict[str, Any]], type[DasError], str]] = [
    (bad_base, CheckpointError, "nothing"),
    (truncated_base, CheckpointError, "cannot be read as safetensors"),
    (no_tokenizer, CheckpointError, "no tokenizer.json"),
    (no_end_of_text, CheckpointError, "endoftext"),
    (not_finite, CheckpointError, "NaN"),
    (pickled_adapter, AdapterError, "pickle"),
    (broken_adapter, AdapterError, "cannot be read as safetensors"),
    (encoder_adapter, AdapterError, "encoder"),
    (long_clip, AudioError, r"--sample-audio .*long.wav: The audio lasts 6.00 s"),
    (silent_clip, AudioError, "silent"),
]


@pytest.mark.parametrize(("prepare", "error", "message"), FAULTS, ids=[fault[0].__name__ for fault in FAULTS])
@pytest.mark.usefixtures("no_gate")
def test_wrong_input_leaves_nothing(
    sources: Sources,
    tmp_path: Path,
    prepare: Callable[[Sources, Path], dict[str, Any]],
    error: type[DasError],
    message: str,
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    options = sources.options(**{"output": place / "new" / "bundle"} | prepare(sources, tmp_path))
    with pytest.raises(error, match=message):
        export_bundle(options)
    assert contents(place) == set()


@pytest.mark.parametrize(
    "error", [ParityError("logits differ"), KeyboardInterrupt(), SystemExit(143), RuntimeError("bug")]
)
def test_a_failing_gate_leaves_what_was_there(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "manifest.json").write_text("old")

    def gate(directory: Path, manifest: Manifest, *_: Any) -> ParityReport:
        check_files(manifest, directory)  # complete before it is judged
        assert not manifest.parity
        raise error

    monkeypatch.setattr("das_asr.export.parity.check_parity", gate)
    with pytest.raises(type(error)):
        export_bundle(sources.options(target, force=True))
    assert contents(tmp_path) == {"bundle", "bundle/manifest.json"}
    assert (target / "manifest.json").read_text() == "old"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("where", ["das_asr.export.builder.WeightFile._write", "das_asr.export.bundle._write_settings"])
def test_a_full_disk_is_told(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, where: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(where, full)
    with pytest.raises(ExportError, match=rf"{os.strerror(number)}.*free some space"):
        export_bundle(sources.options(tmp_path / "bundle"))
    assert contents(tmp_path) == set()


def limited_export(sources: Sources, output: Path, limit: int) -> subprocess.CompletedProcess[str]:
    """An export in a process that may not write files larger than `limit` bytes."""
    code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
from das_asr.export.cli import main
main()
"""
    adapters = [part for source in sources.adapters for part in ("--adapter", f"{source.name}={source.directory}")]
    command = [sys.executable, "-c", code, "onnx", "--base", str(sources.base), *adapters, "--output", str(output)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("limit", [5_000, 100_000])  # bytes: of an adapter's file, of the weights
def test_files_that_cannot_grow_are_told(sources: Sources, tmp_path: Path, limit: int) -> None:
    done = limited_export(sources, tmp_path / "bundle", limit)
    assert (done.returncode, done.stdout) == (1, "")
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(tmp_path) == set()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_a_stopped_export_leaves_nothing(sources: Sources, tmp_path: Path, number: int, code: int) -> None:
    # A signal while a C extension initialises becomes an ImportError of that extension: these are loaded before.
    script = [sys.executable, "-c", "import onnxruntime, torch; from das_asr.export.cli import main; main()"]
    process = subprocess.Popen(
        [*script, "onnx", "--base", str(sources.base), "--output", str(tmp_path / "new" / "bundle")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("new/.bundle.partial-*/decoder.onnx")):  # the gate comes next, and takes seconds
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert b"Traceback" not in errors
    assert contents(tmp_path) == set()


# --- Options ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "best"}, "--rule is 'best'"),
        ({"precisions": ("fp32", "int2")}, "--precision is 'int2'"),
        ({"precisions": ("int8",)}, "expected distinct names with fp32"),
        ({"eval_manifest": Path("x.jsonl")}, "--precision names only one"),
        ({"tau": 1.5}, "--tau is 1.5"),
        ({"tau": float("nan")}, "--tau is nan"),
        ({"revision": "main"}, "--revision main needs a hub id"),
        ({"adapters": (AdapterSource("a", Path("x")), AdapterSource("A", Path("y")))}, "Two adapters"),
        ({"adapters": (AdapterSource("../a", Path("x")),)}, "'../a' cannot name an adapter"),
        ({"adapters": (AdapterSource("base", Path("x")),)}, "row 0"),
        ({"adapters": tuple(AdapterSource(f"a{i}", Path("x")) for i in range(65))}, "65 adapters"),
    ],
)
def test_options_that_cannot_be_are_refused(sources: Sources, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        sources.options(Path("bundle"), **changes)


def test_the_packaged_clips_are_cut_to_a_short_window() -> None:
    front_end = AudioFrontEnd(sample_rate=16000, n_fft=400, hop_length=160, window_samples=16000)
    clips = load_clips((), front_end)
    assert len(clips) >= 3
    assert {len(clip) for clip in clips} == {16000}


# --- Verifying ---


@pytest.fixture
def gate_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    calls: list[tuple[Any, ...]] = []

    def gate(*arguments: Any) -> ParityReport:
        calls.append(arguments)
        return REPORT

    monkeypatch.setattr("das_asr.export.parity.check_parity", gate)
    return calls


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bundle, tmp_path / "copy")


def test_verify_runs_the_gate_with_the_recorded_base(bundle: Path, sources: Sources) -> None:
    found = verify_bundle(bundle)
    assert (found.files, found.base, found.skipped) == (len(FILES), str(sources.base), None)
    assert found.parity["fp32"].adapter_effects.keys() == {"music", "weather.v2"}
    assert found.parity["fp32"].tokens_compared == inspect_bundle(bundle).parity["fp32"].tokens_compared


def without_base(bundle: Path) -> None:
    edit_config(
        bundle, "manifest.json", base={**json.loads((bundle / "manifest.json").read_text())["base"], "id": "gone"}
    )


def test_verify_without_the_base_checks_the_files_only(copy: Path, gate_calls: list[tuple[Any, ...]]) -> None:
    without_base(copy)
    found = verify_bundle(copy)
    assert (found.parity, found.base) == ({}, None)
    assert "gone is not at hand" in str(found.skipped)
    assert not gate_calls


def test_verify_takes_the_base_it_is_given(copy: Path, sources: Sources, gate_calls: list[tuple[Any, ...]]) -> None:
    without_base(copy)
    assert verify_bundle(copy, sources.base).parity == {"fp32": REPORT}
    (call,) = gate_calls
    assert (call[0], call[3]) == (copy, sources.base)


def test_verify_refuses_another_base(copy: Path, sources: Sources, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", d_model=32, seconds=5, text_positions=16, seed=1)
    with pytest.raises(BundleError, match="Give the base it was made from"):
        verify_bundle(copy, other)


def test_verify_does_not_blame_the_bundle_for_a_changed_base(
    copy: Path, tmp_path: Path, gate_calls: list[tuple[Any, ...]]
) -> None:
    recorded = json.loads((copy / "manifest.json").read_text())["base"]
    edit_config(copy, "manifest.json", base={**recorded, "id": str(tmp_path)})
    assert "no longer holds the base" in str(verify_bundle(copy).skipped)
    assert not gate_calls


@pytest.mark.parametrize("name", sorted(FILES))
def test_verify_finds_every_changed_file(copy: Path, name: str) -> None:
    path = copy / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} differs"):
        verify_bundle(copy)


def test_verify_finds_a_wrong_graph_with_a_right_hash(copy: Path) -> None:
    """Hashes protect against accidents; the gate also against an exporter that was wrong."""
    path = copy / "decoder.onnx.data"
    data = np.memmap(path, np.float32, "r+")
    data[: len(data) // 2] *= 1.01
    data.flush()
    files = inspect_bundle(copy).files
    edit_config(copy, "manifest.json", files={**files, path.name: sha256_of(path)})
    with pytest.raises(ParityError, match="logits differ"):
        verify_bundle(copy)


def test_inspect_needs_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        inspect_bundle(tmp_path)
