"""The language of systems and its refusals."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from das_asr.benchmarks.wer_plan import make_pools
from das_asr.benchmarks.wer_reading import Reading
from das_asr.benchmarks.wer_replay import SharedRule
from das_asr.benchmarks.wer_systems import System, all_systems, parse_system, parse_systems, read_systems
from das_asr.runtime.errors import AdapterError, BundleError, OptionError


@pytest.mark.parametrize(
    ("text", "system"),
    [
        ("base", System("base", "base")),
        ("hypothesis,score=total", System("hypothesis,score=total", "hypothesis", None, {"score": "total"})),
        ("s=hypothesis,switch-cost=.5", System("s", "hypothesis", None, {"switch_cost": 0.5})),
        ("DAS=gain,tau=0.1", System("DAS", "gain", None, {"tau": 0.1})),
        ("a b=hypothesis,base-bias=-1", System("a b", "hypothesis", None, {"base_bias": -1.0})),
        ("h=hypothesis,include_base=no", System("h", "hypothesis", None, {"include_base": False})),
        ("o=oracle,adapters=music+weather", System("o", "oracle", None, {"adapters": ("music", "weather")})),
        ("ft=build/ft", System("ft", "", Path("build/ft"))),
        ("ft=./ft:paper,tau=.2", System("ft", "paper", Path("./ft"), {"tau": 0.2})),
        ("ft=/a=b/c:base", System("ft", "base", Path("/a=b/c"))),
    ],
)  # fmt: skip
def test_descriptions(text: str, system: System) -> None:
    assert parse_system(text) == system
    assert parse_system(f"{system.name}={system.description}" if system.folder else system.description) == (
        system if system.folder else System(system.description, system.kind, None, system.choices)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gain,tau=2", "between 0 and 1"),
        ("gain,tau=x", "'x' is not a value for tau"),
        ("gain,score=mean", "gain takes adapters, tau"),
        ("base,tau=0.1", "base takes nothing"),
        ("hypothesis,score=best", "expected one of mean, total, root"),
        ("hypothesis,switch_cost=-1", "at least 0"),
        ("hypothesis,switch_cost=x", "'x' is not a value for switch_cost"),
        ("paper,switch_cost=1", "paper takes adapters, tau"),
        ("hypothesis,speed=1", "KEY=VALUE is expected"),
        ("hypothesis,include_base=perhaps", "not a value"),
        ("build/ft", "needs a name"),
        ("x=./a:,tau=1", "without a kind takes nothing"),
        ("", "neither what it is nor where"),
    ],
)
def test_descriptions_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_system(text)


def test_all_stands_for_every_kind() -> None:
    systems = parse_systems(["all", "ft=./ft"], ("music",))
    assert [system.name for system in systems] == [
        "base", "music", "own", "paper", "gain", "deviation-max",
        "hypothesis", "hypothesis,score=total", "hypothesis,score=root,switch_cost=0.5", "oracle", "ft",
    ]  # fmt: skip
    assert all_systems(()) == (System("base", "base"),)
    with pytest.raises(OptionError, match="Two systems are named 'base'"):
        parse_systems(["all", "base"], ())


def test_systems_files(tmp_path: Path) -> None:
    path = tmp_path / "systems.yaml"
    path.write_text("DAS: hypothesis,score=total\nFT-Multi: build/ft:base\n")
    assert read_systems(path) == ["DAS=hypothesis,score=total", "FT-Multi=build/ft:base"]
    for broken in ("- base", "a: {b: c}", "a: [", "\0"):
        path.write_text(broken)
        with pytest.raises(OptionError, match="systems"):
            read_systems(path)


def test_pools_decode_no_more_than_is_asked_for(
    demo_bundle: Path, demo_adapters: dict[str, Path], tmp_path: Path
) -> None:
    texts = ["base", "gain", "p=paper,tau=0.3,adapters=weather+music", "sports"]
    (pool,) = make_pools(demo_bundle, parse_systems(texts, ()), print)
    assert pool.demand().own == ("sports",)
    assert pool.demand().shared == (
        SharedRule("gain", 0.025, ("music", "weather", "sports")),
        SharedRule("paper", 0.3, ("music", "weather")),
    )
    (pool,) = make_pools(demo_bundle, [parse_system(f"LoRA multi={demo_adapters['music']}")], print)
    assert pool.demand().own == ("LoRA-multi",)
    assert pool.extra == {"LoRA-multi": demo_adapters["music"]}
    (tmp_path / "bundle").symlink_to(demo_bundle)
    default, further = make_pools(demo_bundle, [parse_system(f"x={tmp_path}/bundle")], print)
    assert not default.entrants
    assert further.entrants[0].kind == "hypothesis"


def test_forms_of_hypothesis_share_one_decoding(demo_bundle: Path) -> None:
    texts = ["hypothesis", "hypothesis,score=total", "hypothesis,score=root", "hypothesis,score=root,switch_cost=0.5"]
    texts += ["again=hypothesis,switch_cost=0.5,score=root", "few=hypothesis,adapters=music,switch_cost=0"]
    (pool,) = make_pools(demo_bundle, parse_systems(texts, ()), print)
    rows = ("base", "music", "weather", "sports")
    assert pool.demand().own == rows[1:]
    assert not pool.demand().shared
    assert pool.demand().readings == (
        Reading(rows=rows, score="root"),
        Reading(rows=rows, score="root", switch_cost=0.5),
        Reading(rows=rows[:2], switch_cost=0.0),
    )
    assert [entrant.exponent for entrant in pool.entrants[:2]] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rock", "neither an adapter of the bundle"),
        ("gain,adapters=rock", "'rock' is neither"),
        ("x=./nowhere:base", "is not a bundle"),
        ("music={music}", "Two adapters are named"),
        ("x={music}:paper", "decodes alone"),
    ],
)
def test_systems_that_do_not_fit(text: str, message: str, demo_bundle: Path, demo_adapters: dict[str, Path]) -> None:
    with pytest.raises(OptionError, match=message):
        make_pools(demo_bundle, [parse_system(text.format(music=demo_adapters["music"]))], print)


def test_a_damaged_folder_is_refused_before_decoding(
    demo_bundle: Path, demo_adapters: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(demo_adapters["music"], tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(AdapterError):
        make_pools(demo_bundle, [parse_system(f"x={tmp_path}/adapter")], print)
    shutil.copytree(demo_bundle, tmp_path / "bundle")
    (tmp_path / "bundle" / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError):
        make_pools(demo_bundle, [parse_system(f"x={tmp_path}/bundle:base")], print)
