"""Trains a Bayesian LoRA and saves its posterior mean as a plain one.

    options = BloraOptions(
        base="openai/whisper-base",
        output=Path("adapters/music"),
        data=DataOptions(sources=(Path("synthetic/music"),), language="en"),
        train=TrainOptions(learning_rate=1e-4),
        posterior=PosteriorOptions(beta=0.01),
    )
    result = train_blora(options)

The folder is a PEFT adapter like any other, plus `posterior.safetensors`, from which another training can start.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from das_asr.runtime.errors import OptionError
from das_asr.training.blora.options import BloraOptions
from das_asr.training.finetune.adapter_file import write_adapter
from das_asr.training.finetune.base import Base, load_base
from das_asr.training.finetune.dataset import TrainingData, prepare_data
from das_asr.training.finetune.lineage import lineage_of, run_of
from das_asr.training.finetune.noise import quiet_libraries
from das_asr.training.finetune.processes import is_main_process
from das_asr.training.finetune.trainer import Trained, configure_torch, run_training
from das_asr.training.finetune.workspace import check_output, open_work, published

__all__ = ["BloraResult", "train_blora"]


@dataclass(frozen=True)
class BloraResult:
    """A trained adapter."""

    output: Path
    parameters: int  # trained; two per element with the method "blora"
    utterances: int
    skipped: int
    trained: Trained  # entries of its history with a loss have `ce`, `kl` and `beta` too
    kl: float  # at the end; mean over elements, summed over matrices


def train_blora(options: BloraOptions) -> BloraResult:
    """Trains one adapter and writes it; goes on where a killed run with the same options stopped.

    Raises:
        CheckpointError: the base is broken.
        DataError: the data is broken.
        OptionError: options contradict each other or the base.
        TrainingError: the output exists, another run is unfinished there, the start does not fit, or training diverged.
    """
    from das_asr.training.blora.model import BayesModel

    check_output(options.output)
    start = _check_start(options)
    base = load_base(options.base, options.revision)
    device = configure_torch(options.train)
    network = base.load_model().to(device)
    model = BayesModel(network, options)  # before the data, so that options are refused at once
    data = prepare_data(base, options.data, model=network, encoder_states=True)  # asks the base: B is still zero
    if options.start is not None:
        model.load_posterior(options.start, as_prior=options.posterior.prior == "previous")
    kind = {**_kind(options), "start": start}
    work = open_work(options.output, run_of(base, data, options.train, **kind), restart=options.restart)
    trained = _run(model, data, options, work)
    lineage = lineage_of(base, options.data, data, options.train, trained, **kind)
    _publish(options, model, base, lineage, work)
    return _result(options, model, data, trained)


def _check_start(options: BloraOptions) -> str | None:
    """Hash of the posterior that the run starts from."""
    if options.start is None:
        if options.posterior.prior == "previous":
            raise OptionError(
                "--prior previous holds the posterior to the one that the training starts from, but none was given. "
                "Give --start or --sequence."
            )
        return None
    from das_asr.training.blora.model import POSTERIOR, check_posterior

    check_posterior(options.start)
    with (options.start / POSTERIOR).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _kind(options: BloraOptions) -> dict[str, Any]:
    names = ("rank", "alpha", "rslora", "dropout", "targets")
    kind = {"what": options.method, **{name: getattr(options, name) for name in names}}
    return {**kind, **asdict(options.posterior)} if options.method == "blora" else kind


def _run(model: Any, data: TrainingData, options: BloraOptions, work: Path) -> Trained:
    from transformers import set_seed

    from das_asr.training.blora.objective import KlTerm

    set_seed(options.train.seed)  # preparing the data may or may not have drawn random numbers
    if options.method == "lora" or options.posterior.beta == 0:
        return run_training(model, data, options.train, work=work)
    term = KlTerm(model.kl, options.posterior, options.train.tensorboard)
    return run_training(model, data, options.train, work=work, extra_loss=term, callbacks=[term])


def _publish(options: BloraOptions, model: Any, base: Base, lineage: dict[str, Any], work: Path) -> None:
    if not is_main_process():
        return
    with published(options.output) as folder:
        write_adapter(folder, model.factors(), _peft_config(options, base), lineage)
        model.save_posterior(folder)
    shutil.rmtree(work)


def _peft_config(options: BloraOptions, base: Base) -> dict[str, Any]:
    """What PEFT writes for a plain LoRA of this size; rank and alpha come from the weights."""
    from peft import LoraConfig

    with quiet_libraries():
        config = LoraConfig(
            r=options.rank,
            lora_dropout=options.dropout,
            use_rslora=options.rslora,
            target_modules=options.targets,
            base_model_name_or_path=base.id,
        ).to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}


def _result(options: BloraOptions, model: Any, data: TrainingData, trained: Trained) -> BloraResult:
    return BloraResult(
        output=options.output,
        parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        utterances=len(data.train),
        skipped=data.skipped,
        trained=trained,
        kl=float(model.kl().detach()),
    )
