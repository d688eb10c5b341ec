import math

import pytest
import torch

from dex.analysis import usage as analysis
from dex.analysis.usage import UnusedExperts


def test_expert_by_modality_sums_gates():
    torch.manual_seed(0)
    B, K, E, M = 50, 2, 6, 4
    gates = torch.rand(B, K)
    indices = torch.stack([torch.randperm(E)[:K] for _ in range(B)]).int()
    modality = torch.randint(0, M - 1, (B,))  # the last has no image
    want = torch.zeros(M, E, dtype=torch.float64)
    for b in range(B):
        for k in range(K):
            want[modality[b], indices[b, k]] += gates[b, k].double()
    got = analysis.expert_by_modality(gates, indices, modality, E, M)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert got[M - 1].sum() == 0


def test_dead_and_nearly_dead_experts():
    assert analysis.unused_experts(torch.tensor([100, 0, 9, 291])) == UnusedExperts((1,), (2,))
    assert analysis.unused_experts(torch.tensor([100, 10, 100, 190])) == UnusedExperts((), ())  # exactly a tenth


def test_entropy_is_one_when_even_and_zero_when_collapsed():
    assert analysis.usage_entropy(torch.tensor([5, 5, 5, 5])) == pytest.approx(1.0)
    assert analysis.usage_entropy(torch.tensor([20, 0, 0, 0])) == pytest.approx(0.0, abs=1e-12)
    assert analysis.usage_entropy(torch.tensor([10, 10, 0, 0])) == pytest.approx(0.5)
    assert analysis.min_share(torch.tensor([3, 1, 4, 2])) == pytest.approx(0.1)


def test_gate_entropy_is_the_mean_over_images():
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2)
    gates = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.75, 0.25]])
    assert float(analysis.gate_entropy(gates)) == pytest.approx((1 + 0 + quarter) / 3)
    assert float(analysis.gate_entropy(torch.full((2, 3), 1 / 3))) == pytest.approx(1.0)
    assert float(analysis.gate_entropy(torch.ones(4, 1))) == 0.0
