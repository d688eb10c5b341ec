"""The kernels of csrc/, as nvcc compiles them for sm_80 and sm_90a, on the emulator."""

import pytest
import torch
from cuda_library import LARGE, TARGETS, Captured, compiled, launch, make, nvcc, want
from ptx_emulator.ptx import PTXError


@pytest.fixture(scope="module", params=TARGETS.values())
def ptx(request, tmp_path_factory) -> str:
    compiler = nvcc()
    if compiler is None:
        pytest.skip("there is no nvcc")
    return compiled(compiler, request.param, tmp_path_factory.mktemp("ptx"))


def check(groups, expected):
    for i, (got, exact) in enumerate(zip(groups.directors, expected, strict=True)):
        assert torch.equal(got, exact), f"director {i}"


SHAPES = [(5, 3), (4100,), (1,), (64, 8), (2048,)]


@pytest.mark.parametrize("momentum", [0.999, torch.tensor(0.75), torch.tensor(0.75, dtype=torch.float64)], ids=str)
def test_results_are_the_promised_bits(ptx, momentum):
    groups = make(SHAPES)
    groups.weights[1][1], groups.experts[1][1] = 0, float("nan")  # not read
    groups.weights[3].zero_()  # nothing is written
    shadows = [torch.full(d.shape, -1.0, dtype=torch.bfloat16) for d in groups.directors]
    exact = want(groups, float(momentum))
    launch(ptx, groups._replace(shadows=shadows), momentum)
    check(groups, exact)
    for i, (got, shadow) in enumerate(zip(groups.directors, shadows, strict=True)):
        assert torch.equal(shadow, torch.full_like(shadow, -1) if i == 3 else got.bfloat16())


def test_addresses_that_are_not_aligned(ptx):
    groups = make([(70,), (4100,)])
    odd = groups._replace(directors=[torch.empty(d.numel() + 1)[1:].copy_(d) for d in groups.directors])
    exact = want(groups, 0.9)
    launch(ptx, odd, 0.9, seed=1)
    check(odd, exact)


@pytest.mark.parametrize("skip", [True, False])
def test_skip_is_read_where_it_lies(ptx, skip):
    groups = make([(70,)])
    expected = [groups.directors[0].clone()] if skip else want(groups, 0.9)
    launch(ptx, groups, 0.9, skip=torch.tensor(skip))
    check(groups, expected)


def test_a_captured_launch_reads_its_scalars_anew(ptx):
    """The table is in the parameters, which a graph keeps; momentum and skip are on the device."""
    groups, momentum, skip = make(SHAPES[:2]), torch.tensor(0.75), torch.tensor(False)
    captured = Captured(ptx, groups, momentum, skip=skip)
    for m, skipped in ((0.75, False), (0.5, False), (0.25, True)):
        momentum.fill_(m)
        skip.fill_(skipped)
        expected = [d.clone() for d in groups.directors] if skipped else want(groups, m)
        captured.run()
        check(groups, expected)


@pytest.mark.slow
def test_the_large_table(ptx):
    groups = make([(9,)] * 200)
    exact = want(groups, 0.9)
    launch(ptx, groups, 0.9, capacity=LARGE, blocks=64)
    check(groups, exact)


def test_an_entry_that_says_more_than_there_is(ptx):
    with pytest.raises(PTXError, match="outside of every allocation: .* past the end of director 0"):
        launch(ptx, make([(70,)]), 0.9, hidden=4)
