"""A small random bundle to build engines from, and what the tests of engines share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from das_asr.export import EngineOptions
from das_asr.runtime.backends.cuda_device import gpu_target
from das_asr.runtime.backends.engine_files import EngineLimits
from das_asr.runtime.backends.tensorrt_library import installed_libraries
from tests.bundles import make_bundle
from tests.checkpoints import make_adapter, make_base

needs_tensorrt_rtx = pytest.mark.skipif(
    "tensorrt-rtx" not in installed_libraries(), reason="needs the wheels of the extra [tensorrt-rtx]"
)
no_gpu = pytest.mark.skipif(gpu_target() is not None, reason="is about a machine without a GPU")

SMALL = EngineLimits(max_batch=2, max_rows=4, max_rank=8)


def options(*targets: str, **choices: Any) -> EngineOptions:
    """An engine that is built fast."""
    defaults = {"precision": "fp32", "limits": SMALL, "library": "tensorrt-rtx"}
    return EngineOptions(targets=targets or ("sm86",), **{**defaults, **choices})


def make_small_bundle(folder: Path) -> Path:
    """A bundle with one adapter; its base and the adapter lie beside it as `base` and `music`."""
    base = make_base(folder / "base", d_model=32, seconds=2, text_positions=16)
    return make_bundle(base, {"music": make_adapter(base, folder / "music")}, folder / "bundle")
