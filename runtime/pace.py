"""When the scheduler admits the next request."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

__all__ = ["Pace"]

_WEIGHT = 0.1
"""Of the newest value in a running mean of many."""

_OWN_PART = 0.1
"""Of a step, at least: what was measured badly once is tried again when a crowd waits."""


class _Mean:
    """A running mean: of all values at first, for the first ones often take longest."""

    def __init__(self) -> None:
        self.count, self.value = 0, 0.0

    def add(self, value: float) -> None:
        self.count += 1
        self.value += max(_WEIGHT, 1 / self.count) * (value - self.value)


class Pace:
    """Running means of what serving takes, to weigh those who wait against those whom an admission holds up.

    A step takes a part of its own and a part for each utterance in it, a line through the means by number of
    utterances. Admitting the next one stops everybody who is being decoded for as long as the encoder and the prompt
    take, and makes each of their steps longer by one part. It saves everybody who waits the steps' own part, for as
    many steps as the newcomer shares with the others instead of having them to itself later. Admitting when the second
    sum is the larger keeps the sum of all latencies low: a lone newcomer waits for an utterance that is nearly done, a
    crowd does not, and where sharing a step saves little, requests are served one after the other.
    """

    def __init__(self) -> None:
        self._admission = _Mean()  # seconds
        self._step: defaultdict[int, _Mean] = defaultdict(_Mean)  # seconds, by the number of utterances
        self._steps = _Mean()  # per request

    def admitted(self, seconds: float) -> None:
        """Takes how long an admission took."""
        self._admission.add(seconds)

    def stepped(self, utterances: int, seconds: float) -> None:
        """Takes how long a step of all lanes took, with so many utterances in them."""
        self._step[utterances].add(seconds)

    def completed(self, steps: int) -> None:
        """Takes how many steps a request needed."""
        self._steps.add(steps)

    def admits(self, waiting: int, ages: Sequence[int]) -> bool:
        """Whether the next of `waiting` requests should be admitted.

        Args:
            waiting: requests in the queue, at least one.
            ages: steps that each request in the decoder has had.
        """
        if not ages or not (self._admission.count and self._step and self._steps.count):
            return True
        left = sum(max(1.0, self._steps.value - age) for age in ages) / len(ages)
        own, each = self._parts()
        return waiting * left * own >= len(ages) * (self._admission.value + left * each)

    def _parts(self) -> tuple[float, float]:
        """Seconds of a step whatever is in it, and seconds for each utterance in it."""
        points = [(utterances, mean.value) for utterances, mean in self._step.items()]
        live = sum(utterances for utterances, _ in points) / len(points)
        seconds = sum(taken for _, taken in points) / len(points)
        spread = sum((utterances - live) ** 2 for utterances, _ in points)
        if not spread:  # nothing is known of steps with more utterances, so they are tried
            return seconds, 0.0
        slope = sum((utterances - live) * taken for utterances, taken in points) / spread
        each = min(max(0.0, slope), (1 - _OWN_PART) * seconds / live)
        return seconds - each * live, each
