"""Every operator and the layer step, each backend against its baselines and the limits; a speed only of a right result.

Letters: B images, N tokens (CLS first), D width, H hidden, E experts, K chosen. 2 operations are one multiply-add.
On a GPU: `--device cuda`. `--tiny` executes everything, on a CPU too; with TRITON_INTERPRET=1 Triton's kernels as well.
"""

import copy
import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dexkernels import DEXLayer, Routing, backends, reference
from dexkernels.routing import sort_slots
from dexkernels.testing import ExpertLoop, randomize_, relative_error

from .record import BOUND

TINY = {"B": 4, "N": 5, "D": 16, "H": 32, "E": 4, "K": 2}
SHAPES = {
    "ViT-B": {"B": 224, "N": 65, "D": 768, "H": 3072, "E": 8, "K": 2},
    "ViT-B, N 257": {"B": 56, "N": 257, "D": 768, "H": 3072, "E": 8, "K": 2},
    "ViT-B, E 64": {"B": 224, "N": 65, "D": 768, "H": 3072, "E": 64, "K": 2},
    "ViT-B, skewed": {"B": 224, "N": 65, "D": 768, "H": 3072, "E": 8, "K": 2, "routing": "half to one"},
    "ViT-L": {"B": 128, "N": 65, "D": 1024, "H": 4096, "E": 8, "K": 2},
    "ViT-B, B 8": {"B": 8, "N": 65, "D": 768, "H": 3072, "E": 8, "K": 1},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SETS = 3
"""Inputs that calls rotate through."""

IN_CACHE = 100e6
"""Bytes below which the cache may hold what rotated inputs need: the copy bandwidth is no limit then."""

FLOOR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-3}
"""Error that is granted whatever plain torch's is."""


@pytest.fixture(params=SHAPES)
def shape(request, tiny):
    if not tiny:
        return SHAPES[request.param]
    sizes = TINY | {k: v for k, v in SHAPES[request.param].items() if k in ("routing", "K")}
    return sizes | ({"N": 3, "E": 7, "D": 24} if request.param == "ViT-B, E 64" else {})


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


@pytest.fixture
def measure(request, timer, ceilings, measured):
    """``measure(case, shape, dtype, candidates, ...)``: checks every backend's result, then times and records it."""
    wanted = request.config.getoption("--backend")

    def run(
        case: str,
        shape: dict,
        dtype: torch.dtype,
        candidates: dict[str, Callable[[int], list[Tensor]]],
        exact: list[Tensor],
        others: dict[str, Callable[[int], object]],
        flops: float = 0.0,
        num_bytes: float = 0.0,
        flush: bool = False,
    ) -> None:
        if wanted:
            candidates = {name: f for name, f in candidates.items() if name in (wanted, "reference")}
        plain = [relative_error(got, want) for got, want in zip(candidates["reference"](0), exact, strict=True)]
        name = str(dtype).removeprefix("torch.")
        errors, red = {}, []
        for backend, f in candidates.items():
            try:
                found = [relative_error(got, want) for got, want in zip(f(0), exact, strict=True)]
            except Exception as error:  # a kernel that does not compile or launch leaves the others their rows
                red.append(f"{backend}: {type(error).__name__}: {str(error)[:300]}")
                continue
            errors[backend] = max(found)
            if not all(e <= 2 * p + FLOOR[dtype] for e, p in zip(found, plain, strict=True)):
                red.append(f"{backend}: {found}, plain torch {plain}")
            elif errors[backend] > BOUND[name]:
                red.append(f"{backend}: {errors[backend]} is above {BOUND[name]}")
        right = {b: f for b, f in candidates.items() if not any(r.startswith(f"{b}:") for r in red)}
        ms = timer.measure(right | others, flush)
        # The ceiling of products is that of bf16 alone: products in float32 have none here.
        bound_by_products = flops / ceilings["bf16_tflops"] / 1e9 if dtype == torch.bfloat16 or not flops else None
        for backend, f in right.items():
            limit = None
            if bound_by_products is not None:
                limit = max(bound_by_products, num_bytes / ceilings["copy_gbps"] / 1e6)
                if limit > bound_by_products and num_bytes < IN_CACHE and not flush:
                    limit = None
            peak = timer.peak_mb(f)
            for baseline in ("reference", *others):
                if baseline not in ms:
                    continue
                wrong = measured(
                    {
                        "case": case,
                        "shape": shape,
                        "backend": backend,
                        "dtype": name,
                        "baseline": baseline,
                        "ms": ms[backend],
                        "baseline_ms": ms[baseline],
                        "ratio": ms[baseline] / ms[backend],
                        "tflops": flops / ms[backend] / 1e9 if flops else None,
                        "gbps": num_bytes / ms[backend] / 1e6 if num_bytes else None,
                        "share_of_limit": None if limit is None else limit / ms[backend],
                        "max_rel_err": errors[backend],
                        "peak_mb": peak,
                    }
                )
                red += [f"{backend} against {baseline}: {w}" for w in wrong]
        assert not red, f"{case} {shape} {name}, no speed of a wrong result: " + "; ".join(red)

    return run


def able(op: str, timer, dtype: torch.dtype = torch.float32) -> list[str]:
    """The backends of ``op`` that can run here; Triton's interpreter, on a CPU, multiplies bf16 wrongly."""
    found = [b for b in backends.BACKENDS if backends.why_not(op, b) is None]
    interpreted = timer.device.type == "cpu" and dtype == torch.bfloat16 and op == "grouped_mlp"
    return [b for b in found if b == "reference" or not interpreted]


def draw(timer, *sizes: int, scale: float = 1.0, dtype=torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator(timer.device).manual_seed(seed)
    return (scale * torch.randn(sizes, generator=generator, device=timer.device)).to(dtype)


def cls_rows(timer, shape: dict, router: Tensor, seed: int) -> Tensor:
    """``[B, D]`` whose logits are permutations of evenly spaced ones: no decision is near a tie."""
    B, E = shape["B"], shape["E"]
    order = draw(timer, B, E, seed=seed).argsort(1).double()
    if shape.get("routing"):
        # Expert 0 takes one of the K places of every image.
        order[:, 0] = E
    logits = order * (4.0 / E)
    return (logits @ torch.linalg.pinv(router.double()).T).float()


def routing_of(timer, shape: dict, seed: int, dtype: torch.dtype) -> Routing:
    E, K = shape["E"], shape["K"]
    scores = draw(timer, shape["B"], E, seed=seed)
    if shape.get("routing"):
        scores[:, 0] = 10
    gates = draw(timer, shape["B"], K, seed=seed + 1).softmax(1)
    indices = scores.topk(K).indices.int()
    return Routing(gates, indices, gates.sum(), gates.sum(0), *sort_slots(indices, E))


def weights_of(timer, shape: dict, dtype: torch.dtype) -> list[Tensor]:
    E, D, H = shape["E"], shape["D"], shape["H"]
    return [
        draw(timer, E, H, D, scale=D**-0.5, dtype=dtype, seed=1),
        draw(timer, E, H, scale=0.1, dtype=dtype, seed=2),
        draw(timer, E, D, H, scale=H**-0.5, dtype=dtype, seed=3),
        draw(timer, E, D, scale=0.1, dtype=dtype, seed=4),
    ]


def test_route(timer, shape, measure):
    """Decisions and their gradient, in float32: so they are made whatever the dtype of x."""
    B, D, E, K = (shape[k] for k in "BDEK")
    router = draw(timer, E, D, scale=D**-0.5)
    rows = [cls_rows(timer, shape, router, seed) for seed in range(SETS)]
    grad_gates, grad_balance = draw(timer, B, K, seed=9), torch.ones((), device=timer.device)

    def run(launcher, i: int, dtype=torch.float32) -> list[Tensor]:
        r, w = rows[i % SETS].to(dtype), router.to(dtype)
        p, gates, indices, balance, mass, *_ = launcher.forward(r, w, K, 0.5, None)
        dr, dw = launcher.backward(grad_gates.to(dtype), grad_balance.to(dtype), p, indices, gates, r, w, K, 0.5)
        return [p, gates, balance, mass, dr, dw]

    measure(
        "route forward + backward",
        {k: v for k, v in shape.items() if k not in "NH"},
        torch.float32,
        {b: functools.partial(run, backends.LAUNCHERS["route", b]) for b in able("route", timer)},
        run(backends.LAUNCHERS["route", "reference"], 0, torch.float64),
        {},
        num_bytes=4 * (3 * B * D + 3 * E * D + 3 * B * E),
    )


class GroupedMLP(NamedTuple):
    """What the benchmarks of `grouped_mlp` share."""

    run: Callable
    """``run(launcher, i, dtype=None) -> [out, *gradients]``"""
    dense: Callable[[int], None]
    flops: float
    num_bytes: float


def grouped_mlp_of(timer, shape: dict, dtype: torch.dtype, train: bool) -> GroupedMLP:
    """Inputs for the loop of plain torch ("reference") and the kernels, and the bare products of as many rows."""
    B, N, D, H, E, K = (shape[k] for k in "BNDHEK")
    weights = weights_of(timer, shape, dtype)
    routing = routing_of(timer, shape, 5, dtype)
    xs = [draw(timer, B, N, D, dtype=dtype, seed=10 + i) for i in range(SETS)]
    grad_out = draw(timer, B, N, D, dtype=dtype, seed=20)

    def run(launcher, i: int, real: torch.dtype | None = None) -> list[Tensor]:
        to = (lambda t: t.to(real)) if real else (lambda t: t)
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = map(to, weights)
        x, gates, order, offsets = to(xs[i % SETS]), to(routing.gates), routing.slot_order, routing.group_offsets
        out, z = launcher.forward(x, gates, order, offsets, fc1_weight, fc1_bias, fc2_weight, fc2_bias, train)
        if not train:
            return [out]
        grads = launcher.backward(to(grad_out), x, gates, order, offsets, fc1_weight, fc2_weight, fc2_bias, z)
        return [out, *grads]

    rows = draw(timer, B * K * N, D, dtype=dtype, seed=30)
    hidden = draw(timer, B * K * N, H, dtype=dtype, seed=31)
    w1, w2 = weights[0][0], weights[2][0]

    def dense(i: int) -> None:
        torch.mm(rows, w1.t()), torch.mm(hidden, w2.t())
        if train:
            torch.mm(rows, w2), torch.mm(rows.t(), hidden), torch.mm(hidden, w1), torch.mm(hidden.t(), rows)

    size = dtype.itemsize
    num_bytes = size * (B * N * D * 2 + E * 2 * D * H)
    if train:
        # z written and read; x, out's gradient and the weights read again; gradients written.
        num_bytes += size * (2 * B * K * N * H + 3 * B * N * D + 2 * E * 2 * D * H)
    return GroupedMLP(run, dense, (12 if train else 4) * B * K * N * D * H, num_bytes)


@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
@torch.no_grad()
def test_grouped_mlp(timer, shape, dtype, measure, direction):
    case = grouped_mlp_of(timer, shape, dtype, direction != "forward")
    able_here = able("grouped_mlp", timer, dtype)
    measure(
        f"grouped_mlp {direction}",
        shape,
        dtype,
        {b: functools.partial(case.run, backends.LAUNCHERS["grouped_mlp", b]) for b in able_here},
        case.run(backends.LAUNCHERS["grouped_mlp", "reference"], 0, torch.float64),
        {"dense products": case.dense},
        flops=case.flops,
        num_bytes=case.num_bytes,
    )


@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
@torch.no_grad()
def test_grouped_mlp_aligned(timer, shape, tiny, measure, direction):
    """Triton's aligned path, also against its gather path, under a name that is no operator's: it decides no default.

    In bf16; in fp16 in the interpreter, which multiplies bf16 wrongly.
    """
    dtype = torch.float16 if timer.device.type == "cpu" else torch.bfloat16
    if "triton" not in able("grouped_mlp", timer, dtype):
        pytest.skip(backends.why_not("grouped_mlp", "triton"))
    from dexkernels.kernels import aligned

    if not aligned.has_tma(timer.device):
        pytest.skip("the aligned path needs compute capability 9 to 11")
    shape = shape | ({"N": 65} if tiny else {})
    case = grouped_mlp_of(timer, shape, dtype, direction != "forward")
    triton = backends.LAUNCHERS["grouped_mlp", "triton"]
    by_blocks, by_rows = (
        backends.Launcher(*(functools.partial(half, path=path) for half in triton)) for path in ("aligned", "gather")
    )
    reference = backends.LAUNCHERS["grouped_mlp", "reference"]
    measure(
        f"aligned path of grouped_mlp {direction}",
        shape,
        dtype,
        {"reference": functools.partial(case.run, reference), "triton": functools.partial(case.run, by_blocks)},
        case.run(reference, 0, torch.float64),
        {"dense products": case.dense, "gather path": functools.partial(case.run, by_rows)},
        flops=case.flops,
        num_bytes=case.num_bytes,
    )


@pytest.mark.parametrize("shape", ["ViT-B", "ViT-B, N 257", "ViT-L", "ViT-B, B 8"], indirect=True)
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
        f"align_loss {kind} forward + backward",
        {k: shape[k] for k in "BND"},
        dtype,
        {b: functools.partial(run, backends.LAUNCHERS["align_loss", b]) for b in able("align_loss", timer)},
        run(backends.LAUNCHERS["align_loss", "reference"], 0, torch.float64),
        {},
        num_bytes=5 * B * N * D * dtype.itemsize,
    )


@pytest.mark.parametrize("layers", [1, 12])
def test_group_ema(timer, tiny, measure, layers):
    """All tensors of all layers of ViT-B, from memory and not from the cache; by layer it would be 12 launches."""
    D, H, E = (16, 24, 4) if tiny else (768, 3072, 8)
    sizes = [(H, D), (H,), (D, H), (D,)] * layers
    directors = [draw(timer, *s, seed=i) for i, s in enumerate(sizes)]
    experts = [draw(timer, E, *s, seed=100 + i) for i, s in enumerate(sizes)]
    # Each call moves the directors further; a momentum near 1 keeps them what they are.
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
        update = backends.LAUNCHERS["group_ema_", b]
        got = iter([checked(update), checked(update)])

        def run(i: int, update=update, got=got) -> list[Tensor]:
            first = next(got, None)  # the check looks at a copy; the clock at the update alone
            return first or update(directors, experts, weights, momentum, None)

        candidates[b] = run

    def stack(i: int) -> None:
        for d, e, a in zip(directors, experts, weights, strict=True):
            mean = (torch.stack(list(e)) * a.view(-1, *[1] * d.dim())).sum(0)
            d.copy_(0.999 * d + 0.001 * mean)

    def lerp(i: int) -> None:
        for e in range(E):
            torch._foreach_lerp_(directors, [t[e] for t in experts], 1e-4)

    num_bytes = 4 * (E + 2) * sum(d.numel() for d in directors)
    source = torch.empty(num_bytes // 8, device=timer.device).normal_()
    target = torch.empty_like(source)
    measure(
        "group_ema_",
        {"D": D, "H": H, "E": E, "layers": layers},
        torch.float32,
        candidates,
        exact,
        {
            "stack, multiply, sum": stack,
            "_foreach_lerp_": lerp,
            "copy of as many bytes": lambda i: target.copy_(source),
        },
        num_bytes=num_bytes,
        flush=True,
    )


@pytest.mark.parametrize("masters", ["float32", "autocast"])
def test_layer_step(timer, shape, measure, masters):
    """Forward, losses, backward and GEMA of one layer with float32 masters, in float32 or bf16 by autocast."""
    B, N, D, H, E, K = (shape[k] for k in "BNDHEK")
    base = randomize_(DEXLayer(D, H, E, K)).to(timer.device)
    xs = [draw(timer, B, N, D, seed=i) for i in range(SETS)]
    for i, x in enumerate(xs):
        x[:, 0] = cls_rows(timer, shape, base.router_weight.detach(), i)
    grad_out = draw(timer, B, N, D, seed=9)
    dtype = torch.bfloat16 if masters == "autocast" else torch.float32
    # With momentum 1 every step, and so the check, sees the same director; the work is the same.
    momentum = torch.ones((), device=timer.device)

    def step(layer, i: int, real: torch.dtype = torch.float32) -> list[Tensor]:
        layer.zero_grad()
        x = xs[i % SETS].to(real).detach().requires_grad_()
        with torch.autocast(timer.device.type, torch.bfloat16, enabled=masters == "autocast" and real != torch.float64):
            y, aux = layer(x, return_aux=True)
        ((y.to(real) * grad_out.to(real)).sum() + aux.align_loss + aux.balance_loss).backward()
        layer.update_director(aux.gate_mass, momentum)
        grads = [p.grad for p in layer.parameters() if p.grad is not None]
        return [y.detach(), aux.align_loss.detach(), x.grad, *grads]

    def with_backend(backend: str) -> DEXLayer:
        layer = copy.deepcopy(base)
        layer.backend = backend
        return layer

    loop = ExpertLoop(D, H, E, K).to(timer.device)
    loop.load_state_dict(base.reference_state_dict())

    def loop_step(i: int) -> None:
        loop.zero_grad()
        x = xs[i % SETS].detach().requires_grad_()
        with torch.autocast(timer.device.type, torch.bfloat16, enabled=masters == "autocast"):
            y, align, balance, mass = loop(x)
        ((y * grad_out).sum() + align + balance).backward()
        loop.update_director(mass, 0.999)

    rows = draw(timer, B * K * N, D, dtype=dtype, seed=30)
    hidden = draw(timer, B * K * N, H, dtype=dtype, seed=31)
    w1, w2 = base.experts.fc1_weight[0].detach().to(dtype), base.experts.fc2_weight[0].detach().to(dtype)

    def dense(i: int) -> None:
        torch.mm(rows, w1.t()), torch.mm(hidden, w2.t())
        torch.mm(rows, w2), torch.mm(rows.t(), hidden), torch.mm(hidden, w1), torch.mm(hidden.t(), rows)
        F.linear(rows[: B * N], w1), F.linear(hidden[: B * N], w2)

    exact_layer = copy.deepcopy(base).double()
    layers = {b: with_backend(b) for b in able("grouped_mlp", timer, dtype)}
    measure(
        "layer step",
        shape,
        dtype,
        {b: functools.partial(step, layer) for b, layer in layers.items()},
        step(exact_layer, 0, torch.float64),
        {"expert loop": loop_step, "dense products": dense},
        flops=(12 * K + 4) * B * N * D * H,
        num_bytes=4 * (E * 2 * D * H * 4 + 5 * B * N * D),
    )
