"""What an encoder has learned, without training anything on it: a kNN probe, and how far experts are from directors.

Shape letters: T images with known labels, V images to be judged, D width, k neighbours, C classes, E experts.
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
"""Similarities held at a time: 128 MB in float32."""


class KNNAccuracy(NamedTuple):
    """Shares of the judged images whose label was found."""

    accuracy: float
    """Of all images."""
    per_class: dict[int, float]
    """Of the images of each label, in ascending order of labels."""

    @property
    def balanced(self) -> float:
        """Mean over the labels: every class counts alike, however few its images."""
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
    """Weighted nearest neighbours by cosine similarity, as DINO judges its features (Caron et al. 2021, appendix F.1).

    Each of an image's k most similar training images votes for its label with ``exp(similarity / temperature)``. With
    fewer than k training images all of them vote. Equal votes go to the lower label.

    Args:
        train_features, test_features: floating point ``[T, D]`` and ``[V, D]``, on one device; need not be normalised.
        train_labels, test_labels: integers ``[T]`` and ``[V]``, any values.
        k: neighbours, at least 1. temperature: positive.

    A feature that is not finite is nobody's neighbour, and an image with one is counted as not found: a probe of a run
    that goes astray shows it and does not end it. Half precision is compared in float32. Memory: a block of ``[v, T]``
    similarities at a time. Raises: ValueError naming the argument.
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
    """What the neighbours of the judged images say."""

    labels: Tensor
    """int64 ``[V]``"""
    valid: Tensor
    """bool ``[V]``: false where the image's feature, or all of its neighbours', are not finite."""


@torch.no_grad()
def knn_vote(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, k: int = 20, temperature: float = 0.07
) -> KNNVotes:
    """The votes that `knn_accuracy` compares with the truth."""
    expected = "a whole number of at least 1"
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k: expected {expected}, got {k!r}")
    check_number("temperature", temperature, "a positive finite number", lambda v: 0 < v < math.inf)
    device, k = train_features.device, min(k, len(train_features))
    train, valid = _directions(train_features)
    classes, train_index = train_labels.to(device).long().unique(return_inverse=True)
    winners = torch.empty(len(test_features), dtype=torch.int64, device=device)
    found = torch.empty(len(test_features), dtype=torch.bool, device=device)
    rows = max(1, _SIMILARITIES // len(train))
    for begin in range(0, len(test_features), rows):
        part = slice(begin, begin + rows)
        test, good = _directions(test_features[part].to(train_features.dtype))
        near, index = (test @ train.T).masked_fill_(~valid, -math.inf).topk(k)
        # Subtracting the best changes no ratio between votes and keeps small temperatures in range.
        votes = ((near - near[:, :1]) / temperature).exp().nan_to_num_(0.0)
        counted = votes.new_zeros(len(test), len(classes)).scatter_add_(1, train_index[index], votes)
        winner = (counted == counted.amax(1, keepdim=True)).int().argmax(1)  # the first of equals
        winners[part], found[part] = classes[winner], good & (counted.amax(1) > 0)
    return KNNVotes(winners, found)


@torch.no_grad()
def director_distance(model: nn.Module) -> list[float]:
    """How far the experts of each DEX layer of ``model`` are from its director, first layer to last; dimensionless.

    With ``w_e`` all four tensors of expert e as one vector and ``d`` the director's:

        mean over e of ||w_e - d|| / ||d||

    0: every expert is the director, as where a run starts from a dense checkpoint. About 1.41: experts and director
    have nothing in common and are of one size, as where they are drawn separately. It shrinks as the director comes to
    lie in the middle of its experts and grows as they specialise. A director of zeros: 0 if the experts are zeros, else
    infinite. Empty for a model without DEX layers. Waits for the device once a layer.
    """
    distances = []
    for layer in (m for m in model.modules() if isinstance(m, DEXLayer)):
        apart = size = 0.0
        for director, experts in layer.director_pairs():
            director, experts = full(director), full(experts)
            apart = apart + torch.stack([_square(expert - director) for expert in experts])
            size = size + _square(director)
        distances.append(float(torch.where(apart == 0, 0.0, (apart / size).sqrt()).mean()))
    return distances


def _square(tensor: Tensor) -> Tensor:
    tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
    return tensor.square().sum(dtype=torch.float64)


def _directions(features: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors ``[n, D]`` in float32 or float64, and which rows were finite ``[n]``; the others become zeros."""
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
            f"as train_features; got {test_features.shape[1]} on {test_features.device}"
        )


def _describe(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
