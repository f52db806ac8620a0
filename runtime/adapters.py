"""LoRA checkpoints of PEFT -> the adapter tensors of the graphs, with numpy alone.

`read_adapter` reads one PEFT checkpoint, `save_adapter` and `load_adapter` keep it in a bundle, `stack_adapters` makes
of K adapters the tensors that `contract.lora_specs` describes. A checkpoint is read completely or refused: a tensor or
a configuration field that is not understood is an error, because ignoring it would change what the adapter writes.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from das_asr.runtime.contract import lora_specs
from das_asr.runtime.errors import AdapterError, BundleError, DasError, OptionError
from das_asr.runtime.manifest import Dimensions

__all__ = [
    "BASE_SHA256_KEY",
    "LINEAGE_NAME",
    "MAX_ADAPTERS",
    "SUPPORTED_MODULES",
    "Adapter",
    "AdapterWarning",
    "Stack",
    "TensorEntry",
    "TensorFile",
    "check_names",
    "load_adapter",
    "read_adapter",
    "save_adapter",
    "select_rows",
    "stack_adapters",
]

Array = npt.NDArray[np.float32]
T = TypeVar("T")

MAX_ADAPTERS = 64
SUPPORTED_MODULES = r"model\.decoder\.layers\.\d+\.(self_attn|encoder_attn)\.(q_proj|v_proj)"
"""What to pass to PEFT as `target_modules` to train an adapter that can be used here."""

LINEAGE_NAME = "das_lineage.json"
"""Optional file beside the adapter: a JSON object of provenance, whose `base_sha256` is checked against the base."""

BASE_SHA256_KEY = "das_base_sha256"
"""Optional key of the safetensors metadata, with the same meaning as `base_sha256` in the lineage file."""

_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_CHUNK = 1 << 22
_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_METADATA_KEY = "das_adapter"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>(?:model\.)?decoder\.layers\.(?P<layer>\d+)\."
    r"(?P<projection>(?:self_attn|encoder_attn)\.(?:q_proj|v_proj)))\.lora_(?P<part>[AB])\.weight"
)
_OTHER_MODULE = re.compile(r"(?:base_model\.model\.)?(?P<module>(?:model\.)?(?P<side>encoder|decoder)\..+?)\.lora_.+")
_PROJECTIONS = {
    "self_attn.q_proj": "sq",
    "self_attn.v_proj": "sv",
    "encoder_attn.q_proj": "cq",
    "encoder_attn.v_proj": "cv",
}

# Every field of PEFT's LoraConfig is in one of these three tables; a field in none of them must be unset.
_INTERPRETED = frozenset(
    {
        "alpha_pattern",
        "base_model_name_or_path",
        "init_lora_weights",
        "lora_alpha",
        "peft_type",
        "r",
        "rank_pattern",
        "use_rslora",
    }
)
# Only the training, the place of the tensors (the file itself tells it) or a feature whose own switch is refused below.
_IRRELEVANT = frozenset(
    {
        "auto_mapping",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    }
)
_REFUSED = {
    "alora_invocation_tokens": "activated LoRA switches the adapter on in the middle of a text",
    "arrow_config": "Arrow routes between several adapters",
    "bias": "it trains biases, which belong to the base",
    "fan_in_fan_out": "Whisper's projections are not stored transposed",
    "kasa_config": "KaSA puts a diagonal between A and B and truncates the base",
    "layer_replication": "it repeats layers of the base",
    "lora_bias": "it adds a bias to B",
    "megatron_config": "Megatron layers are not Whisper's",
    "modules_to_save": "it stores whole modules that replace those of the base",
    "monteclora_config": "MonteCLoRA samples its weights",
    "target_parameters": "it adapts parameters that are not projections",
    "trainable_token_indices": "it changes token embeddings, which belong to the base",
    "use_bdlora": "block-diagonal factors have another layout",
    "use_dora": "DoRA rescales the weights of the base",
    "use_qalora": "QALoRA pools the input of A",
    "velora_config": "VeLoRA stores tensors of its own",
}
# These leave the weights of the base as they are; so do the booleans. The others below subtract from them.
_HARMLESS_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
_CONVERTIBLE_INITS = ("pissa", "olora", "corda", "lora_ga")

# ||B A|| / (||A|| ||B||) of an adapter that was trained at all is far above this; rounding alone is far below.
_NO_EFFECT = 1e-6


class AdapterWarning(UserWarning):
    """An adapter may not belong to this base; it is used all the same."""


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in its file, and what it is."""

    dtype: str  # as safetensors spells it: F32, F16, BF16, ...
    shape: tuple[int, ...]
    start: int  # offset of its first byte in the file
    size: int  # bytes


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose tensors are read one by one, as float32."""

    path: Path
    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, path: Path, error: type[DasError], hint: str) -> TensorFile:
        """Reads the header.

        Raises:
            error: the file cannot be read, is truncated or is not safetensors; the message ends with `hint`.
        """
        try:
            with safe_open(path, framework="np"):  # checks every offset against the length of the file
                pass
            with path.open("rb") as handle:
                length = int.from_bytes(handle.read(8), "little")
                header = json.loads(handle.read(length))
        except (OSError, SafetensorError) as cause:
            raise error(f"{path} cannot be read as safetensors ({cause}). {hint}") from cause
        metadata = header.pop("__metadata__", {})
        entries = {}
        for name, item in header.items():
            first, last = item["data_offsets"]
            entries[name] = TensorEntry(item["dtype"], tuple(item["shape"]), 8 + length + first, last - first)
        return cls(path, entries, metadata)

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of one tensor as stored, a few megabytes at a time."""
        with self.path.open("rb") as handle:
            handle.seek(self.entries[name].start)
            left = self.entries[name].size
            while left:
                chunk = handle.read(min(left, _CHUNK))
                if not chunk:
                    raise EOFError(f"{self.path} became shorter while it was read")
                left -= len(chunk)
                yield chunk

    def read(self, name: str, error: type[DasError]) -> Array:
        """One tensor as float32, contiguous and writable; fp16 and bf16 are widened.

        Raises:
            error: its dtype is not a floating-point type that float32 can hold, or it holds NaN or infinity.
        """
        entry = self.entries[name]
        stored = _DTYPES.get(entry.dtype)
        if stored is None:
            raise error(
                f"{self.path}: {name} has dtype {entry.dtype}, expected F32, F16 or BF16. Save it in one of these."
            )
        raw = np.fromfile(self.path, dtype=stored, count=math.prod(entry.shape), offset=entry.start)
        # bfloat16 is the upper half of float32; numpy has no such type.
        values = (raw.astype(np.uint32) << 16).view(np.float32) if entry.dtype == "BF16" else raw.astype(np.float32)
        if not np.isfinite(values).all():
            raise error(f"{self.path}: {name} holds NaN or infinity. The training diverged or the file is damaged.")
        return values.reshape(entry.shape)


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

    `tensors` has the names and shapes of `contract.lora_specs`, contiguous float32, ranks padded with zeros to `rank`.
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


# --- Reading a PEFT checkpoint ---


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
    config = _read_config(directory)
    _check_fields(config, directory)
    _check_init(config.get("init_lora_weights", True), directory)
    file = _open_weights(directory)
    lineage = _read_lineage(directory, file)
    base_model = config.get("base_model_name_or_path") or None
    if not _same_base(lineage, base_sha256, directory):
        _compare_names(base_model, base_id, directory)
    scaling = _Scaling.of(config, directory)
    weights = dict(_read_modules(file, scaling, dims))
    _check_effect(weights, directory)
    return Adapter(
        name=name,
        rank=_largest_rank(weights),
        scale=scaling.general,
        target_modules=_modules_of(weights),
        base_model=base_model,
        weights=weights,
        lineage=lineage,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read as JSON ({error}). Save the adapter again.") from error
    if not isinstance(data, dict):
        raise AdapterError(f"{path} holds a {type(data).__name__}, expected a JSON object. Save the adapter again.")
    return data


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / _CONFIG
    if not path.is_file():
        raise AdapterError(
            f"{directory} is not a PEFT adapter: it has no {_CONFIG}. Give the folder that `save_pretrained` wrote."
        )
    return _read_json(path)


def _check_fields(config: Mapping[str, Any], directory: Path) -> None:
    if (kind := config.get("peft_type")) != "LORA":
        raise AdapterError(f"{directory} is a PEFT adapter of type {kind!r}, expected 'LORA'. Train a LoRA instead.")
    for name, value in config.items():
        if name in _INTERPRETED or name in _IRRELEVANT or not value or (name == "bias" and value == "none"):
            continue
        if reason := _REFUSED.get(name):
            raise AdapterError(f"{directory}: {name}={value!r} is not supported: {reason}. Train without {name}.")
        raise AdapterError(
            f"{directory}: {_CONFIG} sets {name}={value!r}, which is not known here and may change what the adapter "
            "computes. Train without it, or update das-asr."
        )


def _check_init(init: object, directory: Path) -> None:
    if init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in _HARMLESS_INITS):
        return
    if isinstance(init, str) and init.lower().startswith(_CONVERTIBLE_INITS):
        remedy = (
            "Convert it to a plain LoRA: save the freshly initialised adapter before training, and after training call "
            "`save_pretrained(..., path_initial_model_for_weight_conversion=<that folder>)`."
        )
    else:
        remedy = "Train it with init_lora_weights=True."
    raise AdapterError(
        f"{directory}: init_lora_weights={init!r} is not one of those that leave the base as it is (True, False, "
        f"{', '.join(sorted(_HARMLESS_INITS))}), so the adapter does not fit the original base. {remedy}"
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
    stored = _read_json(path) if path.is_file() else {}
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


@dataclass(frozen=True)
class _Scaling:
    """How a configuration gives each module its rank and scale."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    directory: Path

    @classmethod
    def of(cls, config: Mapping[str, Any], directory: Path) -> _Scaling:
        ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
        rank, alpha = config.get("r"), config.get("lora_alpha")
        for name, value in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
            if not isinstance(value, dict):
                raise AdapterError(f"{directory}: {name}={value!r} must map module names to numbers.")
        for value in (rank, *ranks.values()):
            if type(value) is not int or value < 1:
                raise AdapterError(f"{directory}: rank {value!r} in {_CONFIG} must be an integer of at least 1.")
        for value in (alpha, *alphas.values()):
            if type(value) not in (int, float) or not -1e30 < value < 1e30:
                raise AdapterError(f"{directory}: lora_alpha {value!r} in {_CONFIG} must be a number within 1e30.")
        return cls(rank, alpha, ranks, alphas, bool(config.get("use_rslora")), directory)  # type: ignore[arg-type]

    @property
    def general(self) -> float:
        return self._scale(self.alpha, self.rank)

    def module(self, name: str) -> tuple[int, float]:
        """Rank and scale of a module, e.g. `model.decoder.layers.0.self_attn.q_proj`."""
        rank = self._match(self.rank_pattern, name, self.rank)
        return rank, self._scale(self._match(self.alpha_pattern, name, self.alpha), rank)

    def _scale(self, alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def _match(self, patterns: Mapping[str, T], name: str, default: T) -> T:
        """The first pattern that matches the end of the name at a dot, as PEFT looks it up."""
        for pattern, value in patterns.items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", name):
                    return value
            except re.error as error:
                raise AdapterError(f"{self.directory}: {pattern!r} is not a valid pattern ({error}).") from error
        return default


def _read_modules(file: TensorFile, scaling: _Scaling, dims: Dimensions) -> Iterator[tuple[str, Array]]:
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
        key = _PROJECTIONS[projection]
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
    if match["module"].endswith(tuple(_PROJECTIONS)):
        return f"{path}: tensor {name} is not understood; expected only lora_A.weight and lora_B.weight. {remedy}"
    return (
        f"{path}: {match['module']} is adapted, but only q_proj and v_proj of the decoder's attention can be. {remedy}"
    )


def _check_shapes(file: TensorFile, parts: Mapping[str, str], layer: int, scaling: _Scaling, dims: Dimensions) -> None:
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
        raise AdapterError(f"{where} has rank {a[0]}, {_CONFIG} says {rank}. The two files do not belong together.")


def _largest_rank(weights: Mapping[str, Array]) -> int:
    return max(int(tensor.shape[1]) for key, tensor in weights.items() if "_a" in key)


def _modules_of(weights: Mapping[str, Array]) -> tuple[str, ...]:
    return tuple(
        module for module, key in _PROJECTIONS.items() if any(name.startswith(f"lora_{key}_") for name in weights)
    )


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
        adapter.rank == _largest_rank(adapter.weights)
        and adapter.target_modules == _modules_of(adapter.weights)
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
    sizes = {"rows": len(adapters) + 1, "rank": rank}
    tensors = {
        spec.name: np.zeros([sizes[size] if isinstance(size, str) else size for size in spec.shape], np.float32)
        for spec in lora_specs(dims)
    }
    for row, adapter in enumerate(adapters, start=1):
        for key, weight in adapter.weights.items():
            _place(tensors[key][row], key, weight)
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
    return Stack(names, stack.rank, {key: np.ascontiguousarray(tensor[rows]) for key, tensor in stack.tensors.items()})
