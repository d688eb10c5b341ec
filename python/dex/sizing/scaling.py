"""The cost of a step on one of several ranks: operations, bytes in memory, moved and sent, and time.

Counts follow ``dex.train.trainer`` and ``dex.common.ranks`` tensor by tensor; times use unit costs (``Costs``) that are
measured or assumed elsewhere. Sizes are in bytes, times in seconds, rates per second. The loader and evaluations are
not included. Letters: n ranks, l ranks per node, m nodes, S bytes, T numbers with a gradient.
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
"""Bytes of DistributedDataParallel's first gradient bucket and of the others: the defaults of torch."""
AUTOCAST_BYTES = 6
"""To cast one fp32 number to bf16: 4 read, 2 written."""
UPDATE_BYTES = 40
"""Per number with a gradient: norm (read g), clip (read and write g), AdamW (read p, g, m, v; write p, m, v)."""


class Link(NamedTuple):
    """A connection between two ranks."""

    bandwidth: float
    """Bytes per second that one rank sends."""
    latency: float
    """Seconds per hop."""


class Costs(NamedTuple):
    """Unit costs of one rank while its neighbours work too. All are measured or assumed, none is fitted."""

    flops: float
    """Operations per second of forward and backward."""
    memory: float
    """Bytes per second that updates, casts and copies read and write."""
    fixed: float
    """Constant seconds per step: launches, the verdict, Python."""
    inner: Link
    """Between ranks of one node."""
    outer: Link
    """Between nodes; bandwidth per rank."""
    per_node: int
    """Ranks per node."""
    overlap: float
    """Share of backward (fsdp: also of forward) that can hide communication: 0 if the computing processors also carry
    the messages, 1 if all of it can."""
    store: float
    """Bytes per second with which all ranks together write and hash a checkpoint."""
    scatter: float = 1.0
    """Bytes sent by a reduce-scatter as a multiple of the ideal. gloo implements it as an all-reduce: 2."""
    gather_rate: float = 1.0
    """Bandwidth of an all-gather as a share of that of an all-reduce, which is the bandwidth of the links."""
    scatter_rate: float = 1.0
    """The same for a reduce-scatter."""


class Tensor(NamedTuple):
    """A parameter."""

    name: str
    shape: tuple[int, ...]
    trained: bool
    cut: int
    """The dimension that fsdp shards."""

    def numbers(self, ranks: int = 1) -> int:
        """Numbers on all ``ranks`` together; the sharded dimension is padded to a multiple of ``ranks``."""
        size = self.shape[self.cut]
        return math.prod(self.shape) // size * (-(-size // ranks) * ranks)


class Workload(NamedTuple):
    """The counts of a configuration."""

    config: Config
    estimate: Estimate
    groups: tuple[tuple[Tensor, ...], ...]
    """Parameters that fsdp gathers together; the last group is the root."""
    modalities: int


class Exchange(NamedTuple):
    """Collectives of one kind in a step."""

    kind: str
    calls: int
    payload: int
    """Bytes of the unsharded tensors, over all calls."""


class Step(NamedTuple):
    """Seconds of one step by cause."""

    compute: float
    weights: float
    update: float
    fixed: float
    communication: float
    """All of it."""
    exposed: float
    """Communication that nothing hides."""

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.compute + self.weights + self.update + self.fixed + self.exposed

    @property
    def bound(self) -> str:
        """The largest part."""
        parts = {
            "operations": self.compute,
            "memory": self.weights + self.update,
            "network": self.exposed,
            "fixed costs": self.fixed,
        }
        return max(parts, key=parts.__getitem__)


def workload(config: Config, modalities: int = 1, estimated: Estimate | None = None) -> Workload:
    """Count ``config`` without allocating its model. modalities: of the data; estimated: result of ``estimate``.

    ValueError as in ``check``.
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
    """The collectives of a step by purpose.

    gradients: ddp all-reduces 4 T bytes in buckets; fsdp reduce-scatters them, padded, once per group. weights: for
    every micro-batch, fsdp gathers the fp32 weights of each block, including directors, before its forward and again
    before its backward, and those of the root once. norm: fsdp sums one number per trained tensor. verdict: one vector
    of doubles with the gate masses and slots of all experts, 5 losses, 3 flags and 2 numbers per modality. Directors
    need nothing else: every rank updates them from the same masses (ddp), or only its shard (fsdp).
    """
    micro = _micro_batches(work, ranks, strategy)
    if ranks == 1:
        return {}
    m = work.config.model
    experts = sum(per_layer(m.num_experts, m.depth))
    verdict = {"verdict": Exchange("all_reduce", 1, 8 * (3 + 5 + 2 * work.modalities + 2 * experts))}
    if strategy == "ddp":
        return verdict | {"gradients": Exchange("all_reduce", _buckets(work), 4 * work.estimate.trained)}
    gathered = [4 * sum(t.numbers(ranks) for t in group) for group in work.groups]
    trained = [[t for t in group if t.trained] for group in work.groups]
    return verdict | {
        "weights": Exchange("all_gather", micro * (2 * len(gathered) - 1), micro * (2 * sum(gathered) - gathered[-1])),
        "gradients": Exchange(
            "reduce_scatter", len(trained), 4 * sum(t.numbers(ranks) for group in trained for t in group)
        ),
        "norm": Exchange("all_reduce", 1, 4 * sum(map(len, trained))),
    }


def sent(exchange: Exchange, ranks: int, per_node: int, scatter: float = 1.0) -> tuple[float, float]:
    """Bytes that one rank sends within its node and to other nodes, with a ring on both levels.

    On one node an all-reduce of S bytes sends 2 (n - 1) / n S, a gather or reduce-scatter half of it. On m nodes of l
    ranks, it is (l - 1) / l S within a node, twice for an all-reduce, and between nodes the same with m for S / l
    bytes.
    """
    inside = min(ranks, per_node)
    nodes = _nodes(ranks, per_node)
    passes = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": scatter}[exchange.kind]
    inner = passes * (inside - 1) / inside * exchange.payload
    outer = passes * (nodes - 1) / nodes * exchange.payload / inside
    return inner, outer


def exchange_seconds(exchange: Exchange, ranks: int, costs: Costs) -> float:
    """Bytes over bandwidth, one level after the other, plus per call a hop for each rank of a node and doubling of
    nodes."""
    rate = {"all_reduce": 1.0, "all_gather": costs.gather_rate, "reduce_scatter": costs.scatter_rate}[exchange.kind]
    inner, outer = sent(exchange, ranks, costs.per_node, costs.scatter)
    inside, nodes = min(ranks, costs.per_node), _nodes(ranks, costs.per_node)
    passes = 2 if exchange.kind == "all_reduce" else 1
    hops = passes * ((inside - 1) * costs.inner.latency + math.ceil(math.log2(nodes)) * costs.outer.latency)
    return (inner / costs.inner.bandwidth + outer / costs.outer.bandwidth) / rate + exchange.calls * hops


def memory(work: Workload, ranks: int, strategy: Strategy) -> dict[str, int]:
    """Bytes on one rank by kind: first those between steps, then those within a step.

    They do not all peak at once, so the sum exceeds their true peak; but it does not contain the images, their targets
    and temporary memory of operators.

    ddp: gradients are views of the buckets, so buckets cost nothing. fsdp: weights, gradients and moments are 1 / n,
    padded. fsdp does not reduce the bf16 copies that autocast makes of gathered weights, which are kept for backward,
    nor two gathered blocks (in use and prefetched) and twice the gradients of a block. With several micro-batches, both
    keep the whole gradients of earlier ones until they are exchanged.
    """
    estimated, micro = work.estimate, _micro_batches(work, ranks, strategy)
    sizes = dict(estimated.memory)
    sharded = strategy == "fsdp" and ranks > 1
    if sharded:
        total = sum(t.numbers(ranks) for group in work.groups for t in group)
        trained = sum(t.numbers(ranks) for group in work.groups for t in group if t.trained)
        buffers = sizes["weights"] - 4 * sum(estimated.parameters.values())
        sizes |= {
            "weights": 4 * total // ranks + buffers,
            "gradients": 4 * trained // ranks,
            "moments": 8 * trained // ranks,
        }
        if "averages" in sizes:
            sizes["averages"] = 4 * total // ranks
    sizes["activations"] = work.config.data.batch_size // ranks // micro * estimated.activations
    if micro > 1 and ranks > 1:
        sizes["earlier micro-batches"] = 4 * estimated.trained
    if sharded:
        block = max(sum(t.numbers(ranks) for t in group) for group in work.groups)
        block_trained = max(sum(t.numbers(ranks) for t in group if t.trained) for group in work.groups)
        sizes["gathered blocks"] = 2 * 4 * (block + block_trained)
    return sizes


def moved(work: Workload, ranks: int, strategy: Strategy) -> dict[str, int]:
    """Bytes that one rank reads and writes in a step besides matrix products; unlike operations they grow with E.

    casts: bf16 copies of all weights in every micro-batch; with ddp those of experts and directors only once, unless
    the step is compiled or a CUDA graph. gradients: written by backward, including zeros of unused experts, and
    accumulated over micro-batches. adamw: ``UPDATE_BYTES`` per trained number. gema: every expert read, every director
    read and written. copies: fsdp copies gathered weights and gradients into place.

    ValueError with ``parallel.checkpointing``: the casts of recomputation are not counted.
    """
    if work.config.parallel.checkpointing:
        raise ValueError("parallel.checkpointing: expected False, since recomputation is not counted, got True")
    estimated, micro = work.estimate, _micro_batches(work, ranks, strategy)
    total = sum(estimated.parameters.values())
    parallel = work.config.parallel
    cast_once = strategy == "ddp" and not (parallel.compile or parallel.cuda_graph)
    once = estimated.parameters["experts"] + estimated.parameters["directors"] if cast_once else 0
    shards = ranks if strategy == "fsdp" else 1
    traffic = {
        "casts": AUTOCAST_BYTES * (once + micro * (total - once)) if estimated.memory["bf16 copies"] else 0,
        "gradients": 4 * estimated.trained * (1 + 3 * (micro - 1)),
        "adamw": UPDATE_BYTES * estimated.trained // shards,
        "gema": 4 * (estimated.parameters["experts"] + 2 * estimated.parameters["directors"]) // shards,
        "copies": 0,
    }
    if not estimated.parameters["directors"]:
        traffic["gema"] = 0
    if shards > 1:
        collectives = exchanges(work, ranks, strategy)
        traffic["copies"] = 2 * (collectives["weights"].payload + collectives["gradients"].payload)
    return traffic


def step(work: Workload, ranks: int, strategy: Strategy, costs: Costs) -> Step:
    """Seconds of one step.

    total = compute + weights + update + fixed + exposed. compute: operations of this rank's images, but at least the
    time to read the weights of the experts they use, three times in total. weights: casts, gradients and copies;
    update: AdamW and GEMA, after the last gradient has arrived; neither overlaps with anything. exposed = communication
    minus ``overlap`` times the compute that may hide it: for ddp the backward of the last micro-batch (2/3 of it), for
    fsdp all; at least one bucket or block, which nothing can hide.

    Raises: ValueError if the batch cannot be divided evenly, and as in ``moved``.
    """
    _check_costs(costs)
    flops, micro = work.estimate.flops_per_image, _micro_batches(work, ranks, strategy)
    images = work.config.data.batch_size // ranks
    traffic = moved(work, ranks, strategy)
    compute = max(images * flops / costs.flops, micro * _read(work, images // micro) / costs.memory)
    communication = sum(exchange_seconds(e, ranks, costs) for e in exchanges(work, ranks, strategy).values())
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


def days(work: Workload, step_seconds: float, images: float) -> float:
    """Days of a run over ``images`` images in total, with one batch every ``step_seconds``."""
    return images / work.config.data.batch_size * step_seconds / 86400


def split(config: Config, ranks: int, most: int) -> Config:
    """``config`` with the largest micro-batch of at most ``most`` images that divides a rank's part of the batch.

    Raises: ValueError if the ranks cannot share the batch evenly.
    """
    part = images_per_rank(config, ranks)
    micro = max(m for m in range(1, most + 1) if part % m == 0)
    return replace(config, parallel=replace(config.parallel, micro_batch=micro))


def describe(work: Workload, ranks: int) -> list[str]:
    """Memory of each rank on one machine, its copy on the host during a save, and bytes sent per step, as text."""
    try:
        micro_batch = resolve_micro_batch(work.config, ranks)
    except ValueError as error:
        return [f"not possible on {ranks} ranks: {error}"]
    device, host, network = [], [], []
    for strategy in get_args(Strategy) if ranks > 1 else ("ddp",):
        suffix = f" with {strategy}" if ranks > 1 else ""
        try:
            sizes = memory(work, ranks, strategy)
        except ValueError as error:
            device.append(f"{strategy} is not possible: {error}")
            continue
        device.append(format_bytes(sum(sizes.values())) + suffix)
        host.append(format_bytes(sizes["weights"] + sizes["moments"]) + suffix)
        inner = sum(sent(e, ranks, ranks)[0] for e in exchanges(work, ranks, strategy).values())
        network.append(format_bytes(inner) + suffix)
    who = f"each of {ranks} ranks" if ranks > 1 else "one rank"
    lines = [
        f"memory of {who}, {micro_batch} images at once: {', '.join(device)}",
        f"  on its host while a checkpoint is written: {', '.join(host)}",
    ]
    return lines + ([f"  sent per step: {', '.join(network)}"] if ranks > 1 else [])


def _micro_batches(work: Workload, ranks: int, strategy: Strategy) -> int:
    """Number of micro-batches in a step. ValueError: the model cannot run on this number of ranks."""
    if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
        raise ValueError(f"ranks: expected a whole number of at least 1, got {ranks!r}")
    if strategy not in get_args(Strategy):
        raise ValueError(f"strategy: expected one of {', '.join(get_args(Strategy))}, got {strategy!r}")
    if strategy == "fsdp":
        for tensor in (t for group in work.groups for t in group if t.cut):
            check_cut(tensor.name, tensor.shape, ranks)
    return work.config.data.batch_size // ranks // resolve_micro_batch(work.config, ranks)


def _buckets(work: Workload) -> int:
    """Approximate number of gradient buckets; tensors are never split, so a large one has its own bucket."""
    filled, count, limit = 0, 0, FIRST_BUCKET
    # In the order of ddp: from the last tensor to the first; a bucket ends with the tensor that exceeds the limit.
    order = [t for group in (work.groups[-1], *work.groups[:-1]) for t in group if t.trained]
    for tensor in reversed(order):
        filled += 4 * tensor.numbers()
        if filled >= limit:
            filled, count, limit = 0, count + 1, BUCKET
    return count + bool(filled)


def _read(work: Workload, images: int) -> float:
    """Bytes of weights that the matrix products of a micro-batch read: forward, and twice in backward.

    Of the experts only those that ``images`` images can use, min(E, K images) per layer; directors only in forward.
    """
    m, numbers = work.config.model, work.estimate.parameters
    size = 2 if work.estimate.memory["bf16 copies"] else 4
    experts, chosen = per_layer(m.num_experts, m.depth), per_layer(m.top_k, m.depth)
    used = sum(min(e, k * images) for e, k in zip(experts, chosen, strict=True)) / (sum(experts) or 1)
    return size * (3 * (numbers["experts"] * used + numbers["rest"]) + numbers["directors"])


def _nodes(ranks: int, per_node: int) -> int:
    if ranks > per_node and ranks % per_node:
        raise ValueError(f"ranks: expected a multiple of the {per_node} ranks per node, got {ranks}")
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
