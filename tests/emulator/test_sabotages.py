"""Shipped kernels that were spoilt on purpose: every change is seen, by a rule of the emulator or by float64.

Each was thought of as a fault that somebody could make, in the source or as a compiler: tests of what the emulator must
not let pass. The kernels as they are pass the same checks.
"""

import functools
import re
import shutil
import sys
from pathlib import Path

import cuda_library
import pytest
import torch
from cuda_sabotages import CUDA
from ptx_emulator.ptx import PTXError
from sabotages import AMPERE, EVERY, HOPPER, SOURCES
from shipped_cases import align_loss_case, check, group_ema_case, mlp_case, route_case, small_tiles


def mlp(arch, path, sizes, **options):
    return arch, lambda s: mlp_case(s, sizes, torch.bfloat16, path, **options)


CASES = {
    # Sums that are longer than their pipelines are deep: 7 steps of 4 stages, 8, 7 blocks, 11 steps.
    "aligned": mlp(90, "aligned", (2, 65, 392, 72, 1, 1)),
    "aligned, images": mlp(90, "aligned", (2, 65, 64, 200, 2, 2)),
    "aligned, pairs": mlp(90, "aligned", (13, 65, 64, 72, 3, 2)),
    "aligned, long": mlp(90, "aligned", (1, 449, 64, 72, 1, 1)),
    "aligned, wide": mlp(90, "aligned", (1, 65, 64, 264, 1, 1)),
    "gather": mlp(80, "gather", (1, 230, 80, 336, 1, 1)),
    "gather, small": (80, lambda s: mlp_case(s, (2, 5, 40, 72, 3, 2), torch.bfloat16, "gather", small_tiles(s))),
    "gather, cut": (
        80,
        lambda s: mlp_case(s, (9, 5, 40, 72, 8, 1), torch.bfloat16, "gather", small_tiles(s), skewed=True),
    ),
    "route": (80, lambda s: route_case(s, 70, 24, 8, 2, torch.float32)),
    "align_loss": (80, lambda s: align_loss_case(s, 7, 40, "kd", torch.bfloat16)),
    "group_ema": (80, lambda s: group_ema_case(s, 0.9)),
}


@pytest.fixture(scope="module")
def untouched(shipped):
    """The kernels as they are pass the check of a case, which is given back."""

    @functools.cache
    def sound(name):
        arch, make = CASES[name]
        case = make(shipped)
        case = case._replace(want=functools.cache(case.want))
        check(shipped, case, shipped.emulated(arch))
        return arch, case

    return sound


def spoilt(sabotages):
    return [pytest.param(s, id=s.name, marks=() if s.fast else pytest.mark.slow) for s in sabotages]


@pytest.mark.parametrize("sabotage", spoilt(HOPPER + AMPERE))
def test_spoilt_ptx_is_seen(shipped, untouched, sabotage):
    arch, case = untouched(sabotage.case)
    changed = []

    def change(kernel, ptx):
        after = spoil(sabotage, ptx) if kernel == sabotage.where else ptx
        changed.append(after != ptx)
        return after

    with pytest.raises((shipped.PTXError, AssertionError), match=sabotage.caught):
        check(shipped, case, shipped.emulated(arch, change=change))
    assert any(changed)


def spoil(sabotage, text):
    """The text as it is where it does not match: another form of the same kernel."""
    matches = list(re.finditer(sabotage.before, text))
    chosen = matches if sabotage.which is EVERY else matches[sabotage.which :][:1]
    for match in reversed(chosen):
        text = text[: match.start()] + match.expand(sabotage.after) + text[match.end() :]
    return text


@pytest.mark.parametrize("sabotage", spoilt(SOURCES))
def test_spoilt_sources_are_seen(shipped, untouched, sabotage, tmp_path):
    arch, case = untouched(sabotage.case)
    module = sys.modules["dexkernels.ops." + sabotage.where]
    with shipped.sabotaged(module, sabotage.before, sabotage.after, tmp_path):
        with pytest.raises((shipped.PTXError, AssertionError), match=sabotage.caught):
            check(shipped, case, shipped.emulated(arch))


# --- the barrier of route ---------------------------------------------------------------------------------------------

BARRIER = "        tl.debug_barrier()\n"
FIRST_SUM = """    mean = mean_probability(p, num_rows, num_experts, EXPERTS, ROWS)
    tl.store(balance, tl.sum(mean * mean, 0) * num_experts)
"""


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_the_barrier_of_route_orders_what_the_sums_behind_it_order_too(shipped, tmp_path, arch):
    """Deleted alone it changes nothing: warps meet in the sums over rows and experts before they read the choices.

    Where these sums are left out as well, the barrier alone orders the halves of the kernel, and its absence is seen.
    """
    module = sys.modules["dexkernels.ops.route.triton"]
    text = Path(module.__file__).read_text()
    assert text.count(BARRIER) == text.count(FIRST_SUM) == 1
    arguments = torch.randn(60, 24), torch.randn(8, 24), 2, 0.5, None  # one block of rows

    def forward(source):
        with shipped.with_source(module, source, tmp_path), shipped.emulated(arch):
            return shipped.route.forward(*arguments)

    want = forward(text)
    same = forward(text.replace(BARRIER, "        pass\n"))
    assert all(torch.equal(one, other) for one, other in zip(same, want, strict=True))

    without_sums = text.replace(FIRST_SUM, "")
    same = forward(without_sums)._replace(balance_loss=want.balance_loss)
    assert all(torch.equal(one, other) for one, other in zip(same, want, strict=True))
    with pytest.raises(PTXError, match="race on global memory: .* reads element .* of (indices|gates)"):
        forward(without_sums.replace(BARRIER, "        pass\n"))


# --- the CUDA library -------------------------------------------------------------------------------------------------


def check_ema(ptx):
    """Aligned and not, an expert that is not read, groups that nothing moves, skipped; momentum of three kinds."""
    shapes = [(5, 3), (4100,), (1,), (64, 8), (70,)]
    for skip in (False, True):
        for momentum in (0.999, torch.tensor([0.75])[0], torch.tensor(0.7, dtype=torch.float64)):
            before = cuda_library.make(shapes)
            before.weights[1][1], before.experts[1][1] = 0, float("nan")
            before.weights[3].zero_()
            directors = [d.clone() for d in before.directors]
            directors[4] = torch.empty(71)[1:].copy_(directors[4])
            shadows = [torch.full(d.shape, -1.0, dtype=torch.bfloat16) for d in directors]
            groups = before._replace(directors=directors, shadows=shadows)
            cuda_library.launch(ptx, groups, momentum, skip=torch.tensor(skip))
            expected = before.directors if skip else cuda_library.want(before, float(momentum))
            for i, (got, exact, shadow) in enumerate(zip(directors, expected, shadows, strict=True)):
                copied = torch.full_like(shadow, -1) if skip or i == 3 else exact.bfloat16()
                assert torch.equal(got, exact), f"director {i}"
                assert torch.equal(shadow, copied), f"shadow {i}"


@pytest.fixture(scope="module", params=[80, pytest.param(90, marks=pytest.mark.slow)])
def target(request, tmp_path_factory):
    """A target for which nvcc compiles the kernel as it is, and that passes the check."""
    if cuda_library.nvcc() is None:
        pytest.skip("there is no nvcc")
    target = cuda_library.TARGETS[request.param]
    check_ema(cuda_library.compiled(cuda_library.nvcc(), target, tmp_path_factory.mktemp("ptx")))
    return target


@pytest.mark.parametrize(
    "change", [pytest.param(c, id=c.name, marks=() if i < 3 else pytest.mark.slow) for i, c in enumerate(CUDA)]
)
def test_spoilt_cuda_is_seen(target, change, tmp_path):
    csrc = shutil.copytree(cuda_library.CSRC, tmp_path / "csrc")
    file = csrc / change.file
    text, count = re.subn(change.before, change.after, file.read_text())
    assert count and text != file.read_text()
    file.write_text(text)
    ptx = cuda_library.compiled(cuda_library.nvcc(), target, tmp_path, csrc)
    with pytest.raises((PTXError, AssertionError), match=change.caught):
        check_ema(ptx)
