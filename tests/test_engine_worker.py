"""What TensorRT reads from the graphs, which of the two libraries it is, and the process that it builds in."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from das_asr.export import engines
from das_asr.export.engine_process import run_build
from das_asr.export.engine_worker import BuildJob, attach_timings, parse_network
from das_asr.export.half import write_half
from das_asr.runtime.backends.tensorrt_library import load_library
from das_asr.runtime.contract import encoder_inputs, static_decoder_inputs
from das_asr.runtime.errors import ExportError
from das_asr.runtime.manifest import read_manifest
from tests.engines import make_small_bundle, needs_tensorrt_rtx, no_gpu, options

pytestmark = needs_tensorrt_rtx


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_bundle(tmp_path_factory.mktemp("worker"))


# --- The network ---


@pytest.fixture(scope="module")
def networks(made: Path) -> dict[str, Any]:
    """The graphs as TensorRT reads them, in both precisions; the tuples keep alive what the networks need."""
    write_half(made, "fp16", read_manifest(made).dimensions, made.parent / "fp16")
    library = load_library("tensorrt-rtx")
    log = library.module.Logger(library.module.Logger.ERROR)
    builder = library.module.Builder(log)
    files = {
        f"{precision} {name}": folder / f"{name}.onnx"
        for precision, folder in (("fp32", made), ("fp16", made.parent / "fp16"))
        for name in ("encoder", "decoder_static")
    }
    return {name: (*parse_network(library, builder, log, file), builder, log) for name, file in files.items()}


def layers(network: Any, kind: str) -> list[Any]:
    found = (network.get_layer(index) for index in range(network.num_layers))
    return [layer for layer in found if layer.type.name == kind]


def types(layer: Any) -> set[str]:
    """Names of the types that go into a layer and come out of it."""
    ins = [layer.get_input(index) for index in range(layer.num_inputs)]
    outs = [layer.get_output(index) for index in range(layer.num_outputs)]
    return {tensor.dtype.name for tensor in (*ins, *outs) if tensor is not None}


def test_adapters_are_inputs(networks: dict[str, Any], made: Path) -> None:
    dims = read_manifest(made).dimensions
    for name, specs in (("encoder", encoder_inputs(dims)), ("decoder_static", static_decoder_inputs(dims))):
        for precision, dtype in (("fp32", "FLOAT"), ("fp16", "HALF")):
            network = networks[f"{precision} {name}"][0]
            inputs = {tensor.name: tensor.dtype.name for tensor in map(network.get_input, range(network.num_inputs))}
            assert inputs.keys() == {spec.name for spec in specs}
            assert {dtype} == {inputs[name] for name in inputs if name.startswith("lora_")}


def test_caches_are_updated_in_place(networks: dict[str, Any], made: Path) -> None:
    dims = read_manifest(made).dimensions
    for precision, dtype in (("fp32", "FLOAT"), ("fp16", "HALF")):
        updates = layers(networks[f"{precision} decoder_static"][0], "KV_CACHE_UPDATE")
        assert len(updates) == 2 * dims.decoder_layers
        shape = (-1, dims.decoder_heads, dims.text_positions, dims.head_size)
        assert {tuple(update.get_input(0).shape) for update in updates} == {shape}
        assert {update.get_output(0).dtype.name for update in updates} == {dtype}


def test_layer_norms_and_the_selection_compute_in_float32(networks: dict[str, Any], made: Path) -> None:
    dims = read_manifest(made).dimensions
    halves = 0
    for name, count in (("encoder", 2 * dims.encoder_layers + 1), ("decoder_static", 3 * dims.decoder_layers + 1)):
        network = networks[f"fp16 {name}"][0]
        norms = layers(network, "NORMALIZATION")
        assert len(norms) == count
        assert [types(norm) for norm in norms] == [{"FLOAT"}] * count
        halves += sum("HALF" in types(product) for product in layers(network, "MATRIX_MULTIPLY"))
    assert halves > 10  # the rest of the network is in half precision indeed
    network = networks["fp16 decoder_static"][0]
    selection = [
        layer for layer in map(network.get_layer, range(network.num_layers)) if layer.name.startswith("selection/")
    ]
    assert {layer.type.name for layer in selection} >= {"TOPK", "REDUCE"}
    assert not [layer.name for layer in selection if "HALF" in types(layer)]


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
    return done.stdout


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
def test_tensorrt_builds_only_where_its_gpu_is(as_tensorrt: Path, made: Path) -> None:
    command = [Path(sysconfig.get_path("scripts")) / "das-export", "engine", made, "--target", "sm90"]
    done = subprocess.run([*command, "--library", "tensorrt"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "builds for the GPU it runs on, and there is none; sm90 was asked for" in done.stderr
    assert "das-asr[tensorrt-rtx]" in done.stderr


def test_timings_are_kept_between_builds(as_tensorrt: Path, made: Path, tmp_path: Path) -> None:
    """The path of `tensorrt`, as far as it can be walked without its GPU: the same builder under the other name."""
    cache = tmp_path / "cache" / "timings.bin"
    job = job_of(made, tmp_path / "encoder.engine", library="tensorrt", timing_cache=str(cache))
    for _ in range(2):  # the second reads what the first wrote
        run_build(job)
        assert cache.stat().st_size > 0
        assert Path(job.engine).read_bytes().startswith(b"vtrt")
        Path(job.engine).unlink()
    cache.write_bytes(b"nonsense")
    run_build(job)
    assert cache.read_bytes() != b"nonsense"


def test_timings_of_another_gpu_are_not_used(tmp_path: Path) -> None:
    """TensorRT refuses them when they are attached, which only a GPU shows; here by a configuration that does."""
    attached = []

    class Config:
        def create_timing_cache(self, content: bytes) -> bytes:
            return content

        def set_timing_cache(self, timings: bytes, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            attached.append(timings)
            return timings in (b"", b"of this GPU")

    file = tmp_path / "timings.bin"
    for content, expected in ((b"of this GPU", [b"of this GPU"]), (b"of another", [b"of another", b""])):
        attached.clear()
        file.write_bytes(content)
        assert attach_timings(Config(), file) == expected[-1]
        assert attached == expected


# --- A process of its own ---


def job_of(bundle: Path, engine: Path, **changes: Any) -> BuildJob:
    """The encoder's job, as `build_engines` makes it."""
    manifest = read_manifest(bundle)
    record = engines._record(manifest, load_library("tensorrt-rtx"), "sm86", options())
    encoder, _ = engines._graphs(manifest, options())
    job = engines._job(encoder, bundle, engine.parent, bundle, record)
    return dataclasses.replace(job, engine=str(engine), **changes)


def test_a_crash_of_the_builder_is_an_error(as_tensorrt: Path, made: Path, tmp_path: Path) -> None:
    fault = "import os, signal\nos.write(2, b'about to fall')\nos.kill(os.getpid(), signal.SIGSEGV)\n"
    (as_tensorrt / "tensorrt.py").write_text(fault)
    with pytest.raises(ExportError, match=r"tensorrt was ended by SIGSEGV while building encoder\.onnx.*about to fall"):
        run_build(job_of(made, tmp_path / "encoder.engine", library="tensorrt"))


def test_what_the_library_prints_does_not_disturb(as_tensorrt: Path, made: Path, tmp_path: Path) -> None:
    module = as_tensorrt / "tensorrt.py"
    module.write_text(module.read_text() + "import os\nos.write(1, b'noise on standard output\\n')\nprint('more')\n")
    run_build(job_of(made, tmp_path / "encoder.engine", library="tensorrt"))
    assert (tmp_path / "encoder.engine").is_file()
