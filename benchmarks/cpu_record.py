"""Results of the benchmarks on a CPU: one JSON file a processor and instruction set, in ``results/cpu``, and its table.

A file of a larger machine that was limited to smaller vectors says so: it imitates another processor.
"""

import datetime
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent / "results/cpu"

LIMITS = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
"""Variables that limit torch and its libraries to smaller vectors."""

NOTHING = "Not measured on a CPU."


class Row(NamedTuple):
    """A comparison. A ratio above 1: faster than the baseline."""

    case: str
    baseline: str
    ratio: float
    at_least: float
    """The benchmark fails below it."""
    goal: float
    figures: str


def write(path: Path, rows: Sequence[Row], commit: str, options: Any) -> None:
    """Write ``rows`` and where they were measured. options: pytest's."""
    import torch

    from dex.common import atomic
    from dexkernels.ops import products

    result = {
        "processor": torch.cpu.get_capabilities().get("cpu_name") or platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "limited": {name: os.environ[name] for name in LIMITS if name in os.environ},
        "products": "oneDNN" if products.uses_onednn() else "torch's own",
        "clock": "processor time" if options.processor_time else "clock",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit,
        "rows": [row._asdict() for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, json.dumps(result, indent=1) + "\n")


def load(folder: Path = FOLDER) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def tables(results: Sequence[dict[str, Any]]) -> str:
    """A heading and a table for each file."""
    return "\n\n".join(f"{_heading(result)}\n\n{_table(result['rows'])}" for result in results) or NOTHING


HEADLINES = {
    ("layer step, D 768", "loop over nn.Linear experts"): "**The layer's training step against a loop over experts**",
    ("group_ema_", "stack, multiply, sum"): "**The fused group EMA against stack, multiply, sum**",
}
"""(case, baseline) -> what the README calls it."""


def headlines(results: Sequence[dict[str, Any]]) -> str:
    """Items of a list: the comparisons of `HEADLINES` on each processor that did not imitate another one."""
    lines = []
    for key, name in HEADLINES.items():
        measured = [
            f"{row['ratio']:.1f} times as fast ({result['processor']}, {result['capability']})"
            for result in results
            if not result["limited"]
            for row in result["rows"]
            if (row["case"], row["baseline"]) == key
        ]
        text = (
            f"{', '.join(measured)}, one layer of ViT-B ([benchmarks](benchmarks/README.md))"
            if measured
            else "not measured"
        )
        lines.append(f"- {name}: {text}.")
    return "\n".join(lines)


def _heading(result: dict[str, Any]) -> str:
    limited = " and ".join(f"`{name}={value}`" for name, value in result["limited"].items())
    imitated = f", imitated on a larger processor by {limited}" if limited else ""
    threads = "one thread" if result["threads"] == 1 else f"{result['threads']} threads"
    return (
        f"**{result['capability']}**{imitated}: {result['processor']}, {result['date']}, commit "
        f"{result['commit'][:12]}, torch {result['torch']}, {threads}, medians by {result['clock']}; products by "
        f"{result['products']}{'' if result['products'] == 'oneDNN' else ' library'}."
    )


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| case | baseline | times as fast | goal | met | figures |", "|" + " --- |" * 6]
    for row in rows:
        met = "yes" if row["ratio"] >= row["goal"] else "no"
        cells = (row["case"], row["baseline"], f"{row['ratio']:.2f}", f"{row['goal']:.2f}", met, row["figures"])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
