"""Sentences -> speech in an AudioFolder, in parallel, and going on where an earlier run stopped.

report = synthesize(read_sentences(Path("music.jsonl")), SpeechOptions(engine="flite"), "speech/music")
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from das_asr.runtime.errors import SynthesisError
from das_asr.runtime.jsonl import Row
from das_asr.training.speech.engines import Engine, EngineFailure, Voice, create_engine
from das_asr.training.speech.folder import FAILURES, SpeechFolder, check_folder
from das_asr.training.speech.options import SpeechOptions
from das_asr.training.speech.progress import Progress
from das_asr.training.speech.recording import record, speak_checked
from das_asr.training.speech.sentences import identified, in_shard

__all__ = ["SpeechReport", "synthesize"]

_TRIAL = "one two three"

# Utterances before the share of failures means something.
_FEWEST_TO_JUDGE = 50


@dataclass(frozen=True)
class SpeechReport:
    """What a run did."""

    output: Path
    sentences: int  # of the shard, each counted once
    spoken: int  # by this run
    resumed: int  # that earlier runs had spoken
    failures: Mapping[str, int]  # reason -> sentences
    audio_seconds: float  # spoken by this run
    total_seconds: float  # in the folder
    wall_seconds: float
    workers: int

    @property
    def failed(self) -> int:
        """Sentences that could not be spoken."""
        return sum(self.failures.values())

    @property
    def times_real_time(self) -> float:
        """Seconds of audio per second of this run."""
        return self.audio_seconds / self.wall_seconds


def synthesize(rows: Iterable[Row], options: SpeechOptions, output: str | Path, *, quiet: bool = True) -> SpeechReport:
    """Speaks sentences into a folder.

    Args:
        rows: sentences with `text`, and optionally `id`, `domain` and columns to be carried along.
        options: how they are spoken.
        output: new folder, or one that a run with the same options left; see `folder` for what it holds.
        quiet: no progress on standard error.

    Raises:
        DataError: the sentences cannot be used.
        SynthesisError: the engine or a voice is missing, too many sentences fail, or the folder is another run's.
        OptionError: options that contradict each other.
    """
    every = identified({**row, "source_row": number} for number, row in enumerate(rows))
    sentences = {name: row for name, row in every.items() if in_shard(name, options.shard)}
    output = Path(output)
    with closing(_engine(options)) as engine:
        options = dataclasses.replace(options, voices=_voices(options, engine))
        check_folder(output, options)
        _audition(engine, options)
        with closing(SpeechFolder.open(output, options, sentences)) as folder:
            return _run(engine, sentences, options, folder, quiet)


def _engine(options: SpeechOptions) -> Engine:
    return create_engine(
        options.engine,
        model=options.model,
        base_url=options.base_url,
        api_key=options.api_key,
        timeout=options.timeout,
    )


def _voices(options: SpeechOptions, engine: Engine) -> tuple[str, ...]:
    if options.voices:
        return options.voices
    if engine.default_voice is None:
        raise SynthesisError(f"{options.engine} has no voice of its own. Name one (--voice).")
    return (engine.default_voice,)


def _audition(engine: Engine, options: SpeechOptions) -> None:
    """Hears every voice once at its slowest and looks the other extreme up, before anything is written."""
    for name in options.voices:
        slow, fast = (Voice(options.engine, name, options.speed[end], options.pitch[end]) for end in (0, 1))
        engine.check(slow)
        engine.check(fast)
        try:
            speak_checked(engine, _TRIAL, slow, float("inf"))
        except EngineFailure as failure:
            raise SynthesisError(
                f"The voice {name!r} of {options.engine} cannot say {_TRIAL!r}: {failure}. "
                "Choose another voice or engine."
            ) from failure


def _run(
    engine: Engine, sentences: Mapping[str, Row], options: SpeechOptions, folder: SpeechFolder, quiet: bool
) -> SpeechReport:
    started, resumed = time.monotonic(), len(folder.done)
    waiting = [row for name, row in sentences.items() if name not in folder.done]
    failures: Counter[str] = Counter()
    audio_seconds = 0.0
    with closing(Progress(len(waiting), quiet=quiet)) as progress:
        for row, result in _record_all(engine, waiting, options, folder.path):
            if isinstance(result, EngineFailure):
                folder.fail(row, result.reason, str(result))
                failures[result.reason] += 1
                if len(folder.done) + failures.total() >= _FEWEST_TO_JUDGE:
                    _judge(failures, len(folder.done), options, folder.path)
            else:
                folder.add(result)
                audio_seconds += result["duration"]
            progress.update(None if isinstance(result, EngineFailure) else result["duration"])
    _judge(failures, len(folder.done), options, folder.path)
    folder.finish(sentences)
    return SpeechReport(
        output=folder.path,
        sentences=len(sentences),
        spoken=len(folder.done) - resumed,
        resumed=resumed,
        failures=dict(failures),
        audio_seconds=audio_seconds,
        total_seconds=sum(row["duration"] for row in folder.done.values()),
        wall_seconds=time.monotonic() - started,
        workers=options.workers_or_cores,
    )


def _record_all(
    engine: Engine, rows: list[Row], options: SpeechOptions, folder: Path
) -> Iterator[tuple[Row, Row | EngineFailure]]:
    """Records rows side by side and yields them as they are finished, each with its manifest row or its failure.

    Threads are enough: engines work in processes of their own, or in code that lets other threads run.
    """
    workers = options.workers_or_cores
    with ThreadPoolExecutor(workers) as pool:
        pending: dict[Future[Row | EngineFailure], Row] = {}
        try:
            for row in rows:
                pending[pool.submit(_attempt, engine, row, options, folder)] = row
                if len(pending) >= 2 * workers:
                    yield from _finished(pending)
            while pending:
                yield from _finished(pending)
        finally:
            for future in pending:
                future.cancel()


def _finished(pending: dict[Future[Row | EngineFailure], Row]) -> Iterator[tuple[Row, Row | EngineFailure]]:
    for future in wait(pending, return_when=FIRST_COMPLETED).done:
        yield pending.pop(future), future.result()


def _attempt(engine: Engine, row: Row, options: SpeechOptions, folder: Path) -> Row | EngineFailure:
    try:
        return record(engine, row, options, folder)
    except EngineFailure as failure:
        return failure


def _judge(failures: Counter[str], spoken: int, options: SpeechOptions, folder: Path) -> None:
    """Stops a run in which too many sentences fail; `spoken` counts earlier runs too."""
    failed = failures.total()
    if failed > options.max_failures * (failed + spoken):
        reasons = ", ".join(f"{count} {reason}" for reason, count in failures.most_common())
        raise SynthesisError(
            f"{failed} of {failed + spoken} sentences could not be spoken ({reasons}); at most "
            f"{options.max_failures:.0%} may fail. {folder / FAILURES} lists them. "
            "Mend the sentences or the engine and start again; what was spoken is kept."
        )
