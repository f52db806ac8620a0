"""Which utterances form a batch: shuffled once per epoch, or an equal share of every domain.

The order is a function of the seed, the epoch and the step alone, so that a resumed run sees the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

__all__ = ["Batches"]


class Batches:
    """A batch sampler over utterances that lie domain by domain.

    With one domain an epoch is a permutation, and its last batch may be smaller. With several, a batch of B takes
    B // K of each of K domains, and the B % K left over go to the domains in turn. Every domain is an endless sequence
    of permutations of its own; an epoch has as many batches as there are utterances for, so small domains come more
    than once.
    """

    drop_last = False  # accelerate asks for it

    def __init__(self, sizes: Sequence[int], batch_size: int, seed: int) -> None:
        self.sizes = tuple(sizes)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return -(-sum(self.sizes) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration goes through, from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        return self._shuffled(self.epoch) if len(self.sizes) == 1 else self._balanced(self.epoch)

    def shares(self, batch: int) -> list[int]:
        """How many utterances of each domain are in a batch, counted from the first batch of the first epoch."""
        domains = len(self.sizes)
        common, extra = divmod(self.batch_size, domains)
        first = batch * extra % domains
        return [common + ((domain - first) % domains < extra) for domain in range(domains)]

    def _shuffled(self, epoch: int) -> Iterator[list[int]]:
        order = self._permutation(0, epoch)
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def _balanced(self, epoch: int) -> Iterator[list[int]]:
        first = epoch * len(self)
        taken = [sum(column) for column in zip(*map(self.shares, range(first)), strict=True)] or [0] * len(self.sizes)
        streams = [self._stream(domain, count) for domain, count in enumerate(taken)]
        for batch in range(first, first + len(self)):
            yield [
                next(stream) for stream, share in zip(streams, self.shares(batch), strict=True) for _ in range(share)
            ]

    def _stream(self, domain: int, start: int) -> Iterator[int]:
        """Indices of one domain, permutation after permutation, from its draw number `start` on."""
        turn, position = divmod(start, self.sizes[domain])
        offset = sum(self.sizes[:domain])
        while True:
            yield from (offset + index for index in self._permutation(domain, turn)[position:])
            turn, position = turn + 1, 0

    def _permutation(self, domain: int, turn: int) -> list[int]:
        order = np.random.default_rng((self.seed, domain, turn)).permutation(self.sizes[domain])
        return [int(index) for index in order]
