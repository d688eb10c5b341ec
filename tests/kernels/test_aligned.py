"""The aligned path of the grouped MLP against a loop over images in float64, in the interpreter, and its arithmetic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")

import triton.language as tl  # noqa: E402

from dexkernels.ops import triton_common  # noqa: E402
from dexkernels.ops.grouped_mlp import triton as grouped_mlp  # noqa: E402
from dexkernels.ops.grouped_mlp.triton import (  # noqa: E402
    aligned,
    aligned_kernels,
    configurations,
    gather,
    plan,
    to_images_kernels,
    to_slots_kernels,
)
from dexkernels.records import MLPWeights  # noqa: E402

from .aligned_cases import DTYPES, ON_CUDA, both_dtypes, check, run, tiles  # noqa: E402
from .mlp_cases import make, slots_of, sort  # noqa: E402

pytestmark = pytest.mark.skipif(
    ON_CUDA and not plan.has_tma(torch.get_default_device()), reason="the path needs compute capability 9 to 11"
)


@both_dtypes
@pytest.mark.parametrize("N", [64, 65, 130, 197, 257])
def test_numbers_of_tokens(N, dtype):
    B, E, K = (7, 3, 2) if N < 100 else (3, 2, 1 + N % 2)
    check(*make(B, N, 24, 40, E, K, dtype, seed=N), tiling=tiles(*((32, 16, 32) if N % 2 else (16, 32, 16))))


@pytest.mark.parametrize("D, H", [(8, 8), (16, 72), (72, 24)])
def test_widths_that_are_no_multiples_of_a_tile(D, H):
    check(*make(3, 66, D, H, 3, 2, torch.float16))


@pytest.mark.parametrize(
    "B, E, K, indices",
    [
        (6, 5, 2, [[3, 1]] * 6),
        (5, 4, 1, [[2]] * 5),
        (3, 3, 3, [[0, 1, 2], [2, 1, 0], [1, 0, 2]]),
        (1, 8, 2, [[7, 0]]),
        (1, 1, 1, [[0]]),
        (5, 20, 2, [[0, 19], [19, 4], [4, 5], [0, 4], [18, 19]]),
        (4, 3, 2, [[1, 0], [1, 0], [1, 2], [0, 1]]),
    ],
    ids=["empty", "one_expert", "K=E", "one_image", "E=1", "E=20", "odd"],
)
def test_routings(B, E, K, indices):
    assert (E > plan.ONE_SUM) == (E == 20), "both ways of combining an image's choices"
    case = make(B, 66, 16, 40, E, K, DTYPES[0], torch.tensor(indices))
    got = check(*case)
    unused = sorted(set(range(E)) - set(case[3].flatten().tolist()))
    for grad in got[3:]:
        assert torch.equal(grad[unused], torch.zeros_like(grad[unused]))


@pytest.mark.parametrize("layout", ["rows", "all"])
@both_dtypes
def test_strides(layout, dtype, layouts):
    check(*make(3, 65, 16, 24, 3, 2, dtype), layout=layouts[layout])


def test_rows_of_16_bytes_in_a_larger_tensor_are_not_copied():
    wide = torch.zeros(3, 70, 32, dtype=torch.float16)
    assert aligned.tma_ready(wide[:, 2:, 8:24]).data_ptr() == wide.data_ptr() + 2 * (2 * 32 + 8)
    shifted = torch.zeros(3 * 70 * 32 + 4, dtype=torch.float16)[4:].view(3, 70, 32)
    for t in (shifted, wide[..., ::2], wide.mT, wide[:1].expand(3, 70, 32)):
        ready = aligned.tma_ready(t)
        assert ready.data_ptr() != t.data_ptr() and ready.is_contiguous() and torch.equal(ready, t)
    narrow = torch.zeros(1, 4, 16, dtype=torch.float16).as_strided((1, 4, 16), (3, 16, 1))
    assert aligned.tma_ready(narrow).stride() == (64, 16, 1)


def test_a_gradient_that_is_expanded():
    x, _, gates, indices, weights = make(3, 65, 16, 24, 3, 2, DTYPES[0])
    check(x, torch.tensor(0.5, dtype=DTYPES[0]).expand(3, 65, 16), gates, indices, weights)


def test_part_of_a_larger_tensor():
    # x is read where it lies, between NaN.
    x, grad_out, gates, indices, weights = make(3, 65, 16, 24, 3, 2, torch.float16)
    parts = [torch.full((3, 70, 48), float("nan"), dtype=torch.float16)[:, 2:67, 16:32].copy_(t) for t in (x, grad_out)]
    check(*parts, gates, indices, weights)


def test_images_far_apart():
    # 3 images 2^30 elements apart: offsets pass 2^31. The pages between are never touched.
    x, grad_out, gates, indices, weights = make(4, 65, 16, 16, 2, 1, torch.float16)
    far = []
    for t in (x, grad_out):
        storage = torch.UntypedStorage(2 * (3 * 2**30 + 2048))
        view = torch.tensor([], dtype=t.dtype).set_(storage, 0, t.shape, (2**30, 16, 1))
        far.append(view.copy_(t))
    check(*far, gates, indices, weights)


@pytest.mark.parametrize("E", [3, 17], ids=["one_sum", "by_slot"])
def test_zero_gates_and_only_what_is_needed(E):
    x, grad_out, gates, indices, weights = make(3, 65, 16, 24, E, 2, DTYPES[0])
    gates[:, 1] = 0
    full = check(x, grad_out, gates, indices, weights)
    for needs in [(True, False, False), (False, True, False), (False, False, True), (False, False, False)]:
        got = run(x, grad_out, gates, indices, weights, needs=needs)
        wanted = [True, *needs[:2], *[needs[2]] * 4]
        for g, f, w in zip(got, full, wanted, strict=True):
            assert torch.equal(g, f) if w else g is None


@pytest.mark.parametrize("token", [0, 3], ids=["gathered", "block"])
def test_nan_stays_in_its_image(token):
    x, grad_out, gates, indices, weights = make(5, 66, 16, 24, 4, 2, DTYPES[0])
    indices[:] = torch.tensor([[0, 1], [1, 0], [2, 3], [3, 2], [2, 3]])
    clean = run(x, grad_out, gates, indices, weights)
    gates[1], x[0, token] = float("nan"), float("nan")
    got = run(x, grad_out, gates, indices, weights)
    assert got[0][1].isnan().all() and got[0][0, token].isnan().all() and got[1][1].isnan().all()
    others = [n for n in range(66) if n != token]
    for a, b in zip(got[:3], clean[:3], strict=True):
        assert torch.equal(a[2:], b[2:])
    assert torch.equal(got[0][0, others], clean[0][0, others])
    for a, b in zip(got[3:], clean[3:], strict=True):
        assert torch.equal(a[2:], b[2:]) and a[:2].isnan().any()


@pytest.mark.parametrize("E", [3, 17], ids=["one_sum", "by_slot"])
@pytest.mark.parametrize("path", ["gather", "aligned"])
def test_evaluation_saves_nothing_and_computes_the_same(path, E):
    x, _, gates, indices, weights = make(3, 66, 16, 24, E, 2, DTYPES[0])
    (out, z, _), (evaluated, nothing, _) = (
        grouped_mlp.forward(x, slots_of(gates, indices, E), MLPWeights(*weights), save, path=path, tiles=tiles())
        for save in (True, False)
    )
    assert torch.equal(out, evaluated) and nothing.shape == (0, 66, 24)
    assert z.shape == (6, 66, 24) and z.isfinite().all()


def test_no_images():
    x, grad_out, gates, indices, weights = make(2, 64, 16, 24, 2, 1, torch.float16)
    got = run(x[:0], grad_out[:0], gates[:0], indices[:0], weights)
    assert got[0].shape == got[1].shape == (0, 64, 16) and got[2].shape == (0, 1)
    for g, w in zip(got[3:], weights, strict=True):
        assert torch.equal(g, torch.zeros_like(w))


@pytest.mark.parametrize("E", [3, 17], ids=["one_sum", "by_slot"])
def test_repeats_are_bit_equal(E):
    case = make(4, 66, 16, 24, E, 2, torch.float16)
    for a, b in zip(run(*case), run(*case), strict=True):
        assert torch.equal(a, b)


def choose(path=None, tokens=65, dim=768, hidden=3072, dtype=torch.bfloat16, arch=90, tma=True):
    preferred = configurations.path_of("many", triton_common.precision(dtype), arch)
    return plan.choose_path(path, preferred, tokens, dim, hidden, dtype, tma)


def test_the_aligned_path_is_taken_where_it_applies(monkeypatch):
    monkeypatch.setitem(configurations.PATH, (90, "half"), "aligned")
    taken = [{}, {"tokens": 64}, {"dim": 8}, {"hidden": 8}, {"dtype": torch.float16}, {"path": "aligned"}]
    left = [{"tokens": 63}, {"tokens": 1}, {"dim": 12}, {"hidden": 4}, {"tma": False}]
    others = [{"arch": 80}, {"dtype": torch.float32}, {"path": "gather"}]
    assert {choose(**call) for call in taken} == {"aligned"}
    assert {choose(**call) for call in left + others} == {"gather"}
    for call, why in zip(left, ["64 tokens", "64 tokens", "D = 12", "H = 4", "capability 9 to 11"], strict=True):
        with pytest.raises(ValueError, match=f"^path: 'aligned' cannot be taken: .*{why}"):
            choose("aligned", **call)
    assert choose("aligned", dim=12, dtype=torch.float32) == "aligned"
    with pytest.raises(ValueError, match="^path: expected 'gather', 'aligned' or None, got 'best'"):
        choose("best")


def test_float32_has_no_tiles_that_ship():
    with pytest.raises(ValueError, match="^path: 'aligned' cannot be taken: it has no tiles for torch.float32"):
        run(*make(1, 64, 8, 8, 1, 1, torch.float32), tiling=configurations.TILES)


def test_what_is_not_measured_must_be_asked_for():
    assert set(configurations.PATH.values()) == {"gather"}
    assert choose() == "gather" and choose("aligned") == "aligned"


def test_the_launchers_take_the_path(monkeypatch):
    launched = []
    for module, names in (
        (aligned_kernels, ("fc1_blocks_kernel", "hidden_grad_blocks_kernel")),
        (to_images_kernels, ("to_images_kernel",)),
        (to_slots_kernels, ("to_slots_blocks_kernel",)),
        (gather, ("fc1_kernel", "to_hidden_grad_kernel", "to_slots_kernel")),
    ):
        for name in names:
            kernel = getattr(module, name)

            class Watched:
                def __getitem__(self, grid, kernel=kernel, name=name):
                    launched.append(name)
                    return kernel[grid]

            monkeypatch.setattr(module, name, Watched())
    for K, path, wanted in [
        (2, "aligned", {"fc1_blocks_kernel", "hidden_grad_blocks_kernel", "to_images_kernel"}),
        (1, "aligned", {"fc1_blocks_kernel", "hidden_grad_blocks_kernel", "to_slots_blocks_kernel"}),
        (2, "gather", {"fc1_kernel", "to_hidden_grad_kernel", "to_slots_kernel"}),
        (2, None, {"fc1_kernel", "to_hidden_grad_kernel", "to_slots_kernel"}),
    ]:
        launched.clear()
        run(*make(1, 64, 8, 8, 2, K, torch.float16), path=path)
        assert set(launched) == wanted


if not ON_CUDA:
    from triton.runtime.interpreter import InterpretedFunction

    @InterpretedFunction
    def probe_blocks(slot_order, offsets, out, num_experts, blocks, first_token, top_k, EXPERTS: tl.constexpr):
        tile = tl.program_id(0)
        expert, first, stop = triton_common.find_tile(offsets, tile, num_experts, blocks, 2, EXPERTS)
        for i in range(2):
            block = first + i
            if block < stop:
                image, token = aligned_kernels.locate_block(slot_order, block, blocks, first_token, top_k)
                tl.store(out + 3 * block, expert)
                tl.store(out + 3 * block + 1, image)
                tl.store(out + 3 * block + 2, token)


@pytest.mark.skipif(ON_CUDA, reason="its probe is an interpreted function")
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 300), st.randoms(use_true_random=False))
def test_blocks_cover_every_token_but_the_first(B, E, tokens, random):
    K, blocks, rest = random.randint(1, E), tokens // 64 + 1, tokens % 64
    indices = torch.tensor([random.sample(range(E), K) for _ in range(B)])
    order, offsets = sort(indices, E)
    out = torch.full((B * K * blocks, 3), -1, dtype=torch.int64)
    grid = triton_common.max_tiles(B * K * blocks, E, 2)
    probe_blocks[(grid,)](order, offsets, out, E, blocks, rest, K, triton_common.experts_block(E))
    wanted = [
        [indices.flatten()[slot].item(), slot // K, rest + 64 * j] for slot in order.tolist() for j in range(blocks)
    ]
    assert out.tolist() == wanted


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 70), st.integers(1, 5), st.randoms(use_true_random=False))
def test_slots_are_inverted(B, E, random):
    K = random.randint(1, E)
    indices = torch.tensor([random.sample(range(E), K) for _ in range(B)])
    slots = slots_of(torch.ones(B, K), indices, E)
    position, expert = aligned.invert_slots(slots)
    assert slots.slot_order[position.long()].tolist() == list(range(B * K))
    assert expert.tolist() == indices.flatten().tolist()
