"""Which of several processes this is, as `accelerate launch` and `torchrun` say it."""

from __future__ import annotations

import os

__all__ = ["is_main_process", "process_count", "process_index"]


def process_index() -> int:
    """Index of this process among all, from 0."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the process that writes files."""
    return process_index() == 0
