"""Precision variants: what they hold, that they write what float32 writes, and that requests stay independent."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from das_asr.export import AdapterSource, ExportOptions, export_bundle, variants
from das_asr.export.precision import write_variant
from das_asr.runtime import Hypothesis, Transcriber, Transcription
from das_asr.runtime.audio import load_audio
from das_asr.runtime.backends import BackendOptions, create_backend
from das_asr.runtime.contract import integer_cross_specs, lora_specs
from das_asr.runtime.errors import DataError, ExportError, OptionError, ParityError
from das_asr.runtime.manifest import Manifest, VariantReport, read_manifest
from das_asr.runtime.scheduler import SchedulerOptions
from tests.bundles import make_bundle
from tests.checkpoints import make_base

NAMES = ("int8", "int4")


@pytest.fixture(scope="module")
def bundle(
    demo_base: Path, demo_adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, one_torch_thread: None
) -> Path:
    output = tmp_path_factory.mktemp("variants") / "bundle"
    sources = tuple(AdapterSource(name, folder) for name, folder in demo_adapters.items())
    # The demo's network is small, and small ones feel quantisation most: the gate is tested by itself.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "MOST_DIFFERENT", 1.0)
        export_bundle(ExportOptions(base=str(demo_base), adapters=sources, output=output, precisions=("fp32", *NAMES)))
    return output


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return read_manifest(bundle)


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_is_smaller_and_keeps_the_adapters(bundle: Path, manifest: Manifest, name: str) -> None:
    for graph in ("encoder.onnx", "decoder.onnx"):
        assert f"{name}/{graph}.data" in manifest.files
        exact, smaller = (onnx.load(bundle / folder / graph) for folder in ("", name))
        scales = {spec.name for spec in integer_cross_specs(manifest.dimensions) if "scale" in spec.name}
        exact_names, names = ([value.name for value in model.graph.input] for model in (exact, smaller))
        assert set(names) - scales == set(exact_names)
        adapters = {spec.name for spec in lora_specs(manifest.dimensions)}
        weights = {item.name: item for item in smaller.graph.initializer}
        for item in exact.graph.initializer:
            if item.name in adapters:
                np.testing.assert_array_equal(numpy_helper.to_array(weights[item.name]), numpy_helper.to_array(item))
        constant = [node.name for node in smaller.graph.node if node.op_type == "MatMul" and node.input[1] in weights]
        assert all("lora" in name for name in constant)
    sizes = [(bundle / folder / "decoder.onnx.data").stat().st_size for folder in ("", name)]
    adapters_size = sum(file.stat().st_size for file in (bundle / "adapters").iterdir())
    assert sizes[1] - adapters_size < (sizes[0] - adapters_size) / 2


@pytest.mark.parametrize("name", NAMES)
def test_little_changes(manifest: Manifest, name: str) -> None:
    report = manifest.variants[name]
    assert report.tokens_compared > 100
    assert report.disagreement < 0.12
    assert (report.words, report.wer) == (0, None)


def test_embeddings_come_from_the_output_layer(bundle: Path, manifest: Manifest) -> None:
    """Logits of a prompt, with the token table of float32 and with that of the blocks."""
    model = onnx.load(bundle / "int8" / "decoder.onnx", load_external_data=False)
    assert "model.decoder.embed_tokens.weight" not in {item.name for item in model.graph.initializer}
    head = next(node for node in model.graph.node if node.name.startswith("decoder/lm_head"))
    gathered = {node.input[0] for node in model.graph.node if node.op_type == "Gather"}
    assert set(head.input[1:3]) <= gathered


@pytest.fixture(scope="module")
def crowd(demo_base: Path, demo_adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many rows as it takes for products of whole rows."""
    adapters = {f"{name}-{copy}": folder for copy in range(3) for name, folder in demo_adapters.items()}
    folder = make_bundle(demo_base, adapters, tmp_path_factory.mktemp("crowd") / "bundle")
    write_variant(folder, "int8", read_manifest(folder).dimensions)
    return folder


def opened(folder: Path, precision: str) -> Transcriber:
    manifest = dataclasses.replace(read_manifest(folder), precisions=("fp32", "int8"))
    backend = create_backend("onnxruntime", folder, manifest, BackendOptions(threads=1), precision)
    return Transcriber(manifest, folder, backend, SchedulerOptions())


def test_many_rows_have_products_of_whole_rows(crowd: Path, demo_audio: list[tuple[Path, str, str]]) -> None:
    graph = onnx.load(crowd / "int8" / "decoder.onnx", load_external_data=False).graph
    assert "MatMulNBits" not in {node.op_type for node in graph.node}
    assert not {"model.decoder.embed_tokens.weight"} & {item.name for item in graph.initializer}
    clips = [path for path, _, _ in demo_audio[:5]]
    with opened(crowd, "fp32") as exact, opened(crowd, "int8") as rounded:
        wanted = [exact.transcribe(clip) for clip in clips]
        alone = [rounded.transcribe(clip) for clip in clips]
        few = rounded.transcribe(clips[0], adapters=("music-1",))
        together = rounded.transcribe_batch(clips)
    rows = [(a, b) for one, other in zip(wanted, alone, strict=True) for a, b in rows_of(one, other)]
    assert sum(a.text == b.text for a, b in rows) > 0.8 * len(rows)
    # What a row writes does not depend on the others, nor on the other utterances.
    assert few.hypotheses[1].tokens == alone[0].hypotheses[4].tokens
    assert few.hypotheses[1].score == pytest.approx(alone[0].hypotheses[4].score, abs=1e-4)
    for one, other in zip(alone, together, strict=True):
        for a, b in rows_of(one, other):
            assert (a.text, a.score) == (b.text, pytest.approx(b.score, abs=1e-4))


def rows_of(one: Transcription, other: Transcription) -> Iterator[tuple[Hypothesis, Hypothesis]]:
    return zip(one.hypotheses, other.hypotheses, strict=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_request_gets_the_same_alone_and_in_company(
    bundle: Path, demo_audio: list[tuple[Path, str, str]], name: str
) -> None:
    clips = [path for path, _, _ in demo_audio[:5]]
    with Transcriber.load(bundle, precision=name) as transcriber:
        alone = [transcriber.transcribe(clip) for clip in clips]
        together = transcriber.transcribe_batch(clips)
    assert [result.text for result in together] == [result.text for result in alone]
    for one, other in zip(alone, together, strict=True):
        for a, b in zip(one.hypotheses, other.hypotheses, strict=True):
            assert a.score == pytest.approx(b.score, abs=1e-4)


def test_adapters_come_and_go(
    bundle: Path, demo_adapters: dict[str, Path], demo_audio: list[tuple[Path, str, str]]
) -> None:
    samples = load_audio(demo_audio[0][0], target_rate=16_000)
    with Transcriber.load(bundle, precision="int8") as transcriber:
        before = transcriber.transcribe(samples, sample_rate=16_000, adapters=("music",))
        transcriber.unload_adapter("music")
        transcriber.load_adapter("song", demo_adapters["music"])
        after = transcriber.transcribe(samples, sample_rate=16_000, adapters=("song",))
    assert after.hypotheses[1].tokens == before.hypotheses[1].tokens
    assert after.hypotheses[1].score == pytest.approx(before.hypotheses[1].score, abs=1e-4)


def test_the_default_is_the_first_and_others_are_asked_for(bundle: Path, manifest: Manifest) -> None:
    assert manifest.graphs(bundle, None) == bundle
    assert manifest.graphs(bundle, "int8") == bundle / "int8"
    with pytest.raises(OptionError, match=r"precision is 'bf16'.*has fp32, int8, int4"):
        Transcriber.load(bundle, precision="bf16")


# --- The gate ---


def report(differing: int = 0, wer: float | None = None) -> VariantReport:
    return VariantReport(100, differing, 0 if wer is None else 2000, wer, None if wer is None else 0.1)


def test_the_gate() -> None:
    for good in (report(), report(3), report(0, 0.105), report(0, 0.05)):
        variants.check_variant("int8", good)
    with pytest.raises(ParityError, match=r"4 of 100 tokens.*4\.0%.*--force"):
        variants.check_variant("int8", report(4))
    with pytest.raises(ParityError, match=r"10\.60% on 2000 words, float32 10\.00%"):
        variants.check_variant("int8", report(0, 0.106))


def test_distance() -> None:
    for wanted, found, edits in (("kitten", "sitting", 3), ("", "ab", 2), ("ab", "", 2), ("abc", "abc", 0)):
        assert variants._distance(wanted, found) == edits


def test_a_variant_that_differs_is_refused_unless_forced(
    demo_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variants, "MOST_DIFFERENT", -1.0)
    options = {"base": str(demo_base), "output": tmp_path / "bundle", "precisions": ("int8", "fp32")}
    with pytest.raises(ParityError, match="int8"):
        export_bundle(ExportOptions(**options))
    assert not list(tmp_path.iterdir())
    with pytest.warns(UserWarning, match="Kept because of --force"):
        export_bundle(ExportOptions(**options, force=True))
    with Transcriber.load(tmp_path / "bundle") as transcriber:
        assert transcriber.manifest.precisions == ("int8", "fp32")


def test_too_little_speech_is_refused(demo_base: Path, repo: Path, tmp_path: Path) -> None:
    speech = repo / "benchmarks/demo/audio"
    options = ExportOptions(
        base=str(demo_base), output=tmp_path / "bundle", precisions=("fp32", "int8"), eval_manifest=speech
    )
    with pytest.raises(DataError, match="at least 2000 are needed"):
        export_bundle(options)
    assert not (tmp_path / "bundle").exists()


def test_word_error_rates_are_compared(
    demo_base: Path, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variants, "LEAST_WORDS", 1)
    monkeypatch.setattr(variants, "MOST_DIFFERENT", 1.0)
    monkeypatch.setattr(variants, "MOST_WORSE", 1.0)
    speech = repo / "benchmarks/demo/audio"
    rows = [json.loads(line) for line in (speech / "metadata.jsonl").read_text().splitlines()]
    options = ExportOptions(
        base=str(demo_base), output=tmp_path / "bundle", precisions=("fp32", "int8"), eval_manifest=speech
    )
    found = export_bundle(options).variants["int8"]
    assert found.words == sum(len(row["text"].split()) for row in rows)
    assert found.wer is not None
    assert found.wer_fp32 is not None
    assert abs(found.wer - found.wer_fp32) < 0.1


def test_a_width_without_blocks_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", d_model=48, seconds=2)
    with pytest.raises(ExportError, match="multiple of 32"):
        export_bundle(ExportOptions(base=str(base), output=tmp_path / "bundle", precisions=("fp32", "int8")))
    assert not (tmp_path / "bundle").exists()
