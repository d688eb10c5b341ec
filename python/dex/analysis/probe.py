"""Measures of an encoder without training: a kNN probe, and the distance of experts from directors.

Shape letters: T images with known labels, V test images, D width, k neighbours, C classes, E experts.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dex.common.ranks import full
from dexkernels import DEXLayer
from dexkernels.checks import check_number

_SIMILARITIES = 2**25
"""Similarities in memory at a time: 128 MB in float32."""


class KNNAccuracy(NamedTuple):
    """Share of the test images whose label was predicted."""

    accuracy: float
    """Of all images."""
    per_class: dict[int, float]
    """Of the images of each label, in ascending order of labels."""

    @property
    def balanced(self) -> float:
        """Mean over the labels, which gives all classes the same weight."""
        return sum(self.per_class.values()) / len(self.per_class)


@torch.no_grad()
def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> KNNAccuracy:
    """Accuracy of weighted nearest neighbours by cosine similarity, as in DINO (Caron et al. 2021, appendix F.1).

    Each of the k most similar training images votes for its label with ``exp(similarity / temperature)``. With fewer
    than k training images all of them vote. Ties go to the lower label.

    Args:
        train_features, test_features: floating point ``[T, D]`` and ``[V, D]`` on one device; need not be normalised.
        train_labels, test_labels: integers ``[T]`` and ``[V]``, any values.
        k: neighbours, at least 1. temperature: positive.

    Features that are not finite are never neighbours, and a test image with such features counts as wrong, so that the
    probe of a diverged run shows it without ending the run. Half precision is compared in float32. Memory: a block of
    ``[v, T]`` similarities at a time. Raises: ValueError naming the argument.
    """
    _check(train_features, train_labels, test_features, test_labels)
    votes = knn_vote(train_features, train_labels, test_features, k, temperature)
    truth = test_labels.to(train_features.device).long()
    hit = (votes.labels == truth) & votes.valid
    labels, inverse = truth.unique(return_inverse=True)
    right = torch.zeros(len(labels), dtype=torch.float64, device=truth.device).index_add_(0, inverse, hit.double())
    share = right / inverse.bincount(minlength=len(labels))
    per_class = dict(zip(labels.tolist(), share.tolist(), strict=True))
    return KNNAccuracy(float(right.sum() / len(hit)), per_class)


class KNNVotes(NamedTuple):
    """Predictions of the nearest neighbours."""

    labels: Tensor
    """int64 ``[V]``"""
    valid: Tensor
    """bool ``[V]``: False if the features of the image, or of all its neighbours, are not finite."""


@torch.no_grad()
def knn_vote(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, k: int = 20, temperature: float = 0.07
) -> KNNVotes:
    """Predicted labels, see ``knn_accuracy``."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k: expected a whole number of at least 1, got {k!r}")
    check_number("temperature", temperature, "a positive finite number", lambda v: 0 < v < math.inf)
    device, k = train_features.device, min(k, len(train_features))
    train, valid = _directions(train_features)
    classes, train_index = train_labels.to(device).long().unique(return_inverse=True)
    winners = torch.empty(len(test_features), dtype=torch.int64, device=device)
    has_winner = torch.empty(len(test_features), dtype=torch.bool, device=device)
    rows = max(1, _SIMILARITIES // len(train))
    for begin in range(0, len(test_features), rows):
        part = slice(begin, begin + rows)
        test, good = _directions(test_features[part].to(train_features.dtype))
        near, index = (test @ train.T).masked_fill_(~valid, -math.inf).topk(k)
        # Subtracting the best similarity keeps ratios between votes, and small temperatures in range.
        votes = ((near - near[:, :1]) / temperature).exp().nan_to_num_(0.0)
        totals = votes.new_zeros(len(test), len(classes)).scatter_add_(1, train_index[index], votes)
        winner = (totals == totals.amax(1, keepdim=True)).int().argmax(1)  # The first of equal maxima
        winners[part], has_winner[part] = classes[winner], good & (totals.amax(1) > 0)
    return KNNVotes(winners, has_winner)


@torch.no_grad()
def director_distance(model: nn.Module) -> list[float]:
    """Distance of the experts from the director in each DEX layer of ``model``, in order; dimensionless.

    With ``w_e`` all four tensors of expert e as one vector and ``d`` those of the director:

        mean over e of ||w_e - d|| / ||d||

    0 means that every expert equals the director, as at the start from a dense checkpoint. About 1.41 means unrelated
    weights of the same norm, as after independent initialisation. It falls as the director approaches the mean of its
    experts and rises as they specialise. For a director of zeros it is 0 if the experts are zeros, else infinite. Empty
    for a model without DEX layers. Waits for the device once per layer.
    """
    distances = []
    for layer in (m for m in model.modules() if isinstance(m, DEXLayer)):
        difference = norm = 0.0
        for director, experts in layer.director_pairs():
            director, experts = full(director), full(experts)
            difference = difference + torch.stack([_square(expert - director) for expert in experts])
            norm = norm + _square(director)
        distances.append(float(torch.where(difference == 0, 0.0, (difference / norm).sqrt()).mean()))
    return distances


def _square(tensor: Tensor) -> Tensor:
    tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
    return tensor.square().sum(dtype=torch.float64)


def _directions(features: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors ``[n, D]`` in float32 or float64, and whether each row is finite ``[n]``; other rows become
    zeros."""
    features = features if features.dtype == torch.float64 else features.float()
    good = features.isfinite().all(1)
    return F.normalize(features.masked_fill(~good[:, None], 0.0), dim=1), good


def _check(train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor) -> None:
    for name, features, labels in (
        ("train", train_features, train_labels),
        ("test", test_features, test_labels),
    ):
        if not isinstance(features, Tensor) or features.dim() != 2 or not features.is_floating_point():
            raise ValueError(f"{name}_features: expected floating point [images, width], got {_describe(features)}")
        if len(features) == 0:
            raise ValueError(f"{name}_features: expected at least one image, got none")
        wrong = not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex()
        if wrong or tuple(labels.shape) != (len(features),):
            raise ValueError(f"{name}_labels: expected integers [{len(features)}], got {_describe(labels)}")
    if test_features.shape[1] != train_features.shape[1] or test_features.device != train_features.device:
        raise ValueError(
            f"test_features: expected width {train_features.shape[1]} on {train_features.device}, "
            f"as train_features, got {test_features.shape[1]} on {test_features.device}"
        )


def _describe(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
