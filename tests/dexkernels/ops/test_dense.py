"""Products with one set of weights: oneDNN or not, any strides, any dtype."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from dexkernels.ops import products
from dexkernels.ops.dense import Linear, linear, linear_into, mlp
from dexkernels.testing import relative_error

of_the_cpu = pytest.mark.skipif(torch.get_default_device().type != "cpu", reason="oneDNN serves CPU tensors alone")


@pytest.fixture(params=[True, False])
def onednn(request, monkeypatch):
    """On every processor, with oneDNN and without."""
    if request.param and not products.HAS_ONEDNN:
        pytest.skip("torch without oneDNN")
    monkeypatch.setattr(products, "uses_onednn", lambda: request.param)
    return request.param


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
    with torch.no_grad():
        got = linear(x, w, b)
        leading = linear(x.view(1, rows, 1, width), w, b)
    assert got.dtype == torch.float32 and got.shape == (rows, out)
    assert relative_error(got, want) < 3e-7
    assert leading.shape == (1, rows, 1, out) and relative_error(leading.view(rows, out), want) < 3e-7


@of_the_cpu
def test_linear_of_any_strides(onednn):
    """A 3-D x that is no stack of matrices, columns of a wider matrix, every second row; x's strides change no bit."""
    g = torch.Generator().manual_seed(0)
    base, wide = torch.randn(6, 5, 34, generator=g), torch.randn(22, 34, generator=g)
    xs = [base.transpose(0, 1)[..., :17], base[::2, 1::2, ::2], base[:, :, 17:], base[:, :1, :17].expand(6, 5, 17)]
    for x, w in itertools.product(xs, [wide[:, ::2], wide[::2, :17], wide[:, 17:], wide.t()[:17].t()]):
        assert not x.is_contiguous()
        want = x.double() @ w.double().T
        with torch.no_grad():
            got = linear(x, w)
            assert relative_error(got, want) < 3e-7
            if onednn:
                assert torch.equal(got, linear(x.contiguous(), w))


class Spy:
    """`torch.ops.mkldnn` that counts its products."""

    def __init__(self):
        self.products = 0
        self._real = torch.ops.mkldnn._linear_pointwise

    def _linear_pointwise(self, *args):
        self.products += 1
        return self._real(*args)


@pytest.fixture
def spy(monkeypatch):
    spy = Spy()
    monkeypatch.setattr(torch.ops, "mkldnn", spy, raising=False)
    return spy


@of_the_cpu
def test_products_by_onednn_where_it_is_preferred(spy, onednn):
    """Also with a gradient, whose two products use it too."""
    layer, x = Linear(4, 5), torch.randn(3, 4, requires_grad=True)
    with torch.no_grad():
        layer(x)
    assert spy.products == (1 if onednn else 0)
    layer(x).sum().backward()
    assert spy.products == (4 if onednn else 0)


@of_the_cpu
def test_onednn_can_be_turned_off(spy, monkeypatch):
    monkeypatch.setattr(products, "uses_onednn", lambda: True)
    with torch.backends.mkldnn.flags(enabled=False):
        linear(torch.randn(3, 4), torch.randn(5, 4))
    assert spy.products == 0


@of_the_cpu
@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5), (1, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients(onednn, shape, bias):
    """The first and the second derivative, of expanded and strided gradients too, against float64."""
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*s, generator=g, requires_grad=True) for s in (shape, (4, 5), (4,))][: 2 + bias]
    exact = [t.detach().double().requires_grad_() for t in leaves]

    def derivatives(tensors):
        out = linear(*tensors)
        first = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
        strided = torch.autograd.grad(linear(*tensors)[..., ::2].sum(), tensors)
        return [*first, *strided, *torch.autograd.grad(sum(t.square().sum() for t in first), tensors)]

    for got, want in zip(derivatives(leaves), derivatives(exact), strict=True):
        assert got.shape == want.shape and relative_error(got, want) < 1e-6


@of_the_cpu
def test_linear_under_transforms(onednn):
    """torch.func, forward-mode autograd, autocast and subclasses of tensors keep torch's operators."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(3, 4, generator=g), torch.randn(5, 4, generator=g)
    want = torch.func.jacrev(lambda w: torch.nn.functional.linear(x, w))(w)
    torch.testing.assert_close(torch.func.jacrev(lambda w: linear(x, w))(w), want)
    torch.testing.assert_close(torch.func.vmap(lambda row: linear(row[None], w))(x)[:, 0], x @ w.t())
    _, tangent = torch.func.jvp(lambda x: linear(x, w), (x,), (x,))
    torch.testing.assert_close(tangent, x @ w.t())
    w.requires_grad_()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        tangent = torch.autograd.forward_ad.unpack_dual(linear(dual, w)).tangent
    torch.testing.assert_close(tangent, x @ w.t())
    torch.testing.assert_close(linear(x[0], w), w @ x[0])


@of_the_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_into(onednn, dtype):
    """Into a part of a larger tensor, of another dtype too."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(7, 6, generator=g).t(), torch.randn(7, 5, generator=g).t()
    stack = torch.full((3, 6, 5), torch.nan, dtype=dtype)
    linear_into(stack[1], x, w)
    assert relative_error(stack[1], x.double() @ w.double().t()) < 3e-7
    assert stack[[0, 2]].isnan().all()


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
