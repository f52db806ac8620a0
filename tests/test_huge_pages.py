"""Advice about huge pages reaches new memory, only new memory, and changes no result."""

from __future__ import annotations

import mmap
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from das_asr.runtime import Transcriber
from das_asr.runtime.backends.huge_pages import HugePages

linux = pytest.mark.skipif(sys.platform != "linux", reason="huge pages are Linux's")

SIZE = 64 << 20  # bytes


def _advised(address: int) -> bool:
    """Whether the kernel notes the advice (flag `hg`) for the region that holds an address."""
    found, inside = False, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= address < int(match[2], 16)
        elif inside and line.startswith("VmFlags:"):
            found = found or "hg" in line.split()
    return found


def _memory() -> NDArray[np.uint8]:
    """Memory in use, straight from the kernel: numpy asks for huge pages for its own large arrays."""
    array = np.frombuffer(mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    array[:] = 1
    return array


@linux
def test_new_memory_is_advised() -> None:
    pages = HugePages()
    array = _memory()
    assert not _advised(array.ctypes.data + SIZE // 2)
    assert pages.advise() >= SIZE // 2
    assert _advised(array.ctypes.data + SIZE // 2)
    assert array.min() == array.max() == 1


@linux
def test_memory_that_was_there_is_left_alone() -> None:
    array = _memory()
    assert HugePages().advise() < SIZE // 2
    assert not _advised(array.ctypes.data + SIZE // 2)


def test_elsewhere_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    pages = HugePages()
    array = _memory()
    assert pages.advise() == 0
    assert array.all()


def test_results_are_the_same_without(demo_bundle: Path, demo_audio: list[tuple[Path, str, str]]) -> None:
    clip = demo_audio[0][0]
    results = []
    for huge_pages in (True, False):
        with Transcriber.load(demo_bundle, threads=1, huge_pages=huge_pages) as transcriber:
            results.append(transcriber.transcribe(clip))
    assert results[0].tokens == results[1].tokens
    assert results[0].provenance == results[1].provenance
