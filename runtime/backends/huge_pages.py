"""Huge pages for weights: fewer address translations when a step streams through hundreds of megabytes.

A step reads nearly every weight once, so with pages of 4 kB it also walks the page tables for each of them; inside a
virtual machine that walk is two-dimensional. Linux offers pages of 2 MB, by default only to memory that asks for them,
which the engine's does not. `benchmarks/LOG.md` has the measurement.

    watch = HugePages()
    session = load()
    watch.advise()  # what loading took
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

__all__ = ["HugePages"]

_MAPS = Path("/proc/self/maps")
_PAGE = 2 << 20  # bytes
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # from Linux's <asm-generic/mman-common.h>

Region = tuple[int, int]  # first address, address behind the last


class HugePages:
    """Remembers which memory there was, and asks for huge pages for what has come since.

    Without effect on systems other than Linux. The kernel may refuse or ignore the advice; nothing depends on it.
    """

    def __init__(self) -> None:
        self._before = set(_anonymous_regions())

    def advise(self) -> int:
        """Asks for huge pages for every anonymous region that is new or has grown; returns their size in bytes."""
        regions = [_aligned(region) for region in _anonymous_regions() if region not in self._before]
        large = [(start, end) for start, end in regions if end - start >= _PAGE]
        if not large:
            return 0
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for start, end in large:
            madvise(start, end - start, _MADV_HUGEPAGE)
            madvise(start, end - start, _MADV_COLLAPSE)  # at once and not some day; kernels before 6.1 do not know it
        return sum(end - start for start, end in large)


def _anonymous_regions() -> list[Region]:
    """Private writable memory without a file behind it."""
    if sys.platform != "linux":
        return []
    fields = (line.split() for line in _MAPS.read_text(encoding="utf-8", errors="replace").splitlines())
    return [_addresses(entry[0]) for entry in fields if len(entry) == 5 and entry[1] == "rw-p"]


def _addresses(text: str) -> Region:
    start, _, end = text.partition("-")
    return int(start, 16), int(end, 16)


def _aligned(region: Region) -> Region:
    """The whole huge pages inside a region."""
    start, end = region
    return -(-start // _PAGE) * _PAGE, end // _PAGE * _PAGE
