"""Memory and graphs of a GPU, with a stand-in for the CUDA runtime; `test_gpu.py` has what only a GPU can show."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings, of the extra [gpu]")

from das_asr.runtime import BackendError
from das_asr.runtime.backends import cuda_memory
from das_asr.runtime.backends.cuda_memory import CudaMemory
from tests.cuda_stand_in import StandIn


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    stand_in = StandIn(1 << 20)
    monkeypatch.setattr(cuda_memory, "cuda", stand_in)
    yield stand_in
    gc.collect()
    assert (stand_in.blocks, stand_in.pinned, stand_in.handles) == ({}, {}, {})  # all of it was freed


def test_arrays_go_there_and_back(gpu: StandIn) -> None:
    memory = CudaMemory(0)
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    first, second, back = memory.allocate((3, 4), "float32"), memory.allocate((3, 4), "float32"), np.empty_like(values)
    memory.read(first, back)
    assert not back.any()
    memory.write(first, values)
    memory.copy(second.part(1, 1), first.part(2, 1))
    memory.read(second, back)
    assert np.array_equal(back, [[0] * 4, values[2].tolist(), [0] * 4])


def test_mailboxes_carry_their_bytes(gpu: StandIn) -> None:
    memory = CudaMemory(0)
    device, box = memory.allocate((512,), "uint8"), memory.mailbox(512, 256)
    box.inbox[:] = 7
    box.send(device)
    box.receive(device.part(0, 256))
    box.wait()
    assert (box.outbox == 7).all()


def test_others_may_record_meanwhile(gpu: StandIn) -> None:
    """As ONNX Runtime does, which no thread may disturb that has not said that it is not concerned."""
    memory = CudaMemory(0)

    def work() -> None:
        memory.enter()
        block, box = memory.allocate((256,), "uint8"), memory.mailbox(256, 256)
        box.send(block)
        box.wait()
        memory.close()

    with ThreadPoolExecutor(1) as pool:
        gpu.recorded_elsewhere = True
        pool.submit(work).result()
        last = [pool.submit(memory.allocate, (256,), "uint8").result()]
        assert gpu.used > 0
        free = threading.Thread(target=last.clear)  # a thread that never had to do with the device
        free.start()
        free.join()
        assert gpu.used == 0


def test_recorded_work_is_repeated(gpu: StandIn) -> None:
    memory = CudaMemory(0)
    first, second = memory.allocate((2,), "int64"), memory.allocate((2,), "int64")
    graph = memory.record(lambda: memory.copy(second, first))
    back = np.empty(2, np.int64)
    for value in (3, 4):
        memory.write(first, np.full(2, value))
        graph.launch()
        memory.read(second, back)
        assert (back == value).all()


def test_a_recording_that_fails_leaves_the_stream_usable(gpu: StandIn) -> None:
    memory = CudaMemory(0)

    def broken() -> None:
        raise BackendError("no")

    with pytest.raises(BackendError, match="no"):
        memory.record(broken)
    memory.close()


def test_too_little_memory_is_told_in_numbers(gpu: StandIn) -> None:
    memory = CudaMemory(0)
    kept = memory.allocate((1 << 19,), "uint8")
    with pytest.raises(BackendError, match=r"Out of memory on CUDA device 0: 0\.00 GiB were asked.*fewer utterances"):
        memory.allocate((1 << 20,), "uint8")
    assert memory.free() == (gpu.size - gpu.used, gpu.size)
    del kept
    memory.allocate((1 << 19,), "uint8")


def test_errors_name_what_cuda_says(gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = CudaMemory(0)
    failed = gpu.cudaError_t.cudaErrorIllegalAddress
    monkeypatch.setattr(gpu, "cudaStreamSynchronize", lambda _: (failed,), raising=False)
    with pytest.raises(BackendError, match="CUDA says cudaErrorIllegalAddress: in words"):
        memory.close()


def test_a_device_that_is_not_there(gpu: StandIn) -> None:
    with pytest.raises(BackendError, match=r"no CUDA device 1 \(1 found\)"):
        CudaMemory(1)
