"""What every backend offers: five methods, the batch being decoded, and slots for continuous batching.

A backend owns the compiled graphs of one bundle on one device. It is shared by threads, so it keeps no state of a
request: that lives in what `encode` and `start` return.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from das_asr.runtime.adapters import Stack

__all__ = ["Backend", "Control", "DecodingBatch", "Encoded", "LoadedStack", "Slots", "Step", "Traffic"]


@dataclass(frozen=True)
class LoadedStack:
    """A stack of adapters on the device. Empty `tensors` mean the stack that the graphs carry themselves."""

    rows: int
    tensors: Mapping[str, Any]


@dataclass(frozen=True)
class Encoded:
    """Cross-attention tensors of B utterances on the device, by the decoder's input names."""

    batch: int
    tensors: Mapping[str, Any]


@dataclass(frozen=True)
class Control:
    """What stays the same for all steps of a batch; see `contract.decoder_inputs`."""

    rule: NDArray[np.int64]  # [B]
    tau: NDArray[np.float32]  # [B]
    token_bias: NDArray[np.float32]  # [B, V]
    first_token_bias: NDArray[np.float32]  # [B, V]
    row_mask: NDArray[np.bool_]  # [B, R]
    first_valid: NDArray[np.int64]  # [B]

    def feeds(self) -> dict[str, NDArray[Any]]:
        """The arrays by the decoder's input names."""
        return dict(vars(self))


@dataclass(frozen=True)
class Step:
    """What one run of the decoder tells the host."""

    row: NDArray[np.int64]  # [B]: the row that the graph's rule chose
    candidate: NDArray[np.int64]  # [B, R]
    logprob: NDArray[np.float32]  # [B, R], natural logarithm
    logits: NDArray[np.float32] | None = None  # [B, R, V] before suppression, only when asked for

    def of(self, place: int, rows: int) -> Step:
        """The outcome for the first rows of one utterance, as a batch of one."""
        only = slice(place, place + 1)
        logits = None if self.logits is None else self.logits[only, :rows]
        return Step(self.row[only], self.candidate[only, :rows], self.logprob[only, :rows], logits)


@dataclass
class Traffic:
    """Bytes that crossed between host and device in one run, by tensor name; those that stay where they are do not."""

    to_device: dict[str, int] = field(default_factory=dict)
    to_host: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes in both directions."""
        return sum(self.to_device.values()) + sum(self.to_host.values())


class DecodingBatch(Protocol):
    """B utterances on their way through the decoder, with their caches."""

    traffic: list[Traffic]
    """One entry per run."""

    def run(
        self, position: NDArray[np.int64], prompt_last: NDArray[np.int64],
        ids: NDArray[np.int64] | None = None, *, logits: bool = False,
    ) -> Step:  # fmt: skip
        """Runs the decoder once.

        Args:
            position: int64 [B], position of the first new token in each utterance's own history.
            prompt_last: int64 [B], position whose logits are read while it is not yet behind `position`; that of the
                last new token where there are several.
            ids: int64 [B, R, n] new tokens; None feeds the graph's own choice of the run before.
            logits: fetch the logits too, B * R * V * 4 bytes.
        """
        ...

    def keep_rows(self, places: NDArray[np.int64], row_mask: NDArray[np.bool_], stack: LoadedStack) -> None:
        """Leaves out all rows but some, for all runs to come; only where `Backend.prunes`.

        Args:
            places: int64 [R'], where they are among the rows of the run before, ascending; row 0 is among them.
            row_mask: bool [B, R'], takes the place of `Control.row_mask`.
            stack: their adapters, of the same rank as the batch was started with.
        """
        ...


class Slots(Protocol):
    """Utterances of different age in the decoder; they join and leave between any two runs.

    Where `Backend.mixes`, each may have another stack of adapters.
    """

    @property
    def count(self) -> int:
        """Live utterances n; they have the places 0 .. n - 1."""
        ...

    def join(self, encoded: Encoded, stack: LoadedStack, control: Control, batch: Any, length: int) -> None:
        """Takes over an utterance whose prompt was fed as a batch of one; it gets the last place.

        Args:
            encoded: the utterance.
            stack: of its rows.
            control: its control values.
            batch: what `start` of the same backend returned for these three.
            length: tokens of the prompt.
        """
        ...

    def leave(self, place: int) -> None:
        """Frees a place; the last utterance moves into it."""
        ...

    def run(self, ids: Sequence[NDArray[np.int64]], *, logits: bool = False) -> list[Step]:
        """Feeds one token to every row.

        Args:
            ids: int64 [R, 1] of each utterance, in the order of the places, R its own number of rows.
            logits: fetch the logits too.

        Returns:
            The outcome for each utterance as a batch of one, with its own rows.
        """
        ...


class Backend(Protocol):
    """The compiled graphs of one bundle on one device."""

    @property
    def prunes(self) -> bool:
        """Whether rows that are not needed leave a batch; where they cost less than a copy of the caches, they stay."""
        ...

    @property
    def mixes(self) -> bool:
        """Whether utterances with different stacks share slots; where not, each stack needs slots of its own."""
        ...

    def load_stack(self, stack: Stack | None) -> LoadedStack:
        """Puts adapters on the device; None is the stack that the graphs carry."""
        ...

    def encode(self, features: NDArray[np.float32], stack: LoadedStack) -> Encoded:
        """Runs the encoder on features [B, mels, frames] of a window or its beginning.

        Raises:
            BundleError: the encoder takes whole windows only, and these are shorter.
        """
        ...

    def start(self, encoded: Encoded, stack: LoadedStack, control: Control) -> DecodingBatch:
        """Binds everything that stays the same for all steps, with empty caches."""
        ...

    def open_slots(self, capacity: int) -> Slots:
        """Makes room for `capacity` utterances."""
        ...

    def close(self) -> None:
        """Frees the graphs; the backend cannot be used afterwards."""
        ...
