"""PEFT's `adapter_config.json`: which fields mean what, and the rank and scale they give each module.

Fields go through an allow-list. A field that is set and not understood is an error, because ignoring it would change
what the adapter writes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from das_asr.runtime.errors import AdapterError

__all__ = ["CONFIG_NAME", "Scaling", "read_config", "read_json"]

T = TypeVar("T")

CONFIG_NAME = "adapter_config.json"

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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        AdapterError: the file cannot be read or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read as JSON ({error}). Save the adapter again.") from error
    if not isinstance(data, dict):
        raise AdapterError(f"{path} holds a {type(data).__name__}, expected a JSON object. Save the adapter again.")
    return data


def read_config(directory: Path) -> dict[str, Any]:
    """Reads and checks a LoRA's configuration.

    Raises:
        AdapterError: it is missing, broken, of another method, or sets a field that is not supported.
    """
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise AdapterError(
            f"{directory} is not a PEFT adapter: it has no {CONFIG_NAME}. Give the folder that `save_pretrained` wrote."
        )
    config = read_json(path)
    _check_fields(config, directory)
    _check_init(config.get("init_lora_weights", True), directory)
    return config


def _check_fields(config: Mapping[str, Any], directory: Path) -> None:
    if (kind := config.get("peft_type")) != "LORA":
        raise AdapterError(f"{directory} is a PEFT adapter of type {kind!r}, expected 'LORA'. Train a LoRA instead.")
    for name, value in config.items():
        if name in _INTERPRETED or name in _IRRELEVANT or not value or (name == "bias" and value == "none"):
            continue
        if reason := _REFUSED.get(name):
            raise AdapterError(f"{directory}: {name}={value!r} is not supported: {reason}. Train without {name}.")
        raise AdapterError(
            f"{directory}: {CONFIG_NAME} sets {name}={value!r}, which is not known here and may change what the "
            "adapter computes. Train without it, or update das-asr."
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


@dataclass(frozen=True)
class Scaling:
    """How a configuration gives each module its rank and scale."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    directory: Path

    @classmethod
    def of(cls, config: Mapping[str, Any], directory: Path) -> Scaling:
        """Reads the fields.

        Raises:
            AdapterError: one of them is not what PEFT writes.
        """
        ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
        rank, alpha = config.get("r"), config.get("lora_alpha")
        for name, value in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
            if not isinstance(value, dict):
                raise AdapterError(f"{directory}: {name}={value!r} must map module names to numbers.")
        for value in (rank, *ranks.values()):
            if type(value) is not int or value < 1:
                raise AdapterError(f"{directory}: rank {value!r} in {CONFIG_NAME} must be an integer of at least 1.")
        for value in (alpha, *alphas.values()):
            if type(value) not in (int, float) or not -1e30 < value < 1e30:  # pyright: ignore
                raise AdapterError(f"{directory}: lora_alpha {value!r} in {CONFIG_NAME} must be a number within 1e30.")
        return cls(rank, alpha, ranks, alphas, bool(config.get("use_rslora")), directory)  # type: ignore[arg-type]

    @property
    def general(self) -> float:
        """Scale of a module without a pattern of its own."""
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
