"""Tables from the result files of `gpu_check`: pure functions from results to Markdown; nothing heavy is imported.

Overhead is the time of the longer of the two lengths over that of the same system without adapters, minus one; both are
medians, for the numbers of adapters come one after the other. PEFT's mixed batch needs adapters, so it is compared with
the loop over the same base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from das_asr.benchmarks.report import PAPER_TABLE_VI
from das_asr.benchmarks.wer_report import markdown_table
from das_asr.runtime.errors import OptionError

__all__ = ["GPU_COMMAND", "GPU_MARKERS", "TITLES", "render_gpu", "render_gpu_table"]

GPU_COMMAND = "python -m das_asr.benchmarks.gpu_check"
GPU_MARKERS = ("<!-- gpu:begin -->", "<!-- gpu:end -->")

TITLES = {
    "transformers": "transformers, base only",
    "transformers-compiled": "transformers, compiled, base only",
    "sequential-lora": "PyTorch, sequential LoRA",
    "peft-mixed": "PEFT, mixed batch",
    "das-onnxruntime": "DAS, ONNX Runtime",
    "das-onnxruntime-graphs": "DAS, ONNX Runtime, CUDA graphs",
    "das-ort-tensorrt": "DAS, ONNX Runtime's TensorRT",
    "das-tensorrt": "DAS, TensorRT",
    "das-tensorrt-graphs": "DAS, TensorRT, CUDA graphs",
}
"""Of the systems in the comparison, in the order of the tables."""

BARE = {"peft-mixed": "sequential-lora"}
"""Systems whose time without adapters is another's."""

Record = Mapping[str, Any]
Result = Mapping[str, Any]
Group = tuple[str, Sequence[Record]]  # precision and batch in words, and their records


def render_gpu_table(results: Sequence[Result]) -> str:
    """For the README: real-time factor and step of every system, overheads beside the paper's, the floor.

    Raises:
        OptionError: a file has no piece `table` with results.
    """
    return "\n\n".join(part for result in results for part in _tables(result))


def render_gpu(results: Sequence[Result]) -> str:
    """Everything: the README's tables, memory, what did not run, and what became of the other pieces.

    Raises:
        OptionError: a file has no piece `table` with results.
    """
    parts = ["# On a GPU"]
    for result in results:
        parts += [*_tables(result), *_memory(result), *_failures(result), _pieces(result)]
    return "\n\n".join(parts) + "\n"


# --- What is in a file ---


def _measured(result: Result) -> dict[str, Sequence[Record]]:
    """The records of every table in a file, by the piece's name, which has its settings."""
    found = {
        name: piece["result"]
        for name, piece in result["pieces"].items()
        if name.split()[0] == "table" and piece.get("result")
    }
    if not found:
        raise OptionError(f"The result has no piece `table` with figures. Run `{GPU_COMMAND} table` on a GPU.")
    return found


def _piece(result: Result, name: str) -> Mapping[str, Any]:
    """What a piece found; nothing where it was not run, or failed."""
    found: Mapping[str, Any] = result["pieces"].get(name, {}).get("result") or {}
    return found


def _groups(records: Sequence[Record]) -> Iterator[Group]:
    """Records that ran beside each other, whatever the number of adapters."""
    for precision, batch in dict.fromkeys((record["precision"], record["batch"]) for record in records):
        same = [record for record in records if (record["precision"], record["batch"]) == (precision, batch)]
        ran = [record for record in same if "error" not in record]
        if ran:
            yield f"{precision}, {batch} utterance{'s' * (batch > 1)} at a time", ran


def _by_system(records: Sequence[Record]) -> dict[str, dict[int, Record]]:
    """Records by system, in the order of the tables, and number of adapters."""
    found: dict[str, dict[int, Record]] = {}
    for name in TITLES:
        mine = {record["domains"]: record for record in records if record["system"] == name}
        if mine:
            found[name] = mine
    return found


def _domains(records: Sequence[Record]) -> list[int]:
    return sorted({record["domains"] for record in records})


# --- Tables ---


def _tables(result: Result) -> Iterator[str]:
    for name, records in _measured(result).items():
        yield _caption(result, name)
        for title, ran in _groups(records):
            yield f"{title}:"
            yield _grid("RTF (ms per step) by domains", ran, _time_cell)
            if overheads := _overheads(ran):
                yield overheads
        yield from _floor(result, records)


def _caption(result: Result, name: str) -> str:
    """Which GPU, which versions, and the settings as the piece has them."""
    about = _piece(result, "environment")
    if not about:
        return f"On a machine that the file does not describe (no piece `environment`); `{name}`."
    gpu, versions = about["gpu"], about["versions"]
    where = gpu.get("name") or about["machine"]["processor"]
    named = ("torch", "transformers", "peft", "onnxruntime", "onnxruntime-gpu")
    packages = ", ".join(f"{package} {versions[package]}" for package in named if package in versions)
    return f"{where}; medians of the repeats; `{name}`; {packages}; {about['date'][:10]}."


def _grid(title: str, records: Sequence[Record], cell: Callable[[Record], str]) -> str:
    """Systems by numbers of adapters."""
    counts = _domains(records)
    rows = []
    for name, mine in _by_system(records).items():
        rows.append([TITLES[name], *(cell(mine[count]) if count in mine else "-" for count in counts)])
    return markdown_table([title, *map(str, counts)], rows)


def _time_cell(record: Record) -> str:
    return f"{record['rtf']:.5f} ({record['step_ms']['median']:.2f})"


def _overheads(records: Sequence[Record]) -> str:
    """What adapters add to each system's own time, beside the paper's; nothing where there is nothing to compare."""
    found = _by_system(records)
    bare = {name: found.get(BARE.get(name, name), {}).get(0) for name in found}
    systems = [name for name in found if bare[name] is not None and max(found[name]) > 0]
    rows = []
    for count in (count for count in _domains(records) if count):
        paper = PAPER_TABLE_VI.get(count, {})
        cells = [_percent(paper.get(kind)) for kind in ("parallel", "sequential")]
        rows.append(
            [str(count), *cells, *(_percent(_overhead(found[name].get(count), bare[name])) for name in systems)]
        )
    if not rows or not systems:
        return ""
    head = ["domains", "parallel, DAS paper", "sequential, DAS paper", *(TITLES[name] for name in systems)]
    caption = "Overhead over 0 domains, beside Table VI of the DAS paper (arXiv 2501.12501, on a V100 GPU):"
    return f"{caption}\n\n{markdown_table(head, rows)}"


def _overhead(adapted: Record | None, bare: Record | None) -> float | None:
    if adapted is None or bare is None:
        return None
    return float(adapted["total_ms"]["median"] / bare["total_ms"]["median"] - 1)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _floor(result: Result, records: Sequence[Record]) -> Iterator[str]:
    """How close steps come to what the memory and the launches allow."""
    known = [record for record in records if "demand" in record]
    rates = _piece(result, "floor")
    if not known or not rates:
        return
    yield (
        f"The floor: this GPU reads and writes {rates['copy_bytes_per_second'] / 1e9:.0f} GB/s when it copies, and an "
        f"empty node of a CUDA graph takes {1e6 * rates['graph_node_seconds']:.2f} us. A step takes at least the "
        "longer of the two times; the shares say how close it comes."
    )
    head = ["system", "precision", "batch", "domains", "ms per step", "MB read", "ms at that rate", "%"]
    rows = [_floor_cells(record, rates) for record in known]
    yield markdown_table([*head, "kernels", "ms of empty ones", "%"], rows)


def _floor_cells(record: Record, rates: Mapping[str, float]) -> list[str]:
    step, read, kernels = record["step_ms"]["median"], record["demand"]["step"]["bytes"], record["step_kernels"]
    cells = [TITLES[record["system"]], record["precision"], str(record["batch"]), str(record["domains"]), f"{step:.3f}"]
    for amount, seconds in (
        (f"{read / 1e6:.1f}", read / rates["copy_bytes_per_second"]),
        (f"{kernels:.0f}", kernels * rates["graph_node_seconds"]),
    ):
        cells += [amount, f"{1e3 * seconds:.3f}", f"{1e5 * seconds / step:.0f}"]
    return cells


# --- The rest ---


def _memory(result: Result) -> Iterator[str]:
    for records in _measured(result).values():
        for title, ran in _groups(records):
            if any(record["memory_bytes"] is not None for record in ran):
                yield f"Memory of the device, {title}:"
                yield _grid("MiB by domains", ran, _memory_cell)


def _memory_cell(record: Record) -> str:
    return "-" if record["memory_bytes"] is None else f"{record['memory_bytes'] / 2**20:.0f}"


def _failures(result: Result) -> Iterator[str]:
    """Systems that did not run, with their reasons; where one is the same for several, it is told once."""
    reasons: dict[tuple[str, str], dict[str, None]] = {}
    for records in _measured(result).values():
        for record in (record for record in records if "error" in record):
            where = f"{record['precision']}, batch {record['batch']}, {record['domains']} domains"
            reasons.setdefault((record["system"], record["error"].splitlines()[0]), {})[where] = None
    if reasons:
        rows = [[TITLES[name], "; ".join(where), reason] for (name, reason), where in reasons.items()]
        yield "Did not run:\n\n" + markdown_table(["system", "where", "reason"], rows)


def _pieces(result: Result) -> str:
    rows = [[f"`{name}`", _outcome(piece)] for name, piece in result["pieces"].items()]
    return "Pieces of the file:\n\n" + markdown_table(["piece", "outcome"], rows)


def _outcome(piece: Mapping[str, Any]) -> str:
    for word in ("skipped", "failed"):
        if word in piece:
            return f"{word}: {piece[word].splitlines()[0]}"
    return "unfinished" if piece.get("unfinished") else f"done in {piece['seconds']} s"
