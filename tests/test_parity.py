"""The parity gate lets every kind of Whisper and adapter through, and nothing that is broken."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from das_asr.export import AdapterSource, ExportOptions, export_bundle
from das_asr.export.clips import load_clips
from das_asr.export.parity import TOLERANCE, check_parity
from das_asr.export.reference import RowTrace, delta_row, peft_row
from das_asr.export.replay import REPLAYED_RULES, Written, compare, paper_choice
from das_asr.runtime.adapters import load_adapter
from das_asr.runtime.contract import DECODER_FILE, DECODER_STATIC_FILE, ENCODER_FILE
from das_asr.runtime.errors import ParityError
from das_asr.runtime.manifest import Manifest, ParityReport, read_manifest, write_manifest
from tests.checkpoints import make_adapter, make_base

SHORT = {"text_positions": 24}  # 20 tokens are enough to see a difference
SAMPLES = ("general-1-klatt3.flac", "weather-1-f5.flac")
ATTENTION = r"model\.decoder\.layers\.\d+\."
BOTH = r"(self_attn|encoder_attn)\.(q_proj|v_proj)"


def sample_paths() -> tuple[Path, ...]:
    folder = Path(__file__).resolve().parent.parent / "export" / "samples"
    return tuple(folder / name for name in SAMPLES)


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@dataclass(frozen=True)
class Case:
    """A checkpoint's shape, and that of its adapters."""

    base: dict[str, Any]
    adapters: tuple[dict[str, Any], ...] = ()


CASES = {
    "no adapters": Case({}),
    "mixed ranks and scales": Case(
        {},
        (
            {"rank": 4},
            {"rank": 8, "rslora": True, "seed": 1},
            {"rank": 2, "alpha": 3, "seed": 2, "dtype": "bfloat16"},
        ),
    ),
    "rank and alpha patterns": Case({}, ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},)),
    "q only, v only": Case(
        {}, ({"targets": ATTENTION + r"\w+\.q_proj"}, {"targets": ATTENTION + r"\w+\.v_proj", "seed": 1})
    ),
    "self only, cross only, one layer": Case(
        {},
        (
            {"targets": ATTENTION + r"self_attn\.(q|v)_proj"},
            {"targets": ATTENTION + r"encoder_attn\.(q|v)_proj", "seed": 1},
            {"targets": r"model\.decoder\.layers\.1\." + BOTH, "seed": 2},
        ),
    ),
    "trained on the bare model": Case(
        {}, ({"wrap": "WhisperModel", "targets": r"decoder\.layers\.\d+\." + BOTH}, {"seed": 1})
    ),
    "converted PiSSA": Case({}, ({"init": "pissa", "rank": 4},)),
    "English only, float16": Case({"multilingual": False, "dtype": "float16"}, ({},)),
    "128 mels, few decoder layers (turbo)": Case(
        {"mels": 128, "encoder_layers": 3, "decoder_layers": 1, "encoder_heads": 8, "seconds": 5}, ({},)
    ),
    "deep encoder, shards (distil)": Case({"encoder_layers": 4, "ffn": 96, "shard": "200KB", "seconds": 5}, ({},)),
    "30 seconds": Case({"seconds": 30, "d_model": 32, "heads": 2}, ({},)),
    "nothing suppressed, no timestamps": Case(
        {"suppress_tokens": None, "begin_suppress_tokens": (), "timestamps": False, "seconds": 5}, ({},)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_shape_passes(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    base = make_base(tmp_path / "base", **SHORT | {"seconds": 8} | case.base)
    adapters = tuple(
        AdapterSource(f"adapter{index}", make_adapter(base, tmp_path / f"adapter{index}", **settings))
        for index, settings in enumerate(case.adapters)
    )
    manifest = export_bundle(
        ExportOptions(base=str(base), adapters=adapters, output=tmp_path / "bundle", sample_audio=sample_paths())
    )
    report = manifest.parity["fp32"]
    assert report.max_logit_difference <= TOLERANCE * report.largest_logit
    assert report.adapter_effects.keys() == {adapter.name for adapter in adapters}
    assert all(effect > 100 * report.max_logit_difference for effect in report.adapter_effects.values())
    assert report.tokens_compared > 0
    assert report.rules == REPLAYED_RULES


# --- A broken graph makes the gate fail ---


@dataclass(frozen=True)
class Gated:
    """A bundle, what it was made from, and the gate over a changed copy of it."""

    bundle: Path
    base: Path
    adapters: tuple[Path, ...]

    def check(self, directory: Path | None = None, manifest: Manifest | None = None) -> ParityReport:
        directory = directory or self.bundle
        manifest = manifest or read_manifest(directory)
        openers = [peft_row(adapter) for adapter in self.adapters]
        return check_parity(directory, manifest, samples(), self.base, openers)


@cache
def samples() -> Sequence[NDArray[np.float32]]:
    front_end = dataclasses.make_dataclass("FrontEnd", ["sample_rate", "window_samples", "window_seconds"])
    return load_clips(sample_paths(), front_end(16000, 128000, 8.0))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Gated:
    """Half of the vocabulary must not be written: what forgets to suppress it writes something else."""
    folder = tmp_path_factory.mktemp("gated")
    base = make_base(folder / "base", **SHORT, suppress_tokens=range(0, 250, 2), begin_suppress_tokens=range(1, 250, 2))
    adapters = tuple(make_adapter(base, folder / f"a{seed}", rank=seed + 2, seed=seed) for seed in range(2))
    sources = tuple(AdapterSource(path.name, path) for path in adapters)
    options = ExportOptions(
        base=str(base), adapters=sources, output=folder / "bundle", rule="paper", sample_audio=sample_paths()
    )
    export_bundle(options)
    return Gated(options.output, base, adapters)


def edit_weight(path: Path, name: str, change: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> None:
    """Changes one tensor where it lies in the external data."""
    (tensor,) = (item for item in onnx.load(path, load_external_data=False).graph.initializer if item.name == name)
    about = {entry.key: entry.value for entry in tensor.external_data}
    data = np.memmap(path.with_name(about["location"]), np.float32, "r+", int(about["offset"]), tuple(tensor.dims))
    data[:] = change(np.array(data))
    data.flush()


def edit_graph(path: Path, change: Callable[[onnx.GraphProto], None]) -> None:
    model = onnx.load(path, load_external_data=False)
    change(model.graph)
    path.write_bytes(model.SerializeToString())


def node(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    (found,) = (item for item in graph.node if f"/{item.name}".endswith(f"/{name}"))
    return found


def lora_names(path: Path) -> list[str]:
    graph = onnx.load(path, load_external_data=False).graph
    return [tensor.name for tensor in graph.initializer if tensor.name.startswith("lora_")]


def one_wrong_weight(bundle: Path) -> None:
    def change(weight: NDArray[np.float32]) -> NDArray[np.float32]:
        weight[3, 5] += 0.05
        return weight

    edit_weight(bundle / DECODER_FILE, "model.decoder.layers.1.fc1.weight", change)


def one_wrong_encoder_weight(bundle: Path) -> None:
    def change(weight: NDArray[np.float32]) -> NDArray[np.float32]:
        weight[3, 5] += 0.05
        return weight

    edit_weight(bundle / ENCODER_FILE, "model.encoder.layers.0.self_attn.k_proj.weight", change)


def not_a_number(bundle: Path) -> None:
    edit_weight(bundle / DECODER_FILE, "model.decoder.layer_norm.bias", lambda weight: weight * np.nan)


def swapped_adapters(bundle: Path) -> None:
    for name in (ENCODER_FILE, DECODER_FILE):
        for lora in lora_names(bundle / name):
            edit_weight(bundle / name, lora, lambda rows: rows[:, [0, 2, 1]])


def shifted_stack(bundle: Path) -> None:
    """The base's row carries an adapter."""
    for name in (ENCODER_FILE, DECODER_FILE):
        for lora in lora_names(bundle / name):
            edit_weight(bundle / name, lora, lambda rows: rows[:, [1, 1, 2]])


def dropped(lora: str, row: int) -> Callable[[Path], None]:
    def zeroed(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        rows[:, row] = 0
        return rows

    def change(bundle: Path) -> None:
        file = ENCODER_FILE if lora.startswith("lora_cv_a") else DECODER_FILE
        edit_weight(bundle / file, lora, zeroed)

    change.__name__ = f"{lora} of row {row} dropped"
    return change


def wrong_scale(bundle: Path) -> None:
    """As if rsLoRA's alpha / sqrt(r) had been read as alpha / r, in one adapter."""

    def change(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        rows[:, 2] /= np.sqrt(3)
        return rows

    for lora in lora_names(bundle / DECODER_FILE):
        if "_b" in lora:
            edit_weight(bundle / DECODER_FILE, lora, change)


def exchanged_cache(bundle: Path) -> None:
    """The prefill is right; the first step reads keys as values."""

    def change(graph: onnx.GraphProto) -> None:
        node(graph, "layers.0/self_attn/all_k").input[0] = "past_v0"
        node(graph, "layers.0/self_attn/all_v").input[0] = "past_k0"

    edit_graph(bundle / DECODER_FILE, change)


def exchanged_static_cache(bundle: Path) -> None:
    """The same in the other form of the decoder."""

    def change(graph: onnx.GraphProto) -> None:
        node(graph, "layers.0/self_attn/all_k").input[0] = "past_v0"
        node(graph, "layers.0/self_attn/all_v").input[0] = "past_k0"

    edit_graph(bundle / DECODER_STATIC_FILE, change)


def ignored_static_padding(bundle: Path) -> None:
    def change(graph: onnx.GraphProto) -> None:
        slots = node(graph, "not_padding")
        slots.input[1] = slots.input[0]

    edit_graph(bundle / DECODER_STATIC_FILE, change)


def ignored_padding(bundle: Path) -> None:
    """Right for one utterance; in a batch, shorter prompts see their padding."""

    def change(graph: onnx.GraphProto) -> None:
        slots = node(graph, "not_padding")
        slots.input[1] = slots.input[0]

    edit_graph(bundle / DECODER_FILE, change)


def ignored_order(bundle: Path) -> None:
    """Right in every step; in the prefill, tokens see those behind them."""

    def change(graph: onnx.GraphProto) -> None:
        slots = node(graph, "not_ahead")
        slots.input[1] = slots.input[0]

    edit_graph(bundle / DECODER_FILE, change)


def wrong_selection(bundle: Path) -> None:
    """Logits are right; where the paper takes the least confident row, the most confident one is taken."""

    def change(graph: onnx.GraphProto) -> None:
        (worst,) = (item for item in graph.node if item.op_type == "ArgMin")
        worst.op_type = "ArgMax"

    edit_graph(bundle / DECODER_FILE, change)


def forgotten_threshold(bundle: Path) -> None:
    def change(graph: onnx.GraphProto) -> None:
        node(graph, "selection/above").input[1] = node(graph, "selection/minus_tau").output[0]

    edit_graph(bundle / DECODER_FILE, change)


def edit_manifest(**changes: Any) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        write_manifest(dataclasses.replace(read_manifest(bundle), **changes), bundle)

    change.__name__ = f"manifest with {changes}"
    return change


def wrong_front_end(bundle: Path) -> None:
    audio = read_manifest(bundle).audio
    edit_manifest(audio=dataclasses.replace(audio, n_fft=512))(bundle)


LOGITS, TOKENS, FEATURES = "logits differ", "Sample", "features"
FAULTS: list[tuple[Callable[[Path], None], str]] = [
    (one_wrong_weight, LOGITS),
    (one_wrong_encoder_weight, LOGITS),
    (not_a_number, LOGITS),
    (swapped_adapters, LOGITS),
    (shifted_stack, r"row 0 \(base\)"),
    *((dropped(f"lora_{target}_b1", 1), r"row 1 \(a0\)") for target in ("sq", "sv", "cq", "cv")),
    (dropped("lora_cv_a0", 2), r"row 2 \(a1\)"),
    (wrong_scale, r"row 2 \(a1\)"),
    (exchanged_cache, r"step \d"),
    (exchanged_static_cache, r"decoder_static\.onnx.*step \d"),
    (ignored_padding, "decoder.onnx.*batch of 2"),
    (ignored_static_padding, r"decoder_static\.onnx.*batch of 2"),
    (ignored_order, LOGITS),
    (wrong_selection, f"{TOKENS}.*paper"),
    (forgotten_threshold, f"{TOKENS}.*paper"),
    (edit_manifest(begin_suppress_tokens=()), f"{TOKENS}.*step 1:"),
    (edit_manifest(suppress_tokens=()), TOKENS),
    (wrong_front_end, FEATURES),
]


def test_the_untouched_bundle_passes(gated: Gated) -> None:
    report = gated.check()
    assert report.max_logit_difference > 0  # two implementations, not one compared with itself
    assert report.tolerance == pytest.approx(TOLERANCE)
    assert report.tokens_compared == 2 * 20 + 2 * 3 * 20  # shared by all rows, and each row's own


@pytest.mark.parametrize(("fault", "message"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_a_broken_bundle_fails(gated: Gated, tmp_path: Path, fault: Callable[[Path], None], message: str) -> None:
    bundle = shutil.copytree(gated.bundle, tmp_path / "bundle")
    fault(bundle)
    with pytest.raises(ParityError, match=message):
        gated.check(bundle)


def test_a_bundle_from_before_the_static_decoder_passes(gated: Gated, tmp_path: Path) -> None:
    bundle = shutil.copytree(gated.bundle, tmp_path / "bundle")
    (bundle / DECODER_STATIC_FILE).unlink()
    files = {name: digest for name, digest in read_manifest(bundle).files.items() if name != DECODER_STATIC_FILE}
    edit_manifest(files=files)(bundle)
    assert gated.check(bundle).tokens_compared == gated.check().tokens_compared


def test_a_network_that_amplifies_rounding_is_judged_by_pytorchs_own_error(
    gated: Gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if this network were one whose float32 is off by more than the tolerance, in PyTorch too."""
    monkeypatch.setattr("das_asr.export.parity.TOLERANCE", 1e-9)
    report = gated.check()
    assert report.max_logit_difference <= report.tolerance * report.largest_logit
    assert report.tolerance < 1e-4
    bundle = shutil.copytree(gated.bundle, tmp_path / "bundle")
    one_wrong_weight(bundle)
    with pytest.raises(ParityError, match=LOGITS):
        gated.check(bundle)


def test_adapters_in_another_order_fail(gated: Gated) -> None:
    with pytest.raises(ParityError, match=LOGITS):
        dataclasses.replace(gated, adapters=gated.adapters[::-1]).check()


def test_an_adapter_without_effect_fails(gated: Gated, tmp_path: Path) -> None:
    faint = make_adapter(gated.base, tmp_path / "faint", scale_b=1e-8)
    options = ExportOptions(
        base=str(gated.base),
        adapters=(AdapterSource("faint", faint),),
        output=tmp_path / "bundle",
        sample_audio=sample_paths(),
    )
    with pytest.raises(ParityError, match="'faint' changes nothing measurable"):
        export_bundle(options)
    assert not options.output.exists()


def test_adapters_of_the_bundle_serve_as_oracle_too(gated: Gated, tmp_path: Path) -> None:
    """What `das-export verify` does when the PEFT checkpoints are gone; the model is as before after each row."""
    manifest = read_manifest(gated.bundle)
    adapters = [
        load_adapter(gated.bundle / "adapters" / f"{entry.name}.safetensors", entry.name, manifest.dimensions)
        for entry in manifest.adapters
    ]
    openers = [delta_row(adapter) for adapter in adapters]
    by_delta = check_parity(gated.bundle, manifest, samples(), gated.base, openers)
    assert by_delta.adapter_effects == pytest.approx(manifest.parity["fp32"].adapter_effects, rel=1e-4)
    bundle = shutil.copytree(gated.bundle, tmp_path / "bundle")
    wrong_scale(bundle)
    with pytest.raises(ParityError, match=r"row 2 \(a1\)"):
        check_parity(bundle, manifest, samples(), gated.base, openers)


# --- What is accepted ---

END = 9


def trace(*steps: tuple[int, float, float]) -> RowTrace:
    """(token, confidence, margin in logits) of each step."""
    tokens, confidences, margins = zip(*steps, strict=True)
    return RowTrace(np.array(tokens), np.log(confidences), np.array(margins, np.float64))


def judge(product: Written, *oracle: RowTrace) -> tuple[int, int]:
    found = compare(product, oracle, end_of_text=END, limit=3, tau=0.1, tolerance=0.001)
    return found.compared, found.differing


def shared(*tokens: tuple[int, int], rows: int = 2) -> Written:
    """A text of (token, row) under the paper's rule."""
    ids, chosen = zip(*tokens, strict=True)
    return Written(0, "paper", (ids,) * rows, chosen)


SURE = (4, 0.5, 1.0)
BASE = trace(SURE, (END, 0.5, 1.0))


def test_the_same_tokens_and_rows_pass() -> None:
    assert judge(shared((4, 0), (END, 1)), BASE, trace(SURE, (END, 0.7, 1.0))) == (2, 0)


def test_another_token_fails_unless_the_oracle_is_undecided() -> None:
    with pytest.raises(ParityError, match="step 1: the runtime wrote token 5 of row 0"):
        judge(shared((5, 0), (END, 0)), BASE, BASE)
    assert judge(shared((5, 0), (END, 0)), trace((4, 0.5, 0.0015), (END, 0.5, 1.0)), BASE) == (1, 1)


def test_another_row_fails_unless_the_oracle_is_undecided() -> None:
    text = shared((4, 1), (END, 0))
    with pytest.raises(ParityError, match="of row 1, transformers and PEFT write 4 of row 0"):
        judge(text, BASE, trace((4, 0.55, 1.0), (END, 0.5, 1.0)))
    assert judge(text, BASE, trace((4, 0.599, 1.0), (END, 0.5, 1.0))) == (1, 1)


def test_an_undecided_row_does_not_excuse_a_wrong_token() -> None:
    with pytest.raises(ParityError, match="wrote token 6 of row 1"):
        judge(shared((6, 1), (END, 0)), BASE, trace((4, 0.599, 1.0), (END, 0.5, 1.0)))


def test_nothing_is_compared_behind_an_accepted_difference() -> None:
    undecided = trace((4, 0.5, 0.0), (7, 0.5, 1.0), (7, 0.5, 1.0))
    assert judge(shared((5, 0), (6, 0), (6, 0), rows=1), undecided) == (1, 1)


@pytest.mark.parametrize("tokens", [((4, 0),), ((END, 0), (4, 0), (4, 0)), ((4, 0), (4, 0), (4, 0), (4, 0))])
def test_a_text_must_end_at_its_end(tokens: tuple[tuple[int, int], ...]) -> None:
    """Neither before the end-of-text, nor behind it, nor beyond the limit."""
    with pytest.raises(ParityError, match="stopped after"):
        judge(shared(*tokens, rows=1), trace(*[(token, 0.5, 1.0) for token, _ in tokens]))


def own(winner: int, *tokens: tuple[int, ...]) -> Written:
    return Written(0, "hypothesis", tokens, (winner,) * len(tokens[winner]))


def test_own_histories_are_compared_row_by_row() -> None:
    texts = own(1, (4, END), (5, 6, 7))
    rows = (trace(SURE, (END, 0.5, 1.0)), trace((5, 0.6, 1.0), (6, 0.6, 1.0), (7, 0.6, 1.0)))
    assert judge(texts, *rows) == (5, 0)
    with pytest.raises(ParityError, match="step 2: row 1 of the runtime wrote token 6"):
        judge(texts, rows[0], trace((5, 0.6, 1.0), (8, 0.6, 1.0), (7, 0.6, 1.0)))
    assert judge(texts, rows[0], trace((5, 0.6, 1.0), (8, 0.6, 0.0), (7, 0.6, 1.0))) == (4, 1)


def test_the_best_text_must_win_unless_two_are_equally_good() -> None:
    texts = own(0, (4, END), (5, END))
    with pytest.raises(ParityError, match="chose the text of row 0, transformers and PEFT that of row 1"):
        judge(texts, BASE, trace((5, 0.6, 1.0), (END, 0.6, 1.0)))
    assert judge(texts, BASE, trace((5, 0.501, 1.0), (END, 0.5, 1.0))) == (4, 1)


@pytest.mark.parametrize(
    ("confidences", "row", "gap"),
    [
        ([0.5], 0, 0.1),
        ([0.5, 0.55, 0.45], 0, 0.05),
        ([0.5, 0.6, 0.3], 1, 0.0),  # exactly tau above: the first condition goes before the second
        ([0.5, 0.55, 0.3], 2, 0.05),
        ([0.5, 0.7, 0.7], 1, 0.0),  # a tie goes to the lowest row
        ([0.5, 0.3, 0.3], 1, 0.0),
        ([0.5, 0.9, 0.7], 1, 0.2),
    ],
)
def test_the_papers_rule(confidences: list[float], row: int, gap: float) -> None:
    chosen, found = paper_choice(np.array(confidences), 0.1 - 1e-12)
    assert chosen == row
    assert found == pytest.approx(gap, abs=1e-9)
