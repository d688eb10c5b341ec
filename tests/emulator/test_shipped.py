"""The tools with which other tests spoil shipped kernels."""

import sys

import pytest
import torch
from shipped_cases import align_loss_case, check

MASKED = "inside = (rows < num_rows)[:, None] & (d < dim)[None, :]\n    return"


def test_a_mask_that_is_missing_is_seen(shipped, tmp_path):
    module = sys.modules["dexkernels.ops.align_loss.triton"]
    case = align_loss_case(shipped, 7, 40, "kd", torch.bfloat16)
    spoilt = MASKED.replace("(d < dim)", "(d < dim + 8)")
    with shipped.sabotaged(module, MASKED, spoilt, tmp_path):
        with pytest.raises((shipped.PTXError, AssertionError)):
            check(shipped, case, shipped.emulated(80))
    check(shipped, case, shipped.emulated(80))


def test_a_change_must_be_one(shipped, tmp_path):
    module = sys.modules["dexkernels.ops.align_loss.triton"]
    with pytest.raises(ValueError, match="before: expected 'no such line' once"):
        with shipped.sabotaged(module, "no such line", "", tmp_path):
            pass


def test_changed_ptx_runs_in_the_place_of_the_kernel(shipped):
    case = align_loss_case(shipped, 7, 40, "mse", torch.float32)
    seen = []

    def change(name, ptx):
        seen.append(name)
        return ptx.replace("st.global", "st.shared", 1) if name == "backward_kernel" else ptx

    with pytest.raises(shipped.PTXError, match="outside of shared memory|misaligned"):
        check(shipped, case, shipped.emulated(80, change=change))
    assert seen == ["forward_kernel", "mean_kernel", "backward_kernel"]
