import pytest
import torch
from planted import DEPTH, E, Planted, inputs

from dex.analysis.swap import KINDS, gaps, modality_gap, swap


def found(model, images_each=6, seed=0):
    images, modality, noise = inputs(images_each)
    swapped = swap(model, images, modality, noise, seed=seed, batch_size=7)
    return swapped, {(g.kind, g.layer): g for g in gaps(swapped, torch.arange(len(modality)) // 2)}


def test_planted_specialisation_is_found():
    swapped, gap = found(Planted())
    assert torch.equal(swapped.own, torch.zeros(24))
    # One wrong unit vector of two: 1 + 1. Both wrong: 4 + 4.
    for layer in range(DEPTH):
        assert gap["other modality", layer].gap.value == pytest.approx(2.0)
        assert gap["same modality", layer].gap == (0.0, 0.0, 0.0)
    assert gap["other modality", None].gap.value == pytest.approx(8.0)
    random = gap["random", None].gap
    assert 0 < random.low < random.value < 8.0 and random.value == pytest.approx(8 * (1 - 1 / E), abs=2.0)
    assert len(gap) == len(KINDS) * (DEPTH + 1)


def test_random_routing_has_no_gap():
    """Each image's experts have nothing to do with its modality: another image's are as good.

    Those of the third kind are another matter: both layers read the same noise here, so an image's own are twice one.
    """
    _, gap = found(Planted(router="noise"), images_each=40)
    for kind in KINDS[:2]:
        interval = gap[kind, None].gap
        assert interval.low < 0 < interval.high, kind


def test_equal_experts_have_no_gap():
    swapped, gap = found(Planted(alike=True))
    assert (swapped.own > 0).all()
    assert all(abs(g.gap.value) < 1e-6 for g in gap.values())


def test_an_image_without_a_partner_is_left_out():
    images, modality, noise = inputs(2)
    modality = modality.clone()
    modality[0] = 9  # the only one of its modality
    swapped = swap(Planted(), images, modality, noise)
    assert swapped.given[0, :, 0].isnan().all() and swapped.given[1:].isfinite().all()
    alone = swap(Planted(), images, torch.zeros(8, dtype=torch.int64), noise)
    assert {g.kind for g in gaps(alone, torch.arange(8))} == {"same modality", "random"}


def test_the_same_seed_gives_the_same_partners():
    one, two, other = (found(Planted("noise"), seed=seed)[0].given for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_what_the_modality_costs_is_told_from_what_another_image_does():
    swapped, _ = found(Planted())
    groups = torch.arange(24) // 2
    beyond = modality_gap(swapped, groups)
    assert beyond.gap.value == pytest.approx(8.0) and beyond.own == 0.0 and beyond.gap.low > 7.9
    unlike, _ = found(Planted(router="noise"), images_each=40)
    interval = modality_gap(unlike, torch.arange(160) // 2).gap
    assert interval.low < 0 < interval.high
    # An image's own experts are the best here, so that both swaps cost; neither more than the other.
    costly = unlike._replace(given=unlike.given + 3.0)
    assert modality_gap(costly, torch.arange(160) // 2).gap == pytest.approx(interval, abs=1e-5)
    assert all(g.gap.low > 0 for g in gaps(costly, torch.arange(160) // 2))


def test_without_a_partner_of_each_kind_the_modality_costs_nothing_that_is_known():
    images, _, noise = inputs(2)
    for modality in (torch.zeros(8, dtype=torch.int64), torch.arange(8)):
        assert modality_gap(swap(Planted(), images, modality, noise), torch.arange(8)) is None
