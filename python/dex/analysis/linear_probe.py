"""A linear probe: multinomial logistic regression on frozen features, trained to its optimum.

Shape letters: n images, D width, C classes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidates of ``choose_penalty``."""
STEPS = 300
"""Largest number of optimizer steps; it stops earlier at the optimum."""


class LinearProbe(NamedTuple):
    """``argmax(((x - mean) / std) @ weight.T + bias)``; float64."""

    mean: Tensor
    """``[D]``"""
    std: Tensor
    """``[D]``; 1 for a constant feature."""
    weight: Tensor
    """``[C, D]``"""
    bias: Tensor
    """``[C]``"""

    def predict(self, features: Tensor) -> Tensor:
        """int64 ``[n]``; a row that is not finite is class 0."""
        scores = F.linear((features.double() - self.mean) / self.std, self.weight, self.bias)
        return scores.nan_to_num(0.0, 0.0, 0.0).argmax(1)


def fit(
    features: Tensor,
    labels: Tensor,
    classes: int,
    penalty: float,
    start: LinearProbe | None = None,
    *,
    steps: int = STEPS,
) -> LinearProbe:
    """Minimise the mean cross-entropy with equal weight of classes, ``+ penalty / 2 * mean(weight**2) * C``.

    Args:
        features: ``[n, D]``, at least one row. labels: int64 ``[n]``, 0 to classes - 1.
        penalty: positive; for standardised features.
        start: a probe of the same features to start from. steps: largest number of L-BFGS steps.
    """
    if not penalty > 0:
        raise ValueError(f"penalty: expected a positive number, got {penalty!r}")
    if len(features) == 0 or len(features) != len(labels):
        raise ValueError(f"features: expected one row per label, got {len(features)} rows and {len(labels)} labels")
    x = features.double()
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 1e-12, std, 1.0)
    x = (x - mean) / std
    width = x.shape[1]
    counts = torch.bincount(labels, minlength=classes).double()
    share = torch.where(counts > 0, 1 / counts.clamp(min=1), 0.0)[labels] / int((counts > 0).sum())
    weight = torch.zeros(classes, width, dtype=torch.float64) if start is None else start.weight.clone()
    bias = torch.zeros(classes, dtype=torch.float64) if start is None else start.bias.clone()
    weight.requires_grad_(), bias.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=steps, tolerance_grad=1e-7, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = F.cross_entropy(F.linear(x, weight, bias), labels, reduction="none")
        loss = (share * losses).sum() + penalty / 2 * weight.square().sum() / width
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return LinearProbe(mean, std, weight.detach(), bias.detach())


def choose_penalty(features: Tensor, labels: Tensor, folds: Tensor, classes: int) -> float:
    """The value of ``PENALTIES`` with the best cross-validated accuracy (mean over classes); the largest of equal ones.

    folds: int64 ``[n]``: fold of each image; all images of a patient must be in one fold.
    """
    candidates = sorted(PENALTIES, reverse=True)
    hits = torch.zeros(len(candidates), classes, dtype=torch.float64)
    for fold in folds.unique().tolist():
        test = folds == fold
        probe = None
        for number, penalty in enumerate(candidates):  # From strong to weak, each starting from the previous probe
            probe = fit(features[~test], labels[~test], classes, penalty, probe)
            right = probe.predict(features[test]) == labels[test]
            hits[number].index_add_(0, labels[test], right.double())
    share = (hits / torch.bincount(labels, minlength=classes).clamp(min=1)).mean(1)
    return candidates[int(share.argmax())]  # The first of equal maxima
