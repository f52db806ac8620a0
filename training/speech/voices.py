"""What a speech engine is: text and a voice in, samples out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from das_asr.runtime.errors import OptionError

__all__ = ["Engine", "EngineFailure", "Samples", "Voice"]

Samples: TypeAlias = NDArray[np.float32]

_FACTORS = (0.25, 4.0)  # outside these no engine is understood any more


@dataclass(frozen=True)
class Voice:
    """Who speaks, how fast and how high.

    Raises:
        OptionError: no name, or a factor outside 0.25 to 4.
    """

    engine: str  # as in `create_engine`
    name: str  # the engine's own name: "en-us+f3", "rms", "kal_diphone", a speaker's number, or a command
    speed: float = 1.0  # 1 is the engine's normal rate
    pitch: float = 1.0  # 1 is the voice's normal pitch

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise OptionError(f"A voice of {self.engine} needs a name.")
        for field, factor in (("speed", self.speed), ("pitch", self.pitch)):
            if not _FACTORS[0] <= factor <= _FACTORS[1]:
                raise OptionError(f"{field} was {factor}; a factor from {_FACTORS[0]} to {_FACTORS[1]} is expected.")


class EngineFailure(Exception):  # noqa: N818  # one utterance that went wrong, which the run survives
    """One utterance could not be spoken; the run counts it and goes on.

    Attributes:
        reason: a short word by which failures are counted.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Engine(Protocol):
    """A way to turn text into speech. All methods may be called by several threads at once."""

    default_voice: str | None
    """The voice that speaks where none is named; None where one has to be named."""

    def check(self, voice: Voice) -> None:
        """Refuses a voice that the engine does not have, or a speed or pitch that it cannot give.

        Raises:
            SynthesisError: with the voices that there are, where the engine can list them.
        """
        ...

    def speak(self, text: str, voice: Voice) -> tuple[Samples, int]:
        """Speaks one text.

        Returns:
            mono float32 [n], full scale 1, and its rate in Hz.

        Raises:
            EngineFailure: this text could not be spoken.
            SynthesisError: no text can be spoken any more, such as when an endpoint refuses the key.
        """
        ...

    def close(self) -> None:
        """Ends what the engine keeps running."""
        ...
