"""PEFT LoRA checkpoint -> `Adapter`, with numpy alone. A checkpoint is read completely or refused."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from das_asr.runtime.adapters import PROJECTIONS, Adapter, check_names, largest_rank, modules_of
from das_asr.runtime.errors import AdapterError
from das_asr.runtime.lora_config import CONFIG_NAME, Scaling, read_config, read_json
from das_asr.runtime.manifest import Dimensions
from das_asr.runtime.tensor_file import Array, TensorFile

__all__ = ["BASE_SHA256_KEY", "LINEAGE_NAME", "SUPPORTED_MODULES", "AdapterWarning", "read_adapter"]

SUPPORTED_MODULES = r"model\.decoder\.layers\.\d+\.(self_attn|encoder_attn)\.(q_proj|v_proj)"
"""What to pass to PEFT as `target_modules` to train an adapter that can be used here."""

LINEAGE_NAME = "das_lineage.json"
"""Optional file beside the adapter: a JSON object of provenance, whose `base_sha256` is checked against the base."""

BASE_SHA256_KEY = "das_base_sha256"
"""Optional key of the safetensors metadata, with the same meaning as `base_sha256` in the lineage file."""

_WEIGHTS = "adapter_model.safetensors"
_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>(?:model\.)?decoder\.layers\.(?P<layer>\d+)\."
    r"(?P<projection>(?:self_attn|encoder_attn)\.(?:q_proj|v_proj)))\.lora_(?P<part>[AB])\.weight"
)
_OTHER_MODULE = re.compile(r"(?:base_model\.model\.)?(?P<module>(?:model\.)?(?P<side>encoder|decoder)\..+?)\.lora_.+")

# ||B A|| / (||A|| ||B||) of an adapter that was trained at all is far above this; rounding alone is far below.
_NO_EFFECT = 1e-6


class AdapterWarning(UserWarning):
    """An adapter may not belong to this base; it is used all the same."""


def read_adapter(
    directory: str | Path, name: str, dims: Dimensions, base_sha256: str | None = None, base_id: str | None = None
) -> Adapter:
    """Reads a PEFT LoRA checkpoint: `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        directory: the folder that PEFT's `save_pretrained` wrote.
        name: what to call the adapter.
        dims: sizes of the base it has to fit.
        base_sha256: hash of the base's weights; an adapter that records another one is refused.
        base_id: name of the base; an adapter that records another one only warns, for folders are renamed freely.

    Raises:
        AdapterError: a file is missing or damaged, something in it is not supported, or it is for another base.
        OptionError: `name` cannot be used.

    Warns:
        AdapterWarning: it says it was trained on a base of another name.
    """
    check_names([name])
    directory = Path(directory)
    config = read_config(directory)
    file = _open_weights(directory)
    lineage = _read_lineage(directory, file)
    base_model = config.get("base_model_name_or_path") or None
    if not _same_base(lineage, base_sha256, directory):
        _compare_names(base_model, base_id, directory)
    scaling = Scaling.of(config, directory)
    weights = dict(_read_modules(file, scaling, dims))
    _check_effect(weights, directory)
    return Adapter(
        name=name,
        rank=largest_rank(weights),
        scale=scaling.general,
        target_modules=modules_of(weights),
        base_model=base_model,
        weights=weights,
        lineage=lineage,
    )


def _open_weights(directory: Path) -> TensorFile:
    path = directory / _WEIGHTS
    if path.is_file():
        return TensorFile.open(path, AdapterError, "Save or copy the adapter again.")
    if (directory / "adapter_model.bin").is_file():
        raise AdapterError(
            f"{directory} has only adapter_model.bin, which is a pickle and can run code. Load it with PEFT and save "
            "it again with safe_serialization=True."
        )
    raise AdapterError(f"{directory} has no {_WEIGHTS}. Give the folder that `save_pretrained` wrote.")


def _read_lineage(directory: Path, file: TensorFile) -> dict[str, str]:
    path = directory / LINEAGE_NAME
    stored = read_json(path) if path.is_file() else {}
    lineage = {key: value if isinstance(value, str) else json.dumps(value) for key, value in stored.items()}
    recorded = file.metadata.get(BASE_SHA256_KEY)
    if recorded and lineage.setdefault("base_sha256", recorded) != recorded:
        raise AdapterError(
            f"{directory}: {LINEAGE_NAME} and {_WEIGHTS} record different bases ({lineage['base_sha256']}, "
            f"{recorded}). The files do not belong together; copy the adapter again."
        )
    return lineage


def _same_base(lineage: Mapping[str, str], base_sha256: str | None, directory: Path) -> bool:
    """Whether the recorded hash proves the base; False when there is nothing to compare."""
    recorded = lineage.get("base_sha256")
    if recorded is None or base_sha256 is None:
        return False
    if recorded.lower() != base_sha256.lower():
        raise AdapterError(
            f"{directory} was trained on a base with sha256 {recorded}, this base has {base_sha256}. Use the base it "
            "was trained on, or train it again on this one."
        )
    return True


def _short_name(base: str) -> str:
    """Last component of a path or hub id; inside the hub's cache, the name of the repository."""
    parts = [part for part in re.split(r"[/\\]", base) if part]
    cached = [part for part in parts if part.startswith("models--")]
    return (cached[-1].split("--")[-1] if cached else parts[-1] if parts else "").lower()


def _compare_names(recorded: str | None, base_id: str | None, directory: Path) -> None:
    if recorded and base_id and _short_name(recorded) != _short_name(base_id):
        message = (
            f"{directory} says it was trained on {recorded!r}, the base is {base_id!r}. Check that they are the same."
        )
        warnings.warn(message, AdapterWarning, stacklevel=3)


def _read_modules(file: TensorFile, scaling: Scaling, dims: Dimensions) -> Iterator[tuple[str, Array]]:
    """Pairs of key and tensor for `Adapter.weights`, module by module."""
    modules = _group(file)
    if not modules:
        raise AdapterError(f"{file.path} holds no tensors. Save the adapter again after training.")
    for (layer, projection), parts in modules.items():
        module = parts["module"]
        if missing := sorted({"A", "B"} - parts.keys()):
            raise AdapterError(
                f"{file.path}: {module} has no lora_{missing[0]}. The file is incomplete; save it again."
            )
        _check_shapes(file, parts, layer, scaling, dims)
        scale = scaling.module(module)[1]
        key = PROJECTIONS[projection]
        yield f"lora_{key}_a{layer}", np.ascontiguousarray(file.read(parts["A"], AdapterError).T)
        with np.errstate(over="ignore"):  # checked below
            scaled = np.ascontiguousarray(
                (file.read(parts["B"], AdapterError).T * np.float64(scale)).astype(np.float32)
            )
        if not np.isfinite(scaled).all():
            raise AdapterError(f"{file.path}: {module} overflows float32 with its scale {scale}. Check lora_alpha.")
        yield f"lora_{key}_b{layer}", scaled


def _group(file: TensorFile) -> dict[tuple[int, str], dict[str, str]]:
    """Tensor names by (layer, projection): {"module": ..., "A": tensor name, "B": tensor name}."""
    modules: dict[tuple[int, str], dict[str, str]] = {}
    for name in file.entries:
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise AdapterError(_refusal(name, file.path))
        parts = modules.setdefault((int(match["layer"]), match["projection"]), {"module": match["module"]})
        if match["part"] in parts:
            raise AdapterError(f"{file.path}: {name} and {parts[match['part']]} are the same tensor. Save it again.")
        parts[match["part"]] = name
    return dict(sorted(modules.items()))


def _refusal(name: str, path: Path) -> str:
    remedy = f"Train it with target_modules=r'{SUPPORTED_MODULES}' (as one string, not in a list)."
    match = _OTHER_MODULE.fullmatch(name)
    if match is None:
        return f"{path}: tensor {name} is not understood; expected lora_A and lora_B of decoder projections. {remedy}"
    if match["side"] == "encoder":
        return f"{path}: {match['module']} is in the encoder, which all adapters share with the base. {remedy}"
    if match["module"].endswith(tuple(PROJECTIONS)):
        return f"{path}: tensor {name} is not understood; expected only lora_A.weight and lora_B.weight. {remedy}"
    return (
        f"{path}: {match['module']} is adapted, but only q_proj and v_proj of the decoder's attention can be. {remedy}"
    )


def _check_shapes(file: TensorFile, parts: Mapping[str, str], layer: int, scaling: Scaling, dims: Dimensions) -> None:
    a, b = file.entries[parts["A"]].shape, file.entries[parts["B"]].shape
    where = f"{file.path}: {parts['module']}"
    if layer >= dims.decoder_layers:
        raise AdapterError(
            f"{where} is in decoder layer {layer}, the base has {dims.decoder_layers} decoder layers (0 to "
            f"{dims.decoder_layers - 1}). Use the base it was trained on."
        )
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise AdapterError(
            f"{where}: lora_A {list(a)} and lora_B {list(b)} disagree in rank; expected [r, D] and [D, r]."
        )
    if a[1] != dims.d_model or b[0] != dims.d_model:
        raise AdapterError(
            f"{where} maps width {a[1]} to {b[0]}, the base has d_model {dims.d_model}. Use the base it was trained on."
        )
    if (rank := scaling.module(parts["module"])[0]) != a[0]:
        raise AdapterError(f"{where} has rank {a[0]}, {CONFIG_NAME} says {rank}. The two files do not belong together.")


def _check_effect(weights: Mapping[str, Array], where: Path) -> None:
    for key, a in weights.items():
        if "_a" in key and _relative_product(a, weights[key.replace("_a", "_b")]) > _NO_EFFECT:
            return
    raise AdapterError(f"{where} changes nothing: B A is zero in every module. It was not trained, or alpha is 0.")


def _relative_product(a: Array, b: Array) -> float:
    """||A B|| / (||A|| ||B||) by way of the r x r Gram matrices, without the D x D product; 0 for a zero factor."""
    gram_a = a.T.astype(np.float64) @ a
    gram_b = b.astype(np.float64) @ b.T
    size = float(np.trace(gram_a) * np.trace(gram_b))
    return math.sqrt(max(float((gram_a * gram_b).sum()), 0.0) / size) if size else 0.0
