#!/usr/bin/env python3
"""Writes docs/scaling.md and its picture from benchmarks/results/scaling/gloo.json, which `make scaling` measures.

usage: python scripts/scaling_page.py [--check]
--check: change nothing; exit 1 when the page is not what the results say. Needs matplotlib for the picture alone.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from generated import commit_of, settle  # noqa: E402
from scaling import ASSUMED, BATCHES, EXPERTS, GPUS, IMAGES, NETWORKS, RANKS, RESULTS, RUN_IMAGES, Spread  # noqa: E402

PAGE, PICTURE = ROOT / "docs/scaling.md", ROOT / "docs/images/scaling.png"

TEXT = """\
# How a step scales

What one step costs on 1 to 1,024 GPUs with 8 to 128 experts, on paper; and the same paper asked about steps that can be
run here. **Nothing on this page was measured on a GPU.** Made by `scripts/scaling_page.py` of
[{name}](../{path}); not edited.

![Predicted against measured steps; where the time of a step goes as E grows; days of the run](images/scaling.png)

## The formulas

`dex.sizing.scaling` counts a configuration, unbuilt. Letters: n ranks, l ranks of a node, m nodes, S bytes of a
tensor, T numbers that take a gradient, P all of them, E experts of a layer, b images of a rank, r micro-batches.

| | formula |
| --- | --- |
| all-reduce, bytes that a rank sends | 2 (l - 1) / l S inside a node, 2 (m - 1) / m S / l between nodes; \
gather and reduce-scatter: half |
| its time | bytes / bandwidth, level after level, plus per call l - 1 hops inside and log2 m between nodes, \
twice for an all-reduce |
| ddp sends | one all-reduce of 4 T bytes, in buckets of 25 MiB |
| fsdp sends | per micro-batch two gathers of every block's fp32 weights, directors included, and one of the rest; one \
reduce-scatter of the gradients; one number per tensor for the norm |
| both send | one vector of 8 (8 + 2 modalities + 2 sum of E) bytes: gate masses, slots, losses, flags. The directors' \
update needs nothing else |
| norm, clip, AdamW | {update} bytes of memory traffic per trained number |
| GEMA | 4 bytes per expert number, 8 per director number |
| bf16 copies | {cast} bytes of traffic per number and micro-batch: all experts are cast, whichever are taken. \
With ddp a step's micro-batches share those of experts and directors, unless it is compiled or a CUDA graph |
| compute | b x operations of an image / rate, but at least the time to read the weights of the experts that are taken |
| a step | compute + casts, gradients and fsdp's copies + update + fixed + the communication that nothing hides |
| what hides | ddp: gradients beside the last micro-batch's backward; fsdp: gathers and scatters beside all compute. \
At most the stated share of that time, and never the last bucket or block. Casts and update hide nothing |
| memory | weights 4 P, gradients 4 T, moments 8 T, bf16 copies 2 P, activations; fsdp divides the first three by n, \
padded, and adds two gathered blocks and one block's gradients twice; r > 1 adds 4 T for earlier micro-batches' \
gradients, in fsdp too |

Not in it: the loader, evaluation, recomputation (`parallel.checkpointing`), temporary tensors of operators, stragglers.

{tested}

## On GPUs: assumed, not measured

| unit cost of {gpu} | value | |
| --- | --- | --- |
{gpu_costs}

The batch grows with the GPUs: {images} images each, 896 on 8. 256 pixels, 75 % hidden, decoder 512 x 8, K = 2, bf16, as
in the presets. "fits": the smaller of 80 and 141 GB that holds the sum of all kinds of memory. GB sent: by one GPU in a
step, inside its node + between nodes. Days: 200 epochs of 4.97 million images. `-`: refused, because
{refused}.

{weak}

### With a batch that stays

The published batches are 896 and 448: of either, 1,024 GPUs would have less than one image each. In equal parts and
powers of two, 896 images go to at most 128 GPUs, 448 to 64. Below, 896 images on up to 64 GPUs, 1,024 on more; E = 8. A
published batch uses a node or a few; to use more is to change the batch: {images} images on each of 1,024 GPUs are
{largest:,}, {per_epoch:.0f} steps an epoch, another optimisation problem that nobody here has tried.

{strong}

### Where experts stop fitting

With {images} images computed at once; E of 8, 16, 32, 64, 128.

{fitting}

### Other GPUs

64 of them, {images} images each; all assumed.

{other_gpus}
"""


TESTED = """\
## Tested here

{machine}
{noise}

Unit costs come from one network (demo preset, E = {calibrated}, {small} and {large} images a step, fp32), none of the
test points, run by as many processes at once as the test has ranks: four share two cores, so theirs are slower.
Overlap is 0: the cores that compute also carry gloo's messages. gloo carries a reduce-scatter out as an all-reduce.

| processes at once | GFLOP/s of each | update, GB/s | fixed, ms | all-reduce, GB/s | gather | scatter | a hop, ms | \
checkpoint, GB/s |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{costs}

### Bytes

{bytes}

### Seconds of a step

Medians over {steps}, and predicted / measured. The ratio is outside 0.8 to 1.25 in {off} of {all} points.

| ranks | strategy | E | 8 images: predicted, measured, s | ratio | 32 images: predicted, measured, s | ratio |
| --- | --- | --- | --- | --- | --- | --- |
{steps_table}

{others}

{why}"""

UNTESTED = """\
## Tested here

Not yet: `make scaling` measures unit costs and steps on 1, 2 and 4 gloo ranks. Bytes held and sent are tested against
three ranks by `tests/dex/sizing/test_scaling.py`."""


def page(results: dict) -> str:
    gpu = results["gpu"]
    refused = next(r["fsdp"]["refused"] for r in gpu["weak"] if "refused" in r["fsdp"])
    return TEXT.format(
        name=RESULTS.name,
        path=RESULTS.relative_to(ROOT),
        update=results["bytes"]["update"],
        cast=results["bytes"]["cast"],
        tested=tested(results) if "tests" in results else UNTESTED,
        gpu=gpu["name"],
        gpu_costs="\n".join(_gpu_cost_lines(gpu)),
        images=IMAGES,
        refused=refused.removeprefix("parallel.strategy: "),
        weak="\n\n".join(
            f"**{name}**\n\n" + _gpu_table([r for r in gpu["weak"] if r["network"] == name]) for name in NETWORKS
        ),
        largest=1024 * IMAGES,
        per_epoch=RUN_IMAGES / 200 / (1024 * IMAGES),
        strong=_strong_table(gpu["strong"]),
        fitting=_fitting(gpu["weak"]),
        other_gpus=_other_gpus(gpu["others"]),
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
        small=calibration["batches"][0],
        large=calibration["batches"][1],
        costs="\n".join(_cost_line(n, c, results) for n, c in results["unit_costs"].items()),
        bytes=_bytes_text(tests),
        steps=f"{results['steps']} steps and all ranks",
        off=sum(not 0.8 <= r <= 1.25 for r in ratios),
        all=len(ratios),
        steps_table=_steps_table(timed),
        others=_other_steps(timed),
        why=_why(timed, results["costs"]),
    )


def _median(test: dict) -> float:
    """Of the measured seconds of a step."""
    return Spread(*test["measured"]["seconds"]).median


def _ratio(test: dict) -> float:
    return test["predicted"]["seconds"] / _median(test)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cost_line(n: str, cost: dict, results: dict) -> str:
    bandwidth, latency = cost["inner"]
    link = [""] * 4
    if n != "1":
        rates = (1, cost["gather_rate"], cost["scatter_rate"])
        link = [*(f"{bandwidth * rate / 1e9:.2f}" for rate in rates), f"{latency * 1e3:.2f}"]
    disk = f"{cost['store'] / 1e9:.2f}" if n == "1" else ""
    cells = [n, f"{cost['flops'] / 1e9:.1f}", f"{cost['memory'] / 1e9:.1f}", f"{cost['fixed'] * 1e3:.0f}", *link, disk]
    return f"| {' | '.join(cells)} |"


def _bytes_text(tests: list[dict]) -> str:
    wire = [t["measured"]["wire"] / t["predicted"]["wire"] for t in tests if t["ranks"] > 1]
    kinds = ("weights", "gradients", "moments")
    held = [t["measured"]["held"][k] == t["predicted"]["held"][k] for t in tests for k in kinds]
    # Buckets are there between steps, other gradients only within one.
    peaks = {}
    for t in tests:
        name = "1 rank" if t["ranks"] == 1 else t["strategy"]
        peaks.setdefault(name, []).append(t["predicted"]["peak"] / _peak(t))
    # Later points of a process use again what earlier ones freed, so its growth tells of the first alone.
    rss = [_peak(t) / t["measured"]["peak_resident"] for t in tests if _key(t)[1:] == ("ddp", EXPERTS[0], BATCHES[0])]
    ranges = "; ".join(f"{name} {min(r):.2f} to {max(r):.2f}" for name, r in peaks.items())
    text = (
        f"Weights, gradients and moments of a rank are the predicted ones to the byte in {sum(held)} of {len(held)} "
        "cases. Bytes written to sockets\nin a step, by the kernel's count, are "
        f"{min(wire):.4f} to {max(wire):.4f} times the predicted ones; the rest is gloo's headers. The "
        f"predicted\nsum of memory over the most that torch allocated at once: {ranges}.\nAbove 1: not all kinds are "
        "there at the same moment. Below 1: images, targets and temporary tensors, which weigh more\nin a network this "
        "small (9 MB of activations an image, 0.8 MB for every copy of its pixels)."
    )
    return text + (
        f"\nWhat torch allocated is {min(rss):.2f} to {max(rss):.2f} of the growth of the process, code that is loaded "
        "late included."
    )


def _peak(test: dict) -> int:
    """The most bytes that torch held at once: those that stay between steps, and a step's own at its peak."""
    seen = test["measured"]
    buckets = seen["held"]["gradients"] if test["ranks"] > 1 and test["strategy"] == "ddp" else 0
    return seen["held"]["weights"] + seen["held"]["moments"] + buckets + seen["peak"]


def _plain(test: dict) -> bool:
    return "micro_batch" not in test and "model" not in test


def _steps_table(timed: list[dict]) -> str:
    lines = []
    for ranks in RANKS:
        for strategy in ("ddp", "fsdp"):
            for experts in EXPERTS:
                row = [
                    next((t for t in timed if _plain(t) and _key(t) == (ranks, strategy, experts, batch)), None)
                    for batch in BATCHES
                ]
                if row[0] is None:
                    continue
                cells = [str(ranks), strategy if ranks > 1 else "", str(experts)]
                for t in row:
                    cells += [f"{t['predicted']['seconds']:.2f}, {_median(t):.2f}", f"{_ratio(t):.2f}"]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _key(test: dict) -> tuple:
    return test["ranks"], test["strategy"], test["experts"], test["batch"]


def _other_steps(timed: list[dict]) -> str:
    rows = []
    for t in timed:
        if not _plain(t):
            what = "micro-batches of 4" if "micro_batch" in t else "width 256, 3 layers, 4 heads"
            seconds = f"{t['predicted']['seconds']:.2f}, {_median(t):.2f}"
            rows.append([what, str(t["ranks"]), t["strategy"] if t["ranks"] > 1 else "", seconds, f"{_ratio(t):.2f}"])
    head = ["E = 8, 32 images", "ranks", "strategy", "predicted, measured, s", "ratio"]
    return _table(head, sorted(rows))


def _why(timed: list[dict], costs: dict) -> str:
    groups = {"1 rank": lambda t: t["ranks"] == 1}
    for strategy in ("ddp", "fsdp"):
        for ranks in RANKS[1:]:
            groups[f"{ranks} ranks, {strategy}"] = lambda t, s=strategy, n=ranks: (t["strategy"], t["ranks"]) == (s, n)
    ranges = []
    for name, belongs in groups.items():
        ratios = [_ratio(t) for t in timed if belongs(t)]
        ranges.append(f"{name} {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return "Predicted / measured, median and range:\n" + ";\n".join(ranges) + ".\n\n" + WHY.format(swing=_swing(costs))


WHY = """\
Why it is off where it is off. First, the machine: {swing}.
A prediction cannot be better than that, and test points are measured minutes apart from the unit costs. Second, the
model: hops and bandwidths are those of ranks that do nothing else, while in a step they compute and wait for others;
fsdp cuts, copies and joins every tensor on the same cores, for which the model has one pass of memory that is there
already, while each gather writes into memory that the system gives it anew; operations have one rate, whatever their
sizes. How much each of these takes was not measured apart."""


def _swing(costs: dict) -> str:
    """How far the calibration's own steps lie apart."""
    ratios = []
    for ranks, cost in costs.items():
        steps = Spread(*list(cost["steps"].values())[-1])
        ratios.append(f"{steps.high / steps.low:.1f} with {ranks}")
    start = "the upper quartile of the calibration's own\nequal steps exceeds the lower one by a factor of "
    return start + ", ".join(ratios) + " ranks"


def _gpu_cost_lines(gpu: dict) -> list[str]:
    cost, source = gpu["costs"], gpu["sources"]
    rest = source["everything else"]
    (inner, hop), (outer, far) = cost["inner"], cost["outer"]
    share = f"{ASSUMED['share of memory and network bandwidth']:.0%} of the maker's figure"
    rows = [
        ("operations of forward and backward", f"{cost['flops'] / 1e12:.0f} TFLOP/s", source["flops"], "a share of "
         f"{gpu['mfu']:.0%} of the peak in bf16"),
        ("memory", f"{cost['memory'] / 1e12:.2f} TB/s", source["memory"], share),
        ("NVLink, one way", f"{inner / 1e9:.0f} GB/s, {hop * 1e6:.0f} us a hop", rest, share),
        ("network, per GPU, one way", f"{outer / 1e9:.0f} GB/s, {far * 1e6:.0f} us a hop", rest, share),
        ("gathers and scatters", "at the same rate as an all-reduce", rest, ""),
        ("GPUs of a node", f"{cost['per_node']}", rest, ""),
        ("share of compute that hides communication", f"{cost['overlap']}", rest, ""),
        ("fixed part of a step", f"{cost['fixed'] * 1e3:.0f} ms", rest, ""),
        ("a checkpoint to the disk, all ranks", f"{cost['store'] / 1e9:.0f} GB/s", rest, ""),
    ]  # fmt: skip
    return [f"| {what} | {value} | {source}{': ' if why else ''}{why} |" for what, value, source, why in rows]


def _fits(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.0f}, " + ("80" if num_bytes <= 80e9 else "141" if num_bytes <= 141e9 else "**no**")


def _pair(row: dict, cell) -> str:
    return " \\| ".join("-" if "refused" in row[s] else cell(row[s]) for s in ("ddp", "fsdp"))


def _gpu_table(rows: list[dict]) -> str:
    head = ["E", "GPUs", "step, ms: ddp \\| fsdp", "bound by", "GB a GPU, fits", "GB sent", "days, if it fits"]
    lines = []
    for row in rows:
        lines.append(
            [
                str(row["experts"]),
                f"{row['gpus']:,}",
                _pair(row, lambda s: f"{s['seconds'] * 1e3:,.0f}"),
                _pair(row, lambda s: s["bound"]),
                _pair(row, lambda s: _fits(s["memory"])),
                _pair(row, lambda s: f"{s['sent_inside'] / 1e9:.1f} + {s['sent_between'] / 1e9:.1f}"),
                _pair(row, lambda s: f"{s['days']:.2g}" if s["days"] < 10 else f"{s['days']:.0f}"),
            ]
        )
    return _table(head, lines)


def _strong_table(rows: list[dict]) -> str:
    head = ["network", "GPUs", "images a step, a GPU", "step, ms: ddp \\| fsdp", "bound by", "days"]
    lines = []
    for row in rows:
        lines.append(
            [
                row["network"],
                f"{row['gpus']:,}",
                f"{row['batch']:,}, {row['batch'] // row['gpus']:,}",
                _pair(row, lambda s: f"{s['seconds'] * 1e3:,.0f}"),
                _pair(row, lambda s: s["bound"]),
                _pair(row, lambda s: f"{s['days']:.2g}" if s["days"] < 10 else f"{s['days']:.0f}"),
            ]
        )
    return _table(head, lines)


def _fitting(rows: list[dict]) -> str:
    lines = []
    for name in NETWORKS:
        cells = [name]
        for size in (80e9, 141e9):
            for strategy, count in (("ddp", 8), ("fsdp", 8), ("fsdp", 256)):
                fit = [
                    r["experts"]
                    for r in rows
                    if (r["network"], r["gpus"]) == (name, count)
                    and r[strategy].get("memory", math.inf) <= size
                ]  # fmt: skip
                cells.append(str(max(fit)) if fit else "none")
        lines.append(cells)
    head = ["largest E", *(f"{s} GB: {w}" for s in (80, 141) for w in ("ddp", "fsdp, 8 GPUs", "fsdp, 256"))]
    worst = next(r for r in rows if (r["network"], r["experts"], r["gpus"]) == ("ViT-H", 128, 256))
    held = worst["fsdp"]["held"]
    kept = sum(held[kind] for kind in ("weights", "gradients", "moments"))
    return _table(head, lines) + (
        f"\n\nViT-H with 128 experts has {worst['parameters'] / 1e9:.1f} billion numbers: "
        f"{worst['ddp']['memory'] / 1e9:,.0f} GB on every GPU with ddp. fsdp on 256 brings weights,\ngradients and "
        f"moments to {kept / 1e9:.1f} GB, but the bf16 copies stay whole, {held['bf16 copies'] / 1e9:.0f} GB: autocast "
        "makes them of gathered weights, and\nbackward keeps them. Gathered blocks take "
        f"{held['gathered blocks'] / 1e9:.0f} GB. FSDP2's own mixed precision, which gathers bf16, would do "
        "without\nthe copies and halve what is gathered; the code does not use it, nor expert parallelism, nor "
        f"sharding inside a node alone.\nA checkpoint of this network has {worst['checkpoint'] / 1e9:,.0f} GB, "
        f"{worst['checkpoint_seconds'] / 60:.0f} minutes at the assumed rate, while training goes on."
    )


def _other_gpus(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        lines.append(
            [
                row["device"],
                row["network"],
                str(row["experts"]),
                _pair(row, lambda s: f"{s['seconds'] * 1e3:,.0f}"),
                _pair(row, lambda s: _fits(s["memory"])),
                _pair(row, lambda s: f"{s['days']:.2g}"),
            ]
        )
    return _table(["GPU", "network", "E", "step, ms: ddp \\| fsdp", "GB a GPU, fits", "days, if it fits"], lines)


def picture(results: dict):
    """Three panels: predicted against measured; a step's parts over E; days over GPUs."""
    from matplotlib.figure import Figure

    ink, colours = "#333333", ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#aa3377")
    figure = Figure(figsize=(13, 4.2), dpi=110, layout="constrained")
    axes = figure.subplots(1, 3 if "tests" in results else 2)
    if "tests" in results:
        _scatter(axes[0], [t for t in results["tests"] if "seconds" in t["predicted"]], ink, colours)
    parts, run = axes[-2:]
    gpu = results["gpu"]
    rows = [r for r in gpu["weak"] if (r["network"], r["gpus"]) == ("ViT-L", 64)]
    bottom = [0.0] * len(rows)
    for (kind, label), colour in zip(
        {
            "compute": "operations",
            "weights": "casts, gradients",
            "update": "AdamW, GEMA",
            "exposed": "network, not hidden",
            "fixed": "fixed",
        }.items(),
        (colours[0], colours[2], colours[3], colours[1], "#bbbbbb"),
        strict=True,
    ):
        heights = [1e3 * r["ddp"]["parts"][kind] for r in rows]
        parts.bar([str(r["experts"]) for r in rows], heights, bottom=bottom, color=colour, label=label, width=0.7)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    parts.set(xlabel="experts E, of which an image takes 2", ylabel="ms")
    parts.set_title(f"A step of ViT-L, 64 {gpu['name']}, ddp\n(assumed unit costs)", fontsize=10, color=ink)

    for experts, colour in zip((8, 32, 128), colours, strict=False):
        rows = [r for r in gpu["weak"] if (r["network"], r["experts"]) == ("ViT-L", experts)]
        run.plot(
            [r["gpus"] for r in rows], [r["ddp"]["days"] for r in rows], "o-", color=colour, label=f"E = {experts}"
        )
    fixed_batch = [r for r in gpu["strong"] if r["network"] == "ViT-L"]
    run.plot(
        [r["gpus"] for r in fixed_batch], [r["ddp"]["days"] for r in fixed_batch],
        "s--", color=colours[0], alpha=0.6, label="E = 8, batch stays",
    )  # fmt: skip
    run.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="days of 200 epochs", xticks=GPUS)
    run.set_xticklabels([f"{n:,}" for n in GPUS])
    run.minorticks_off()
    run.set_title(f"The whole run, ViT-L, ddp, {IMAGES} images a GPU\n(memory not asked for)", fontsize=10, color=ink)
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
