"""The aligned path with too many experts for one sum: the results by slot, against float64 and a loop over images."""

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")

from dexkernels.ops.grouped_mlp.triton import (  # noqa: E402
    aligned,
    plan,
    sums,
    to_images_kernels,
    to_slots_kernels,
)
from dexkernels.ops.triton_common import precision  # noqa: E402
from dexkernels.testing import relative_error  # noqa: E402

from .aligned_cases import DTYPES, both_dtypes, check, run, tiles  # noqa: E402
from .mlp_cases import FLOOR, make, slots_of  # noqa: E402


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """Names of the launches of this file's kernel and of what combines its results; no number of experts is few."""
    names = []
    for module, name in (
        (to_slots_kernels, "to_slots_blocks_kernel"),
        (to_images_kernels, "to_images_kernel"),
        (sums, "combine_kernel"),
    ):
        kernel = getattr(module, name)

        class Watched:
            def __getitem__(self, grid, kernel=kernel, name=name):
                names.append(name)
                return kernel[grid]

        monkeypatch.setattr(module, name, Watched())
    monkeypatch.setattr(plan, "ONE_SUM", 0)
    return names


@both_dtypes
@pytest.mark.parametrize("N", [64, 65, 130, 197, 257])
def test_numbers_of_tokens(N, dtype, launched):
    B, E, K = (5, 3, 2) if N < 100 else (3, 2, 1 + N % 2)
    check(*make(B, N, 24, 40, E, K, dtype, seed=N), tiling=tiles(*((32, 16) if N % 2 else (16, 32))))
    # Out and dx; the results of one choice are those of the image.
    assert launched == ["to_slots_blocks_kernel", *["combine_kernel"] * (K > 1)] * 2


@pytest.mark.parametrize("D, H", [(8, 8), (16, 72), (72, 24)])
@pytest.mark.parametrize("K", [1, 2])
def test_widths_that_are_no_multiples_of_a_tile(D, H, K):
    check(*make(3, 66, D, H, 3, K, torch.float16))


@pytest.mark.parametrize(
    "E, K, indices",
    [
        (6, 2, [[3, 1]] * 5),
        (4, 1, [[2]] * 5),
        (3, 3, [[0, 1, 2], [2, 1, 0], [1, 0, 2]]),
        (20, 2, [[0, 19], [19, 4], [4, 5], [0, 4]]),
        (1, 1, [[0]]),
    ],
    ids=["empty", "one_expert", "K=E", "E=20", "one_image"],
)
@pytest.mark.parametrize("N", [64, 95])
def test_routings(N, E, K, indices):
    got = check(*make(len(indices), N, 16, 24, E, K, DTYPES[0], torch.tensor(indices)))
    unused = sorted(set(range(E)) - {e for row in indices for e in row})
    for grad in got[3:]:
        assert torch.equal(grad[unused], torch.zeros_like(grad[unused]))


@both_dtypes
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("given", [True, False], ids=["gates_and_bias", "neither"])
def test_every_slot(dtype, transposed, given):
    B, N, D, H, E, K, blocks, rest = 5, 130, 24, 40, 4, 2, 2, 2
    _, _, gates, indices, (_, _, weight, bias) = make(B, N, D, H, E, K, dtype)
    slots = slots_of(gates, indices, E)
    S, gates, bias = B * K, gates if given else None, bias if given else None
    rows = torch.randn(S * N, H, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.full((B, K, N, D), float("nan"), dtype=dtype)
    laid = weight if transposed else weight.mT.contiguous()
    product = plan.Product(rows.view(S, N, H), laid, transposed, bias, gates, out, None)
    aligned.to_slots(product, out, plan.Plan(slots, N, blocks, precision(dtype), 90, tiles()))
    of_blocks, packed = rows.split((S * (N - rest), S * rest))
    by_position = torch.cat([packed.view(S, rest, H), of_blocks.view(S, -1, H)], 1).double()
    expert = indices.flatten()
    wanted = torch.empty(S, N, D, dtype=torch.float64)
    for position, slot in enumerate(slots.slot_order.tolist()):
        wanted[slot] = by_position[position] @ weight[expert[slot]].double().T
        if given:
            wanted[slot] = gates.flatten()[slot].double() * (wanted[slot] + bias[expert[slot]].double())
    plain = wanted.to(dtype)
    assert relative_error(out.view(S, N, D), wanted) <= 2 * relative_error(plain, wanted) + FLOOR[dtype]


def test_rows_far_apart(within_arguments):
    # One slot, the last of many: what it writes passes 2^31 elements. The pages before are never touched.
    S, N, depth, width = 2**19, 64, 16, 80
    storage = torch.UntypedStorage(2 * S * N * width)
    out = torch.tensor([], dtype=torch.float16).set_(storage, 0, (S, N, width), (N * width, width, 1))
    rows, _, _, _, (weight, bias, *_) = make(2, N, depth, width, 2, 1, torch.float16)
    rows = rows.view(-1, depth)
    to_slots_kernels.to_slots_blocks_kernel[(1,)](
        rows_in=aligned.box(rows, 128, 16),
        slot_order=torch.tensor([S - 1]),
        offsets=torch.tensor([0, 0, 1]),
        gates=None,
        weight=aligned.box(weight, 1, 128, 16),
        bias=bias,
        out=out,
        director_out=None,
        num_experts=2,
        num_slots=S,
        director_images=0,
        blocks=1,
        first_token=0,
        depth=depth,
        width=width,
        TRANSPOSED=True,
        EXPERTS=16,
        COLS=128,
        DEPTH=16,
        GROUP=8,
    )
    wanted = rows[:N].double() @ weight[1].double().T + bias[1].double()
    assert relative_error(out[-1], wanted) < 1e-3


@pytest.mark.parametrize("K", [1, 2])
def test_nan_of_an_expert_stays_out_of_the_others(K):
    # Tiles of 128 rows end among the rows of the next expert: 3 blocks, and few packed rows.
    x, grad_out, gates, indices, weights = make(4, 67, 16, 24, 4, K, DTYPES[0])
    indices[:] = torch.tensor([[0, 1], [2, 3], [0, 1], [0, 1]])[:, :K]
    clean = run(x, grad_out, gates, indices, weights)
    x[1], grad_out[1] = float("nan"), float("nan")
    got = run(x, grad_out, gates, indices, weights)
    assert got[0][1].isnan().all() and got[1][1].isnan().all()
    for a, b in zip(got[:3], clean[:3], strict=True):
        assert torch.equal(a[[0, 2, 3]], b[[0, 2, 3]])


def test_the_bits_of_an_image_do_not_depend_on_the_others(rounded_once):
    x, grad_out, gates, indices, weights = make(4, 67, 16, 24, 3, 2, DTYPES[0])
    together = run(x, grad_out, gates, indices, weights)
    for b in range(4):
        alone = run(x[b : b + 1], grad_out[b : b + 1], gates[b : b + 1], indices[b : b + 1], weights)
        for name, a, t in zip(("out", "dx", "dgates"), alone[:3], together[:3], strict=True):
            assert torch.equal(a[0], t[b]), (name, b)
