"""An existing adapter at a smaller rank, with the smallest error that rank allows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from das_asr.runtime.lora_config import read_json
from das_asr.runtime.peft_checkpoint import LINEAGE_NAME
from das_asr.training.finetune.adapter_file import compress, read_factors, write_adapter
from das_asr.training.finetune.workspace import check_output, published

__all__ = ["CompressResult", "compress_adapter"]


@dataclass(frozen=True)
class CompressResult:
    """A compressed adapter."""

    output: Path
    rank_before: int
    rank: int
    errors: dict[str, float]  # module -> ||new - old|| / ||old|| of B A (Frobenius)

    @property
    def largest_error(self) -> float:
        """That of the module that lost most."""
        return max(self.errors.values())


def compress_adapter(adapter: Path, output: Path, rank: int) -> CompressResult:
    """Writes `adapter` at a smaller rank to `output`.

    Raises:
        AdapterError: the adapter is broken or no plain LoRA.
        OptionError: the rank is not smaller.
        TrainingError: the output exists.
    """
    check_output(output)
    factors, config = read_factors(adapter)
    smaller, errors = compress(factors, rank)
    lineage = read_json(adapter / LINEAGE_NAME) if (adapter / LINEAGE_NAME).is_file() else {}
    lineage["compression"] = {"rank": rank, "largest_error": max(errors.values()), "errors": errors}
    with published(output) as folder:
        write_adapter(folder, smaller, json.loads(json.dumps(config)), lineage)
    return CompressResult(output, factors.rank, rank, errors)
