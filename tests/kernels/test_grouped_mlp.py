"""The grouped MLP against a loop over images in float64, in the interpreter."""

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")

from .mlp_cases import check, make, run, tiles  # noqa: E402


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


@pytest.mark.parametrize("strides", [(2**30, 16, 1), (16, 2**30, 1)], ids=["images", "tokens"])
def test_tokens_of_an_image_far_apart(strides):
    # 2^30 elements between those that follow one another: offsets reach 2^31. The pages between are never touched.
    x, grad_out, gates, indices, weights = make(4, 3, 16, 16, 2, 1, torch.float16)
    far = []
    for t in (x, grad_out):
        storage = torch.UntypedStorage(2 * (3 * 2**30 + 1024))
        far.append(torch.tensor([], dtype=t.dtype).set_(storage, 0, t.shape, strides).copy_(t))
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


def test_nan_in_the_first_token_does_not_reach_other_experts():
    """Rows past a tile's last are addressed as the first token of all: what they hold must not be read."""
    x, grad_out, gates, indices, weights = make(5, 9, 21, 37, 4, 2, torch.float32)
    indices[:] = torch.tensor([[0, 1], [1, 0], [2, 3], [3, 2], [2, 3]])
    clean = run(x, grad_out, gates, indices, weights)
    x[0, 0], grad_out[0, 0] = float("nan"), float("nan")
    got = run(x, grad_out, gates, indices, weights)
    for a, b in zip(got[:3], clean[:3], strict=True):
        assert torch.equal(a[1:], b[1:]) and a[0].isnan().any()
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
