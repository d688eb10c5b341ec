"""The align loss against its formulas in float64, in the interpreter."""

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")

from dexkernels.ops.align_loss import triton as align_loss  # noqa: E402
from dexkernels.testing import relative_error  # noqa: E402

KINDS = ("kd", "cosine", "mse")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FLOOR = {torch.float32: 1e-6, torch.float16: 3e-4, torch.bfloat16: 3e-3}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    # Several chunks of columns, blocks of rows and rounds of the second stage at sizes that the interpreter can do.
    monkeypatch.setattr(align_loss, "MAX_COLS", 32)
    monkeypatch.setattr(align_loss, "PARTS", 2)


def formula(x, y, kind):
    """The three losses written out; the norms' floor is torch.nn.functional.cosine_similarity's 1e-8."""
    rows = x.shape[:-1].numel()
    if kind == "kd":
        q = x.exp() / x.exp().sum(-1, keepdim=True)
        p = (2 * y).exp() / (2 * y).exp().sum(-1, keepdim=True)
        return -(p * torch.where(q < 1e-6, 1e-6, q).log()).sum() / rows
    if kind == "cosine":
        cos = (x * y).sum(-1) / (x.norm(dim=-1).clamp(min=1e-8) * y.norm(dim=-1).clamp(min=1e-8))
        return (1 - cos).sum() / rows
    return (x - y).square().mean()


def with_gradient(x, y, kind, scale):
    leaf = x.clone().requires_grad_()
    loss = formula(leaf, y, kind)
    (grad,) = torch.autograd.grad(loss, leaf, torch.tensor(scale, dtype=loss.dtype))
    return loss.detach(), grad


def plain(x, y, kind, scale):
    """The same computed in float32 on the rounded inputs, its gradient rounded to x's dtype."""
    loss, grad = with_gradient(x.float(), y.float(), kind, scale)
    return loss, grad.to(x.dtype)


def run(x, y, kind, scale=1.0):
    loss, saved = align_loss.forward(x, y, kind)
    grad = align_loss.backward(torch.tensor(scale), x, y, saved, kind)
    assert loss.shape == () and loss.dtype == torch.float32
    assert grad.shape == x.shape and grad.dtype == x.dtype
    assert saved.numel() == (0 if kind == "mse" or x.numel() == 0 else 3 * x.shape[:-1].numel())
    return loss, grad


def check(x, y, kind, scale=1.0, layout=lambda t: t):
    got = run(layout(x), layout(y), kind, scale)
    exact = with_gradient(x.double(), y.double(), kind, scale)
    for g, want, p, floor in zip(got, exact, plain(x, y, kind, scale), (1e-6, FLOOR[x.dtype]), strict=True):
        assert relative_error(g, want) <= 2 * relative_error(p, want) + floor
    return got


def draw(*shape, dtype=torch.float32, scale=3.0, seed=0):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("shape", [(2, 3, 7), (5, 130), (1, 1), (4, 32), (3, 64), (13, 33), (6,)])
def test_loss_and_gradient(shape, dtype, kind):
    check(draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1), kind, scale=0.7)


@pytest.mark.parametrize("kind", KINDS)
def test_director_in_another_dtype(kind):
    check(draw(3, 40, dtype=torch.float16), draw(3, 40, seed=1), kind)


def test_a_clamped_q_has_no_gradient_of_its_own():
    x, y = draw(5, 70, scale=8.0), draw(5, 70, scale=0.5, seed=1)
    assert ((x.softmax(-1) < 1e-6).sum() > 50) and ((x.softmax(-1) > 1e-5).sum() > 50)
    check(x, y, "kd")


def test_large_entries_do_not_overflow():
    x, y = draw(3, 70) + 300, draw(3, 70, seed=1) - 300
    loss, grad = run(x, y, "kd")
    want = with_gradient((x - 300).double(), (y + 300).double(), "kd", 1.0)
    assert relative_error(loss, want[0]) < 1e-4 and relative_error(grad, want[1]) < 1e-4


def test_minus_infinity_is_probability_zero():
    x, y = draw(3, 70), draw(3, 70, seed=1)
    x[0, :40], y[1, 30:] = float("-inf"), float("-inf")
    got, want = run(x, y, "kd"), with_gradient(x.double(), y.double(), "kd", 1.0)
    assert relative_error(got[0], want[0]) < 1e-6 and relative_error(got[1][1:], want[1][1:]) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["rows", "all"])
def test_strides(layout, kind, layouts):
    for shape in ((2, 5, 35), (6, 35)):
        x, y = draw(*shape, dtype=torch.float16), draw(*shape, dtype=torch.float16, seed=1)
        check(x, y, kind, 1.0, layouts[layout])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["experts", "director"])
def test_nan_shows_in_the_loss_and_stays_in_its_row(where, kind):
    x, y = draw(6, 40), draw(6, 40, seed=1)
    clean = run(x, y, kind)[1]
    (x if where == "experts" else y)[2, 33] = float("nan")
    loss, grad = run(x, y, kind)
    assert loss.isnan() and grad[2].isnan().any()
    rest = [0, 1, 3, 4, 5]
    assert torch.equal(grad[rest], clean[rest])


def test_infinity_shows_in_the_kd_loss():
    x = draw(3, 40)
    x[1, 3] = float("inf")
    assert run(x, draw(3, 40, seed=1), "kd")[0].isnan()


def test_cosine_of_a_row_of_zeros_and_of_tiny_rows():
    """Below 1e-8 a norm is a constant; just above it is none."""
    x, y = draw(6, 40), draw(6, 40, seed=1)
    x += y
    x[0] = 0
    y[1] = 0
    x[2] *= 1e-10
    y[3] *= 1e-10
    x[4] *= 0.9e-8 / x[4].norm()
    x[5] *= 1.1e-8 / x[5].norm()
    loss, grad = run(x, y, "cosine")
    want, wanted = with_gradient(x.double(), y.double(), "cosine", 1.0)
    assert relative_error(loss, want) < 1e-6
    for row in range(6):
        assert relative_error(grad[row], wanted[row]) < 1e-5, row


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0)])
def test_nothing_gives_a_zero_loss(shape, kind):
    loss, grad = run(torch.zeros(shape), torch.zeros(shape), kind)
    assert loss == 0 and grad.shape == shape


def test_float64_is_refused():
    with pytest.raises(ValueError, match="^director_out: the Triton kernels take .*float64"):
        align_loss.forward(draw(2, 3), draw(2, 3).double(), "kd")


def test_rows_far_apart():
    # Rows 2^30 elements apart: offsets pass 2^31. The pages between are never touched.
    x, y = draw(4, 20, dtype=torch.float16), draw(4, 20, dtype=torch.float16, seed=1)
    storage = torch.UntypedStorage(2 * (3 * 2**30 + 64))
    far = torch.tensor([], dtype=x.dtype).set_(storage, 0, x.shape, (2**30, 1)).copy_(x)
    assert torch.equal(run(far, y, "kd")[1], run(x, y, "kd")[1])
    assert torch.equal(run(y, far, "mse")[1], run(y, x, "mse")[1])
