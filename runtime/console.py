"""What the command lines share: user errors become a message and exit status 1, everything else shows its trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from das_asr.runtime.errors import DasError

__all__ = ["Command", "Group", "NamedFolder", "Shard", "Size"]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Command(click.Command):
    """A command whose `DasError`s are messages."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except DasError as error:
            raise click.ClickException(str(error)) from error


class Group(click.Group):
    """A group of such commands."""

    command_class = Command


class NamedFolder(click.ParamType):  # type: ignore[type-arg]  # generic in the newest click only
    """`NAME=DIR` -> (name, directory); how the command lines take adapters."""

    name = "NAME=DIR"

    def convert(
        self, value: str | tuple[str, Path], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Path]:
        """Splits at the first `=`."""
        if isinstance(value, tuple):  # click converts defaults again
            return value
        name, _, directory = value.partition("=")
        if not (name and directory):
            self.fail(f"{value!r} was given, NAME=DIR is expected, for example music=adapters/music.", param, ctx)
        return name, Path(directory)


class Shard(click.ParamType):  # type: ignore[type-arg]  # generic in the newest click only
    """`i/n` -> (i, n), the i-th of n parts counted from 0; how the command lines take shards."""

    name = "i/n"

    def convert(
        self, value: str | tuple[int, int], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """Splits at the first `/`."""
        if isinstance(value, tuple):  # click converts defaults again
            return value
        part, _, parts = value.partition("/")
        if not (part.isdecimal() and parts.isdecimal()):
            self.fail(f"{value!r} was given, i/n is expected, such as 0/4 for the first of four.", param, ctx)
        return int(part), int(parts)


class Size(click.ParamType):  # type: ignore[type-arg]  # generic in the newest click only
    """`512M`, `2G` or a plain number -> bytes, in units of 1024; how the command lines take amounts of memory."""

    name = "SIZE"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Splits off the unit."""
        if isinstance(value, int):  # click converts defaults again
            return value
        number, unit = (value[:-1], value[-1].upper()) if value[-1:].isalpha() else (value, "")
        if not number.isdecimal() or unit not in _UNITS:
            self.fail(f"{value!r} was given, a size such as 512M or 2G is expected.", param, ctx)
        return int(number) * _UNITS[unit]
