#!/usr/bin/env python3
"""Writes docs/scaling.md and its picture from benchmarks/results/scaling/gloo.json, which `make scaling` measures.

usage: python scripts/scaling_page.py [--check]
--check: change nothing; exit 1 when the page is not what the results say. Needs matplotlib for the picture alone.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from generated import commit_of, settle  # noqa: E402
from scaling import (  # noqa: E402
    ASSUMED,
    GPU_EXPERTS,
    GPUS,
    IMAGES,
    RANKS,
    RESULTS,
    RUN_IMAGES,
    Spread,
)

PAGE, PICTURE = ROOT / "docs/scaling.md", ROOT / "docs/images/scaling.png"

TEXT = """\
# How a step scales

What a step costs on many GPUs, on paper, and how often that paper was right about steps that can be run here. **Nothing
on this page was measured on a GPU.** Made by `scripts/scaling_page.py` of [{name}](../{path}); not edited.

![Predicted against measured steps, and days of the run over the number of GPUs](images/scaling.png)

## How many GPUs, which strategy

{gpu}, unit costs assumed ({costs}). {images} images on each GPU; 256 pixels, 75 % hidden, decoder 512 x 8, K = 2, bf16,
as in the presets. "fits": the smaller of 80 and 141 GB that holds the sum of all kinds of memory. Days: 200 epochs of
4.97 million images.

{rows}

For other sizes, experts, images and ranks: `dex pretrain ... --dry-run`, by the same formulas. {images} images on each
of 256 GPUs are {largest:,}, {per_epoch:.0f} steps an epoch: another optimisation problem, which nobody here has tried.

With fsdp the bf16 copies of a network stay whole on every GPU: autocast makes them of gathered weights, and backward
keeps them.

{tested}

## What is counted

`dex.sizing.scaling` has the formulas, a function each. In short, for T numbers that take a gradient:

| | |
| --- | --- |
| ddp sends | one all-reduce of 4 T bytes, in buckets of 25 MiB |
| fsdp sends | per micro-batch two gathers of every block's fp32 weights and a reduce-scatter of its gradients |
| the director's update | a vector of a few hundred numbers, whatever the strategy |
| AdamW, clip, norm | {update} bytes of memory traffic per trained number |
| GEMA | 4 bytes per expert number and 8 per director number |
| bf16 copies | {cast} bytes per number and micro-batch: all experts are cast, whichever are taken |
| what hides | at most the stated share. ddp: gradients beside the last backward; fsdp: all beside all compute |
| memory | weights, gradients, moments, copies, activations; fsdp divides the first three and adds two gathered blocks |

Not in it: the loader, evaluation, recomputation (`parallel.checkpointing`), temporary tensors of operators, stragglers.
"""


TESTED = """\
## How far to trust it

{machine}
{noise}

**{off} of {all} predicted steps missed**: outside 0.8 to 1.25 of the median over {steps}. Unit costs come from
another network (demo preset, E = {calibrated}) and as many processes; test points have E 4 to 32 and 8 or 32 images.

{groups}

{bytes}

{why}"""

UNTESTED = """\
## Tested here

Not yet: `make scaling` measures unit costs and steps on 1, 2 and 4 gloo ranks. Bytes held and sent are tested against
three ranks by `tests/dex/sizing/test_scaling.py`."""


def page(results: dict) -> str:
    gpu = results["gpu"]
    return TEXT.format(
        name=RESULTS.name,
        path=RESULTS.relative_to(ROOT),
        update=results["bytes"]["update"],
        cast=results["bytes"]["cast"],
        tested=tested(results) if "tests" in results else UNTESTED,
        gpu=gpu["name"],
        costs=_gpu_costs(gpu),
        images=IMAGES,
        rows=_gpu_table(gpu["rows"]),
        largest=256 * IMAGES,
        per_epoch=RUN_IMAGES / 200 / (256 * IMAGES),
    )


def tested(results: dict) -> str:
    """What was predicted and measured on this machine."""
    machine, tests, calibration = results["machine"], results["tests"], results["calibration"]
    timed = [t for t in tests if "seconds" in t["predicted"]]
    ratios = [_ratio(t) for t in timed]
    return TESTED.format(
        machine=f"Measured on {results['date']}: {machine['cpu']}, {machine['cpus']} CPUs, one thread a rank, Python "
        f"{machine['python']}, torch {machine['torch']}, gloo, {commit_of(machine)}; "
        f"{results['seconds'] / 60:.0f} minutes.",
        noise=f"Load of the machine: {min(results['loads'])} to {max(results['loads'])}, of which the ranks themselves "
        f"make at most {max(RANKS)}"
        + (
            ":\n**other programs ran beside some of the points, whose times say less**."
            if max(results["loads"]) > 4.5
            else "."
        ),
        calibrated=calibration["experts"],
        bytes=_bytes_text(tests),
        steps=f"{results['steps']} steps and all ranks",
        off=sum(not 0.8 <= r <= 1.25 for r in ratios),
        all=len(ratios),
        groups=_groups(timed),
        why=WHY.format(swing=_swing(results["costs"])),
    )


def _median(test: dict) -> float:
    """Of the measured seconds of a step."""
    return Spread(*test["measured"]["seconds"]).median


def _ratio(test: dict) -> float:
    return test["predicted"]["seconds"] / _median(test)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _bytes_text(tests: list[dict]) -> str:
    wire = [t["measured"]["wire"] / t["predicted"]["wire"] for t in tests if t["ranks"] > 1]
    kinds = ("weights", "gradients", "moments")
    held = [t["measured"]["held"][k] == t["predicted"]["held"][k] for t in tests for k in kinds]
    peaks = {}
    for t in tests:
        name = "1 rank" if t["ranks"] == 1 else t["strategy"]
        peaks.setdefault(name, []).append(t["predicted"]["peak"] / _peak(t))
    ranges = "; ".join(f"{name} {min(r):.2f} to {max(r):.2f}" for name, r in peaks.items())
    return (
        f"Weights, gradients and moments of a rank are the predicted ones to the byte in {sum(held)} of {len(held)} "
        f"cases.\nBytes written to sockets in a step are {min(wire):.4f} to {max(wire):.4f} times the predicted ones. "
        f"Predicted memory over the most\nthat torch allocated at once: {ranges}; below 1 are images, targets and\n"
        "temporary tensors, which weigh more in a network this small."
    )


def _peak(test: dict) -> int:
    """The most bytes that torch held at once: those that stay between steps, and a step's own at its peak."""
    seen = test["measured"]
    buckets = seen["held"]["gradients"] if test["ranks"] > 1 and test["strategy"] == "ddp" else 0
    return seen["held"]["weights"] + seen["held"]["moments"] + buckets + seen["peak"]


def _key(test: dict) -> tuple:
    return test["ranks"], test["strategy"], test["experts"], test["batch"]


def _groups(timed: list[dict]) -> str:
    rows = []
    for ranks in RANKS:
        for strategy in ("ddp", "fsdp") if ranks > 1 else ("ddp",):
            ratios = [_ratio(t) for t in timed if (t["strategy"], t["ranks"]) == (strategy, ranks)]
            missed = sum(not 0.8 <= r <= 1.25 for r in ratios)
            middle = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            rows.append([str(ranks), strategy if ranks > 1 else "", middle, f"{missed} of {len(ratios)}"])
    return _table(["ranks", "strategy", "predicted / measured: median (range)", "missed"], rows)


WHY = """\
The machine itself: {swing}.
A prediction cannot be better than that. The model: hops and bandwidths are those of ranks that do nothing else, and
fsdp's cutting and joining of tensors on the same cores counts as one pass of memory. How much each of these takes was
not measured apart."""


def _swing(costs: dict) -> str:
    """How far the calibration's own steps lie apart."""
    ratios = []
    for ranks, cost in costs.items():
        steps = Spread(*list(cost["steps"].values())[-1])
        ratios.append(f"{steps.high / steps.low:.1f} with {ranks}")
    start = "the upper quartile of the calibration's own\nequal steps exceeds the lower one by a factor of "
    return start + ", ".join(ratios) + " ranks"


def _gpu_costs(gpu: dict) -> str:
    """The unit costs in words."""
    cost = gpu["costs"]
    share = f"{ASSUMED['share of memory and network bandwidth']:.0%}"
    return (
        f"{cost['flops'] / 1e12:.0f} TFLOP/s, {gpu['mfu']:.0%} of the peak;\nmemory {cost['memory'] / 1e12:.2f} TB/s, "
        f"NVLink {cost['inner'][0] / 1e9:.0f} and network {cost['outer'][0] / 1e9:.0f} GB/s a GPU, {share} of the "
        f"maker's figures; {cost['overlap']:.0%} of\ncompute hides communication; {cost['fixed'] * 1e3:.0f} ms fixed"
    )


def _fits(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.0f}, " + ("80" if num_bytes <= 80e9 else "141" if num_bytes <= 141e9 else "**no**")


def _pair(row: dict, cell) -> str:
    return " \\| ".join("-" if "refused" in row[s] else cell(row[s]) for s in ("ddp", "fsdp"))


def _gpu_table(rows: list[dict]) -> str:
    head = ["network", "E", "GPUs", "step, ms: ddp \\| fsdp", "GB a GPU, fits", "days, if it fits"]
    lines = []
    for row in rows:
        lines.append(
            [
                row["network"],
                str(row["experts"]),
                str(row["gpus"]),
                _pair(row, lambda s: f"{s['seconds'] * 1e3:,.0f}"),
                _pair(row, lambda s: _fits(s["memory"])),
                _pair(row, lambda s: f"{s['days']:.2g}" if s["days"] < 10 else f"{s['days']:.0f}"),
            ]
        )
    return _table(head, lines)


def picture(results: dict):
    """Two panels: predicted against measured; days over GPUs."""
    from matplotlib.figure import Figure

    ink, colours = "#333333", ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#aa3377")
    figure = Figure(figsize=(9, 4.2), dpi=110, layout="constrained")
    axes = figure.subplots(1, 2 if "tests" in results else 1, squeeze=False)[0]
    if "tests" in results:
        _scatter(axes[0], [t for t in results["tests"] if "seconds" in t["predicted"]], ink, colours)
    run = axes[-1]
    for experts, colour in zip(GPU_EXPERTS, colours, strict=False):
        rows = [r for r in results["gpu"]["rows"] if (r["network"], r["experts"]) == ("ViT-L", experts)]
        days = [r["ddp"]["days"] for r in rows]
        run.plot([r["gpus"] for r in rows], days, "o-", color=colour, label=f"E = {experts}")
    run.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="days of 200 epochs", xticks=GPUS)
    run.set_xticklabels([f"{n:,}" for n in GPUS])
    run.minorticks_off()
    run.set_title(f"The whole run, ViT-L, ddp, {IMAGES} images a GPU\n(assumed unit costs)", fontsize=10, color=ink)
    for axis in axes:
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure


def _scatter(tested, timed: list[dict], ink: str, colours: tuple[str, ...]) -> None:
    """Predicted over measured seconds of a step."""
    kinds = [(n, s) for n in RANKS for s in (("ddp", "fsdp") if n > 1 else ("ddp",))]
    for (ranks, strategy), colour in zip(kinds, colours, strict=True):
        points = [t for t in timed if (t["ranks"], t["strategy"]) == (ranks, strategy)]
        tested.scatter(
            [_median(t) for t in points],
            [t["predicted"]["seconds"] for t in points],
            s=22, color=colour, alpha=0.8, label=f"{ranks} ranks, {strategy}" if ranks > 1 else "1 rank",
        )  # fmt: skip
    ends = [f(_median(t), t["predicted"]["seconds"]) for f in (min, max) for t in timed]
    line = [min(ends) * 0.85, max(ends) * 1.15]
    tested.fill_between(line, [0.8 * x for x in line], [1.25 * x for x in line], color="#dddddd", zorder=0)
    tested.plot(line, line, color=ink, linewidth=0.8)
    tested.set(xscale="log", yscale="log", xlabel="measured, s", ylabel="predicted, s", xlim=line, ylim=line)
    tested.set_title("Steps of a small network on 2 CPU cores\n(band: 0.8 to 1.25)", fontsize=10, color=ink)
    for axis in (tested.xaxis, tested.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    status = settle(PAGE, page(results), check=check, source=RESULTS.name, command="scripts/scaling_page.py")
    if not check:
        picture(results).savefig(PICTURE)
    return status


if __name__ == "__main__":
    sys.exit(main())
