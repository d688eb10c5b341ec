"""The arithmetic from tile to expert to rows: the functions that the kernels call, alone, in the interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")

import triton.language as tl  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

from dexkernels.ops import triton_common as common  # noqa: E402


@InterpretedFunction
def probe(offsets, out, num_experts, tokens, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    tile = tl.program_id(0)
    expert, first, stop = common.find_tile(offsets, tile, num_experts, tokens, ROWS, EXPERTS)
    tl.store(out + 3 * tile, expert)
    tl.store(out + 3 * tile + 1, first)
    tl.store(out + 3 * tile + 2, stop)


@InterpretedFunction
def probe_experts(offsets, out, num_experts, tokens, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    expert = tl.program_id(0)
    first, end = common.expert_tiles(offsets, expert, num_experts, tokens, ROWS, EXPERTS)
    tl.store(out + 2 * expert, first)
    tl.store(out + 2 * expert + 1, end)


@InterpretedFunction
def probe_groups(out, num_cols, GROUP: tl.constexpr):
    tile, col = common.cut_in_groups(tl.program_id(0), num_cols, GROUP)
    tl.store(out + 2 * tl.program_id(0), tile)
    tl.store(out + 2 * tl.program_id(0) + 1, col)


@InterpretedFunction
def probe_position(offsets, out, num_experts, EXPERTS: tl.constexpr):
    position = tl.program_id(0)
    tl.store(out + position, common.find_expert(offsets, position, num_experts, EXPERTS))


sizes = st.lists(st.integers(0, 9), min_size=1, max_size=20)


@settings(max_examples=15, deadline=None)
@given(sizes, st.integers(1, 40), st.sampled_from([16, 64]))
def test_tiles_cover_every_row_once(sizes, tokens, rows):
    E, S = len(sizes), sum(sizes)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    wanted, tile_of_expert = [], []
    for e in range(E):
        start, stop = offsets[e].item() * tokens, offsets[e + 1].item() * tokens
        tile_of_expert.append([len(wanted), len(wanted) + -(-(stop - start) // rows)])
        wanted += [[e, first, stop] for first in range(start, stop, rows)]
    grid = common.max_tiles(S * tokens, E, rows)
    assert len(wanted) <= grid
    if grid:
        out = torch.zeros(grid, 3, dtype=torch.int64)
        probe[(grid,)](offsets, out, E, tokens, rows, common.experts_block(E))
        assert out[: len(wanted)].tolist() == wanted
        assert (out[len(wanted) :, 1] >= out[len(wanted) :, 2]).all()
    out = torch.zeros(E, 2, dtype=torch.int64)
    probe_experts[(E,)](offsets, out, E, tokens, rows, common.experts_block(E))
    assert out.tolist() == tile_of_expert


@settings(max_examples=20, deadline=None)
@given(sizes.filter(any))
def test_positions_find_their_expert(sizes):
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    out = torch.zeros(sum(sizes), dtype=torch.int64)
    probe_position[(sum(sizes),)](offsets, out, len(sizes), common.experts_block(len(sizes)))
    assert out.tolist() == [e for e, n in enumerate(sizes) for _ in range(n)]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 30), st.integers(1, 7))
def test_groups_visit_every_block_once(num_tiles, num_cols):
    out = torch.zeros(num_tiles * num_cols, 2, dtype=torch.int64)
    probe_groups[(num_tiles * num_cols,)](out, num_cols, 8)
    assert sorted(out.tolist()) == [[t, c] for t in range(num_tiles) for c in range(num_cols)]
    # Eight row tiles before the next column: that is the use of it.
    assert out[: min(8, num_tiles), 1].eq(0).all()
    assert sorted(out[: min(8, num_tiles), 0].tolist()) == list(range(min(8, num_tiles)))


@pytest.mark.parametrize(
    "capability, row", [((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 3), 90), ((12, 0), 80), ((12, 1), 80)]
)
def test_tiles_fit_the_shared_memory_of_the_architecture(capability, row, monkeypatch):
    from dexkernels.ops.grouped_mlp.triton import plan

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    device = torch.device("cuda")
    assert common.architecture(device) == row and plan.has_tma(device) == (row == 90)


def test_tables_have_both_architectures_and_both_precisions():
    from dexkernels.ops.grouped_mlp.triton.configurations import ALIGNED, GATHER, PATH

    both = {(p, a) for p in ("half", "float") for a in (80, 90)}
    assert set(GATHER) == {(name, *pa) for name in {name for name, _, _ in GATHER} for pa in both}
    assert {key[1:] for key in ALIGNED} == {("half", 90)}
    assert set(PATH) == {(a, p) for p, a in both}
    assert common.precision(torch.float32) == "float"
    assert common.precision(torch.float16) == common.precision(torch.bfloat16) == "half"
