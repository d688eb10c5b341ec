"""Products with one set of weights: oneDNN or not, any strides, any dtype."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from dexkernels.ops.dense import linear, mlp
from dexkernels.testing import relative_error

of_the_cpu = pytest.mark.skipif(torch.get_default_device().type != "cpu", reason="oneDNN serves CPU tensors alone")


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (64, 33, 65), (2, 200, 96)])
@pytest.mark.parametrize("layout", ["plain", "transposed", "expanded", "strided bias"])
def test_linear_without_gradient(onednn, bias, shape, layout):
    rows, width, out = shape
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(rows, width, generator=g), torch.randn(out, width, generator=g)
    b = torch.randn(out, generator=g) if bias else None
    if layout == "transposed":
        x, w = x.t().contiguous().t(), w.t().contiguous().t()
    elif layout == "expanded":
        x, b = x[:1].expand(rows, width), None if b is None else b[:1].expand(out)
    elif layout == "strided bias":
        b = None if b is None else torch.stack([b, b + 1], 1)[:, 0]
    want = x.double() @ w.double().T + (0 if b is None else b.double())
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=onednn):
        got = linear(x, w, b)
        leading = linear(x.view(1, rows, 1, width), w, b)
    assert got.dtype == torch.float32 and got.shape == (rows, out)
    assert relative_error(got, want) < 3e-7
    assert leading.shape == (1, rows, 1, out) and relative_error(leading.view(rows, out), want) < 3e-7


@of_the_cpu
@pytest.mark.parametrize("onednn", [True, False])
def test_linear_of_any_strides(onednn):
    """A 3-D x that is no stack of matrices, columns of a wider matrix, every second row; x's strides change no bit."""
    g = torch.Generator().manual_seed(0)
    base, wide = torch.randn(6, 5, 34, generator=g), torch.randn(22, 34, generator=g)
    xs = [base.transpose(0, 1)[..., :17], base[::2, 1::2, ::2], base[:, :, 17:], base[:, :1, :17].expand(6, 5, 17)]
    for x, w in itertools.product(xs, [wide[:, ::2], wide[::2, :17], wide[:, 17:], wide.t()[:17].t()]):
        assert not x.is_contiguous()
        want = x.double() @ w.double().T
        with torch.no_grad(), torch.backends.mkldnn.flags(enabled=onednn):
            got = linear(x, w)
            assert relative_error(got, want) < 3e-7
            if onednn:
                assert torch.equal(got, linear(x.contiguous(), w))


@of_the_cpu
def test_linear_without_gradient_does_take_onednn(monkeypatch):
    used = []
    real = torch.ops.mkldnn._linear_pointwise

    class Spy:
        def _linear_pointwise(self, *args):
            used.append(args)
            return real(*args)

    monkeypatch.setattr(torch.ops, "mkldnn", Spy(), raising=False)
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    linear(x, w)
    assert not used
    with torch.no_grad():
        linear(x, w)
    assert len(used) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_linear_in_other_dtypes(dtype):
    x, w, b = torch.randn(3, 4).to(dtype), torch.randn(5, 4).to(dtype), torch.randn(5).to(dtype)
    with torch.no_grad():
        got = linear(x, w, b)
    assert torch.equal(got, F.linear(x, w, b)) and got.dtype == dtype


def test_linear_is_differentiable():
    leaves = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (5, 4), (5,))]
    assert torch.autograd.gradcheck(linear, leaves)
    single = [t.detach().float().requires_grad_() for t in leaves]
    out = linear(*single)
    grads = torch.autograd.grad(out, single, torch.ones_like(out))
    want = torch.autograd.grad(linear(*leaves).sum(), leaves)
    for a, b in zip(grads, want, strict=True):
        assert relative_error(a, b) < 1e-6


def test_linear_under_autocast_and_on_no_rows():
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    with torch.no_grad():
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            assert linear(x, w).dtype == torch.bfloat16
        assert linear(x[:0], w).shape == (0, 5)


def test_mlp():
    x, w1, b1, w2, b2 = (torch.randn(*s, dtype=torch.float64) for s in ((2, 3, 5), (7, 5), (7,), (5, 7), (5,)))
    z = x @ w1.T + b1
    want = (z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))) @ w2.T + b2
    torch.testing.assert_close(mlp(x, w1, b1, w2, b2), want)
