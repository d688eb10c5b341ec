"""Results of the GPU benchmarks: one JSON file per run, checked when written and when read.

Defaults of `dexkernels.ops.backends` and the tables of the pages are made from these files by scripts/pages.py.
"""

import contextlib
import json
import math
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from dex.common import atomic

RESULTS = Path(__file__).parent / "results"

BOUND = {"float32": 2e-5, "float16": 5e-3, "bfloat16": 2e-2}
"""dtype -> largest ||result - exact|| / ||exact|| of a correct result. 2e-5 catches tf32, which is near 3e-4."""

OPS = ("route", "grouped_mlp", "align_loss", "group_ema_")
BACKENDS = ("reference", "triton", "cuda")
PRESENT = "reference"
"""The backend that runs without proven kernels, and the baseline that a candidate must beat."""

NUMBER = (int, float)
FILE = {"device": str, "date": str, "commit": str, "versions": dict, "ceilings": dict, "rows": list}
ROW = {
    "case": str,  # Begins with the operator's name, if any: "grouped_mlp forward".
    "shape": dict,  # Letters to sizes, such as {"B": 224, "N": 65}; only "routing" has text.
    "backend": str,
    "dtype": str,
    "baseline": str,
    "ms": NUMBER,  # Median.
    "baseline_ms": NUMBER,
    "ratio": NUMBER,  # baseline_ms / ms: above 1 is faster.
    "tflops": (*NUMBER, type(None)),
    "gbps": (*NUMBER, type(None)),
    "share_of_limit": (*NUMBER, type(None)),  # Shortest possible time by the ceilings / ms; None: no ceiling applies.
    "max_rel_err": NUMBER,
    "peak_mb": NUMBER,
}
CEILINGS = ("copy_gbps", "bf16_tflops")
VERSIONS = ("architecture", "python", "torch", "triton", "cuda", "driver", "dexkernels")


def problems(result: Any) -> list[str]:
    """The faults of a results file's content, by place; empty if there are none."""
    if not isinstance(result, dict) or set(result) != set(FILE):
        return [f"expected an object of {', '.join(FILE)}, got {_keys(result)}"]
    faults = [f"{k}: expected {t.__name__}, got {result[k]!r:.40}" for k, t in FILE.items() if type(result[k]) is not t]
    if faults:
        return faults
    if not result["device"]:
        faults.append("device: expected a name")
    if not re.fullmatch(r"\d{4}-[01]\d-[0-3]\d", result["date"]):
        faults.append(f"date: expected YYYY-MM-DD, got {result['date']!r}")
    if not re.fullmatch(r"[0-9a-f]{7,40}(\+changes)?", result["commit"]):
        faults.append(f"commit: expected a hash, with '+changes' if the tree was changed, got {result['commit']!r}")
    versions, ceilings = result["versions"], result["ceilings"]
    faults += [f"versions.{k}: expected a string" for k in VERSIONS if not isinstance(versions.get(k), str)]
    if not re.fullmatch(r"sm_\d+", str(versions.get("architecture"))):
        faults.append("versions.architecture: expected a name such as 'sm_90'")
    if set(ceilings) != set(CEILINGS) or not all(_positive(v) for v in ceilings.values()):
        faults.append(f"ceilings: expected {', '.join(CEILINGS)}, each above 0, got {ceilings!r}")
    if not result["rows"]:
        faults.append("rows: expected at least one")
    keys = set()
    for i, row in enumerate(result["rows"]):
        row_faults = row_problems(row)
        faults += [f"rows[{i}].{fault}" for fault in row_faults]
        if not row_faults:
            if _key(row) in keys:
                faults.append(f"rows[{i}]: measured twice: {_key(row)}")
            keys.add(_key(row))
    return faults


def row_problems(row: Any) -> list[str]:
    """The faults of one row."""
    if not isinstance(row, dict) or set(row) != set(ROW):
        return [f"expected {', '.join(ROW)}, got {_keys(row)}"]
    faults = [f"{k}: unexpected {row[k]!r:.40}" for k, t in ROW.items() if not isinstance(row[k], t) or row[k] is True]
    if faults:
        return faults
    faults = [f"{k}: expected a finite number" for k, v in row.items() if type(v) is float and not math.isfinite(v)]
    faults += [f"{k}: expected above 0, got {row[k]}" for k in ("ms", "baseline_ms", "ratio") if not row[k] > 0]
    if row["backend"] not in BACKENDS:
        faults.append(f"backend: expected one of {', '.join(BACKENDS)}, got {row['backend']!r}")
    if row["dtype"] not in BOUND:
        faults.append(f"dtype: expected one of {', '.join(BOUND)}, got {row['dtype']!r}")
    for letter, size in row["shape"].items():
        if type(size) is not (str if letter == "routing" else int):
            faults.append(f"shape.{letter}: unexpected {size!r}")
    if faults:
        return faults
    if abs(row["ratio"] * row["ms"] / row["baseline_ms"] - 1) > 0.01:
        faults.append(f"ratio: expected baseline_ms / ms, got {row['ratio']}")
    if row["tflops"] is None and row["gbps"] is None:
        faults.append("tflops: expected it or gbps")
    if row["share_of_limit"] is not None and not 0 < row["share_of_limit"] < 1.2:
        faults.append(f"share_of_limit: expected a share, got {row['share_of_limit']}")
    if not 0 <= row["max_rel_err"] <= BOUND[row["dtype"]]:
        faults.append(f"max_rel_err: expected at most {BOUND[row['dtype']]}, got {row['max_rel_err']}")
    if row["peak_mb"] < 0:
        faults.append(f"peak_mb: expected at least 0, got {row['peak_mb']}")
    return faults


def _keys(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__


def _positive(value: Any) -> bool:
    return type(value) in NUMBER and 0 < value < math.inf


def _what(row: dict) -> tuple:
    """Key of the computation, without the backend."""
    return row["case"], row["dtype"], tuple(sorted(row["shape"].items()))


def _key(row: dict) -> tuple:
    """Key of the measurement, unique in a file."""
    return (*_what(row), row["backend"], row["baseline"])


def gpu_of(result: dict) -> str:
    """The device's name as part of a file name: ``h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", result["device"].lower().removeprefix("nvidia ")).strip("-")


def name_of(result: dict) -> str:
    """``<gpu>-<date>.json``."""
    return f"{gpu_of(result)}-{result['date']}.json"


def write(result: dict, path: Path) -> None:
    """Write a results file; ValueError, and nothing written, if the content has faults."""
    if faults := problems(result):
        raise ValueError(f"{path}: " + "; ".join(faults))
    rows = ",\n  ".join(json.dumps(row) for row in result["rows"])
    head = json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=1)
    atomic.write(path, head.removesuffix("\n}") + f',\n "rows": [\n  {rows}\n ]\n}}\n')


REJECTED = "rejected.json"


def earlier(folder: Path, head: dict) -> dict | None:
    """The result in ``folder`` with the same device, date, commit and versions, to which a run can add; or None."""
    for path in (folder / name_of(head), folder / REJECTED):
        if path.exists():
            result = json.loads(path.read_text())
            if all(result[k] == head[k] for k in ("device", "date", "commit", "versions")):
                return result
    return None


def add(result: dict, folder: Path) -> str:
    """Write ``result`` together with the rows of an earlier run that it does not measure again; returns its faults.

    A result with faults goes to rejected.json, so that no measurement is lost.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = earlier(folder, result)
    if before is not None:
        new = {_key(row) for row in result["rows"]}
        result = result | {"rows": [row for row in before["rows"] if _key(row) not in new] + result["rows"]}
    try:
        write(result, folder / name_of(result))
    except ValueError as error:
        atomic.write(folder / REJECTED, json.dumps(result, indent=1))
        return str(error)
    return ""


def read(path: Path) -> dict:
    """Read a results file; ValueError if the content has faults."""
    result = json.loads(path.read_text())
    if faults := problems(result):
        raise ValueError(f"{path}: " + "; ".join(faults))
    return result


def newest(folder: Path = RESULTS) -> list[dict]:
    """The newest result of every device, by device name."""
    results = {}
    for result in sorted((read(p) for p in folder.glob("*.json")), key=lambda r: r["date"]):
        results[result["device"]] = result
    return [results[device] for device in sorted(results)]


class Verdict(NamedTuple):
    """The results of one architecture for a backend of an operator."""

    architecture: str
    op: str
    backend: str
    fastest: bool
    """Whether it is correct and faster than plain torch in every measured case, and the fastest such backend."""
    text: str


def verdicts(results: Iterable[dict]) -> list[Verdict]:
    """A verdict for every architecture, operator and backend that was measured against plain torch.

    The fastest backend must be correct and faster than plain torch in every measured case, shape and dtype: one loss,
    or one case without a row (a wrong result gets none), excludes it. If two qualify, the shorter sum of times wins.
    """
    results, all_verdicts = list(results), []
    for architecture in sorted({r["versions"]["architecture"] for r in results}):
        of_architecture = [r for r in results if r["versions"]["architecture"] == architecture]
        for op in OPS:
            all_verdicts += _verdicts_of(architecture, op, of_architecture)
    return all_verdicts


def _verdicts_of(architecture: str, op: str, results: list[dict]) -> list[Verdict]:
    rows = [(r["device"], row) for r in results for row in r["rows"] if row["case"].split()[0] == op]
    by_backend = {
        b: {(device, *_what(row)): row for device, row in rows if row["backend"] == b and row["baseline"] == PRESENT}
        for b in BACKENDS
    }
    cases = by_backend.pop(PRESENT).keys()
    by_backend = {backend: measured for backend, measured in by_backend.items() if measured}
    texts, times = {}, {}
    for backend, measured in by_backend.items():
        ratios = [row["ratio"] for row in measured.values()]
        devices = ", ".join(sorted({device for device, *_ in measured}))
        missing = len(cases - measured.keys())
        texts[backend] = (
            f"{min(ratios):.2f} to {max(ratios):.2f} times as fast as plain torch in {len(ratios)} cases on {devices}, "
            f"error at most {max(row['max_rel_err'] for row in measured.values()):.1e}"
        ) + (f"; wrong or not measured in {missing} others" if missing else "")
        if min(ratios) > 1 and cases and not missing:
            times[backend] = sum(measured[key]["ms"] for key in cases)
    best = min(times, key=times.get, default=None)
    return [Verdict(architecture, op, backend, backend == best, text) for backend, text in texts.items()]


def commit() -> str:
    """The commit of this clone; "unknown" outside a clone, with which results are rejected, but not lost."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"]
    with contextlib.suppress(OSError):
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
    return "unknown"
