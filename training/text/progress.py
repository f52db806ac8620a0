"""A bar with the time left, on standard error."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["progress_bar"]

_SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal, and each state is a line in a log


def progress_bar(total: int, unit: str, *, quiet: bool) -> Any:
    """A `tqdm` over `total` units, or one that shows nothing."""
    from tqdm import tqdm

    interval = 0.1 if sys.stderr.isatty() else _SECONDS_BETWEEN_LINES
    return tqdm(total=total, unit=f" {unit}", disable=quiet, file=sys.stderr, dynamic_ncols=True, mininterval=interval)
