"""Memory of an NVIDIA GPU: plain allocations, one stream, pinned mailboxes, and graphs of what was queued.

The calls are those of the CUDA runtime, through NVIDIA's `cuda-bindings`; each returns its error first. The current
device belongs to a thread, hence `enter`.

ONNX Runtime records its CUDA graphs in a mode in which no other thread of the process may allocate, free or wait for an
event; a call that does fails, and ruins the recording. Threads that have said that they are not concerned may, hence
`_capture_mode`.
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from cuda.bindings import runtime as cuda  # pyright: ignore[reportAttributeAccessIssue]
from numpy.typing import NDArray

from das_asr.runtime.backends.memory import Buffer, Bytes, Mailbox
from das_asr.runtime.errors import BackendError

__all__ = ["CudaGraph", "CudaMemory", "check"]

_SUCCESS = cuda.cudaError_t.cudaSuccess
_TO_DEVICE = cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
_TO_HOST = cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
_WITHIN = cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
_NO_DEVICE = (
    cuda.cudaError_t.cudaErrorNoDevice,
    cuda.cudaError_t.cudaErrorInsufficientDriver,
    cuda.cudaError_t.cudaErrorInvalidDevice,
)
_RELAXED = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
_STRICT = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
_GIB = 2**30


def check(result: tuple[Any, ...]) -> Any:
    """What a call of the CUDA runtime returned behind its error: None, a value, or a tuple.

    Raises:
        BackendError: the call failed.
    """
    error, *values = result
    if error != _SUCCESS:
        raise BackendError(f"{_describe(error)}. The GPU cannot go on; load the bundle again, in a new process.")
    return values[0] if len(values) == 1 else tuple(values) or None


class CudaMemory:
    """The memory of one GPU, and the stream on which everything happens in order."""

    device, ahead = "cuda", True

    def __init__(self, device_id: int) -> None:
        self.device_id = device_id
        error, count = cuda.cudaGetDeviceCount()
        if error in _NO_DEVICE or (error == _SUCCESS and device_id >= count):
            found = _describe(error) if error != _SUCCESS else f"{count} found"
            raise BackendError(
                f"There is no CUDA device {device_id} ({found}). Look at `nvidia-smi`, or use device='cpu'."
            )
        self.enter()
        self.stream: int = int(check(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking)))
        _give_back(self, cuda.cudaStreamDestroy, self.stream)

    def enter(self) -> None:
        """See `Memory`; what other threads record is none of the calling thread's business."""
        check(cuda.cudaSetDevice(self.device_id))
        check(cuda.cudaThreadExchangeStreamCaptureMode(_RELAXED))

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """See `Memory`."""
        size = Buffer(0, shape, dtype, None).nbytes
        block = _Block(size, self._out_of_memory)
        buffer = Buffer(block.address, shape, dtype, block)
        self.zero(buffer)
        return buffer

    def mailbox(self, inbox: int, outbox: int) -> Mailbox:
        """See `Memory`."""
        return _CudaMailbox(self.stream, _pinned(inbox), _pinned(outbox))

    def write(self, target: Buffer, array: NDArray[Any]) -> None:
        """See `Memory`; the runtime stages memory that is not pinned before it returns."""
        assert array.nbytes == target.nbytes
        source = np.ascontiguousarray(array)
        check(cuda.cudaMemcpyAsync(target.address, source.ctypes.data, array.nbytes, _TO_DEVICE, self.stream))

    def zero(self, target: Buffer) -> None:
        """See `Memory`."""
        check(cuda.cudaMemsetAsync(target.address, 0, target.nbytes, self.stream))

    def read(self, source: Buffer, array: NDArray[Any]) -> None:
        """See `Memory`."""
        assert array.nbytes == source.nbytes
        check(cuda.cudaMemcpyAsync(array.ctypes.data, source.address, array.nbytes, _TO_HOST, self.stream))
        self.close()

    def copy(self, target: Buffer, source: Buffer) -> None:
        """See `Memory`."""
        assert target.nbytes == source.nbytes
        check(cuda.cudaMemcpyAsync(target.address, source.address, source.nbytes, _WITHIN, self.stream))

    def record(self, work: Callable[[], None]) -> CudaGraph:
        """What `work` queues, as a graph that is launched at once; it must have run once before, and not wait."""
        with contextlib.ExitStack() as cleanup:
            # Relaxed would let calls through that break the capture; other threads may go on with theirs.
            cleanup.enter_context(_capture_mode(_STRICT))
            check(cuda.cudaStreamBeginCapture(self.stream, _STRICT))
            try:
                work()
            finally:
                error, graph = cuda.cudaStreamEndCapture(self.stream)  # also where work failed, or it goes on
                if error == _SUCCESS:
                    cleanup.callback(cuda.cudaGraphDestroy, graph)
            check((error,))
            return CudaGraph(int(check(cuda.cudaGraphInstantiate(graph, 0))), self.stream)

    def free(self) -> tuple[int, int]:
        """Bytes that are free and bytes there are, over all processes."""
        self.enter()
        free, total = check(cuda.cudaMemGetInfo())
        return int(free), int(total)

    def close(self) -> None:
        """See `Memory`."""
        check(cuda.cudaStreamSynchronize(self.stream))

    def _out_of_memory(self, size: int) -> BackendError:
        free, total = self.free()
        return BackendError(
            f"Out of memory on CUDA device {self.device_id}: {size / _GIB:.2f} GiB were asked for, "
            f"{free / _GIB:.2f} of {total / _GIB:.2f} GiB are free. Decode fewer utterances at a time or with fewer "
            "adapters, use a precision of fewer bits, or free the GPU."
        )


class CudaGraph:
    """Queued work that the GPU repeats at one call, at the same addresses."""

    def __init__(self, executable: int, stream: int) -> None:
        self._executable, self._stream = executable, stream
        _give_back(self, cuda.cudaGraphExecDestroy, executable)

    def launch(self) -> None:
        """Queues it once more."""
        check(cuda.cudaGraphLaunch(self._executable, self._stream))


class _Block:
    """One allocation; freed with the object."""

    def __init__(self, size: int, refuse: Callable[[int], BackendError]) -> None:
        error, address = cuda.cudaMalloc(max(size, 1))
        if error == cuda.cudaError_t.cudaErrorMemoryAllocation:
            cuda.cudaGetLastError()  # else the next call of anybody would report it
            raise refuse(size)
        self.address: int = int(check((error, address)))
        _give_back(self, cuda.cudaFree, self.address)


class _CudaMailbox:
    """Pinned host memory and an event behind the last copy."""

    def __init__(self, stream: int, inbox: Bytes, outbox: Bytes) -> None:
        self._stream, self.inbox, self.outbox = stream, inbox, outbox
        self._event: int = int(check(cuda.cudaEventCreateWithFlags(cuda.cudaEventDisableTiming)))
        _give_back(self, cuda.cudaEventDestroy, self._event)

    def send(self, target: Buffer) -> None:
        """See `Mailbox`."""
        size = len(self.inbox)
        check(cuda.cudaMemcpyAsync(target.address, self.inbox.ctypes.data, size, _TO_DEVICE, self._stream))
        check(cuda.cudaEventRecord(self._event, self._stream))

    def receive(self, source: Buffer) -> None:
        """See `Mailbox`."""
        size = len(self.outbox)
        check(cuda.cudaMemcpyAsync(self.outbox.ctypes.data, source.address, size, _TO_HOST, self._stream))
        check(cuda.cudaEventRecord(self._event, self._stream))

    def wait(self) -> None:
        """See `Mailbox`."""
        check(cuda.cudaEventSynchronize(self._event))


def _pinned(size: int) -> Bytes:
    """Page-locked host memory, freed with the last array that lies in it."""
    address = int(check(cuda.cudaMallocHost(size)))
    memory = (ctypes.c_uint8 * size).from_address(address)
    _give_back(memory, cuda.cudaFreeHost, address)
    return np.ctypeslib.as_array(memory)


@contextlib.contextmanager
def _capture_mode(mode: Any) -> Iterator[None]:
    """What the calling thread may do while it, or any other, records; as it was before when this ends."""
    previous = check(cuda.cudaThreadExchangeStreamCaptureMode(mode))
    try:
        yield
    finally:
        check(cuda.cudaThreadExchangeStreamCaptureMode(previous))


def _give_back(owner: object, free: Callable[[int], object], handle: int) -> None:
    """Frees something of CUDA's with its owner, in whatever thread that ends."""
    weakref.finalize(owner, _free, free, handle).atexit = False  # the driver may be gone by then


def _free(free: Callable[[int], object], handle: int) -> None:
    with _capture_mode(_RELAXED):
        free(handle)


def _describe(error: Any) -> str:
    _, name = cuda.cudaGetErrorName(error)
    _, text = cuda.cudaGetErrorString(error)
    return f"CUDA says {name.decode()}: {text.decode()}"
