"""AudioFolders to batches: checks every utterance, computes features once, and makes tensors.

data = prepare_data(base, DataOptions(sources=(Path("music"),)), model=model, encoder_states=True)
data.train[0]                       # {"features": [S, D] or [mels, frames], "labels": [n]}
collate([data.train[0], data.train[1]])    # what `WhisperForConditionalGeneration` takes
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from das_asr.runtime.audio import check_duration, load_audio
from das_asr.runtime.errors import AudioError, DataError
from das_asr.runtime.features import LogMel
from das_asr.runtime.utterances import Utterance, read_utterances
from das_asr.training.finetune.base import Base
from das_asr.training.finetune.feature_cache import FeatureCache, audio_sha256, pad_features, trim_features
from das_asr.training.finetune.labels import IGNORED, encode, prefers_leading_space
from das_asr.training.finetune.options import DataOptions
from das_asr.training.finetune.processes import process_count, process_index

__all__ = ["Example", "SpeechDataset", "TrainingData", "collate", "prepare_data"]

_log = logging.getLogger("das_asr.training")

_SHOWN = 5  # offenders in a message
_PROBED = 8  # utterances that decide on the leading space
_ENCODER_BATCH = 8  # windows


@dataclass(frozen=True)
class Example:
    """One utterance that can be trained on."""

    utterance: Utterance
    audio: str  # sha256 of the file
    domain: int  # index of its source
    labels: tuple[int, ...]


@dataclass(frozen=True)
class SpeechDataset:
    """Examples that lie domain by domain, with their cached features."""

    examples: tuple[Example, ...]
    cache: FeatureCache
    frames: int | None  # columns of a whole log-mel; None for encoder outputs

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`features` float32 [mels, frames], or float16 [S, D] of the encoder, and `labels` int [n]."""
        example = self.examples[index]
        stored = self.cache.get(example.audio)
        features = stored if self.frames is None else pad_features(stored, self.frames)
        return {"features": features, "labels": example.labels, "encoded": self.frames is None}

    @property
    def sizes(self) -> tuple[int, ...]:
        """Examples of each domain."""
        domains = [example.domain for example in self.examples]
        return tuple(domains.count(domain) for domain in range(max(domains) + 1))

    @property
    def texts(self) -> list[str]:
        """The transcripts."""
        return [example.utterance.text for example in self.examples]


@dataclass(frozen=True)
class TrainingData:
    """What `prepare_data` makes of its options."""

    train: SpeechDataset
    eval: SpeechDataset | None
    multi: bool
    leading_space: bool
    skipped: int
    sha256: str  # of everything that is trained on: audio, labels and their order

    @property
    def sizes(self) -> tuple[int, ...]:
        """Domains that batches balance: those of the sources, or a single one."""
        return self.train.sizes if self.multi else (len(self.train),)


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch for `WhisperForConditionalGeneration`.

    Returns:
        `input_features` float32 [B, mels, frames] or `encoder_outputs` (float32 [B, S, D],), and `labels` int64 [B, n]
        with `IGNORED` behind the end of each transcript.
    """
    import torch

    features = torch.from_numpy(np.stack([item["features"] for item in items]).astype(np.float32, copy=False))
    longest = max(len(item["labels"]) for item in items)
    labels = torch.full((len(items), longest), IGNORED)
    for row, item in enumerate(items):
        labels[row, : len(item["labels"])] = torch.tensor(item["labels"])
    given = {"encoder_outputs": (features,)} if items[0]["encoded"] else {"input_features": features}
    return {**given, "labels": labels}


def prepare_data(base: Base, options: DataOptions, *, model: Any, encoder_states: bool) -> TrainingData:
    """Reads, checks and encodes all utterances, and fills the cache with what is missing.

    Args:
        base: its sizes, front end and tokenizer.
        options: the sources and how they become labels.
        model: the base's `WhisperForConditionalGeneration`, on the device that the encoder shall run on.
        encoder_states: the encoder is not trained; its outputs are cached unless `options.cache_encoder` is off.

    Raises:
        DataError: a source is missing or broken, or utterances cannot be used and `skip_bad` is off.
        OptionError: the base does not know the language or task.
    """
    builder = _Builder(base, options, model, encoder_states and options.cache_encoder)
    train, dropped = builder.usable(options.sources)
    evaluation, more = builder.usable(options.eval_sources)
    if options.multi and len(train) and len(missing := set(range(len(options.sources))) - {e.domain for e in train}):
        raise DataError(f"{options.sources[min(missing)]} has no utterance that can be used. Leave it out or mend it.")
    return TrainingData(
        train=builder.dataset(train),
        eval=builder.dataset(evaluation) if evaluation else None,
        multi=options.multi,
        leading_space=builder.leading_space,
        skipped=dropped + more,
        sha256=_hash(train),
    )


def _hash(examples: Sequence[Example]) -> str:
    rows = [[example.audio, example.domain, list(example.labels)] for example in examples]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


class _Builder:
    """Makes data sets for one base; collects what is wrong with utterances instead of stopping at the first."""

    def __init__(self, base: Base, options: DataOptions, model: Any, encoder_states: bool) -> None:
        self.base, self.options, self.model = base, options, model
        self.encoder_states = encoder_states
        self.log_mel = LogMel(base.audio, base.dimensions.mels)
        sizes = (base.audio, base.dimensions.mels)
        if encoder_states:
            self.cache = FeatureCache.open(options.cache, *sizes, encoder_sha256=base.encoder_sha256)
        else:
            self.cache = FeatureCache.open(options.cache, *sizes)
        self.leading_space = bool(options.leading_space)
        self._decided = options.leading_space is not None

    def usable(self, sources: Sequence[Path]) -> tuple[list[Example], int]:
        """The examples of some sources, their features in the cache, and how many were left out."""
        found = [(domain, item) for domain, source in enumerate(sources) for item in read_utterances(source)]
        hashes = [audio_sha256(item.audio) for _, item in found]
        problems = self._fill_cache([item for _, item in found], hashes)
        self._decide([item for index, (_, item) in enumerate(found) if index not in problems])
        examples = []
        for index, (domain, item) in enumerate(found):
            if index not in problems:
                try:
                    examples.append(Example(item, hashes[index], domain, self._labels(item)))
                except DataError as error:
                    problems[index] = str(error)
        self._report({found[index][1].audio: reason for index, reason in sorted(problems.items())}, len(found))
        if found and not examples:
            raise DataError(f"None of the {len(found)} utterances of {sources[0]} can be used.")
        return examples, len(problems)

    def dataset(self, examples: Sequence[Example]) -> SpeechDataset:
        frames = None if self.encoder_states else self.base.dimensions.frames
        return SpeechDataset(tuple(examples), self.cache, frames)

    def _language(self, utterance: Utterance) -> str | None:
        return utterance.fields.get("language") or self.options.language

    def _labels(self, utterance: Utterance) -> tuple[int, ...]:
        language = self._language(utterance)
        labels = encode(self.base, utterance.text, language, self.options.task, leading_space=self.leading_space)
        return tuple(labels)

    def _report(self, problems: dict[Path, str], total: int) -> None:
        if not problems:
            return
        shown = "\n".join(f"  {path}: {reason}" for path, reason in list(problems.items())[:_SHOWN])
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        message = f"{len(problems)} of {total} utterances cannot be used:\n{shown}{more}"
        if not self.options.skip_bad:
            raise DataError(f"{message}\nMend them, or give --skip-bad to train without them.")
        _log.warning("Skipped: %s", message)

    # --- Features ---

    def _fill_cache(self, utterances: Sequence[Utterance], hashes: Sequence[str]) -> dict[int, str]:
        """Computes what is not there yet; returns what is wrong, by index."""
        problems: dict[int, str] = {}
        missing = [index for index, audio in enumerate(hashes) if not self.cache.has(audio)]
        if missing:
            _log.info("Computing features of %d utterances", len(missing))
        batch: list[tuple[str, NDArray[np.float32]]] = []
        for index in _rotated(missing):
            if self.cache.has(hashes[index]):  # another process was there, or the same audio came before
                continue
            try:
                batch.append((hashes[index], self._log_mel(utterances[index].audio)))
            except AudioError as error:
                problems[index] = str(error)
            if len(batch) == _ENCODER_BATCH:
                self._store(batch)
                batch = []
        self._store(batch)
        return problems

    def _log_mel(self, path: Path) -> NDArray[np.float32]:
        samples = load_audio(path, target_rate=self.base.audio.sample_rate)
        check_duration(samples, self.base.audio)
        return self.log_mel(samples)

    def _store(self, batch: Sequence[tuple[str, NDArray[np.float32]]]) -> None:
        if not batch:
            return
        if self.encoder_states:
            states = _half(self._encode(np.stack([features for _, features in batch])).cpu().numpy())
            for (audio, _), state in zip(batch, states, strict=True):
                self.cache.put(audio, state)
        else:
            for audio, features in batch:
                self.cache.put(audio, trim_features(features))

    def _encode(self, features: NDArray[np.float32]) -> Any:
        """Log-mels [B, mels, frames] -> encoder outputs float32 [B, S, D], a tensor on the model's device."""
        import torch

        with torch.no_grad():
            given = torch.from_numpy(features).to(self.model.device)
            return self.model.eval().get_encoder()(given).last_hidden_state.float()

    # --- The leading space ---

    def _decide(self, utterances: Sequence[Utterance]) -> None:
        """Asks the base for the form of its transcripts, once."""
        short = [item for item in utterances[: 4 * _PROBED] if self._fits(item)][:_PROBED]
        if self._decided or not short:
            return
        encoded = self._encode(np.stack([self._log_mel(item.audio) for item in short]))
        texts, languages = [item.text for item in short], [self._language(item) for item in short]
        self.leading_space = prefers_leading_space(self.model, self.base, encoded, texts, languages, self.options.task)
        self._decided = True

    def _fits(self, utterance: Utterance) -> bool:
        try:
            encode(self.base, utterance.text, self._language(utterance), self.options.task, leading_space=True)
        except DataError:
            return False
        return True


def _half(states: NDArray[np.float32]) -> NDArray[np.generic]:
    """float16 takes half the disk, and its rounding is far below that of training; float32 where it would overflow."""
    with np.errstate(over="ignore"):
        half = states.astype(np.float16)
    return half if np.isfinite(half).all() else states


def _rotated(indices: list[int]) -> Iterator[int]:
    """Each process of several starts elsewhere, so that they share the work without talking."""
    start = process_index() * len(indices) // process_count()
    yield from indices[start:]
    yield from indices[:start]
