"""Presets of hyper-parameters.

paper   DAS (arXiv 2501.12501): rank 32, alpha 64, rsLoRA, PiSSA, AdamW, 3e-6, 10 epochs, batches of 16
tiny    the same for a Whisper of a few million parameters, which wants larger steps
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RECIPES", "Recipe"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One preset; every number can be overridden."""

    learning_rate: float  # of a LoRA
    full_learning_rate: float  # of full fine-tuning
    epochs: int = 10
    batch_size: int = 16
    warmup: float = 0.1
    rank: int = 32
    alpha: float = 64.0
    rslora: bool = True
    init: str = "pissa"
    dropout: float = 0.0


RECIPES = {
    "paper": Recipe(learning_rate=3e-6, full_learning_rate=3e-6),
    "tiny": Recipe(learning_rate=2e-4, full_learning_rate=4e-5),
}
