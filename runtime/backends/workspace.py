"""The device memory that a set of utterances is decoded in: every tensor of the graphs, allocated once, used again.

A workspace has a number of places. Runs read and write its first places, whatever their number, so that addresses never
change: CUDA graphs need that, and it spares binding.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from das_asr.runtime.backends.memory import Buffer, Mailbox, Memory, aligned
from das_asr.runtime.contract import (
    DType,
    TensorSpec,
    cache_names,
    encoder_inputs,
    encoder_outputs,
    longest_run,
    static_decoder_inputs,
    static_decoder_outputs,
)
from das_asr.runtime.manifest import Dimensions

__all__ = ["CONTROL", "INBOX", "OUTBOX", "Workspace"]

INBOX = ("position", "prompt_last")
"""What the host tells each step."""
OUTBOX = ("row", "candidate", "logprob")
"""What each step tells the host."""
CONTROL = ("rule", "tau", "token_bias", "first_token_bias", "row_mask")
"""What the host tells once per utterance."""
_BOXES = 2  # one is read by the host while the device fills the other


class Workspace:
    """Tensors for `places` utterances of R rows and adapters of one rank.

    Attributes:
        places: utterances that fit.
        rows: R.
        dims: of the graphs.
        audio: encoder positions S that are in use, at most those of a window; the same for all utterances.
        inbox: what the host sends before each run.
        outbox: what it receives after it.
        boxes: for that; each carries the tensors of one run.
    """

    def __init__(self, memory: Memory, dims: Dimensions, dtype: DType, places: int, rows: int, rank: int) -> None:
        self.places, self.rows, self.dims = places, rows, dims
        self.audio = dims.audio_positions
        sizes = {"batch": places, "rows": rows, "lanes": places * rows, "rank": rank, "new": longest_run(dims)}
        sizes |= {"audio": dims.audio_positions, "frames": dims.frames}
        specs = {spec.name: spec for spec in _specs(dims, dtype)}
        shapes = {
            name: tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)
            for name, spec in specs.items()
        }
        self._buffers: dict[str, Buffer] = {}
        for name in specs.keys() - {*INBOX, *OUTBOX}:
            self._buffers[name] = memory.allocate(shapes[name], specs[name].dtype)
        self.inbox, inside = _block(memory, [specs[name] for name in INBOX], shapes)
        self.outbox, outside = _block(memory, [specs[name] for name in OUTBOX], shapes)
        self._buffers |= inside | outside
        self.boxes = [memory.mailbox(self.inbox.nbytes, self.outbox.nbytes) for _ in range(_BOXES)]
        self._lanes = {past for past, _ in cache_names(dims)}
        self._audio = {name: spec.shape for name, spec in specs.items() if {"audio", "frames"} & set(spec.shape)}

    def inputs(self, count: int, width: int) -> dict[str, Buffer]:
        """The decoder's inputs and outputs for `width` new tokens of the first `count` utterances, by their names."""
        tensors = {name: self._part(name, 0, count) for name in self._buffers if name != "features"}
        tensors["ids"] = self._buffers["ids"].shaped(count, self.rows, width)
        return tensors | {present: tensors[past] for past, present in cache_names(self.dims)}

    def encoding(self, first: int, count: int) -> dict[str, Buffer]:
        """The encoder's tensors for `count` utterances from place `first` on, by their names."""
        names = ["features", *(spec.name for spec in encoder_outputs(self.dims))]
        return {name: self._part(name, first, count) for name in names}

    def utterance(self, place: int) -> dict[str, Buffer]:
        """Everything that belongs to one utterance and outlasts a run."""
        cross = (spec.name for spec in encoder_outputs(self.dims))
        return {name: self._part(name, place, 1) for name in (*cross, *self._lanes, *CONTROL)}

    def caches(self) -> list[Buffer]:
        """The self-attention caches of all places, which must begin with finite numbers."""
        return [self._buffers[name] for name in self._lanes]

    def tensor(self, name: str, count: int) -> Buffer:
        """One tensor of the first `count` utterances."""
        return self._part(name, 0, count)

    def put(self, box: Mailbox, name: str, values: NDArray[np.int64]) -> None:
        """Writes [n] values of an `INBOX` tensor into a mailbox."""
        offset = self._buffers[name].address - self.inbox.address
        box.inbox[offset : offset + values.nbytes] = values.view(np.uint8)

    def take(self, box: Mailbox, name: str, count: int) -> NDArray[np.generic]:
        """A copy of an `OUTBOX` tensor of the first `count` utterances from a mailbox."""
        buffer = self._part(name, 0, count)
        offset = buffer.address - self.outbox.address
        return box.outbox[offset : offset + buffer.nbytes].copy().view(buffer.dtype).reshape(buffer.shape)

    def _part(self, name: str, first: int, count: int) -> Buffer:
        lanes = self.rows if name in self._lanes else 1
        buffer = self._buffers[name]
        if name in self._audio:  # shorter audio lies closer together
            heard = {"audio": self.audio, "frames": 2 * self.audio}
            sizes = zip(buffer.shape, self._audio[name], strict=True)
            buffer = buffer.shaped(*(heard.get(str(symbol), size) for size, symbol in sizes))
        return buffer.part(first * lanes, count * lanes)


def _specs(dims: Dimensions, dtype: DType) -> Iterator[TensorSpec]:
    """All tensors but the adapters', which requests share, `attended`, which stays on the host, and `present_*`."""
    skipped = {"attended", *(present for _, present in cache_names(dims))}
    graphs = (static_decoder_inputs, static_decoder_outputs, encoder_inputs)
    for specs in graphs:
        yield from (s for s in specs(dims, dtype) if s.name not in skipped and not s.name.startswith("lora_"))


def _block(
    memory: Memory, specs: list[TensorSpec], shapes: dict[str, tuple[int, ...]]
) -> tuple[Buffer, dict[str, Buffer]]:
    """Tensors next to each other, so that one copy moves all of them; each at an aligned address."""
    sizes = [aligned(Buffer(0, shapes[spec.name], spec.dtype, None).nbytes) for spec in specs]
    block = memory.allocate((sum(sizes),), "uint8")
    offsets = np.cumsum([0, *sizes[:-1]])
    return block, {
        spec.name: block.at(int(offset), shapes[spec.name], spec.dtype)
        for spec, offset in zip(specs, offsets, strict=True)
    }
