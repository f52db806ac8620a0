"""Adapters as the graphs take them: one by one, kept in a bundle, and stacked.

`peft_checkpoint.read_adapter` makes an `Adapter` from a PEFT checkpoint, `save_adapter` and `load_adapter` keep it in a
bundle, `stack_adapters` makes of K adapters the tensors that `contract.lora_specs` describes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from das_asr.runtime.contract import lora_specs
from das_asr.runtime.errors import AdapterError, BundleError, OptionError
from das_asr.runtime.manifest import Dimensions
from das_asr.runtime.tensor_file import Array, TensorFile

__all__ = [
    "MAX_ADAPTERS",
    "PROJECTIONS",
    "Adapter",
    "Stack",
    "check_names",
    "largest_rank",
    "load_adapter",
    "modules_of",
    "read_stack",
    "rounded_tensors",
    "save_adapter",
    "select_rows",
    "stack_adapters",
]

MAX_ADAPTERS = 64

PROJECTIONS = {
    "self_attn.q_proj": "sq",
    "self_attn.v_proj": "sv",
    "encoder_attn.q_proj": "cq",
    "encoder_attn.v_proj": "cv",
}
"""The modules that an adapter may have, by their target in `contract`."""

_METADATA_KEY = "das_adapter"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Adapter:
    """One adapter, unstacked, with its scale folded into B.

    `weights` maps `lora_{sq,sv,cq,cv}_a{layer}` to A [D, r] and `..._b{layer}` to B [r, D], both float32, for the
    modules that the adapter has; r may differ from module to module.
    """

    name: str
    rank: int  # largest of its modules
    scale: float  # of a module without a pattern of its own: alpha / r, or alpha / sqrt(r) with rsLoRA
    target_modules: tuple[str, ...]  # e.g. "self_attn.q_proj"
    base_model: str | None  # what the checkpoint says it was trained on
    weights: Mapping[str, Array]
    lineage: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stack:
    """K adapters as the graphs take them: R = K + 1 rows, row 0 zeros (the base), row i adapter i.

    `tensors` has the names and shapes of `contract.lora_specs` for one group, [1, R, ...], contiguous float32, ranks
    padded with zeros to `rank`.
    """

    names: tuple[str, ...]
    rank: int
    tensors: Mapping[str, Array]

    @property
    def rows(self) -> int:
        """R = K + 1."""
        return len(self.names) + 1


def check_names(names: Sequence[str]) -> None:
    """Refuses names that cannot be file names, that repeat, or that would be confused with the base.

    Raises:
        OptionError: naming the first bad name.
    """
    if len(names) > MAX_ADAPTERS:
        raise OptionError(f"{len(names)} adapters were given, at most {MAX_ADAPTERS} fit one bundle. Give fewer.")
    seen: set[str] = set()
    for name in names:
        if not _NAME.fullmatch(name) or name.endswith(".") or name.lower() == "base":
            raise OptionError(
                f"{name!r} cannot name an adapter: use 1 to 64 letters, digits, '.', '_' or '-', starting with a "
                "letter or digit and not ending in '.'; 'base' means row 0."
            )
        if name.lower() in seen:  # file systems that ignore case would overwrite one with the other
            raise OptionError(f"Two adapters are named {name!r} (case is ignored). Give each a name of its own.")
        seen.add(name.lower())


def largest_rank(weights: Mapping[str, Array]) -> int:
    """Largest rank among the A tensors [D, r]."""
    return max(int(tensor.shape[1]) for key, tensor in weights.items() if "_a" in key)


def modules_of(weights: Mapping[str, Array]) -> tuple[str, ...]:
    """Names of the modules that `weights` adapts, in the order of `PROJECTIONS`."""
    return tuple(
        module for module, key in PROJECTIONS.items() if any(name.startswith(f"lora_{key}_") for name in weights)
    )


# --- The bundle's own form ---


def save_adapter(adapter: Adapter, path: Path) -> None:
    """Writes `adapters/<name>.safetensors`: the weights as they are, the rest as JSON in the metadata."""
    about = {
        "rank": adapter.rank,
        "scale": adapter.scale,
        "target_modules": list(adapter.target_modules),
        "base_model": adapter.base_model,
        "lineage": adapter.lineage,
    }
    # One key only: safetensors writes several in no fixed order, and the file's hash must not vary.
    save_file(dict(adapter.weights), path, metadata={_METADATA_KEY: json.dumps(about, sort_keys=True)})


def load_adapter(path: Path, name: str, dims: Dimensions) -> Adapter:
    """Reads what `save_adapter` wrote.

    Raises:
        BundleError: the file is missing or damaged, or does not fit `dims`.
    """
    hint = "Copy or export the bundle again."
    file = TensorFile.open(path, BundleError, hint)
    weights = {key: file.read(key, BundleError) for key in file.entries}
    if problem := _misfit(weights, dims):
        raise BundleError(f"{path}: {problem}. {hint}")
    try:
        about = json.loads(file.metadata[_METADATA_KEY])
        about["target_modules"] = tuple(about["target_modules"])
        adapter = Adapter(name=name, weights=weights, **about)
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path} lacks the description of an adapter ({error!r}). {hint}") from error
    if not _describes(adapter):
        raise BundleError(f"{path}: its description does not fit its tensors. {hint}")
    return adapter


def _describes(adapter: Adapter) -> bool:
    """Whether what an adapter says about itself has the right types and fits its weights."""
    return (
        adapter.rank == largest_rank(adapter.weights)
        and adapter.target_modules == modules_of(adapter.weights)
        and isinstance(adapter.scale, float)
        and isinstance(adapter.base_model, str | None)
        and isinstance(adapter.lineage, dict)
        and all(isinstance(value, str) for value in adapter.lineage.values())
    )


def _misfit(weights: Mapping[str, Array], dims: Dimensions) -> str | None:
    """Says what keeps weights from being those of an adapter for `dims`, or None."""
    keys = {spec.name for spec in lora_specs(dims)}
    if not weights:
        return "it holds no tensors"
    for key, tensor in weights.items():
        if key not in keys:
            return f"tensor {key} does not exist in a base with {dims.decoder_layers} decoder layers"
        is_a = "_a" in key
        partner = weights.get(key.replace("_a", "_b") if is_a else key.replace("_b", "_a"))
        if partner is None or partner.shape != tensor.shape[::-1]:
            return f"tensor {key} {list(tensor.shape)} has no counterpart of the same rank"
        if tensor.ndim != 2 or not tensor.size or tensor.shape[0 if is_a else 1] != dims.d_model:
            return f"tensor {key} has shape {list(tensor.shape)}, the base has d_model {dims.d_model}"
    return None


# --- The stack ---


def stack_adapters(adapters: Sequence[Adapter], dims: Dimensions) -> Stack:
    """Makes the tensors of the graphs from K adapters; without any, a stack of the base alone with rank 1.

    Raises:
        AdapterError: an adapter does not fit `dims`.
        OptionError: names repeat or cannot be used, or there are too many.
    """
    names = tuple(adapter.name for adapter in adapters)
    check_names(names)
    for adapter in adapters:
        if problem := _misfit(adapter.weights, dims):
            raise AdapterError(f"Adapter {adapter.name!r}: {problem}. Use an adapter that was trained on this base.")
    rank = max((adapter.rank for adapter in adapters), default=1)
    sizes = {"groups": 1, "rows": len(adapters) + 1, "rank": rank}
    tensors = {
        spec.name: np.zeros([sizes[size] if isinstance(size, str) else size for size in spec.shape], np.float32)
        for spec in lora_specs(dims)
    }
    for row, adapter in enumerate(adapters, start=1):
        for key, weight in adapter.weights.items():
            _place(tensors[key][0, row], key, weight)
    return Stack(names, rank, tensors)


def _place(row: Array, key: str, weight: Array) -> None:
    """Writes one adapter's A [D, r] or B [r, D] into its zeroed row of the stack, which may have a larger rank."""
    if "_a" in key:
        row[:, : weight.shape[1]] = weight
    elif key.startswith("lora_cv_"):
        heads, _, size = row.shape  # [H, r, d]
        row[:, : weight.shape[0]] = weight.reshape(-1, heads, size).transpose(1, 0, 2)
    else:
        row[: weight.shape[0]] = weight


def read_stack(directory: Path, names: Sequence[str], dims: Dimensions) -> Stack:
    """Adapters of a bundle, by name, stacked.

    Raises:
        BundleError: a file is missing or damaged, or does not fit `dims`.
    """
    paths = {name: directory / "adapters" / f"{name}.safetensors" for name in names}
    return stack_adapters([load_adapter(path, name, dims) for name, path in paths.items()], dims)


def select_rows(stack: Stack, names: Iterable[str]) -> Stack:
    """A stack of only the named adapters, in the given order; the rank stays.

    Raises:
        OptionError: a name that the stack does not have, or one given twice.
    """
    names = tuple(names)
    check_names(names)
    if unknown := [name for name in names if name not in stack.names]:
        raise OptionError(f"There is no adapter {unknown[0]!r}; the bundle has: {', '.join(stack.names) or 'none'}.")
    rows = [0, *(stack.names.index(name) + 1 for name in names)]
    return Stack(
        names, stack.rank, {key: np.ascontiguousarray(tensor[:, rows]) for key, tensor in stack.tensors.items()}
    )


def rounded_tensors(stack: Stack, dtype: np.dtype[Any]) -> dict[str, NDArray[Any]]:
    """The tensors of a stack as graphs of that precision take them; float32 ones are not copied.

    Raises:
        AdapterError: an adapter has values beyond the range of `dtype`.
    """
    with np.errstate(over="ignore"):
        tensors = {key: tensor.astype(dtype, copy=False) for key, tensor in stack.tensors.items()}
    for row, name in enumerate(stack.names, start=1):
        for key, tensor in tensors.items():
            if not np.isfinite(tensor[:, row]).all():
                largest = np.abs(stack.tensors[key][:, row]).max()
                raise AdapterError(
                    f"Adapter {name!r}: {key} has values up to {largest:.3g}, beyond the range of {dtype.name}. Load "
                    "the bundle in another precision, such as precision='fp32'."
                )
    return tensors
