"""`grouped_mlp` compiled for sm_80 and sm_90a, on the emulator, against the specification."""

import pytest
import torch
from shipped_cases import check, mlp_case, slots_case, small_tiles

HALF = (torch.bfloat16, torch.float16)


def slow(*values, **kwargs):
    return pytest.param(*values, marks=pytest.mark.slow, **kwargs)


SMALL, BLOCKS = (2, 5, 40, 72, 3, 2), (2, 65, 128, 256, 3, 2)

FIRST = (80, torch.bfloat16)
THE_OTHERS = [slow(80, dtype) for dtype in (torch.float16, torch.float32)]
THE_OTHERS += [slow(90, dtype) for dtype in (*HALF, torch.float32)]


@pytest.mark.parametrize("arch, dtype", [FIRST, *THE_OTHERS])
def test_small_blocks_of_the_gather_path(shipped, arch, dtype):
    check(shipped, mlp_case(shipped, SMALL, dtype, "gather", small_tiles(shipped)), shipped.emulated(arch))


@pytest.mark.parametrize("arch, dtype", [FIRST, *THE_OTHERS])
def test_shipped_blocks_of_the_gather_path(shipped, arch, dtype):
    check(shipped, mlp_case(shipped, BLOCKS, dtype, "gather"), shipped.emulated(arch))


@pytest.mark.parametrize(
    "arch, path, sizes",
    [(80, "gather", SMALL), slow(90, "gather", SMALL), slow(90, "aligned", (3, 64, 64, 96, 3, 2))],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float16)], ids=str)
def test_tanh_gelu(shipped, arch, path, sizes, dtype):
    case = mlp_case(shipped, sizes, dtype, path, small_tiles(shipped), activation="gelu_tanh", with_director=True)
    check(shipped, case, shipped.emulated(arch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float16)], ids=str)
def test_aligned_path(shipped, dtype):
    check(shipped, mlp_case(shipped, BLOCKS, dtype, "aligned"), shipped.emulated(90))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((8, 65, 64, 72, 2, 2), id="pairs"),
        pytest.param((2, 130, 64, 96, 3, 2), id="an even number of blocks"),
        pytest.param((3, 64, 64, 96, 3, 2), id="no token left over"),
        pytest.param((3, 66, 64, 96, 20, 2), id="results by slot"),
        pytest.param((3, 65, 64, 96, 20, 1), id="results by slot are those of the images"),
        pytest.param((1, 64, 8, 8, 1, 1), id="one of everything"),
    ],
)
def test_forms_of_the_aligned_path(shipped, sizes, dtype):
    check(shipped, mlp_case(shipped, sizes, dtype, "aligned"), shipped.emulated(90))


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch, path, sizes",
    [
        pytest.param(80, "gather", (1, 230, 336, 336, 1, 1), id="gather"),
        pytest.param(90, "gather", (1, 500, 392, 392, 1, 1), id="gather, wgmma"),
        pytest.param(90, "aligned", (2, 65, 392, 72, 1, 1), id="fc1, and back"),
        pytest.param(90, "aligned", (2, 65, 72, 200, 2, 2), id="to images"),
        pytest.param(90, "aligned", (2, 65, 72, 392, 1, 1), id="by slot"),
        pytest.param(90, "aligned", (1, 449, 64, 72, 1, 1), id="weight gradients"),
    ],
)
def test_sums_longer_than_their_pipelines(shipped, arch, path, sizes):
    """Every stage is filled again, and every parity turns."""
    check(shipped, mlp_case(shipped, sizes, torch.bfloat16, path), shipped.emulated(arch))


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((1, 65, 264, 264, 1, 1), id="two blocks of columns"),
        pytest.param((2, 193, 64, 72, 3, 2), id="three blocks of tokens"),
        pytest.param((3, 130, 64, 72, 20, 2), id="two, by slot"),
        pytest.param((4, 228, 64, 72, 2, 2), id="three, in pairs"),
        pytest.param((13, 65, 64, 72, 3, 2), id="pairs of several sets"),
    ],
)
def test_tiles_of_the_aligned_path(shipped, sizes):
    check(shipped, mlp_case(shipped, sizes, torch.bfloat16, "aligned"), shipped.emulated(90))


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch, path, sizes", [(80, "gather", (12, 5, 40, 72, 8, 1)), (90, "aligned", (8, 65, 64, 72, 4, 1))]
)
def test_weight_gradients_in_parts_of_unequal_length(shipped, arch, path, sizes):
    case = mlp_case(shipped, sizes, torch.bfloat16, path, small_tiles(shipped), skewed=True)
    check(shipped, case, shipped.emulated(arch))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 65, 64, 72, 3, 2), (3, 66, 64, 72, 20, 2)], ids=["to images", "by slot"])
def test_gates_and_biases_that_float16_does_not_have(shipped, sizes):
    case = mlp_case(shipped, sizes, torch.bfloat16, "aligned", scale_of_biases=2.0**17)
    check(shipped, case, shipped.emulated(90))


def test_slots_and_images_of_several_programs(shipped):
    check(shipped, slots_case(shipped), shipped.emulated(90))


@pytest.mark.slow
@pytest.mark.parametrize("arch, path, sizes", [(80, "gather", SMALL), (90, "gather", SMALL), (90, "aligned", BLOCKS)])
def test_a_director_as_one_more_expert(shipped, arch, path, sizes):
    check(shipped, mlp_case(shipped, sizes, torch.bfloat16, path, with_director=True), shipped.emulated(arch))


@pytest.mark.parametrize(
    "arch, path, sizes, orders",
    [
        (80, "gather", SMALL, 3),
        (90, "aligned", BLOCKS, 3),
        slow(80, "gather", SMALL, 20),
        slow(90, "aligned", (1, 65, 64, 64, 2, 1), 20),
        slow(90, "aligned", (8, 65, 64, 72, 2, 2), 3),
        slow(90, "aligned", (2, 130, 64, 96, 3, 2), 3),
    ],
)
def test_every_order_of_the_warps_gives_the_same_bits(shipped, arch, path, sizes, orders):
    case = mlp_case(shipped, sizes, torch.bfloat16, path, small_tiles(shipped))
    results = []
    for seed in range(orders):
        with shipped.emulated(arch, seed=seed) as emulator:
            results.append(case.compute(emulator))
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())
