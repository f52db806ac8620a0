"""Whisper's decoder with a batched adapter dimension, one ONNX graph for prefill and step, with either cache.

Hidden states are [B, R, n, D]: B utterances, R rows (row 0 the base, row i base + LoRA i), n new tokens. Row i's
projection is x W + (x A_i) B_i as one product over all rows plus two batched ones. Shapes use the symbols of
`runtime.contract`; why cross-attention is laid out as it is, is told at `_cross_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnx import TensorProto

from das_asr.export.builder import GraphBuilder, Value
from das_asr.export.caches import Cache, GrowingCache, StaticCache
from das_asr.export.graph import WeightSource, feed_forward, layer_norm, linear
from das_asr.export.selection import candidates, select
from das_asr.runtime.adapters import Stack
from das_asr.runtime.contract import (
    TensorSpec,
    decoder_inputs,
    decoder_outputs,
    static_decoder_inputs,
    static_decoder_outputs,
)
from das_asr.runtime.manifest import Dimensions

__all__ = ["DECODER_OPSET", "STATIC_OPSET", "build_decoder", "build_static_decoder"]

DECODER_OPSET = 20  # the first with Gelu; nothing newer is needed, so older runtimes can load the file
STATIC_OPSET = 24  # the first with TensorScatter

_INPUT_DOCS = {
    "ids": "new tokens, each row its own",
    "position": "position of the first new token in the utterance's own history; negative under left padding",
    "first_valid": "first cache slot that is not padding",
    "attended": "number of cache slots that attention reads: all that were written lie below",
    "prompt_last": "position of the last prompt token",
    "rule": "selection rule of the utterance: 0 base, 1 paper, 2 gain, 3 deviation-max, 4 hypothesis (own history)",
    "tau": "threshold of the rule in probability units (paper, Eq. 3)",
    "token_bias": "added to every row's logits: SUPPRESSED where a token must not be written",
    "first_token_bias": "added as well where the first token after the prompt is chosen",
    "row_mask": "True where a row takes part in the selection",
}
_OUTPUT_DOCS = {
    "next_ids": "the next step's ids: the selected token in every row, or each row's own candidate",
    "row": "the row that chose",
    "candidate": "each row's best token after suppression",
    "logprob": "natural log-probability of each row's candidate after suppression",
    "logits": "logits of every row before suppression",
}


@dataclass(frozen=True)
class _Shared:
    """What all layers of one graph share."""

    g: GraphBuilder
    source: WeightSource
    dims: Dimensions
    inputs: dict[str, Value]
    hidden_shape: Value  # int64 [4]: B, R, n, D
    columns_shape: Value  # int64 [4]: B, R*n, H, d
    by_row_shape: Value  # int64 [4]: B, R, n*H, S
    by_head_shape: Value  # int64 [5]: B, R, n, H, r

    def lora(self, target: str, layer: int, x: Value) -> Value:
        """(x A_i) B_i for every row: [B, R, n, D] @ [G, R, D, r] @ [G, R, r, D]; a G of 1 is broadcast."""
        down = self.g.op("MatMul", x, self.inputs[f"lora_{target}_a{layer}"], name=f"lora_{target}/down")
        return self.g.op("MatMul", down, self.inputs[f"lora_{target}_b{layer}"], name=f"lora_{target}/up")

    def heads(self, x: Value, name: str) -> Value:
        """[B, R, n, D] -> [B, R, H, n, d]."""
        shape = self.g.constant("split_heads", [0, 0, 0, self.dims.decoder_heads, self.dims.head_size])
        return self.g.op(
            "Transpose", self.g.op("Reshape", x, shape, name=f"{name}/split"), name=name, perm=[0, 1, 3, 2, 4]
        )

    def merge(self, x: Value, name: str) -> Value:
        """[B, R, H, n, d] -> [B, R, n, D]."""
        shape = self.g.constant("merge_heads", [0, 0, 0, self.dims.d_model])
        return self.g.op(
            "Reshape", self.g.op("Transpose", x, name=f"{name}/by_token", perm=[0, 1, 3, 2, 4]), shape, name=name
        )


def build_decoder(g: GraphBuilder, source: WeightSource, dims: Dimensions, stack: Stack) -> None:
    """Writes the growing-cache decoder of `runtime.contract` into `g`."""
    inputs = _inputs(g, decoder_inputs(dims), stack)
    with g.scope("decoder"):
        cache = GrowingCache(g, inputs)
    _build(g, source, dims, inputs, cache, decoder_outputs(dims))


def build_static_decoder(g: GraphBuilder, source: WeightSource, dims: Dimensions, stack: Stack) -> None:
    """Writes the static-cache decoder of `runtime.contract` into `g`."""
    inputs = _inputs(g, static_decoder_inputs(dims), stack)
    with g.scope("decoder"):
        cache = StaticCache(g, inputs, dims)
    _build(g, source, dims, inputs, cache, static_decoder_outputs(dims))


def _inputs(g: GraphBuilder, specs: Sequence[TensorSpec], stack: Stack) -> dict[str, Value]:
    return {
        spec.name: g.overridable(spec, stack.tensors[spec.name], "LoRA of each row, scale folded into B; row 0 is zero")
        if spec.name in stack.tensors
        else g.input(spec, _INPUT_DOCS.get(spec.name, ""))
        for spec in specs
    }


def _build(
    g: GraphBuilder,
    source: WeightSource,
    dims: Dimensions,
    inputs: dict[str, Value],
    cache: Cache,
    outputs: Sequence[TensorSpec],
) -> None:
    with g.scope("decoder"):
        x = _embed(g, source, inputs)
        mask = cache.mask()
        shared = _shared_shapes(g, source, dims, inputs, x)
        present: dict[str, Value] = {}
        for layer in range(dims.decoder_layers):
            with g.scope(f"layers.{layer}"):
                x, present[f"present_k{layer}"], present[f"present_v{layer}"] = _layer(shared, cache, mask, layer, x)
        logits, is_first = _logits(g, source, dims, inputs, x)
    made = present | _choose(g, inputs, logits, is_first)
    for spec in outputs:
        g.output(spec, made[spec.name], _OUTPUT_DOCS.get(spec.name, ""))


def _embed(g: GraphBuilder, source: WeightSource, inputs: dict[str, Value]) -> Value:
    """Token plus position embedding, [B, R, n, D]; padding before position 0 borrows position 0."""
    new = g.dimension(inputs["ids"], 2, name="ids_length")
    steps = g.op("Range", g.constant("zero", 0), new, g.constant("step", 1), name="steps")
    start = g.op("Unsqueeze", inputs["position"], g.constant("axis_last", [-1]), name="start")
    positions = g.op("Max", g.op("Add", start, steps, name="raw_positions"), g.constant("zero", 0), name="positions")
    embed = {
        kind: g.weight(f"model.decoder.embed_{kind}.weight", source.weight(f"model.decoder.embed_{kind}.weight"))
        for kind in ("tokens", "positions")
    }
    place = g.op("Gather", embed["positions"], positions, name="embed_positions")  # [B, n, D]
    place = g.op("Unsqueeze", place, g.constant("axis_1", [1]), name="embed_positions_rows")
    return g.op("Add", g.op("Gather", embed["tokens"], inputs["ids"], name="embed_tokens"), place, name="embedded")


def _shared_shapes(
    g: GraphBuilder, source: WeightSource, dims: Dimensions, inputs: dict[str, Value], x: Value
) -> _Shared:
    """The dynamic shapes that every layer reshapes to, computed once per run."""
    new = g.op("Shape", inputs["ids"], name="new_dim", start=2, end=3)
    lead = g.op("Shape", inputs["ids"], name="lead_dims", start=0, end=2)
    # Were the columns left to be inferred, TensorRT would reserve memory for those of all utterances in each of them.
    batch, rows = (
        g.op("Shape", inputs["ids"], name=f"{name}_dim", start=axis, end=axis + 1)
        for axis, name in enumerate(("batch", "rows"))
    )
    columns = g.op("Mul", rows, new, name="columns_dim")
    as_columns = (batch, columns, g.constant("head_sizes", [dims.decoder_heads, dims.head_size]))
    by_row = (lead, g.constant("rest_and_audio", [-1, 0]))  # 0: as it is
    by_head = (lead, new, g.constant("heads_and_rest", [dims.decoder_heads, -1]))
    return _Shared(
        g,
        source,
        dims,
        inputs,
        hidden_shape=g.op("Shape", x, name="hidden_shape"),
        columns_shape=g.op("Concat", *as_columns, name="columns_shape", axis=0),
        by_row_shape=g.op("Concat", *by_row, name="by_row_shape", axis=0),
        by_head_shape=g.op("Concat", *by_head, name="by_head_shape", axis=0),
    )


def _layer(s: _Shared, cache: Cache, mask: Value, layer: int, x: Value) -> tuple[Value, Value, Value]:
    """One pre-norm decoder layer: (x, present keys, present values)."""
    g, path = s.g, f"model.decoder.layers.{layer}"
    with g.scope("self_attn"):
        y, k, v = _self_attention(s, cache, mask, layer, layer_norm(g, s.source, f"{path}.self_attn_layer_norm", x))
        x = g.op("Add", x, linear(g, s.source, f"{path}.self_attn.out_proj", y), name="residual")
    with g.scope("encoder_attn"):
        y = _cross_attention(s, layer, layer_norm(g, s.source, f"{path}.encoder_attn_layer_norm", x))
        x = g.op("Add", x, linear(g, s.source, f"{path}.encoder_attn.out_proj", y), name="residual")
    return feed_forward(g, s.source, path, x), k, v


def _self_attention(s: _Shared, cache: Cache, mask: Value, layer: int, x: Value) -> tuple[Value, Value, Value]:
    """Causal attention of every row over its own history: (y [B, R, n, D], present keys, present values)."""
    g, path = s.g, f"model.decoder.layers.{layer}.self_attn"
    q = g.op("Add", linear(g, s.source, f"{path}.q_proj", x), s.lora("sq", layer, x), name="q")
    v = g.op("Add", linear(g, s.source, f"{path}.v_proj", x), s.lora("sv", layer, x), name="v")
    k = linear(g, s.source, f"{path}.k_proj", x, bias=False, scale=s.dims.head_size**-0.5)
    present_k, keys = cache.append(f"k{layer}", s.heads(k, "k_heads"))
    present_v, values = cache.append(f"v{layer}", s.heads(v, "v_heads"))
    keys_t = g.op("Transpose", keys, name="keys_t", perm=[0, 1, 2, 4, 3])
    scores = g.op("MatMul", s.heads(q, "q_heads"), keys_t, name="scores")
    weights = g.op("Softmax", g.op("Add", scores, mask, name="masked_scores"), name="weights", axis=-1)
    return s.merge(g.op("MatMul", weights, values, name="context"), "merged"), present_k, present_v


def _cross_attention(s: _Shared, layer: int, x: Value) -> Value:
    """Attention of every row to the audio: [B, R, n, D].

    Keys and base values are the same for all rows, so the rows and new tokens become columns of one product per head,
    with the large cached tensor on its LEFT: a large right operand that is not constant would be packed anew at every
    step. Row i's values V0 + U_i B_i enter as P V0 + (P U_i) B_i with P the attention weights (bias of v_proj in V0).
    """
    g, path = s.g, f"model.decoder.layers.{layer}.encoder_attn"
    q = g.op("Add", linear(g, s.source, f"{path}.q_proj", x), s.lora("cq", layer, x), name="q")
    q_columns = g.op("Reshape", q, s.columns_shape, name="q_split")
    q_t = g.op("Transpose", q_columns, name="q_t", perm=[0, 2, 3, 1])  # [B, H, d, R*n]
    scores_t = g.op("MatMul", s.inputs[f"cross_k{layer}"], q_t, name="scores_t")  # [B, H, S, R*n]
    scores = g.op("Transpose", scores_t, name="scores", perm=[0, 3, 1, 2])  # [B, R*n, H, S]
    # This reshape keeps ONNX Runtime from moving the transpose behind the softmax, whose axis would then be strided.
    scores = g.op("Reshape", scores, s.by_row_shape, name="scores_by_row")
    weights = g.op("Softmax", scores, name="weights", axis=-1)  # [B, R, n*H, S]

    by_column = g.constant("weights_by_column", [0, -1, s.dims.decoder_heads, 0])
    weights_t = g.op("Reshape", weights, by_column, name="weights_by_column")
    weights_t = g.op("Transpose", weights_t, name="weights_t", perm=[0, 2, 3, 1])  # [B, H, S, R*n]
    base_t = g.op("MatMul", s.inputs[f"cross_v{layer}"], weights_t, name="base_context_t")  # [B, H, d, R*n]
    base = g.op("Transpose", base_t, name="base_context_split", perm=[0, 3, 1, 2])  # [B, R*n, H, d]
    base = g.op("Reshape", base, s.hidden_shape, name="base_context")

    low = g.op("MatMul", weights, s.inputs[f"cross_u{layer}"], name="lora_cv/down")  # [B, R, n*H, r]
    low = g.op("Reshape", low, s.by_head_shape, name="lora_cv/split")
    low = g.op("Transpose", low, name="lora_cv/by_head", perm=[0, 1, 3, 2, 4])  # [B, R, H, n, r]
    up = g.op("MatMul", low, s.inputs[f"lora_cv_b{layer}"], name="lora_cv/up")  # [B, R, H, n, d]
    return g.op("Add", base, s.merge(up, "lora_context"), name="context")


def _logits(
    g: GraphBuilder, source: WeightSource, dims: Dimensions, inputs: dict[str, Value], x: Value
) -> tuple[Value, Value]:
    """Logits [B, R, V] of each utterance's current token, and whether it is the last of the prompt (bool [B]).

    During prefill that token is `prompt_last - position` into the new ids; in a step the difference is negative and the
    only new token is meant, so one input serves both.
    """
    ahead = g.op("Sub", inputs["prompt_last"], inputs["position"], name="ahead")
    zero = g.constant("zero", 0)
    index = g.op("Max", ahead, zero, name="read_index")
    index = g.op("Reshape", index, g.constant("to_batch_4d", [-1, 1, 1, 1]), name="read_index_4d")
    outer = g.op("Shape", x, name="outer", start=0, end=2)
    one_wide = (g.constant("one", [1]), g.constant("width", [dims.d_model]))
    shape = g.op("Concat", outer, *one_wide, name="read_shape", axis=0)
    current = g.op("GatherElements", x, g.op("Expand", index, shape, name="read_at"), name="current", axis=2)
    normed = layer_norm(g, source, "model.decoder.layer_norm", current)
    # Gemm on the very initializer that Gather reads: a 3-D product would store a second, transposed copy of it.
    flat = g.op("Reshape", normed, g.constant("flat_rows", [-1, dims.d_model]), name="flat_rows")
    table = g.weight("model.decoder.embed_tokens.weight", source.weight("model.decoder.embed_tokens.weight"))
    flat = g.op("Gemm", flat, table, name="lm_head", transB=1)
    lead = g.op("Shape", inputs["ids"], name="lead", start=0, end=2)
    rows = g.op("Concat", lead, g.constant("vocabulary", [dims.vocabulary]), name="logits_shape", axis=0)
    return g.op("Reshape", flat, rows, name="logits"), g.op("GreaterOrEqual", ahead, zero, name="is_first")


def _choose(g: GraphBuilder, inputs: dict[str, Value], logits: Value, is_first: Value) -> dict[str, Value]:
    """Suppression, candidates and selection: the outputs that steer the loop."""
    with g.scope("selection"):
        first = g.op("Unsqueeze", is_first, g.constant("axis_last", [-1]), name="first_column")
        first = g.op("Cast", first, name="first_factor", to=TensorProto.FLOAT)
        bias = g.op("Mul", inputs["first_token_bias"], first, name="first_bias")
        bias = g.op("Add", inputs["token_bias"], bias, name="bias")
        rows = candidates(g, logits, bias)
        row, next_ids = select(g, rows, rule=inputs["rule"], tau=inputs["tau"], row_mask=inputs["row_mask"])
    return {"next_ids": next_ids, "row": row, "candidate": rows.token, "logprob": rows.logprob, "logits": logits}
