#!/usr/bin/env python3
"""How a step scales: unit costs and steps measured on this machine, and the predictions of `dex.sizing.scaling`.

usage: python scripts/scaling.py --measure    measure (about 20 minutes) and predict
       python scripts/scaling.py --predict    predict again from the measurements in the results file

Writes benchmarks/results/scaling/gloo.json, from which scripts/scaling_page.py makes docs/scaling.md.
Measuring starts its own ranks, see scripts/scaling_ranks.py. Nothing else should run meanwhile.
"""

import argparse
import datetime
import functools
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("benchmarks", "scripts", "python")]

import record  # noqa: E402
from scaling_ranks import CALIBRATION, configuration, launch  # noqa: E402

from dex.common import atomic  # noqa: E402

RESULTS = ROOT / "benchmarks/results/scaling/gloo.json"
EXPERTS, BATCHES = (4, 8, 16, 32), (8, 32)
RANKS = (1, 2, 4)
OTHER = {"embed_dim": 256, "depth": 3, "num_heads": 4}
"""A network among the test points that differs from the calibrated one."""

MAKERS = {
    "A100 80 GB": {"memory": 2.04e12, "inner": 300e9, "outer": 25e9},
    "H100 SXM": {"memory": 3.35e12, "inner": 450e9, "outer": 50e9},
    "H200 SXM": {"memory": 4.8e12, "inner": 450e9, "outer": 50e9},
}
"""Makers' figures, bytes per second: memory; NVLink, one way; one network adapter per GPU (200 or 400 Gbit/s)."""
ASSUMED = {
    "share of memory and network bandwidth": 0.8,
    "seconds of one hop in a node": 5e-6,
    "seconds of one hop between nodes": 15e-6,
    "fixed seconds of a step": 5e-3,
    "share of compute beside which communication runs unseen": 0.8,
    "bytes per second to the disk": 2e9,
    "GPUs of a node": 8,
}
"""Values not measured here. The share of the peak that products reach is `dex.sizing.estimate.ASSUMED_MFU`."""
NETWORKS = {"ViT-B": (768, 12, 12), "ViT-L": (1024, 24, 16), "ViT-H": (1280, 32, 16)}
"""Width, layers, heads of `dex.model.vit_base`, `vit_large` and `vit_huge`; otherwise the preset published-code."""
GPU, GPUS, GPU_EXPERTS = "H100 SXM", (8, 64, 256), (8, 32)
IMAGES = 112
"""Images per GPU and step (896 on 8 GPUs), and the largest micro-batch."""
MODALITIES = 10
RUN_IMAGES = 200 * 4.97e6
"""Images of the published run: 200 epochs of 4.97 million."""
SCATTER = 2.0
"""Passes over the ring of gloo's reduce-scatter, which is implemented as an all-reduce."""
SIZES = [2**k for k in range(10, 27, 2)]
"""Bytes of the timed collectives."""


def test_points(ranks: int) -> list[dict]:
    """The configurations that are predicted and measured with this number of ranks."""
    points = [
        {"strategy": strategy, "experts": experts, "batch": batch}
        for strategy in (("ddp", "fsdp") if ranks > 1 else ("ddp",))
        for experts in EXPERTS
        for batch in BATCHES
    ]
    if ranks == 2:
        points += [
            {"strategy": strategy, "experts": 8, "batch": 32, **change}
            for strategy in ("ddp", "fsdp")
            for change in ({"micro_batch": 4}, {"model": OTHER})
        ]
    return points


# From the ranks' measurements to unit costs and results.


def measure(steps: int = 4, rounds: int = 6) -> dict:
    """All measurements, in the format of the results file."""
    import torch

    from dex.train.runlog import describe_machine

    torch.set_num_threads(1)
    began, loads, costs, tests = time.monotonic(), [], {}, []
    machine = describe_machine(torch.device("cpu"))  # Before the run, since files may be edited during it.
    for count in RANKS:
        points = test_points(count)
        job = {"rounds": rounds, "sizes": SIZES}
        # The machine's speed drifts: measure half of the costs before the test points and half after them.
        before = launch(count, job)
        loads.append(os.getloadavg()[0])
        by_rank = launch(count, {"points": points, "steps": steps}, timeout=3600)
        loads.append(os.getloadavg()[0])
        costs[str(count)] = summary(before + launch(count, job))
        print(f"{count} ranks: {time.monotonic() - began:.0f} s", file=sys.stderr)
        for i, point in enumerate(points):
            seconds = spread([t for of_rank in by_rank for t in of_rank[i]])
            tests.append({"ranks": count, **point, "measured": {"seconds": seconds}})
    return {
        "date": datetime.date.today().isoformat(),
        "seconds": round(time.monotonic() - began),
        "loads": [round(load, 1) for load in loads],
        "machine": machine,
        "calibration": CALIBRATION,
        "steps": steps,
        "costs": costs,
        "tests": tests,
    }


class Spread(NamedTuple):
    """Median and quartiles; a list in the results file."""

    median: float
    low: float
    high: float


def spread(values: list[float]) -> Spread:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(*(float(f"{v:.5g}") for v in (middle, low, high)))


def summary(by_rank: list[dict]) -> dict:
    """Medians and quartiles over ranks and rounds, in seconds."""
    pooled = {
        "steps": {b: spread([t for rank in by_rank for t in rank["steps"][b]]) for b in by_rank[0]["steps"]},
        **{kind: spread([t for rank in by_rank for t in rank[kind]]) for kind in ("update", "gema")},
        "collectives": {
            kind: {size: spread([t for rank in by_rank for t in rank["collectives"][kind][size]]) for size in sizes}
            for kind, sizes in by_rank[0]["collectives"].items()
        },
    }
    if "checkpoint" in by_rank[0]:
        pooled["checkpoint"] = spread([t for rank in by_rank for t in rank["checkpoint"]])
    return pooled


# Predictions, from unit costs alone.


def unit_costs(results: dict, ranks: int):
    """The unit costs of this machine with this number of busy ranks, from the calibration.

    Two batches of one network give the seconds per image. The fixed part is the rest of the smaller batch's step after
    its images, gradients and update.
    """
    from dex.data import open_dataset
    from dex.sizing.scaling import Costs, Link, moved, workload

    calibration = results["costs"][str(ranks)]
    small, large = CALIBRATION["batches"]
    steps = {batch: Spread(*calibration["steps"][str(batch)]).median for batch in (small, large)}
    update = Spread(*calibration["update"]).median
    work = workload(
        configuration({"experts": CALIBRATION["experts"], "batch": small}), len(open_dataset(None).modalities)
    )
    per_image = (steps[large] - steps[small]) / (large - small)
    traffic = moved(work, 1, "ddp")
    bandwidth = (traffic["adamw"] + traffic["gema"]) / update
    fixed = steps[small] - small * per_image - update - traffic["gradients"] / bandwidth
    link, rates = Link(1.0, 0.0), {}  # A single rank uses no link.
    if ranks > 1:
        speeds = {}
        for kind, passes in (("all_reduce", 2), ("all_gather", 1), ("reduce_scatter", SCATTER)):
            times = {int(size): Spread(*entry).median for size, entry in calibration["collectives"][kind].items()}
            least, most = min(times), max(times)
            speeds[kind] = passes * (ranks - 1) / ranks * most / (times[most] - times[least])
            if kind == "all_reduce":
                latency = times[least] / (2 * (ranks - 1))
        link = Link(speeds["all_reduce"], latency)
        rates["gather_rate"] = speeds["all_gather"] / link.bandwidth
        rates["scatter_rate"] = speeds["reduce_scatter"] / link.bandwidth
    written = Spread(*results["costs"]["1"]["checkpoint"]).median
    return Costs(
        flops=work.estimate.flops_per_image / per_image,
        memory=bandwidth,
        fixed=max(fixed, 0.0),
        inner=link,
        outer=link,
        per_node=ranks,
        overlap=0.0,
        store=work.estimate.checkpoint / written,
        scatter=SCATTER,
        **rates,
    )


def tested(results: dict) -> dict:
    """Unit costs, and the test points with their predictions."""
    from dex.data import open_dataset
    from dex.sizing.scaling import step, workload

    modalities = len(open_dataset(None).modalities)
    costs = {n: unit_costs(results, n) for n in RANKS}
    tests = []
    for point in results["tests"]:
        n, strategy = point["ranks"], point["strategy"]
        seconds = step(workload(configuration(point), modalities), n, strategy, costs[n]).total
        tests.append(point | {"predicted": {"seconds": seconds}})
    return {"unit_costs": {str(n): c._asdict() for n, c in costs.items()}, "tests": tests}


def predict(results: dict) -> dict:
    """``results`` with predictions of its test points, if it has any, and the GPU table."""
    import torch

    from dex.sizing.estimate import ASSUMED_MFU
    from dex.sizing.scaling import AUTOCAST_BYTES, UPDATE_BYTES

    torch.set_num_threads(1)
    if "tests" in results:
        results = results | tested(results)
    gpu, source = gpu_costs(GPU)
    return results | {
        "bytes": {"update": UPDATE_BYTES, "cast": AUTOCAST_BYTES},
        "gpu": {
            "name": GPU,
            "costs": gpu._asdict(),
            "sources": source,
            "mfu": ASSUMED_MFU,
            "rows": [
                gpu_row(name, experts, count, gpu) for name in NETWORKS for experts in GPU_EXPERTS for count in GPUS
            ],
        },
    }


def gpu_costs(name: str):
    """Unit costs of a GPU, from a results file of it if there is one, and {cost: "measured" or "assumed"}."""
    from dex.sizing.estimate import ASSUMED_MFU
    from dex.sizing.estimate import GPUS as KNOWN
    from dex.sizing.scaling import Costs, Link

    peak = next(gpu for gpu in KNOWN if gpu.name == name)
    share, maker = ASSUMED["share of memory and network bandwidth"], MAKERS[name]
    flops, memory, source = peak.bf16_flops * ASSUMED_MFU, share * maker["memory"], {"flops": "assumed"}
    source |= {"memory": "assumed"}
    for result in record.newest():
        if name.split()[0] in result["device"]:
            flops, memory = (
                result["ceilings"]["bf16_tflops"] * 1e12 * ASSUMED_MFU,
                result["ceilings"]["copy_gbps"] * 1e9,
            )
            source = {"flops": f"{ASSUMED_MFU:.0%} (assumed) of the measured product", "memory": "measured"}
    costs = Costs(
        flops=flops,
        memory=memory,
        fixed=ASSUMED["fixed seconds of a step"],
        inner=Link(share * maker["inner"], ASSUMED["seconds of one hop in a node"]),
        outer=Link(share * maker["outer"], ASSUMED["seconds of one hop between nodes"]),
        per_node=ASSUMED["GPUs of a node"],
        overlap=ASSUMED["share of compute beside which communication runs unseen"],
        store=ASSUMED["bytes per second to the disk"],
    )
    return costs, source | {"everything else": "assumed"}


@functools.cache
def counted(name: str, experts: int):
    """The workload of a network; the caller sets its batch."""
    from dataclasses import replace

    from dex.config import preset
    from dex.sizing.scaling import workload

    width, depth, heads = NETWORKS[name]
    base = preset("published-code")
    model = replace(base.model, embed_dim=width, depth=depth, num_heads=heads, num_experts=experts)
    return workload(replace(base, model=model), MODALITIES)


def gpu_row(name: str, experts: int, count: int, costs) -> dict:
    """One network on ``count`` GPUs, `IMAGES` on each, with both strategies; an impossible one gives its reason."""
    from dataclasses import replace

    from dex.sizing.scaling import days, memory, split, step

    work = counted(name, experts)
    config = replace(work.config, data=replace(work.config.data, batch_size=count * IMAGES))
    work = work._replace(config=split(config, count, IMAGES))
    row = {"network": name, "experts": experts, "gpus": count}
    for strategy in ("ddp", "fsdp"):
        try:
            parts, held = step(work, count, strategy, costs), memory(work, count, strategy)
        except ValueError as error:
            row[strategy] = {"refused": str(error)}
            continue
        row[strategy] = {
            "seconds": parts.total,
            "bound": parts.bound,
            "memory": sum(held.values()),
            "days": days(work, parts.total, RUN_IMAGES),
        }
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--predict", action="store_true")
    options = parser.parse_args()
    if options.measure:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        write(measure())
    if options.measure or options.predict:
        write(predict(json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}))
    return 0


def write(results: dict) -> None:
    atomic.write(RESULTS, lines(rounded(results)) + "\n")


def lines(value, depth: int = 0) -> str:
    """JSON with one line per list item and per value of the two outermost dictionaries."""
    inner = " " * (depth + 1)
    if isinstance(value, dict) and depth < 2:
        items = [f"{inner}{json.dumps(k)}: {lines(v, depth + 1)}" for k, v in value.items()]
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        items = [inner + json.dumps(v) for v in value]
    else:
        return json.dumps(value)
    first, last = ("{", "}") if isinstance(value, dict) else ("[", "]")
    return f"{first}\n" + ",\n".join(items) + f"\n{' ' * depth}{last}"


def rounded(value):
    """``value`` with every float rounded to four digits; more are not significant."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
