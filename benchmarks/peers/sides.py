"""What a comparison consists of: its options, its sides, and what must be made before anything is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from das_asr.benchmarks.bundles import bundle_for
from das_asr.benchmarks.models import BASE_RANDOM, adapter_folders, cache_root
from das_asr.benchmarks.peers.engines import ENGINES, NOT_COMPARED, Tools, UnavailableError
from das_asr.benchmarks.peers.process import convert
from das_asr.benchmarks.systems import Work
from das_asr.benchmarks.worker import check_threads
from das_asr.runtime.errors import OptionError
from das_asr.runtime.manifest import sha256_of

__all__ = ["PRECISIONS", "PeersOptions", "Prepared", "Refused", "Side", "bare_name", "converted", "plan", "prepare"]

PRECISIONS = ("fp32", "int8")
HALF = "fp16"  # of peers that have nothing wider; compared whenever fp32 is

Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class PeersOptions:
    """What `das-bench peers` is asked to do.

    Attributes:
        model: checkpoint folder, or the name of the random one.
        domains: numbers of adapters K of the runtime; none leaves out the forced comparison.
        rank: of the adapters.
        tokens: forced on every side.
        threads: of every side; with 1 each is pinned to the same core.
        repeats: interleaved, that count.
        warmup: repeats before them that do not.
        precisions: of `PRECISIONS`.
        engines: of `ENGINES`.
        spinning: whether idle threads of the runtime spin.
        tools: what some peers need.
        speech: AudioFolder to transcribe freely, for word error rates.
        bundle: of the model, with its adapters, for `speech`.
    """

    model: str = BASE_RANDOM
    domains: tuple[int, ...] = (0, 1, 3, 10, 25)
    rank: int = 32
    tokens: int = 30
    threads: int = 1
    repeats: int = 7
    warmup: int = 1
    precisions: tuple[str, ...] = PRECISIONS
    engines: tuple[str, ...] = tuple(ENGINES)
    spinning: bool = False
    tools: Tools = field(default_factory=Tools)
    speech: Path | None = None
    bundle: Path | None = None

    def __post_init__(self) -> None:
        for flag, given, known in (
            ("--precision", self.precisions, PRECISIONS),
            ("--peers", self.engines, tuple(ENGINES)),
            ("--python", tuple(self.tools.pythons), tuple(ENGINES)),
        ):
            if wrong := [name for name in given if name not in known]:
                raise OptionError(f"{flag} has {wrong[0]!r}, expected {', '.join(known)}.")
        for flag, value, least in (
            ("--domains", min(self.domains, default=0), 0),
            ("--rank", self.rank, 1),
            ("--tokens", self.tokens, 2),
            ("--repeats", self.repeats, 1),
            ("--warmup", self.warmup, 0),
        ):
            if value < least:
                raise OptionError(f"{flag} {value}: must be at least {least}.")
        for peer, python in self.tools.pythons.items():
            if not python.is_file():
                raise OptionError(f"--python {peer}={python}: there is no such file. Give an interpreter.")
        if self.bundle is not None and self.speech is None:
            raise OptionError("--bundle is what --speech is decoded with. Give both, or leave it out.")
        check_threads(self.threads)


@dataclass(frozen=True)
class Side:
    """One peer at one precision; the runtime also with K adapters."""

    engine: str
    precision: str
    domains: int = 0

    @property
    def name(self) -> str:
        """Such as `ctranslate2 int8` or `das fp32 K=3`."""
        domains = f" K={self.domains}" if ENGINES[self.engine].domains else ""
        return f"{self.engine} {self.precision}{domains}"


def bare_name(precision: str) -> str:
    """The side that the runtime without adapters is, whatever the histories."""
    return Side("das", precision).name


@dataclass(frozen=True)
class Refused:
    """A peer that does not take part, and why."""

    engine: str
    precision: str
    reason: str


@dataclass(frozen=True)
class Prepared:
    """What the sides open, and who could not be prepared."""

    checkpoint: Path
    bundles: Mapping[int, Path]  # by K
    folders: Mapping[tuple[str, str], Path]  # by peer and precision
    refused: tuple[Refused, ...]

    def work(self, side: Side, options: PeersOptions, tokens: int | None) -> Work:
        """What a side is asked to do."""
        bundle = self.bundles[side.domains] if ENGINES[side.engine].domains else None
        return Work(
            self.checkpoint, (), tokens, threads=options.threads, bundle=bundle, spinning=options.spinning,
            precision=side.precision,
        )  # fmt: skip


def plan(options: PeersOptions, domains: Sequence[int]) -> Iterator[Side]:
    """All sides in the order of the tables, the runtime with each number of adapters.

    Without adapters shared and own histories are the same, and run once.
    """
    asked = (*options.precisions, *([HALF] if "fp32" in options.precisions else []))
    for engine in (name for name in ENGINES if name in options.engines):
        info = ENGINES[engine]
        counts = domains if info.domains else (0,)
        for precision in (name for name in info.precisions if name in asked):
            for count in counts:
                if count or engine != "das-hypothesis":
                    yield Side(engine, precision, count)


def converted(side: Side, checkpoint: Path, tools: Tools) -> Path:
    """The folder that a peer made of a checkpoint, in the cache; it is made on first use.

    Raises:
        UnavailableError: the peer cannot convert it.
    """
    digest = sha256_of(checkpoint / "model.safetensors")[:12]
    folder = cache_root() / "peers" / f"{checkpoint.name}-{digest}" / f"{side.engine}-{side.precision}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    convert(side.engine, side.precision, checkpoint, folder, tools)
    return folder


def prepare(checkpoint: Path, options: PeersOptions, log: Log) -> Prepared:
    """Exports the bundles and lets every peer convert; all of it is kept in the cache."""
    ours = any(ENGINES[name].domains for name in options.engines)
    # With speech, the base alone is compared even where the forced comparison is left out.
    counts = {*options.domains, *([0] if options.speech else [])} if ours else set()
    bundles = {
        count: bundle_for(
            checkpoint,
            adapter_folders(checkpoint, options.rank, count),
            options.rank,
            log,
            precisions=("fp32", *(name for name in options.precisions if name != "fp32")),
        )
        for count in sorted(counts)
    }
    folders: dict[tuple[str, str], Path] = {}
    refused = [Refused(name, "", reason) for name, reason in NOT_COMPARED.items()]
    for side in (side for side in plan(options, ()) if not ENGINES[side.engine].domains):
        try:
            folders[side.engine, side.precision] = converted(side, checkpoint, options.tools)
        except UnavailableError as error:
            refused.append(Refused(side.engine, side.precision, str(error)))
            log(f"{side.name}: {error}")
    return Prepared(checkpoint, bundles, folders, tuple(refused))
