"""Routing against a loop over rows in float64, in the interpreter."""

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")

from dexkernels.ops.route import triton as route  # noqa: E402
from dexkernels.ops.route.records import Saved  # noqa: E402
from dexkernels.testing import relative_error  # noqa: E402

NAMES = ("p", "gates", "balance_loss", "gate_mass")
FLOOR = {torch.float32: 1e-6, torch.float16: 3e-4}


def loop(r, weight, top_k, temperature, noise):
    """Probabilities, gates, balance loss, gate mass; indices by Python's sort: descending, ties to the lower index."""
    logits = r.to(weight.dtype) @ weight.T
    if noise is not None:
        logits = logits + noise
    p = (logits / temperature).softmax(-1)
    indices = torch.tensor([sorted(range(len(row)), key=lambda e, row=row: -row[e])[:top_k] for row in p.tolist()])
    chosen = p.gather(1, indices)
    gates = chosen / chosen.sum(1, keepdim=True)
    mean = p.mean(0)
    balance = weight.shape[0] * (mean * mean.detach()).sum()
    mass = torch.zeros(weight.shape[0], dtype=p.dtype).index_add(0, indices.flatten(), gates.detach().flatten())
    return (p, gates, balance, mass), indices


def sort(indices, E):
    flat = indices.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda s: flat[s])
    offsets = [sum(e < limit for e in flat) for limit in range(E + 1)]
    return torch.tensor(order), torch.tensor(offsets).diff(), torch.tensor(offsets)


def make(R, D, E, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Few decimals, so that no two logits of a row are nearly equal.
    r = (torch.randn(R, D, generator=generator) * 8).round() / 8
    weight = (torch.randn(E, D, generator=generator) * D**-0.5 * 64).round() / 64
    return r.to(dtype), weight, torch.randn(R, E, generator=generator)


def with_gradients(dtype, r, weight, top_k, temperature, noise, grad_gates, grad_balance):
    r, weight = r.to(dtype).clone().requires_grad_(), weight.to(dtype).clone().requires_grad_()
    noise = None if noise is None else noise.to(dtype)
    outputs, indices = loop(r, weight, top_k, temperature, noise)
    loss = (outputs[1] * grad_gates.to(dtype)).sum() + grad_balance * outputs[2]
    return [t.detach() for t in outputs] + list(torch.autograd.grad(loss, (r, weight))), indices


def check(r, weight, top_k, temperature=0.5, noise=None, layout=lambda t: t):
    R, E = r.shape[0], weight.shape[0]
    grad_gates = torch.randn(R, top_k, generator=torch.Generator().manual_seed(5))
    case = (r, weight, top_k, temperature, noise, grad_gates, 0.3)
    exact, indices = with_gradients(torch.float64, *case)
    plain, _ = with_gradients(torch.float32, *case)
    r, weight, noise = layout(r), layout(weight), noise if noise is None else layout(noise)
    p, gates, chosen, balance, mass, order, sizes, offsets = route.forward(r, weight, top_k, temperature, noise)
    assert chosen.dtype == torch.int32 and torch.equal(chosen.long(), indices)
    for got, want in zip((order, sizes, offsets), sort(indices, E), strict=True):
        assert got.dtype == torch.int64 and torch.equal(got, want)
    saved = Saved(p, gates, chosen, r, weight)
    dr, dweight = route.backward(layout(grad_gates), torch.tensor(0.3), saved, temperature)
    assert dr.dtype == r.dtype and dweight.dtype == weight.dtype
    names = (*NAMES, "dr", "dweight")
    for name, got, want, near in zip(names, (p, gates, balance, mass, dr, dweight), exact, plain, strict=True):
        bound = 2 * relative_error(near.to(got.dtype), want) + FLOOR[got.dtype]
        assert relative_error(got, want) <= bound, f"{name}: {relative_error(got, want):.2e} > {bound:.2e}"
    return p, gates, chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    "R, D, E, K",
    [(1, 5, 1, 1), (3, 8, 4, 2), (70, 19, 8, 2), (130, 40, 5, 5), (33, 130, 20, 3), (40, 33, 64, 8), (35, 17, 128, 4)],
)
def test_every_output_and_gradient(R, D, E, K, dtype):
    r, weight, noise = make(R, D, E, dtype)
    check(r, weight, K, 0.5, noise)


def test_without_noise_and_at_another_temperature():
    r, weight, _ = make(20, 24, 6)
    check(r, weight, 2, temperature=2.0)


def test_all_of_k():
    r, weight, noise = make(9, 24, 16)
    check(r, weight, 16, 0.5, noise)


@pytest.mark.parametrize("layout", ["rows", "all"])
def test_strides(layout, layouts):
    r, weight, noise = make(20, 24, 6)
    check(r, weight, 2, 0.5, noise, layouts[layout])


def test_many_rows_take_two_launches(monkeypatch):
    """The slots are sorted when all rows are done: by the program that did them, or in a launch after theirs."""
    kernel, launched = route.route_kernel, []

    class Watched:
        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                launched.append((grid, kwargs["DO_ROWS"], kwargs["DO_SORT"]))
                return kernel[grid](*args, **kwargs)

            return launch

    monkeypatch.setattr(route, "route_kernel", Watched())
    monkeypatch.setattr(route, "ONE_LAUNCH", 100)
    for rows, launches in ((100, [((1,), True, True)]), (150, [((3,), True, False), ((1,), False, True)])):
        launched.clear()
        r, weight, noise = make(rows, 8, 4)
        check(r, weight, 2, 0.5, noise)
        assert launched == launches


def test_ties_go_to_the_lower_index():
    r = torch.ones(5, 4)
    weight = torch.tensor([0.0, 1.0, 1.0, 0.5, 1.0, 0.5])[:, None].expand(6, 4)
    p, gates, chosen = check(r, weight, 5)
    assert chosen.tolist() == [[1, 2, 4, 3, 5]] * 5
    assert check(torch.zeros(3, 4), weight, 3)[2].tolist() == [[0, 1, 2]] * 3


def test_probabilities_that_vanish_still_give_distinct_indices():
    weight = torch.tensor([0.0, 0.0, 500.0, 0.0])[:, None]
    routed = route.forward(torch.ones(3, 1), weight, 4, 0.5, None)
    assert routed.expert_indices.tolist() == [[2, 0, 1, 3]] * 3
    assert torch.equal(routed.gates, torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 3))


def test_nan_rows_have_distinct_indices_and_nan_gates():
    r, weight, noise = make(70, 24, 6)
    clean = route.forward(r, weight, 3, 0.5, noise)
    r[2, 5], r[66] = float("nan"), float("inf")
    p, gates, chosen, balance, mass, order, sizes, offsets = route.forward(r, weight, 3, 0.5, noise)
    bad = torch.zeros(70, dtype=torch.bool)
    bad[[2, 66]] = True
    assert gates[bad].isnan().all() and p[bad].isnan().all() and balance.isnan()
    assert chosen[bad].tolist() == [[0, 1, 2]] * 2
    for a, b in zip((p, gates, chosen), clean[:3], strict=True):
        assert torch.equal(a[~bad], b[~bad])
    for got, want in zip((order, sizes, offsets), sort(chosen, 6), strict=True):
        assert torch.equal(got, want)
    assert mass[:3].isnan().all() and torch.allclose(mass[3:], _mass(gates, chosen)[3:])
    dr, dweight = route.backward(torch.ones_like(gates), torch.zeros(()), Saved(p, gates, chosen, r, weight), 0.5)
    assert dr[bad].isnan().all() and dweight.isnan().any()


def test_a_nan_row_spoils_no_other_rows_gradient_through_the_gates():
    r, weight, noise = make(20, 24, 6)
    r[2, 5] = float("nan")
    p, gates, chosen, *_ = route.forward(r, weight, 3, 0.5, noise)
    p_balance = p.clone()
    p_balance[2] = 0
    dr, _ = route.backward(torch.ones_like(gates), torch.zeros(()), Saved(p_balance, gates, chosen, r, weight), 0.5)
    assert dr[[i for i in range(20) if i != 2]].isfinite().all()


def _mass(gates, chosen):
    return torch.zeros(6).index_add(0, chosen.flatten().long(), gates.flatten())


def test_the_gradients_of_gates_and_balance_add_up():
    r, weight, noise = make(20, 24, 6)
    p, gates, chosen, *_ = route.forward(r, weight, 2, 0.5, noise)
    saved, none = Saved(p, gates, chosen, r, weight), torch.zeros(())
    both = route.backward(torch.ones_like(gates), torch.tensor(2.0), saved, 0.5)
    through_gates = route.backward(torch.ones_like(gates), none, saved, 0.5)
    through_balance = route.backward(torch.zeros_like(gates), torch.tensor(2.0), saved, 0.5)
    for b, g, a in zip(both, through_gates, through_balance, strict=True):
        assert torch.allclose(b, g + a, atol=1e-5)


def test_no_rows():
    r, weight = torch.zeros(0, 4), torch.ones(3, 4)
    routed = route.forward(r, weight, 2, 0.5, None)
    assert [list(t.shape) for t in routed] == [[0, 3], [0, 2], [0, 2], [], [3], [0], [3], [4]]
    assert all((t == 0).all() for t in routed)
    saved = Saved(routed.p, routed.gates, routed.expert_indices, r, weight)
    dr, dweight = route.backward(routed.gates, routed.balance_loss, saved, 0.5)
    assert dr.shape == (0, 4) and torch.equal(dweight, torch.zeros(3, 4))


def test_named_errors():
    with pytest.raises(ValueError, match="^r: the Triton kernels take .*float64"):
        route.forward(torch.zeros(1, 2).double(), torch.zeros(3, 2), 1, 0.5, None)
    with pytest.raises(ValueError, match="^router_weight: .*at most 128 experts, got 129"):
        route.forward(torch.zeros(1, 2), torch.zeros(129, 2), 1, 0.5, None)
    with pytest.raises(ValueError, match="^r: expected D of at least 1"):
        route.forward(torch.zeros(1, 0), torch.zeros(3, 0), 1, 0.5, None)
    with pytest.raises(ValueError, match="^r: expected at most .* slots"):
        route.forward(torch.zeros(1, 2).expand(2**30, 2), torch.zeros(3, 2), 3, 0.5, None)
