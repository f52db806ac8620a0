"""Options that several commands read alike."""

from __future__ import annotations

import click

__all__ = ["whole_numbers"]


def whole_numbers(_: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """`0,1,2` -> (0, 1, 2); `none` -> ()."""
    if value.strip() == "none":
        return ()
    try:
        return tuple(sorted({int(item) for item in value.split(",")}))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers such as 0,1,3.", param=parameter) from None
