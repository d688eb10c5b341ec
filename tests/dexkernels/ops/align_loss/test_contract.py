"""`dexkernels.align_loss` against formulas written out anew."""

import math

import pytest
import torch

from dexkernels import align_loss


def by_hand(y, d, kind):
    """A mean over rows, one number at a time."""
    total = 0.0
    for a, b in zip(y.reshape(-1, y.shape[-1]).tolist(), d.reshape(-1, d.shape[-1]).tolist(), strict=True):
        if kind == "kd":
            q = [math.exp(v - max(a)) for v in a]
            p = [math.exp((v - max(b)) / 0.5) for v in b]
            total -= sum(v / sum(p) * math.log(max(u / sum(q), 1e-6)) for u, v in zip(q, p, strict=True))
        elif kind == "cosine":
            dot = sum(u * v for u, v in zip(a, b, strict=True))
            total += 1 - dot / math.sqrt(sum(u * u for u in a) * sum(v * v for v in b))
        else:
            total += sum((u - v) ** 2 for u, v in zip(a, b, strict=True)) / len(a)
    return total / (y.numel() // y.shape[-1])


def outputs(*shape, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(*shape, generator=g, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("kind", ["kd", "cosine", "mse"])
@pytest.mark.parametrize("shape", [(2, 5, 7), (4, 3), (1, 1, 1), (6,), (2, 2, 2, 5)])
def test_values(kind, shape):
    y, d = outputs(*shape)
    assert align_loss(y, d, kind).item() == pytest.approx(by_hand(y, d, kind), rel=1e-12, abs=1e-13)


def test_kd_is_the_default_and_clamps():
    y, d = outputs(3, 5, 8, scale=12.0)
    assert (y.softmax(-1) < 1e-6).any()
    assert align_loss(y, d).item() == pytest.approx(by_hand(y, d, "kd"), rel=1e-12)


@pytest.mark.parametrize("kind", ["kd", "cosine", "mse"])
@pytest.mark.parametrize("scale", [1.0, 12.0])
def test_gradcheck(kind, scale):
    y, d = outputs(2, 3, 6, scale=scale)
    assert torch.autograd.gradcheck(lambda y: align_loss(y, d, kind), (y.requires_grad_(),))


def test_kd_gradient_leaves_out_the_clamped_terms():
    """``dL/dy_i = -sum_j p_j [q_j >= 1e-6] (delta_ij - q_i) / rows``."""
    y, d = outputs(4, 5, 8, scale=12.0)
    q, p = y.softmax(-1), (2 * d).softmax(-1)
    inside = p * (q >= 1e-6)
    want = -(inside - q * inside.sum(-1, keepdim=True)) / 20
    (got,) = torch.autograd.grad(align_loss(y.requires_grad_(), d), y)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-15)
    assert not torch.allclose(got, -(p - q) / 20)


def test_kd_gradient_is_exactly_zero_where_all_is_clamped():
    y = torch.tensor([[30.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    d = torch.tensor([[0.0, 2000.0, 0.0]], dtype=torch.float64)
    loss = align_loss(y, d)
    assert loss.item() == pytest.approx(-math.log(1e-6))
    loss.backward()
    assert torch.equal(y.grad, torch.zeros_like(y))


@pytest.mark.parametrize("kind", ["kd", "cosine", "mse"])
def test_no_gradient_into_the_director(kind):
    y, d = (t.requires_grad_() for t in outputs(2, 3, 6))
    align_loss(y, d, kind).backward()
    assert y.grad.abs().max() > 0 and d.grad is None


@pytest.mark.parametrize("kind", ["kd", "cosine", "mse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(kind, dtype):
    y, d = (t.to(dtype).requires_grad_() for t in outputs(2, 7, 33))
    loss = align_loss(y, d, kind)
    assert loss.dtype == torch.float32 and torch.equal(loss, align_loss(y.float(), d.float(), kind))
    loss.backward()
    assert y.grad.dtype == dtype
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert torch.equal(align_loss(y.float(), d.float(), kind), loss)


@pytest.mark.parametrize("kind", ["kd", "cosine", "mse"])
@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 0, 7), (0, 4)])
def test_no_rows_give_zero(kind, shape):
    y = torch.zeros(shape, requires_grad=True)
    loss = align_loss(y, torch.zeros(shape), kind)
    assert loss.shape == () and loss.item() == 0
    loss.backward()
    assert y.grad.shape == shape


@pytest.mark.parametrize("kind", ["kd", "cosine", "mse"])
def test_strided_input_equals_contiguous(kind):
    y, d = outputs(7, 4, 9)
    strided = [t.transpose(0, 1) for t in (y, d)]
    assert not strided[0].is_contiguous()
    # A sum over all elements goes in the order of memory.
    got, want = align_loss(*strided, kind), align_loss(*(t.contiguous() for t in strided), kind)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)


@pytest.mark.parametrize("scale", [0.0, 1e-12, 3e-9])
def test_cosine_of_vectors_without_length(scale):
    """Both may be 0 at the start of training: 1 - 0, and a gradient that is that of the definition, not NaN."""
    y, d = outputs(3, 5)
    y[0] *= scale
    d[1] *= scale
    assert y[0].norm() < 1e-8 and d[1].norm() < 1e-8
    y.requires_grad_()
    loss = align_loss(y, d, "cosine")
    norms = [t.norm(dim=-1, keepdim=True).clamp(min=1e-8) for t in (y.detach(), d)]
    cos = (y.detach() / norms[0] * (d / norms[1])).sum(-1)
    assert loss.item() == pytest.approx((1 - cos).mean().item(), rel=1e-12)
    loss.backward()
    assert y.grad.isfinite().all()
    torch.testing.assert_close(y.grad[0], -(d[0] / norms[1][0]) / 1e-8 / 3, rtol=1e-6, atol=0)
