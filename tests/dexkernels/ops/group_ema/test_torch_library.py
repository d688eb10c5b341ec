"""`opcheck` of the operator behind `group_ema_`, and what it tells autograd."""

import pytest
import torch
from operator_cases import OPS, E

from dexkernels import group_ema_
from dexkernels.layer import update_directors


@pytest.mark.parametrize("skip", [None, torch.tensor(False), torch.tensor(True)])
def test_opcheck_group_ema(skip):
    directors, experts = [torch.randn(3, 2), torch.randn(4)], [torch.randn(E, 3, 2), torch.randn(E, 4)]
    args = (directors, experts, [torch.rand(E), torch.rand(E)], torch.tensor(0.9), skip, "reference")
    torch.library.opcheck(OPS.group_ema_, args)


def test_group_ema_tells_autograd_that_directors_changed():
    d = torch.zeros(3)
    version = d._version
    group_ema_([d], [torch.ones(2, 3)], [torch.ones(2) / 2], 0.5)
    assert d._version > version and d.tolist() == [0.5] * 3
    update_directors([], [], 0.5)
