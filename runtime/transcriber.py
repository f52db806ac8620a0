"""The public class: audio in, transcriptions out."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from das_asr.runtime.adapter_sets import AdapterSet, AdapterSets
from das_asr.runtime.audio import AudioInput, check_duration, is_silent, load_audio
from das_asr.runtime.backends import BackendOptions, create_backend
from das_asr.runtime.backends.base import Backend
from das_asr.runtime.clock import Clock
from das_asr.runtime.decoding import DecodedBatch, decode
from das_asr.runtime.errors import BackendError, BundleError, ClosedError, OptionError
from das_asr.runtime.features import LogMel
from das_asr.runtime.job import Job
from das_asr.runtime.manifest import Manifest, check_files, read_manifest
from das_asr.runtime.options import DecodingOptions
from das_asr.runtime.results import Transcription
from das_asr.runtime.scheduler import Request, Scheduler, SchedulerOptions, Stages
from das_asr.runtime.selection import RULES
from das_asr.runtime.tokenizer import Tokenizer
from das_asr.runtime.transcript import Transcript

__all__ = ["Transcriber"]

Samples = NDArray[np.float32]


class Transcriber:
    """A loaded bundle. One instance serves any number of threads.

        with Transcriber.load("bundle") as transcriber:
            result = transcriber.transcribe("request.wav")
            print(result.text, result.adapter)

    Make one with `load`.
    """

    def __init__(
        self, manifest: Manifest, directory: Path, backend: Backend, scheduling: SchedulerOptions | None = None
    ) -> None:
        self.manifest = manifest
        self._backend = backend
        self._adapters = AdapterSets(backend, manifest, directory)
        self._tokenizer = Tokenizer.from_file(directory / "tokenizer.json", manifest.tokens)
        self._features = LogMel(manifest.audio, manifest.dimensions.mels)
        self._scheduler = Scheduler(backend, scheduling or SchedulerOptions())
        self._idle = threading.Condition()
        self._running = 0
        self._closed = self._freed = False

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        device: str = "cpu",
        threads: int | None = None,
        *,
        backend: str = "onnxruntime",
        precision: str | None = None,
        spinning: bool = False,
        huge_pages: bool = True,
        allow_cpu_nodes: bool = False,
        cuda_graphs: bool = False,
        library: str | None = None,
        verify_files: bool = True,
        scheduling: SchedulerOptions | None = None,
    ) -> Transcriber:
        """Loads a bundle that `das-export` wrote.

        Args:
            bundle: its folder.
            device: `cpu`, `cuda` or `cuda:N`.
            threads: threads of one run of a graph; None is all cores.
            backend: engine that runs the graphs: `onnxruntime`; on a GPU also `ort-tensorrt` (ONNX Runtime with its
                TensorRT provider) and `tensorrt` (engines that `das-export engine` built).
            precision: one that the bundle has; None is its default, see `Manifest.precisions`.
            spinning: see `BackendOptions`.
            huge_pages: see `BackendOptions`.
            allow_cpu_nodes: see `BackendOptions`.
            cuda_graphs: see `BackendOptions`.
            library: see `BackendOptions`.
            verify_files: compare every file with its hash first.
            scheduling: how `submit` puts requests together.

        Raises:
            BundleError: the bundle is incomplete, damaged or of another schema version.
            BackendError: the engine or the device cannot be had.
            OptionError: an argument is out of range.
        """
        directory = Path(bundle)
        options = BackendOptions(device, threads, spinning, huge_pages, allow_cpu_nodes, cuda_graphs, library)
        manifest = read_manifest(directory)
        if manifest.rule not in RULES:
            raise BundleError(
                f"{directory} has the default rule {manifest.rule!r}, known are {', '.join(RULES)}. Export it again."
            )
        if verify_files:
            check_files(manifest, directory)
        engine = create_backend(backend, directory, manifest, options, precision)
        return cls(manifest, directory, engine, scheduling)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that decode along with the base, in row order."""
        with self._in_use():
            return self._adapters.names

    def transcribe(
        self,
        audio: AudioInput,
        options: DecodingOptions | None = None,
        *,
        sample_rate: int | None = None,
        **choices: Any,
    ) -> Transcription:
        """Transcribes one utterance.

        Args:
            audio: a path, a binary file object, the bytes of an audio file, or an array of samples.
            options: how to decode; or give its fields as keyword arguments.
            sample_rate: rate of an array of samples in Hz.
            **choices: fields of `DecodingOptions`.

        Raises:
            AudioError: the audio cannot be read, or is too short or too long.
            OptionError: options contradict each other or the model.
            ClosedError: after `close`.
        """
        return self.transcribe_batch([audio], options, sample_rate=sample_rate, **choices)[0]

    def transcribe_batch(
        self,
        audios: Sequence[AudioInput],
        options: DecodingOptions | None = None,
        *,
        sample_rate: int | None = None,
        **choices: Any,
    ) -> list[Transcription]:
        """Transcribes utterances of any lengths together; arguments and errors as for `transcribe`."""
        chosen = _options(options, choices)
        with self._in_use():
            clock = Clock()
            return self._run(self._read(audios, sample_rate, clock), chosen, clock)

    def submit(
        self,
        audio: AudioInput,
        options: DecodingOptions | None = None,
        *,
        sample_rate: int | None = None,
        deadline: float | None = None,
        **choices: Any,
    ) -> Future[Transcription]:
        """Queues one utterance for continuous batching: it joins the utterances that are being decoded.

        Audio is read, and errors in it or in the options are raised, before this returns. Cancelling the future takes
        the request out, also while it is decoded.

        Args:
            audio: as for `transcribe`.
            options: as for `transcribe`.
            sample_rate: rate of an array of samples in Hz.
            deadline: seconds from now; a request that is not complete by then fails with `DeadlineError`.
            **choices: fields of `DecodingOptions`.

        Returns:
            The future of the transcription.

        Raises:
            QueueFullError: too many requests are waiting.
            AudioError: as `transcribe`.
            OptionError: as `transcribe`.
            ClosedError: after `close`.
        """
        chosen = _options(options, choices)
        if deadline is not None and not deadline > 0:
            raise OptionError(f"deadline is {deadline}, expected seconds above 0, or None.")
        if chosen.prunes:
            raise OptionError(
                "`submit` does not prune: its rows are shared with other requests. Leave out max_active_rows, "
                "prune_margin and adapters='auto:...', or use `transcribe`."
            )
        with self._in_use():
            ends = None if deadline is None else perf_counter() + deadline
            clock = Clock()
            (samples,) = self._read([audio], sample_rate, clock)
            adapters = self._adapters.get(chosen.adapter_names)
            job = Job(self.manifest, self._tokenizer, adapters, chosen, 1)
            duration = len(samples) / self.manifest.audio.sample_rate
            if is_silent(samples):
                silent: Future[Transcription] = Future()
                silent.set_result(job.silence(duration, clock.stop(duration)))
                return silent
            features = self._features.batch([samples], chosen.margin)[0]
            clock.lap("features")

            def finish(decoded: DecodedBatch, stages: Stages) -> Transcription:
                clock.served(stages, decoded)
                return job.result(job.transcript(decoded, 0), 0, duration, clock.stop(duration))

            request = Request(features, adapters.loaded, job.plan(), job.prompts(), finish, ends)
            return self._scheduler.submit(request)

    async def transcribe_async(self, audio: AudioInput, *arguments: Any, **choices: Any) -> Transcription:
        """`submit` for asyncio: reads the audio in a thread and awaits the result; same arguments and errors."""
        submit = functools.partial(self.submit, audio, *arguments, **choices)
        future = await asyncio.get_running_loop().run_in_executor(None, submit)
        return await asyncio.wrap_future(future)

    def load_adapter(self, name: str, directory: str | Path) -> None:
        """Adds a PEFT LoRA checkpoint as a further row; requests that are running keep the rows they started with.

        Raises:
            AdapterError: the checkpoint is broken, unsupported or for another base.
            OptionError: the name cannot be used, or is taken.
        """
        with self._in_use():
            self._adapters.add(name, directory)

    def unload_adapter(self, name: str) -> None:
        """Takes an adapter out; requests that are running keep it.

        Raises:
            OptionError: there is no adapter of that name.
        """
        with self._in_use():
            self._adapters.remove(name)

    def close(self) -> None:
        """Waits for running and queued requests, then frees the graphs. Calling it again only waits."""
        with self._idle:
            self._closed = True
            self._idle.wait_for(lambda: self._running == 0)
            if self._freed:
                return
            self._freed = True
            self._scheduler.close()
            del self._adapters
            self._backend.close()

    def __enter__(self) -> Transcriber:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        with self._idle:
            if self._closed:
                raise ClosedError("This Transcriber is closed. Load the bundle again.")
            self._running += 1
        try:
            yield
        finally:
            with self._idle:
                self._running -= 1
                self._idle.notify_all()

    def _read(self, audios: Sequence[AudioInput], sample_rate: int | None, clock: Clock) -> list[Samples]:
        """Samples of utterances that fit the window, at the model's rate."""
        target = self.manifest.audio.sample_rate
        samples = [load_audio(audio, sample_rate, target_rate=target) for audio in audios]
        for utterance in samples:
            check_duration(utterance, self.manifest.audio)
        clock.lap("audio")
        return samples

    def _run(self, samples: list[Samples], options: DecodingOptions, clock: Clock) -> list[Transcription]:
        """Decodes what can be heard in one batch, and puts digital silence back in its place as empty results."""
        if options.prunes and not self._backend.prunes:
            raise BackendError(
                "Rows can be pruned on the CPU only with this backend. Leave out max_active_rows, prune_margin and "
                "adapters='auto:...', or load with device='cpu'."
            )
        adapters = self._adapters.get(options.adapter_names)
        audible = [index for index, utterance in enumerate(samples) if not is_silent(utterance)]
        job = Job(self.manifest, self._tokenizer, adapters, options, len(audible))
        transcripts: dict[int, Transcript] = {}
        if audible:
            decoded = self._decode([samples[index] for index in audible], options.margin, adapters, job, clock)
            transcripts = {index: job.transcript(decoded, place) for place, index in enumerate(audible)}
        seconds = [len(utterance) / self.manifest.audio.sample_rate for utterance in samples]
        timings = clock.stop(sum(seconds))
        return [
            job.result(transcripts[index], audible.index(index), duration, timings)
            if index in transcripts
            else job.silence(duration, timings)
            for index, duration in enumerate(seconds)
        ]

    def _decode(
        self, samples: list[Samples], margin: float | None, adapters: AdapterSet, job: Job, clock: Clock
    ) -> DecodedBatch:
        """Features, encoder, loop."""
        clock.lap(None)
        features = self._features.batch(samples, margin)
        clock.lap("features")
        encoded = self._backend.encode(features, adapters.loaded)
        clock.lap("encoder")
        plan = job.plan(functools.partial(self._adapters.subset, adapters) if self._backend.prunes else None)
        decoded = decode(self._backend.start(encoded, adapters.loaded, plan.control), job.prompts(), plan)
        clock.decoded(decoded)
        return decoded


def _options(options: DecodingOptions | None, choices: dict[str, Any]) -> DecodingOptions:
    if options is None:
        return DecodingOptions(**choices)
    if choices:
        raise OptionError(f"options and {', '.join(sorted(choices))} were given. Put everything into one of them.")
    return options
