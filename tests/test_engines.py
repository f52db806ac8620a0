"""Engines, built for real by TensorRT-RTX, which needs no GPU to build. None is run here; that takes one."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from das_asr.export import EngineOptions, build_engines, engine_worker, verify_bundle
from das_asr.export.engine_check import verify_engines
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
from das_asr.runtime.backends.tensorrt_library import installed_libraries, load_library
from das_asr.runtime.contract import encoder_inputs, static_decoder_inputs
from das_asr.runtime.errors import BackendError, BundleError, ExportError, OptionError
from das_asr.runtime.manifest import Manifest, read_manifest
from tests.bundles import make_bundle
from tests.checkpoints import make_adapter, make_base

pytestmark = pytest.mark.skipif(
    "tensorrt-rtx" not in installed_libraries(), reason="needs the wheels of the extra [tensorrt-rtx]"
)
no_gpu = pytest.mark.skipif(gpu_target() is not None, reason="is about a machine without a GPU")

SMALL = EngineLimits(max_batch=2, max_rows=4, max_rank=8)
NAME = "tensorrt-rtx-sm86-fp32"
FILES = {ENCODER_ENGINE, DECODER_ENGINE, ENGINE_RECORD}

Inode = dict[str, tuple[int, int]]


def options(*targets: str, **choices: Any) -> EngineOptions:
    defaults = {"precision": "fp32", "limits": SMALL, "library": "tensorrt-rtx"}
    return EngineOptions(targets=targets or ("sm86",), **{**defaults, **choices})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    base = make_base(folder / "base", d_model=32, seconds=2, text_positions=16)
    return make_bundle(base, {"music": make_adapter(base, folder / "music")}, folder / "bundle")


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


def state(bundle: Path) -> Inode:
    """Every file with what changes when it is written again."""
    files = (path for path in bundle.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def leftovers(bundle: Path) -> list[str]:
    return [str(path) for path in bundle.rglob(".*")]


# --- Building ---


@pytest.mark.parametrize("precision", ["fp32"])
def test_engines_for_two_gpus(
    repo: Path, demo_base: Path, demo_adapters: dict[str, Path], tmp_path: Path, precision: str
) -> None:
    bundle = make_bundle(demo_base, demo_adapters, tmp_path / "bundle")
    manifest = build_engines(bundle, EngineOptions(targets=("sm86", "sm89"), precision=precision, workspace=2 << 30))
    names = [f"tensorrt-rtx-{target}-{precision}" for target in ("sm86", "sm89")]
    assert list(manifest.engines) == names
    assert read_manifest(bundle) == manifest
    assert not leftovers(bundle)
    for name in names:
        assert manifest.engines[name].files.keys() == FILES
        assert (manifest.engines[name].verified, manifest.engines[name].report) == (False, None)
        record = read_record(bundle, manifest, name)
        assert f"{record.library}-{record.target}-{record.precision}" == name
        assert (record.limits, record.longest_prompt) == (EngineLimits(8, 26, 64), 52)
        for file in (ENCODER_ENGINE, DECODER_ENGINE):
            assert read_engine_file(bundle, manifest, name, file).startswith(b"vtrt")
    first, second = (manifest.engines[name].files[DECODER_ENGINE] for name in names)
    assert first != second


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


# --- The network ---


@pytest.fixture(scope="module")
def networks(made: Path) -> dict[str, Any]:
    """Both graphs as TensorRT reads them; the values keep alive what the networks need."""
    library = load_library("tensorrt-rtx")
    log = library.module.Logger(library.module.Logger.ERROR)
    builder = library.module.Builder(log)
    files = {name: made / f"{name}.onnx" for name in ("encoder", "decoder_static")}
    parsed = {name: engine_worker.parse_network(library, builder, log, file) for name, file in files.items()}
    return {name: (network, parser, builder, log) for name, (network, parser) in parsed.items()}


def layers(network: Any, kind: str) -> list[Any]:
    found = (network.get_layer(index) for index in range(network.num_layers))
    return [layer for layer in found if layer.type.name == kind]


def test_adapters_are_inputs(networks: dict[str, Any], made: Path) -> None:
    dims = read_manifest(made).dimensions
    for name, specs in (("encoder", encoder_inputs(dims)), ("decoder_static", static_decoder_inputs(dims))):
        network = networks[name][0]
        inputs = {network.get_input(index).name for index in range(network.num_inputs)}
        assert inputs == {spec.name for spec in specs}
        assert any(name.startswith("lora_") for name in inputs)


def test_caches_are_updated_in_place(networks: dict[str, Any], made: Path) -> None:
    dims = read_manifest(made).dimensions
    updates = layers(networks["decoder_static"][0], "KV_CACHE_UPDATE")
    assert len(updates) == 2 * dims.decoder_layers
    slots = dims.text_positions
    assert all(
        tuple(update.get_input(0).shape) == (-1, dims.decoder_heads, slots, dims.head_size) for update in updates
    )


# --- Which TensorRT ---


@pytest.fixture
def as_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path of child processes, with the real TensorRT-RTX under the name of its sister."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "tensorrt.py").write_text(
        "from tensorrt_rtx_bindings import *\nfrom tensorrt_rtx_bindings import __version__\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    return folder


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LOAD = """
from das_asr.runtime.backends.tensorrt_library import installed_libraries, load_library
from das_asr.runtime.errors import DasError
def tell(name):
    try:
        library = load_library(name)
        print(library.name, library.module.__name__)
    except DasError as error:
        print(type(error).__name__, error)
print(*installed_libraries())
for name in (None, "tensorrt", "tensorrt-rtx"):
    tell(name)
"""


def test_one_library_is_taken_and_two_must_be_named(as_tensorrt: Path) -> None:
    installed, unnamed, first, second = python(LOAD).splitlines()
    assert installed == "tensorrt tensorrt-rtx"
    assert unnamed.startswith("OptionError tensorrt and tensorrt-rtx are both installed")
    assert first == "tensorrt tensorrt"
    assert second.startswith("tensorrt-rtx tensorrt_rtx")


def test_a_library_that_is_missing_is_told_with_the_extra() -> None:
    block = "import sys\nfor name in ('tensorrt', 'tensorrt_rtx', 'tensorrt_rtx_bindings'): sys.modules[name] = None\n"
    installed, unnamed, *_ = python(block + LOAD).split("\n")
    assert installed == ""
    assert unnamed.startswith("BackendError tensorrt or tensorrt-rtx is not installed. Install `das-asr[tensorrt-rtx]`")


def test_a_library_that_cannot_be_loaded_is_an_error(as_tensorrt: Path) -> None:
    (as_tensorrt / "tensorrt.py").write_text("import ctypes\nctypes.CDLL('libnvinfer.so.99')\n")
    assert "BackendError tensorrt is installed but cannot be loaded: libnvinfer.so.99" in python(LOAD)


@no_gpu
def test_tensorrt_builds_only_where_its_gpu_is(as_tensorrt: Path, bundle: Path) -> None:
    command = ["das-export", "engine", str(bundle), "--target", "sm90", "--library", "tensorrt"]
    done = subprocess.run([script(command[0]), *command[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "builds for the GPU it runs on, and there is none; sm90 was asked for" in done.stderr
    assert "das-asr[tensorrt-rtx]" in done.stderr


def test_timings_are_kept_between_builds(as_tensorrt: Path, bundle: Path, built: Path) -> None:
    """The path of `tensorrt`, as far as it can be walked without its GPU: the same builder under the other name."""
    cache = bundle / "cache" / "timings.bin"
    job = job_of(built, bundle / "encoder.engine", library="tensorrt", timing_cache=str(cache))
    for _ in range(2):  # the second reads what the first wrote
        run_job(job)
        assert cache.stat().st_size > 0
        assert Path(job.engine).read_bytes().startswith(b"vtrt")
        Path(job.engine).unlink()
    cache.write_bytes(b"nonsense")
    run_job(job)
    assert cache.read_bytes() != b"nonsense"


# --- A process of its own ---


def job_of(bundle: Path, engine: Path, **changes: Any) -> engine_worker.BuildJob:
    """The encoder's job, as `build_engines` makes it."""
    from das_asr.export import engines

    manifest = read_manifest(bundle)
    record = engines._record(manifest, load_library("tensorrt-rtx"), "sm86", options())
    encoder, _ = engines._graphs(manifest, options())
    job = engines._job(encoder, bundle, engine.parent, bundle, record)
    return dataclasses.replace(job, engine=str(engine), **changes)


def run_job(job: engine_worker.BuildJob) -> None:
    from das_asr.export.engine_process import run_build

    run_build(job)


def test_a_crash_of_the_builder_is_an_error(as_tensorrt: Path, built: Path, tmp_path: Path) -> None:
    fault = "import os, signal\nos.write(2, b'about to fall')\nos.kill(os.getpid(), signal.SIGSEGV)\n"
    (as_tensorrt / "tensorrt.py").write_text(fault)
    with pytest.raises(ExportError, match=r"tensorrt was ended by SIGSEGV while building encoder\.onnx.*about to fall"):
        run_job(job_of(built, tmp_path / "encoder.engine", library="tensorrt"))


def test_what_the_library_prints_does_not_disturb(as_tensorrt: Path, built: Path, tmp_path: Path) -> None:
    module = as_tensorrt / "tensorrt.py"
    module.write_text(module.read_text() + "import os\nos.write(1, b'noise on standard output\\n')\nprint('more')\n")
    run_job(job_of(built, tmp_path / "encoder.engine", library="tensorrt"))
    assert (tmp_path / "encoder.engine").is_file()


def script(name: str) -> str:
    return str(Path(sysconfig.get_path("scripts")) / name)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def building(bundle: Path) -> Iterator[subprocess.Popen[str]]:
    """`das-export engine`, once it has begun to write."""
    arguments = ["--target", "sm86", "--target", "sm89", "--precision", "fp32"]
    command = [script("das-export"), "engine", str(bundle), *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: bool(list(bundle.glob("engines/.*.partial-*"))))
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


def test_there_must_be_an_engine_to_run(bundle: Path, built: Path) -> None:
    with pytest.raises(BackendError, match="no engines to run"):
        verify_engines(bundle, "cuda")
    with pytest.raises(OptionError, match="engines run on a GPU only"):
        verify_engines(built, "cpu")


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
    report = verify_engines(bundle, "cuda")[name]
    assert report.tokens_compared > 100
    entry = read_manifest(bundle).engines[name]
    assert (entry.verified, entry.report) == (True, report)
