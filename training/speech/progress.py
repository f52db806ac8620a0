"""How far a run is and how long it will take, on standard error."""

from __future__ import annotations

import sys
import time
from typing import Any

__all__ = ["Progress"]

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A bar on a terminal, a line every ten seconds elsewhere, nothing when quiet."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        self._total, self._count, self._failed, self._audio = total, 0, 0, 0.0
        self._started = self._printed = time.monotonic()
        self._bar = _bar(total) if not quiet and sys.stderr.isatty() else None
        self._lines = not quiet and self._bar is None

    def update(self, seconds: float | None) -> None:
        """Counts an utterance with its seconds of audio; None is a failure."""
        self._count += 1
        self._failed += seconds is None
        self._audio += seconds or 0.0
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(self._state(now), refresh=False)
            self._bar.update()
        elif self._lines and now - self._printed >= _SECONDS_BETWEEN_LINES:
            self._printed = now
            left = (now - self._started) / self._count * (self._total - self._count)
            sys.stderr.write(f"{self._count}/{self._total} spoken, {self._state(now)}, {_clock(left)} left\n")
            sys.stderr.flush()

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()

    def _state(self, now: float) -> str:
        return f"{self._audio / max(now - self._started, 1e-9):.0f}x real time, {self._failed} failed"


def _bar(total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="utt", dynamic_ncols=True, file=sys.stderr)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
