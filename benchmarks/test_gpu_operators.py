"""Every operator: each backend against its baselines and the limits; only correct results are timed.

Letters: B images, N tokens (CLS first), D width, H hidden, E experts, K chosen. A multiply-add is 2 operations.
On a GPU: `--device cuda`. `--tiny` executes everything, also on a CPU; with TRITON_INTERPRET=1 the Triton kernels too.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dexkernels import reference
from dexkernels.ops import backends
from dexkernels.ops.dense import mlp
from dexkernels.ops.grouped_mlp.records import Needs, Saved, Slots
from dexkernels.ops.route.records import Saved as SavedByRoute
from dexkernels.records import MLPWeights

from . import peers
from .measuring import Case
from .shapes import FLOAT32, SETS, able, cls_rows, draw, routing_of, weights_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WEIGHTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "bfloat16, weights cast": torch.float32}
"""Dtype of the MLP -> dtype of its weights: a copy in bf16, or masters that are cast in every call."""

CAST = ("ViT-B", "ViT-B, E 64", "ViT-L")
"""Shapes on which the cast is measured: its cost depends only on the bytes of the weights."""

COMPILED = ("ViT-B", "ViT-B, N 257")
"""Shapes on which compiled peers are measured: each takes a minute to compile."""


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


def test_route(timer, shape, measure):
    """Decisions and their gradient, in float32, which the router uses for every dtype of x."""
    B, D, E, K = (shape[k] for k in "BDEK")
    router = draw(timer, E, D, scale=D**-0.5)
    rows = [cls_rows(timer, shape, router, seed) for seed in range(SETS)]
    grad_gates, grad_balance = draw(timer, B, K, seed=9), torch.ones((), device=timer.device)

    def run(launcher, i: int, dtype=torch.float32) -> list[Tensor]:
        r, w = rows[i % SETS].to(dtype), router.to(dtype)
        p, gates, indices, balance, mass, *_ = launcher.forward(r, w, K, 0.5, None)
        saved = SavedByRoute(p, gates, indices, r, w)
        dr, dw = launcher.backward(grad_gates.to(dtype), grad_balance.to(dtype), saved, 0.5)
        return [p, gates, balance, mass, dr, dw]

    measure(
        Case(
            "route forward + backward",
            {k: v for k, v in shape.items() if k not in "NH"},
            torch.float32,
            num_bytes=4 * (3 * B * D + 3 * E * D + 3 * B * E),
        ),
        {b: functools.partial(run, backends.load("route", b)) for b in able("route", timer)},
        run(backends.load("route", "reference"), 0, torch.float64),
        {},
    )


class GroupedMLP(NamedTuple):
    """The shared parts of the benchmarks of `grouped_mlp`."""

    run: Callable
    """``run(launcher, i, dtype=None) -> [out, *gradients]``"""
    theirs: dict[str, Callable]
    """Peer -> factory of such a function of i."""
    dense: Callable[[int], None]
    flops: float
    num_bytes: float


def grouped_mlp_of(timer, shape: dict, dtype: torch.dtype, train: bool, masters: torch.dtype) -> GroupedMLP:
    """Inputs for plain torch ("reference") and the kernels, and the bare products of equally many rows."""
    B, N, D, H, E, K = (shape[k] for k in "BNDHEK")
    weights = weights_of(timer, shape, masters)
    routing = routing_of(timer, shape, 5)
    xs = [draw(timer, B, N, D, dtype=dtype, seed=10 + i) for i in range(SETS)]
    grad_out = draw(timer, B, N, D, dtype=dtype, seed=20)
    order, offsets = routing.slot_order, routing.group_offsets

    def run(launcher, i: int, real: torch.dtype | None = None) -> list[Tensor]:
        to = (lambda t: t.to(real)) if real else (lambda t: t)
        cast = MLPWeights(*(to(w.to(dtype)) for w in weights))
        x, slots = to(xs[i % SETS]), Slots(to(routing.gates), order, offsets)
        out, z, _ = launcher.forward(x, slots, cast, train)
        if not train:
            return [out]
        saved = Saved(x, *slots, cast.fc1_weight, cast.fc2_weight, cast.fc2_bias, z)
        return [out, *launcher.backward(to(grad_out), saved, Needs(), real or masters)]

    def peer(f: Callable, i: int) -> list[Tensor]:
        cast = [w.to(dtype).detach().requires_grad_(train) for w in weights]
        leaves = [xs[i % SETS].detach().requires_grad_(train), routing.gates.detach().requires_grad_(train), *cast]
        with torch.set_grad_enabled(train):
            out = f(leaves[0], leaves[1], order, offsets, *cast)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)] if train else [out]

    rows = draw(timer, B * K * N, D, dtype=dtype, seed=30)
    hidden = draw(timer, B * K * N, H, dtype=dtype, seed=31)
    w1, w2 = weights.fc1_weight[0].to(dtype), weights.fc2_weight[0].to(dtype)

    def dense(i: int) -> None:
        torch.mm(rows, w1.t()), torch.mm(hidden, w2.t())
        if train:
            torch.mm(rows, w2), torch.mm(rows.t(), hidden), torch.mm(hidden, w1), torch.mm(hidden.t(), rows)

    size, matrices = dtype.itemsize, E * 2 * D * H
    num_bytes = size * (B * N * D * 2 + matrices)
    if train:
        # z written and read; x, out's gradient and the weights read again; gradients written.
        num_bytes += size * (2 * B * K * N * H + 3 * B * N * D + 2 * matrices)
    if masters != dtype:
        num_bytes += (masters.itemsize + size) * matrices
    theirs = {
        name: lambda p=p: functools.partial(peer, peers.compiled(p, timer.tiny))
        for name, p in peers.present(dtype).items()
    }
    return GroupedMLP(run, theirs, dense, (12 if train else 4) * B * K * N * D * H, num_bytes)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
@torch.no_grad()
def test_grouped_mlp(request, timer, shape_name, shape, measure, direction, weights):
    dtype, masters = DTYPES[weights.split(",")[0]], WEIGHTS[weights]
    if shape_name not in {"float32": FLOAT32, "bfloat16": (shape_name,)}.get(weights, CAST):
        pytest.skip("measured on other shapes")
    case = grouped_mlp_of(timer, shape, dtype, direction != "forward", masters)
    able_here = able("grouped_mlp", timer, dtype)
    requested = request.config.getoption("--baseline") or peers.PEERS
    theirs = {
        name: make
        for name, make in case.theirs.items()
        if name in requested and (shape_name in COMPILED or not peers.PEERS[name].compiled)
    }
    measure(
        Case(
            f"grouped_mlp {direction}" + ", weights cast" * (masters != dtype),
            shape,
            dtype,
            flops=case.flops,
            num_bytes=case.num_bytes,
        ),
        {b: functools.partial(case.run, backends.load("grouped_mlp", b)) for b in able_here},
        case.run(backends.load("grouped_mlp", "reference"), 0, torch.float64),
        {"dense products": case.dense},
        theirs=theirs,
    )


def on_path(path: str) -> SimpleNamespace:
    """Triton's backend of `grouped_mlp` on this path."""
    module = backends.load("grouped_mlp", "triton")
    halves = {name: functools.partial(getattr(module, name), path=path) for name in ("forward", "backward")}
    return SimpleNamespace(**halves)


@pytest.mark.parametrize("shape_name", [*COMPILED, "ViT-B, B 896", "ViT-B, E 64", "ViT-L", "ViT-H"], indirect=True)
@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
@torch.no_grad()
def test_grouped_mlp_aligned(timer, shape, tiny, measure, direction):
    """Triton's aligned path, also against its gather path.

    In bf16, or in fp16 in the interpreter, which multiplies bf16 wrongly. The case has no operator's name, so it does
    not count for the operator's verdict.
    """
    dtype = torch.float16 if timer.device.type == "cpu" else torch.bfloat16
    if "triton" not in able("grouped_mlp", timer, dtype):
        pytest.skip(backends.why_not("grouped_mlp", "triton"))
    from dexkernels.ops.grouped_mlp.triton.plan import has_tma

    if not has_tma(timer.device):
        pytest.skip("the aligned path needs compute capability 9 to 11")
    shape = shape | ({"N": 65} if tiny else {})
    case = grouped_mlp_of(timer, shape, dtype, direction != "forward", dtype)
    by_blocks, by_rows, reference = on_path("aligned"), on_path("gather"), backends.load("grouped_mlp", "reference")
    measure(
        Case(f"aligned path of grouped_mlp {direction}", shape, dtype, flops=case.flops, num_bytes=case.num_bytes),
        {"reference": functools.partial(case.run, reference), "triton": functools.partial(case.run, by_blocks)},
        case.run(reference, 0, torch.float64),
        {"dense products": case.dense, "gather path": functools.partial(case.run, by_rows)},
    )


@pytest.mark.parametrize("shape_name", ["ViT-B", "ViT-B, N 257", "ViT-B, E 64"], indirect=True)
@pytest.mark.parametrize("path", ["gather", "aligned"])
@torch.no_grad()
def test_director_in_the_same_launches(timer, shape, tiny, measure, path):
    """The training forward with the director as one more expert, against the director computed separately.

    In bf16, or in fp16 in the interpreter. The case has no operator's name, so it does not count for its verdict.
    """
    dtype = torch.float16 if timer.device.type == "cpu" else torch.bfloat16
    if "triton" not in able("grouped_mlp", timer, dtype):
        pytest.skip(backends.why_not("grouped_mlp", "triton"))
    from dexkernels.ops.grouped_mlp.triton.plan import has_tma

    if path == "aligned" and not has_tma(timer.device):
        pytest.skip("the aligned path needs compute capability 9 to 11")
    shape = shape | ({"N": 65} if tiny else {})
    B, N, D, H, E, K = (shape[k] for k in "BNDHEK")
    stacked = weights_of(timer, shape | {"E": E + 1}, dtype)
    routing = routing_of(timer, shape, 5)
    xs = [draw(timer, B, N, D, dtype=dtype, seed=10 + i) for i in range(SETS)]

    def run(launcher, i: int, real: torch.dtype | None = None, apart: bool = False) -> list[Tensor]:
        x, gates, *weights = (t.to(real or t.dtype) for t in (xs[i % SETS], routing.gates, *stacked))
        experts = MLPWeights(*((w[:E] for w in weights) if apart else weights))
        slots = Slots(gates, routing.slot_order, routing.group_offsets)
        out, z, director_out = launcher.forward(x, slots, experts, True)
        return [out, mlp(x, *(w[E] for w in weights)) if apart else director_out]

    plain, triton = backends.load("grouped_mlp", "reference"), on_path(path)
    rows, hidden = (draw(timer, B * (K + 1) * N, n, dtype=dtype, seed=30) for n in (D, H))
    w1, w2 = stacked.fc1_weight[0], stacked.fc2_weight[0]

    def dense(i: int) -> None:
        torch.mm(rows, w1.t()), torch.mm(hidden, w2.t())

    measure(
        Case(
            f"grouped_mlp forward with its director, {path}",
            shape,
            dtype,
            flops=4 * B * (K + 1) * N * D * H,
            num_bytes=dtype.itemsize * (3 * B * N * D + B * K * N * H + (E + 1) * 2 * D * H),
        ),
        {"reference": functools.partial(run, plain), "triton": functools.partial(run, triton)},
        run(plain, 0, torch.float64),
        {"director apart": functools.partial(run, triton, apart=True), "dense products": dense},
    )


@pytest.mark.parametrize("shape_name", ["ViT-B", "ViT-B, N 257", "ViT-B, B 8", "ViT-L", "ViT-H"], indirect=True)
@pytest.mark.parametrize("kind", ["kd", "cosine"])
def test_align_loss(timer, shape, dtype, measure, kind):
    B, N, D = (shape[k] for k in "BND")
    outs = [draw(timer, B, N, D, dtype=dtype, seed=i) for i in range(SETS)]
    director = draw(timer, B, N, D, dtype=dtype, seed=9)
    one = torch.ones((), device=timer.device)

    def run(launcher, i: int, real: torch.dtype | None = None) -> list[Tensor]:
        y, d = (t.to(real) if real else t for t in (outs[i % SETS], director))
        loss, saved = launcher.forward(y, d, kind)
        return [loss, launcher.backward(one.to(loss.dtype), y, d, saved, kind)]

    measure(
        Case(
            f"align_loss {kind} forward + backward",
            {k: shape[k] for k in "BND"},
            dtype,
            num_bytes=5 * B * N * D * dtype.itemsize,
        ),
        {b: functools.partial(run, backends.load("align_loss", b)) for b in able("align_loss", timer)},
        run(backends.load("align_loss", "reference"), 0, torch.float64),
        {},
    )


@pytest.mark.parametrize("layers", [1, 12])
def test_group_ema(timer, tiny, measure, layers):
    """All tensors of all layers of ViT-B, read from memory, not from the cache; by layer it would take 12 launches."""
    D, H, E = (16, 24, 4) if tiny else (768, 3072, 8)
    sizes = [(H, D), (H,), (D, H), (D,)] * layers
    directors = [draw(timer, *s, seed=i) for i, s in enumerate(sizes)]
    experts = [draw(timer, E, *s, seed=100 + i) for i, s in enumerate(sizes)]
    # Each call moves the directors; a momentum near 1 keeps them nearly constant.
    weights = [draw(timer, E, seed=7).softmax(0)] * len(sizes)
    momentum = torch.tensor(0.999, device=timer.device)

    def checked(update: Callable, real: torch.dtype | None = None) -> list[Tensor]:
        to = (lambda t: t.to(real)) if real else (lambda t: t)
        moved = [to(d.clone()) for d in directors]
        update(moved, [to(e) for e in experts], [to(w) for w in weights], momentum, None)
        return moved

    exact = checked(reference.group_ema_, torch.float64)
    candidates = {}
    for b in able("group_ema_", timer):
        update = backends.load("group_ema_", b).group_ema_
        results = iter([checked(update), checked(update)])

        def run(i: int, update=update, results=results) -> list[Tensor]:
            result = next(results, None)  # The first calls return results to check; later ones are timed.
            return result or update(directors, experts, weights, momentum, None)

        candidates[b] = run

    def stack(i: int) -> None:
        for d, e, a in zip(directors, experts, weights, strict=True):
            mean = (torch.stack(list(e)) * a.view(-1, *[1] * d.dim())).sum(0)
            d.copy_(0.999 * d + 0.001 * mean)

    def lerp(i: int) -> None:
        for e in range(E):
            torch._foreach_lerp_(directors, [t[e] for t in experts], 1e-4)

    others = {"stack, multiply, sum": stack, "_foreach_lerp_": lerp}
    if timer.on_gpu and "cupy" not in peers.absent():
        theirs = peers.cupy_group_ema(directors, experts, weights, 0.999)
        others["CuPy elementwise kernel"] = lambda i: theirs()
    num_bytes = 4 * (E + 2) * sum(d.numel() for d in directors)
    source = torch.empty(num_bytes // 8, device=timer.device).normal_()
    target = torch.empty_like(source)
    measure(
        Case("group_ema_", {"D": D, "H": H, "E": E, "layers": layers}, torch.float32, num_bytes=num_bytes, flush=True),
        candidates,
        exact,
        others | {"copy of as many bytes": lambda i: target.copy_(source)},
    )
