"""What the operators share: dtypes, what stands for an absent gradient, and the guard of versions."""

from typing import NamedTuple

import pytest
import torch

from dexkernels.ops.common import (
    accumulation_dtype,
    autocast_dtype,
    gradients,
    guard_version,
    or_empty,
    without_autocast,
)

DEVICE = torch.get_default_device()


def test_sums_of_half_precision_are_in_float32():
    assert {accumulation_dtype(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)} == {torch.float32}
    assert accumulation_dtype(torch.float64) == torch.float64


def test_autocast_decides_the_dtype_outside_of_an_operator():
    x = torch.zeros(1)
    assert autocast_dtype(x) == torch.float32
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert autocast_dtype(x) == torch.bfloat16
        with without_autocast(DEVICE):
            assert autocast_dtype(x) == torch.float32 and (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_an_empty_tensor_stands_for_none():
    given = torch.ones(2)
    absent, kept = or_empty(given.half(), None, given)
    assert absent.shape == (0,) and absent.dtype == torch.float16 and kept is given


def test_gradients_are_placed_by_name():
    class Inputs(NamedTuple):
        x: torch.Tensor
        size: int
        weight: torch.Tensor

    grad = torch.ones(1)
    assert gradients(Inputs, weight=grad) == (None, None, grad)
    with pytest.raises(TypeError, match="bias"):
        gradients(Inputs, bias=grad)


@pytest.mark.parametrize("changed", [False, True])
def test_a_backward_refuses_what_was_changed_since(changed):
    leaf, guarded = torch.ones(1, requires_grad=True), torch.zeros(2)
    loss = guard_version((2 * leaf).sum(), (guarded,))
    if not changed:
        loss.backward()
        assert leaf.grad.item() == 2
        return
    guarded.add_(1)
    with pytest.raises(RuntimeError, match="update_director after backward"):
        loss.backward()


def test_inference_tensors_have_no_version_to_guard():
    with torch.inference_mode():
        guarded = torch.zeros(2)
    loss = torch.ones((), requires_grad=True) * 2
    assert guard_version(loss, (guarded,)) is loss
