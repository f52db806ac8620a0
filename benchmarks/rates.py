"""What the machine can do at best: bytes read and operations computed per second, with a number of threads.

Reading is a maximum over a block of memory that no cache holds, each thread over its part: one load and one comparison
per element, as little work as there can be. Computing is a square matrix product that stays in the caches, in float32
by the faster of NumPy's and ONNX Runtime's, in 8 bits by ONNX Runtime's. The best of several trials counts: a floor
must not rise because something else ran. Multiplication and addition are two operations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

from das_asr.benchmarks.machine import pinned

__all__ = ["Rates", "measure_rates", "probe_rates"]

BLOCK = 256 * 2**20  # bytes, far more than a cache
SIDE = 1024  # of the matrices
TRIALS = 7


@dataclass(frozen=True)
class Rates:
    """Of one machine and number of threads."""

    read: float  # bytes per second
    fp32: float  # operations per second
    int8: float  # operations per second

    def best(self, other: Rates) -> Rates:
        """The higher of each: measured before and after a run, for machines whose speed drifts."""
        return Rates(max(self.read, other.read), max(self.fp32, other.fp32), max(self.int8, other.int8))


def measure_rates(threads: int) -> Rates:
    """Measures in a process of its own, whose thread pools have that size."""
    from das_asr.benchmarks.worker import run_task

    return Rates(**run_task("rates", {"threads": threads}, threads))


def probe_rates(specification: Mapping[str, Any]) -> dict[str, float]:
    """What the process of `measure_rates` does."""
    threads = int(specification["threads"])
    with pinned(threads):
        return asdict(Rates(_read_rate(threads), max(_numpy_rate(), _engine_rate(threads)), _integer_rate(threads)))


def _read_rate(threads: int) -> float:
    import numpy as np

    parts = np.array_split(np.ones(BLOCK // 4, np.float32), threads)
    with ThreadPoolExecutor(threads) as pool:
        return BLOCK / _fastest(lambda: list(pool.map(np.max, parts)))


def _numpy_rate() -> float:
    import numpy as np

    a = np.random.default_rng(0).standard_normal((SIDE, SIDE)).astype(np.float32)
    return 2 * SIDE**3 / _fastest(lambda: a @ a)


def _engine_rate(threads: int) -> float:
    import numpy as np

    a = np.random.default_rng(0).standard_normal((SIDE, SIDE)).astype(np.float32)
    return _product_rate("MatMul", a, a, threads)


def _integer_rate(threads: int) -> float:
    import numpy as np

    rng = np.random.default_rng(0)
    a, b = (rng.integers(low, low + 256, (SIDE, SIDE)).astype(kind) for low, kind in ((0, np.uint8), (-128, np.int8)))
    return _product_rate("MatMulInteger", a, b, threads)


def _product_rate(operator: str, a: Any, b: Any, threads: int) -> float:
    """Of a graph with one product, the right side a constant, as the weights of a network are."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    kinds = {"MatMul": (TensorProto.FLOAT, TensorProto.FLOAT), "MatMulInteger": (TensorProto.UINT8, TensorProto.INT32)}
    given, made = kinds[operator]
    graph = helper.make_graph(
        [helper.make_node(operator, ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", given, a.shape)],
        [helper.make_tensor_value_info("c", made, a.shape)],
        [numpy_helper.from_array(b, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return 2 * SIDE**3 / _fastest(lambda: session.run(None, {"a": a}))


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest trial."""

    def once() -> float:
        started = perf_counter()
        work()
        return perf_counter() - started

    return min(once() for _ in range(TRIALS))
