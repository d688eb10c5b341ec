"""Images of the same experts that share the weights of a product: against a loop over images, in the interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")

from dexkernels.ops.grouped_mlp.triton import aligned, to_images_kernels  # noqa: E402

from .aligned_cases import DTYPES, both_dtypes, check, run, tiles  # noqa: E402
from .mlp_cases import make, slots_of  # noqa: E402


@pytest.fixture
def launched(monkeypatch):
    """How many of the products of this file were launched; pairs are made of any number of images."""
    counts = []
    kernel = to_images_kernels.pairs_to_images_kernel

    class Watched:
        def __getitem__(self, grid):
            counts.append(grid)
            return kernel[grid]

    monkeypatch.setattr(to_images_kernels, "pairs_to_images_kernel", Watched())
    monkeypatch.setattr(aligned, "PAIRED", 0)
    return counts


@both_dtypes
@pytest.mark.parametrize("N", [64, 65, 130, 197, 257])
def test_numbers_of_tokens(N, dtype, launched):
    B, E, K = (5, 3, 2) if N < 100 else (3, 2, 1 + N % 2)
    check(*make(B, N, 16, 24, E, K, dtype, seed=N), tiling=tiles(*((32, 16, 32) if N % 2 else (16, 32, 16))))
    # Out and dx; where the blocks of an image are even in number they pair up by themselves.
    assert len(launched) == (2 if N // 64 % 2 else 0)


@pytest.mark.parametrize(
    "E, K, indices",
    [
        (4, 2, [[0, 1], [1, 0], [2, 3], [1, 0], [3, 2], [0, 3]]),
        (5, 2, [[2, 4], [4, 2], [2, 4]]),
        (3, 3, [[0, 1, 2], [2, 1, 0], [1, 0, 2], [2, 0, 1]]),
        (16, 3, [[15, 0, 7], [1, 2, 3], [0, 7, 15]]),
        (1, 1, [[0]]),
    ],
    ids=["orders", "one_set", "K=E", "E=16", "one_image"],
)
def test_partners_choose_in_any_order(E, K, indices, launched):
    check(*make(len(indices), 66, 16, 40, E, K, DTYPES[0], torch.tensor(indices)))
    assert len(launched) == (2 if K > 1 else 0), "of one choice there is nothing to add up"


@pytest.mark.parametrize("layout", ["rows", "all"])
def test_strides(layout, layouts, launched):
    check(*make(5, 65, 16, 24, 3, 2, torch.float16), layout=layouts[layout])


def test_the_bits_of_an_image_do_not_depend_on_its_partner(launched):
    x, grad_out, gates, indices, weights = make(4, 65, 16, 24, 3, 3, DTYPES[0])
    indices[:] = torch.tensor([[0, 1, 2], [2, 1, 0], [1, 0, 2], [1, 2, 0]])
    together = run(x, grad_out, gates, indices, weights)
    for b in (1, 2):
        alone = run(x[b : b + 1], grad_out[b : b + 1], gates[b : b + 1], indices[b : b + 1], weights)
        for name, a, t in zip(("out", "dx", "dgates"), alone[:3], together[:3], strict=True):
            assert torch.equal(a[0], t[b]), (name, b)


def test_nan_stays_with_its_image(launched):
    x, grad_out, gates, indices, weights = make(4, 65, 16, 24, 4, 2, DTYPES[0])
    indices[:] = torch.tensor([[0, 1], [1, 0], [2, 3], [2, 3]])
    clean = run(x, grad_out, gates, indices, weights)
    x[1], gates[2] = float("nan"), float("nan")
    got = run(x, grad_out, gates, indices, weights)
    assert got[0][1].isnan().all() and got[0][2].isnan().all() and got[1][2].isnan().all()
    for a, b in zip(got[:3], clean[:3], strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[3], b[3])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 150), st.integers(1, 16), st.randoms(use_true_random=False))
def test_images_are_ordered_by_their_sets(B, E, random):
    K = random.randint(1, min(E, 3))
    indices = torch.tensor([random.sample(range(E), K) for _ in range(B)])
    sets = [sum(1 << e for e in row) for row in indices.tolist()]
    wanted = sorted(range(B), key=lambda b: sets[b])
    _, expert = aligned.invert_slots(slots_of(torch.ones(B, K), indices, E))
    order, index = aligned.order_images(expert, B, K)
    assert order.tolist() == wanted
    assert index.tolist() == [sum(sets[c] == sets[b] for c in wanted[:r]) for r, b in enumerate(wanted)]


def test_pairs_are_made_where_sets_are_few():
    assert aligned.in_pairs(224, 8, 2, 1) and aligned.in_pairs(224, 8, 2, 3)
    assert not aligned.in_pairs(224, 8, 2, 4), "the blocks of an image pair up"
    assert not aligned.in_pairs(8, 8, 2, 1) and not aligned.in_pairs(224, 16, 8, 1), "few images would find a partner"
