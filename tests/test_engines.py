"""Engines, built for real by TensorRT-RTX, which needs no GPU to build. None is run here; that takes one."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from das_asr.export import (
    AdapterSource,
    EngineOptions,
    ExportOptions,
    build_engines,
    engine_check,
    export_bundle,
    variants,
    verify_bundle,
)
from das_asr.export.engines import alone_in
from das_asr.runtime.backends.cuda_device import gpu_target
from das_asr.runtime.backends.engine_files import (
    DECODER_ENGINE,
    ENCODER_ENGINE,
    ENGINE_RECORD,
    EngineLimits,
    read_engine_file,
    read_record,
)
from das_asr.runtime.errors import BackendError, BundleError, ExportError, OptionError, ParityError
from das_asr.runtime.manifest import Manifest, VariantReport, read_manifest, write_manifest
from tests.bundles import make_bundle
from tests.engines import SMALL, make_small_bundle, needs_tensorrt_rtx, no_gpu, options

pytestmark = needs_tensorrt_rtx

NAME = "tensorrt-rtx-sm86-fp32"
FILES = {ENCODER_ENGINE, DECODER_ENGINE, ENGINE_RECORD}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_bundle(tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def built(made: Path) -> Path:
    """A bundle with an engine. Read-only."""
    output = made.parent / "built"
    shutil.copytree(made, output)
    build_engines(output, options())
    return output


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A copy without engines."""
    return Path(shutil.copytree(made, tmp_path / "bundle"))


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    """A copy with an engine."""
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def state(bundle: Path) -> dict[str, tuple[int, int]]:
    """Every file with what changes when it is written again."""
    files = (path for path in bundle.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def leftovers(bundle: Path) -> list[str]:
    return [str(path) for path in bundle.rglob(".*")]


# --- Building ---


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_engines_for_two_gpus(demo_base: Path, demo_adapters: dict[str, Path], tmp_path: Path, precision: str) -> None:
    """With the default limits, in so little memory that nothing may be reserved for all utterances in each of them."""
    bundle = make_bundle(demo_base, demo_adapters, tmp_path / "bundle")
    manifest = build_engines(bundle, EngineOptions(targets=("sm86", "sm89"), precision=precision, workspace=256 << 20))
    names = [f"tensorrt-rtx-{target}-{precision}" for target in ("sm86", "sm89")]
    assert list(manifest.engines) == names
    assert read_manifest(bundle) == manifest
    assert not leftovers(bundle)
    for name in names:
        assert manifest.engines[name].files.keys() == FILES
        assert (manifest.engines[name].verified, manifest.engines[name].report) == (False, None)
        record = read_record(bundle, manifest, name)
        assert f"{record.library}-{record.target}-{record.precision}" == name
        assert (record.limits, record.longest_run) == (EngineLimits(8, 26, 64), 32)
        for file in (ENCODER_ENGINE, DECODER_ENGINE):
            assert read_engine_file(bundle, manifest, name, file).startswith(b"vtrt")
    first, second = (manifest.engines[name].files[DECODER_ENGINE] for name in names)
    assert first != second


def test_bf16_is_built_where_the_gpu_has_it(copy: Path) -> None:
    manifest = build_engines(copy, options(precision="bf16"))
    assert list(manifest.engines) == ["tensorrt-rtx-sm86-bf16", NAME]
    with pytest.raises(ExportError, match=r"for sm75: .*HW-specific datatypes: b16.*another --precision"):
        build_engines(copy, options("sm75", precision="bf16"))


def test_a_bundles_own_halves_are_what_an_engine_is_built_from(made: Path, tmp_path: Path) -> None:
    """And `onnx --engine` builds in one go, in the precision that `engine` has by default."""
    output = tmp_path / "bundle"
    engines = EngineOptions(targets=("sm86",), limits=EngineLimits(max_rows=1, max_rank=1))
    export = ExportOptions(
        base=str(made.parent / "base"),
        adapters=(AdapterSource("music", made.parent / "music"),),
        output=output,
        precisions=("fp32", "fp16"),
        engines=engines,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "MOST_DIFFERENT", 1.0)  # of random weights: what the halves write is tested elsewhere
        manifest = export_bundle(export)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    record = read_record(output, manifest, "tensorrt-rtx-sm86-fp16")
    assert {Path(file).parent.as_posix() for file in record.sources} == {"fp16"}
    assert record.limits == EngineLimits(max_rows=2, max_rank=4)  # raised to what the bundle itself needs
    assert build_engines(output, dataclasses.replace(engines, limits=record.limits)) == manifest


def test_an_export_that_could_not_build_its_engines_does_not_begin(tmp_path: Path) -> None:
    engines = EngineOptions(targets=("sm52",), library="tensorrt-rtx")
    with pytest.raises(BackendError, match="not for sm52"):
        export_bundle(ExportOptions(base="nowhere", output=tmp_path / "bundle", engines=engines))


def test_building_again_changes_nothing(built: Path) -> None:
    before = state(built)
    manifest = build_engines(built, options())
    assert state(built) == before
    assert list(manifest.engines) == [NAME]


def test_other_limits_replace_an_engine(copy: Path) -> None:
    before = read_manifest(copy).engines[NAME].files
    manifest = build_engines(copy, options(limits=dataclasses.replace(SMALL, max_rows=6)))
    after = manifest.engines[NAME].files
    assert all(before[file] != after[file] for file in FILES)
    assert read_record(copy, manifest, NAME).limits.max_rows == 6
    assert not leftovers(copy)


def test_a_damaged_engine_is_built_again(copy: Path) -> None:
    engine = copy / "engines" / NAME / DECODER_ENGINE
    engine.write_bytes(engine.read_bytes()[:-100])
    with pytest.raises(BundleError, match=r"differs from the hash.*das-export engine"):
        verify_bundle(copy)
    build_engines(copy, options())
    assert verify_bundle(copy).files == len(read_manifest(copy).files) + len(FILES)


def test_an_engine_is_not_built_from_a_damaged_bundle(bundle: Path) -> None:
    weights = bundle / "decoder.onnx.data"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match="differs from the hash"):
        build_engines(bundle, options())
    assert not (bundle / "engines").exists()


def test_what_the_builder_refuses_is_told_and_leaves_nothing(copy: Path) -> None:
    before = state(copy)
    with pytest.raises(ExportError, match=r"cannot build encoder\.onnx for sm75: .*FP32 GEMM is not supported.*--prec"):
        build_engines(copy, options("sm75"))
    assert state(copy) == before
    assert sorted(path.name for path in (copy / "engines").iterdir()) == [NAME]


def test_too_little_memory_is_told(bundle: Path) -> None:
    with pytest.raises(ExportError, match=r"workspace limit.*give more --workspace"):
        build_engines(bundle, options(limits=EngineLimits(64, 65, 64), workspace=1 << 20))
    assert not (bundle / "engines").exists()


# --- What is refused before building ---


@no_gpu
def test_a_target_that_cannot_be_built_for_names_what_to_install(bundle: Path) -> None:
    with pytest.raises(BackendError, match=r"builds for .*sm86.*, not for sm90\. Install `das-asr\[tensorrt\]`"):
        build_engines(bundle, options("sm86", "sm90"))
    assert not (bundle / "engines").exists()


def test_a_bundle_without_the_static_decoder_is_told(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    files = {name: sha256 for name, sha256 in manifest.files.items() if name != "decoder_static.onnx"}
    write_manifest(dataclasses.replace(manifest, files=files), bundle)
    with pytest.raises(BundleError, match=r"no decoder_static\.onnx.*Export it again"):
        build_engines(bundle, options())


def test_limits_hold_the_bundles_own_adapters(bundle: Path) -> None:
    for limits, complaint in (
        (EngineLimits(max_rows=1), "--max-rows is 1.*need 2"),
        (EngineLimits(max_rank=3), "need 4"),
    ):
        with pytest.raises(OptionError, match=complaint):
            build_engines(bundle, options(limits=limits))


@pytest.mark.parametrize(
    ("choices", "complaint"),
    [
        ({"targets": ()}, "--target is missing"),
        ({"targets": ("sm86", "sm86")}, "distinct"),
        ({"targets": ("8.6",)}, "such as sm86"),
        ({"targets": ("sm86",), "precision": "int8"}, "--precision is 'int8'"),
        ({"targets": ("sm86",), "library": "trt"}, "--library is 'trt'"),
        ({"targets": ("sm86",), "workspace": 0}, "--workspace is 0"),
        ({"targets": ("sm86",), "limits": EngineLimits(max_batch=0)}, "--max-batch is 0"),
    ],
)
def test_options_that_make_no_sense(choices: dict[str, Any], complaint: str) -> None:
    with pytest.raises(OptionError, match=complaint):
        EngineOptions(**choices)


def test_two_do_not_build_at_once(bundle: Path) -> None:
    with alone_in(bundle), pytest.raises(ExportError, match="Somebody else is changing"):
        build_engines(bundle, options())


# --- Killed ---


def script(name: str) -> str:
    return str(Path(sysconfig.get_path("scripts")) / name)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def building(bundle: Path) -> Iterator[subprocess.Popen[str]]:
    """`das-export engine`, in the middle of building."""
    arguments = ["--target", "sm86", "--target", "sm89", "--precision", "fp32"]
    command = [script("das-export"), "engine", str(bundle), *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any("Building engine" in line for line in process.stderr)
        assert list(bundle.glob("engines/.*.partial-*"))
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_build_leaves_nothing(bundle: Path, building: subprocess.Popen[str], number: signal.Signals) -> None:
    before = (bundle / "manifest.json").read_bytes()
    building.send_signal(number)
    assert building.wait(60) != 0
    wait_for(lambda: not (bundle / "engines").exists())
    assert (bundle / "manifest.json").read_bytes() == before
    assert not leftovers(bundle)


def test_the_next_build_removes_what_a_power_cut_left(copy: Path) -> None:
    for left in (f".{NAME}.partial-0123abcd", f".{NAME}.old-0123abcd"):
        (copy / "engines" / left).mkdir()
        (copy / "engines" / left / "decoder.engine").write_bytes(b"vtrt")
    build_engines(copy, options())
    assert not leftovers(copy)


# --- The command line ---


def test_inspect_says_that_an_engine_has_never_run(built: Path, run_script: Callable[..., Any]) -> None:
    assert (
        f"Engine {NAME}, verified: false (built, and never run on a GPU)"
        in run_script("das-export", "inspect", built).stdout
    )
    document = json.loads(run_script("das-export", "inspect", built, "--json").stdout)
    assert document["engines"][NAME]["verified"] is False


def test_a_build_tells_what_it_does(bundle: Path, run_script: Callable[..., Any]) -> None:
    arguments = ["--target", "sm86", "--precision", "fp32", "--max-batch", "2", "--max-rows", "4", "--max-rank", "8"]
    done = run_script("das-export", "engine", bundle, *arguments, "--workspace", "1G")
    for part in ("building with tensorrt-rtx", f"building {NAME}", "decoder: Building engine"):
        assert part in done.stderr
    assert f"Engine {NAME}, verified: false" in done.stdout
    again = run_script("das-export", "engine", bundle, *arguments, "--workspace", "1G", "--json")
    assert json.loads(again.stdout)["engines"].keys() == {NAME}
    assert again.stderr == ""


# --- Running ---


@no_gpu
def test_without_a_gpu_an_engine_stays_unverified(copy: Path) -> None:
    with pytest.raises(
        BackendError, match=r"stay unverified: this machine lacks an NVIDIA GPU .*for sm86.*--device cuda"
    ):
        verify_bundle(copy, device="cuda")
    assert not read_manifest(copy).engines[NAME].verified


@pytest.mark.parametrize(("differing", "verified"), [(3, True), (4, False)])
def test_the_mark_is_what_was_measured(copy: Path, differing: int, verified: bool) -> None:
    report = VariantReport(100, differing, 0, None, None)
    engine_check._mark(copy, NAME, report)
    entry = read_manifest(copy).engines[NAME]
    assert (entry.verified, entry.report) == (verified, report)
    assert build_engines(copy, options()).engines[NAME] == entry  # nothing changed, so the mark stays
    if not verified:
        with pytest.raises(ParityError, match=r"4 of 100 tokens .*4\.0%"):
            engine_check._check(NAME, report)


def test_there_must_be_an_engine_to_run(bundle: Path, built: Path) -> None:
    with pytest.raises(BackendError, match="no engines to run"):
        engine_check.verify_engines(bundle, "cuda")
    with pytest.raises(OptionError, match="engines run on a GPU only"):
        engine_check.verify_engines(built, "cpu")


@pytest.mark.gpu
def test_an_engine_for_this_gpu_runs_and_is_marked(
    demo_base: Path, demo_adapters: dict[str, Path], tmp_path: Path
) -> None:
    target = gpu_target()
    if target is None:
        pytest.skip("no CUDA device")
    bundle = make_bundle(demo_base, demo_adapters, tmp_path / "bundle")
    manifest: Manifest = build_engines(bundle, EngineOptions(targets=(target,), precision="fp32"))
    (name,) = manifest.engines
    report = engine_check.verify_engines(bundle, "cuda")[name]
    assert report.tokens_compared > 100
    entry = read_manifest(bundle).engines[name]
    assert (entry.verified, entry.report) == (True, report)
