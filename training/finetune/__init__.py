"""Fine-tuning of a Whisper on one or several domains: LoRA or full, on transformers' trainer and PEFT.

from das_asr.training.finetune import DataOptions, LoraOptions, TrainOptions, train_lora
"""

from das_asr.training.finetune.compress import CompressResult, compress_adapter
from das_asr.training.finetune.full import FullOptions, FullResult, train_full
from das_asr.training.finetune.lora import LoraOptions, LoraResult, train_lora
from das_asr.training.finetune.options import DataOptions, TrainOptions
from das_asr.training.finetune.recipes import RECIPES, Recipe
from das_asr.training.finetune.trainer import Trained

__all__ = [
    "RECIPES",
    "CompressResult",
    "DataOptions",
    "FullOptions",
    "FullResult",
    "LoraOptions",
    "LoraResult",
    "Recipe",
    "TrainOptions",
    "Trained",
    "compress_adapter",
    "train_full",
    "train_lora",
]
