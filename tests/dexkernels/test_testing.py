"""The public helpers of tests and benchmarks."""

import pytest
import torch

from dexkernels import DEXLayer
from dexkernels.testing import ExpertLoop, HostWaits, NoHostWaits, randomize_, relative_error


def test_relative_error():
    want = torch.tensor([3.0, 4.0])
    assert relative_error(want, want) == 0
    assert relative_error(want + torch.tensor([0.0, 0.5]), want) == pytest.approx(0.1)
    assert relative_error(torch.full((2,), 0.5), torch.zeros(2)) == pytest.approx(0.5**0.5), "absolute where want is 0"
    assert relative_error(torch.tensor([3.0, float("nan")]), want) == float("inf")
    with pytest.raises(ValueError, match=r"^got: expected shape \[2\], got \[1\]$"):
        relative_error(want[:1], want)


def test_randomized_layers_differ_by_seed_alone():
    one, again, other = (randomize_(DEXLayer(6, 8, 4, 2), seed) for seed in (0, 0, 1))
    for a, b, c in zip(one.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)
    assert not torch.equal(one.experts.fc1_weight[0], one.experts.fc1_weight[1])


def test_the_loop_takes_a_layers_weights_and_computes_the_same():
    layer, x = randomize_(DEXLayer(6, 8, 4, 2).double()), torch.randn(3, 5, 6, dtype=torch.float64)
    loop = ExpertLoop(6, 8, 4, 2).double()
    loop.load_state_dict(layer.reference_state_dict())
    y, aux = layer(x, return_aux=True)
    for got, want in zip(loop(x), (y, aux.align_loss, aux.balance_loss, aux.gate_mass), strict=True):
        torch.testing.assert_close(got, want)
    loop.update_director(aux.gate_mass, 0.9)
    layer.update_director(aux.gate_mass, 0.9)
    torch.testing.assert_close(loop.director["fc1"].weight, layer.director.fc1.weight)


WAITS = {
    "a value is read": lambda t: t.sum().item(),
    "a size depends on values": lambda t: t.nonzero(),
    "a mask picks": lambda t: t[t > 0],
    "a copy to the host": lambda t: t.cpu(),
    "a copy from the host": lambda t: torch.zeros(3).to(t.device),
}


@pytest.mark.parametrize("case", WAITS)
def test_a_wait_is_found(case):
    with NoHostWaits(), pytest.raises(HostWaits):
        WAITS[case](torch.zeros(3, device="meta"))


def test_what_waits_for_nothing_is_seen_in_order():
    t = torch.zeros(3, device="meta")
    with NoHostWaits() as watch:
        (t + 1).mul_(2)
    assert [line.split()[0] for line in watch.seen] == ["aten.add.Tensor", "aten.mul_.Tensor"]
    assert watch.seen[0] == "aten.add.Tensor torch.float32[3] 1"


def test_on_the_host_nobody_waits():
    with NoHostWaits():
        assert torch.ones(3).nonzero().shape == (3, 1)
