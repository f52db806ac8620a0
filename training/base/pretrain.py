"""The training loop of the tiny base: cross-entropy and phoneme CTC, Muon and AdamW, resumable at any moment.

Everything depends on the number of utterances heard so far (`seen`), not on the clock: batch size, augmentation,
learning rates, padding. What worked: no augmentation until the CTC loss has left its plateau, then more of it; constant
learning rates, then linearly to zero; windows as long as the audio, with some full ones at the end.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from das_asr.training.base.augment import SILENCE, Augmentation, augmented, normalized
from das_asr.training.base.batches import GRID, Batch, Example, collate, epoch_batches, rounded_up
from das_asr.training.base.muon import Muon
from das_asr.training.base.network import TinyWhisper

__all__ = ["Progress", "Schedule", "train"]


@dataclass(frozen=True)
class Schedule:
    """Settings of the loop; every position is a number of utterances heard."""

    total: int = 300_000
    seed: int = 0
    muon_rate: float = 0.005
    adam_rate: float = 1.5e-3
    warmup: int = 3_000
    decay_from: float = 0.4  # share of the total from which the rates fall, linearly, to zero
    few_frames: int = 4_000  # a batch at first: the alignment is found after a number of steps, not of utterances
    many_frames: int = 8_000
    many_from: int = 12_000
    clean_until: int = 9_000
    full_augmentation_from: int = 45_000
    ctc_weight: float = 0.5
    token_noise: float = 0.06  # share of the decoder's inputs exchanged for random tokens
    padded_share: float = 0.1  # of the batches that get up to 0.8 s more of silence
    full_window_share: float = 0.04
    full_window_share_late: float = 0.2
    late: float = 0.85  # share of the total after which full windows are common
    save_every: float = 180.0  # seconds

    def rate(self, seen: int) -> float:
        """Factor of both learning rates."""
        falling = (self.total - seen) / (self.total * (1 - self.decay_from))
        return max(0.0, min(1.0, (seen + 1) / self.warmup, falling))

    def strength(self, seen: int) -> float:
        """Strength of the augmentation."""
        span = self.full_augmentation_from - self.clean_until
        return min(1.0, max(0.0, (seen - self.clean_until) / span))

    def frames(self, seen: int) -> int:
        """Frames of a batch."""
        return self.few_frames if seen < self.many_from else self.many_frames

    def full_windows(self, seen: int) -> float:
        """Share of the batches that are padded to the whole window."""
        return self.full_window_share_late if seen > self.late * self.total else self.full_window_share


@dataclass(frozen=True)
class Progress:
    """A line of the learning curve; losses are means since the last one."""

    seen: int
    step: int
    entropy: float
    ctc: float
    rate: float
    seconds: float  # of training, earlier runs included


class _State:
    """Everything a checkpoint holds."""

    def __init__(self, model: TinyWhisper, schedule: Schedule) -> None:
        matrices, others = _parameter_groups(model)
        self.model = model
        self.others = others
        self.muon = Muon(matrices, schedule.muon_rate)
        self.adam = torch.optim.AdamW(others, schedule.adam_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        self.rng = random.Random(schedule.seed)  # noqa: S311
        self.generator = torch.Generator().manual_seed(schedule.seed)
        self.seen = self.step = self.epoch = self.batch = 0
        self.frames = 0  # of a batch in the running epoch: its batches are cut with it
        self.seconds = 0.0

    _COUNTERS = ("seen", "step", "epoch", "batch", "frames", "seconds")

    def save(self, path: Path) -> None:
        """Writes the checkpoint under a temporary name and renames it."""
        temporary = path.with_name(f".{path.name}.tmp")
        state = {
            "model": self.model.state_dict(),
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "rng": self.rng.getstate(),
            "generator": self.generator.get_state(),
            "counters": {name: getattr(self, name) for name in self._COUNTERS},
        }
        torch.save(state, temporary)
        temporary.replace(path)

    def load(self, path: Path) -> None:
        """Goes on where the checkpoint was written."""
        state: dict[str, Any] = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        version, internal, gauss = state["rng"]
        self.rng.setstate((version, tuple(internal), gauss))
        self.generator.set_state(state["generator"])
        for name in self._COUNTERS:
            setattr(self, name, state["counters"][name])


def _parameter_groups(model: TinyWhisper) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices for Muon, everything else)."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim == 2 and "embed" not in name and "phonemes" not in name
            (matrices if is_matrix else others).append(parameter)
    return matrices, others


def train(
    model: TinyWhisper,
    examples: list[Example],
    schedule: Schedule,
    folder: Path,
    report: Callable[[Progress], None],
) -> None:
    """Trains until `schedule.total` utterances were heard; goes on from `folder/state.pt` where there is one.

    Args:
        model: changed in place.
        examples: the training set.
        schedule: settings.
        folder: where the state is kept and the curve is written (`curve.jsonl`).
        report: called after every hundred steps.
    """
    state = _State(model, schedule)
    saved = folder / "state.pt"
    if saved.exists():
        state.load(saved)
    losses: list[tuple[float, float]] = []
    written = started = time.monotonic()
    before = state.seconds
    for batch in _batches(state, examples, schedule):
        losses.append(_step(state, batch, schedule))
        state.seconds = before + time.monotonic() - started
        if state.step % 100 == 0:
            report(_progress(state, losses, schedule, folder))
            losses.clear()
        if time.monotonic() - written > schedule.save_every:
            state.save(saved)
            written = time.monotonic()
    state.save(saved)


def _batches(state: _State, examples: list[Example], schedule: Schedule) -> Iterator[list[Example]]:
    """Batches from where the state stands to the end; counts what is handed out."""
    lengths = [len(example.features) for example in examples]
    while True:
        if state.batch == 0:
            state.frames = schedule.frames(state.seen)
        order = epoch_batches(lengths, state.frames, f"{schedule.seed} {state.epoch}")
        for indices in order[state.batch :]:
            if state.seen >= schedule.total:
                return
            if state.batch and schedule.frames(state.seen) != state.frames:
                break  # larger batches from here on: the epoch is cut anew
            state.batch += 1  # before the batch is used: the state is saved while it is
            yield [examples[index] for index in indices]
        state.epoch, state.batch = state.epoch + 1, 0


def _step(state: _State, examples: list[Example], schedule: Schedule) -> tuple[float, float]:
    """One update; returns (cross-entropy, CTC loss)."""
    _set_rates(state, schedule.rate(state.seen))
    batch = collate(examples, state.rng)
    features, frames = _features(batch, state, schedule)
    with torch.autocast("cpu", torch.bfloat16):
        noisy = _noisy_inputs(batch.tokens, state, schedule)
        entropy, ctc = state.model.losses(features, frames, batch.tokens, noisy, batch.phonemes, batch.lengths)
    loss = entropy + schedule.ctc_weight * ctc
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(state.others, 1.0)
    for optimizer in (state.muon, state.adam):
        optimizer.step()
        optimizer.zero_grad()
    state.seen += len(examples)
    state.step += 1
    return entropy.item(), ctc.item()


def _set_rates(state: _State, factor: float) -> None:
    for optimizer in (state.muon, state.adam):
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * factor


def _features(batch: Batch, state: _State, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Augmented, padded and normalised features f32 [B, mels, F] and frames [B]."""
    how = Augmentation(strength=schedule.strength(state.seen))
    power, frames = augmented(batch.power, batch.frames, how, state.generator)
    most = 2 * state.model.whisper.config.max_source_positions
    extra = GRID * state.rng.randint(1, 2) if state.rng.random() < schedule.padded_share else 0
    if state.rng.random() < schedule.full_windows(state.seen):
        extra = most
    length = min(most, rounded_up(power.shape[2], GRID) + extra)
    power = nn.functional.pad(power, (0, max(0, length - power.shape[2])), value=SILENCE)[:, :, :length]
    return normalized(power), frames.clamp(max=length)


def _noisy_inputs(tokens: Tensor, state: _State, schedule: Schedule) -> Tensor:
    """The decoder's inputs: text tokens are exchanged for random ones now and then, the prompt never."""
    inputs = tokens[:, :-1].clamp(min=0)
    chosen = torch.rand(inputs.shape, generator=state.generator) < schedule.token_noise
    chosen[:, :4] = False
    vocabulary = state.model.end_of_text  # text tokens come before the special ones
    other = torch.randint(0, vocabulary, inputs.shape, generator=state.generator)
    return torch.where(chosen, other, inputs)


def _progress(state: _State, losses: list[tuple[float, float]], schedule: Schedule, folder: Path) -> Progress:
    entropy, ctc = (sum(values) / len(losses) for values in zip(*losses, strict=True))
    progress = Progress(state.seen, state.step, entropy, ctc, schedule.rate(state.seen), state.seconds)
    with (folder / "curve.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(progress)) + "\n")
    return progress
