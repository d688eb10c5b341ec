"""Records shared by layers and operators. Letters: D width, H hidden, E experts."""

from typing import NamedTuple

from torch import Tensor


class MLPWeights(NamedTuple):
    """The four tensors of ``fc2(gelu(fc1(x)))``, for E stacked experts or, without the leading E, for one MLP."""

    fc1_weight: Tensor
    """``[E, H, D]``"""
    fc1_bias: Tensor
    """``[E, H]``"""
    fc2_weight: Tensor
    """``[E, D, H]``"""
    fc2_bias: Tensor
    """``[E, D]``"""
