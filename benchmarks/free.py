"""Real audio decoded to its true length: the base in transformers against a bundle with its adapters.

Nothing is forced here, so the systems write different numbers of tokens; the table shows how many.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from das_asr.benchmarks.audio import find_audio
from das_asr.benchmarks.machine import pinned, quiet_libraries
from das_asr.benchmarks.models import SAMPLE_RATE, resolve_model
from das_asr.benchmarks.systems import YARDSTICK, System, Work, open_system
from das_asr.benchmarks.timing import summarize
from das_asr.runtime.errors import OptionError
from das_asr.runtime.manifest import read_manifest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from das_asr.benchmarks.rtf import RtfOptions

__all__ = ["FreeOptions", "run_free"]

SYSTEMS = (YARDSTICK, "das", "das-hypothesis")

Clips = Sequence["NDArray[np.float32]"]


@dataclass(frozen=True)
class FreeOptions:
    """What to decode, with what."""

    model: str
    bundle: Path
    audio: tuple[Path, ...]  # files and folders
    threads: int = 1
    repeats: int = 10
    warmup: int = 2
    spinning: bool = False
    precision: str = "fp32"  # of the bundle's graphs

    @classmethod
    def of(cls, audio: Sequence[Path], bundle: Path | None, like: RtfOptions) -> FreeOptions | None:
        """The same model, precision, threads and repeats as the forced part; None where no audio was given.

        Raises:
            BundleError: it is no bundle.
            OptionError: audio without a bundle, a bundle without audio, or one without the precision.
        """
        if not audio and bundle is None:
            return None
        if bundle is None or not audio:
            raise OptionError(
                "--audio and --bundle belong together: give the audio and the exported bundle of --model."
            )
        read_manifest(bundle).graphs(bundle, like.precision)  # the forced part takes long; a refusal should not wait
        return cls(
            like.model, bundle, tuple(audio), like.threads, like.repeats, like.warmup, like.spinning, like.precision
        )

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> FreeOptions:
        """From the JSON form of `dataclasses.asdict`."""
        return cls(**{**data, "bundle": Path(data["bundle"]), "audio": tuple(map(Path, data["audio"]))})

    def files(self) -> list[Path]:
        """The audio files, folders opened and sorted."""
        return find_audio(self.audio)


def run_free(options: FreeOptions, log: Callable[[str], None]) -> dict[str, Any]:
    """Decodes every file with every system, interleaved; RTF and RTFx are over the whole set."""
    from das_asr.runtime.audio import load_audio

    manifest = read_manifest(options.bundle)
    clips = [load_audio(path, target_rate=SAMPLE_RATE) for path in options.files()]
    log(f"{len(clips)} files to their true length")
    work = Work(
        resolve_model(options.model),
        (),
        None,
        threads=options.threads,
        bundle=options.bundle,
        spinning=options.spinning,
        precision=options.precision,
    )
    with quiet_libraries(), pinned(options.threads), contextlib.ExitStack() as stack:
        systems = {name: open_system(name, work) for name in SYSTEMS}
        for system in systems.values():
            stack.callback(system.close)
        passes = [_pass(systems, clips, repeat) for repeat in range(options.warmup + options.repeats)]
    seconds = sum(len(clip) for clip in clips) / SAMPLE_RATE
    measured = passes[options.warmup :]
    return {
        "files": len(clips),
        "audio_seconds": seconds,
        "adapters": [entry.name for entry in manifest.adapters],
        "systems": {name: _numbers(name, measured, seconds) for name in SYSTEMS},
    }


@dataclass
class _Pass:
    """One system's way through all files."""

    seconds: float = 0.0
    tokens: int = 0


def _pass(systems: Mapping[str, System], clips: Clips, repeat: int) -> dict[str, _Pass]:
    """Every file through every system, the order of the systems rotated from file to file."""
    done = {name: _Pass() for name in systems}
    names = list(systems)
    for place, clip in enumerate(clips):
        first = (repeat + place) % len(names)
        for name in names[first:] + names[:first]:
            utterance = systems[name].transcribe(clip)
            done[name].seconds += utterance.total
            done[name].tokens += len(utterance.tokens)
    return done


def _numbers(name: str, passes: Sequence[Mapping[str, _Pass]], audio: float) -> dict[str, Any]:
    seconds = [done[name].seconds for done in passes]
    ratios = [done[name].seconds / done[YARDSTICK].seconds for done in passes]
    rtf = statistics.median(seconds) / audio
    summaries = {"total_s": summarize(seconds), "ratio_to_transformers": summarize(ratios)}
    return {
        "rtf": rtf,
        "rtfx": 1 / rtf,
        "tokens": passes[0][name].tokens,
        **{key: asdict(summary) for key, summary in summaries.items() if summary},
    }
