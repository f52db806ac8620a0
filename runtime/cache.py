"""The growing self-attention cache: it owns its tensors, and nobody else keeps count of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from das_asr.runtime.contract import cache_names
from das_asr.runtime.manifest import Dimensions

__all__ = ["GrowingCache"]


class GrowingCache:
    """Device tensors `past_*` [B, R, H, T, d] of every layer; each run's `present_*` take their place.

    Tensors are handed over by reference: the cache is never copied by the runtime.
    """

    def __init__(self, dims: Dimensions, empty: Any) -> None:
        self._pasts, self.present_names = (list(names) for names in zip(*cache_names(dims), strict=True))
        self._values: Sequence[Any] = [empty] * len(self._pasts)

    def inputs(self) -> Iterator[tuple[str, Any]]:
        """Pairs of input name and tensor for the next run."""
        return zip(self._pasts, self._values, strict=True)

    @property
    def values(self) -> Sequence[Any]:
        """The tensors, in the order of `contract.cache_names`."""
        return self._values

    def advance(self, presents: Sequence[Any]) -> None:
        """Takes the outputs of a run, or fewer rows of what it has, in the order of `present_names`."""
        if len(presents) != len(self._pasts):
            raise ValueError(f"{len(presents)} cache tensors for {len(self._pasts)} inputs")
        self._values = presents
