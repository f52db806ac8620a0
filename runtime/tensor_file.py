"""A safetensors file whose tensors are read one by one and widened to float32, bfloat16 included."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from das_asr.runtime.errors import DasError

__all__ = ["Array", "TensorEntry", "TensorFile"]

Array = npt.NDArray[np.float32]

_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_CHUNK = 1 << 22  # bytes


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in its file, and what it is."""

    dtype: str  # as safetensors spells it: F32, F16, BF16, ...
    shape: tuple[int, ...]
    start: int  # offset of its first byte in the file
    size: int  # bytes


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose tensors are read one by one, as float32."""

    path: Path
    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, path: Path, error: type[DasError], hint: str) -> TensorFile:
        """Reads the header.

        Raises:
            error: the file cannot be read, is truncated or is not safetensors; the message ends with `hint`.
        """
        try:
            with safe_open(path, framework="np"):  # checks every offset against the length of the file
                pass
            with path.open("rb") as handle:
                length = int.from_bytes(handle.read(8), "little")
                header = json.loads(handle.read(length))
        except (OSError, SafetensorError) as cause:
            raise error(f"{path} cannot be read as safetensors ({cause}). {hint}") from cause
        metadata = header.pop("__metadata__", {})
        entries = {}
        for name, item in header.items():
            first, last = item["data_offsets"]
            entries[name] = TensorEntry(item["dtype"], tuple(item["shape"]), 8 + length + first, last - first)
        return cls(path, entries, metadata)

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of one tensor as stored, a few megabytes at a time."""
        with self.path.open("rb") as handle:
            handle.seek(self.entries[name].start)
            left = self.entries[name].size
            while left:
                chunk = handle.read(min(left, _CHUNK))
                if not chunk:
                    raise EOFError(f"{self.path} became shorter while it was read")
                left -= len(chunk)
                yield chunk

    def read(self, name: str, error: type[DasError]) -> Array:
        """One tensor as float32, contiguous and writable; fp16 and bf16 are widened.

        Raises:
            error: its dtype is not a floating-point type that float32 can hold, or it holds NaN or infinity.
        """
        entry = self.entries[name]
        stored = _DTYPES.get(entry.dtype)
        if stored is None:
            raise error(
                f"{self.path}: {name} has dtype {entry.dtype}, expected F32, F16 or BF16. Save it in one of these."
            )
        raw = np.fromfile(self.path, dtype=stored, count=math.prod(entry.shape), offset=entry.start)
        # bfloat16 is the upper half of float32; numpy has no such type.
        values = (raw.astype(np.uint32) << 16).view(np.float32) if entry.dtype == "BF16" else raw.astype(np.float32)
        if not np.isfinite(values).all():
            raise error(f"{self.path}: {name} holds NaN or infinity. The training diverged or the file is damaged.")
        return values.reshape(entry.shape)
