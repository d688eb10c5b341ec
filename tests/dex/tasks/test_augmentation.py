"""Images and masks move together, as their key says."""

from dataclasses import replace

import pytest
import torch

from dex.common.random import sample_keys
from dex.data import center, denormalize
from dex.tasks.augmentation import augment
from dex.tasks.recipe import Settings
from dex.tasks.task import IGNORED

STILL = replace(Settings(), scale=0.0, shift=0.0, rotation=0.0, intensity=0.0)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(8, 24, 24, dtype=torch.uint8)
    masks[:, 4:12, 6:20] = 1
    masks[:, 14:20, 3:9] = 2
    images = 60 + 60 * masks[:, None].expand(8, 3, 24, 24)
    noise = torch.randint(0, 4, images.shape, generator=generator, dtype=torch.uint8)
    return images.to(torch.uint8) + noise, masks, sample_keys(3, torch.arange(8))


def test_without_changes_it_is_what_evaluation_sees(batch):
    images, masks, keys = batch
    out, moved = augment(images, masks, keys, STILL)
    torch.testing.assert_close(out, center(images, 24), atol=1e-3, rtol=0)
    assert torch.equal(moved, masks)


def test_masks_stay_on_what_they_mark(batch):
    images, masks, keys = batch
    settings = replace(Settings(), intensity=0.0, flips="both", rotation=40.0, shift=0.2, scale=0.3)
    out, moved = augment(images, masks, keys, settings)
    levels = 255 * denormalize(out).mean(1)
    inside = moved != IGNORED
    expected = 61.5 + 60.0 * moved.float()
    agree = ((levels - expected).abs() < 30)[inside].float().mean()  # all but the edges, where levels mix
    assert agree > 0.9
    assert (moved == IGNORED).any() and not torch.equal(moved[0], moved[1])
    assert levels[moved == IGNORED].median() < 30


def test_flips_happen_as_often_as_they_should_and_only_where_they_may(batch):
    images, masks, _ = batch
    keys = sample_keys(1, torch.arange(400))
    images, masks = images[:1].expand(400, -1, -1, -1), masks[:1].expand(400, -1, -1)
    for flips, expected in (("none", 1), ("horizontal", 2), ("both", 4)):
        _, moved = augment(images, masks, keys, replace(STILL, flips=flips))
        kinds, counts = torch.unique(moved.flatten(1), dim=0, return_counts=True)
        assert len(kinds) == expected and counts.min() > 400 / expected * 0.7
    assert torch.equal(augment(images, masks, keys, replace(STILL, flips="horizontal"))[1][0], masks[0]) or torch.equal(
        augment(images, masks, keys, replace(STILL, flips="horizontal"))[1][0], masks[0].flip(1)
    )


def test_an_image_depends_on_its_own_key_alone(batch):
    images, masks, keys = batch
    settings = replace(Settings(), flips="both")
    whole, moved = augment(images, masks, keys, settings)
    part, of_part = augment(images[3:5], masks[3:5], keys[3:5], settings)
    torch.testing.assert_close(part, whole[3:5], atol=1e-5, rtol=0)
    assert torch.equal(of_part, moved[3:5])


def test_ignored_pixels_stay_ignored(batch):
    images, _, keys = batch
    masks = torch.full((8, 24, 24), IGNORED, dtype=torch.uint8)
    assert (augment(images, masks, keys, Settings())[1] == IGNORED).all()


def test_a_classification_has_no_masks(batch):
    images, _, keys = batch
    out, moved = augment(images, None, keys, Settings())
    assert out.shape == images.shape and moved is None


def test_one_channel_is_the_luminance(batch):
    images, masks, keys = batch
    out, moved = augment(images, masks, keys, STILL, channels=1)
    assert out.shape == (8, 1, 24, 24) and torch.equal(moved, masks)
    torch.testing.assert_close(
        out, center(images, 24, 1), atol=0.01, rtol=0
    )  # evaluation rounds the grey of whole numbers
