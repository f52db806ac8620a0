"""IO bindings of ONNX Runtime: tensors are handed from run to run by reference, and what crosses is counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from das_asr.runtime.backends.base import Step, Traffic

__all__ = ["HOST", "Binding", "to_device"]

HOST = ("cpu", 0)
"""The host's memory as a device, and its number."""
_STEP_OUTPUTS = ("row", "candidate", "logprob")


class Binding:
    """One IO binding, and a count of every byte that crosses between host and device."""

    def __init__(self, session: Any, device: str, device_id: int) -> None:
        self._session, self._device, self._device_id = session, device, device_id
        self._binding = session.io_binding()
        self._held: dict[str, Any] = {}
        self.traffic = Traffic()

    def feed(self, name: str, array: NDArray[Any]) -> None:
        """Binds a host array; its bytes cross."""
        self._binding.bind_cpu_input(name, np.ascontiguousarray(array))
        self.traffic.to_device[name] = array.nbytes

    def place(self, name: str, array: NDArray[Any]) -> None:
        """Moves a host array to the device, for all runs; its bytes cross once."""
        self.connect(name, to_device(array, self._device, self._device_id))
        self.traffic.to_device[name] = array.nbytes

    def connect(self, name: str, value: Any) -> None:
        """Binds a tensor that is already on the device; nothing crosses."""
        self._held[name] = value  # on the CPU it may be a view of an array that only this object keeps alive
        self._binding.bind_ortvalue_input(name, value)

    def connect_all(self, tensors: Mapping[str, Any], names: Sequence[str]) -> None:
        """Binds those of the tensors that are named."""
        for name in names:
            if name in tensors:
                self.connect(name, tensors[name])

    def connected(self, name: str) -> Any:
        """The tensor that was bound by `connect` or `place`."""
        return self._held[name]

    def run(self, device_outputs: Sequence[str], host_outputs: Sequence[str]) -> tuple[list[Any], list[NDArray[Any]]]:
        """Runs the graph: (tensors that stay on the device, copies of those the host asked for)."""
        self._binding.clear_binding_outputs()
        for name in device_outputs:
            self._binding.bind_output(name, self._device, self._device_id)
        for name in host_outputs:
            self._binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(self._binding)
        outputs = list(self._binding.get_outputs())
        # `numpy()` is a view into the engine's memory, which the next run may overwrite.
        fetched = [value.numpy().copy() for value in outputs[len(device_outputs) :]]
        self.traffic.to_host.update((name, array.nbytes) for name, array in zip(host_outputs, fetched, strict=True))
        return outputs[: len(device_outputs)], fetched

    def step(self, device_outputs: Sequence[str], *, logits: bool) -> tuple[list[Any], Step]:
        """Runs the decoder: (tensors that stay on the device, what the host is told)."""
        kept, fetched = self.run(device_outputs, (*_STEP_OUTPUTS, "logits") if logits else _STEP_OUTPUTS)
        return kept, Step(*fetched)

    def take_traffic(self) -> Traffic:
        """What crossed since the last call."""
        traffic, self.traffic = self.traffic, Traffic()
        return traffic


def to_device(array: NDArray[Any], device: str, device_id: int) -> Any:
    """A host array as a tensor of the device; on the CPU it may share the array's memory."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), device, device_id)
