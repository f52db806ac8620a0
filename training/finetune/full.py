"""Full fine-tuning of a base's decoder, of its last layers, or of the whole network (DAS paper, Table II).

    options = FullOptions(
        base="openai/whisper-base",
        output=Path("music-full"),
        components="decoder-last-2",
        data=DataOptions(sources=(Path("synthetic/music"),), language="en"),
        train=TrainOptions(learning_rate=3e-6),
    )
    result = train_full(options)

The result is an ordinary Whisper checkpoint, a base like any other.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from das_asr.export.checkpoint import FRONT_END_FILES, TOKENIZER_FILES
from das_asr.runtime.errors import OptionError, TrainingError
from das_asr.runtime.peft_checkpoint import LINEAGE_NAME
from das_asr.training.finetune.base import Base, load_base
from das_asr.training.finetune.dataset import prepare_data
from das_asr.training.finetune.lineage import lineage_of, run_of
from das_asr.training.finetune.options import DataOptions, TrainOptions
from das_asr.training.finetune.processes import is_main_process
from das_asr.training.finetune.trainer import Trained, configure_torch, run_training
from das_asr.training.finetune.workspace import check_output, open_work, published

__all__ = ["SAVE_DTYPES", "FullOptions", "FullResult", "train_full"]

SAVE_DTYPES = ("float32", "float16")

_COMPONENTS = re.compile(r"decoder|encoder-decoder|decoder-last-(?P<layers>[1-9]\d*)")
_COPIED = (*TOKENIZER_FILES, *FRONT_END_FILES, "generation_config.json")
_TIED = "proj_out.weight"  # the token embedding once more


@dataclass(frozen=True, kw_only=True)
class FullOptions:
    """Options of `train_full`.

    Attributes:
        base: folder of a Hugging Face Whisper checkpoint, or a hub id.
        output: the checkpoint to write; must not exist.
        data: what to train on.
        train: how.
        revision: branch, tag or commit of a hub id.
        components: "decoder" (embeddings included), "decoder-last-N" (the last N layers alone) or "encoder-decoder".
        save_dtype: of the saved weights; training is in float32.
        restart: throw away an unfinished run that would be continued.
    """

    base: str
    output: Path
    data: DataOptions
    train: TrainOptions
    revision: str | None = None
    components: str = "decoder"
    save_dtype: str = "float32"
    restart: bool = False

    def __post_init__(self) -> None:
        if not _COMPONENTS.fullmatch(self.components):
            raise OptionError(
                f"--components is {self.components!r}, expected decoder, encoder-decoder, or decoder-last-N with N at "
                "least 1."
            )
        if self.save_dtype not in SAVE_DTYPES:
            raise OptionError(f"--save-dtype is {self.save_dtype!r}, expected {' or '.join(SAVE_DTYPES)}.")
        if self.train.eval_wer and not self.data.eval_sources:
            raise OptionError("--eval-wer measures on a development set, but no --eval-data was given.")

    @property
    def last_layers(self) -> int | None:
        """N of "decoder-last-N"."""
        match = _COMPONENTS.fullmatch(self.components)
        return int(match["layers"]) if match and match["layers"] else None


@dataclass(frozen=True)
class FullResult:
    """A fine-tuned base."""

    output: Path
    parameters: int  # trained
    utterances: int
    skipped: int
    trained: Trained


def train_full(options: FullOptions) -> FullResult:
    """Fine-tunes a base and writes it; goes on where a killed run with the same options stopped.

    Raises:
        CheckpointError: the base is broken.
        DataError: the data is broken.
        OptionError: options contradict the base.
        TrainingError: the output exists, another run is unfinished there, training diverged, or float16 cannot hold
            the weights.
    """
    check_output(options.output)
    base = load_base(options.base, options.revision)
    _check_layers(options, base)
    device = configure_torch(options.train)
    model = base.load_model().to(device)
    frozen_encoder = options.components != "encoder-decoder"
    data = prepare_data(base, options.data, model=model, encoder_states=frozen_encoder)
    kind = {"components": options.components}
    work = open_work(options.output, run_of(base, data, options.train, what="full", **kind), restart=options.restart)
    parameters = _freeze(model, options)
    trained = run_training(model, data, options.train, work=work, base=base)
    lineage = lineage_of(base, options.data, data, options.train, trained, save_dtype=options.save_dtype, **kind)
    if is_main_process():
        with published(options.output) as folder:
            _save(folder, model, base, options.save_dtype)
            (folder / LINEAGE_NAME).write_text(json.dumps(lineage, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        shutil.rmtree(work)
    return FullResult(options.output, parameters, len(data.train), data.skipped, trained)


def _check_layers(options: FullOptions, base: Base) -> None:
    layers = base.dimensions.decoder_layers
    if options.last_layers is not None and options.last_layers > layers:
        raise OptionError(
            f"--components {options.components}: the decoder of {options.base} has {layers} layers. Give "
            f"decoder-last-{layers} or less, or decoder."
        )


def _freeze(model: Any, options: FullOptions) -> int:
    """Leaves gradients to what is trained; returns how many parameters that is."""
    encoder = model.model.encoder
    if options.components == "encoder-decoder":
        encoder.embed_positions.requires_grad_(False)  # sinusoids; loading a checkpoint forgets that they are fixed
    else:
        encoder.requires_grad_(False)
    if options.last_layers is not None:
        model.model.decoder.requires_grad_(False)
        model.model.decoder.layers[-options.last_layers :].requires_grad_(True)
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def _save(folder: Path, model: Any, base: Base, dtype: str) -> None:
    """Writes weights and configuration, and copies what training does not change."""
    import torch
    from safetensors.torch import save_file

    wanted = getattr(torch, dtype)
    weights = {
        name: weight.detach().to("cpu", wanted).contiguous()
        for name, weight in model.state_dict().items()
        if name != _TIED
    }
    if overflowing := [name for name, weight in weights.items() if not torch.isfinite(weight).all()]:
        raise TrainingError(f"{overflowing[0]} holds values that {dtype} cannot. Give --save-dtype float32.")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**base.config, "dtype": dtype, "architectures": ["WhisperForConditionalGeneration"]}
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name in _COPIED:
        if (base.directory / name).is_file():
            shutil.copyfile(base.directory / name, folder / name)
