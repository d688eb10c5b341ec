"""Cases of the operators: inputs, the launchers' results for them, and the specification's in other precisions.

Every function takes ``shipped``, the module `ptx_emulator.shipped`, from the fixture of that name.
Letters: B images, N tokens (CLS first), D width, H hidden, E experts, K chosen, R rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

FLOOR = {torch.float32: 4e-7, torch.float16: 2e-4, torch.bfloat16: 1.6e-3}
"""Error that is granted whatever plain torch's is: a few units in the last place."""

Results = dict[str, torch.Tensor]


class Case(NamedTuple):
    """compute: the launchers' results, run under an `Emulator`, which it is given. want: the specification's results in
    a dtype; float64 judges, the case's own dtype says how near plain torch comes."""

    dtype: torch.dtype
    compute: Callable[[object], Results]
    want: Callable[[torch.dtype], Results]


class Errors(NamedTuple):
    error: float
    plain: float  # of plain torch in the same precision
    bound: float


def errors_of(shipped, case: Case, results: Results) -> dict[str, Errors]:
    """Of every result that is not whole numbers; those must be the specification's."""
    exact, plain = case.want(torch.float64), case.want(case.dtype)
    found = {}
    for name, value in results.items():
        if not value.dtype.is_floating_point:
            assert torch.equal(value, exact[name]), name
            continue
        near = shipped.relative_error(plain[name], exact[name])
        found[name] = Errors(shipped.relative_error(value, exact[name]), near, 2 * near + FLOOR[case.dtype])
    return found


def check(shipped, case: Case, emulated) -> Results:
    """Errors against float64 are at most twice plain torch's in the same precision."""
    with emulated as emulator:
        results = case.compute(emulator)
    for name, (error, _, bound) in errors_of(shipped, case, results).items():
        assert error <= bound, f"{name}: {error:.2e} > {bound:.2e}"
    return results


# --- grouped_mlp ------------------------------------------------------------------------------------------------------

NAMES = ("out", "dx", "dgates", "dfc1_weight", "dfc1_bias", "dfc2_weight", "dfc2_bias")


class MLPInputs(NamedTuple):
    x: torch.Tensor
    grad_out: torch.Tensor
    gates: torch.Tensor
    indices: torch.Tensor
    weights: list[torch.Tensor]


def mlp_inputs(B, N, D, H, E, K, dtype, seed=0) -> MLPInputs:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    indices = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(B)])
    gates = torch.rand(B, K, generator=generator) + 0.1
    weights = [draw(E, H, D, scale=D**-0.5), draw(E, H), draw(E, D, H, scale=H**-0.5), draw(E, D)]
    return MLPInputs(draw(B, N, D), draw(B, N, D), gates / gates.sum(1, keepdim=True), indices, weights)


def small_tiles(shipped):
    """Blocks that small shapes fill, for the gather path, whose own would be mostly empty."""
    table = shipped.configurations.GATHER
    return shipped.configurations.TILES | {k: shipped.Tile(64, 64, 32, 4, 3, k[0] == "to_hidden_grad") for k in table}


def mlp_case(shipped, sizes, dtype, path, tiles=None, with_director=False) -> Case:
    """Forward and backward; with a director as one more expert, and then float32 gradients of the weights."""
    inputs = mlp_inputs(*sizes, dtype)
    director = [w[0] for w in mlp_inputs(*sizes, dtype, seed=1).weights] if with_director else None

    def compute(emulator):
        return _run_mlp(shipped, inputs, path, tiles, director)

    def want(precision):
        return _want_mlp(shipped, inputs, precision, director)

    return Case(dtype, compute, want)


def _run_mlp(shipped, inputs, path, tiles, director) -> Results:
    E = inputs.weights[1].shape[0]
    flat = inputs.indices.flatten()
    offsets = torch.tensor([int((flat < limit).sum()) for limit in range(E + 1)])
    slots = shipped.mlp_records.Slots(inputs.gates, flat.sort(stable=True).indices, offsets)
    stacked = inputs.weights
    if director is not None:
        stacked = [torch.cat((w, d[None])) for w, d in zip(inputs.weights, director, strict=True)]
    options = {"path": path, "tiles": tiles}
    out, z, director_out = shipped.grouped_mlp.forward(inputs.x, slots, shipped.MLPWeights(*stacked), True, **options)
    saved = shipped.mlp_records.Saved(inputs.x, *slots, *(stacked[i][:E] for i in (0, 2, 3)), z)
    grad_dtype = inputs.x.dtype if director is None else torch.float32
    grads = shipped.grouped_mlp.backward(inputs.grad_out, saved, shipped.mlp_records.Needs(), grad_dtype, **options)
    results = dict(zip(NAMES, (out, *grads), strict=True))
    return results if director is None else results | {"director_out": director_out}


def _want_mlp(shipped, inputs, precision, director) -> Results:
    leaves = [t.to(precision).requires_grad_() for t in (inputs.x, *inputs.weights)]
    gates = inputs.gates.to(shipped.reference.real(precision)).requires_grad_()
    routing = shipped.Routing(gates, inputs.indices, None, None, None, None, None)
    out = shipped.reference.grouped_mlp(leaves[0], routing, *leaves[1:])
    grads = torch.autograd.grad(out, (leaves[0], gates, *leaves[1:]), inputs.grad_out.to(precision))
    results = dict(zip(NAMES, (out.detach(), *grads), strict=True))
    if director is not None:
        results["director_out"] = shipped.reference.mlp(inputs.x.to(precision), *(t.to(precision) for t in director))
    return results


# --- route ------------------------------------------------------------------------------------------------------------


def route_case(shipped, R, D, E, K, dtype, one_launch=None) -> Case:
    """Forward and backward; logits lie wide apart, so that no rounding changes a choice.

    one_launch: up to how many rows one program does everything, by default what ships.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(R, 1, D, generator=generator).to(dtype)
    weight = torch.randn(E, D, generator=generator) * 4 * D**-0.5
    noise = torch.randn(R, 1, E, generator=generator)
    grads = torch.randn(R, K, generator=generator), torch.randn((), generator=generator)

    def compute(emulator):
        with shipped.replaced(shipped.route, "ONE_LAUNCH", one_launch or shipped.route.ONE_LAUNCH):
            routed = shipped.route.forward(x[:, 0], weight, K, 0.5, noise[:, 0])
        saved = shipped.route_records.Saved(routed.p, routed.gates, routed.expert_indices, x[:, 0], weight)
        back = shipped.route.backward(*grads, saved, 0.5)
        results = {name: value for name, value in routed._asdict().items() if name != "p"}
        return results | {"dx": back.r, "drouter_weight": back.router_weight}

    def want(precision):
        leaf, leaf_weight = (
            x.to(precision).requires_grad_(),
            weight.to(shipped.reference.real(precision)).requires_grad_(),
        )
        # The specification adds 1 to the noise where no expert was ever used.
        noisy = {"router_noise": noise.double() - 1, "usage_ema": torch.zeros(E), "noise_std": 1.0}
        routing = shipped.reference.route(leaf, leaf_weight, K, **noisy)
        outputs = routing.gates, routing.balance_loss
        back = torch.autograd.grad(
            outputs, (leaf, leaf_weight), [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]
        )
        return {k: v.detach() for k, v in routing._asdict().items()} | {"dx": back[0][:, 0], "drouter_weight": back[1]}

    return Case(dtype, compute, want)


# --- align_loss -------------------------------------------------------------------------------------------------------


def align_loss_case(shipped, R, D, kind, dtype) -> Case:
    generator = torch.Generator().manual_seed(0)
    y, d = (3 * torch.randn(R, D, generator=generator).to(dtype) for _ in range(2))

    def compute(emulator):
        loss, saved = shipped.align_loss.forward(y, d, kind)
        return {"loss": loss, "grad": shipped.align_loss.backward(torch.tensor(1.5), y, d, saved, kind)}

    def want(precision):
        leaf = y.to(precision).requires_grad_()
        loss = shipped.reference.align_loss(leaf, d.to(precision), kind)
        return {"loss": loss.detach(), "grad": torch.autograd.grad(1.5 * loss, leaf)[0]}

    return Case(dtype, compute, want)


# --- group_ema_ -------------------------------------------------------------------------------------------------------


def group_ema_case(shipped, momentum) -> Case:
    """Tensors of many sizes; of the first an expert has no weight and holds NaN, of the third none has any."""
    generator = torch.Generator().manual_seed(0)
    shapes, experts = [(5, 3), (4100,), (1,), (4, 20)], (4, 1, 3, 8)
    before = [torch.randn(shape, generator=generator) for shape in shapes]
    stacks = [torch.randn((E, *shape), generator=generator) for E, shape in zip(experts, shapes, strict=True)]
    weights = [torch.rand(E, generator=generator) for E in experts]
    weights[0][1], stacks[0][1] = 0, float("nan")
    weights[2].zero_()

    def named(tensors):
        return {f"director {i}": t for i, t in enumerate(tensors)}

    def compute(emulator):
        directors = [d.clone() for d in before]
        emulator.extra = (*directors, *stacks)
        shipped.group_ema.group_ema_(directors, stacks, weights, momentum, torch.tensor(False))
        assert torch.equal(directors[2], before[2])
        return named(directors)

    def want(precision):
        directors = [d.to(precision) for d in before]
        shipped.reference.group_ema_(
            directors, [s.to(precision) for s in stacks], [w.to(precision) for w in weights], momentum
        )
        return named(directors)

    return Case(torch.float32, compute, want)
