"""Cases of the operators: inputs, the launchers' results for them, and the specification's in other precisions.

Every function takes ``shipped``, the module `ptx_emulator.shipped`, from the fixture of that name.
Letters: B images, N tokens (CLS first), D width, H hidden, E experts, K chosen, R rows.
"""

import mmap
from collections.abc import Callable
from typing import NamedTuple

import torch

from dexkernels.testing import relative_error

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


def errors_of(case: Case, results: Results) -> dict[str, Errors]:
    """Of every result that is not whole numbers; those must be the specification's."""
    exact, plain = case.want(torch.float64), case.want(case.dtype)
    found = {}
    for name, value in results.items():
        if not value.dtype.is_floating_point:
            assert torch.equal(value, exact[name]), name
            continue
        near = relative_error(plain[name], exact[name])
        found[name] = Errors(relative_error(value, exact[name]), near, 2 * near + FLOOR[case.dtype])
    return found


def check(shipped, case: Case, emulated) -> Results:
    """Errors against float64 are at most twice plain torch's in the same precision."""
    with emulated as emulator:
        results = case.compute(emulator)
    for name, (error, _, bound) in errors_of(case, results).items():
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


def mlp_inputs(B, N, D, H, E, K, dtype, seed=0, skewed=False, scale_of_biases=1.0) -> MLPInputs:
    """skewed: all but the last image take the experts from 1 on. scale_of_biases: of the gates too."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    indices = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(B)])
    if skewed:
        indices[:-1] = 1 + torch.arange(K)
    gates = torch.rand(B, K, generator=generator) + 0.1
    biases = {"scale": scale_of_biases}
    weights = [draw(E, H, D, scale=D**-0.5), draw(E, H, **biases), draw(E, D, H, scale=H**-0.5), draw(E, D, **biases)]
    gates = scale_of_biases * gates / gates.sum(1, keepdim=True)
    return MLPInputs(draw(B, N, D), draw(B, N, D), gates, indices, weights)


def small_tiles(shipped):
    """Blocks that small shapes fill, for the gather path, whose own would be mostly empty."""
    table = shipped.configurations.GATHER
    return shipped.configurations.TILES | {k: shipped.Tile(64, 64, 32, 4, 3, k[0] == "to_hidden_grad") for k in table}


def mlp_case(shipped, sizes, dtype, path, tiles=None, with_director=False, activation="gelu", **options) -> Case:
    """Forward and backward; with a director as one more expert, and then float32 gradients of the weights.

    options: of `mlp_inputs`. Where they are skewed, an expert's weight gradients are cut into parts.
    """
    inputs = mlp_inputs(*sizes, dtype, **options)
    director = [w[0] for w in mlp_inputs(*sizes, dtype, seed=1).weights] if with_director else None

    def compute(emulator):
        return _run_mlp(shipped, inputs, path, tiles, director, activation)

    def want(precision):
        return _want_mlp(shipped, inputs, precision, director, activation)

    return Case(dtype, compute, want)


def mlp_parts_case(shipped, sizes, dtype, path, tiles=None) -> Case:
    """A forward that saves nothing, and of every gradient a backward that is asked for it alone."""
    inputs, options = mlp_inputs(*sizes, dtype), {"path": path, "tiles": tiles}

    def compute(emulator):
        slots, weights = _slots(shipped, inputs), shipped.MLPWeights(*inputs.weights)
        out, unsaved, _ = shipped.grouped_mlp.forward(inputs.x, slots, weights, False, **options)
        assert unsaved.numel() == 0
        z = shipped.grouped_mlp.forward(inputs.x, slots, weights, True, **options)[1]
        saved = shipped.mlp_records.Saved(inputs.x, *slots, weights.fc1_weight, weights.fc2_weight, weights.fc2_bias, z)
        results = {"out": out}
        for needs in ((True, False, False), (False, True, False), (False, False, True)):
            needed = shipped.mlp_records.Needs(*needs)
            grads = shipped.grouped_mlp.backward(inputs.grad_out, saved, needed, dtype, **options)
            results |= {name: t for name, t in zip(NAMES[1:], grads, strict=True) if t is not None}
        assert set(results) == set(NAMES)
        return results

    return Case(dtype, compute, lambda precision: _want_mlp(shipped, inputs, precision, None))


def slots_case(shipped, images=150, width=1040) -> Case:
    """Where slots, images of the same experts and packed rows lie, of more of each than one program places."""
    inputs = mlp_inputs(images, 66, 8, 8, 5, 2, torch.bfloat16)
    slots, aligned = _slots(shipped, inputs), shipped.aligned
    x = torch.randn(images, 66, width, generator=torch.Generator().manual_seed(0)).bfloat16()[:3]

    def compute(emulator):
        position, expert = aligned.invert_slots(slots)
        order, index = aligned.order_images(expert, images, 2)
        few = slots._replace(slot_order=torch.tensor([5, 0, 3, 2, 4, 1]), gates=slots.gates[:3])
        plan = shipped.plan.Plan(few, 66, 1, "half", 90, shipped.configurations.TILES)
        packed = aligned.pack_rest(x, plan)
        return {"position": position, "expert": expert, "order": order, "index": index, "packed": packed}

    def want(precision):
        position = torch.empty(2 * images, dtype=torch.int32)
        position[slots.slot_order] = torch.arange(2 * images, dtype=torch.int32)
        sets = (1 << inputs.indices).sum(1)
        order = sets.sort(stable=True).indices
        index = [int((sets[order[:i]] == sets[b]).sum()) for i, b in enumerate(order)]
        packed = x[torch.tensor([5, 0, 3, 2, 4, 1]) // 2, :2].flatten(0, 1).to(precision)
        ints = {"position": position, "expert": inputs.indices.flatten(), "order": order, "index": torch.tensor(index)}
        return {name: value.int() for name, value in ints.items()} | {"packed": packed}

    return Case(torch.bfloat16, compute, want)


def _slots(shipped, inputs):
    E = inputs.weights[1].shape[0]
    flat = inputs.indices.flatten()
    offsets = torch.tensor([int((flat < limit).sum()) for limit in range(E + 1)])
    return shipped.mlp_records.Slots(inputs.gates, flat.sort(stable=True).indices, offsets)


def _run_mlp(shipped, inputs, path, tiles, director, activation) -> Results:
    slots, stacked = _slots(shipped, inputs), inputs.weights
    E = slots.num_experts
    if director is not None:
        stacked = [torch.cat((w, d[None])) for w, d in zip(inputs.weights, director, strict=True)]
    options = {"path": path, "tiles": tiles, "activation": activation}
    out, z, director_out = shipped.grouped_mlp.forward(inputs.x, slots, shipped.MLPWeights(*stacked), True, **options)
    saved = shipped.mlp_records.Saved(inputs.x, *slots, *(stacked[i][:E] for i in (0, 2, 3)), z)
    grad_dtype = inputs.x.dtype if director is None else torch.float32
    grads = shipped.grouped_mlp.backward(inputs.grad_out, saved, shipped.mlp_records.Needs(), grad_dtype, **options)
    results = dict(zip(NAMES, (out, *grads), strict=True))
    return results if director is None else results | {"director_out": director_out}


def _want_mlp(shipped, inputs, precision, director, activation="gelu") -> Results:
    leaves = [t.to(precision).requires_grad_() for t in (inputs.x, *inputs.weights)]
    gates = inputs.gates.to(shipped.reference.real(precision)).requires_grad_()
    routing = shipped.Routing(gates, inputs.indices, None, None, None, None, None)
    out = shipped.reference.grouped_mlp(leaves[0], routing, *leaves[1:], activation)
    grads = torch.autograd.grad(out, (leaves[0], gates, *leaves[1:]), inputs.grad_out.to(precision))
    results = dict(zip(NAMES, (out.detach(), *grads), strict=True))
    if director is not None:
        weights = (t.to(precision) for t in director)
        results["director_out"] = shipped.reference.mlp(inputs.x.to(precision), *weights, activation)
    return results


# --- route ------------------------------------------------------------------------------------------------------------


def untouched(*shape, dtype=torch.bfloat16) -> torch.Tensor:
    """A tensor of which no page is touched until something is written, nor counted when a process forks."""
    no_reserve = 0x4000  # MAP_NORESERVE, which the module names from Python 3.13 on
    memory = mmap.mmap(
        -1, torch.Size(shape).numel() * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    )
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def route_case(shipped, R, D, E, K, dtype, one_launch=None, with_noise=True, strides=None) -> Case:
    """Forward and backward; logits lie wide apart, so that no rounding changes a choice.

    one_launch: up to how many rows one program does everything, by default what ships. strides: of rows and columns.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(R, 1, D, generator=generator).to(dtype)
    if strides is not None:
        row, column = strides
        apart = untouched((R - 1) * row + (D - 1) * column + 1, dtype=dtype).as_strided((R, 1, D), (row, row, column))
        x = apart.copy_(x)
    weight = torch.randn(E, D, generator=generator) * 4 * D**-0.5
    noise = torch.randn(R, 1, E, generator=generator) if with_noise else None
    grads = torch.randn(R, K, generator=generator), torch.randn((), generator=generator)

    def compute(emulator):
        with shipped.replaced(shipped.route, "ONE_LAUNCH", one_launch or shipped.route.ONE_LAUNCH):
            routed = shipped.route.forward(x[:, 0], weight, K, 0.5, noise[:, 0] if with_noise else None)
        saved = shipped.route_records.Saved(routed.p, routed.gates, routed.expert_indices, x[:, 0], weight)
        back = shipped.route.backward(*grads, saved, 0.5)
        results = {name: value for name, value in routed._asdict().items() if name != "p"}
        return results | {"dx": back.r, "drouter_weight": back.router_weight}

    def want(precision):
        leaf, leaf_weight = (
            x.contiguous().to(precision, copy=True).requires_grad_(),
            weight.to(shipped.reference.real(precision)).requires_grad_(),
        )
        # The specification adds 1 to the noise where no expert was ever used.
        noisy = {"usage_ema": torch.zeros(E), "noise_std": 0.0}
        if with_noise:
            noisy |= {"router_noise": noise.double() - 1, "noise_std": 1.0}
        routing = shipped.reference.route(leaf, leaf_weight, K, **noisy)
        outputs = routing.gates, routing.balance_loss
        back = torch.autograd.grad(
            outputs, (leaf, leaf_weight), [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]
        )
        return {k: v.detach() for k, v in routing._asdict().items()} | {"dx": back[0][:, 0], "drouter_weight": back[1]}

    return Case(dtype, compute, want)


# --- align_loss -------------------------------------------------------------------------------------------------------


def align_loss_case(shipped, R, D, kind, dtype, scale=3) -> Case:
    generator = torch.Generator().manual_seed(0)
    y, d = (scale * torch.randn(R, D, generator=generator).to(dtype) for _ in range(2))

    def compute(emulator):
        loss, saved = shipped.align_loss.forward(y, d, kind)
        return {"loss": loss, "grad": shipped.align_loss.backward(torch.tensor(1.5), y, d, saved, kind)}

    def want(precision):
        leaf = y.to(precision).requires_grad_()
        loss = shipped.reference.align_loss(leaf, d.to(precision), kind)
        return {"loss": loss.detach(), "grad": torch.autograd.grad(1.5 * loss, leaf)[0]}

    return Case(dtype, compute, want)


# --- group_ema_ -------------------------------------------------------------------------------------------------------


def group_ema_case(shipped, momentum, with_skip=True, offset=0) -> Case:
    """Tensors of many sizes; of the first an expert has no weight and holds NaN, of the third none has any.

    offset: elements by which directors, but not experts, lie behind an address that is a multiple of 16.
    """
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
        directors = [torch.empty(d.numel() + offset)[offset:].view(d.shape).copy_(d) for d in before]
        emulator.extra = (*directors, *stacks)
        shipped.group_ema.group_ema_(directors, stacks, weights, momentum, torch.tensor(False) if with_skip else None)
        assert torch.equal(directors[2], before[2])
        return named(directors)

    def want(precision):
        directors = [d.to(precision, copy=True) for d in before]
        shipped.reference.group_ema_(
            directors, [s.to(precision) for s in stacks], [w.to(precision) for w in weights], momentum
        )
        return named(directors)

    return Case(torch.float32, compute, want)


# --- adamw_ema_ -------------------------------------------------------------------------------------------------------

ADAMW = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.1}


def adamw_updates(shipped, copies=torch.bfloat16, offset=0) -> list:
    """Of stacks and of parameters that no director follows; of the first an expert has no weight, of the third none.

    offset: elements by which parameters lie behind an address that is a multiple of 16.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        t = torch.randn(shape, generator=generator)
        return torch.empty(t.numel() + offset)[offset:].view(t.shape).copy_(t)

    updates = []
    for E, shape in ((4, (5, 3)), (1, (2100,)), (3, (1,)), (8, (4, 20)), (0, (70,)), (0, ())):
        full = (E, *shape) if E else shape
        update = shipped.adamw_records.Update(
            draw(*full), draw(*full), draw(*full), draw(*full).square(), torch.tensor(3.0)
        )
        if E:
            copy = torch.full((E + 1, *shape), -1.0, dtype=copies) if copies is not None else None
            update = update._replace(director=draw(*shape), group_weights=torch.rand(E, generator=generator), copy=copy)
        updates.append(update)
    updates[0].group_weights[1] = 0
    updates[2].group_weights.zero_()
    return updates


def adamw_named(updates) -> Results:
    return {
        f"{name} {i}": t
        for i, u in enumerate(updates)
        for name, t in zip(("parameter", "exp_avg", "exp_avg_sq", "director"), (u[0], *u[2:4], u.director), strict=True)
        if t is not None
    }


def adamw_want(shipped, updates, momentum, clip, precision) -> Results:
    results = []
    for u in updates:
        p, g, m, v, d = (None if t is None else t.to(precision, copy=True) for t in (*u[:4], u.director))
        weights = None if d is None else u.group_weights.to(precision)
        state = {"exp_avg": m, "exp_avg_sq": v, "step": u.step.clone()}
        shipped.reference.adamw_ema_(p, g, state, ADAMW, d, weights, float(momentum), clip)
        results.append(u._replace(parameter=p, exp_avg=m, exp_avg_sq=v, director=d))
    return adamw_named(results)


def adamw_ema_case(shipped, momentum, copies=torch.bfloat16, clip=None, with_skip=True, offset=0) -> Case:
    before, records = adamw_updates(shipped, copies, offset), shipped.adamw_records
    rule = records.Rule(ADAMW["lr"], (ADAMW["beta1"], ADAMW["beta2"]), ADAMW["eps"], ADAMW["weight_decay"])

    def compute(emulator):
        fresh = adamw_updates(shipped, copies, offset)
        emulator.extra = tuple(t for u in fresh for t in (*u.moved, u.gradient))
        scalars = records.Scalars(
            momentum, None if clip is None else torch.tensor(clip), torch.tensor(False) if with_skip else None
        )
        shipped.adamw_ema.adamw_ema_(fresh, rule, scalars)
        if not emulator.compile_only:
            for u in (u for u in fresh if u.copy is not None):
                assert torch.equal(u.copy[:-1], u.parameter.to(u.copy.dtype))
                assert torch.equal(u.copy[-1], u.director.to(u.copy.dtype))
        return adamw_named(fresh)

    return Case(torch.float32, compute, lambda precision: adamw_want(shipped, before, momentum, clip or 1.0, precision))
