"""The table of contributed records of ``dex verify`` in docs/verify.md, from benchmarks/results/verified/.

scripts/pages.py writes it, without torch; tests read the files by `dexkernels.verification.record`.
"""

import json
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks/results/verified"
COLUMNS = ("GPU", "driver", "torch", "triton", "dexkernels", "operator", "backend", "dtype", "result", "sizes", "ms")
COLUMNS += ("times as fast as plain torch", "share of the limit")
NOTHING = "No record was contributed yet."


def load(folder: Path = FOLDER) -> list[dict]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def table(records: Iterable[dict]) -> str:
    """A row for each check of a kernel, with the times at the sizes of its record's last verification."""
    rows = [row for record in records for row in _rows(record)]
    if not rows:
        return NOTHING
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + " --- |" * len(COLUMNS)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _rows(record: dict) -> Iterable[list[str]]:
    who, newest = record["identity"], record["sizes"][-1]
    times = {(t["op"], t["backend"], t["dtype"]): t for t in record["times"] if t["sizes"] == newest}
    sizes = ", ".join(f"{letter} {size}" for letter, size in zip("BNDHEK", newest.values(), strict=True))
    for check in record["checks"]:
        if check["backend"] == "reference" or check["state"] == "absent":
            continue
        key = check["op"], check["backend"], check["dtype"]
        error = "" if check["error"] is None else f", error {check['error']:.1e}"
        row = [
            *(who[name] for name in ("gpu", "driver", "torch", "triton", "dexkernels")),
            *key,
            check["state"] + error,
        ]
        if (t := times.get(key)) is None:
            yield [*row, "", "", "", ""]
        else:
            speed = f"{t['plain_ms'] / t['ms']:.2f}", f"{t['limit_ms'] / t['ms']:.0%}"
            yield [*row, sizes, f"{t['ms']:.3f}", *speed]
