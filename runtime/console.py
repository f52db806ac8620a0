"""What the command lines share: user errors become a message and exit status 1, everything else shows its trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from das_asr.runtime.errors import DasError

__all__ = ["Command", "Group", "NamedFolder", "Shard"]


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
