"""The floor: what the machine does, what a run needs, and the profile of where time goes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from das_asr.benchmarks.cli import main
from das_asr.benchmarks.floor import demands, encoder_demand, floor_ms, step_demand
from das_asr.benchmarks.floor_report import floor_section
from das_asr.benchmarks.rates import Rates, measure_rates
from das_asr.benchmarks.step_profile import part_of
from das_asr.export.checkpoint import load_checkpoint
from das_asr.export.half import write_half
from das_asr.export.precision import write_variant
from das_asr.runtime.contract import TensorSpec, cross_specs, lora_specs
from das_asr.runtime.manifest import Dimensions, read_manifest
from tests.bundles import make_bundle, small_graphs
from tests.checkpoints import make_base

PAST = 10


def _decoder_weights(base: Path) -> tuple[int, int]:
    """(elements that a step reads, elements that it multiplies) by the checkpoint's own parameters, adapters apart."""
    from transformers import WhisperForConditionalGeneration

    decoder = WhisperForConditionalGeneration.from_pretrained(base, local_files_only=True).get_decoder()
    # Positions are looked up; keys and values of the audio are made by the encoder.
    names = [name for name, _ in decoder.named_parameters() if "embed_positions" not in name]
    names = [name for name in names if "encoder_attn.k_proj" not in name and "encoder_attn.v_proj" not in name]
    read = [decoder.get_parameter(name) for name in names]
    return sum(item.numel() for item in read), sum(item.numel() for item in read if item.ndim == 2)


def _adapters(dims: Dimensions, rows: int, rank: int) -> int:
    """Elements of the adapters that a step reads: A and B of three projections, and B of the cross values."""
    return dims.decoder_layers * rows * 7 * rank * dims.d_model


def test_a_step_needs_what_the_checkpoint_has(demo_base: Path, demo_bundle: Path) -> None:
    dims, rows, rank = read_manifest(demo_bundle).dimensions, 4, read_manifest(demo_bundle).adapters[0].rank
    read, multiplied = _decoder_weights(demo_base)
    audio, width, layers = dims.audio_positions, dims.d_model, dims.decoder_layers
    adapters = _adapters(dims, rows, rank)
    fed = layers * (2 * audio * width + rows * (audio * rank + 2 * PAST * width))
    step = demands(demo_bundle, "fp32", PAST)["step"]
    # Besides there are a few constants: shapes, masks, and biases folded into none.
    assert step["bytes"] == pytest.approx(4 * (read + adapters + fed), rel=2e-3)
    attention = 4 * audio * width + 2 * audio * rank * dims.decoder_heads + 4 * PAST * width
    assert step["fp32"] == 2 * multiplied * rows + 2 * adapters + layers * rows * attention
    assert step["int8"] == 0


def test_a_step_of_other_adapters_and_more_utterances_than_the_graph_has(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    dims = load_checkpoint(base).dimensions
    graph = make_bundle(base, {}, tmp_path / "bundle") / "decoder_static.onnx"
    batch, rows, rank = 3, 4, 5
    sizes = {"batch": batch, "groups": 1, "rows": rows, "rank": rank, "audio": dims.audio_positions}

    def count(spec: TensorSpec) -> int:
        return math.prod(sizes[size] if isinstance(size, str) else size for size in spec.shape)

    adapters = sum(count(spec) for spec in lora_specs(dims) if not spec.name.startswith("lora_cv_a"))
    cache = dims.decoder_layers * batch * rows * PAST * 2 * dims.d_model
    read, multiplied = _decoder_weights(base)
    step = step_demand(graph, dims, rows, PAST, batch=batch, rank=rank)
    assert step.bytes == pytest.approx(4 * (read + adapters + sum(map(count, cross_specs(dims))) + cache), rel=2e-2)
    alone = step_demand(graph, dims, rows, PAST, rank=rank)
    assert step.fp32 == batch * alone.fp32  # every product has so many vectors more
    assert alone.fp32 > 2 * multiplied * rows + 2 * adapters
    assert step.bytes - alone.bytes == 4 * (batch - 1) * (sum(map(count, cross_specs(dims))) + cache) / batch


def test_halves_are_half_the_bytes(tmp_path: Path) -> None:
    dims, _ = small_graphs(tmp_path / "models", tmp_path / "fp32", {})
    write_half(tmp_path / "fp32", "fp16", dims, tmp_path / "fp16")
    wide, half = (step_demand(tmp_path / name / "decoder.onnx", dims, 3, PAST) for name in ("fp32", "fp16"))
    assert half.bytes == pytest.approx(wide.bytes / 2, rel=2e-2)
    assert half.fp32 == wide.fp32


def test_integers_are_a_byte_and_counted_apart(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    dims = load_checkpoint(base).dimensions
    folder = make_bundle(base, {}, tmp_path / "bundle")
    write_variant(folder, "int8", dims)
    wide, rounded = (step_demand(folder / name / "decoder.onnx", dims, 3, PAST, rank=4) for name in (".", "int8"))
    assert rounded.fp32 + rounded.int8 == wide.fp32
    adapters = _adapters(dims, 3, 4)
    own = dims.decoder_layers * 3 * 4 * PAST * dims.d_model
    assert rounded.fp32 == 2 * adapters + own
    saved = wide.bytes - rounded.bytes
    heard = dims.decoder_layers * dims.audio_positions * (2 * dims.d_model + 3 * 4)
    read, _ = _decoder_weights(base)
    assert 3 * heard < saved < 3 * (heard + read)
    wide, rounded = (encoder_demand(folder / name / "encoder.onnx", dims) for name in (".", "int8"))
    assert rounded.fp32 + rounded.int8 == wide.fp32
    assert rounded.fp32 == 2 * dims.frames * 3 * dims.mels * dims.d_model  # the first convolution


def test_the_encoder_multiplies_every_position(demo_base: Path, demo_bundle: Path) -> None:
    from transformers import WhisperForConditionalGeneration

    model: Any = WhisperForConditionalGeneration.from_pretrained(demo_base, local_files_only=True)
    manifest = read_manifest(demo_bundle)
    dims = manifest.dimensions
    weights = [item for name, item in model.get_encoder().named_parameters() if item.ndim == 2 and "embed" not in name]
    cross = 2 * dims.decoder_layers * dims.d_model**2
    low = dims.decoder_layers * manifest.rows * dims.d_model * manifest.adapters[0].rank
    products = 2 * dims.audio_positions * (sum(item.numel() for item in weights) + cross + low)
    encoder = model.get_encoder()
    convolutions = 2 * (
        dims.frames * encoder.conv1.weight.numel() + dims.audio_positions * encoder.conv2.weight.numel()
    )
    attention = 4 * dims.encoder_layers * dims.audio_positions**2 * dims.d_model
    assert demands(demo_bundle, "fp32", PAST)["encoder"]["fp32"] == products + convolutions + attention


def test_the_floor_is_the_longer_of_reading_and_computing() -> None:
    rates = Rates(read=1e9, fp32=1e9, int8=4e9)
    assert floor_ms({"bytes": 3_000_000, "fp32": 1_000_000, "int8": 4_000_000}, rates) == {
        "read": pytest.approx(3), "compute": pytest.approx(2), "floor": pytest.approx(3),
    }  # fmt: skip
    assert rates.best(Rates(2e9, 0.5e9, 4e9)) == Rates(2e9, 1e9, 4e9)


def test_shares_are_of_the_measured_time() -> None:
    demand = {"bytes": 3_000_000, "fp32": 1_000_000, "int8": 0}
    record = {"demand": {"step": demand, "encoder": demand}, "step_ms": {"median": 4.0}, "encoder_ms": {"median": 10.0}}
    caption, table = floor_section([("DAS", record), ("PyTorch", {})], Rates(1e9, 1e9, 1e9), 2)
    assert "2 threads" in caption
    assert table.splitlines()[2:] == [
        "| DAS | step | 4.0 | 3 | 3.0 | 75 | 0.00 | 1.0 | 25 |",
        "| DAS | encoder | 10.0 | 3 | 3.0 | 30 | 0.00 | 1.0 | 10 |",
    ]
    assert floor_section([("PyTorch", {})], Rates(1e9, 1e9, 1e9), 1) == []


def test_this_machine_has_rates() -> None:
    rates = measure_rates(1)
    # Far below any machine that this can run on, far above nothing.
    assert rates.read > 1e8
    assert rates.fp32 > 1e8
    assert rates.int8 > 1e8


@pytest.mark.parametrize(
    ("node", "part"),
    [
        ("decoder/layers.0/lora_sq/down", "LoRA"),
        ("decoder/lm_head", "output layer"),
        ("decoder/layers.0/encoder_attn/context_8/low_8", "LoRA"),
        ("cross.0/u/product", "LoRA"),
        ("encoder/layers.0/self_attn/attention/utterance/head/scores", "self-attention"),
        ("decoder/layers.3/self_attn/scores", "self-attention"),
        ("decoder/layers.3/encoder_attn/q_proj/MatMul", "cross-attention"),
        ("decoder/layers.3/fc1/MatMul", "feed-forward"),
        ("decoder/embed_tokens", "the rest"),
    ],
)
def test_nodes_belong_to_parts(node: str, part: str) -> None:
    assert part_of(node) == part


def test_profile_accounts_for_the_whole_step(demo_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    output = tmp_path / "p.json"
    arguments = ["profile", "--model", demo_base, "--domains", "0", "--rank", 4, "--tokens", 6, "--repeats", 2]
    done = CliRunner().invoke(main, [*map(str, arguments), "--output", str(output)])
    assert done.exit_code == 0, done.output
    (run,) = json.loads(output.read_text())["runs"]
    for name in ("step", "encoder"):
        told = run[name]
        assert told["run_ms"] == pytest.approx(sum(told["parts_ms"].values()) + told["engine_ms"])
        assert sum(told["parts_ms"].values()) == pytest.approx(sum(item["ms"] for item in told["operators"].values()))
        assert told["engine_ms"] > 0
        assert {"self-attention", "feed-forward", "LoRA"} <= told["parts_ms"].keys()
    dims = read_manifest(next(tmp_path.glob("das-asr/bundles/*"))).dimensions
    assert {"output layer", "cross-attention", "selection"} <= run["step"]["parts_ms"].keys()
    assert run["step"]["operators"]["Gemm"]["calls"] == 1  # the output layer, once a step: no prefill is among them
    assert run["encoder"]["operators"]["Attention"]["calls"] == dims.encoder_layers
    assert "| Python between steps |" in done.output
