"""What an export is asked to do, checked once before anything is read or written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from das_asr.runtime.contract import RULE_CODES
from das_asr.runtime.errors import OptionError

__all__ = ["PRECISIONS", "AdapterSource", "ExportOptions"]

PRECISIONS = ("fp32", "int8", "int4", "fp16", "bf16")


@dataclass(frozen=True)
class AdapterSource:
    """A PEFT checkpoint and the name that its row gets."""

    name: str
    directory: Path


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `export_bundle`.

    Attributes:
        base: folder of a Hugging Face Whisper checkpoint, or a hub id.
        output: the bundle to write; missing folders above it are made.
        adapters: in the order of their rows, row 1 first; none makes a bundle of the base alone.
        revision: branch, tag or commit of a hub id.
        precisions: of the graphs' weights; float32 is always among them, for the others are judged by it, and the first
            is the runtime's default.
        rule: selection rule that the runtime uses unless told otherwise.
        tau: threshold of the rule in probability units (paper, Eq. 3).
        sample_audio: what the parity gate decodes; without any, the clips that come with the package.
        eval_manifest: labelled speech, on which the word error rates of the precisions are compared.
        force: replace a bundle that is already at `output`, once the new one is complete and verified; and keep
            precisions that differ more from float32 than is allowed.
    """

    base: str
    output: Path
    adapters: tuple[AdapterSource, ...] = ()
    revision: str | None = None
    precisions: tuple[str, ...] = ("fp32",)
    rule: str = "hypothesis"
    tau: float = 0.025
    sample_audio: tuple[Path, ...] = ()
    eval_manifest: Path | None = None
    force: bool = False

    def __post_init__(self) -> None:
        from das_asr.runtime.adapters import check_names

        check_names([adapter.name for adapter in self.adapters])
        for flag, value, allowed in (
            *(("--precision", precision, PRECISIONS) for precision in self.precisions),
            ("--rule", self.rule, tuple(RULE_CODES)),
        ):
            if value not in allowed:
                raise OptionError(f"{flag} is {value!r}, expected {' or '.join(allowed)}.")
        if "fp32" not in self.precisions or len(set(self.precisions)) < len(self.precisions):
            raise OptionError(
                f"--precision is {','.join(self.precisions)!r}, expected distinct names with fp32 among them, such as "
                "fp32,int8: the others are judged by it."
            )
        if self.eval_manifest is not None and len(self.precisions) == 1:
            raise OptionError("--eval-manifest compares precisions, but --precision names only one. Leave one out.")
        if not 0 <= self.tau <= 1:
            raise OptionError(f"--tau is {self.tau}, expected a probability between 0 and 1.")
        if self.revision is not None and Path(self.base).is_dir():
            raise OptionError(f"--revision {self.revision} needs a hub id, but --base {self.base} is a local folder.")
