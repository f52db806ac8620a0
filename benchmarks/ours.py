"""The runtime as a system of the comparison: the public `Transcriber`, with a stopwatch around its graphs.

The total is what a caller of `Transcriber.transcribe` waits for, words and provenance included. Cross-attention keys
and values are outputs of the encoder graph, the selection rule is part of the decoder graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from das_asr.benchmarks.models import SAMPLE_RATE
from das_asr.benchmarks.systems import Work
from das_asr.benchmarks.timing import Utterance
from das_asr.runtime import DecodingOptions, Transcriber, Transcription
from das_asr.runtime.backends import BackendOptions, create_backend
from das_asr.runtime.backends.base import Backend, Control, DecodingBatch, Encoded, LoadedStack, Slots, Step
from das_asr.runtime.errors import OptionError
from das_asr.runtime.manifest import Manifest, read_manifest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from das_asr.runtime.adapters import Stack

__all__ = ["OursSystem", "TimedBackend"]

OpenBackend = Callable[[Path, Manifest, BackendOptions, str], Backend]
DEFAULT_BACKEND: OpenBackend = functools.partial(create_backend, "onnxruntime")

RULES = {"das": "paper", "das-hypothesis": "hypothesis"}


class TimedBackend:
    """A backend that notes how long its graphs run and when each decoder run began."""

    def __init__(self, inner: Backend) -> None:
        self._inner = inner
        self.reset()

    def reset(self) -> None:
        """Forgets the utterance before."""
        self.encoder = 0.0  # seconds
        self.decoder = 0.0  # seconds in all decoder runs
        self.starts: list[float] = []  # perf_counter at the start of each decoder run

    @property
    def prunes(self) -> bool:
        """See `Backend`."""
        return self._inner.prunes

    @property
    def mixes(self) -> bool:
        """See `Backend`."""
        return self._inner.mixes

    def load_stack(self, stack: Stack | None) -> LoadedStack:
        """See `Backend`."""
        return self._inner.load_stack(stack)

    def encode(self, features: NDArray[np.float32], stack: LoadedStack) -> Encoded:
        """See `Backend`."""
        started = perf_counter()
        encoded = self._inner.encode(features, stack)
        self.encoder += perf_counter() - started
        return encoded

    def start(self, encoded: Encoded, stack: LoadedStack, control: Control) -> DecodingBatch:
        """See `Backend`."""
        return _TimedBatch(self._inner.start(encoded, stack, control), self)

    def open_slots(self, capacity: int) -> Slots:
        """See `Backend`; not measured here."""
        return self._inner.open_slots(capacity)

    def close(self) -> None:
        """See `Backend`."""
        self._inner.close()


class _TimedBatch:
    def __init__(self, inner: DecodingBatch, clock: TimedBackend) -> None:
        self._inner, self._clock = inner, clock
        self.traffic = inner.traffic

    def run(
        self, position: NDArray[np.int64], prompt_last: NDArray[np.int64],
        ids: NDArray[np.int64] | None = None, *, logits: bool = False,
    ) -> Step:  # fmt: skip
        started = perf_counter()
        self._clock.starts.append(started)
        step = self._inner.run(position, prompt_last, ids, logits=logits)
        self._clock.decoder += perf_counter() - started
        return step

    def keep_rows(self, places: NDArray[np.int64], row_mask: NDArray[np.bool_], stack: LoadedStack) -> None:
        started = perf_counter()
        self._inner.keep_rows(places, row_mask, stack)
        self._clock.decoder += perf_counter() - started


class OursSystem:
    """A bundle on ONNX Runtime."""

    def __init__(self, name: str, work: Work, backend: OpenBackend = DEFAULT_BACKEND) -> None:
        """Loads the bundle.

        Args:
            name: of `RULES`.
            work: what to do; the bundle must be given.
            backend: opens a bundle's graphs of a precision.
        """
        if work.bundle is None:
            raise OptionError(f"The system {name!r} needs an exported bundle. Give one with --bundle.")
        manifest = read_manifest(work.bundle)
        options = BackendOptions(threads=work.threads, spinning=work.spinning)
        self._clock = TimedBackend(backend(work.bundle, manifest, options, work.precision))
        self._transcriber = Transcriber(manifest, work.bundle, self._clock)
        self._options = DecodingOptions(
            language="en",
            rule=RULES[name],
            tau=None if RULES[name] == "hypothesis" else work.tau,
            no_speech_threshold=None,  # transformers does not measure it by default either
            **_forced(work.tokens, manifest.tokens.end_of_text),
        )

    def transcribe(self, audio: NDArray[np.float32]) -> Utterance:
        """Transcribes float32 [samples] at 16 kHz, at most one window."""
        clock = self._clock
        clock.reset()
        start = perf_counter()
        result = self._transcriber.transcribe(audio, self._options, sample_rate=SAMPLE_RATE)
        end = perf_counter()
        features = result.timings.features
        runs = [after - before for before, after in pairwise([*clock.starts, end])]  # none for digital silence
        return Utterance(
            tokens=result.tokens,
            rows=_rows(result),
            total=end - start,
            features=features,
            encoder=clock.encoder,
            prefill=sum(runs[:1]),
            steps=tuple(runs[1:]),
            host=end - start - features - clock.encoder - clock.decoder,
        )

    def close(self) -> None:
        """Frees the graphs."""
        self._transcriber.close()


def _forced(tokens: int | None, end_of_text: int) -> dict[str, Any]:
    """Options that make every row write exactly so many tokens; none where the model decides."""
    return {} if tokens is None else {"max_tokens": tokens, "suppress_tokens": (end_of_text,)}


def _rows(result: Transcription) -> tuple[int, ...]:
    """The row that wrote each token; empty where there is but the base."""
    if len(result.rows) == 1:
        return ()
    return tuple(token.row for token in result.provenance[: len(result.tokens)])
