"""Keeps the libraries' remarks about themselves off the user's screen; errors and our own warnings still show."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

__all__ = ["quiet_libraries"]

_LIBRARIES = ("accelerate", "huggingface_hub", "peft", "torch", "transformers")


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hides warnings that point into the libraries' own code, their log below errors, and their progress bars."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            for library in _LIBRARIES:
                warnings.filterwarnings("ignore", module=rf"{library}(\..*)?")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
