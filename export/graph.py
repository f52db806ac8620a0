"""Whisper's encoder as an ONNX graph, and the layers that encoder and decoder share.

Shapes use the symbols of `runtime.contract`. Weights keep the names they have in the checkpoint; the attention scale
d ** -0.5 is folded into the key projections, which carry neither bias nor LoRA, so queries stay as the checkpoint (and
every adapter) defines them.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from das_asr.export.builder import GraphBuilder, Value
from das_asr.runtime.adapters import Stack
from das_asr.runtime.contract import encoder_inputs, encoder_outputs
from das_asr.runtime.manifest import Dimensions

__all__ = ["ENCODER_OPSET", "WeightSource", "build_encoder", "feed_forward", "layer_norm", "linear"]

ENCODER_OPSET = 23  # the first with the Attention operator: no [heads, S, S] matrix in memory between nodes


class WeightSource(Protocol):
    """Where weights come from; `export.checkpoint.Checkpoint` is one."""

    def weight(self, name: str) -> NDArray[np.float32]:
        """The tensor of that checkpoint name as float32."""
        ...


def layer_norm(g: GraphBuilder, source: WeightSource, path: str, x: Value) -> Value:
    """LayerNorm over the last axis, with the checkpoint's scale and bias."""
    scale = g.weight(f"{path}.weight", source.weight(f"{path}.weight"))
    bias = g.weight(f"{path}.bias", source.weight(f"{path}.bias"))
    return g.op("LayerNormalization", x, scale, bias, name=path.rsplit(".", 1)[-1], axis=-1, epsilon=1e-5)


def linear(
    g: GraphBuilder, source: WeightSource, path: str, x: Value, *, bias: bool = True, scale: float = 1.0
) -> Value:
    """X [..., in] @ W [in, out] (+ b): the checkpoint's [out, in] weight, transposed once here and not at every run."""
    name = path.rsplit(".", 1)[-1]
    weight = np.multiply(source.weight(f"{path}.weight").T, scale, dtype=np.float32)
    y = g.op("MatMul", x, g.weight(f"{path}.weight", weight), name=f"{name}/MatMul")
    if not bias:
        return y
    return g.op("Add", y, g.weight(f"{path}.bias", source.weight(f"{path}.bias")), name=name)


def feed_forward(g: GraphBuilder, source: WeightSource, path: str, x: Value) -> Value:
    """X + fc2(gelu(fc1(norm(x)))), exact (erf) GELU."""
    y = layer_norm(g, source, f"{path}.final_layer_norm", x)
    y = g.op("Gelu", linear(g, source, f"{path}.fc1", y), name="activation")
    return g.op("Add", x, linear(g, source, f"{path}.fc2", y), name="feed_forward")


def build_encoder(g: GraphBuilder, source: WeightSource, dims: Dimensions, stack: Stack) -> None:
    """Features [B, mels, frames] -> the cross-attention tensors of every decoder layer."""
    features, *lora = (
        g.input(spec, "log-mel features of one window or its beginning")
        if spec.name == "features"
        else g.overridable(spec, stack.tensors[spec.name], "LoRA A of the cross-attention values, one per row")
        for spec in encoder_inputs(dims)
    )
    with g.scope("encoder"):
        x = _stem(g, source, features)
        for layer in range(dims.encoder_layers):
            with g.scope(f"layers.{layer}"):
                x = _encoder_layer(g, source, dims, f"model.encoder.layers.{layer}", x)
        x = layer_norm(g, source, "model.encoder.layer_norm", x)
    cross: dict[str, Value] = {}
    shapes = _low_rank_shapes(g, x, lora[0])
    for layer in range(dims.decoder_layers):
        with g.scope(f"cross.{layer}"):
            cross |= _keys_and_values(g, source, dims, layer, x)
            cross[f"cross_u{layer}"] = _low_rank(g, x, lora[layer], shapes)
    for spec in encoder_outputs(dims):
        g.output(spec, cross[spec.name])


def _stem(g: GraphBuilder, source: WeightSource, features: Value) -> Value:
    """Two convolutions and the position table, as far as the features go: [B, mels, frames] -> [B, S, D]."""
    x = features
    for name, stride in (("conv1", 1), ("conv2", 2)):
        path = f"model.encoder.{name}"
        weight = g.weight(f"{path}.weight", source.weight(f"{path}.weight"))
        bias = g.weight(f"{path}.bias", source.weight(f"{path}.bias"))
        x = g.op("Conv", x, weight, bias, name=name, kernel_shape=[3], pads=[1, 1], strides=[stride])
        x = g.op("Gelu", x, name=f"{name}/gelu")
    x = g.op("Transpose", x, name="to_positions", perm=[0, 2, 1])
    path = "model.encoder.embed_positions.weight"
    table = g.weight(path, source.weight(path))
    heard = g.op("Shape", x, name="audio", start=1, end=2)
    first = g.constant("axis_0", [0])
    return g.op("Add", x, g.op("Slice", table, first, heard, first, name="positions"), name="embed_positions")


def _encoder_layer(g: GraphBuilder, source: WeightSource, dims: Dimensions, path: str, x: Value) -> Value:
    """One pre-norm transformer layer on [B, S, D]."""
    with g.scope("self_attn"):
        y = layer_norm(g, source, f"{path}.self_attn_layer_norm", x)
        scale = (dims.d_model // dims.encoder_heads) ** -0.5
        q = linear(g, source, f"{path}.self_attn.q_proj", y)
        k = linear(g, source, f"{path}.self_attn.k_proj", y, bias=False, scale=scale)
        v = linear(g, source, f"{path}.self_attn.v_proj", y)
        heads = dims.encoder_heads
        y = g.op("Attention", q, k, v, name="attention", q_num_heads=heads, kv_num_heads=heads, scale=1.0)
        x = g.op("Add", x, linear(g, source, f"{path}.self_attn.out_proj", y), name="residual")
    return feed_forward(g, source, path, x)


def _keys_and_values(g: GraphBuilder, source: WeightSource, dims: Dimensions, layer: int, x: Value) -> dict[str, Value]:
    """Keys [B, H, S, d] and transposed base values [B, H, d, S] of one decoder layer."""
    path = f"model.decoder.layers.{layer}.encoder_attn"
    split = g.constant("split_heads", [0, 0, dims.decoder_heads, dims.head_size])
    k = linear(g, source, f"{path}.k_proj", x, bias=False, scale=dims.head_size**-0.5)
    v = linear(g, source, f"{path}.v_proj", x)
    k = g.op("Transpose", g.op("Reshape", k, split, name="k_heads"), name="k", perm=[0, 2, 1, 3])
    v = g.op("Transpose", g.op("Reshape", v, split, name="v_heads"), name="v", perm=[0, 2, 3, 1])
    return {f"cross_k{layer}": k, f"cross_v{layer}": v}


def _low_rank_shapes(g: GraphBuilder, x: Value, lora_a: Value) -> tuple[Value, Value]:
    """What `_low_rank` reshapes to, the same in all layers: G, D, R*r and B, S, R, r."""
    batch_and_audio = g.op("Shape", x, name="batch_and_audio", start=0, end=2)
    groups, rows, width, rank = (
        g.op("Shape", lora_a, name=f"lora_{name}", start=axis, end=axis + 1)
        for axis, name in enumerate(("groups", "rows", "width", "rank"))
    )
    columns = g.op("Mul", rows, rank, name="lora_columns")
    return (
        g.op("Concat", groups, width, columns, name="a_shape", axis=0),
        g.op("Concat", batch_and_audio, rows, rank, name="u_shape", axis=0),
    )


def _low_rank(g: GraphBuilder, x: Value, lora_a: Value, shapes: tuple[Value, Value]) -> Value:
    """Low-rank values U_i = X A_i of every row, [B, R, S, r], in one product [B, S, D] @ [G, D, R*r].

    Row i's values are V0 + U_i B_i, and attention weights are applied before B_i, so nothing of size D is kept per row.
    A product that is broadcast over the rows would be simpler, but TensorRT then copies X for each of them.
    """
    a_shape, u_shape = shapes
    a = g.op("Reshape", g.op("Transpose", lora_a, name="a_split", perm=[0, 2, 1, 3]), a_shape, name="a")
    u = g.op("Reshape", g.op("MatMul", x, a, name="u"), u_shape, name="u_split")
    return g.op("Transpose", u, name="u_by_row", perm=[0, 2, 1, 3])
