"""What the command lines share: user errors become a message and exit status 1, everything else shows its trace."""

from __future__ import annotations

from typing import Any

import click

from das_asr.runtime.errors import DasError

__all__ = ["Command", "Group", "parse_adapters"]


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


def parse_adapters(_context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Click callback: `NAME=DIR` given several times -> {name: directory}.

    Raises:
        click.BadParameter: without `=`, or a name given twice.
    """
    adapters: dict[str, str] = {}
    for value in values:
        name, equals, directory = value.partition("=")
        if not (name and equals and directory):
            raise click.BadParameter(f"{value!r} was given, NAME=DIR is expected.", param=parameter)
        if name in adapters:
            raise click.BadParameter(f"two adapters are called {name!r}. Give each a name of its own.", param=parameter)
        adapters[name] = directory
    return adapters
