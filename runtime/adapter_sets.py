"""Which adapters are loaded: immutable sets, swapped as a whole, so that a request keeps the set it started with."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from das_asr.runtime.adapters import Adapter, Stack, check_names, load_adapter, select_rows, stack_adapters
from das_asr.runtime.backends.base import Backend, LoadedStack
from das_asr.runtime.errors import OptionError
from das_asr.runtime.manifest import Manifest
from das_asr.runtime.peft_checkpoint import read_adapter
from das_asr.runtime.results import BASE

__all__ = ["AdapterSet", "AdapterSets"]

_KEPT_SUBSETS = 8  # a subset's tensors stay on the device; services use few distinct ones


@dataclass(frozen=True)
class AdapterSet:
    """Adapters as the backend holds them; row 0 is the base."""

    names: tuple[str, ...]
    loaded: LoadedStack
    stack: Stack | None  # what was loaded; None: what the graphs carry

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of all rows."""
        return (BASE, *self.names)


class AdapterSets:
    """The current set, its subsets, and the way to change it. Safe to use from several threads."""

    def __init__(self, backend: Backend, manifest: Manifest, directory: Path) -> None:
        self._backend, self._manifest, self._directory = backend, manifest, directory
        self._bundled = tuple(entry.name for entry in manifest.adapters)
        self._current = AdapterSet(self._bundled, backend.load_stack(None), None)
        self._carried: Stack | None = None  # what the graphs carry; read from the bundle when first needed
        self._subsets: OrderedDict[tuple[str, ...], AdapterSet] = OrderedDict()
        self._read: dict[str, Adapter] = {}  # adapters read so far; the bundle's own only when first needed
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the current adapters, in row order."""
        return self._current.names

    def get(self, names: tuple[str, ...] | None) -> AdapterSet:
        """The current set, or one of only the named adapters in the given order.

        Raises:
            OptionError: a name is not loaded, or given twice.
        """
        with self._lock:
            if names is None or names == self._current.names:
                return self._current
            check_names(names)
            if unknown := [name for name in names if name not in self._current.names]:
                known = ", ".join(self._current.names) or "none"
                raise OptionError(f"There is no adapter {unknown[0]!r}; loaded: {known}. Load it or choose another.")
            if names not in self._subsets:
                self._subsets[names] = self._make(names)
            self._subsets.move_to_end(names)
            if len(self._subsets) > _KEPT_SUBSETS:
                self._subsets.popitem(last=False)
            return self._subsets[names]

    def subset(self, chosen: AdapterSet, rows: Sequence[int]) -> LoadedStack:
        """Some rows of a set, with its rank: what a batch that was started with the set can go on with.

        Args:
            chosen: from `get`; it need not be the current set any more.
            rows: indices among its rows, the base's 0 first.
        """
        if len(rows) == len(chosen.rows):
            return chosen.loaded
        stack = chosen.stack or self._carried_stack()
        return self._backend.load_stack(select_rows(stack, [chosen.names[row - 1] for row in rows[1:]]))

    def _carried_stack(self) -> Stack:
        with self._lock:
            if self._carried is None:
                adapters = [self._read_bundled(name) for name in self._bundled]
                self._carried = stack_adapters(adapters, self._manifest.dimensions)
            return self._carried

    def add(self, name: str, directory: str | Path) -> None:
        """Reads a PEFT checkpoint and makes it the last row.

        Raises:
            AdapterError: the checkpoint cannot be used with this base.
            OptionError: the name cannot be used, or is taken.
        """
        base = self._manifest.base
        adapter = read_adapter(directory, name, self._manifest.dimensions, base.sha256, base.id)
        with self._lock:
            names = (*self._current.names, name)
            check_names(names)
            self._read[name] = adapter
            self._switch(names)

    def remove(self, name: str) -> None:
        """Takes an adapter out of the set.

        Raises:
            OptionError: it is not loaded.
        """
        with self._lock:
            if name not in self._current.names:
                known = ", ".join(self._current.names) or "none"
                raise OptionError(f"There is no adapter {name!r} to unload; loaded: {known}.")
            self._switch(tuple(other for other in self._current.names if other != name))
            self._read.pop(name, None)

    def _switch(self, names: tuple[str, ...]) -> None:
        self._current = self._make(names)
        self._subsets.clear()

    def _make(self, names: tuple[str, ...]) -> AdapterSet:
        dims = self._manifest.dimensions
        stack = stack_adapters([self._adapter(name) for name in names], dims)
        return AdapterSet(names, self._backend.load_stack(stack), stack)

    def _adapter(self, name: str) -> Adapter:
        if name not in self._read:
            self._read[name] = self._read_bundled(name)
        return self._read[name]

    def _read_bundled(self, name: str) -> Adapter:
        return load_adapter(self._directory / "adapters" / f"{name}.safetensors", name, self._manifest.dimensions)
