"""Resident memory, measured in a process of its own: closing gives back what loading took, use adds nothing to it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bundles import make_bundle
from tests.checkpoints import make_adapter, make_base

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc/self/statm")

_PRELUDE = """
import itertools, json, os, random, sys
import numpy as np
from das_asr.runtime import Transcriber

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def noise(seconds, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, round(16000 * seconds)).astype(np.float32)

def load(bundle):
    return Transcriber.load(bundle, threads=1)
"""

_CLOSE = """
small, large = sys.argv[1:]
def round_trip(bundle):
    before = resident()
    transcriber = load(bundle)
    loaded = resident()
    for rule in ("hypothesis", "paper"):
        transcriber.transcribe(noise(4), sample_rate=16000, language="en", rule=rule, adapters=("music",))
    used = resident()
    transcriber.close()
    return {"before": before, "loaded": loaded, "used": used, "closed": resident()}

round_trip(small)  # what the interpreter and the libraries take once belongs to no bundle
print(json.dumps([round_trip(large) for _ in range(2)]))
"""

_SOAK = """
transcriber = load(sys.argv[1])
choose = random.Random(0)
choices = list(itertools.product(
    ("hypothesis", "paper", "gain", "base"), (None, ("music",), ("sports", "weather")), (0.6, None)))

def transcribe(count):
    for index in range(count):
        rule, adapters, threshold = choose.choice(choices)
        batch = [noise(choose.uniform(0.2, 8), index)] * choose.choice((1, 1, 2))
        transcriber.transcribe_batch(
            batch, sample_rate=16000, rule=rule, adapters=adapters, no_speech_threshold=threshold)

# The engine keeps what its largest request needed, so that one comes first: a full window until the table is full.
end = transcriber.manifest.tokens.end_of_text
transcriber.transcribe_batch(
    [noise(8)] * 2, sample_rate=16000, rule="hypothesis", prompt="and so on " * 40, suppress_tokens=[end])
transcribe(60)
warm = resident()
transcribe(500)
print(json.dumps({"warm": warm, "end": resident()}))
"""


def measure(script: str, *arguments: Path) -> Any:
    command = [sys.executable, "-c", _PRELUDE + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small bundle, and one with about 50 MB of weights."""
    folder = tmp_path_factory.mktemp("memory")
    made = []
    for name, sizes in (
        ("small", {"d_model": 32}),
        ("large", {"d_model": 256, "encoder_layers": 6, "decoder_layers": 6}),
    ):
        base = make_base(folder / f"{name}-base", **sizes)
        adapters = {"music": make_adapter(base, folder / f"{name}-adapter", rank=16)}
        adapters["sports"] = adapters["music"]
        made.append(make_bundle(base, adapters, folder / name))
    return made[0], made[1]


def test_closing_gives_back_what_loading_and_use_took(bundles: tuple[Path, Path]) -> None:
    weights = sum(path.stat().st_size for path in bundles[1].glob("*.data"))
    for sizes in measure(_CLOSE, *bundles):
        taken = sizes["loaded"] - sizes["before"]
        kept = sizes["closed"] - sizes["before"]
        assert taken > 0.8 * weights, f"{sizes}: too little was loaded for a measurement"
        assert kept < 0.1 * taken, f"{kept / 2**20:.1f} of {taken / 2**20:.1f} MiB were kept after close()"


@pytest.mark.soak
def test_five_hundred_transcriptions_do_not_grow_the_process(demo_bundle: Path) -> None:
    sizes = measure(_SOAK, demo_bundle)
    growth = sizes["end"] / sizes["warm"] - 1
    assert growth < 0.02, f"resident memory grew by {growth:.1%} from {sizes['warm'] / 2**20:.1f} MiB"
