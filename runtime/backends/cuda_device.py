"""Which NVIDIA GPU there is, asked from the driver itself: no CUDA package is needed to find out that there is none."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["gpu_target"]

_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{MAJOR,MINOR} of cuda.h


def gpu_target(index: int = 0) -> str | None:
    """Compute capability of a GPU in the form `sm86`; None without a driver or without that GPU."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), index)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    )
    return None if failed else f"sm{major.value}{minor.value}"
