"""When the scheduler admits the next request."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Pace"]


class Pace:
    """Running means of what serving takes, to weigh those who wait against those whom an admission holds up.

    An admission stops everybody who is being decoded for as long as the encoder and the prompt take. Waiting costs each
    request in the queue the time until a place would be free anyway. Admitting when the second sum is the larger keeps
    the sum of all latencies low: a lone newcomer waits for an utterance that is nearly done, a crowd does not.
    """

    _WEIGHT = 0.1  # of the newest value

    def __init__(self) -> None:
        self._admission: float | None = None  # seconds
        self._step: float | None = None  # seconds, of all lanes
        self._steps: float | None = None  # per request

    def admitted(self, seconds: float) -> None:
        """Takes how long an admission took."""
        self._admission = self._mean(self._admission, seconds)

    def stepped(self, seconds: float) -> None:
        """Takes how long a step of all lanes took."""
        self._step = self._mean(self._step, seconds)

    def completed(self, steps: int) -> None:
        """Takes how many steps a request needed."""
        self._steps = self._mean(self._steps, float(steps))

    def admits(self, waiting: int, ages: Sequence[int]) -> bool:
        """Whether the next of `waiting` requests should be admitted.

        Args:
            waiting: requests in the queue, at least one.
            ages: steps that each request in the decoder has had.
        """
        if not ages or self._admission is None or self._step is None or self._steps is None:
            return True
        left = sum(max(1.0, self._steps - age) for age in ages) / len(ages)
        return waiting * left * self._step >= len(ages) * self._admission

    def _mean(self, old: float | None, new: float) -> float:
        return new if old is None else old + self._WEIGHT * (new - old)
