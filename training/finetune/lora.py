"""One domain's adapter: LoRA on the decoder's query and value projections, saved as a plain PEFT checkpoint.

    options = LoraOptions(
        base="openai/whisper-base",
        output=Path("adapters/music"),
        data=DataOptions(sources=(Path("synthetic/music"),), language="en"),
        train=TrainOptions(learning_rate=3e-6),
    )
    result = train_lora(options)

The adapter always belongs to the original base, however it was initialised.
"""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from das_asr.runtime.errors import OptionError, TrainingError
from das_asr.runtime.peft_checkpoint import SUPPORTED_MODULES
from das_asr.training.finetune.adapter_file import compress, write_adapter
from das_asr.training.finetune.base import Base, load_base
from das_asr.training.finetune.dataset import TrainingData, prepare_data
from das_asr.training.finetune.lineage import lineage_of, run_of
from das_asr.training.finetune.noise import quiet_libraries
from das_asr.training.finetune.options import DataOptions, TrainOptions
from das_asr.training.finetune.processes import is_main_process
from das_asr.training.finetune.trainer import Trained, configure_torch, run_training
from das_asr.training.finetune.workspace import check_output, open_work, published

__all__ = ["INITS", "LoraOptions", "LoraResult", "train_lora"]

_log = logging.getLogger("das_asr.training")

INITS = ("pissa", "olora", "plain")
_START = "start.safetensors"


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Options of `train_lora`.

    Attributes:
        base: folder of a Hugging Face Whisper checkpoint, or a hub id.
        output: the adapter to write; must not exist.
        data: what to train on.
        train: how.
        revision: branch, tag or commit of a hub id.
        rank: r of every module while it trains; PiSSA and OLoRA are saved with twice as much.
        alpha: the scale is alpha / r, or alpha / sqrt(r) with rsLoRA.
        rslora: which of the two.
        init: "pissa", "olora" or "plain".
        dropout: on the input of A.
        targets: regular expression of full module names; only modules of `SUPPORTED_MODULES` can be used later.
        compress_rank: bring the saved adapter down to this rank, with the smallest error.
        restart: throw away an unfinished run that would be continued.
    """

    base: str
    output: Path
    data: DataOptions
    train: TrainOptions
    revision: str | None = None
    rank: int = 32
    alpha: float = 64.0
    rslora: bool = True
    init: str = "pissa"
    dropout: float = 0.0
    targets: str = SUPPORTED_MODULES
    compress_rank: int | None = None
    restart: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise OptionError(f"--rank is {self.rank}, expected at least 1.")
        if not self.alpha > 0:
            raise OptionError(f"--alpha is {self.alpha}, expected a number above 0.")
        if self.init not in INITS:
            raise OptionError(f"--init is {self.init!r}, expected {', '.join(INITS[:-1])} or {INITS[-1]}.")
        if not 0 <= self.dropout < 1:
            raise OptionError(f"--dropout is {self.dropout}, expected a probability: at least 0 and below 1.")
        if self.compress_rank is not None and not 1 <= self.compress_rank < self.saved_rank:
            raise OptionError(
                f"--compress-rank is {self.compress_rank}; with --rank {self.rank} and --init {self.init} the adapter "
                f"has rank {self.saved_rank}, so 1 to {self.saved_rank - 1} was expected."
            )
        if self.train.eval_wer and not self.data.eval_sources:
            raise OptionError("--eval-wer measures on a development set, but no --eval-data was given.")

    @property
    def saved_rank(self) -> int:
        """Rank of the plain LoRA that the training gives, before it is compressed."""
        return self.rank if self.init == "plain" else 2 * self.rank


@dataclass(frozen=True)
class LoraResult:
    """A trained adapter."""

    output: Path
    rank: int
    parameters: int  # trained
    utterances: int
    skipped: int
    trained: Trained
    compression: dict[str, float] | None  # module -> relative error


def train_lora(options: LoraOptions) -> LoraResult:
    """Trains one adapter and writes it; goes on where a killed run with the same options stopped.

    Raises:
        CheckpointError: the base is broken.
        DataError: the data is broken.
        OptionError: options contradict the base.
        TrainingError: the output exists, another run is unfinished there, or training diverged.
    """
    check_output(options.output)
    base = load_base(options.base, options.revision)
    device = configure_torch(options.train)
    model = base.load_model().to(device)
    _check_targets(model, options)
    data = prepare_data(base, options.data, model=model, encoder_states=True)
    kind = _kind(options)
    work = open_work(options.output, run_of(base, data, options.train, what="lora", **kind), restart=options.restart)
    peft = _adapted(model, options, work / _START)
    trained = run_training(peft, data, options.train, work=work, base=base)
    return _finish(options, base, data, trained, kind)


def _kind(options: LoraOptions) -> dict[str, Any]:
    names = ("rank", "alpha", "rslora", "init", "dropout", "targets")
    return {name: getattr(options, name) for name in names}


def _check_targets(model: Any, options: LoraOptions) -> None:
    try:
        found = [name for name, _ in model.named_modules() if re.fullmatch(options.targets, name)]
    except re.error as error:
        raise OptionError(f"--targets {options.targets!r} is not a regular expression ({error}).") from error
    if not found:
        raise TrainingError(
            f"No module of {options.base} matches --targets {options.targets!r}. Names look like "
            "model.decoder.layers.0.self_attn.q_proj; leave --targets out to train all that can be used."
        )
    if unusable := [name for name in found if not re.fullmatch(SUPPORTED_MODULES, name)]:
        raise TrainingError(
            f"--targets {options.targets!r} also matches {unusable[0]}. Only q_proj and v_proj of the decoder's "
            "attention can be decoded jointly; leave --targets out to train all of those."
        )


def _adapted(model: Any, options: LoraOptions, start: Path) -> Any:
    """The model with fresh factors, as PEFT wraps it."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    from das_asr.training.finetune.initial import initialise

    set_seed(options.train.seed)  # the data may have drawn random numbers
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # pyright: ignore[reportArgumentType]  # a float is fine, and after PiSSA it is one
        use_rslora=options.rslora,
        lora_dropout=options.dropout,
        target_modules=options.targets,
        bias="none",
    )
    with quiet_libraries():
        peft = get_peft_model(model, config)
    initialise(peft, options.init, start)
    return peft


def _finish(options: LoraOptions, base: Base, data: TrainingData, trained: Trained, kind: dict[str, Any]) -> LoraResult:
    """Converts and compresses the factors, and publishes the adapter."""
    from das_asr.training.finetune.initial import converted

    work = open_work(options.output, run_of(base, data, options.train, what="lora", **kind), restart=False)
    factors, errors = converted(trained.model, work / _START), None
    if options.compress_rank is not None:
        factors, errors = compress(factors, options.compress_rank)
    lineage = lineage_of(base, options.data, data, options.train, trained, **kind)
    if errors is not None:
        lineage["compression"] = {"rank": factors.rank, "largest_error": max(errors.values()), "errors": errors}
    if is_main_process():
        with published(options.output) as folder:
            write_adapter(folder, factors, _config(trained.model, options.base), lineage)
        shutil.rmtree(work)
    return LoraResult(
        output=options.output,
        rank=factors.rank,
        parameters=sum(weight.numel() for weight in trained.model.parameters() if weight.requires_grad),
        utterances=len(data.train),
        skipped=data.skipped,
        trained=trained,
        compression=errors,
    )


def _config(model: Any, base: str) -> dict[str, Any]:
    """PEFT's own configuration as its `save_pretrained` would write it."""
    config = asdict(model.peft_config["default"])
    config = {name: _plain(value) for name, value in config.items()}
    inner = type(model.get_base_model())
    config["auto_mapping"] = {"base_model_class": inner.__name__, "parent_library": inner.__module__}
    config["base_model_name_or_path"] = base
    return config


def _plain(value: Any) -> Any:
    """What JSON can hold: sets as sorted lists, enumerations as their values."""
    if isinstance(value, set):
        return sorted(value)
    return getattr(value, "value", value)
