"""The model of how a step scales, against what ranks really hold and send; the page that is made of it."""

import importlib.util
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dex.common.units import format_bytes
from dex.config import PRESETS, preset
from dex.model import mae as model
from dex.model.build import build_model
from dex.sizing import scaling
from dex.sizing.scaling import Costs, Exchange, Link

ROOT = Path(__file__).parents[3]
COSTS = Costs(
    flops=1e9, memory=1e11, fixed=0.01, inner=Link(1e10, 1e-5), outer=Link(1e9, 1e-4), per_node=8, overlap=0.0,
    store=1e9,
)  # fmt: skip
TINY = {
    "img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3, "decoder_embed_dim": 24, "decoder_depth": 1,
    "decoder_num_heads": 2,
}  # fmt: skip


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


program = load("scaling")


def tiny(**point):
    return program.configuration({"experts": 4, "batch": 6, "model": TINY, **point})


@pytest.fixture(scope="module")
def work():
    return scaling.workload(tiny(), 7)


def vary(work, **fields):
    """``work`` of another batch or micro-batch; what was counted stays."""
    config = work.config
    if "batch" in fields:
        config = replace(config, data=replace(config.data, batch_size=fields["batch"]))
    if "micro_batch" in fields:
        config = replace(config, parallel=replace(config.parallel, micro_batch=fields["micro_batch"]))
    return work._replace(config=config)


@pytest.mark.slow
def test_three_ranks_hold_and_send_what_is_predicted():
    """Three, so that nearly every tensor is padded and 2 (n - 1) / n is no whole number."""
    points = [
        {"experts": experts, "batch": 6, "model": TINY, "strategy": strategy, "micro_batch": micro}
        for strategy, experts, micro in (("ddp", 5, 1), ("fsdp", 4, None), ("fsdp", 5, 1))
    ]
    beside = Path(__file__).with_name("held_and_sent.py")
    found = program.launch(3, {"points": points}, timeout=300, program=str(beside))
    for i, point in enumerate(points):
        work = scaling.workload(program.configuration(point), 7)
        talk = scaling.exchanges(work, 3, point["strategy"])
        held = scaling.memory(work, 3, point["strategy"])
        seen = found[0][i]
        assert seen["held"] == {kind: held[kind] for kind in seen["held"]}, point
        # gloo is told the numbers that a rank brings, and carries a reduce-scatter out as an all-reduce
        calls, numbers = seen["collectives"]["all_reduce"]
        told = [e for e in talk.values() if e.kind != "all_gather"]
        sizes = [e.payload // (8 if name == "verdict" else 4) for name, e in talk.items() if e.kind != "all_gather"]
        assert numbers == sum(sizes), point
        # ddp closes its buckets in the order in which gradients came at the first step
        assert abs(calls - sum(e.calls for e in told)) <= (point["strategy"] == "ddp"), point
        if point["strategy"] == "fsdp":
            weights = talk["weights"]
            assert seen["collectives"]["all_gather"] == [weights.calls, weights.payload // 4 // 3], point
        predicted = sum(sum(scaling.sent(e, 3, 3, scatter=2.0)) for e in talk.values())
        for wire in (one[i]["wire"] for one in found):
            # headers of gloo: hundreds of bytes a collective
            assert 0 <= wire - predicted < 1500 * sum(e.calls for e in talk.values()), point
            assert wire == pytest.approx(predicted, rel=0.1), point
        assert 0 < seen["peak"] < 3 * sum(held.values()), point


@pytest.mark.parametrize("name", ["demo", "demo-monolithic", "published-code"])
def test_groups_hold_every_parameter_once(name):
    import torch

    config = PRESETS[name]
    with torch.device("meta"):
        built = build_model(config)
    work = scaling.workload(config)
    tensors = [t for group in work.groups for t in group]
    assert sum(t.numbers() for t in tensors) == sum(p.numel() for p in built.parameters())
    assert sum(t.numbers() for t in tensors if t.trained) == work.estimate.trained
    assert len(work.groups) == config.model.depth + config.model.decoder_depth + 1


def test_the_networks_of_the_tables_are_those_of_the_package():
    import torch

    with torch.device("meta"):
        for name, build in (("ViT-B", model.vit_base), ("ViT-L", model.vit_large), ("ViT-H", model.vit_huge)):
            width, depth, heads = program.NETWORKS[name]
            base = replace(preset("published-code").model, embed_dim=width, depth=depth, num_heads=heads)
            ours = build_model(replace(preset("published-code"), model=base))
            assert {n: p.shape for n, p in ours.named_parameters()} == {
                n: p.shape for n, p in build().named_parameters()
            }


def test_two_levels_send_what_one_ring_sends():
    exchange = Exchange("all_reduce", 1, 1000)
    for ranks in (1, 2, 8, 16, 64, 1024):
        assert sum(scaling.sent(exchange, ranks, 8)) == pytest.approx(2 * (ranks - 1) / ranks * 1000)
    assert scaling.sent(exchange, 8, 8)[1] == 0 and scaling.sent(exchange, 1, 8) == (0, 0)
    gather = Exchange("all_gather", 1, 1000)
    assert sum(scaling.sent(gather, 64, 8)) == sum(scaling.sent(exchange, 64, 8)) / 2
    assert scaling.sent(Exchange("reduce_scatter", 1, 1000), 64, 8, 2.0) == scaling.sent(exchange, 64, 8)
    seconds = scaling.exchange_seconds(exchange, 16, COSTS)
    assert seconds == pytest.approx(2 * 7 / 8 * 1000 / 1e10 + 1000 / 8 / 1e9 + 2 * (7 * 1e-5 + 1e-4))


def test_a_step_is_the_sum_of_its_parts(work):
    step = scaling.step(work, 2, "ddp", COSTS)
    assert step.compute == pytest.approx(3 * work.estimate.flops_per_image / 1e9)
    p, d = work.estimate.parameters, work.estimate.trained
    assert step.update == pytest.approx((40 * d + 4 * (p["experts"] + 2 * p["directors"])) / 1e11)
    assert step.weights == pytest.approx(4 * d / 1e11)
    assert step.exposed == step.communication > 4 * d / 1e10
    assert step.total == pytest.approx(step.compute + step.weights + step.update + 0.01 + step.exposed)
    # nothing hides the last piece, however much overlaps
    hidden = scaling.step(work, 2, "fsdp", COSTS._replace(flops=1e3, overlap=1.0))
    assert hidden.exposed == pytest.approx(hidden.communication / len(work.groups))
    alone = scaling.step(work, 1, "ddp", COSTS)
    assert alone.communication == alone.exposed == 0
    assert scaling.exchanges(work, 1, "ddp") == {}
    # a rate without end leaves the reading of weights
    read = scaling.step(work, 1, "ddp", COSTS._replace(flops=1e30)).compute
    assert read == pytest.approx(4 * (3 * (p["experts"] + p["rest"]) + p["directors"]) / 1e11)


def test_more_experts_cost_memory_and_traffic_but_no_operations():
    works = [scaling.workload(tiny(experts=e)) for e in (2, 4, 16)]
    assert len({w.estimate.flops["experts"] for w in works}) == 1
    for strategy in ("ddp", "fsdp"):
        for count in (
            lambda w, s=strategy: sum(scaling.memory(w, 2, s).values()),
            lambda w, s=strategy: sum(scaling.moved(w, 2, s).values()),
            lambda w, s=strategy: sum(e.payload for e in scaling.exchanges(w, 2, s).values()),
            lambda w, s=strategy: scaling.step(w, 2, s, COSTS).total,
            lambda w: w.estimate.checkpoint,
        ):
            assert count(works[0]) < count(works[1]) < count(works[2])


def test_more_ranks_share_the_work_and_talk_more(work):
    work = vary(work, batch=96)
    steps = [scaling.step(work, n, "ddp", COSTS) for n in (1, 2, 8, 16, 48)]
    assert [s.compute for s in steps] == sorted((s.compute for s in steps), reverse=True)
    assert [s.communication for s in steps] == sorted(s.communication for s in steps)
    held = [scaling.memory(work, n, "fsdp") for n in (1, 2, 4, 8, 16)]
    assert [h["moments"] for h in held] == sorted((h["moments"] for h in held), reverse=True)
    assert held[1]["moments"] * 2 == pytest.approx(held[0]["moments"], rel=0.02)
    assert scaling.memory(work, 2, "ddp")["moments"] == held[0]["moments"]
    assert scaling.days(work, 2.0, 96 * 86400) == 2.0


def test_micro_batches_keep_whole_gradients_and_gather_again(work):
    one, three = vary(work, batch=12), vary(work, batch=12, micro_batch=2)
    for strategy in ("ddp", "fsdp"):
        held = scaling.memory(three, 2, strategy)
        assert held["earlier micro-batches"] == 4 * work.estimate.trained
        assert held["activations"] == 2 * work.estimate.activations
        assert "earlier micro-batches" not in scaling.memory(one, 2, strategy)
    once, thrice = (scaling.exchanges(w, 2, "fsdp") for w in (one, three))
    assert thrice["weights"].payload == 3 * once["weights"].payload
    assert thrice["gradients"] == once["gradients"]


def test_bf16_copies_are_cut_by_nothing():
    work = scaling.workload(tiny(precision="bf16"))
    held = {s: scaling.memory(work, 2, s)["bf16 copies"] for s in ("ddp", "fsdp")}
    assert held["ddp"] == held["fsdp"] == 2 * sum(work.estimate.parameters.values())
    assert scaling.moved(work, 2, "fsdp")["casts"] == 3 * held["fsdp"]


@pytest.mark.parametrize("own", ["compile", "cuda_graph"])
def test_micro_batches_share_the_experts_copies_with_ddp(own):
    config = tiny(precision="bf16", batch=12, micro_batch=2)
    work = scaling.workload(config)
    found = work.estimate.parameters
    experts = found["experts"] + found["directors"]
    every = 3 * 3 * 2 * sum(found.values())
    assert scaling.moved(work, 2, "fsdp")["casts"] == every
    assert scaling.moved(work, 2, "ddp")["casts"] == every - 2 * 3 * 2 * experts
    config = replace(config, parallel=replace(config.parallel, **{own: True}))
    assert scaling.moved(work._replace(config=config), 2, "ddp")["casts"] == every


def test_the_largest_micro_batch_that_divides():
    config = tiny(batch=896)
    assert scaling.split(config, 8, 112).parallel.micro_batch == 112
    assert scaling.split(config, 64, 112).parallel.micro_batch == 14
    assert scaling.split(config, 8, 20).parallel.micro_batch == 16
    with pytest.raises(ValueError, match="batch_size: expected a multiple of the 1024 ranks, got 896"):
        scaling.split(config, 1024, 112)


def test_a_gather_and_a_scatter_may_be_slower_than_an_all_reduce():
    costs = COSTS._replace(per_node=2, gather_rate=0.5, scatter_rate=0.25)
    hop, bandwidth = COSTS.inner.latency, COSTS.inner.bandwidth
    for kind, passes, rate in (("all_reduce", 2, 1.0), ("all_gather", 1, 0.5), ("reduce_scatter", 1, 0.25)):
        seconds = scaling.exchange_seconds(Exchange(kind, 1, 2 * 10**9), 2, costs)
        assert seconds == pytest.approx(passes * (1e9 / bandwidth / rate + hop))


def test_what_makes_no_sense_is_named(work):
    for ranks in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="ranks: expected a whole number of at least 1"):
            scaling.step(work, ranks, "ddp", COSTS)
    with pytest.raises(ValueError, match="data.batch_size: expected a multiple of the 4 ranks, got 6"):
        scaling.memory(work, 4, "ddp")
    with pytest.raises(ValueError, match="strategy: expected one of ddp, fsdp, got 'tp'"):
        scaling.memory(work, 2, "tp")
    with pytest.raises(ValueError, match="ranks: expected a multiple of the 8 ranks per node, got 12"):
        scaling.step(vary(work, batch=12), 12, "ddp", COSTS)
    with pytest.raises(
        ValueError, match=r"of dex.experts.fc2_weight, which fsdp shards, .* of the 64 ranks, got \[4, 48, 192\]"
    ):
        scaling.exchanges(vary(work, batch=64), 64, "fsdp")
    again = replace(work.config, parallel=replace(work.config.parallel, checkpointing=True))
    with pytest.raises(ValueError, match="parallel.checkpointing: expected False"):
        scaling.step(scaling.workload(again), 1, "ddp", COSTS)
    wrong = {"flops": 0, "gather_rate": 0, "memory": math.nan, "store": -1, "fixed": -1, "overlap": 1.1}
    for field, value in wrong.items():
        with pytest.raises(ValueError, match=f"costs.{field}: expected"):
            scaling.step(work, 1, "ddp", COSTS._replace(**{field: value}))
    with pytest.raises(ValueError, match="costs.inner.bandwidth: expected a finite number above 0, got 0"):
        scaling.step(work, 1, "ddp", COSTS._replace(inner=Link(0, 0)))


def test_lines_for_a_dry_run(work):
    held, saved, talk = scaling.describe(vary(work, batch=64, micro_batch=2), 4)
    ddp, fsdp = (scaling.memory(vary(work, batch=64, micro_batch=2), 4, strategy) for strategy in ("ddp", "fsdp"))
    text = f"{format_bytes(sum(ddp.values()))} with ddp, {format_bytes(sum(fsdp.values()))} with fsdp"
    assert held == f"memory of each of 4 ranks, 2 images at once: {text}"
    assert format_bytes(work.estimate.checkpoint) + " with ddp" in saved
    assert "sent per step: " in talk and " with ddp, " in talk
    held, _, talk = scaling.describe(vary(work, batch=64), 64)
    assert (
        "64 ranks, 1 images at once: " in held
        and "fsdp is not possible: parallel.strategy: expected dimension 1" in held
    )
    assert talk.endswith(" with ddp")
    (alone,) = [line for line in scaling.describe(work, 1) if line.startswith("memory")]
    assert "ddp" not in alone and format_bytes(sum(scaling.memory(work, 1, "ddp").values())) in alone
    (refused,) = scaling.describe(work, 4)
    assert refused == "not possible on 4 ranks: data.batch_size: expected a multiple of the 4 ranks, got 6"


def test_the_page_is_what_the_results_say():
    done = subprocess.run([sys.executable, str(ROOT / "scripts/scaling_page.py"), "--check"], capture_output=True)
    assert done.returncode == 0, done.stdout


def test_the_results_are_of_every_point_and_what_is_predicted_now():
    results = json.loads(program.RESULTS.read_text())
    for ranks in program.RANKS:
        points = [
            {k: v for k, v in t.items() if k not in ("ranks", "measured", "predicted")}
            for t in results["tests"]
            if t["ranks"] == ranks
        ]
        assert points == program.test_points(ranks)
    assert program.CALIBRATION["experts"] not in program.EXPERTS
    assert not set(program.CALIBRATION["batches"]) & set(program.BATCHES)
    # A few of the predictions, by the formulas as they are.
    for test in [t for t in results["tests"] if t["experts"] == 4]:
        n, work = test["ranks"], scaling.workload(program.configuration(test), 7)
        parts = scaling.step(work, n, test["strategy"], program.unit_costs(results, n))
        assert test["predicted"]["seconds"] == pytest.approx(parts.total, rel=2e-3)


def test_the_tables_are_what_is_predicted_now():
    results = json.loads(program.RESULTS.read_text())
    gpu, _ = program.gpu_costs(program.GPU)
    for experts, count in ((8, 64), (32, 256)):
        row = next(
            r for r in results["gpu"]["rows"] if (r["network"], r["experts"], r["gpus"]) == ("ViT-L", experts, count)
        )
        again = program.rounded(program.gpu_row("ViT-L", experts, count, gpu))
        assert row == again
