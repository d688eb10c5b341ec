"""The first N mod 64 tokens of an image in the launches of its blocks: packed rows, their tiles, and what they give."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")

import triton.language as tl  # noqa: E402

from dexkernels.ops.grouped_mlp.triton import aligned, aligned_kernels, gather, plan  # noqa: E402
from dexkernels.ops.triton_common import experts_block, max_tiles  # noqa: E402

from .aligned_cases import DTYPES, check, run, tiles  # noqa: E402
from .mlp_cases import make, slots_of  # noqa: E402

ON_CUDA = torch.get_default_device().type == "cuda"

if not ON_CUDA:
    from triton.runtime.interpreter import InterpretedFunction

    @InterpretedFunction
    def probe(offsets, out, num_experts, blocks, rest, EXPERTS: tl.constexpr):
        tile = tl.program_id(0)
        expert, packed, first, end = aligned_kernels.find_rows(offsets, tile, num_experts, blocks, rest, EXPERTS)
        tl.store(out + 4 * tile, expert)
        tl.store(out + 4 * tile + 1, packed.to(tl.int32))
        tl.store(out + 4 * tile + 2, first)
        tl.store(out + 4 * tile + 3, end)


@pytest.mark.skipif(ON_CUDA, reason="its probe is an interpreted function")
@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=18), st.integers(1, 4), st.integers(0, 63))
def test_tiles_cover_blocks_and_packed_rows_once(sizes, blocks, rest):
    E, S = len(sizes), sum(sizes)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    wanted = []
    for e in range(E):
        first, end = offsets[e].item(), offsets[e + 1].item()
        for packed, rows in ((0, 64 * blocks), (1, rest)):
            wanted += [[e, packed, row, end * rows] for row in range(first * rows, end * rows, 128)]
    grid = max_tiles(S * blocks, E, 2) + max_tiles(S * rest, E, 128)
    assert len(wanted) <= grid
    if grid:
        out = torch.zeros(grid, 4, dtype=torch.int64)
        probe[(grid,)](offsets, out, E, blocks, rest, experts_block(E))
        assert out[: len(wanted)].tolist() == wanted
        assert (out[len(wanted) :, 2] >= out[len(wanted) :, 3]).all()


def test_rows_are_packed_in_slot_order(monkeypatch, layouts):
    monkeypatch.setattr(aligned, "PACK", 16)
    x, _, gates, indices, _ = make(5, 67, 24, 8, 3, 2, torch.float16)
    slots = slots_of(gates, indices, 3)
    of = plan.Plan(slots, 67, 1, "half", 90, {})
    for t in (x, layouts["rows"](x)):
        packed = aligned.pack_rest(t, of)
        assert torch.equal(packed, torch.cat([x[slot // 2, :3] for slot in slots.slot_order.tolist()]))
    assert aligned.pack_rest(x[:, :64], of._replace(tokens=64)) is None


@pytest.mark.parametrize("paired", [0, 1000], ids=["pairs", "alone"])
@pytest.mark.parametrize(
    "N, E, K, indices",
    [
        (127, 2, 1, [[1], [1], [1]]),  # 189 packed rows: tiles that are full, and one that is not
        (95, 3, 2, [[0, 1], [1, 0], [2, 1], [1, 2]]),  # tiles that end among the rows of the next expert
        (150, 3, 3, [[2, 0, 1], [0, 1, 2]]),  # an even number of blocks
    ],
)
def test_packed_rows(N, E, K, indices, paired, monkeypatch):
    monkeypatch.setattr(aligned, "PAIRED", paired)
    case = make(len(indices), N, 16, 40, E, K, DTYPES[0], torch.tensor(indices))
    got = check(*case)
    if not paired:
        for a, b in zip(got, run(*case), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("paired", [0, 1000], ids=["pairs", "alone"])
def test_nan_stays_in_its_row(paired, monkeypatch):
    monkeypatch.setattr(aligned, "PAIRED", paired)
    x, grad_out, gates, indices, weights = make(4, 67, 16, 24, 4, 2, DTYPES[0])
    indices[:] = torch.tensor([[0, 1], [1, 0], [2, 3], [3, 2]])
    clean = run(x, grad_out, gates, indices, weights)
    x[0, 1], grad_out[2, 2] = float("nan"), float("nan")
    got = run(x, grad_out, gates, indices, weights)
    assert got[0][0, 1].isnan().all() and got[1][2, 2].isnan().all()
    for tensor, (image, token) in zip((0, 1), ((0, 1), (2, 2)), strict=True):
        others = torch.ones(4, 67, dtype=torch.bool)
        others[image, token] = False
        # The gradient of a NaN row of x is NaN too.
        others[0, 1] = False
        assert torch.equal(got[tensor][others], clean[tensor][others])


def test_nan_stays_with_its_experts():
    x, grad_out, gates, indices, weights = make(4, 67, 16, 24, 4, 2, DTYPES[0])
    indices[:] = torch.tensor([[0, 1], [1, 0], [2, 3], [3, 2]])
    clean = run(x, grad_out, gates, indices, weights)
    # Of the experts 2 and 3; the last tile of expert 1 reaches into the packed rows of expert 2.
    grad_out[2, 2] = float("nan")
    for a, b in zip(run(x, grad_out, gates, indices, weights)[3:], clean[3:], strict=True):
        assert torch.equal(a[:2], b[:2]) and a[2:].isnan().any()


@pytest.mark.parametrize("E", [3, 17], ids=["one_sum", "by_slot"])
def test_nothing_is_gathered_but_by_the_weight_gradients(E, monkeypatch):
    def launched(*_):
        raise AssertionError("a row was gathered")

    for name in ("fc1", "to_slots", "hidden_grad"):
        monkeypatch.setattr(gather, name, launched)
    check(*make(3, 65, 16, 24, E, 2, DTYPES[0]), tiling=tiles())
