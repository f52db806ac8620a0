"""Drops the defaults of a graph's inputs, so that TensorRT cannot make constants of them.

    before: inputs a, b, c; initializers b, c, weight
    after:  inputs a, b, c; initializers weight

An ONNX file is a protocol buffer, fields one behind the other (https://protobuf.dev/programming-guides/encoding). Four
of them are looked at here; all others are copied as they are, and so the runtime needs no package for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from das_asr.runtime.errors import BundleError

__all__ = ["without_defaults"]

# Numbers of fields, from https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
_GRAPH = 7  # of a ModelProto
_INITIALIZER, _INPUT = 5, 11  # of a GraphProto
_INITIALIZER_NAME, _INPUT_NAME = 8, 1  # of a TensorProto and a ValueInfoProto

_VARINT, _LENGTH = 0, 2  # how a field's value is stored, beside those of a fixed number of bytes:
_FIXED = {1: 8, 5: 4}


class _Field(NamedTuple):
    number: int
    whole: bytes  # as it lies in the file
    content: bytes  # its value


def without_defaults(path: Path) -> bytes:
    """An ONNX file whose inputs have no defaults any more; weights beside it stay where they are.

    Raises:
        BundleError: it cannot be read, or is no ONNX file.
    """
    try:
        return b"".join(
            _stored(_GRAPH, _without_defaults(field.content)) if field.number == _GRAPH else field.whole
            for field in _fields(path.read_bytes())
        )
    except (OSError, IndexError, ValueError) as error:
        raise BundleError(f"{path} cannot be read as an ONNX file: {error}. Copy the whole bundle again.") from error


def _without_defaults(graph: bytes) -> bytes:
    fields = list(_fields(graph))
    inputs = {_name(field.content, _INPUT_NAME) for field in fields if field.number == _INPUT}
    return b"".join(
        field.whole
        for field in fields
        if field.number != _INITIALIZER or _name(field.content, _INITIALIZER_NAME) not in inputs
    )


def _name(message: bytes, number: int) -> bytes:
    return next((field.content for field in _fields(message) if field.number == number), b"")


def _fields(message: bytes) -> Iterator[_Field]:
    place = 0
    while place < len(message):
        tag, begin = _number(message, place)
        kind, end = tag & 7, begin
        if kind == _VARINT:
            _, end = _number(message, begin)
        elif kind == _LENGTH:
            size, begin = _number(message, begin)
            end = begin + size
        else:
            end += _FIXED.get(kind, len(message) + 1)
        if end > len(message):
            raise ValueError(f"field {tag >> 3} is unknown or cut off")
        yield _Field(tag >> 3, message[place:end], message[begin:end])
        place = end


def _number(message: bytes, place: int) -> tuple[int, int]:
    """A varint, seven bits per byte with the lowest first, and the place behind it."""
    value = shift = 0
    while message[place] & 0x80:
        value |= (message[place] & 0x7F) << shift
        place, shift = place + 1, shift + 7
    return value | message[place] << shift, place + 1


def _stored(number: int, content: bytes) -> bytes:
    """A field with a length."""
    return _varint(number << 3 | _LENGTH) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    groups = [value & 0x7F]
    while value := value >> 7:
        groups.append(value & 0x7F)
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])
