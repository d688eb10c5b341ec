"""Weight gradients of experts with many slots, cut into chunks: the arithmetic, and the gradients of both paths."""

import heapq

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")

import triton.language as tl  # noqa: E402

from dexkernels.ops.grouped_mlp.triton import chunks, configurations, weight_grad_kernels  # noqa: E402
from dexkernels.ops.triton_common import experts_block  # noqa: E402

from . import aligned_cases, mlp_cases  # noqa: E402
from .aligned_cases import DTYPES  # noqa: E402
from .mlp_cases import make  # noqa: E402

ON_CUDA = torch.get_default_device().type == "cuda"

if not ON_CUDA:
    from triton.runtime.interpreter import InterpretedFunction

    @InterpretedFunction
    def probe(offsets, out, num_experts, most, EXPERTS: tl.constexpr):
        number = tl.program_id(0)
        expert, first, end, part = weight_grad_kernels.find_chunk(offsets, number, num_experts, most, EXPERTS)
        tl.store(out + 4 * number, expert)
        tl.store(out + 4 * number + 1, first)
        tl.store(out + 4 * number + 2, end)
        tl.store(out + 4 * number + 3, part)


@pytest.mark.skipif(ON_CUDA, reason="its probe is an interpreted function")
@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=18), st.integers(1, 25))
def test_chunks_cover_every_slot_once(sizes, most):
    E, S = len(sizes), sum(sizes)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    wanted, part = [], 0
    for e, size in enumerate(sizes):
        count = max(-(-size // most), 1)
        length = -(-size // count)
        for c in range(count):
            first = offsets[e].item() + c * length
            end = min(first + length, offsets[e + 1].item())
            wanted.append([e, first, end, part if count > 1 else -1])
            part += count > 1
    length = {e: max(w[2] - w[1] for w in wanted if w[0] == e) for e in range(E)}
    wanted.sort(key=lambda w: -length[w[0]])
    # What the host allows for without knowing the sizes.
    experts_cut = sum(size > most for size in sizes)
    assert len(wanted) <= E + S // most and experts_cut <= S // (most + 1)
    assert part <= S // most + S // (most + 1)
    grid = E + S // most
    out = torch.zeros(grid, 4, dtype=torch.int64)
    probe[(grid,)](offsets, out, E, most, experts_block(E))
    assert out[: len(wanted)].tolist() == wanted
    assert (out[len(wanted) :, 0] == E).all()


def paths():
    return [("gather", mlp_cases.tiles(), 9), ("aligned", aligned_cases.tiles(), 66)]


@pytest.mark.parametrize("path, tiling, N", paths(), ids=["gather", "aligned"])
@pytest.mark.parametrize(
    "E, K, indices",
    [
        (6, 2, [[3, 1]] * 5),
        (4, 1, [[2]] * 5),
        (3, 2, [[1, 0], [1, 2], [1, 0], [0, 1], [2, 1]]),
    ],
    ids=["two", "one", "uneven"],
)
def test_gradients(E, K, indices, path, tiling, N, monkeypatch):
    monkeypatch.setattr(chunks, "most_slots", lambda *_: 2)
    monkeypatch.setattr(chunks, "CUT", 32)
    monkeypatch.setattr(chunks, "PROGRAMS", 5)
    added = watch(monkeypatch)
    case = make(len(indices), N, 16, 24, E, K, DTYPES[0], torch.tensor(indices))
    got = mlp_cases.check(*case, path=path, tiling=tiling)
    assert len(added) == 2
    unused = sorted(set(range(E)) - set(case[3].flatten().tolist()))
    for grad in got[3:]:
        assert torch.equal(grad[unused], torch.zeros_like(grad[unused]))
    for a, b in zip(got, mlp_cases.run(*case, path=path, tiling=tiling), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("path, tiling, N", paths(), ids=["gather", "aligned"])
def test_half_precision_is_rounded_once(path, tiling, N, monkeypatch):
    case = make(6, N, 16, 24, 2, 1, torch.float16, torch.tensor([[0]] * 6))
    whole = mlp_cases.run(*case, path=path, tiling=tiling)
    monkeypatch.setattr(chunks, "most_slots", lambda *_: 1)
    cut = mlp_cases.check(*case, path=path, tiling=tiling)
    # Sums in another order, in float32: they differ where they lie between two numbers of half precision.
    for a, b in zip(whole, cut, strict=True):
        assert (a != b).float().mean() < 0.02


def watch(monkeypatch):
    added = []
    kernel = weight_grad_kernels.sum_chunks_kernel

    class Watched:
        def __getitem__(self, grid):
            added.append(grid)
            return kernel[grid]

    monkeypatch.setattr(weight_grad_kernels, "sum_chunks_kernel", Watched())
    return added


def test_a_single_expert_is_never_cut(monkeypatch):
    added = watch(monkeypatch)
    mlp_cases.check(*make(5, 7, 8, 8, 1, 1, DTYPES[0]))
    assert not added


def waves(sizes, most, tiles):
    """Share of full waves: work over what the busiest of the processors has, chunks given out in their order."""
    lengths = []
    for size in sizes:
        count = max(-(-size // most), 1)
        lengths += [-(-size // count)] * count * tiles
    busy = [0] * chunks.PROGRAMS
    for length in sorted(lengths, reverse=True):
        heapq.heapreplace(busy, busy[0] + length)
    return sum(sizes) * tiles / chunks.PROGRAMS / max(busy)


def test_hot_experts_fill_the_waves():
    tile = configurations.TILES["weight_grad_blocks", "half", 90]
    tiles = -(-768 // tile.rows) * -(-3072 // tile.cols)
    most = chunks.most_slots(448, 8, tiles)
    two_hot, one_hot, uniform = [224, 224] + [0] * 6, [224] + [32] * 7, [56] * 8
    assert most > 1.4 * 56, "uniform routing is not cut"
    assert waves(two_hot, 448, tiles) < 0.6 < 0.75 < waves(two_hot, most, tiles)
    assert waves(one_hot, most, tiles) > waves(uniform, most, tiles) / 1.15
