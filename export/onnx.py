"""Writes the two graphs of a bundle as ONNX files beside their external weights, and checks what was written.

    write_graphs(checkpoint, dims, stack, directory, metadata)  # encoder.onnx(.data), decoder.onnx(.data)

Weights go from the checkpoint to the file one tensor at a time, so a model larger than memory, or than the 2 GB that
one protobuf can hold, is no special case.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from das_asr.runtime.adapters import Adapter, Stack
from das_asr.runtime.errors import ParityError
from das_asr.runtime.manifest import Dimensions

if TYPE_CHECKING:
    from das_asr.export.builder import GraphBuilder
    from das_asr.export.graph import WeightSource

__all__ = ["DECODER_FILE", "ENCODER_FILE", "check_adapters_used", "opset", "write_graphs"]

ENCODER_FILE = "encoder.onnx"
DECODER_FILE = "decoder.onnx"

_ENCODER_DOC = (
    "Whisper encoder: log-mel features of one window -> the cross-attention keys, transposed values and low-rank "
    "values of every decoder layer, which are bound to the decoder's inputs of the same names."
)
_DECODER_DOC = (
    "Whisper decoder with a batched adapter dimension, prefill and step in one graph. Row 0 is the base, row i the "
    "base with adapter i. The selection rule runs inside; bind next_ids as the next step's ids and present_* as past_*."
)


def opset() -> int:
    """The highest opset of the two graphs: what a runtime has to know."""
    from das_asr.export.decoder import DECODER_OPSET
    from das_asr.export.graph import ENCODER_OPSET

    return max(DECODER_OPSET, ENCODER_OPSET)


def write_graphs(
    source: WeightSource, dims: Dimensions, stack: Stack, directory: Path, metadata: Mapping[str, str]
) -> None:
    """Writes both graphs with the stack as default of their adapter inputs, then checks the files.

    Args:
        source: the base's weights.
        dims: the base's sizes.
        stack: adapters of all rows.
        directory: where to write; it exists.
        metadata: model properties, kept in both files.

    Raises:
        onnx.checker.ValidationError: a graph is not valid ONNX.
    """
    from das_asr.export.decoder import DECODER_OPSET, build_decoder
    from das_asr.export.graph import ENCODER_OPSET, build_encoder

    _write(
        directory / ENCODER_FILE, _ENCODER_DOC, ENCODER_OPSET, lambda g: build_encoder(g, source, dims, stack), metadata
    )
    _write(
        directory / DECODER_FILE, _DECODER_DOC, DECODER_OPSET, lambda g: build_decoder(g, source, dims, stack), metadata
    )


def _write(
    path: Path, doc: str, opset: int, build: Callable[[GraphBuilder], None], metadata: Mapping[str, str]
) -> None:
    import onnx

    from das_asr.export.builder import GraphBuilder, WeightFile

    with contextlib.closing(WeightFile(path.with_name(f"{path.name}.data"))) as weights:
        graph = GraphBuilder(path.stem, doc, weights, opset)
        build(graph)
        model = graph.model(metadata)
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(path), full_check=True)  # by path: it then finds the external data


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
