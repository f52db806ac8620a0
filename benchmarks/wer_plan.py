"""From described systems to the bundles to load and what each has to decode; checked before any of it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from das_asr.benchmarks.bundles import bundle_for
from das_asr.benchmarks.models import cache_root
from das_asr.benchmarks.wer_decode import Demand
from das_asr.benchmarks.wer_reading import Reading
from das_asr.benchmarks.wer_replay import SharedRule
from das_asr.benchmarks.wer_systems import ORACLE, OWN, SHARED_RULES, System
from das_asr.runtime.adapters import check_names
from das_asr.runtime.errors import OptionError
from das_asr.runtime.lora_config import CONFIG_NAME
from das_asr.runtime.manifest import MANIFEST_NAME, Manifest, check_files, read_manifest
from das_asr.runtime.peft_checkpoint import read_adapter
from das_asr.runtime.results import BASE
from das_asr.runtime.selection import HYPOTHESIS

__all__ = ["Entrant", "Pool", "make_pools", "open_bundle"]

CHECKPOINT = "config.json"


@dataclass(frozen=True)
class Entrant:
    """A system resolved against its bundle: a choice among rows that write for themselves, or a shared history."""

    system: System
    kind: str  # base, an adapter, own, oracle, hypothesis; or a rule with a shared history
    rows: tuple[str, ...] = (BASE,)  # that may be chosen, the lowest first
    shared: SharedRule | None = None
    exponent: float = 1.0  # of the length that a text's total log-probability is divided by
    base_bias: float = 0.0
    reading: Reading | None = None  # of what the rows wrote, where the exponent cannot say how


@dataclass
class Pool:
    """A bundle, adapters to add to it, and the systems that decode with them."""

    bundle: Path
    manifest: Manifest
    extra: dict[str, Path] = field(default_factory=dict)  # PEFT folders by row name
    entrants: list[Entrant] = field(default_factory=list)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The bundle's own."""
        return tuple(entry.name for entry in self.manifest.adapters)

    def demand(self) -> Demand:
        """What has to be decoded for the systems."""
        own = [entrant for entrant in self.entrants if entrant.shared is None]
        wanted = {row for entrant in own for row in entrant.rows}
        rows = tuple(name for name in (*self.adapters, *self.extra) if name in wanted)
        shared = dict.fromkeys(entrant.shared for entrant in self.entrants if entrant.shared is not None)
        readings = dict.fromkeys(entrant.reading for entrant in own if entrant.reading is not None)
        return Demand(rows if own else None, tuple(shared), tuple(readings))


def make_pools(bundle: Path, systems: Iterable[System], log: Callable[[str], None]) -> list[Pool]:
    """Resolves systems; the pool of `bundle` is the first.

    Raises:
        OptionError: a folder is none of the known kinds, or a system does not fit its bundle.
        BundleError: a bundle is incomplete or damaged.
        AdapterError: an adapter is broken or for another base.
        ExportError: a checkpoint cannot be exported.
    """
    main = open_bundle(bundle)
    pools = {bundle: main}
    for system in systems:
        folder = system.folder
        if folder is not None and (folder / CONFIG_NAME).is_file():
            main.entrants.append(_added_adapter(system, folder, main))
            continue
        path = bundle if folder is None else _bundle_of(system, folder, log)
        if path not in pools:
            pools[path] = open_bundle(path)
        pools[path].entrants.append(_entrant(system, pools[path]))
    return list(pools.values())


def open_bundle(path: Path) -> Pool:
    """A bundle whose files are as they should be."""
    manifest = read_manifest(path)
    check_files(manifest, path)
    return Pool(path, manifest)


def _bundle_of(system: System, folder: Path, log: Callable[[str], None]) -> Path:
    if (folder / MANIFEST_NAME).is_file():
        return folder
    if (folder / CHECKPOINT).is_file():
        # A cache of its own for each place: checkpoints of equal name would push each other out of a common one.
        place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
        return bundle_for(folder, (), 0, log, cache=cache_root() / "checkpoints" / place)
    raise OptionError(
        f"System {system.name!r}: {folder} is not a bundle ({MANIFEST_NAME}), a checkpoint ({CHECKPOINT}) or a PEFT "
        f"adapter ({CONFIG_NAME})."
    )


def _added_adapter(system: System, folder: Path, pool: Pool) -> Entrant:
    """A PEFT adapter becomes a further row of the main bundle, and the system that row alone."""
    if system.kind:
        raise OptionError(f"System {system.name!r}: an adapter decodes alone, without {system.kind!r}.")
    row = re.sub(r"[^\w.-]+", "-", system.name)
    check_names([*pool.adapters, *pool.extra, row])
    base = pool.manifest.base
    read_adapter(folder, row, pool.manifest.dimensions, base.sha256, base.id)
    pool.extra[row] = folder
    return Entrant(system, row, (row,))


def _entrant(system: System, pool: Pool) -> Entrant:
    manifest, choices = pool.manifest, dict(system.choices)
    kind = system.kind or (manifest.rule if pool.adapters else BASE)
    adapters = _known(system, choices.pop("adapters", None), pool.adapters)
    if kind in SHARED_RULES:
        return Entrant(system, kind, shared=SharedRule(kind, choices.get("tau", manifest.tau), adapters))
    if kind in (OWN, ORACLE):
        return Entrant(system, kind, (BASE, *adapters))
    if kind == HYPOTHESIS:
        rows = (BASE, *adapters) if choices.get("include_base", True) else adapters
        if not rows:
            raise OptionError(f"System {system.name!r}: include_base=no leaves no row to choose from.")
        if choices.get("score") == "root" or "switch_cost" in choices:
            return Entrant(system, kind, rows, reading=Reading(rows=(BASE, *adapters), **choices))
        exponent = {"mean": 1.0, "total": 0.0}[choices.get("score", "mean")]
        return Entrant(system, kind, rows, exponent=exponent, base_bias=choices.get("base_bias", 0.0))
    if kind != BASE:
        _known(system, (kind,), pool.adapters)
    return Entrant(system, kind, (kind,))


def _known(system: System, wanted: Sequence[str] | None, adapters: tuple[str, ...]) -> tuple[str, ...]:
    if wanted is None:
        return adapters
    if unknown := [name for name in wanted if name not in adapters]:
        known = ", ".join(adapters) or "none"
        raise OptionError(
            f"System {system.name!r}: {unknown[0]!r} is neither an adapter of the bundle ({known}) nor a kind of "
            "system. A folder is told by a slash, as in ./folder."
        )
    return tuple(name for name in adapters if name in wanted)
