"""csrc/grouped_mlp_sm90, as nvcc compiles it for sm_90a, on the emulator: against the specification in float64.

`every_kernel.py` keeps results of all forms in both dtypes and many orders of the warps; here some of them run anew.
"""

import re
import shutil
from pathlib import Path

import cuda_library
import cuda_mlp_cases
import cuda_sm90
import pytest
import torch
from cuda_grouped_mlp import emulated
from cuda_mlp_cases import Form
from cuda_sabotages import Change
from ptx_emulator.counters import parts
from ptx_emulator.ptx import PTXError
from shipped_cases import errors_of, mlp_inputs

from dexkernels.ops.grouped_mlp import cuda
from dexkernels.records import MLPWeights


def compile_in(folder: Path, csrc: Path = cuda_library.CSRC) -> cuda_sm90.Sm90Kernels:
    if cuda_library.nvcc() is None:
        pytest.skip("there is no nvcc")
    return cuda_sm90.Sm90Kernels(cuda_library.nvcc(), folder, csrc)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> cuda_sm90.Sm90Kernels:
    return compile_in(tmp_path_factory.mktemp("ptx"))


def check(kernels: cuda_sm90.Sm90Kernels, form: Form, dtype: torch.dtype = torch.bfloat16, seed: int = 1):
    """Returns the launches of the two kernels."""
    case = cuda_sm90.case(form, dtype)
    with emulated(kernels, seed, count=True, kind=cuda_sm90.Sm90Library) as library:
        results = case.compute(library)
    for name, (error, _, bound) in errors_of(case, results).items():
        assert error <= bound, f"{name}: {error:.2e} > {bound:.2e}"
    return [ran for ran in library.ran if ran.kernel in cuda_sm90.KERNELS]


def test_a_forward_and_what_it_launches(kernels):
    """Six tiles on three multiprocessors: both consumers of each have one."""
    inputs = mlp_inputs(2, 5, 72, 264, 2, 2, torch.float16)
    slots = cuda_mlp_cases._slots(cuda_mlp_cases.SPECIFICATION, inputs)
    with emulated(kernels, seed=2, count=True, kind=cuda_sm90.Sm90Library) as library:
        out, z, _ = cuda.forward(inputs.x, slots, MLPWeights(*inputs.weights), save=False)
    exact = cuda_mlp_cases._want_mlp(cuda_mlp_cases.SPECIFICATION, inputs, torch.float64, None)["out"]
    assert (out - exact).norm() < 1e-3 * exact.norm() and z.numel() == 0
    assert [ran.kernel for ran in library.ran] == ["fc1_sm90_kernel", "to_slots_kernel", "combine_kernel"]
    counters = library.ran[0].counters
    assert counters.rounds.sum() == 0, "only TMA and wgmma touch shared memory"
    tiles, steps = 2 * 3, 2
    assert counters.products == tiles * steps * 2 * 128 * 128 * 64
    # Weights; in the first chunk two images of 4 + 1 rows and 16 + 4 + 2 rows of zeros; three chunks of zeros.
    assert counters.tensor_copies == tiles * steps * (1 + 2 * 2 + 3 + 3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["N 5", "N 31, more steps than stages", "N 65, with a director", "N 257"])
def test_outputs_and_gradients(kernels, name, dtype):
    ran = check(kernels, cuda_sm90.FORMS[name], dtype)
    assert [one.kernel for one in ran] == ["fc1_sm90_kernel", "hidden_grad_sm90_kernel"]
    for one in ran:
        rounds, least = (parts(one.program, of) for of in (one.counters.rounds, one.counters.least_rounds))
        assert rounds == least and rounds.main_loop == 0, "no bank conflict, not in the epilogue either"


# --- faults -----------------------------------------------------------------------------------------------------------

WRONG = "^(out|dx|dgates|dfc1|dfc2|director|a:)"
TURNS, PTX = "grouped_mlp_sm90/turns.h", "grouped_mlp_sm90/ptx.h"
FC1, GRAD, BOXES = (f"grouped_mlp_sm90/{name}" for name in ("fc1.cu", "hidden_grad.cu", "boxes.h"))

FAULTS = [
    Change("a step is multiplied before it has landed", TURNS, r"wait\(shared\.full\(at\.stage\), at\.phase\);", "",
           "in flight|uninitialised|race on shared"),
    Change("a step is copied over one that is read", TURNS, r"wait\(shared\.empty\(at\.stage\), at\.phase \^ 1\);", "",
           "in flight|race on shared|more arrivals"),
    Change("a stage is given back while its products run", TURNS, r"wait_for_products<1>", "wait_for_products<2>",
           "still reads"),
    Change("sums are read while products run", TURNS, r"wait_for_products<0>\(\);", "", "too early"),
    Change("no fence before products", TURNS, r"fence_products\(\);", "", "missing wgmma.fence"),
    Change("both consumers wait for the other one", TURNS, r"\(consumer == 0\)", "0", "deadlock"),
    Change("a turn is not passed on", TURNS, r"if \(reports\) arrive\(shared\.turn\(1 - consumer\)\);", "", "deadlock"),
    Change("the last stage of a tile is not given back", TURNS,
           r"if \(reports\) arrive\(shared\.empty\(advance\(first, steps - 1\)\.stage\)\);", "", "deadlock"),
    Change("the weights are not waited for", TURNS, r"\(warp == 0 \? SM90_OPERAND_BYTES : 0\)", "0",
           "in flight|uninitialised|race on shared|deadlock"),
    Change("barriers are used before they are", TURNS, r"__syncthreads\(\);", "",
           "without order after its mbarrier.init|no mbarrier"),
    Change("the ring does not count its rounds", BOXES, r"at\.phase \^ \(stage / SM90_STAGES & 1\)", "at.phase",
           "deadlock|in flight|race|uninitialised|more arrivals"),
    Change("a box is cut once more", BOXES, r"left < \(before & -before\)", "left <= (before & -before)",
           "in flight|race on shared|deadlock|bytes"),
    Change("a box goes on into the next image", BOXES, r"left = tokens - at\.token < left \?.*;",
           "", WRONG + "|deadlock|in flight|race on shared"),
    Change("rows of another expert are written", FC1, r"row < tile\.piece\.stop - tile\.piece\.first && own", "own",
           "race on global|outside of every|" + WRONG),
    Change("the director's rows are saved", FC1, r" && tile\.piece\.expert < p\.slots\.num_experts", "",
           "outside of every"),
    Change("the columns of the second half are those of the first", TURNS, r"tile\.column \+ SM90_DEPTH", "tile.column",
           WRONG),
    Change("terms go on along the columns", TURNS, r"DOWN \? 2048 >> 4", "DOWN ? 32 >> 4", WRONG),
    Change("the parts of a bias are added before they are there", GRAD, r"\n  sync_warpgroup\(barrier\);", "",
           "race on shared|uninitialised"),
    Change("the parts of the tile before are overwritten", GRAD,
           r"if \(p\.bias_parts != nullptr\) sync_warpgroup\(barrier\);", "", "race on shared"),
    Change("consumers share their parts", TURNS, r"threadIdx\.x / 128 \* SM90_PARTS", "0", "race on shared"),
    Change("rows past the last one have a gate", GRAD, r"row < piece\.stop - piece\.first \?", "true ?",
           "outside of every|" + WRONG),
]  # fmt: skip

SEEN_BY = (
    cuda_sm90.FORMS["N 31, more steps than stages"],
    Form((7, 5, 16, 264, 4, 1), director=True, skewed=True),
    Form((2, 65, 40, 136, 2, 2)),
)


@pytest.mark.slow
@pytest.mark.parametrize("change", [pytest.param(c, id=c.name) for c in FAULTS])
def test_spoilt_sources_are_seen(change, tmp_path):
    csrc = shutil.copytree(cuda_library.CSRC, tmp_path / "csrc")
    file = csrc / change.file
    text, count = re.subn(change.before, change.after, file.read_text())
    assert count == 1 and text != file.read_text()
    file.write_text(text)
    kernels = compile_in(tmp_path, csrc)
    with pytest.raises((PTXError, AssertionError), match=change.caught):
        for form in SEEN_BY:
            check(kernels, form)


@pytest.mark.slow
def test_the_sources_as_they_are_pass_the_same_check(kernels):
    for form in SEEN_BY:
        check(kernels, form)
