"""ONNX Runtime with its TensorRT provider, which builds engines from the graphs and keeps them in the bundle.

The sizes that engines are built for are stated, so that none is built while serving; larger ones are refused. The
provider would make constants of inputs with a default, so the graphs are opened without the defaults: adapters are
inputs like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from das_asr.runtime.adapters import read_stack
from das_asr.runtime.backends import BackendOptions
from das_asr.runtime.backends.engine_files import CACHE_FOLDER, EngineLimits
from das_asr.runtime.backends.engine_profiles import Profile, decoder_profiles, encoder_profiles
from das_asr.runtime.backends.placement import CPU, CUDA, TENSORRT
from das_asr.runtime.backends.tensorrt_library import load_library
from das_asr.runtime.contract import DECODER_STATIC_FILE, ENCODER_FILE, encoder_inputs, static_decoder_inputs
from das_asr.runtime.errors import BackendError
from das_asr.runtime.manifest import Manifest

if TYPE_CHECKING:
    from das_asr.runtime.backends.static import StaticBackend

__all__ = ["limits_of", "load_backend", "profiles", "refuse_larger", "tensorrt_options"]


def load_backend(directory: Path, graphs: Path, manifest: Manifest, options: BackendOptions) -> StaticBackend:
    """The graphs of a precision; the first load builds engines, which takes minutes.

    Args:
        directory: the bundle, which must be writable.
        graphs: folder of the precision.
        manifest: of the bundle.
        options: which GPU.

    Raises:
        BackendError: a package, the provider or the GPU is missing, or nodes fell back to another provider.
        BundleError: the bundle has no graph with the static cache.
    """
    from das_asr.runtime.backends.onnxruntime_static import cuda_options, open_graphs
    from das_asr.runtime.backends.sessions import require_provider

    require_provider(TENSORRT)
    load_library("tensorrt")  # whose libraries the provider needs, and nobody else looks for where pip puts them
    from das_asr.runtime.backends.cuda_memory import CudaMemory

    stack = read_stack(directory, [entry.name for entry in manifest.adapters], manifest.dimensions)
    cache = directory / CACHE_FOLDER / f"ort-tensorrt-{graphs.name if graphs != directory else 'fp32'}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BackendError(
            f"{cache}, where engines are to be kept, cannot be made: {error}. Copy the bundle."
        ) from error
    memory = CudaMemory(options.device_id)
    providers = {
        file: {
            TENSORRT: tensorrt_options(profile, cache, memory.stream, options, graphs.name),
            CUDA: cuda_options(memory.stream, options),
            CPU: {},
        }
        for file, profile in profiles(manifest).items()
    }
    check = partial(refuse_larger, limits_of(manifest))
    return open_graphs(graphs, manifest, options, memory, providers, stack, check)


def limits_of(manifest: Manifest) -> EngineLimits:
    """The largest sizes that engines are built for: the usual ones, and what the bundle's own adapters need."""
    return EngineLimits().covering(rows=manifest.rows, rank=max((entry.rank for entry in manifest.adapters), default=1))


def refuse_larger(limits: EngineLimits, batch: int, rows: int, rank: int) -> None:
    """Refuses sizes that no engine was built for.

    Raises:
        BackendError: saying what is wanted, and what there is.
    """
    if limits.covering(batch, rows, rank) != limits:
        raise BackendError(
            f"backend='ort-tensorrt' takes up to {limits.max_batch} utterances, {limits.max_rows} rows and adapters of "
            f"rank {limits.max_rank}; {batch} utterance(s), {rows} rows and rank {rank} are wanted. Give fewer at a "
            "time, or use backend='onnxruntime', which has no such limits."
        )


def profiles(manifest: Manifest) -> dict[str, Profile]:
    """Sizes of each graph file: prefill and step are one profile here, with the step as what is usual."""
    limits, dims = limits_of(manifest), manifest.dimensions
    (encoder,) = encoder_profiles(encoder_inputs(dims), manifest, limits)
    prefill, step = decoder_profiles(static_decoder_inputs(dims), manifest, limits)
    smallest, _, largest = prefill.shapes["ids"]
    ids = {"ids": (smallest, step.shapes["ids"][1], largest)}
    return {ENCODER_FILE: encoder, DECODER_STATIC_FILE: Profile(prefill.shapes | ids, prefill.values)}


def tensorrt_options(
    profile: Profile, cache: Path, stream: int, options: BackendOptions, precision: str
) -> dict[str, str]:
    """Options of the TensorRT provider."""
    bounds = profile.shapes | profile.values
    switch = {f"trt_{precision}_enable": "True"} if precision in ("fp16", "bf16") else {}
    return {
        "device_id": str(options.device_id),
        "user_compute_stream": str(stream),
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(cache),
        "trt_layer_norm_fp32_fallback": "True",
        "trt_profile_min_shapes": _listed({name: smallest for name, (smallest, _, _) in bounds.items()}),
        "trt_profile_opt_shapes": _listed({name: usual for name, (_, usual, _) in bounds.items()}),
        "trt_profile_max_shapes": _listed({name: largest for name, (_, _, largest) in bounds.items()}),
        **switch,
    }


def _listed(shapes: Mapping[str, Sequence[int]]) -> str:
    """As the provider reads it: `ids:1x4x1,attended:64`."""
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
