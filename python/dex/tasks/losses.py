"""The losses of tasks, one value per image: Dice plus cross-entropy, or cross-entropy only.

Shape letters: B images, C classes (of segmentation with the background first), S image side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dex.tasks.task import IGNORED

_SMOOTH = 1e-5
"""As in MONAI's DiceLoss; a class that is in neither truth nor prediction has loss 0."""


def segmentation_loss(logits: Tensor, masks: Tensor, weights: Tensor | None = None) -> Tensor:
    """``logits [B, C, S, S], masks uint8 [B, S, S] -> [B]``: 1 - mean Dice over all classes, plus mean cross-entropy.

    weights: ``[C]``, for the cross-entropy. ``IGNORED`` pixels count in neither term; the loss is 0 if all are ignored.
    Equal to MONAI's DiceCELoss if no pixel is ignored.
    """
    logits = logits.float()
    counted = masks != IGNORED
    target = masks.long().masked_fill(~counted, 0)
    entropy = F.cross_entropy(logits, target, weight=weights, reduction="none") * counted
    pixels = counted.sum((1, 2))
    share = counted[:, None].to(logits.dtype)
    truth = F.one_hot(target, logits.shape[1]).movedim(-1, 1) * share
    predicted = logits.softmax(1) * share
    both = (predicted * truth).sum((2, 3))
    dice = (2 * both + _SMOOTH) / (predicted.sum((2, 3)) + truth.sum((2, 3)) + _SMOOTH)
    return (1 - dice).mean(1) + entropy.sum((1, 2)) / pixels.clamp(min=1)


def classification_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """``logits [B, C], labels int64 [B] -> [B]``. weights: ``[C]``."""
    return F.cross_entropy(logits.float(), labels, weight=weights, reduction="none")


def balanced(counts: Tensor) -> Tensor:
    """float32 ``[C]``: weights inverse to ``counts [C]``, with mean 1 over all examples; 0 for a count of 0."""
    present = counts > 0
    inverse = torch.where(present, 1 / counts.double().clamp(min=1), 0.0)
    return (inverse * counts.sum() / present.sum().clamp(min=1)).float()
