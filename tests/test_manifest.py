"""The manifest: what is written is read back; what does not fit, or was changed, is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from das_asr.runtime import BundleError
from das_asr.runtime.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    AdapterEntry,
    AudioFrontEnd,
    BaseModel,
    Dimensions,
    Manifest,
    ParityReport,
    SpecialTokens,
    check_files,
    read_manifest,
    sha256_of,
    write_manifest,
)

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
STRINGS = st.dictionaries(st.text(), st.text(), max_size=3)
REPORTS = st.builds(
    ParityReport,
    max_logit_difference=NUMBERS,
    mean_logit_difference=NUMBERS,
    largest_logit=NUMBERS,
    tolerance=NUMBERS,
    adapter_effects=st.dictionaries(st.text(), NUMBERS, max_size=3),
)
MANIFESTS = st.builds(
    Manifest,
    schema_version=st.just(SCHEMA_VERSION),
    base=st.builds(BaseModel),
    dimensions=st.builds(Dimensions),
    audio=st.builds(AudioFrontEnd),
    tokens=st.builds(SpecialTokens),
    adapters=st.lists(st.builds(AdapterEntry, scale=NUMBERS, lineage=STRINGS), max_size=3).map(tuple),
    tau=NUMBERS,
    parity=st.dictionaries(st.text(), REPORTS, max_size=2),
    files=STRINGS,
    tools=STRINGS,
)

EXAMPLE = Manifest(
    schema_version=SCHEMA_VERSION,
    base=BaseModel("tiny", None, "00"),
    dimensions=Dimensions(80, 400, 96, 1209, 192, 4, 6, 768, 4, 6, 768),
    audio=AudioFrontEnd(16000, 400, 160, 128000),
    tokens=SpecialTokens(1200, 1201, None, 1206, 1207, 1204, None, {"en": 1202}, None),
    adapters=(AdapterEntry("music", 8, 2.0, ("self_attn.q_proj",), "11", None, {"made by": "us"}),),
    rule="hypothesis",
    tau=0.025,
    suppress_tokens=(1, 2),
    begin_suppress_tokens=(),
    precisions=("fp32",),
    opset=23,
    tools={"onnx": "1.18"},
    parity={"fp32": ParityReport(1e-5, 1e-6, 20.0, 1e-4, {"music": 3.0}, 10, 100, 0, ("paper",))},
    files={},
    created="2024-01-01T00:00:00Z",
)


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    write_manifest(EXAMPLE, folder)
    path = folder / MANIFEST_NAME
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")
    return folder


# --- Reading what was written ---


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(manifest=MANIFESTS)
def test_what_is_written_is_read_back(tmp_path: Path, manifest: Manifest) -> None:
    write_manifest(manifest, tmp_path)
    assert read_manifest(tmp_path) == manifest


def test_rows_are_the_adapters_and_the_base() -> None:
    assert EXAMPLE.rows == 2
    assert dataclasses.replace(EXAMPLE, adapters=()).rows == 1


def test_a_whole_number_is_taken_for_a_float(tmp_path: Path) -> None:
    manifest = read_manifest(edited(tmp_path, lambda data: data.update(tau=1)))
    assert isinstance(manifest.tau, float)


def test_a_field_with_a_default_may_be_missing(tmp_path: Path) -> None:
    manifest = read_manifest(edited(tmp_path, lambda data: data["adapters"][0].pop("lineage")))
    assert manifest.adapters[0].lineage == {}
    report = {"tokens_compared": 9, "tokens_differing": 0, "words": 0, "wer": None, "wer_fp32": None}
    manifest = read_manifest(edited(tmp_path, lambda data: data.update(variants={"int8": report})))
    assert manifest.variants["int8"].not_compared is None


# --- Refusals ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(colour="red"), "unknown field.* colour"),
        (lambda data: data["audio"].update(colour="red"), r"manifest.json\.audio has unknown field.* colour"),
        (lambda data: data.pop("tau"), "lacks field.* tau"),
        (lambda data: data["tokens"].pop("end_of_text"), r"manifest.json\.tokens lacks field.* end_of_text"),
        (lambda data: data.update(tau="0.1"), r"manifest.json\.tau must be"),
        (lambda data: data.update(tau=True), r"manifest.json\.tau must be"),
        (lambda data: data.update(opset=20.5), r"manifest.json\.opset must be"),
        (lambda data: data.update(opset=True), r"manifest.json\.opset must be"),
        (lambda data: data.update(opset=None), r"manifest.json\.opset must be"),
        (lambda data: data.update(base="tiny"), r"manifest.json\.base must be an object"),
        (lambda data: data.update(adapters={}), r"manifest.json\.adapters must be"),
        (lambda data: data.update(suppress_tokens=[1, "2"]), r"suppress_tokens\[1\] must be"),
        (lambda data: data.update(files={"a": 1}), r"files\['a'\] must be"),
        (lambda data: data["tokens"].update(languages={"en": None}), r"languages\['en'\] must be"),
        (lambda data: data["adapters"][0].update(rank="8"), r"adapters\[0\]\.rank must be"),
        (lambda data: data["base"].update(revision=3), r"base\.revision must be"),
    ],
)
def test_a_field_that_does_not_fit_is_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        read_manifest(edited(tmp_path, change))


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, "1", None, 1.5])
def test_another_schema_version_is_refused_with_both_numbers(tmp_path: Path, version: Any) -> None:
    folder = edited(tmp_path, lambda data: data.update(schema_version=version, colour="red"))
    with pytest.raises(BundleError, match=rf"schema version {version!r}, this runtime reads version {SCHEMA_VERSION}"):
        read_manifest(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"manifest"', "{}"])
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(b"\xff\xfe{}")
    with pytest.raises(BundleError, match="not valid JSON"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        read_manifest(tmp_path / name)


# --- Files ---


def bundle_with(folder: Path, **files: str) -> Manifest:
    """A manifest that names files, by path with `/` for `__`, all of them with the content `x`."""
    for name in files:
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x", encoding="utf-8")
    return dataclasses.replace(EXAMPLE, files={name.replace("__", "/"): sha for name, sha in files.items()})


X = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"


def test_hashes_are_sha256_of_the_content(tmp_path: Path) -> None:
    manifest = bundle_with(tmp_path, graph=X, adapters__music=X)
    assert sha256_of(tmp_path / "graph") == X
    check_files(manifest, tmp_path)


def test_a_changed_file_is_named(tmp_path: Path) -> None:
    manifest = bundle_with(tmp_path, graph=X, adapters__music=X)
    (tmp_path / "adapters" / "music").write_text("y", encoding="utf-8")
    with pytest.raises(BundleError, match=r"adapters/music differs from the hash"):
        check_files(manifest, tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    manifest = bundle_with(tmp_path, graph=X)
    (tmp_path / "graph").unlink()
    with pytest.raises(BundleError, match=r"graph is missing"):
        check_files(manifest, tmp_path)


@pytest.mark.parametrize("name", ["../outside", "adapters/../../outside", "/outside", "link"])
def test_a_path_that_leaves_the_bundle_is_refused_even_if_the_hash_is_right(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    outside = tmp_path / "outside"
    outside.write_text("x", encoding="utf-8")
    (folder / "link").symlink_to(outside)
    path = str(outside) if name.startswith("/") else name
    with pytest.raises(BundleError, match="outside the bundle"):
        check_files(dataclasses.replace(EXAMPLE, files={path: X}), folder)


def test_a_bundle_reached_by_a_link_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    manifest = bundle_with(folder, adapters__music=X)
    (tmp_path / "link").symlink_to(folder)
    check_files(manifest, tmp_path / "link")
