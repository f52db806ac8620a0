"""Graphs without the defaults of their inputs: nothing else about them changes."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from das_asr.runtime import BundleError
from das_asr.runtime.backends import BackendOptions
from das_asr.runtime.backends.graph_defaults import without_defaults
from das_asr.runtime.backends.placement import CPU
from das_asr.runtime.backends.sessions import open_session
from das_asr.runtime.contract import DECODER_FILE, DECODER_STATIC_FILE, ENCODER_FILE

FILES = (ENCODER_FILE, DECODER_FILE, DECODER_STATIC_FILE)


@pytest.mark.parametrize("file", FILES)
def test_only_the_defaults_are_gone(demo_bundle: Path, file: str) -> None:
    model = onnx.load(demo_bundle / file, load_external_data=False)
    inputs = {value.name for value in model.graph.input}
    constants = [item for item in model.graph.initializer if item.name not in inputs]
    assert 0 < len(constants) < len(model.graph.initializer)
    del model.graph.initializer[:]
    model.graph.initializer.extend(constants)
    assert onnx.ModelProto.FromString(without_defaults(demo_bundle / file)) == model


@pytest.mark.parametrize("file", FILES)
def test_a_session_then_asks_for_every_input(demo_bundle: Path, file: str) -> None:
    kept, dropped = (
        open_session(demo_bundle / file, BackendOptions(threads=1), {CPU: {}}, defaults=defaults)
        for defaults in (True, False)
    )
    assert not dropped.get_overridable_initializers()
    names = {item.name for item in (*kept.get_inputs(), *kept.get_overridable_initializers())}
    assert {item.name for item in dropped.get_inputs()} == names
    assert any(name.startswith("lora_") for name in names)


@pytest.mark.parametrize("content", [b"\x3a\x05abc", b"\x3a\x80", b"\x3c\x01", None])
def test_what_is_no_graph_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / ENCODER_FILE
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match=r"encoder\.onnx cannot be read as an ONNX file: .*Copy the whole bundle"):
        without_defaults(path)
