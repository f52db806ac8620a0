"""Which nodes count as fallen back to the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from das_asr.runtime import BackendError
from das_asr.runtime.backends import BackendOptions
from das_asr.runtime.backends.memory import HostMemory
from das_asr.runtime.backends.onnxruntime_static import OnnxProgram, refuse_strays
from das_asr.runtime.backends.placement import CPU, CUDA, TENSORRT, fallen_back
from das_asr.runtime.backends.sessions import open_session
from das_asr.runtime.backends.workspace import Workspace
from das_asr.runtime.contract import ENCODER_FILE
from das_asr.runtime.manifest import read_manifest


def node(name: str, kind: str, provider: str, *tensors: tuple[str, list[int]]) -> dict[str, Any]:
    """An event as ONNX Runtime writes it."""
    shapes = [{dtype: shape} for dtype, shape in tensors]
    args = {"op_name": kind, "provider": provider, "input_type_shape": shapes[:1], "output_type_shape": shapes[1:]}
    return {"cat": "Node", "name": f"{name}_kernel_time", "args": args}


def write(path: Path, *events: dict[str, Any]) -> Path:
    path.write_text(json.dumps([{"cat": "Session", "name": "model_run"}, *events]))
    return path


def test_shapes_may_be_computed_on_the_cpu(tmp_path: Path) -> None:
    profile = write(
        tmp_path / "profile.json",
        node("lead", "Concat", CPU, ("int64", [2]), ("int64", [4])),
        node("visible", "And", CPU, ("bool", [1, 8]), ("bool", [8])),
        node("scores", "MatMul", CUDA, ("float", [8, 8]), ("float", [8, 8])),
    )
    assert fallen_back(profile, CUDA) == []
    refuse_strays([profile], BackendOptions("cuda"), CUDA)


def test_numbers_large_tensors_and_copies_may_not(tmp_path: Path) -> None:
    profile = write(
        tmp_path / "profile.json",
        node("scores", "MatMul", CPU, ("float", [1]), ("float", [1])),
        node("scores", "MatMul", CPU, ("float", [1]), ("float", [1])),
        node("ids", "Gather", CPU, ("int64", [1]), ("int64", [4096])),
        node("Memcpy_token_1", "MemcpyToHost", CUDA, ("int64", [1]), ("int64", [1])),
    )
    listed = ["scores (MatMul)", "ids (Gather)", "Memcpy_token_1 (MemcpyToHost)"]
    assert fallen_back(profile, CUDA) == listed
    with pytest.raises(BackendError, match=r"'cuda:1'.* 3 node\(s\).*scores \(MatMul\).*allow_cpu_nodes=True"):
        refuse_strays([profile], BackendOptions("cuda:1"), CUDA)


def test_plain_cuda_is_not_tensorrt(tmp_path: Path) -> None:
    profile = write(
        tmp_path / "profile.json",
        node("TRTKernel_graph_1", "TRTKernel_graph_1", TENSORRT, ("float", [8, 8]), ("float", [8, 8])),
        node("update", "TensorScatter", CUDA, ("float", [8, 8]), ("float", [8, 8])),
        node("lead", "Concat", CUDA, ("int64", [2]), ("int64", [4])),
    )
    assert fallen_back(profile, TENSORRT) == ["update (TensorScatter)"]
    with pytest.raises(BackendError, match=r"1 node\(s\) elsewhere than with TensorrtExecutionProvider"):
        refuse_strays([profile], BackendOptions("cuda"), TENSORRT)


def test_a_real_profile_names_the_nodes_that_compute(demo_bundle: Path, tmp_path: Path) -> None:
    """A whole graph on the CPU: its products are found, the computation of its shapes is passed over."""
    session = open_session(demo_bundle / ENCODER_FILE, BackendOptions(threads=1), {CPU: {}}, profile=f"{tmp_path}/p")
    manifest, memory = read_manifest(demo_bundle), HostMemory()
    rank = max(adapter.rank for adapter in manifest.adapters)
    tensors = Workspace(memory, manifest.dimensions, "float32", 1, manifest.rows, rank).encoding(0, 1)
    OnnxProgram(session, memory, cuda_graphs=False).bind(tensors, repeated=False).run()
    found = fallen_back(Path(session.end_profiling()), CUDA)
    kinds = {name.rpartition("(")[2].rstrip(")") for name in found}
    assert {"Conv", "MatMul", "LayerNormalization"} <= kinds
    assert "Shape" not in kinds
