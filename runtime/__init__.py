"""DAS runtime: one Whisper and K LoRA adapters decoded jointly from an exported bundle, without torch.

from das_asr.runtime import Transcriber

with Transcriber.load("bundle") as transcriber:
    result = transcriber.transcribe("request.wav")
    print(result.text, result.adapter)
"""

from das_asr.runtime.errors import (
    AdapterError,
    AudioError,
    BackendError,
    BundleError,
    ClosedError,
    DasError,
    DeadlineError,
    OptionError,
    QueueFullError,
)
from das_asr.runtime.options import DecodingOptions
from das_asr.runtime.results import Hypothesis, Timings, TokenProvenance, Transcription, Word
from das_asr.runtime.scheduler import SchedulerOptions
from das_asr.runtime.selection import SelectionRule, StepCandidates
from das_asr.runtime.transcriber import Transcriber

__all__ = [
    "AdapterError",
    "AudioError",
    "BackendError",
    "BundleError",
    "ClosedError",
    "DasError",
    "DeadlineError",
    "DecodingOptions",
    "Hypothesis",
    "OptionError",
    "QueueFullError",
    "SchedulerOptions",
    "SelectionRule",
    "StepCandidates",
    "Timings",
    "TokenProvenance",
    "Transcriber",
    "Transcription",
    "Word",
]
