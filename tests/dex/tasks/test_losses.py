"""Losses against MONAI's and torch's, and what ignored pixels do."""

import pytest
import torch

from dex.tasks.losses import balanced, classification_loss, segmentation_loss
from dex.tasks.task import IGNORED


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 8, 8, generator=generator, requires_grad=True)
    return logits, torch.randint(0, 3, (4, 8, 8), generator=generator, dtype=torch.uint8)


def test_it_is_dice_and_cross_entropy_of_monai(drawn):
    from monai.losses import DiceCELoss

    logits, masks = drawn
    theirs = DiceCELoss(to_onehot_y=True, softmax=True)(logits, masks[:, None].long())
    ours = segmentation_loss(logits, masks)
    assert ours.shape == (4,)
    torch.testing.assert_close(ours.mean(), theirs)
    (expected,) = torch.autograd.grad(theirs, logits)
    torch.testing.assert_close(torch.autograd.grad(ours.mean(), logits)[0], expected)


def test_ignored_pixels_change_nothing(drawn):
    logits, masks = drawn
    masks[:, 5:] = IGNORED
    loss = segmentation_loss(logits, masks)
    torch.testing.assert_close(loss, segmentation_loss(logits[:, :, :5], masks[:, :5]))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert (gradient[:, :, 5:] == 0).all() and gradient[:, :, :5].abs().sum() > 0


def test_an_image_of_ignored_pixels_costs_nothing(drawn):
    logits, masks = drawn
    masks[0] = IGNORED
    loss = segmentation_loss(logits, masks)
    assert loss[0] == 0 and (loss[1:] > 0).all()
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.isfinite().all() and (gradient[0] == 0).all()


def test_balanced_weights_give_every_class_its_share():
    weights = balanced(torch.tensor([80, 0, 20]))
    torch.testing.assert_close(weights, torch.tensor([0.625, 0.0, 2.5]))
    labels = torch.tensor([0] * 80 + [2] * 20)
    logits = torch.zeros(100, 3)
    of_class = classification_loss(logits, labels, weights)
    torch.testing.assert_close(of_class[:80].sum(), of_class[80:].sum())
    torch.testing.assert_close(of_class.mean(), torch.tensor(3.0).log())


def test_classification_is_cross_entropy_of_every_image():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    loss = classification_loss(logits, torch.tensor([0, 0]))
    torch.testing.assert_close(loss[1] - loss[0], torch.tensor(2.0))
