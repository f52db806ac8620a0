"""The base to train: the checkpoint as export reads it, with its tokenizer and its network.

base = load_base("openai/whisper-base")
model = base.load_model()      # WhisperForConditionalGeneration in float32
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from das_asr.export.checkpoint import Checkpoint, load_checkpoint, tokenizer_json
from das_asr.runtime.tokenizer import Tokenizer, special_tokens

__all__ = ["Base", "load_base"]


@dataclass(frozen=True)
class Base(Checkpoint):
    """A Whisper checkpoint that can be trained, and exported afterwards."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Text to ids and back, with the ids of the special tokens (`special`)."""
        text = tokenizer_json(self)
        with tempfile.NamedTemporaryFile("w", suffix="-tokenizer.json", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            special = special_tokens(file.name, self.generation_config, self.config)
        return Tokenizer(json.loads(text), special)

    def load_model(self) -> Any:
        """The `WhisperForConditionalGeneration` in float32, in training form: eager attention, no cache.

        On a CPU the backward pass of eager attention takes half the time of `scaled_dot_product_attention`'s.
        """
        import torch
        from transformers import WhisperForConditionalGeneration

        from das_asr.training.finetune.noise import quiet_libraries

        with quiet_libraries():
            model = WhisperForConditionalGeneration.from_pretrained(
                self.directory, dtype=torch.float32, attn_implementation="eager", local_files_only=True
            )
        model.config.use_cache = False
        return model


def load_base(id_or_dir: str | Path, revision: str | None = None) -> Base:
    """Opens a base and checks it, its tokenizer included; no weight is read yet.

    Args:
        id_or_dir: a Hugging Face folder, or else a hub id, which is downloaded or taken from the local cache.
        revision: branch, tag or commit of a hub id.

    Raises:
        CheckpointError: it cannot be found, is incomplete, or is no Whisper that can be exported once it is trained.
    """
    base = Base(**vars(load_checkpoint(id_or_dir, revision)))
    _ = base.tokenizer
    return base
