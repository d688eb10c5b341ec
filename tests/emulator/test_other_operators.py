"""`route`, `align_loss` and `group_ema_` of Triton, compiled for sm_80 and sm_90a, against the specification."""

import pytest
import torch
from shipped_cases import adamw_ema_case, align_loss_case, check, group_ema_case, route_case


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


ARCHITECTURES = (80, slow(90))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "R, D, E, K, dtype",
    [
        (5, 40, 3, 2, torch.bfloat16),
        (70, 24, 8, 2, torch.float32),
        slow(130, 72, 20, 3, torch.float16),
        slow(40, 72, 33, 2, torch.bfloat16),
        slow(40, 72, 128, 2, torch.float32),
        slow(1, 8, 1, 1, torch.float32),
    ],
)
def test_route(shipped, arch, R, D, E, K, dtype):
    check(shipped, route_case(shipped, R, D, E, K, dtype), shipped.emulated(arch))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_route_in_two_launches(shipped, arch):
    check(shipped, route_case(shipped, 200, 16, 4, 2, torch.float32, one_launch=100), shipped.emulated(arch))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["kd", "cosine", "mse"])
@pytest.mark.parametrize(
    "R, D, dtype", [(7, 40, torch.bfloat16), slow(9, 1100, torch.float32), slow(5, 33, torch.float16)]
)
def test_align_loss(shipped, arch, kind, R, D, dtype):
    check(shipped, align_loss_case(shipped, R, D, kind, dtype), shipped.emulated(arch))


@pytest.mark.parametrize(
    "R, D, kind, dtype, scale", [slow(4104, 2, "mse", torch.float32, 3), (7, 40, "kd", torch.float16, 60)]
)
def test_align_loss_of_many_rows_and_of_large_numbers(shipped, R, D, kind, dtype, scale):
    check(shipped, align_loss_case(shipped, R, D, kind, dtype, scale), shipped.emulated(80))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("momentum", [0.9, torch.tensor(0.75)], ids=["number", "tensor"])
def test_group_ema(shipped, arch, momentum):
    check(shipped, group_ema_case(shipped, momentum), shipped.emulated(arch))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_group_ema_of_directors_that_are_not_aligned(shipped, arch):
    check(shipped, group_ema_case(shipped, 0.9, offset=1), shipped.emulated(arch))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "options",
    [{}, slow({"copies": torch.float16, "clip": 0.5}), slow({"copies": None, "with_skip": False}), {"offset": 1}],
)
def test_adamw_ema(shipped, arch, options):
    check(shipped, adamw_ema_case(shipped, torch.tensor(0.75), **options), shipped.emulated(arch))


def test_group_ema_that_is_skipped(shipped):
    directors, stacks, weights = [torch.randn(70)], [torch.randn(2, 70)], [torch.rand(2)]
    before = directors[0].clone()
    with shipped.emulated(80, extra=(*directors, *stacks)) as emulator:
        shipped.group_ema.group_ema_(directors, stacks, weights, 0.5, torch.tensor(True))
    assert torch.equal(directors[0], before) and len(emulator.ran) == 1


@pytest.mark.slow
def test_every_barrier_of_route_is_needed_or_changes_nothing(shipped):
    """Of 31 barriers three are redundant in what Triton 3.6 compiles: the others' absence is a race that is named."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(70, 24, generator=generator), torch.randn(8, 24, generator=generator)

    def forward(change):
        with shipped.emulated(80, change=change):
            return shipped.route.forward(x, weight, 2, 0.5, None)

    texts = []
    want = forward(lambda name, ptx: texts.append(ptx) or ptx)
    lines = texts[0].split("\n")
    barriers = [i for i, line in enumerate(lines) if line.strip().startswith("bar.sync")]
    redundant = 0
    for i in barriers:
        try:
            got = forward(lambda name, ptx, i=i: "\n".join(lines[:i] + lines[i + 1 :]))
        except shipped.PTXError as error:
            assert "race on" in str(error)
        else:
            redundant += 1
            assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    assert redundant <= 3 < len(barriers)
