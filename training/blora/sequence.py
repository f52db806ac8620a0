"""Trains on several domains one after the other, each from where the one before ended, and keeps every stage.

    for stage in train_sequence(options, ("music", "weather")):    # names of options.data.sources
        print(stage.output, stage.trained.final_loss)

`options.output` then holds `stage-1-music/`, `stage-2-weather/`, ...: adapters that know the first domain, the first
two, and so on, from which one sees what a later domain took away. A killed sequence goes on with the stage it was in.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from das_asr.runtime.errors import OptionError, TrainingError
from das_asr.runtime.utterances import METADATA, read_utterances
from das_asr.training.blora.options import BloraOptions
from das_asr.training.blora.train import BloraResult, train_blora
from das_asr.training.finetune.lineage import recipe_of
from das_asr.training.finetune.processes import is_main_process
from das_asr.training.finetune.workspace import check_output, work_folder

__all__ = ["stage_folders", "train_sequence"]

_RECORD = "sequence.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def stage_folders(output: Path, names: Sequence[str]) -> list[Path]:
    """The adapters that a sequence writes, in order."""
    return [output / f"stage-{number}-{name}" for number, name in enumerate(names, start=1)]


def train_sequence(options: BloraOptions, names: Sequence[str]) -> Iterator[BloraResult]:
    """Trains stage by stage; yields each result when its adapter is on disk, and skips those that are.

    Every stage has the whole schedule of `options.train`, and its seed. Everything is checked before the first.

    Args:
        options: of every stage; `output` is the folder of all, `data.sources` has one domain after the other, `start`
            is the first stage's.
        names: of the domains.

    Raises:
        OptionError: the domains cannot be trained one after the other, or the options are for a single training.
        DataError: a domain's data is missing or broken.
        TrainingError: the output holds another sequence; or as `train_blora`.
    """
    _check(options, names)
    _open(options.output, _record(options, names), stage_folders(options.output, names), restart=options.restart)
    return _stages(options, names)


def _stages(options: BloraOptions, names: Sequence[str]) -> Iterator[BloraResult]:
    start = options.start
    for folder, source in zip(stage_folders(options.output, names), options.data.sources, strict=True):
        if not folder.is_dir():
            yield train_blora(_stage(options, folder, source, start))
        start = folder


def _stage(options: BloraOptions, folder: Path, source: Path, start: Path | None) -> BloraOptions:
    logs = options.train.tensorboard
    return replace(
        options,
        output=folder,
        data=replace(options.data, sources=(source,)),
        train=replace(options.train, tensorboard=None if logs is None else logs / folder.name),
        posterior=options.posterior if start is not None else replace(options.posterior, prior="fixed"),
        start=start,
        restart=False,
    )


def _check(options: BloraOptions, names: Sequence[str]) -> None:
    if len(names) != len(options.data.sources):
        raise OptionError(f"{len(names)} names were given for {len(options.data.sources)} sources; expected one each.")
    if len(names) < 2:
        raise OptionError("--sequence has one domain, expected at least two NAME=DIR. For one, give --data.")
    if wrong := [name for name in names if not _NAME.fullmatch(name)]:
        raise OptionError(f"--sequence has the name {wrong[0]!r}, expected letters, digits, - and _.")
    if repeated := [name for name in names if names.count(name) > 1]:
        raise OptionError(f"--sequence has the name {repeated[0]!r} twice, expected distinct names.")
    if options.data.multi:
        raise OptionError("--sequence trains on one domain at a time, --multi on all at once. Leave one of them out.")
    if options.data.eval_sources:
        raise OptionError(
            "--eval-data picks the best state of one domain, which says nothing about the others of a --sequence. "
            "Leave it out; every stage is kept as it ends."
        )
    for source in options.data.sources:
        read_utterances(source)


def _record(options: BloraOptions, names: Sequence[str]) -> dict[str, Any]:
    """Whatever decides on the stages, as JSON."""
    own = ("base", "revision", "method", "rank", "alpha", "rslora", "dropout", "targets")
    record = {
        **{name: getattr(options, name) for name in own},
        **(asdict(options.posterior) if options.method == "blora" else {}),
        **recipe_of(options.train),
        "start": None if options.start is None else str(options.start),
        "domains": [[name, _hash(source)] for name, source in zip(names, options.data.sources, strict=True)],
    }
    return dict(json.loads(json.dumps(record)))


def _hash(source: Path) -> str:
    return hashlib.sha256((source / METADATA if source.is_dir() else source).read_bytes()).hexdigest()


def _open(output: Path, record: dict[str, Any], stages: list[Path], *, restart: bool) -> None:
    """Makes the folder of a sequence, or goes on in that of the same one."""
    path = output / _RECORD
    if not path.is_file():
        check_output(output)
    elif restart and is_main_process():
        for folder in stages:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(work_folder(folder), ignore_errors=True)
    else:
        _compare(json.loads(path.read_text(encoding="utf-8")), record, output)
    if is_main_process():
        output.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        temporary.replace(path)


def _compare(found: dict[str, Any], wanted: dict[str, Any], output: Path) -> None:
    changed = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
    if changed:
        shown = ", ".join(f"{key} ({found.get(key)!r} then, {wanted.get(key)!r} now)" for key in changed[:3])
        raise TrainingError(
            f"{output} holds a sequence with other options: {shown}. Give the same options to go on, --restart to "
            "replace it, or another --output."
        )
