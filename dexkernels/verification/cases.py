"""The cases that are compared with float64 and timed: each operator, forward and backward, by its public function.

Letters: B images, N tokens (CLS first), D width, H hidden, E experts, K chosen.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..layer import DEXLayer
from ..ops.adamw_ema import adamw_ema_
from ..ops.adamw_ema.records import Rule, Update
from ..ops.align_loss import align_loss
from ..ops.group_ema import group_ema_
from ..ops.grouped_mlp import grouped_mlp, need_of
from ..ops.route import route
from ..testing import randomize_, relative_error
from .inputs import Draw, cls_rows, routing_of, weights_of
from .record import Sizes

HALVES = (torch.bfloat16, torch.float16)
FLOOR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-3}
"""Relative error that is always allowed, even if plain torch's is smaller."""

BOUND = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Largest relative error of a correct result, also of plain torch. 2e-5 catches tf32, whose error is near 3e-4."""

DTYPES = {
    "route": (torch.bfloat16, torch.float32, torch.float16),
    "grouped_mlp": (torch.bfloat16, torch.float32, torch.float16),
    "align_loss": (torch.bfloat16, torch.float32, torch.float16),
    "group_ema_": (torch.float32,),
    "adamw_ema_": (torch.float32,),
}
"""Operator -> dtypes that its kernels accept."""

SMALL = (Sizes(4, 65, 64, 128, 4, 2), Sizes(3, 5, 37, 71, 5, 3), Sizes(33, 1, 48, 96, 3, 1))
"""Whole and partial tiles, odd sizes, an expert without images, tokens that are routed individually."""

Run = Callable[[str], list[Tensor]]
"""``run(backend) -> results``"""


class Case(NamedTuple):
    """One operator on one set of inputs."""

    exact: Callable[[], list[Tensor]]
    """The results in float64; integer results must be equal."""
    run: Run
    """The results of a backend: outputs, then gradients."""
    timed: Callable[[str], object]
    """The timed call: ``run``, unless that does more than the operator."""
    limit: Callable[[], object]
    """A computation that takes the least time possible on this device."""
    limit_name: str
    feature: str | None = None
    """The feature that a backend needs for it, see ``dexkernels.ops.backends.LIMITS``."""


def cases(op: str, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> list[Case]:
    """The cases of ``op``; the first one is timed."""
    return list(_MAKERS[op](sizes, dtype, Draw(device)))


def _exactly(compute: Callable[..., list[Tensor]], spec: Callable) -> Callable[[], list[Tensor]]:
    return lambda: compute(spec, torch.float64)


def _by(compute: Callable[..., list[Tensor]], function: Callable, dtype: torch.dtype) -> Run:
    return lambda backend: compute(functools.partial(function, backend=backend), dtype)


def _leaves(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    return [t.to(dtype).detach().requires_grad_() for t in tensors]


def _copy_of(num_bytes: int, device: torch.device) -> Callable[[], object]:
    source = torch.empty(max(num_bytes // 2, 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _route(sizes: Sizes, dtype: torch.dtype, draw: Draw) -> Iterator[Case]:
    B, N, D, _, E, K = sizes
    w = draw(E, D, scale=D**-0.5)
    x = draw(B, min(N, 2), D)  # Only CLS tokens are read
    x[:, 0] = cls_rows(draw, sizes, w)
    x, w, grad = x.to(dtype), w.to(dtype), draw(B, K)

    def compute(function: Callable, real: torch.dtype) -> list[Tensor]:
        leaves = _leaves(real, x, w)
        r = function(*leaves, K, temperature=0.5)
        one = torch.ones_like(r.balance_loss)
        grads = torch.autograd.grad((r.gates, r.balance_loss), leaves, (grad.to(r.gates.dtype), one))
        whole = [r.expert_indices.long(), r.slot_order, r.group_sizes, r.group_offsets]
        return [r.gates.detach(), r.balance_loss.detach(), r.gate_mass, *whole, *grads]

    run = _by(compute, route, dtype)
    limit = _copy_of(dtype.itemsize * 3 * (B * D + E * D), draw.device)
    yield Case(_exactly(compute, reference.route), run, run, limit, "copy")


def _grouped_mlp(sizes: Sizes, dtype: torch.dtype, draw: Draw) -> Iterator[Case]:
    B, N, D, H, E, K = sizes
    routing = routing_of(draw, sizes, never=E - 1 if E > max(K, 2) else None)
    acc = torch.float32
    x, *weights = (t.to(dtype) for t in (draw(B, N, D), *weights_of(draw, sizes)))
    gates, grad = routing.gates.to(acc), draw(B, N, D).to(dtype)
    routing = routing._replace(balance_loss=routing.balance_loss.to(acc), gate_mass=routing.gate_mass.to(acc))
    large = B * N > 1024
    for activation in ("gelu",) if large or K > 1 else ("gelu", "gelu_tanh"):

        def compute(function: Callable, real: torch.dtype, activation: str = activation) -> list[Tensor]:
            leaves = _leaves(real, x, *weights)
            leaf_gates = gates.to(real if real == torch.float64 else acc).detach().requires_grad_()
            out = function(leaves[0], routing._replace(gates=leaf_gates), *leaves[1:], activation=activation)
            return [out.detach(), *torch.autograd.grad(out, [leaf_gates, *leaves], grad.to(real))]

        run = _by(compute, grouped_mlp, dtype)
        # The specification runs every expert on every token, too much at training sizes: there plain torch in float64
        # replaces it.
        spec = functools.partial(grouped_mlp, backend="reference") if large else reference.grouped_mlp
        need = need_of(N, B * N * (K + 1), weights[0], dtype, activation)
        yield Case(_exactly(compute, spec), run, run, _dense(sizes, dtype, draw), "dense products", need)
    if dtype in HALVES and not large:
        yield _layer(sizes, dtype, draw)


def _dense(sizes: Sizes, dtype: torch.dtype, draw: Draw) -> Callable[[], object]:
    """The six bare products of one expert on the same number of rows."""
    B, N, D, H, _, K = sizes
    (rows, hidden), (w1, w2) = (
        (torch.ones(shape, dtype=dtype, device=draw.device) for shape in shapes)
        for shapes in (((B * K * N, D), (B * K * N, H)), ((H, D), (D, H)))
    )

    def products() -> None:
        torch.mm(rows, w1.t()), torch.mm(hidden, w2.t())
        torch.mm(rows, w2), torch.mm(rows.t(), hidden), torch.mm(hidden, w1), torch.mm(hidden.t(), rows)

    return products


def _layer(sizes: Sizes, dtype: torch.dtype, draw: Draw) -> Case:
    """A whole layer with float32 weights under autocast, where the director is one more expert of the same launches."""
    B, N, D, H, E, K = sizes
    layer = randomize_(DEXLayer(D, H, E, K)).to(draw.device)
    x, grad = draw(B, N, D), draw(B, N, D).float()
    x[:, 0] = cls_rows(draw, sizes, layer.router_weight.detach().double())
    x = x.float()

    def losses(y: Tensor, align: Tensor, balance: Tensor, leaves: list[Tensor], real: torch.dtype) -> list[Tensor]:
        total = (y.to(real) * grad.to(real)).sum() + align + balance
        return [y.detach(), align.detach(), balance.detach(), *torch.autograd.grad(total, leaves)]

    def run(backend: str) -> list[Tensor]:
        layer.backend = backend
        (leaf_x,) = _leaves(torch.float32, x)
        with torch.autocast(draw.device.type, dtype):
            y, aux = layer(leaf_x, return_aux=True)
        leaves = [leaf_x, layer.router_weight, *layer.experts.weights]
        return losses(y, aux.align_loss, aux.balance_loss, leaves, torch.float32)

    def exact() -> list[Tensor]:
        leaves = _leaves(torch.float64, x, layer.router_weight, *layer.experts.weights)
        leaf_x, router, *weights = leaves
        routing = reference.route(leaf_x, router, K, temperature=layer.temperature)
        y = reference.grouped_mlp(leaf_x, routing, *weights)
        director = reference.mlp(leaf_x, *(w.double() for w in layer.director.weights))
        return losses(y, reference.align_loss(y, director), routing.balance_loss, leaves, torch.float64)

    need = need_of(N, B * N * (K + 1), layer.experts.fc1_weight, dtype, "gelu")
    return Case(exact, run, run, _dense(sizes, dtype, draw), "dense products", need)


def _align_loss(sizes: Sizes, dtype: torch.dtype, draw: Draw) -> Iterator[Case]:
    B, N, D = sizes[:3]
    y, director = draw(B, N, D).to(dtype), draw(B, N, D).to(dtype)
    for kind in ("kd", "cosine", "mse"):

        def compute(function: Callable, real: torch.dtype, kind: str = kind) -> list[Tensor]:
            (leaf,) = _leaves(real, y)
            loss = function(leaf, director.to(real), kind)
            return [loss.detach(), *torch.autograd.grad(loss, leaf)]

        run = _by(compute, align_loss, dtype)
        limit = _copy_of(5 * y.numel() * dtype.itemsize, draw.device)
        yield Case(_exactly(compute, reference.align_loss), run, run, limit, "copy")


def _tensors(sizes: Sizes, draw: Draw) -> list[tuple[Tensor, Tensor]]:
    """``(director, experts)`` for each of the four tensors of a layer."""
    return [(draw(*w.shape[1:]).float(), w.float()) for w in weights_of(draw, sizes)]


def _group_ema(sizes: Sizes, dtype: torch.dtype, draw: Draw) -> Iterator[Case]:
    pairs, E = _tensors(sizes, draw), sizes.num_experts
    weights = draw(E).softmax(0)
    if E > 2:
        weights[-1] = 0
    weights = weights.float()
    directors, experts = ([pair[i] for pair in pairs] for i in (0, 1))
    on, off = (torch.tensor(skip, device=draw.device) for skip in (True, False))

    def compute(function: Callable, real: torch.dtype) -> list[Tensor]:
        results = []
        for momentum, skip in ((0.9, None), (torch.tensor(0.99, device=draw.device), off), (0.9, on)):
            moved = [d.to(real, copy=True) for d in directors]
            function(moved, [e.to(real) for e in experts], [weights.to(real)] * len(moved), momentum, skip=skip)
            results += moved
        return results

    def timed(backend: str) -> None:
        # With momentum 1 a kernel would not need to read the experts.
        group_ema_(directors, experts, [weights] * len(directors), 0.999, backend=backend)

    num_bytes = 4 * sum(2 * d.numel() + e.numel() for d, e in pairs)
    limit = _copy_of(num_bytes, draw.device)
    yield Case(_exactly(compute, reference.group_ema_), _by(compute, group_ema_, dtype), timed, limit, "copy")


def _adamw_ema(sizes: Sizes, dtype: torch.dtype, draw: Draw) -> Iterator[Case]:
    pairs, E = _tensors(sizes, draw), sizes.num_experts
    weights = draw(E).softmax(0).float()
    parameters = [(None, draw(sizes.dim).float()), *pairs]  # A parameter without a director, then a layer's
    grads = [draw(*p.shape).float() for _, p in parameters]
    moments = [(draw(*p.shape, scale=0.1).float(), draw(*p.shape).square().float()) for _, p in parameters]
    rule, momentum, clip = Rule(lr=1e-2, weight_decay=0.1), 0.9, 0.5

    def updates(timing: bool = False) -> list[Update]:
        """Updates of copies of the tensors or, for timing, of the tensors themselves."""
        made = []
        for (director, p), grad, (first, second) in zip(parameters, grads, moments, strict=True):
            without_copy = timing or director is None
            copy = None if without_copy else p.new_zeros((E + 1, *p.shape[1:]), dtype=torch.bfloat16)
            p, first, second, director = (t if timing or t is None else t.clone() for t in (p, first, second, director))
            made.append(
                Update(
                    parameter=p,
                    gradient=grad,
                    exp_avg=first,
                    exp_avg_sq=second,
                    step=torch.full((), 3.0, device=draw.device),
                    director=director,
                    group_weights=None if director is None else weights,
                    copy=copy,
                )
            )
        return made

    def run(backend: str) -> list[Tensor]:
        made = updates()
        adamw_ema_(made, rule, momentum=momentum, clip_scale=clip, backend=backend)
        skipped = updates()
        skip = torch.ones((), dtype=torch.bool, device=draw.device)
        adamw_ema_(skipped, rule, momentum=momentum, clip_scale=clip, skip=skip, backend=backend)
        kept = [t for u in skipped for t in (u.parameter, u.director) if t is not None]
        moved = [t for u in made for t in (u.parameter, u.exp_avg, u.exp_avg_sq, u.director) if t is not None]
        followed = [u for u in made if u.director is not None]
        rounded = [torch.cat((u.parameter, u.director[None])).to(torch.bfloat16) for u in followed]
        wrong = [(u.copy != r).sum() for u, r in zip(followed, rounded, strict=True)]
        return [*moved, *kept, *wrong]

    def exact() -> list[Tensor]:
        settings = {"lr": rule.lr, "beta1": rule.betas[0], "beta2": rule.betas[1]}
        settings |= {"eps": rule.eps, "weight_decay": rule.weight_decay}
        results, kept = [], []
        for (director, p), grad, (first, second) in zip(parameters, grads, moments, strict=True):
            state = {"exp_avg": first.double(), "exp_avg_sq": second.double(), "step": torch.tensor(3.0)}
            parameter, follower = p.double(), None if director is None else director.double()
            shares = None if director is None else weights.double()
            reference.adamw_ema_(parameter, grad.double(), state, settings, follower, shares, momentum, clip)
            results += [t for t in (parameter, state["exp_avg"], state["exp_avg_sq"], follower) if t is not None]
            kept += [t.double() for t in (p, director) if t is not None]
        return results + kept + [torch.zeros((), dtype=torch.int64, device=draw.device)] * len(pairs)

    still, frozen = updates(timing=True), Rule(lr=0.0, betas=(0.0, 0.0), weight_decay=0.0)

    def timed(backend: str) -> None:
        adamw_ema_(still, frozen, momentum=0.999, backend=backend)

    num_bytes = 4 * sum(7 * p.numel() + (0 if d is None else 2 * d.numel()) for d, p in parameters)
    yield Case(exact, run, timed, _copy_of(num_bytes, draw.device), "copy")


_MAKERS: dict[str, Callable[[Sizes, torch.dtype, Draw], Iterator[Case]]] = {
    "route": _route,
    "grouped_mlp": _grouped_mlp,
    "align_loss": _align_loss,
    "group_ema_": _group_ema,
    "adamw_ema_": _adamw_ema,
}


class Finding(NamedTuple):
    """The outcome of a comparison; ``problem`` is empty if the results are correct."""

    error: float | None
    plain_error: float | None
    problem: str


def compare(case: Case, backend: str, dtype: torch.dtype) -> Finding:
    """Compare a backend with float64: expect errors within ``bound_of``, and the same bits when repeated."""
    exact = case.exact()
    plain = errors_of(case.run("reference"), exact)
    got = case.run(backend)
    errors = errors_of(got, exact)
    worst = max(range(len(errors)), key=lambda i: errors[i])
    finding = Finding(*(e if e < float("inf") else None for e in (errors[worst], plain[worst])), "")
    for i, (error, plain_error) in enumerate(zip(errors, plain, strict=True)):
        bound = bound_of(exact[i], dtype, math.inf if backend == "reference" else plain_error)
        if not error <= bound:
            return Finding(
                error if error < float("inf") else None,
                plain_error if plain_error < float("inf") else None,
                f"result {i} {list(exact[i].shape)}: error {error:.2g}, expected at most {bound:.2g}",
            )
    if backend != "reference":
        again = case.run(backend)
        for i, (a, b) in enumerate(zip(got, again, strict=True)):
            if not torch.equal(a, b):
                return finding._replace(problem=f"result {i} {list(a.shape)}: different bits when repeated")
    return finding


def bound_of(exact: Tensor, dtype: torch.dtype, plain_error: float) -> float:
    """The largest error allowed for a result in ``dtype``, from plain torch's error of the same result."""
    return min(2 * plain_error + FLOOR[dtype], BOUND[dtype]) if exact.is_floating_point() else 0.0


def errors_of(results: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [relative_error(got, want) for got, want in zip(results, exact, strict=True)]


def bytes_needed(sizes: Sizes) -> int:
    """An upper bound of the device memory that the timed case takes, with its float64 results."""
    B, N, D, H, E, K = sizes
    return 8 * (8 * B * N * D + 6 * B * K * N * H + 12 * (E + 1) * 2 * D * H)


def sizes_checked(values: dict[str, Any]) -> Sizes:
    """``Sizes`` from a user's values. ValueError names the field."""
    for name, value in values.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
    sizes = Sizes(**values)
    if sizes.top_k > sizes.num_experts:
        raise ValueError(f"top_k: expected at most num_experts = {sizes.num_experts}, got {sizes.top_k}")
    return sizes
