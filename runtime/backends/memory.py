"""Memory that graphs read and write by address: buffers on a device, and what the host exchanges with them.

Everything that a `Memory` is asked for happens in order, and in order with the graphs that run on it; on a GPU the
host goes on meanwhile. It waits only in `Mailbox.wait` and `Memory.read`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import threading
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["ALIGNMENT", "Buffer", "DeviceLock", "HostMemory", "Mailbox", "Memory", "aligned", "host_buffer"]

Bytes = NDArray[np.uint8]

ALIGNMENT = 256  # bytes; TensorRT asks for it at every address
_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "bool": 1, "uint8": 1}


@dataclass(frozen=True)
class Buffer:
    """A contiguous tensor at an address.

    Attributes:
        address: of its first element.
        shape: its dimensions.
        dtype: as in `contract.TensorSpec`.
        owner: keeps the memory alive.
        host: whether it lies in the host's memory, whatever the device.
    """

    address: int
    shape: tuple[int, ...]
    dtype: str
    owner: object
    host: bool = False

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * _SIZES[self.dtype]

    def shaped(self, *shape: int) -> Buffer:
        """The first elements in another shape."""
        view = dataclasses.replace(self, shape=shape)
        assert view.nbytes <= self.nbytes
        return view

    def part(self, first: int, count: int) -> Buffer:
        """Elements `first` to `first + count` of the leading axis."""
        stride = self.nbytes // self.shape[0]
        assert 0 <= first <= first + count <= self.shape[0]
        return dataclasses.replace(self, address=self.address + first * stride, shape=(count, *self.shape[1:]))

    def at(self, offset: int, shape: tuple[int, ...], dtype: str) -> Buffer:
        """A tensor within this buffer, `offset` bytes from its start."""
        view = dataclasses.replace(self, address=self.address + offset, shape=shape, dtype=dtype)
        assert offset + view.nbytes <= self.nbytes
        return view


class Mailbox(Protocol):
    """A few bytes to the device and a few back, by host memory that a GPU can reach without the host's help."""

    inbox: Bytes
    """What `send` sends; free to be written after `wait`."""
    outbox: Bytes
    """What `receive` received; to be read after `wait`."""

    def send(self, target: Buffer) -> None:
        """Copies the inbox to the device."""
        ...

    def receive(self, source: Buffer) -> None:
        """Copies from the device to the outbox."""
        ...

    def wait(self) -> None:
        """Returns when all that was sent and received before has arrived."""
        ...


class Memory(Protocol):
    """The memory of one device, and the order of what happens there."""

    device: str
    """`cpu` or `cuda`."""
    device_id: int
    ahead: bool
    """Whether the host goes on while the device works, so that work can be queued ahead of time."""

    def enter(self) -> None:
        """Makes the device the calling thread's; before anything else is asked for in a thread."""
        ...

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """Zeroed memory, freed with the last buffer that lies in it.

        Raises:
            BackendError: there is not enough.
        """
        ...

    def mailbox(self, inbox: int, outbox: int) -> Mailbox:
        """A mailbox of so many bytes."""
        ...

    def write(self, target: Buffer, array: NDArray[Any]) -> None:
        """Copies a host array, whose memory is free when this returns."""
        ...

    def zero(self, target: Buffer) -> None:
        """Fills with zeros."""
        ...

    def read(self, source: Buffer, array: NDArray[Any]) -> None:
        """Waits, and copies to a host array."""
        ...

    def copy(self, target: Buffer, source: Buffer) -> None:
        """Copies on the device; the two do not overlap."""
        ...

    def close(self) -> None:
        """Waits for everything that is under way."""
        ...


class DeviceLock:
    """Keeps the order on a device: one thread at a time, with the device made its own.

    Nobody holds it while waiting for the outcome of a step. Who holds it may wait for the device all the same: when
    logits are read, when a mailbox is still in use by a run that was queued in vain, and when memory is allocated.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory, self._lock = memory, threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            self._memory.enter()
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class HostMemory:
    """The host's own memory; every request is done when it returns."""

    device, device_id = "cpu", 0

    def __init__(self, *, ahead: bool = False) -> None:
        self.ahead = ahead  # of no use here, but the same code runs

    def enter(self) -> None:
        """See `Memory`."""

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """See `Memory`."""
        memory = np.zeros(math.prod(shape) * _SIZES[dtype] + ALIGNMENT, np.uint8)
        return Buffer(aligned(memory.ctypes.data), shape, dtype, memory)

    def mailbox(self, inbox: int, outbox: int) -> Mailbox:
        """See `Memory`."""
        return _HostMailbox(np.zeros(inbox, np.uint8), np.zeros(outbox, np.uint8))

    def write(self, target: Buffer, array: NDArray[Any]) -> None:
        """See `Memory`."""
        assert array.nbytes == target.nbytes
        source = np.ascontiguousarray(array)  # a name, for it may be a copy that must outlive the move
        ctypes.memmove(target.address, source.ctypes.data, array.nbytes)

    def zero(self, target: Buffer) -> None:
        """See `Memory`."""
        ctypes.memset(target.address, 0, target.nbytes)

    def read(self, source: Buffer, array: NDArray[Any]) -> None:
        """See `Memory`."""
        assert array.nbytes == source.nbytes
        ctypes.memmove(array.ctypes.data, source.address, array.nbytes)

    def copy(self, target: Buffer, source: Buffer) -> None:
        """See `Memory`."""
        assert target.nbytes == source.nbytes
        ctypes.memmove(target.address, source.address, source.nbytes)

    def close(self) -> None:
        """See `Memory`."""


@dataclass
class _HostMailbox:
    inbox: Bytes
    outbox: Bytes

    def send(self, target: Buffer) -> None:
        ctypes.memmove(target.address, self.inbox.ctypes.data, len(self.inbox))

    def receive(self, source: Buffer) -> None:
        ctypes.memmove(self.outbox.ctypes.data, source.address, len(self.outbox))

    def wait(self) -> None:
        pass


def aligned(size: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def host_buffer(array: NDArray[Any]) -> Buffer:
    """A host array that a graph reads where it is."""
    return Buffer(array.ctypes.data, array.shape, array.dtype.name, array, host=True)
