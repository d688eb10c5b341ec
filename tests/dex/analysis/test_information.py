import itertools
import math

import pytest
import torch

from dex.analysis.information import (
    distinct_sets,
    first_agreement,
    information,
    overlap,
    probability_entropy,
    random_overlap,
)


def test_a_choice_that_tells_the_modality_is_worth_one():
    modality = torch.arange(4).repeat(8)
    result = information(modality * 3 + 1, modality)
    assert result.value == pytest.approx(1.0) and result.p == pytest.approx(1 / 1000)
    assert result.raw == pytest.approx(math.log(4))


def test_permuted_labels_have_none_although_the_plain_estimate_is_large():
    generator = torch.Generator().manual_seed(0)
    choice, modality = torch.randint(20, (64,), generator=generator), torch.arange(4).repeat(16)
    results = [information(choice, modality[torch.randperm(64, generator=generator)], seed=s) for s in range(20)]
    assert min(r.raw for r in results) > 0.25
    assert abs(sum(r.value for r in results) / 20) < 0.03
    assert sum(r.value > r.null_high for r in results) <= 4  # one in twenty is expected
    assert sum(r.p <= 0.05 for r in results) <= 4


def test_a_single_modality_or_choice_says_nothing():
    assert information(torch.arange(5), torch.zeros(5, dtype=torch.int64)) == (0.0, 0.0, 0.0, 1.0)
    assert information(torch.zeros(6, dtype=torch.int64), torch.arange(6) % 2).value == 0.0
    with pytest.raises(ValueError, match="choice: expected one per image, at least one, got 0 and 0"):
        information(torch.zeros(0), torch.zeros(0))


def test_sets_and_agreement():
    experts = torch.tensor([[0, 1], [1, 0], [2, 3]])
    assert distinct_sets([experts, experts[:, :1]]) == [2, 3]
    assert first_agreement(experts, torch.tensor([[0, 3], [0, 1], [2, 1]])) == pytest.approx(2 / 3)


def test_entropy_of_all_probabilities_sees_dead_experts():
    """Two of four experts in equal parts: the gates of the chosen two would look undecided."""
    assert probability_entropy(torch.tensor([[0.5, 0.5, 0.0, 0.0]])) == pytest.approx(0.5)
    assert probability_entropy(torch.full((3, 4), 0.25)) == pytest.approx(1.0)
    assert probability_entropy(torch.eye(4)) == 0.0 and probability_entropy(torch.ones(2, 1)) == 0.0


def test_overlap_of_planted_sets():
    experts = torch.tensor([[0, 1], [1, 0], [2, 3], [3, 4]])
    found = overlap(experts, torch.tensor([0, 0, 1, 1]), 3)
    want = torch.tensor([[1.0, 0.0, torch.nan], [0.0, 1 / 3, torch.nan], [torch.nan] * 3], dtype=torch.float64)
    torch.testing.assert_close(found, want, equal_nan=True)


@pytest.mark.parametrize("num_experts, top_k", [(4, 1), (5, 2), (6, 3), (3, 3)])
def test_the_overlap_of_random_sets_is_counted_out(num_experts, top_k):
    sets = [set(s) for s in itertools.combinations(range(num_experts), top_k)]
    want = sum(len(a & b) / len(a | b) for a in sets for b in sets) / len(sets) ** 2
    assert random_overlap(num_experts, top_k) == pytest.approx(want)
