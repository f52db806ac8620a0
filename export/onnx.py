"""Writes the graphs of a bundle as ONNX files beside their external weights, and checks what was written.

    # encoder.onnx(.data), decoder.onnx(.data), decoder_static.onnx
    write_graphs(checkpoint, dims, stack, directory, metadata)

Weights go from the checkpoint to the file one tensor at a time, so a model larger than memory, or than the 2 GB that
one protobuf can hold, is no special case.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from das_asr.runtime.adapters import Adapter, Stack
from das_asr.runtime.contract import DECODER_FILE, DECODER_STATIC_FILE, ENCODER_FILE
from das_asr.runtime.errors import ParityError
from das_asr.runtime.manifest import Dimensions

if TYPE_CHECKING:
    from das_asr.export.builder import GraphBuilder
    from das_asr.export.graph import WeightSource

__all__ = ["check_adapters_used", "opset", "write_graphs"]

_ENCODER_DOC = (
    "Whisper encoder: log-mel features of one window -> the cross-attention keys, transposed values and low-rank "
    "values of every decoder layer, which are bound to the decoder's inputs of the same names."
)
_DECODER_DOC = (
    "Whisper decoder with a batched adapter dimension, prefill and step in one graph. Row 0 is the base, row i the "
    "base with adapter i. The selection rule runs inside; bind next_ids as the next step's ids and present_* as past_*."
)
_STATIC_DOC = (
    "Whisper decoder as in decoder.onnx, on the weights of decoder.onnx.data, with self-attention caches of fixed "
    "size: bind the same memory to past_* and present_* and they are updated in place."
)


def opset() -> int:
    """The highest opset of the two graphs that every runtime loads: what it has to know."""
    from das_asr.export.decoder import DECODER_OPSET
    from das_asr.export.graph import ENCODER_OPSET

    return max(DECODER_OPSET, ENCODER_OPSET)


def write_graphs(
    source: WeightSource, dims: Dimensions, stack: Stack, directory: Path, metadata: Mapping[str, str]
) -> None:
    """Writes the graphs with the stack as default of their adapter inputs, then checks the files.

    Args:
        source: the base's weights.
        dims: the base's sizes.
        stack: adapters of all rows.
        directory: where to write; it exists.
        metadata: model properties, kept in every file.

    Raises:
        onnx.checker.ValidationError: a graph is not valid ONNX.
    """
    import onnx

    from das_asr.export.builder import GraphBuilder, WeightFile
    from das_asr.export.decoder import DECODER_OPSET, STATIC_OPSET, build_decoder, build_static_decoder
    from das_asr.export.graph import ENCODER_OPSET, build_encoder

    encoder = _Form(ENCODER_FILE, _ENCODER_DOC, ENCODER_OPSET, build_encoder)
    growing = _Form(DECODER_FILE, _DECODER_DOC, DECODER_OPSET, build_decoder)
    static = _Form(DECODER_STATIC_FILE, _STATIC_DOC, STATIC_OPSET, build_static_decoder)
    for forms in ((encoder,), (growing, static)):
        with contextlib.closing(WeightFile(directory / f"{forms[0].file}.data")) as weights:
            for form in forms:
                graph = GraphBuilder(Path(form.file).stem, form.doc, weights, form.opset)
                form.build(graph, source, dims, stack)
                (directory / form.file).write_bytes(graph.model(metadata).SerializeToString())
        for form in forms:  # by path: the checker then finds the external data
            onnx.checker.check_model(str(directory / form.file), full_check=True)


@dataclass(frozen=True)
class _Form:
    """One graph to write; those that are written together share one file of weights."""

    file: str
    doc: str
    opset: int
    build: Callable[[GraphBuilder, WeightSource, Dimensions, Stack], None]


def check_adapters_used(adapters: Iterable[Adapter], directory: Path) -> None:
    """Checks that some node of a graph reads every tensor of every adapter.

    Raises:
        ParityError: naming the adapter and the tensors that nothing reads.
    """
    read = _names_read(directory / ENCODER_FILE) | _names_read(directory / DECODER_FILE)
    for adapter in adapters:
        if unread := sorted(adapter.weights.keys() - read):
            raise ParityError(f"Adapter {adapter.name!r}: no graph reads {', '.join(unread)}, so it was not exported.")


def _names_read(path: Path) -> set[str]:
    """Names of all tensors that a node of the graph takes in."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    return {name for node in graph.node for name in node.input}
