"""Where the time of a step and of the encoder goes: ONNX Runtime's own profile, by operator and by part of the network.

    ms of a step = its nodes, part by part + what the engine does around them + Python until the next one starts

Prefills and warm-up are left out. Writing the profile slows every node by some microseconds: compare shares, and take
times from `das-bench rtf`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from das_asr.benchmarks.models import BASE_RANDOM
from das_asr.benchmarks.systems import Work
from das_asr.benchmarks.wer_report import markdown_table
from das_asr.runtime.errors import OptionError

__all__ = ["PARTS", "ProfileOptions", "measure_profiles", "part_of", "probe_profile", "render_profiles"]

PARTS = (
    ("LoRA", r"/lora_|lora_context|/low|^cross\.\d+/[au](_|/|$)"),
    ("output layer", r"lm_head"),
    ("selection", r"^selection/"),
    ("self-attention", r"/self_attn/"),
    ("cross-attention", r"/encoder_attn/|/cross\.\d+/|^cross"),
    ("feed-forward", r"/(fc1|fc2|activation|feed_forward|final_layer_norm)(/|$)"),
    ("convolutions", r"/conv\d"),
)
"""Part of the network and the names of its nodes; the first that fits counts."""

REST = "the rest"


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """What `das-bench profile` is asked to do; as in `RtfOptions`."""

    model: str = BASE_RANDOM
    domains: tuple[int, ...] = (0, 3, 25)
    rank: int = 32
    precision: str = "fp32"
    tokens: int = 30
    threads: int = 1
    repeats: int = 3
    spinning: bool = False

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--tokens", self.tokens, 2),
            ("--repeats", self.repeats, 1),
            ("--rank", self.rank, 1),
        ):
            if value < least:
                raise OptionError(f"{flag} {value}: must be at least {least}.")
        if not self.domains or min(self.domains) < 0:
            raise OptionError("--domains: give numbers of adapters such as 0,3.")


def measure_profiles(options: ProfileOptions, log: Callable[[str], None]) -> dict[str, Any]:
    """A profile for each number of adapters, each in a process of its own; what the results file holds."""
    from das_asr.benchmarks.bundles import bundle_for
    from das_asr.benchmarks.machine import quiet_libraries
    from das_asr.benchmarks.models import adapter_folders, check_length, resolve_model
    from das_asr.benchmarks.worker import run_task

    runs = []
    with quiet_libraries():
        checkpoint = resolve_model(options.model)
        check_length(checkpoint, options.tokens)
        for domains in options.domains:
            adapters = adapter_folders(checkpoint, options.rank, domains)
            bundle = bundle_for(checkpoint, adapters, options.rank, log, precisions=("fp32", options.precision))
            work = Work(
                checkpoint, (), options.tokens, threads=options.threads, bundle=bundle, spinning=options.spinning,
                precision=options.precision,
            )  # fmt: skip
            log(f"profiling {domains} domains")
            specification = {"work": dataclasses.asdict(work), "repeats": options.repeats}
            runs.append({"domains": domains, **run_task("profile", specification, options.threads)})
    return {"runs": runs}


def probe_profile(specification: Mapping[str, Any]) -> dict[str, Any]:
    """What each process does."""
    from das_asr.benchmarks.audio import window_audio
    from das_asr.benchmarks.machine import pinned
    from das_asr.benchmarks.ours import OursSystem
    from das_asr.benchmarks.profiled import ProfiledBackend

    work = Work.parse(specification["work"])
    assert work.tokens is not None
    opened: list[ProfiledBackend] = []
    with tempfile.TemporaryDirectory() as scratch, pinned(work.threads):

        def backend(*arguments: Any) -> ProfiledBackend:
            opened.append(ProfiledBackend(Path(scratch), *arguments))
            return opened[0]

        system = OursSystem("das", work, backend)
        audio = window_audio(work.checkpoint)
        taken = [system.transcribe(audio) for _ in range(specification["repeats"] + 1)][1:]
        runs = {graph: list(_runs(path)) for graph, path in opened[0].end_profiling().items()}
    steps = [run for place, run in enumerate(runs["decoder"]) if place >= work.tokens and place % work.tokens]
    step = _told(steps)
    # Steps are measured from the start of one run to the start of the next, so the difference is Python's.
    whole = statistics.median(time for item in taken for time in item.steps)
    step["python_ms"] = 1e3 * whole - 1e-3 * statistics.median(run.whole for run in steps)
    return {"step": step, "encoder": _told(runs["encoder"][1:])}


def part_of(node: str) -> str:
    """The part of the network that a node belongs to."""
    return next((part for part, pattern in PARTS if re.search(pattern, node)), REST)


def render_profiles(result: Mapping[str, Any]) -> str:
    """Tables in Markdown, the largest term first."""
    sections = []
    for run in result["runs"]:
        for part in ("step", "encoder"):
            told = run[part]
            whole = told["run_ms"] + told.get("python_ms", 0.0)
            terms = {**told["parts_ms"], "engine around nodes": told["engine_ms"]}
            terms |= {"Python between steps": told["python_ms"]} if part == "step" else {}
            title = f"K = {run['domains']}, {part}, {whole:.2f} ms:"
            sections += [title, _shares("part", terms, whole), _operators(told, whole)]
    return "\n\n".join(sections) + "\n"


def _shares(name: str, terms: Mapping[str, float], whole: float) -> str:
    ordered = sorted(terms.items(), key=lambda item: -item[1])
    return markdown_table([name, "ms", "%"], [[term, f"{ms:.3f}", f"{100 * ms / whole:.1f}"] for term, ms in ordered])


def _operators(told: Mapping[str, Any], whole: float) -> str:
    ordered = sorted(told["operators"].items(), key=lambda item: -item[1]["ms"])
    rows = [
        [name, f"{item['calls']:g}", f"{item['ms']:.3f}", f"{100 * item['ms'] / whole:.1f}"] for name, item in ordered
    ]
    return markdown_table(["operator", "calls", "ms", "%"], rows)


@dataclass(frozen=True)
class _Run:
    """One run of a graph: its microseconds, and (node, operator, microseconds) of each node."""

    whole: float
    nodes: tuple[tuple[str, str, float], ...]


def _runs(path: Path) -> Iterator[_Run]:
    """The runs in the engine's trace, in order of time."""
    events = json.loads(path.read_text(encoding="utf-8"))
    kernels = [event for event in events if event.get("name", "").endswith("_kernel_time")]
    kernels = [event for event in kernels if event["args"]["op_name"] != "Scan"]  # the nodes of a loop count themselves
    kernels.sort(key=lambda event: event["ts"])
    place = 0
    for run in sorted((event for event in events if event.get("name") == "model_run"), key=lambda event: event["ts"]):
        nodes = []
        while place < len(kernels) and kernels[place]["ts"] < run["ts"] + run["dur"]:
            event = kernels[place]
            name = event["name"].removesuffix("_kernel_time")
            nodes.append((name, event["args"]["op_name"], float(event["dur"])))
            place += 1
        yield _Run(float(run["dur"]), tuple(nodes))


def _told(runs: Sequence[_Run]) -> dict[str, Any]:
    """Means in milliseconds over the faster half of the runs: the others were interrupted, or found the caches cold."""
    runs = sorted(runs, key=lambda run: run.whole)[: (len(runs) + 1) // 2]
    parts: Counter[str] = Counter()
    operators: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for run in runs:
        for name, operator, duration in run.nodes:
            parts[part_of(name)] += duration  # type: ignore[assignment]
            operators[operator] += duration  # type: ignore[assignment]
            calls[operator] += 1
    scale = 1e-3 / len(runs)
    whole = scale * sum(run.whole for run in runs)
    parts_ms = {part: scale * total for part, total in parts.items()}
    return {
        "run_ms": whole,
        "engine_ms": whole - sum(parts_ms.values()),
        "parts_ms": parts_ms,
        "operators": {
            name: {"ms": scale * total, "calls": calls[name] / len(runs)} for name, total in operators.items()
        },
    }
