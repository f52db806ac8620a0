"""The graph contract: every name, shape and dtype that crosses between the exported graphs and the runtime.

Symbols: B utterances, R rows (row 0 is the base, row i is base + adapter i), n new tokens of this call, T cached
tokens, r LoRA rank of the stack, V vocabulary, D model width, H decoder heads, d = D / H, S encoder positions of the
audio that is heard, L decoder layers, lanes = B * R. Symbolic dimensions are strings (`batch`, `rows`, `lanes`,
`frames`, `audio`, `new`, `past`, `total`, `rank`, `groups`); `frames` is even, at most a window, and twice `audio`,
which is S. `groups` G is 1 or B: adapters that all utterances of a run share, or each utterance's own.

The decoder exists in two forms that compute the same. In `decoder.onnx` the self-attention cache grows with every run,
which is fastest on a CPU. In `decoder_static.onnx` it has a fixed size and is updated in place, which GPUs need.

Tensors that a graph of half precision holds in that precision take a `dtype`: adapters, cross tensors and caches. All
others are float32 at the border of every graph.

The exporter declares its graphs from these lists and the runtime binds by them, so neither can drift from the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from das_asr.runtime.manifest import Dimensions

__all__ = [
    "ALONE",
    "DECODER_FILE",
    "DECODER_STATIC_FILE",
    "ENCODER_FILE",
    "RULE_CODES",
    "SUPPRESSED",
    "TARGETS",
    "DType",
    "Target",
    "TensorSpec",
    "cache_names",
    "cross_specs",
    "decoder_inputs",
    "decoder_outputs",
    "encoder_inputs",
    "encoder_outputs",
    "integer_cross_specs",
    "longest_run",
    "lora_specs",
    "static_decoder_inputs",
    "static_decoder_outputs",
]

ENCODER_FILE = "encoder.onnx"
DECODER_FILE = "decoder.onnx"
DECODER_STATIC_FILE = "decoder_static.onnx"
"""The decoder with the cache of fixed size; its weights are those of `DECODER_FILE`, in the same external file."""

Shape = tuple[int | str, ...]

DType = Literal["float32", "float16", "bfloat16", "int64", "int8", "uint8", "bool"]

Target = Literal["sq", "sv", "cq", "cv"]
"""Which projection a LoRA sits on: self- or cross-attention, query or value."""

TARGETS: tuple[Target, ...] = ("sq", "sv", "cq", "cv")

RULE_CODES: dict[str, int] = {"base": 0, "paper": 1, "gain": 2, "deviation-max": 3, "hypothesis": 4}
"""Value of the decoder's `rule` input. The first four share one history, `hypothesis` gives each row its own."""

ALONE = "das.alone"
"""Property of an encoder that must be run on one utterance at a time: with others its outputs would depend on them."""

SUPPRESSED = -1e30
"""Logit bias of a token that must not be written: its probability is exactly 0, and 0 * SUPPRESSED is not NaN."""

_LONGEST_RUN = 32  # a prompt without previous text has 4 tokens


def longest_run(dims: Dimensions) -> int:
    """Most new tokens of one run with the static cache; a longer prompt is fed in several.

    The memory of a run grows with its tokens: cross-attention weights of every row and token over the whole audio. What
    is reserved for the longest run, an engine takes for good.
    """
    return min(dims.text_positions, _LONGEST_RUN)


@dataclass(frozen=True)
class TensorSpec:
    """One graph input or output: its name, dtype and shape, with symbolic dimensions as strings."""

    name: str
    dtype: DType
    shape: Shape


def lora_specs(dims: Dimensions, dtype: DType = "float32") -> Iterator[TensorSpec]:
    """Adapter tensors of the whole stack, in the layout the graphs take them; the LoRA scale is folded into B.

    `lora_{sq,sv,cq,cv}_a{l}` [G, R, D, r]; `lora_{sq,sv,cq}_b{l}` [G, R, r, D]; `lora_cv_b{l}` [G, R, H, r, d], split
    by head because it is applied after the attention weights. `lora_cv_a{l}` belong to the encoder graph, the rest to
    the decoder.

    G is 1 where the utterances of a run share one stack, or B where each has its own; the products broadcast over it.
    Stacks with fewer rows or a smaller rank than others of their run are padded with zeros, and `row_mask` keeps the
    rows that only pad out of the selection.
    """
    for layer in range(dims.decoder_layers):
        for target in TARGETS:
            yield TensorSpec(f"lora_{target}_a{layer}", dtype, ("groups", "rows", dims.d_model, "rank"))
            shape: Shape = ("groups", "rows", "rank", dims.d_model)
            if target == "cv":
                shape = ("groups", "rows", dims.decoder_heads, "rank", dims.head_size)
            yield TensorSpec(f"lora_{target}_b{layer}", dtype, shape)


def cross_specs(dims: Dimensions, dtype: DType = "float32") -> Iterator[TensorSpec]:
    """What the encoder hands to the decoder: keys, transposed values and the low-rank part of each row's values."""
    heads, size = dims.decoder_heads, dims.head_size
    for layer in range(dims.decoder_layers):
        yield TensorSpec(f"cross_k{layer}", dtype, ("batch", heads, "audio", size))
        yield TensorSpec(f"cross_v{layer}", dtype, ("batch", heads, size, "audio"))
        yield TensorSpec(f"cross_u{layer}", dtype, ("batch", "rows", "audio", "rank"))


def integer_cross_specs(dims: Dimensions) -> Iterator[TensorSpec]:
    """What is handed over in graphs with 8-bit activations: float32 = scale * (8 bits - zero point).

    Keys have zero point 128, the others 0; values are not transposed.
    """
    heads, size = dims.decoder_heads, dims.head_size
    for layer in range(dims.decoder_layers):
        yield TensorSpec(f"cross_k{layer}", "uint8", ("batch", heads, "audio", size))
        yield TensorSpec(f"cross_v{layer}", "int8", ("batch", heads, "audio", size))
        yield TensorSpec(f"cross_u{layer}", "int8", ("batch", "rows", "audio", "rank"))
        for kind, axis in (("k", heads), ("v", heads), ("u", "rows")):
            yield TensorSpec(f"cross_{kind}_scale{layer}", "float32", ("batch", axis, 1, 1))


def cache_names(dims: Dimensions) -> Iterator[tuple[str, str]]:
    """Pairs (input `past_*`, output `present_*`) of the self-attention cache."""
    for layer in range(dims.decoder_layers):
        for part in ("k", "v"):
            yield f"past_{part}{layer}", f"present_{part}{layer}"


def _encoder_lora(spec: TensorSpec) -> bool:
    return spec.name.startswith("lora_cv_a")


def encoder_inputs(dims: Dimensions, dtype: DType = "float32") -> list[TensorSpec]:
    """`features` and the adapter tensors whose product with the encoder output every row needs once per utterance."""
    return [
        TensorSpec("features", "float32", ("batch", dims.mels, "frames")),
        *(spec for spec in lora_specs(dims, dtype) if _encoder_lora(spec)),
    ]


def encoder_outputs(dims: Dimensions, dtype: DType = "float32") -> list[TensorSpec]:
    """The cross-attention tensors, bound straight to the decoder's inputs."""
    return list(cross_specs(dims, dtype))


def decoder_inputs(dims: Dimensions, dtype: DType = "float32") -> list[TensorSpec]:
    """Inputs of the growing-cache decoder; see `docs/architecture.md` for what each per-utterance input does.

    `ids` [B, R, n]: new tokens, each row its own. `position` [B]: position of the first of them in the utterance's own
    history (negative where a shorter prompt is padded on the left). `first_valid` [B]: first cache slot that is not
    padding. `prompt_last` [B]: position of the last prompt token; at or before it the step is a prefill whose logits
    are read there, and the first-step bias applies. `token_bias` [B, V] is added to every row's logits before the
    softmax, `first_token_bias` [B, V] on top of it where the first token after the prompt is chosen: 0 or
    `SUPPRESSED`. `row_mask` [B, R]: True where a row takes part in the selection. `past_*` [B, R, H, T, d].
    """
    cache = ("batch", "rows", dims.decoder_heads, "past", dims.head_size)
    return [*_steering(dims), *_pasts(dims, dtype, cache), *_fixed(dims, dtype)]


def decoder_outputs(dims: Dimensions, dtype: DType = "float32") -> list[TensorSpec]:
    """Outputs of the growing-cache decoder.

    `next_ids` [B, R, 1] is bound as the next step's `ids`: the selected token in every row, or with own history each
    row's candidate. `row` [B]: the row that chose. `candidate`, `logprob` [B, R]: each row's best token and its natural
    log-probability after suppression. `logits` [B, R, V]: before suppression; declared always, bound only when asked
    for. `present_*` [B, R, H, T + n, d].
    """
    cache = ("batch", "rows", dims.decoder_heads, "total", dims.head_size)
    return [*_choices(dims), *_presents(dims, dtype, cache)]


def static_decoder_inputs(dims: Dimensions, dtype: DType = "float32") -> list[TensorSpec]:
    """Inputs of the static-cache decoder: those of `decoder_inputs` with another cache, and `attended`.

    `past_*` [lanes, H, Tmax, d] with lane = b * R + row and Tmax the number of text positions. The new tokens' keys and
    values go to the slots position + first_valid and following, which must lie within Tmax; a query sees the slots from
    `first_valid` up to its own. A slot that was never written must hold finite numbers, such as zeros: it is weighted
    with 0, and 0 times NaN is NaN. `attended` [1]: how many slots attention reads; every slot that was written for an
    utterance of this run, this run's included, must lie below it. It saves time and changes no result.

    With `first_valid` 0, prompts of different length are padded on the right: each utterance's steps overwrite its
    padding, and no slot lies beyond Tmax.
    """
    attended = TensorSpec("attended", "int64", (1,))
    return [*_steering(dims), attended, *_pasts(dims, dtype, _static_cache(dims)), *_fixed(dims, dtype)]


def static_decoder_outputs(dims: Dimensions, dtype: DType = "float32") -> list[TensorSpec]:
    """Outputs of the static-cache decoder: those of `decoder_outputs`, with `present_*` of the shape of `past_*`.

    Bind the same memory to a past and its present: the cache is then updated in place.
    """
    return [*_choices(dims), *_presents(dims, dtype, _static_cache(dims))]


def _static_cache(dims: Dimensions) -> Shape:
    return ("lanes", dims.decoder_heads, dims.text_positions, dims.head_size)


def _steering(dims: Dimensions) -> list[TensorSpec]:
    """What the host tells each run."""
    vocab = dims.vocabulary
    return [
        TensorSpec("ids", "int64", ("batch", "rows", "new")),
        TensorSpec("position", "int64", ("batch",)),
        TensorSpec("first_valid", "int64", ("batch",)),
        TensorSpec("prompt_last", "int64", ("batch",)),
        TensorSpec("rule", "int64", ("batch",)),
        TensorSpec("tau", "float32", ("batch",)),
        TensorSpec("token_bias", "float32", ("batch", vocab)),
        TensorSpec("first_token_bias", "float32", ("batch", vocab)),
        TensorSpec("row_mask", "bool", ("batch", "rows")),
    ]


def _choices(dims: Dimensions) -> list[TensorSpec]:
    """What each run tells the host."""
    return [
        TensorSpec("next_ids", "int64", ("batch", "rows", 1)),
        TensorSpec("row", "int64", ("batch",)),
        TensorSpec("candidate", "int64", ("batch", "rows")),
        TensorSpec("logprob", "float32", ("batch", "rows")),
        TensorSpec("logits", "float32", ("batch", "rows", dims.vocabulary)),
    ]


def _pasts(dims: Dimensions, dtype: DType, shape: Shape) -> Iterator[TensorSpec]:
    return (TensorSpec(past, dtype, shape) for past, _ in cache_names(dims))


def _presents(dims: Dimensions, dtype: DType, shape: Shape) -> Iterator[TensorSpec]:
    return (TensorSpec(present, dtype, shape) for _, present in cache_names(dims))


def _fixed(dims: Dimensions, dtype: DType) -> list[TensorSpec]:
    """What stays the same while a batch is decoded."""
    lora = [spec for spec in lora_specs(dims, dtype) if not _encoder_lora(spec)]
    return [*cross_specs(dims, dtype), *lora]
