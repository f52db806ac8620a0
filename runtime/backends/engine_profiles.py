"""The sizes that an engine is compiled for: smallest, usual and largest value of every dimension of every input.

TensorRT chooses its kernels for the usual sizes and takes any from the smallest to the largest. The encoder's engine
has one profile, the decoder's two: prefill with a prompt or a piece of it, and step with one token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from das_asr.runtime.backends.engine_files import EngineLimits
from das_asr.runtime.contract import TensorSpec, longest_run
from das_asr.runtime.manifest import Manifest

__all__ = ["Bounds", "Profile", "decoder_profiles", "encoder_profiles"]

Bounds = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, usual and largest shape of an input, or values of one that is a shape itself."""

_STEERING_TOKENS = 4  # start of transcript, language, task, no timestamps
_USUAL_ATTENDED = 64  # cache slots; the smallest bucket, and more than most requests write


@dataclass(frozen=True)
class Profile:
    """One optimisation profile."""

    shapes: dict[str, Bounds]  # of inputs with a dimension that is not fixed
    values: dict[str, Bounds]  # of inputs whose content decides shapes inside the graph


def encoder_profiles(inputs: Iterable[TensorSpec], manifest: Manifest, limits: EngineLimits) -> tuple[Profile, ...]:
    """The encoder's profile."""
    return (_profile(inputs, _sizes(manifest, limits), {}),)


def decoder_profiles(inputs: Iterable[TensorSpec], manifest: Manifest, limits: EngineLimits) -> tuple[Profile, ...]:
    """The decoder's profiles in the order of `PREFILL_PROFILE` and `STEP_PROFILE`."""
    inputs = list(inputs)
    dims, sizes = manifest.dimensions, _sizes(manifest, limits)
    slots = dims.text_positions
    attended = {"attended": ((1,), (min(_USUAL_ATTENDED, slots),), (slots,))}
    longest = longest_run(dims)
    prompt, token = (1, min(_STEERING_TOKENS, longest), longest), (1, 1, 1)
    return tuple(_profile(inputs, sizes | {"new": new}, attended) for new in (prompt, token))


def _sizes(manifest: Manifest, limits: EngineLimits) -> dict[str, tuple[int, int, int]]:
    """Every symbolic dimension; the usual utterance comes alone, with the bundle's own adapters.

    One stack of adapters per run, see `StaticBackend.mixes`: where there might be more, TensorRT fuses less.
    """
    rows = (1, min(manifest.rows, limits.max_rows), limits.max_rows)
    rank = max((entry.rank for entry in manifest.adapters), default=1)
    dims = manifest.dimensions
    return {
        "frames": (2, dims.frames, dims.frames),
        "audio": (1, dims.audio_positions, dims.audio_positions),
        "batch": (1, 1, limits.max_batch),
        "groups": (1, 1, 1),
        "rows": rows,
        "lanes": (1, rows[1], limits.max_batch * limits.max_rows),
        "rank": (1, min(rank, limits.max_rank), limits.max_rank),
    }


def _profile(
    inputs: Iterable[TensorSpec], sizes: Mapping[str, tuple[int, int, int]], values: Mapping[str, Bounds]
) -> Profile:
    inputs = list(inputs)
    dynamic = (spec for spec in inputs if any(isinstance(size, str) for size in spec.shape))
    shapes = {spec.name: _bounds(spec.shape, sizes) for spec in dynamic}
    names = {spec.name for spec in inputs}
    return Profile(shapes, {name: bounds for name, bounds in values.items() if name in names})


def _bounds(shape: tuple[int | str, ...], sizes: Mapping[str, tuple[int, int, int]]) -> Bounds:
    smallest, usual, largest = zip(
        *(sizes[size] if isinstance(size, str) else (size, size, size) for size in shape), strict=True
    )
    return smallest, usual, largest
