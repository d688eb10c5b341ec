#!/usr/bin/env python3
"""Writes what follows from benchmarks/results/ and tests/emulator/results.json.

dexkernels/_measured.py and _executed.py, pictures, the marked regions of the pages.

usage: python scripts/pages.py [--check]
--check: change nothing; exit 1, naming each, when a file is not what the results say. Needs no other package.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("benchmarks", "scripts", "python")]

import charts  # noqa: E402
import kernel_page  # noqa: E402
import record  # noqa: E402
from generated import literal, strings  # noqa: E402

from dex.common import atomic  # noqa: E402

PAGES = ("README.md", "benchmarks/README.md", "docs/kernels.md")
IMAGES = ROOT / "docs/images"
NO_CHARTS = "Neither a roofline nor cost against experts and images is drawn: nothing was measured on a GPU."
NOTHING = """\
Not measured on a GPU: no kernel is used unless asked for by name, and CUDA tensors take the same plain-torch operators
as the CPU."""

MEASURED = '''\
"""What benchmarks measured of every backend, by GPU. Made by scripts/pages.py from benchmarks/results/; not edited."""

# fmt: off
MEASURED: dict[tuple[str, str, str], str] = {measured}
"""(architecture, operator, backend) -> what was measured."""
'''


def measured_module(results: list[dict]) -> str:
    """The text of dexkernels/_measured.py."""
    verdicts = record.verdicts(results)
    measured = [f'    ("{v.architecture}", "{v.op}", "{v.backend}"): (\n{strings(v.text)}    ),\n' for v in verdicts]
    return MEASURED.format(measured=literal(measured))


def region(name: str, results: list[dict]) -> str:
    """What stands between the markers ``<!-- results: NAME -->`` and ``<!-- end of results -->``."""
    if name in kernel_page.REGIONS:
        return kernel_page.REGIONS[name](kernel_page.load(), results)
    if name == "charts":
        return pictures_of(results, "../docs/images")
    if not results:
        return NOTHING
    return {"summary": summary, "full": full}[name](results)


def pictures(results: list[dict]) -> dict[str, str]:
    """File name -> SVG of every picture that the results have something for."""
    drawn = {
        f"{record.gpu_of(result)}-{name}.svg": draw(result)
        for result in results
        for name, draw in charts.CHARTS.items()
    }
    return {name: svg for name, svg in drawn.items() if svg}


def pictures_of(results: list[dict], folder: str) -> str:
    """The pictures of every device, or the words that one is missing."""
    drawn, lines = pictures(results), []
    for result in results:
        for name in charts.CHARTS:
            file = f"{record.gpu_of(result)}-{name}.svg"
            shown = f"![{result['device']}: {name}]({folder}/{file})"
            lines.append(shown if file in drawn else f"{result['device']}: nothing was measured for a {name} picture.")
    return "\n\n".join(lines) or NO_CHARTS


def summary(results: list[dict]) -> str:
    """The largest image-wise case of each kind in bf16, against every baseline."""
    parts = []
    for result in results:
        rows = [row for row in result["rows"] if row["dtype"] == "bfloat16" and row["backend"] != record.PRESENT]
        largest = max((_size(row) for row in rows), default=0)
        parts.append(f"{_heading(result)}\n\n{table(row for row in rows if _size(row) == largest)}")
    return (
        "\n\n".join(parts) + "\n\nAll rows, and which backend is the fastest where: [benchmarks](benchmarks/README.md)."
    )


def full(results: list[dict]) -> str:
    verdicts = record.verdicts(results)
    lines = [
        f"| {v.architecture} | {v.op} | {v.backend} | {'yes' if v.fastest else 'no'} | {v.text} |" for v in verdicts
    ]
    head = "| architecture | operator | backend | fastest in every case | measured |\n| --- | --- | --- | --- | --- |"
    of_devices = (f"{_heading(r)}{_not_timed(r)}\n\n{table(r['rows'])}" for r in results)
    return "\n\n".join(["\n".join([head, *lines]), *of_devices])


def _not_timed(result: dict) -> str:
    """Peers that the run did without, and why."""
    versions = result["versions"].items()
    missing = [f"{k.removeprefix('without ')} ({reason})" for k, reason in versions if k.startswith("without ")]
    return f" Not timed: {'; '.join(missing)}." if missing else ""


def table(rows: Iterable[dict]) -> str:
    columns = ("case", "shape", "backend", "dtype", "ms", "against", "their ms", "times as fast", "TFLOP/s", "GB/s")
    columns += ("of the limit", "error", "MB")
    lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    for row in rows:
        shape = ", ".join(f"{letter} {size}" for letter, size in row["shape"].items())
        share = "" if row["share_of_limit"] is None else f"{row['share_of_limit']:.0%}"
        rates = ["" if row[k] is None else f"{row[k]:.0f}" for k in ("tflops", "gbps")]
        cells = [row["case"], shape, row["backend"], row["dtype"], f"{row['ms']:.3f}", row["baseline"]]
        cells += [f"{row['baseline_ms']:.3f}", f"{row['ratio']:.2f}", *rates, share, f"{row['max_rel_err']:.1e}"]
        cells.append(f"{row['peak_mb']:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _size(row: dict) -> int:
    size = 1
    for letter in "BNDHK":
        size *= row["shape"].get(letter, 1)
    return size


def _heading(result: dict) -> str:
    versions, ceilings = result["versions"], result["ceilings"]
    return (
        f"{result['device']}, {result['date']}, commit {result['commit'][:12]}, torch {versions['torch']}, "
        f"triton {versions['triton']}, CUDA {versions['cuda']}. In the same run\n"
        f"a copy moved {ceilings['copy_gbps']:.0f} GB/s and a bf16 product ran at "
        f"{ceilings['bf16_tflops']:.0f} TFLOP/s: the limits. Medians."
    )


def fill(text: str, results: list[dict], where: str) -> str:
    """The page with all of its regions made anew."""
    start, end = "<!-- results: ", "<!-- end of results -->"
    parts = text.split(start)
    if len(parts) == 1:
        raise ValueError(f"{where}: no marker {start}NAME -->")
    out = [parts[0]]
    for part in parts[1:]:
        name, found, rest = part.partition(" -->\n")
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"{where}: {start}{name[:40]} without {end}")
        out.append(f"{start}{name} -->\n{region(name, results)}\n{end}{after}")
    return "".join(out)


def made(results: list[dict]) -> dict[Path, str]:
    """Every generated file and its text."""
    files = {
        ROOT / "dexkernels/_measured.py": measured_module(results),
        ROOT / "dexkernels/_executed.py": kernel_page.module(kernel_page.load(), results),
    }
    for page in PAGES:
        files[ROOT / page] = fill((ROOT / page).read_text(), results, page)
    return files | {IMAGES / name: svg for name, svg in pictures(results).items()}


def stale(files: dict[Path, str]) -> list[Path]:
    """Pictures of results that are no longer there."""
    return [p for name in charts.CHARTS for p in sorted(IMAGES.glob(f"*-{name}.svg")) if p not in files]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    try:
        files = made(record.newest())
    except ValueError as error:
        print(f"pages: {error}", file=sys.stderr)
        return 1
    old = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    for path in old:
        print(
            f"{path.relative_to(ROOT)}: {'not what benchmarks/results/ says; run make pages' if check else 'written'}"
        )
        if not check:
            atomic.write(path, files[path])
    gone = stale(files)
    for path in gone:
        print(f"{path.relative_to(ROOT)}: {'of no result; run make pages' if check else 'removed'}")
        if not check:
            path.unlink()
    return 1 if check and (old or gone) else 0


if __name__ == "__main__":
    sys.exit(main())
