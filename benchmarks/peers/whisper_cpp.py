"""whisper.cpp through pywhispercpp, with 16-bit weights: its CPU kernels refuse a file of 32-bit ones.

The converter is a script in whisper.cpp's repository and not in the Python package, so a checkout is needed. It takes
audio and gives tokens; features and encoder are run once more behind each utterance to know their share.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from das_asr.benchmarks.children import run_child
from das_asr.benchmarks.models import read_json
from das_asr.benchmarks.peers.ctranslate import starts_with_words
from das_asr.benchmarks.peers.engines import UnavailableError
from das_asr.benchmarks.peers.openai import check_vocabulary
from das_asr.benchmarks.systems import System, Work
from das_asr.benchmarks.timing import Utterance

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["ENGINE"]

SCRIPT = Path("models/convert-h5-to-ggml.py")
MODEL = "ggml-model.bin"
NEVER = 1e9  # no threshold of the fall-back is ever crossed


class _System:
    def __init__(self, work: Work, folder: Path) -> None:
        import _pywhispercpp  # pyright: ignore[reportMissingImports]
        from pywhispercpp.model import Model  # pyright: ignore[reportMissingImports]

        self._library: Any = _pywhispercpp
        self._threads = work.threads
        self._model: Any = Model(
            str(folder / MODEL), params_sampling_strategy=0, n_threads=work.threads, redirect_whispercpp_logs_to=None
        )
        self._options = {
            "language": "en",
            "single_segment": True,
            "no_timestamps": True,
            "no_context": True,
            "print_progress": False,
            "suppress_blank": starts_with_words(work.checkpoint),
            "greedy": {"best_of": 1},
            "temperature": 0.0,
            "temperature_inc": 0.0,
            "entropy_thold": -NEVER,
            "logprob_thold": -NEVER,
            "no_speech_thold": NEVER,
            # One token comes from the prompt's run and is not counted; 0 is no limit.
            "max_tokens": 0 if work.tokens is None else work.tokens - 1,
        }

    def transcribe(self, audio: NDArray[np.float32]) -> Utterance:
        started = perf_counter()
        segments = self._model.transcribe(audio, **self._options)
        total = perf_counter() - started
        library, context = self._library, self._model._ctx
        tokens = tuple(
            int(library.whisper_full_get_token_id(context, segment, place))
            for segment in range(len(segments))
            for place in range(library.whisper_full_n_tokens(context, segment))
        )
        end = library.whisper_token_eot(context)
        features, encoder = self._parts(audio)
        return Utterance(tuple(token for token in tokens if token < end), (), total, features, encoder, 0.0, ())

    def _parts(self, audio: NDArray[np.float32]) -> tuple[float, float]:
        """Seconds of the features and of the encoder."""
        library, context = self._library, self._model._ctx
        started = perf_counter()
        library.whisper_pcm_to_mel(context, audio, len(audio), self._threads)
        extracted = perf_counter()
        library.whisper_encode(context, 0, self._threads)
        return extracted - started, perf_counter() - extracted

    def close(self) -> None:
        del self._model


class _WhisperCpp:
    def convert(self, checkpoint: Path, precision: str, folder: Path, whisper_cpp: Path | None) -> None:  # noqa: ARG002
        check_vocabulary(checkpoint)
        if whisper_cpp is None:
            raise UnavailableError("its converter is not in the Python package; give a checkout with --whisper-cpp")
        if not (whisper_cpp / SCRIPT).is_file():
            raise UnavailableError(f"--whisper-cpp {whisper_cpp} has no {SCRIPT}")
        try:
            import whisper
        except ModuleNotFoundError as error:
            raise UnavailableError(
                "its converter takes the mel filters of openai-whisper, which is not installed"
            ) from error
        with tempfile.TemporaryDirectory() as scratch:
            _as_expected(checkpoint, Path(scratch))
            filters = Path(str(whisper.__file__)).parent.parent
            command = [sys.executable, str(whisper_cpp / SCRIPT), scratch, str(filters), str(folder)]
            done = run_child(command)
        if done.returncode:
            raise UnavailableError(f"its converter failed: {done.stderr.strip().splitlines()[-1]}")

    def open(self, work: Work, folder: Path) -> System:
        return _System(work, folder)


def _as_expected(checkpoint: Path, folder: Path) -> None:
    """The checkpoint with its vocabulary in the two files of older tokenizers, which the converter reads."""
    for path in checkpoint.resolve().iterdir():
        (folder / path.name).symlink_to(path)
    tokenizer = read_json(checkpoint / "tokenizer.json")
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    for name, tokens in (("vocab.json", tokenizer["model"]["vocab"]), ("added_tokens.json", added)):
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_text(json.dumps(tokens, ensure_ascii=False), encoding="utf-8")


ENGINE = _WhisperCpp()
