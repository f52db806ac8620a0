"""The demo: spoken sentences through the base alone, the paper's rule and `hypothesis`, beside PyTorch on the base.

    das-bench demo build/demo-bundle --base benchmarks/demo/base --clips benchmarks/demo/audio

Every clip goes through every system before the next clip does, so that a machine whose speed drifts is fair to all.
Word error rates are over all clips together (corpus level), without punctuation.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from das_asr.runtime.cli import colored_words
from das_asr.runtime.errors import OptionError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Clip", "Track", "read_clips", "run_demo"]

SAMPLE_RATE = 16_000  # Hz
THREADS = 1  # PyTorch's threads spin while they wait: with more, anything else that runs would decide the comparison
RULES = ("base", "paper", "hypothesis")


@dataclass(frozen=True)
class Clip:
    """A spoken sentence and what was said."""

    name: str
    samples: NDArray[np.float32]  # [n] at 16 kHz
    text: str
    domain: str


@dataclass
class Track:
    """What one system made of the clips."""

    title: str
    texts: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def word_error_rate(self, clips: Sequence[Clip]) -> float:
        """Errors over words, corpus level."""
        import jiwer

        plain = jiwer.Compose([jiwer.ToLowerCase(), jiwer.RemovePunctuation(), jiwer.ReduceToListOfListOfWords()])
        references = [clip.text for clip in clips]
        return float(jiwer.wer(references, self.texts, reference_transform=plain, hypothesis_transform=plain))


def read_clips(folder: Path) -> list[Clip]:
    """Reads `metadata.jsonl` (`file_name`, `text`, optional `domain`) and the audio it names.

    Raises:
        OptionError: there is no such list, or a line of it lacks a field.
    """
    from das_asr.runtime.audio import load_audio

    listing = folder / "metadata.jsonl"
    if not listing.is_file():
        raise OptionError(f"{folder} has no metadata.jsonl. Give a folder with one: file_name and text on each line.")
    clips = []
    for line in filter(str.strip, listing.read_text(encoding="utf-8").splitlines()):
        row = _row(line)
        if not {"file_name", "text"} <= row.keys():
            raise OptionError(f"{listing}: {line!r} lacks file_name or text.")
        samples = load_audio(folder / row["file_name"], target_rate=SAMPLE_RATE)
        clips.append(Clip(row["file_name"], samples, row["text"], row.get("domain", "")))
    if not clips:
        raise OptionError(f"{listing} lists no clips. Give at least one line with file_name and text.")
    return clips


def _row(line: str) -> dict[str, str]:
    """One line of the list; empty if it is not a JSON object."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def run_demo(bundle: Path, base: Path, clips: Sequence[Clip], say: Callable[[str], None]) -> dict[str, Any]:
    """Transcribes the clips with every system, tells the story through `say`, and returns the figures."""
    from das_asr.runtime.transcriber import Transcriber

    torch_system = _TransformersBase(base, THREADS)
    tracks = {"transformers": Track("transformers, base only")}
    tracks |= {rule: Track(f"DAS, {'base alone' if rule == 'base' else f'rule {rule}'}") for rule in RULES}
    with Transcriber.load(bundle, threads=THREADS) as transcriber:
        _warm_up(transcriber, torch_system, clips[0])
        say(f"{len(clips)} clips, rows: base, {', '.join(transcriber.adapters)}; one thread")
        for clip in clips:
            say(f"\n{clip.domain + ': ' if clip.domain else ''}{clip.text}")
            _timed(tracks["transformers"], functools.partial(torch_system.transcribe, clip.samples))
            for rule in RULES:
                say(f"  {rule:<12}{_run_rule(transcriber, tracks[rule], rule, clip)}")
    return _report(tracks, clips, say)


def _run_rule(transcriber: Any, track: Track, rule: str, clip: Clip) -> str:
    """Transcribes one clip and returns the text with the adapters' words coloured."""
    adapters = () if rule == "base" else None  # the base alone means without the adapters' cost too
    shown = ""

    def transcribe() -> str:
        nonlocal shown
        options = {"adapters": adapters, "rule": rule, "no_speech_threshold": None}
        result = transcriber.transcribe(clip.samples, sample_rate=SAMPLE_RATE, **options)
        shown = colored_words(result)
        return str(result.text)

    _timed(track, transcribe)
    return shown


def _timed(track: Track, transcribe: Callable[[], str]) -> None:
    started = perf_counter()
    track.texts.append(transcribe())
    track.seconds += perf_counter() - started


def _warm_up(transcriber: Any, torch_system: _TransformersBase, clip: Clip) -> None:
    torch_system.transcribe(clip.samples)
    for rule in RULES:
        _run_rule(transcriber, Track(""), rule, clip)


def _report(tracks: dict[str, Track], clips: Sequence[Clip], say: Callable[[str], None]) -> dict[str, Any]:
    seconds = sum(len(clip.samples) for clip in clips) / SAMPLE_RATE
    reference = tracks["transformers"].seconds
    say(f"\n{'system':<26}{'WER %':>7}{'RTF':>9}{'x PyTorch':>11}")
    figures = {}
    for name, track in tracks.items():
        wer, rtf = track.word_error_rate(clips), track.seconds / seconds
        figures[name] = {"wer": wer, "rtf": rtf, "time_ratio": track.seconds / reference}
        say(f"{track.title:<26}{100 * wer:>7.1f}{rtf:>9.4f}{track.seconds / reference:>11.2f}")
    say(f"({seconds:.0f} s of audio; RTF = processing time / audio time, one thread, features included)")
    return {"clips": len(clips), "audio_seconds": seconds, "threads": THREADS, "systems": figures}


class _TransformersBase:
    """`generate` of transformers on the base."""

    def __init__(self, base: Path, threads: int) -> None:
        import torch
        from transformers import WhisperForConditionalGeneration, WhisperProcessor

        torch.set_num_threads(threads)
        self._model: Any = WhisperForConditionalGeneration.from_pretrained(base, dtype=torch.float32).eval()
        self._processor: Any = WhisperProcessor.from_pretrained(base)

    def transcribe(self, samples: NDArray[np.float32]) -> str:
        import torch

        features = self._processor(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
        with torch.inference_mode():
            ids = self._model.generate(features)
        return str(self._processor.batch_decode(ids, skip_special_tokens=True)[0]).strip()
