"""`dexkernels.route` and the order of slots, against formulas written out anew."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dexkernels import route
from dexkernels.routing import sort_slots


def problem(B=5, N=3, D=7, E=6, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, N, D, generator=g, dtype=torch.float64)
    return x.to(dtype), torch.randn(E, D, generator=g, dtype=torch.float64).to(dtype)


def by_hand(logits, K, temperature=0.5):
    """Probabilities, indices and gates of logits ``[R, E]``, one row at a time in Python."""
    p = torch.exp(logits / temperature - (logits / temperature).amax(-1, keepdim=True))
    p = p / p.sum(-1, keepdim=True)
    indices = [sorted(range(len(row)), key=lambda e, row=row: (-row[e], e))[:K] for row in p.tolist()]
    gates = [
        [row[e] / sum(row[i] for i in chosen) for e in chosen] for row, chosen in zip(p.tolist(), indices, strict=True)
    ]
    return p, torch.tensor(indices).view(-1, K), torch.tensor(gates, dtype=logits.dtype).view(-1, K)


def assert_routes(routing, logits, K, shape, temperature=0.5):
    """Everything in ``routing`` follows from ``logits [R, E]``."""
    p, indices, gates = by_hand(logits.detach(), K, temperature)
    E = logits.shape[1]
    assert routing.expert_indices.dtype == torch.int32
    assert routing.gates.shape == routing.expert_indices.shape == (*shape, K)
    assert torch.equal(routing.expert_indices.long().view(-1, K), indices)
    torch.testing.assert_close(routing.gates.detach().reshape(-1, K), gates, rtol=1e-12, atol=1e-14)
    mass = [
        sum(gates[r, k].item() for r in range(len(gates)) for k in range(K) if indices[r, k] == e) for e in range(E)
    ]
    torch.testing.assert_close(routing.gate_mass, torch.tensor(mass, dtype=p.dtype), rtol=1e-12, atol=1e-14)
    balance = E * sum(p[:, e].mean().item() ** 2 for e in range(E))
    assert routing.balance_loss.item() == pytest.approx(balance, rel=1e-12)
    assert not routing.gate_mass.requires_grad


@pytest.mark.parametrize("temperature", [0.5, 1.3])
@pytest.mark.parametrize("K", [1, 2, 6])
def test_from_the_cls_token(K, temperature):
    x, w = problem()
    assert_routes(route(x, w, K, temperature=temperature), x[:, 0] @ w.T, K, (5,), temperature)
    other = x.clone()
    other[:, 1:] += 1
    assert torch.equal(route(other, w, K).gates, route(x, w, K).gates)


def test_default_temperature_is_one_half():
    x, w = problem()
    assert torch.equal(route(x, w, 2).gates, route(x, w, 2, temperature=0.5).gates)


def test_from_the_mean_token():
    x, w = problem()
    mean = (x[:, 0] + x[:, 1] + x[:, 2]) / 3
    assert_routes(route(x, w, 2, route_from="mean"), mean @ w.T, 2, (5,))


def test_token_wise_decides_for_every_token():
    x, w = problem()
    assert_routes(route(x, w, 2, routing="token"), x.reshape(15, 7) @ w.T, 2, (5, 3))


def test_ties_go_to_the_lower_index():
    x = torch.ones(3, 2, 4)
    w = torch.zeros(40, 4)
    assert route(x, w, 5).expert_indices.tolist() == [[0, 1, 2, 3, 4]] * 3
    w[[7, 21, 33]] = 1.0
    assert route(x, w, 5).expert_indices.tolist() == [[7, 21, 33, 0, 1]] * 3


def test_indices_are_in_order_of_descending_probability():
    w = torch.tensor([0.1, 0.5, 0.3, 0.4, 0.2])[:, None]
    x = torch.tensor([1.0, -1.0]).view(2, 1, 1)
    routing = route(x, w, 5)
    assert routing.expert_indices.tolist() == [[1, 3, 2, 4, 0], [0, 4, 2, 3, 1]]
    assert (routing.gates.diff(dim=1) < 0).all()


@pytest.mark.parametrize("routing", ["image", "token"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_rows_give_distinct_indices_in_range(routing, bad):
    x, w = problem(B=4, E=5)
    x[1] = bad
    r = route(x, w, 3, routing=routing)
    indices, gates = r.expert_indices.view(4, -1, 3), r.gates.view(4, -1, 3)
    assert gates[1].isnan().all() and r.gate_mass.isnan().any() and r.balance_loss.isnan()
    clean = route(torch.cat([x[:1], x[2:]]), w, 3, routing=routing)
    torch.testing.assert_close(gates[[0, 2, 3]].reshape(-1, 3), clean.gates.reshape(-1, 3), rtol=1e-12, atol=0)
    for row in indices.reshape(-1, 3).tolist():
        assert len(set(row)) == 3 and set(row) <= set(range(5))
    assert r.group_sizes.sum() == indices.numel()


@pytest.mark.parametrize("routing", ["image", "token"])
@pytest.mark.parametrize("std", [0.3, 1.0])
def test_noise_formula(routing, std):
    x, w = problem()
    rows = 1 if routing == "image" else 3
    xi = torch.randn(5, rows, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    usage = torch.tensor([0.5, 0.0, 0.25, 0.0, 0.2, 0.01], dtype=torch.float64)
    frequency = torch.tensor([1 - u / (usage.sum().item() + 1e-6) for u in usage.tolist()], dtype=torch.float64)
    r = route(x, w, 2, routing=routing, noise_std=std, router_noise=xi, usage_ema=usage)
    logits = (x[:, :rows] @ w.T + std * (xi + frequency)).reshape(-1, 6)
    assert_routes(r, logits, 2, (5,) if routing == "image" else (5, 3))
    as_tensor = torch.tensor(std, dtype=torch.float64)
    again = route(x, w, 2, routing=routing, noise_std=as_tensor, router_noise=xi, usage_ema=usage)
    assert torch.equal(r.gates, again.gates) and torch.equal(r.expert_indices, again.expert_indices)


def test_unused_usage_gives_every_expert_the_same_bonus():
    x, w = problem()
    zero = torch.zeros(5, 1, 6)
    r = route(x, w, 2, noise_std=1.0, router_noise=zero, usage_ema=torch.zeros(6))
    torch.testing.assert_close(r.gates, route(x, w, 2).gates)


@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0.0)])
def test_zero_noise_is_no_noise(zero):
    x, w = problem()
    noisy = route(x, w, 2, noise_std=zero, router_noise=torch.ones(5, 1, 6), usage_ema=torch.ones(6))
    assert torch.equal(noisy.gates, route(x, w, 2).gates)


def test_noise_is_drawn_from_the_global_generator_for_every_row_and_expert():
    x, w = torch.zeros(400, 1, 3, dtype=torch.float64), torch.zeros(8, 3, dtype=torch.float64)

    def draw(seed):
        torch.manual_seed(seed)
        return route(x, w, 8, noise_std=0.5, usage_ema=torch.zeros(8)).gates

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    # With x = 0 and temperature 0.5 the log-gates are the noise itself, standard normal, up to a constant per row.
    log_gates = draw(2).log()
    centred = log_gates - log_gates.mean(1, keepdim=True)
    assert centred.square().mean().item() == pytest.approx(7 / 8, abs=0.08)


@pytest.mark.parametrize("routing", ["image", "token"])
def test_balance_gradient_stops_at_one_factor(routing):
    x, w = problem()
    x, w = x.requires_grad_(), w.requires_grad_()
    got = torch.autograd.grad(route(x, w, 2, routing=routing).balance_loss, (x, w))
    rows = x[:, 0] if routing == "image" else x.reshape(15, 7)
    # E * sum(m * stop(m)) has half the gradient of E * sum(m * m).
    mean = torch.softmax(rows @ w.T * 2, 1).mean(0)
    want = torch.autograd.grad(0.5 * 6 * (mean * mean).sum(), (x, w))
    assert want[1].abs().max() > 1e-3
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("routing", ["image", "token"])
@pytest.mark.parametrize("route_from", ["cls", "mean"])
def test_gates_gradcheck(routing, route_from):
    x, w = problem(B=2, N=2, D=4, E=4)

    def gates(x, w):
        return route(x, w, 2, routing=routing, route_from=route_from).gates

    assert torch.autograd.gradcheck(gates, (x.requires_grad_(), w.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"routing": "token"}, {"route_from": "mean"}])
def test_half_precision_inputs_are_routed_in_float32(dtype, options):
    x, w = problem(B=9, N=4, D=33, dtype=dtype)
    half, full = route(x, w, 3, **options), route(x.float(), w.float(), 3, **options)
    assert half.gates.dtype == half.balance_loss.dtype == half.gate_mass.dtype == torch.float32
    assert torch.equal(half.expert_indices, full.expert_indices) and torch.equal(half.slot_order, full.slot_order)
    for name in ("gates", "balance_loss", "gate_mass"):
        torch.testing.assert_close(getattr(half, name), getattr(full, name), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("routing", ["image", "token"])
@pytest.mark.parametrize("route_from", ["cls", "mean"])
def test_strided_input_equals_contiguous_bit_for_bit(routing, route_from):
    base, w = problem(B=4, N=9, D=33, dtype=torch.float32)
    x = base.transpose(0, 1)
    assert not x.is_contiguous()
    options = {"routing": routing, "route_from": route_from}
    for a, b in zip(route(x, w, 3, **options), route(x.contiguous(), w, 3, **options), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("route_from", ["cls", "mean"])
def test_autocast_does_not_reach_routing(route_from):
    x, w = problem(B=9, N=4, D=33, dtype=torch.float32)
    outside = route(x, w, 3, route_from=route_from)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        inside = route(x, w, 3, route_from=route_from)
    assert inside.gates.dtype == torch.float32
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a, b)


def test_record_holds_the_sorted_slots():
    x, w = problem(B=20)
    r = route(x, w, 2)
    for got, want in zip((r.slot_order, r.group_sizes, r.group_offsets), sort_slots(r.expert_indices, 6), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("routing", ["image", "token"])
def test_empty_batch(routing):
    x, w = problem(B=0)
    r = route(x, w, 2, routing=routing)
    assert r.gates.shape == ((0, 2) if routing == "image" else (0, 3, 2))
    assert r.balance_loss == 0 and torch.equal(r.gate_mass, torch.zeros(6, dtype=torch.float64))
    assert r.group_offsets.tolist() == [0] * 7


@pytest.mark.parametrize("recompute", [False, True])
def test_usage_may_not_change_between_forward_and_backward(recompute):
    """Under activation checkpointing the routing of the recomputed forward would be another one."""
    x, w = problem()
    usage, xi = torch.linspace(0, 0.5, 6, dtype=torch.float64), torch.zeros(5, 1, 6, dtype=torch.float64)

    def balance(w, std):
        return route(x, w, 2, noise_std=std, router_noise=xi, usage_ema=usage).balance_loss

    def backward(std, change):
        leaf = w.clone().requires_grad_()
        loss = checkpoint(balance, leaf, std, use_reentrant=False) if recompute else balance(leaf, std)
        if change:
            usage.mul_(3)
        loss.backward()
        return leaf.grad

    assert torch.equal(backward(0.0, change=True), backward(0.0, change=False))
    assert backward(1.0, change=False).count_nonzero()
    with pytest.raises(RuntimeError, match="usage_ema"):
        backward(1.0, change=True)
