"""The exceptions a caller can act on.

DasError                      anything the user can mend; the command lines print its message and exit 1
├── AudioError                the audio cannot be read, or is not something this model can transcribe
├── AdapterError              a LoRA checkpoint is broken, unsupported or made for another base
├── BundleError               a bundle is incomplete, corrupt or of another schema version
├── BackendError              a device, provider or package that was asked for cannot be had
├── OptionError               options that contradict each other or the model
├── ClosedError               a Transcriber is used after `close()`
├── QueueFullError            more requests are waiting than the queue takes; try again later
├── DeadlineError             a request's deadline passed before its transcription was complete
├── ExportError               the export cannot go on
│   ├── CheckpointError       the base checkpoint is broken or is not a Whisper that can be exported
│   └── ParityError           the exported graphs do not agree with PyTorch
├── DataError                 a data set, manifest or domain file is missing, broken or empty
├── SynthesisError            a language model or a speech engine cannot be had, or fails too often
└── TrainingError             training cannot start, or cannot go on

A message says what was given, what was expected and what to do. Everything that is not a `DasError` is a bug of ours
and shows its trace.

    try:
        result = transcriber.transcribe("request.wav")
    except AudioError as error:
        log.warning("skipped: %s", error)
"""

__all__ = [
    "AdapterError",
    "AudioError",
    "BackendError",
    "BundleError",
    "CheckpointError",
    "ClosedError",
    "DasError",
    "DataError",
    "DeadlineError",
    "ExportError",
    "OptionError",
    "ParityError",
    "QueueFullError",
    "SynthesisError",
    "TrainingError",
]


class DasError(Exception):
    """Base of every error that a user can mend."""


class AudioError(DasError):
    """The audio cannot be read, or is not something this model can transcribe."""


class AdapterError(DasError):
    """A LoRA checkpoint is broken, unsupported, or made for another base."""


class BundleError(DasError):
    """A bundle is incomplete, corrupt, or of another schema version."""


class BackendError(DasError):
    """A device, provider or package that was asked for cannot be had."""


class OptionError(DasError):
    """Options that contradict each other or the model."""


class ClosedError(DasError):
    """A Transcriber is used after `close()`."""


class QueueFullError(DasError):
    """More requests are waiting than the queue takes."""


class DeadlineError(DasError):
    """A request's deadline passed before its transcription was complete."""


class ExportError(DasError):
    """The export cannot go on."""


class CheckpointError(ExportError):
    """The base checkpoint is broken, or is not a Whisper that can be exported."""


class ParityError(ExportError):
    """The exported graphs do not agree with PyTorch."""


class DataError(DasError):
    """A data set, a manifest or a domain file is missing, broken or empty."""


class SynthesisError(DasError):
    """A language model or a speech engine cannot be had, or fails too often."""


class TrainingError(DasError):
    """Training cannot start, or cannot go on."""
