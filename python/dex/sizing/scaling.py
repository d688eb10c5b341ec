"""What one rank of many does in a step: operations, bytes held, moved and sent; and how long that takes.

Counts follow what `dex.train.trainer` and `dex.common.ranks` do, tensor by tensor; times come from unit costs (`Costs`)
that are measured or assumed elsewhere. Bytes are bytes, times seconds, rates per second. The loader and evaluation are
not part of it. Letters: n ranks, l ranks of one node, m nodes, S bytes, T numbers that take a gradient.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple, get_args

import torch

from dex.common.ranks import Strategy, check_cut
from dex.common.units import format_bytes
from dex.config import Config, check, images_per_rank, per_layer, resolve_micro_batch
from dex.model.build import build_model
from dex.sizing.estimate import Estimate, estimate

FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
"""Bytes of DistributedDataParallel's first bucket of gradients and of the others: torch's own defaults."""
AUTOCAST_BYTES = 6
"""To cast one fp32 number to bf16: 4 read, 2 written."""
UPDATE_BYTES = 40
"""Per number that takes a gradient: norm (read g), clip (read and write g), AdamW (read p, g, m, v; write p, m, v)."""


class Link(NamedTuple):
    """What joins two ranks. bandwidth: bytes per second that one rank sends; latency: seconds of one hop."""

    bandwidth: float
    latency: float


class Costs(NamedTuple):
    """Unit costs of one rank while the ranks beside it work too. Every number measured or assumed, none fitted."""

    flops: float
    """Operations per second of forward and backward."""
    memory: float
    """Bytes per second that updates, casts and copies read and write."""
    fixed: float
    """Seconds of a step that depend on nothing: launches, the verdict, Python."""
    inner: Link
    """Between ranks of one node."""
    outer: Link
    """Between nodes; bandwidth per rank."""
    per_node: int
    """Ranks of one node."""
    overlap: float
    """Share of the time of backward (fsdp: of forward too) in which communication can run unseen. 0: none, as where
    the processors that compute also carry the messages; 1: all of it."""
    store: float
    """Bytes per second that a checkpoint is written and hashed with, all ranks together."""
    scatter: float = 1.0
    """Times the bytes that a reduce-scatter should send. gloo carries it out as an all-reduce: 2."""
    gather_rate: float = 1.0
    """Share of the links' bandwidth, which is that of an all-reduce, that an all-gather reaches."""
    scatter_rate: float = 1.0
    """The same of a reduce-scatter."""


class Tensor(NamedTuple):
    """A parameter. cut: the dimension that fsdp cuts."""

    name: str
    shape: tuple[int, ...]
    trained: bool
    cut: int

    def numbers(self, ranks: int = 1) -> int:
        """Numbers that ``ranks`` hold together: the cut dimension is padded to a multiple of theirs."""
        size = self.shape[self.cut]
        return math.prod(self.shape) // size * (-(-size // ranks) * ranks)


class Workload(NamedTuple):
    """A configuration, counted. groups: the parameters that fsdp gathers together; the last are the root's."""

    config: Config
    estimate: Estimate
    groups: tuple[tuple[Tensor, ...], ...]
    modalities: int


class Exchange(NamedTuple):
    """Collectives of one kind in a step. payload: bytes of the whole tensors, over all calls; passes over the ring."""

    kind: str
    calls: int
    payload: int


class Step(NamedTuple):
    """Seconds of one step by what they go to. communication: all of it; exposed: what nothing hides."""

    compute: float
    weights: float
    update: float
    fixed: float
    communication: float
    exposed: float

    @property
    def total(self) -> float:
        return self.compute + self.weights + self.update + self.fixed + self.exposed

    @property
    def bound(self) -> str:
        """What takes the most of it."""
        parts = {"operations": self.compute, "memory": self.weights + self.update, "network": self.exposed}
        return max(parts | {"fixed costs": self.fixed}, key=lambda k: (parts | {"fixed costs": self.fixed})[k])


def workload(config: Config, modalities: int = 1, estimated: Estimate | None = None) -> Workload:
    """Count ``config``; nothing of its size is allocated. ``modalities`` of the data; ``estimated``: its `estimate`.

    ValueError as in `check`.
    """
    check(config)
    with torch.device("meta"):
        model = build_model(config)
    groups, seen = [], set()
    for module in [*model.encoder.blocks, *model.decoder_blocks, model]:
        group = []
        for name, p in module.named_parameters():
            if id(p) not in seen:
                seen.add(id(p))
                stacked = "experts." in name
                group.append(Tensor(name, tuple(p.shape), p.requires_grad, int(stacked)))
        groups.append(tuple(group))
    return Workload(config, estimated or estimate(config, 1), tuple(groups), modalities)


def exchanges(work: Workload, ranks: int, strategy: Strategy) -> dict[str, Exchange]:
    """What the ranks say to each other in a step, by what it is for.

    gradients: ddp all-reduces 4 T bytes in buckets; fsdp reduce-scatters them, padded, once per group. weights: fsdp
    gathers every block's fp32 weights, directors included, before its forward and before its backward, the root's once,
    and that for every micro-batch. norm: fsdp sums one number per trained tensor. verdict: one vector of doubles with
    the gate masses and slots of all experts, 5 losses, 3 flags and 2 numbers per modality. Directors need nothing else:
    their update is computed by every rank from the same masses (ddp), or piece by piece (fsdp).
    """
    micro = _micro_batches(work, ranks, strategy)
    if ranks == 1:
        return {}
    m = work.config.model
    experts = sum(per_layer(m.num_experts, m.depth))
    talk = {"verdict": Exchange("all_reduce", 1, 8 * (3 + 5 + 2 * work.modalities + 2 * experts))}
    if strategy == "ddp":
        return talk | {"gradients": Exchange("all_reduce", _buckets(work), 4 * work.estimate.trained)}
    gathered = [4 * sum(t.numbers(ranks) for t in group) for group in work.groups]
    trained = [[t for t in group if t.trained] for group in work.groups]
    return talk | {
        "weights": Exchange("all_gather", micro * (2 * len(gathered) - 1), micro * (2 * sum(gathered) - gathered[-1])),
        "gradients": Exchange(
            "reduce_scatter", len(trained), 4 * sum(t.numbers(ranks) for group in trained for t in group)
        ),
        "norm": Exchange("all_reduce", 1, 4 * sum(map(len, trained))),
    }


def sent(exchange: Exchange, ranks: int, per_node: int, scatter: float = 1.0) -> tuple[float, float]:
    """Bytes that one rank sends to ranks of its node and to other nodes; a ring in each.

    On one node an all-reduce of S bytes sends 2 (n - 1) / n S, a gather or reduce-scatter half of it. On m nodes of l
    ranks: (l - 1) / l S inside, twice for an all-reduce, and between nodes the same of m with the l-th part of S.
    """
    inside = min(ranks, per_node)
    nodes = _nodes(ranks, per_node)
    passes = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": scatter}[exchange.kind]
    inner = passes * (inside - 1) / inside * exchange.payload
    outer = passes * (nodes - 1) / nodes * exchange.payload / inside
    return inner, outer


def exchange_seconds(exchange: Exchange, ranks: int, costs: Costs) -> float:
    """Bytes over bandwidth, level after level, plus per call one hop for every rank of a node and doubling of nodes."""
    rate = {"all_reduce": 1.0, "all_gather": costs.gather_rate, "reduce_scatter": costs.scatter_rate}[exchange.kind]
    inner, outer = sent(exchange, ranks, costs.per_node, costs.scatter)
    inside, nodes = min(ranks, costs.per_node), _nodes(ranks, costs.per_node)
    passes = 2 if exchange.kind == "all_reduce" else 1
    hops = passes * ((inside - 1) * costs.inner.latency + math.ceil(math.log2(nodes)) * costs.outer.latency)
    return (inner / costs.inner.bandwidth + outer / costs.outer.bandwidth) / rate + exchange.calls * hops


def memory(work: Workload, ranks: int, strategy: Strategy) -> dict[str, int]:
    """Bytes that one rank holds, by kind: between steps, then within a step.

    Not all of them at once: the sum lies above the true peak as far as they go, but the images themselves, their
    targets and what an operator needs for a moment are not in it.

    ddp: gradients are views of the buckets that travel, so buckets cost nothing. fsdp: weights, gradients and moments
    are 1 / n, padded. What fsdp does not shrink: the bf16 copies that autocast makes of gathered weights, which
    backward keeps whole; two gathered blocks (in use and fetched ahead) and one block's gradients twice. With several
    micro-batches both hold the whole gradients of the earlier ones until they are exchanged.
    """
    counted, micro = work.estimate, _micro_batches(work, ranks, strategy)
    held = dict(counted.memory)
    sharded = strategy == "fsdp" and ranks > 1
    if sharded:
        whole = sum(t.numbers(ranks) for group in work.groups for t in group)
        trained = sum(t.numbers(ranks) for group in work.groups for t in group if t.trained)
        buffers = held["weights"] - 4 * sum(counted.parameters.values())
        held |= {
            "weights": 4 * whole // ranks + buffers,
            "gradients": 4 * trained // ranks,
            "moments": 8 * trained // ranks,
        }
        if "averages" in held:
            held["averages"] = 4 * whole // ranks
    held["activations"] = work.config.data.batch_size // ranks // micro * counted.activations
    if micro > 1 and ranks > 1:
        held["earlier micro-batches"] = 4 * counted.trained
    if sharded:
        block = max(sum(t.numbers(ranks) for t in group) for group in work.groups)
        block_trained = max(sum(t.numbers(ranks) for t in group if t.trained) for group in work.groups)
        held["gathered blocks"] = 2 * 4 * (block + block_trained)
    return held


def moved(work: Workload, ranks: int, strategy: Strategy) -> dict[str, int]:
    """Bytes that one rank reads and writes in a step beside its matrix products; they grow with E, operations do not.

    casts: bf16 copies of all weights in every micro-batch; with ddp those of experts and directors once, unless the
    step is compiled or a CUDA graph. gradients: written by backward, zeros of unused experts included, and added up
    over micro-batches. adamw: `UPDATE_BYTES` per trained number. gema: every expert read, every director read and
    written. copies: fsdp copies what it gathered, and gradients, into place.

    ValueError with ``parallel.checkpointing``: the casts of recomputation are not counted.
    """
    if work.config.parallel.checkpointing:
        raise ValueError("parallel.checkpointing: expected False, since recomputation is not counted; got True")
    counted, micro = work.estimate, _micro_batches(work, ranks, strategy)
    everything = sum(counted.parameters.values())
    parallel = work.config.parallel
    held = strategy == "ddp" and not (parallel.compile or parallel.cuda_graph)
    once = counted.parameters["experts"] + counted.parameters["directors"] if held else 0
    shards = ranks if strategy == "fsdp" else 1
    traffic = {
        "casts": AUTOCAST_BYTES * (once + micro * (everything - once)) if counted.memory["bf16 copies"] else 0,
        "gradients": 4 * counted.trained * (1 + 3 * (micro - 1)),
        "adamw": UPDATE_BYTES * counted.trained // shards,
        "gema": 4 * (counted.parameters["experts"] + 2 * counted.parameters["directors"]) // shards,
        "copies": 0,
    }
    if not counted.parameters["directors"]:
        traffic["gema"] = 0
    if shards > 1:
        talk = exchanges(work, ranks, strategy)
        traffic["copies"] = 2 * (talk["weights"].payload + talk["gradients"].payload)
    return traffic


def step(work: Workload, ranks: int, strategy: Strategy, costs: Costs) -> Step:
    """Seconds of one step.

    total = compute + weights + update + fixed + exposed. compute: operations of this rank's images, but at least the
    time to read the weights of the experts that they take, three times in all. weights: casts, gradients and copies;
    update: AdamW and GEMA, after the last gradient has come; neither overlaps with anything. exposed = communication
    minus ``overlap`` times the compute that it may run beside: of ddp the last micro-batch's backward (2/3 of it), of
    fsdp all; at least one bucket or block of it, which nothing can hide.

    Raises: ValueError when the batch cannot be cut into equal parts, and as in `moved`.
    """
    _check_costs(costs)
    counted, micro = work.estimate, _micro_batches(work, ranks, strategy)
    images = work.config.data.batch_size // ranks
    traffic = moved(work, ranks, strategy)
    compute = max(images * counted.flops_per_image / costs.flops, micro * _read(work, images // micro) / costs.memory)
    talk = exchanges(work, ranks, strategy)
    communication = sum(exchange_seconds(e, ranks, costs) for e in talk.values())
    if strategy == "ddp":
        window, pieces = 2 / 3 * compute / micro, _buckets(work)
    else:
        window, pieces = compute, len(work.groups)
    return Step(
        compute=compute,
        weights=(traffic["casts"] + traffic["gradients"] + traffic["copies"]) / costs.memory,
        update=(traffic["adamw"] + traffic["gema"]) / costs.memory,
        fixed=costs.fixed,
        communication=communication,
        exposed=max(communication - costs.overlap * window, communication / pieces),
    )


def checkpoint_seconds(work: Workload, costs: Costs) -> float:
    """Until a checkpoint is on the disk, while training goes on."""
    return work.estimate.checkpoint / costs.store


def days(work: Workload, step_seconds: float, images: float) -> float:
    """Of a run over ``images`` images in all, at one batch every ``step_seconds``."""
    return images / work.config.data.batch_size * step_seconds / 86400


def split(config: Config, ranks: int, most: int) -> Config:
    """``config`` with the largest micro-batch of at most ``most`` images that divides a rank's part of the batch.

    Raises: ValueError when a rank gets no whole number of images.
    """
    part = images_per_rank(config, ranks)
    micro = max(m for m in range(1, most + 1) if part % m == 0)
    return replace(config, parallel=replace(config.parallel, micro_batch=micro))


def describe(work: Workload, ranks: int) -> list[str]:
    """Lines for people: what each of the ranks of one machine holds, copies to the host at a save, and sends."""
    try:
        at_once = resolve_micro_batch(work.config, ranks)
    except ValueError as error:
        return [f"{ranks} ranks cannot: {error}"]
    held, saved, talk = [], [], []
    for strategy in get_args(Strategy) if ranks > 1 else ("ddp",):
        under = f" with {strategy}" if ranks > 1 else ""
        try:
            total = memory(work, ranks, strategy)
        except ValueError as error:
            held.append(f"{strategy} cannot: {error}")
            continue
        held.append(format_bytes(sum(total.values())) + under)
        saved.append(format_bytes(total["weights"] + total["moments"]) + under)
        inner = sum(sent(e, ranks, ranks)[0] for e in exchanges(work, ranks, strategy).values())
        talk.append(format_bytes(inner) + under)
    who = f"each of {ranks} ranks" if ranks > 1 else "one rank"
    lines = [
        f"memory of {who}, {at_once} images at once: {', '.join(held)}",
        f"  and of its host, while a checkpoint is written: {', '.join(saved)}",
    ]
    return lines + ([f"  it sends in a step: {', '.join(talk)}"] if ranks > 1 else [])


def _micro_batches(work: Workload, ranks: int, strategy: Strategy) -> int:
    """The number of micro-batches of a step. ValueError where the network cannot run on this number of ranks."""
    if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
        raise ValueError(f"ranks: expected a whole number of at least 1, got {ranks!r}")
    if strategy not in get_args(Strategy):
        raise ValueError(f"strategy: expected one of {', '.join(get_args(Strategy))}, got {strategy!r}")
    if strategy == "fsdp":
        for tensor in (t for group in work.groups for t in group if t.cut):
            check_cut(tensor.name, tensor.shape, ranks)
    return work.config.data.batch_size // ranks // resolve_micro_batch(work.config, ranks)


def _buckets(work: Workload) -> int:
    """The approximate number of gradient buckets: a tensor is never cut, so a large one is a bucket of its own."""
    filled, count, limit = 0, 0, FIRST_BUCKET
    # As ddp fills them: from the last tensor to the first, closed by the one that passes the limit.
    order = [t for group in (work.groups[-1], *work.groups[:-1]) for t in group if t.trained]
    for tensor in reversed(order):
        filled += 4 * tensor.numbers()
        if filled >= limit:
            filled, count, limit = 0, count + 1, BUCKET
    return count + bool(filled)


def _read(work: Workload, images: int) -> float:
    """Bytes of weights that one micro-batch's matrix products read: forward, and two products of backward.

    Of the experts those that ``images`` images can take, min(E, K images) a layer; directors in forward only.
    """
    m, numbers = work.config.model, work.estimate.parameters
    size = 2 if work.estimate.memory["bf16 copies"] else 4
    experts, chosen = per_layer(m.num_experts, m.depth), per_layer(m.top_k, m.depth)
    taken = sum(min(e, k * images) for e, k in zip(experts, chosen, strict=True)) / (sum(experts) or 1)
    return size * (3 * (numbers["experts"] * taken + numbers["rest"]) + numbers["directors"])


def _nodes(ranks: int, per_node: int) -> int:
    if ranks > per_node and ranks % per_node:
        raise ValueError(f"ranks: expected a multiple of the {per_node} ranks of a node, got {ranks}")
    return max(1, ranks // per_node)


def _check_costs(costs: Costs) -> None:
    names = ("flops", "memory", "store", "per_node", "scatter", "gather_rate", "scatter_rate")
    positive = {name: getattr(costs, name) for name in names}
    positive |= {f"{level}.bandwidth": getattr(costs, level).bandwidth for level in ("inner", "outer")}
    for name, value in positive.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"costs.{name}: expected a finite number above 0, got {value!r}")
    for name, value in (("fixed", costs.fixed), ("inner.latency", costs.inner.latency)):
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"costs.{name}: expected a finite number of at least 0, got {value!r}")
    if not 0 <= costs.overlap <= 1:
        raise ValueError(f"costs.overlap: expected a share from 0 to 1, got {costs.overlap!r}")
