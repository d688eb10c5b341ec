"""`dexkernels.grouped_mlp` and its gradients."""

import itertools
import math

import pytest
import torch

from dexkernels import Routing, grouped_mlp
from dexkernels.routing import sort_slots
from dexkernels.testing import relative_error

B, N, D, H, E = 4, 3, 5, 7, 6


@pytest.fixture
def poison():
    """Uninitialised memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def routing_of(indices, gates):
    indices = torch.as_tensor(indices, dtype=torch.int32)
    return Routing(gates, indices, gates.sum(), torch.zeros(E), *sort_slots(indices, E))


def tensors(B=B, N=N, D=D, H=H, E=E, K=2, seed=0, dtype=torch.float64):
    """x, gates and the four weights, all requiring gradient."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, N, D), (B, K), (E, H, D), (E, H), (E, D, H), (E, D)]
    drawn = [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]
    drawn[1] = drawn[1].abs()
    return [t.requires_grad_() for t in drawn]


def by_hand(x, gates, indices, w1, b1, w2, b2):
    """One token at a time; the GELU through math.erf's torch twin. Differentiable."""
    out = []
    for b in range(x.shape[0]):
        rows = []
        for n in range(x.shape[1]):
            row = 0.0
            for k in range(gates.shape[-1]):
                e, g = (indices[b][n][k], gates[b, n, k]) if gates.dim() == 3 else (indices[b][k], gates[b, k])
                z = w1[e] @ x[b, n] + b1[e]
                row = row + g * (w2[e] @ (z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))) + b2[e])
            rows.append(row)
        out.append(torch.stack(rows))
    return torch.stack(out)


def gradients(out, leaves, seed=1):
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out.dtype)
    return torch.autograd.grad(out, leaves, grad_out, materialize_grads=True)


@pytest.mark.parametrize(
    "indices",
    [
        [[0, 1], [2, 3], [5, 0], [1, 4]],
        [[3, 5], [3, 5], [3, 5], [5, 3]],
        [[2], [2], [2], [2]],
        [[0], [5], [0], [3]],
        [[5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5], [1, 0, 2, 5, 4, 3], [3, 4, 5, 0, 1, 2]],
    ],
)
def test_value_and_every_gradient(indices, poison):
    leaves = tensors(K=len(indices[0]))
    x, gates, *weights = leaves
    got = grouped_mlp(x, routing_of(indices, gates), *weights)
    want = by_hand(x, gates, indices, *weights)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_token_wise(poison):
    indices = [[[(b + n) % E, (b * n + 4 + b + n) % E] for n in range(N)] for b in range(B)]
    indices = [[[i, j] if i != j else [i, (i + 1) % E] for i, j in row] for row in indices]
    x, _, *weights = tensors()
    gates = torch.rand(B, N, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64).requires_grad_()
    got = grouped_mlp(x, routing_of(indices, gates), *weights)
    want = by_hand(x, gates, indices, *weights)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    leaves = [x, gates, *weights]
    for a, b in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    leaves = tensors(B=3, N=2, D=3, H=4)

    def run(x, gates, *weights):
        return grouped_mlp(x, routing_of([[0, 2], [2, 4], [4, 0]], gates), *weights)

    assert torch.autograd.gradcheck(run, leaves)


def test_a_gate_of_zero_has_a_gradient():
    leaves = tensors()
    x, gates, *weights = leaves
    indices = [[0, 1], [2, 3], [5, 0], [1, 4]]
    with torch.no_grad():
        gates[0, 1] = gates[2, 0] = 0
    got = gradients(grouped_mlp(x, routing_of(indices, gates), *weights), leaves)
    want = gradients(by_hand(x, gates, indices, *weights), leaves)
    assert got[1][0, 1].abs() > 1e-3
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


SUBSETS = [s for n in range(1, E + 1) for s in itertools.combinations(range(E), n)]


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_subset_of_empty_experts(K, dtype, poison):
    """Experts that no image chose hold NaN: nothing reads them, and their gradients are exact zeros."""
    checked = 0
    for used in (s for s in SUBSETS if len(s) >= K):
        indices = [[used[i % len(used)], used[(i + 1) % len(used)]][:K] for i in range(E)]
        leaves = tensors(B=E, N=2, K=K, dtype=dtype)
        x, gates, *weights = leaves
        empty = [e for e in range(E) if e not in used]
        clean = gradients(grouped_mlp(x, routing_of(indices, gates), *weights), leaves)
        with torch.no_grad():
            for w in weights:
                w[empty] = float("nan")
        out = grouped_mlp(x, routing_of(indices, gates), *weights)
        grads = gradients(out, leaves)
        assert out.isfinite().all()
        for g, c in zip(grads, clean, strict=True):
            assert g.isfinite().all() and torch.equal(g, c)
        for g in grads[2:]:
            assert g[empty].count_nonzero() == 0
            assert all(g[e].count_nonzero() > 0 for e in used)
        checked += 1
    assert checked == {1: 63, 2: 57}[K]


@pytest.mark.parametrize("B, N", [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_compute(B, N):
    leaves = tensors(B=B, N=N)
    x, gates, *weights = leaves
    out = grouped_mlp(x, routing_of([[0, 1]] * B if B else torch.zeros(0, 2), gates), *weights)
    assert out.shape == (B, N, D)
    for g, leaf in zip(gradients(out, leaves), leaves, strict=True):
        assert torch.equal(g, torch.zeros_like(leaf))


@pytest.mark.parametrize("needed", [*itertools.product([False, True], repeat=6)][1:])
def test_gradients_come_where_they_are_asked_for(needed):
    leaves = tensors(dtype=torch.float32)
    indices = [[0, 1], [2, 3], [5, 0], [1, 4]]
    x, gates, *weights = leaves
    full = gradients(grouped_mlp(x, routing_of(indices, gates), *weights), leaves)
    leaves = [t.detach().requires_grad_(n) for t, n in zip(leaves, needed, strict=True)]
    x, gates, *weights = leaves
    out = grouped_mlp(x, routing_of(indices, gates), *weights)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    out.backward(grad_out)
    for leaf, n, want in zip(leaves, needed, full, strict=True):
        assert torch.equal(leaf.grad, want) if n else leaf.grad is None


def test_a_second_derivative_is_refused():
    leaves = tensors()
    x, gates, *weights = leaves
    out = grouped_mlp(x, routing_of([[0, 1]] * B, gates), *weights)
    (g,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        g.sum().backward()


def test_strided_tensors_equal_contiguous_ones():
    leaves = tensors(B=E, N=9, dtype=torch.float32)
    indices = [[i, (i + 1) % E] for i in range(E)]

    def run(leaves, grad_out):
        x, gates, *weights = leaves
        out = grouped_mlp(x, routing_of(indices, gates), *weights)
        return [out, *torch.autograd.grad(out, leaves, grad_out)]

    def strided(t):
        return t.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()

    grad_out = torch.randn(E, 9, D)
    plain = run(leaves, grad_out)
    x, gates, w1, b1, w2, b2 = leaves
    other = run([strided(x), strided(gates), w1, strided(b1), w2, strided(b2)], strided(grad_out).detach())
    assert not any(strided(t).is_contiguous() for t in leaves)
    for a, b in zip(plain, other, strict=True):
        assert torch.equal(a, b)
    # Another layout of a weight is another matrix product: equal up to rounding.
    for a, b in zip(plain, run([strided(t) for t in leaves], grad_out), strict=True):
        assert relative_error(a, b) < 1e-6
    expanded = run(leaves, torch.ones(()).expand(E, 9, D))
    for a, b in zip(expanded, run(leaves, torch.ones(E, 9, D)), strict=True):
        assert torch.equal(a, b)


def test_autocast():
    leaves = tensors(dtype=torch.float32)
    x, gates, *weights = leaves
    indices = [[0, 1], [2, 3], [5, 0], [1, 4]]
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        out = grouped_mlp(x, routing_of(indices, gates), *weights)
    assert out.dtype == torch.bfloat16
    want = by_hand(x, gates, indices, *weights)
    grads = gradients(out, leaves)
    assert 0 < relative_error(out, want) < 2e-2
    for g, w, leaf in zip(grads, gradients(want, leaves), leaves, strict=True):
        assert g.dtype == leaf.dtype == torch.float32
        assert relative_error(g, w) < 3e-2


@pytest.mark.parametrize("K", [1, 2])
def test_a_strided_bias_of_one_expert(K):
    """A stacked bias whose rows are strided: found silently wrong once, where oneDNN takes it for contiguous."""
    x, gates, w1, b1, w2, b2 = (t.detach() for t in tensors(K=K, dtype=torch.float32))
    r = routing_of([[0, 1][:K], [2, 3][:K], [5, 0][:K], [1, 4][:K]], gates)
    want = by_hand(
        *(t.double() for t in (x, gates)), r.expert_indices.tolist(), *(t.double() for t in (w1, b1, w2, b2))
    )
    for biases in ((b1.t().contiguous().t(), b2), (b1, b2.t().contiguous().t())):
        assert relative_error(grouped_mlp(x, r, w1, biases[0], w2, biases[1]), want) < 1e-6
