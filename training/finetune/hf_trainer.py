"""The parts of transformers' trainer that fine-tuning changes; imported on demand, for it needs transformers.

What is changed: batches come from `Batches`; the loss is the mean over a batch's tokens plus an optional extra one; the
development set can be decoded; nothing is estimated or printed that nobody asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from das_asr.runtime.errors import TrainingError
from das_asr.training.finetune.base import Base
from das_asr.training.finetune.batches import Batches
from das_asr.training.finetune.dataset import TrainingData, collate
from das_asr.training.finetune.greedy import greedy_texts
from das_asr.training.finetune.options import TrainOptions
from das_asr.training.finetune.processes import process_count
from das_asr.training.finetune.wer import word_error_rate

__all__ = ["DomainTrainer", "training_arguments"]

_ENTRIES = 50  # of the history, unless `log_steps` says otherwise


def training_arguments(options: TrainOptions, work: Path, steps: int, *, evaluate: bool) -> Seq2SeqTrainingArguments:
    """The trainer's arguments for a run of `steps` optimiser steps."""
    by_epoch = evaluate or options.checkpoint_steps is None
    return Seq2SeqTrainingArguments(
        output_dir=str(work),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size // options.accumulation // process_count(),
        per_device_eval_batch_size=options.batch_size // options.accumulation // process_count(),
        gradient_accumulation_steps=options.accumulation,
        accelerator_config={"split_batches": True},
        optim="adamw_torch",
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(steps * options.warmup),
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        seed=options.seed,
        bf16=options.precision == "bfloat16",
        use_cpu=options.device == "cpu" or not torch.cuda.is_available(),
        logging_steps=options.log_steps or max(1, steps // _ENTRIES),
        logging_nan_inf_filter=False,
        eval_strategy="epoch" if evaluate else "no",
        save_strategy="epoch" if by_epoch else "steps",
        save_steps=options.checkpoint_steps or 500,
        save_total_limit=2,
        load_best_model_at_end=evaluate,
        metric_for_best_model=("eval_wer" if options.eval_wer else "eval_loss") if evaluate else None,
        greater_is_better=False if evaluate else None,
        prediction_loss_only=True,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
    )


class DomainTrainer(Seq2SeqTrainer):  # type: ignore[misc]
    """Trains on `TrainingData`."""

    def __init__(
        self,
        *,
        model: Any,
        args: Seq2SeqTrainingArguments,
        data: TrainingData,
        batches: Batches,
        extra_loss: Callable[[], Any] | None,
        base: Base | None,
        callbacks: list[TrainerCallback],
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=data.train,  # pyright: ignore[reportArgumentType]
            eval_dataset=data.eval,  # pyright: ignore[reportArgumentType]
            callbacks=callbacks,
        )
        for noisy in (PrinterCallback, ProgressCallback):
            self.remove_callback(noisy)
        self._batches, self._extra_loss, self._base, self._data = batches, extra_loss, base, data
        self._extra_sum, self._extra_count = 0.0, 0
        # Whisper's forward swallows any keyword, so transformers takes its loss for one that is already divided by the
        # tokens of all accumulated parts. It is the mean of one part.
        self.model_accepts_loss_kwargs = False

    def get_train_dataloader(self) -> Any:
        """Batches in our own order, split among the processes."""
        loader: DataLoader[dict[str, Any]] = DataLoader(
            self._data.train,  # type: ignore[arg-type]
            batch_sampler=self._batches,
            collate_fn=collate,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ARG002
    ) -> Any:
        """Mean over the tokens of the batch, plus the extra loss while training."""
        outputs = model(**inputs)
        loss = outputs.loss
        if self._extra_loss is not None and model.training:
            extra = self._extra_loss()
            self._extra_sum, self._extra_count = self._extra_sum + extra.detach(), self._extra_count + 1
            loss = loss + extra
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the extra loss; stops a run that has diverged."""
        if "loss" in logs and not math.isfinite(logs["loss"]):
            raise TrainingError(
                f"The loss is {logs['loss']} at step {self.state.global_step}: training diverged. Lower --lr, or give "
                "--precision float32."
            )
        if "loss" in logs and self._extra_count:
            logs["extra_loss"] = float(self._extra_sum) / self._extra_count
            self._extra_sum, self._extra_count = 0.0, 0
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:  # noqa: ARG002
        """Nobody asks for them, and counting parameters in every step takes time."""
        return 0

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Loss on the development set and, if asked for, the word error rate of greedy decoding."""
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        if self._base is not None:
            metrics["eval_wer"] = self._word_error_rate(self._base)
            self.log({"eval_wer": metrics["eval_wer"]})
        return metrics

    def _word_error_rate(self, base: Base) -> float:
        data = self._data.eval
        assert data is not None
        size = self.args.per_device_eval_batch_size
        hypotheses: list[str] = []
        model: Any = self.model
        model.eval()
        for start in range(0, len(data), size):
            items = [data[index] for index in range(start, min(start + size, len(data)))]
            batch = self._prepare_inputs(collate(items))
            hypotheses += greedy_texts(model, batch, base)
        return word_error_rate(data.texts, hypotheses)
