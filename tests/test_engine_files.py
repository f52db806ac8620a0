"""Before an engine is opened: it is the one that was built, it fits this machine, and it is large enough."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from das_asr.export import engine_check
from das_asr.export.engine_check import check_engine_files, verify_engines
from das_asr.runtime import contract
from das_asr.runtime.backends.cuda_device import gpu_target
from das_asr.runtime.backends.engine_files import (
    DECODER_ENGINE,
    ENGINE_RECORD,
    RECORD_VERSION,
    EngineLimits,
    EngineRecord,
    EngineUse,
    check_engine,
    find_engine,
    read_engine_file,
    read_record,
)
from das_asr.runtime.errors import BackendError, BundleError
from das_asr.runtime.manifest import EngineEntry, Manifest, VariantReport, read_manifest, sha256_of, write_manifest
from tests.bundles import make_bundle
from tests.checkpoints import make_base

NAME = "tensorrt-rtx-sm86-fp16"
USE = EngineUse("tensorrt-rtx", "1.7.1.116", "sm86", "fp16", batch=8, rows=26, rank=64)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(make_base(tmp_path / "base", d_model=32, seconds=2), {}, tmp_path / "bundle")


@pytest.fixture
def manifest(bundle: Path) -> Manifest:
    """Names an engine whose files have the right form; that real ones have it is shown in `test_engines.py`."""
    manifest = read_manifest(bundle)
    record = EngineRecord(
        RECORD_VERSION, "tensorrt-rtx", "1.7.1.116", "sm86", "fp16", EngineLimits(), 32, 0, dict(manifest.files)
    )
    return put(bundle, manifest, {ENGINE_RECORD: json.dumps(dataclasses.asdict(record)).encode()})


def put(bundle: Path, manifest: Manifest, files: dict[str, bytes], name: str = NAME) -> Manifest:
    """Writes an engine's files and names them in the manifest."""
    folder = bundle / "engines" / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in {DECODER_ENGINE: b"vtrt" + bytes(100), **files}.items():
        (folder / file).write_bytes(content)
    hashes = {path.name: sha256_of(path) for path in folder.iterdir()}
    entry = EngineEntry(hashes, verified=False, report=None)
    return dataclasses.replace(manifest, engines={**manifest.engines, name: entry})


def test_an_engine_that_fits_passes(bundle: Path, manifest: Manifest) -> None:
    name = find_engine(bundle, manifest, library="tensorrt-rtx", target="sm86", precision="fp16")
    assert name == NAME
    record = check_engine(bundle, manifest, name, USE)
    assert record.limits == EngineLimits(8, 26, 64)
    assert read_engine_file(bundle, manifest, name, DECODER_ENGINE).startswith(b"vtrt")


@pytest.mark.parametrize(
    ("change", "complaint", "command"),
    [
        ({"library": "tensorrt"}, "built with tensorrt-rtx, here it is tensorrt", "--library tensorrt"),
        ({"library_version": "1.8"}, "built with tensorrt-rtx 1.7.1.116, here it is 1.8", "--target sm86"),
        ({"target": "sm89"}, "built for compute capability sm86, here it is sm89", "--target sm89"),
        ({"precision": "fp32"}, "built in fp16, here it is fp32", "--precision fp32"),
        ({"batch": 9}, "up to 8 utterances, 9 are wanted", "--max-batch 9"),
        ({"rows": 40}, "up to 26 rows, 40 are wanted", "--max-rows 40"),
        ({"rank": 128}, "up to 64 as rank, 128 are wanted", "--max-rank 128"),
    ],
)
def test_a_mismatch_names_the_command_that_mends_it(
    bundle: Path, manifest: Manifest, change: dict[str, object], complaint: str, command: str
) -> None:
    with pytest.raises(BackendError) as caught:
        check_engine(bundle, manifest, NAME, dataclasses.replace(USE, **change))  # type: ignore[arg-type]
    text = str(caught.value)
    assert complaint in text
    assert f"das-export engine {bundle} --target" in text
    assert command in text.partition("das-export engine")[2]


def test_all_mismatches_are_named_at_once(bundle: Path, manifest: Manifest) -> None:
    use = dataclasses.replace(USE, target="sm89", rows=30, rank=70)
    with pytest.raises(BackendError, match=r"sm89; .*30 are wanted; .*70 are wanted.*--max-rows 30 --max-rank 70$"):
        check_engine(bundle, manifest, NAME, use)


def test_an_engine_of_other_graphs_is_refused(bundle: Path, manifest: Manifest) -> None:
    changed = dataclasses.replace(manifest, files={**manifest.files, "decoder_static.onnx": "00"})
    with pytest.raises(BackendError, match=r"other files than the bundle has now \(decoder_static\.onnx\)"):
        check_engine(bundle, changed, NAME, USE)


def test_an_engine_for_shorter_runs_is_refused(
    bundle: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contract, "_LONGEST_RUN", 33)
    with pytest.raises(BackendError, match=r"up to 32 new tokens in a run, 33 are wanted\. .*das-export engine"):
        check_engine(bundle, manifest, NAME, USE)


def test_a_missing_engine_is_told_with_the_command(bundle: Path, manifest: Manifest) -> None:
    with pytest.raises(BackendError, match=rf"no engine tensorrt-sm90-fp16; it has {NAME}.*--library tensorrt"):
        find_engine(bundle, manifest, library="tensorrt", target="sm90", precision="fp16")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"vtrt" + bytes(50), r"\(54 bytes\) differs from the hash"),  # truncated
        (b"vtrt" + bytes(99) + b"x", r"\(104 bytes\) differs from the hash"),  # one byte changed
        (b"", r"\(0 bytes\) differs from the hash"),
        (None, "is missing"),
    ],
)
def test_damaged_files_are_refused(bundle: Path, manifest: Manifest, content: bytes | None, complaint: str) -> None:
    path = bundle / "engines" / NAME / DECODER_ENGINE
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match=rf"{complaint}.*das-export engine"):
        read_engine_file(bundle, manifest, NAME, DECODER_ENGINE)


def test_a_foreign_engine_is_refused_even_if_the_manifest_names_it(bundle: Path, manifest: Manifest) -> None:
    manifest = put(bundle, manifest, {DECODER_ENGINE: b"ftrt" + bytes(100)})
    with pytest.raises(BundleError, match="no engine of tensorrt-rtx: it begins with b'ftrt'"):
        read_engine_file(bundle, manifest, NAME, DECODER_ENGINE)


def test_what_lies_beside_an_engine_is_no_engine(bundle: Path, manifest: Manifest) -> None:
    manifest = put(bundle, manifest, {"decoder.layers.json": b"{}"})
    assert check_engine_files(bundle, manifest) == 3


def test_every_librarys_engine_is_verified_with_that_library(
    bundle: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs them on a GPU is stood in for."""
    record = dataclasses.replace(read_record(bundle, manifest, NAME), library="tensorrt")
    content = json.dumps(dataclasses.asdict(record)).encode()
    write_manifest(put(bundle, manifest, {ENGINE_RECORD: content}, "tensorrt-sm86-fp16"), bundle)
    ran = []

    def compare(bundle: Path, manifest: Manifest, choices: dict[str, str], *_: object) -> VariantReport:
        ran.append((choices["library"], choices["precision"]))
        return VariantReport(100, 0, 0, None, None)

    monkeypatch.setattr(engine_check, "gpu_target", lambda _: "sm86")
    monkeypatch.setattr(engine_check, "installed_libraries", lambda: ("tensorrt", "tensorrt-rtx"))
    monkeypatch.setattr(engine_check, "compare_with_float32", compare)
    assert verify_engines(bundle, "cuda").keys() == {"tensorrt-sm86-fp16", NAME}
    assert sorted(ran) == [("tensorrt", "fp16"), ("tensorrt-rtx", "fp16")]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{}", f"not of version {RECORD_VERSION}"),
        (json.dumps({"record_version": RECORD_VERSION, "library": "tensorrt"}).encode(), r"lacks field\(s\)"),
    ],
)
def test_a_record_of_another_form_is_refused(bundle: Path, manifest: Manifest, content: bytes, complaint: str) -> None:
    manifest = put(bundle, manifest, {ENGINE_RECORD: content})
    with pytest.raises(BundleError, match=complaint):
        read_record(bundle, manifest, NAME)


def test_a_name_cannot_lead_out_of_the_bundle(bundle: Path, manifest: Manifest) -> None:
    entry = manifest.engines[NAME]
    evil = dataclasses.replace(manifest, engines={"../../other": entry})
    with pytest.raises(BundleError, match="no engine's name"):
        read_engine_file(bundle, evil, "../../other", DECODER_ENGINE)


@pytest.mark.gpu
def test_the_gpu_says_what_it_is() -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    major, minor = torch.cuda.get_device_capability(0)
    assert gpu_target(0) == f"sm{major}{minor}"
    assert gpu_target(99) is None
