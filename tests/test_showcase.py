"""The demo's figures and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from das_asr.benchmarks.showcase import RULES, Clip, Track, read_clips, run_demo
from das_asr.runtime import OptionError


def test_the_word_error_rate_is_over_the_corpus() -> None:
    clips = [Clip("a", np.zeros(1, np.float32), "one two three", ""), Clip("b", np.zeros(1, np.float32), "four", "")]
    assert Track("", ["One, two three!", "five"]).word_error_rate(clips) == 1 / 4


def test_the_demo_reports_every_system(
    demo_bundle: Path, demo_base: Path, demo_audio: list[tuple[Path, str, str]]
) -> None:
    clips = read_clips(demo_audio[0][0].parent)[:3]
    assert [clip.text for clip in clips] == [text for _, text, _ in demo_audio[:3]]
    said: list[str] = []
    figures = run_demo(demo_bundle, demo_base, clips, said.append)
    assert list(figures["systems"]) == ["transformers", *RULES]
    assert figures["systems"]["base"]["wer"] == figures["systems"]["transformers"]["wer"]
    assert figures["systems"]["transformers"]["time_ratio"] == 1
    assert sum(line.startswith(f"  {rule}") for line in said for rule in RULES) == len(clips) * len(RULES)


@pytest.mark.parametrize(
    ("line", "message"), [(None, "no metadata.jsonl"), ({"file_name": "a.wav"}, "lacks"), ([], "lacks")]
)
def test_a_folder_without_sentences_is_refused(tmp_path: Path, line: object, message: str) -> None:
    if line is not None:
        (tmp_path / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(OptionError, match=message):
        read_clips(tmp_path)
