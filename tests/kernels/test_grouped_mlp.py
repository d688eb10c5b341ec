"""The grouped MLP against a loop over images in float64, in the interpreter."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")

from dexkernels.kernels import grouped_mlp  # noqa: E402
from dexkernels.kernels.common import Tile  # noqa: E402
from dexkernels.testing import relative_error  # noqa: E402

NAMES = ("out", "dx", "dgates", "dfc1_weight", "dfc1_bias", "dfc2_weight", "dfc2_bias")
FLOOR = {torch.float32: 4e-7, torch.float16: 2e-4}
"""Error that is granted whatever plain torch's is: a few units in the last place."""


def tiles(rows=32, cols=32, depth=16, halves=False):
    return {key: Tile(rows, cols, depth, 4, 2, halves) for key in grouped_mlp.TILES}


def loop(x, gates, indices, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    """``out[b] = sum_k gates[b, k] * fc2(gelu(fc1(x[b])))``, image by image; the sum over k in the gates' dtype."""
    rows = []
    for b in range(x.shape[0]):
        total = 0
        for k, e in enumerate(indices[b].tolist()):
            hidden = F.gelu(F.linear(x[b], fc1_weight[e], fc1_bias[e]))
            total = total + gates[b, k] * F.linear(hidden, fc2_weight[e], fc2_bias[e]).to(gates.dtype)
        rows.append(total.to(x.dtype))
    return torch.stack(rows)


def with_gradients(dtype, gate_dtype, grad_out, x, gates, indices, *weights):
    leaves = [t.to(dtype).clone().requires_grad_() for t in (x, gates, *weights)]
    leaves[1] = gates.to(gate_dtype).clone().requires_grad_()
    out = loop(leaves[0], leaves[1], indices, *leaves[2:])
    grads = torch.autograd.grad(out, leaves, grad_out.to(dtype), allow_unused=True)
    return [out.detach()] + [torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)]


def make(B, N, D, H, E, K, dtype, indices=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    if indices is None:
        indices = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(B)])
    gates = torch.rand(B, K, generator=generator) + 0.1
    weights = (draw(E, H, D, scale=D**-0.5), draw(E, H), draw(E, D, H, scale=H**-0.5), draw(E, D))
    return draw(B, N, D), draw(B, N, D), gates / gates.sum(1, keepdim=True), indices, weights


def sort(indices, E):
    """Slots sorted by expert, and the offsets: by Python's sort."""
    flat = indices.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda s: flat[s])
    offsets = [sum(e < limit for e in flat) for limit in range(E + 1)]
    return torch.tensor(order, dtype=torch.int64), torch.tensor(offsets)


def run(x, grad_out, gates, indices, weights, layout=lambda t: t, needs=(True, True, True), tiling=None):
    """The launchers' results in the order of NAMES."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = (layout(w) for w in weights)
    order, offsets = sort(indices, fc1_bias.shape[0])
    x, grad_out, gates = layout(x), layout(grad_out), layout(gates)
    tiling = tiling or tiles()
    out, z = grouped_mlp.grouped_mlp_forward(
        x, gates, order, offsets, fc1_weight, fc1_bias, fc2_weight, fc2_bias, tiles=tiling
    )
    grads = grouped_mlp.grouped_mlp_backward(
        grad_out, x, gates, order, offsets, fc1_weight, fc2_weight, fc2_bias, z, *needs, tiles=tiling
    )
    return [out, *grads]


def check(x, grad_out, gates, indices, weights, **kwargs):
    got = run(x, grad_out, gates, indices, weights, **kwargs)
    exact = with_gradients(torch.float64, torch.float64, grad_out, x, gates, indices, *weights)
    plain = with_gradients(x.dtype, torch.float32, grad_out, x, gates, indices, *weights)
    for name, g, want, p in zip(NAMES, got, exact, plain, strict=True):
        bound = 2 * relative_error(p, want) + FLOOR[x.dtype]
        assert relative_error(g, want) <= bound, f"{name}: {relative_error(g, want):.2e} > {bound:.2e}"
        assert g.dtype == (torch.float32 if name == "dgates" else x.dtype)
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("N", [1, 5, 17, 50, 64, 65, 130, 197, 257])
def test_every_number_of_tokens(N, dtype):
    B, E = (7, 4) if N < 50 else (3, 2)
    rows = 32 if N < 100 else 64
    check(*make(B, N, 24, 40, E, 2 if N < 50 else 1, dtype, seed=N), tiling=tiles(rows, 32, 16, halves=N % 2 == 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("D, H", [(1, 1), (19, 35), (33, 17), (16, 48)])
def test_any_width(D, H, dtype):
    check(*make(4, 7, D, H, 3, 2, dtype), tiling=tiles(16, 16, 16, halves=D == 19))


@pytest.mark.parametrize(
    "tiling", [tiles(16, 32, 16), tiles(32, 16, 32, True), tiles(64, 16, 16)], ids=["wide", "deep", "tall"]
)
def test_tiles_that_are_not_square(tiling):
    check(*make(3, 17, 40, 72, 3, 2, torch.float32), tiling=tiling)


@pytest.mark.parametrize(
    "B, E, K, indices",
    [
        (6, 5, 2, [[3, 1]] * 6),
        (6, 4, 1, [[2]] * 6),
        (4, 3, 3, [[0, 1, 2], [2, 1, 0], [1, 0, 2], [0, 2, 1]]),
        (1, 8, 2, [[7, 0]]),
        (1, 1, 1, [[0]]),
        (5, 20, 2, [[0, 19], [19, 4], [4, 5], [0, 4], [18, 19]]),
        (40, 2, 1, [[i % 3 // 2] for i in range(40)]),
    ],
    ids=["empty", "one_expert", "K=E", "one_image", "E=1", "E=20", "skewed"],
)
def test_routings(B, E, K, indices):
    case = make(B, 7, 20, 36, E, K, torch.float32, torch.tensor(indices))
    got = check(*case)
    unused = sorted(set(range(E)) - set(case[3].flatten().tolist()))
    for grad in got[3:]:
        assert torch.equal(grad[unused], torch.zeros_like(grad[unused]))


@pytest.mark.parametrize("layout", ["rows", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_strides(layout, dtype, layouts):
    check(*make(4, 9, 21, 37, 3, 2, dtype), layout=layouts[layout])


def test_a_gradient_that_is_expanded():
    x, _, gates, indices, weights = make(4, 9, 21, 37, 3, 2, torch.float32)
    check(x, torch.tensor(0.5).expand(4, 9, 21), gates, indices, weights)


def test_tokens_of_an_image_far_apart():
    # 3 images 2^30 elements apart: offsets pass 2^31. The pages between are never touched.
    x, grad_out, gates, indices, weights = make(4, 3, 16, 16, 2, 1, torch.float16)
    far = [torch.zeros(1, dtype=t.dtype).new_zeros(0) for t in (x, grad_out)]
    for i, t in enumerate((x, grad_out)):
        far[i] = torch.UntypedStorage(2 * (3 * 2**30 + 1024))
        view = torch.tensor([], dtype=t.dtype).set_(far[i], 0, t.shape, (2**30, 16, 1))
        far[i] = view.copy_(t)
    check(*far, gates, indices, weights)


def test_zero_gates_and_only_what_is_needed():
    x, grad_out, gates, indices, weights = make(4, 9, 21, 37, 3, 2, torch.float32)
    gates[:, 1] = 0
    full = check(x, grad_out, gates, indices, weights)
    for needs in [(True, False, False), (False, True, False), (False, False, True), (False, False, False)]:
        got = run(x, grad_out, gates, indices, weights, needs=needs)
        wanted = [True, *needs[:2], *[needs[2]] * 4]
        for g, f, w in zip(got, full, wanted, strict=True):
            assert torch.equal(g, f) if w else g is None


def test_nan_stays_in_its_image():
    x, grad_out, gates, indices, weights = make(5, 9, 21, 37, 4, 2, torch.float32)
    indices[:] = torch.tensor([[0, 1], [1, 0], [2, 3], [3, 2], [2, 3]])
    clean = run(x, grad_out, gates, indices, weights)
    gates[1], x[0, 3] = float("nan"), float("nan")
    got = run(x, grad_out, gates, indices, weights)
    assert got[0][1].isnan().all() and got[0][0, 3].isnan().all() and got[1][1].isnan().all()
    for a, b in zip(got[:3], clean[:3], strict=True):
        assert torch.equal(a[2:], b[2:])
    assert torch.equal(got[0][0, :3], clean[0][0, :3])
    for a, b in zip(got[3:], clean[3:], strict=True):
        assert torch.equal(a[2:], b[2:]) and a[:2].isnan().any()


def test_no_images():
    x, grad_out, gates, indices, weights = make(2, 3, 5, 7, 2, 1, torch.float32)
    got = run(x[:0], grad_out[:0], gates[:0], indices[:0], weights)
    assert got[0].shape == got[1].shape == (0, 3, 5) and got[2].shape == (0, 1)
    for g, w in zip(got[3:], weights, strict=True):
        assert torch.equal(g, torch.zeros_like(w))
    got = run(x[:, :0], grad_out[:, :0], gates, indices, weights)
    assert got[0].shape == (2, 0, 5) and torch.equal(got[2], torch.zeros(2, 1))


def test_named_errors():
    x, grad_out, gates, indices, weights = make(2, 3, 5, 7, 2, 1, torch.float32)
    with pytest.raises(ValueError, match="^x: the Triton kernels take .*float64"):
        run(x.double(), grad_out, gates, indices, weights)
    with pytest.raises(ValueError, match="^fc1_weight: expected D and H of at least 1"):
        run(x[..., :0], grad_out[..., :0], gates, indices, (weights[0][..., :0], weights[1], weights[2], weights[3]))
    with pytest.raises(ValueError, match="^x: expected at most .* rows"):
        run(x[:, :1].expand(2, 2**31, 5), grad_out, gates, indices, weights)


def test_repeats_are_bit_equal():
    case = make(4, 9, 21, 37, 3, 2, torch.float16)
    for a, b in zip(run(*case), run(*case), strict=True):
        assert torch.equal(a, b)
