"""What one utterance took, part by part, and how samples are summarised.

`ModelClock` hangs forward hooks on a transformers Whisper, so that `generate` and this package's own loops are measured
by the same instrument. The parts of an utterance:

    features    audio -> log-mel
    encoder     log-mel -> encoder states -> keys and values of the cross-attention
    prefill     the decoder over the prompt, up to the first token
    steps       one per further token, from the start of one decoder run to the start of the next
    selection   choosing among the rows, within prefill and steps; None where it happens inside the graph
    host        what is left of the total when features, selection and everything a network computes is taken away;
                it lies within prefill and steps, too
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

__all__ = ["Burst", "ModelClock", "Summary", "Utterance", "percentile", "summarize"]


@dataclass(frozen=True)
class Utterance:
    """What one system made of one utterance and how long each part took, in seconds."""

    tokens: tuple[int, ...]  # new tokens, without the prompt
    rows: tuple[int, ...]  # row that chose each token; empty where a system has but one
    total: float
    features: float
    encoder: float  # with the cross-attention's keys and values
    prefill: float
    steps: tuple[float, ...]
    selection: float | None = None
    host: float | None = None


@dataclass(frozen=True)
class Burst:
    """What one system made of many utterances that were all at hand."""

    seconds: float  # from samples to the last text
    tokens: tuple[tuple[int, ...], ...]  # new tokens of each utterance, in their order


@dataclass(frozen=True)
class Summary:
    """Samples of one quantity."""

    median: float
    p95: float
    min: float
    n: int


def percentile(values: Sequence[float], share: float) -> float:
    """The `share` quantile (0..1) with linear interpolation between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarize(values: Sequence[float]) -> Summary | None:
    """Median, 95th percentile and minimum; None where nothing was measured."""
    if not values:
        return None
    return Summary(statistics.median(values), percentile(values, 0.95), min(values), len(values))


class ModelClock:
    """Times the parts of a transformers Whisper by forward hooks; a hook costs a few microseconds."""

    def __init__(self, model: Any) -> None:
        """Attaches the hooks.

        Args:
            model: A `WhisperForConditionalGeneration`, with or without PEFT layers inside.
        """
        self._spans: dict[str, float]
        self._runs: list[tuple[float, bool]]  # start of each decoder run, and whether it was a prefill
        self.reset()
        decoder = model.get_decoder()
        self._time(model.get_encoder(), "encoder")
        self._time(decoder, "network")
        self._time(model.get_output_embeddings(), "network")
        decoder.register_forward_pre_hook(self._note_run, with_kwargs=True)
        for layer in decoder.layers:
            # Called once per decode: the cache holds their results from then on.
            self._time(layer.encoder_attn.k_proj, "cross")
            self._time(layer.encoder_attn.v_proj, "cross")

    def reset(self) -> None:
        """Forgets the utterance before."""
        self._spans = dict.fromkeys(("encoder", "network", "cross"), 0.0)
        self._runs = []

    def utterance(
        self,
        tokens: Sequence[int],
        rows: Sequence[int],
        *,
        start: float,
        features: float,
        end: float,
        selection: float | None,
    ) -> Utterance:
        """Puts the parts together; `start` and `end` are `perf_counter` readings, the rest are seconds."""
        spans, total = self._spans, end - start
        ends = [moment for moment, _ in self._runs[1:]] + [end]
        lengths = [(stop - begin, prefill) for (begin, prefill), stop in zip(self._runs, ends, strict=True)]
        networks = spans["encoder"] + spans["network"]
        return Utterance(
            tokens=tuple(tokens),
            rows=tuple(rows),
            total=total,
            features=features,
            encoder=spans["encoder"] + spans["cross"],
            prefill=sum(length for length, prefill in lengths if prefill) - spans["cross"],
            steps=tuple(length for length, prefill in lengths if not prefill),
            selection=selection,
            host=total - features - networks - (selection or 0.0),
        )

    def _time(self, module: Any, part: str) -> None:
        started: list[float] = []
        module.register_forward_pre_hook(lambda *_: started.append(perf_counter()))
        module.register_forward_hook(self._adder(part, started))

    def _adder(self, part: str, started: list[float]) -> Callable[..., None]:
        def add(*_: Any) -> None:
            self._spans[part] += perf_counter() - started.pop()

        return add

    def _note_run(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        # Only the prompt is longer than one token.
        self._runs.append((perf_counter(), ids.shape[-1] > 1))
