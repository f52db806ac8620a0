"""The CUDA runtime as `cuda_memory.py` calls it, in host memory: same names, same results, and stricter.

It knows every allocation, so that nothing is used after it was freed or never freed; a thread must have chosen its
device; what is queued while a stream is captured is kept instead of done; and while somebody else records in the
strictest mode, threads that have not chosen another one may neither allocate nor free nor wait.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

from cuda.bindings import runtime as real

OK = real.cudaError_t.cudaSuccess
MODES = real.cudaStreamCaptureMode
NO_MEMORY = real.cudaError_t.cudaErrorMemoryAllocation


class StandIn:
    """One GPU with so many bytes."""

    def __init__(self, size: int = 1 << 40) -> None:
        self.size = size
        self.blocks: dict[int, Any] = {}  # address of device memory -> what lies there
        self.pinned: dict[int, Any] = {}
        self.handles: dict[int, Any] = {}  # streams, events and graphs
        self.capturing: list[Callable[[], None]] | None = None
        self.launches = 0
        self.recorded_elsewhere = False  # as ONNX Runtime records
        self._devices = threading.local()
        self._next = 1000

    def __getattr__(self, name: str) -> Any:
        """Enumerations and constants are the real ones."""
        value = getattr(real, name)
        assert not callable(value) or isinstance(value, type), f"{name} has no stand-in"
        return value

    def queue(self, work: Callable[[], None]) -> None:
        """What a kernel or a copy does: at once, or when the graph that is being recorded is launched."""
        assert getattr(self._devices, "current", None) == 0, "this thread has not chosen its device"
        if self.capturing is None:
            work()
        else:
            self.capturing.append(work)

    def _unsafe(self) -> None:
        assert self.capturing is None
        mode = getattr(self._devices, "mode", MODES.cudaStreamCaptureModeGlobal)
        assert not self.recorded_elsewhere or mode != MODES.cudaStreamCaptureModeGlobal, "ruins a recording"

    @property
    def used(self) -> int:
        """Bytes of device memory."""
        return sum(map(ctypes.sizeof, self.blocks.values()))

    def _handle(self, value: Any) -> int:
        self._next += 1
        self.handles[self._next] = value
        return self._next

    # --- Devices ---

    def cudaGetDeviceCount(self) -> tuple[Any, int]:  # noqa: N802
        return OK, 1

    def cudaSetDevice(self, device: int) -> tuple[Any]:  # noqa: N802
        self._devices.current = device
        return (OK,)

    def cudaThreadExchangeStreamCaptureMode(self, mode: Any) -> tuple[Any, Any]:  # noqa: N802
        previous = getattr(self._devices, "mode", MODES.cudaStreamCaptureModeGlobal)
        self._devices.mode = mode
        return OK, previous

    def cudaMemGetInfo(self) -> tuple[Any, int, int]:  # noqa: N802
        return OK, self.size - self.used, self.size

    def cudaGetLastError(self) -> tuple[Any]:  # noqa: N802
        return (OK,)

    def cudaGetErrorName(self, error: Any) -> tuple[Any, bytes]:  # noqa: N802
        return OK, error.name.encode()

    def cudaGetErrorString(self, error: Any) -> tuple[Any, bytes]:  # noqa: N802
        return OK, b"in words"

    # --- Memory ---

    def cudaMalloc(self, size: int) -> tuple[Any, int | None]:  # noqa: N802
        self._unsafe()
        if self.used + size > self.size:
            return NO_MEMORY, None
        return OK, self._allocated(self.blocks, size)

    def cudaFree(self, address: int) -> tuple[Any]:  # noqa: N802
        self._unsafe()
        del self.blocks[self._base(self.blocks, address)]
        return (OK,)

    def cudaMallocHost(self, size: int) -> tuple[Any, int]:  # noqa: N802
        self._unsafe()
        return OK, self._allocated(self.pinned, size)

    def cudaFreeHost(self, address: int) -> tuple[Any]:  # noqa: N802
        self._unsafe()
        del self.pinned[self._base(self.pinned, address)]
        return (OK,)

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: int) -> tuple[Any]:  # noqa: N802
        self._check(address, size, stream)
        self.queue(lambda: ctypes.memset(address, value, size) and None)
        return (OK,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: Any, stream: int) -> tuple[Any]:  # noqa: N802
        kinds = real.cudaMemcpyKind
        assert kind in (
            kinds.cudaMemcpyHostToDevice,
            kinds.cudaMemcpyDeviceToHost,
            kinds.cudaMemcpyDeviceToDevice,
        )
        if kind != kinds.cudaMemcpyDeviceToHost:
            self._check(target, size, stream)
        if kind != kinds.cudaMemcpyHostToDevice:
            self._check(source, size, stream)
        self.queue(lambda: ctypes.memmove(target, source, size) and None)
        return (OK,)

    def _allocated(self, blocks: dict[int, Any], size: int) -> int:
        block = (ctypes.c_uint8 * (size + 256))()
        address = -(-ctypes.addressof(block) // 256) * 256
        blocks[address] = block
        return address

    def _base(self, blocks: dict[int, Any], address: int) -> int:
        assert address in blocks, "freed twice, or never allocated"
        return address

    def _check(self, address: int, size: int, stream: int) -> None:
        assert stream in self.handles, "no such stream"
        holds = (base <= address and address + size <= base + ctypes.sizeof(b) - 256 for base, b in self.blocks.items())
        assert any(holds), "outside of every allocation"

    # --- Streams, events, graphs ---

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, int]:  # noqa: N802
        return OK, self._handle("stream")

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[Any, int]:  # noqa: N802
        return OK, self._handle("event")

    def cudaEventRecord(self, event: int, stream: int) -> tuple[Any]:  # noqa: N802
        assert (self.handles[event], self.handles[stream]) == ("event", "stream")
        return (OK,)

    def cudaEventSynchronize(self, event: int) -> tuple[Any]:  # noqa: N802
        assert self.handles[event] == "event"
        self._unsafe()
        return (OK,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any]:  # noqa: N802
        assert self.handles[stream] == "stream"
        self._unsafe()
        return (OK,)

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> tuple[Any]:  # noqa: N802
        assert self.capturing is None
        assert mode == self._devices.mode == MODES.cudaStreamCaptureModeThreadLocal
        self.capturing = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, int]:  # noqa: N802
        recorded, self.capturing = self.capturing, None
        return OK, self._handle(recorded)

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, int]:  # noqa: N802
        return OK, self._handle(list(self.handles[graph]))

    def cudaGraphLaunch(self, executable: int, stream: int) -> tuple[Any]:  # noqa: N802
        self.launches += 1
        for work in self.handles[executable]:
            self.queue(work)
        return (OK,)

    def _destroy(self, handle: int) -> tuple[Any]:
        del self.handles[handle]
        return (OK,)

    cudaStreamDestroy = cudaEventDestroy = cudaGraphDestroy = cudaGraphExecDestroy = _destroy  # noqa: N815
