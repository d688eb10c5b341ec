"""Can a linear map tell the modality of images from sources that it has not seen?

A probe that is judged by images of the sources it learned from recognises sources. Shape letters: n images, D width,
C classes, G sources.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dex.analysis.intervals import Interval, balanced_accuracy, bca
from dex.analysis.linear_probe import STEPS, fit

FOLDS, PENALTY = 5, 0.1
PIXELS = 16
"""Side of the small pictures that are the reference, pixels."""


def leave_sources_out(
    features: Tensor,
    labels: Tensor,
    sources: Tensor,
    *,
    folds: int = FOLDS,
    penalty: float = PENALTY,
    steps: int = STEPS,
    seed: int = 0,
) -> Interval | None:
    """Balanced accuracy of a standardised linear probe, each fold of sources judged by a probe of the others; the
    interval is over sources (`dex.analysis.intervals.bca`).

    Only classes with two sources or more are judged: the others cannot be known without their own source. None where
    fewer than two such classes are left.

    Args:
        features: ``[n, D]``. labels, sources: int64 ``[n]``.
        folds: sources of each class are dealt to them in an order drawn by ``seed``.
        penalty: of `dex.analysis.linear_probe.fit`; the same for everything that is compared.
        steps: of its optimizer, at most.
    """
    labels, sources = labels.cpu(), sources.cpu()
    of_class = {c: sources[labels == c].unique() for c in labels.unique().tolist()}
    judged = [c for c, own in of_class.items() if len(own) >= 2]
    if len(judged) < 2:
        return None
    keep = (labels[:, None] == torch.tensor(judged)).any(1)
    x, sources = features.cpu()[keep].double(), sources[keep]
    classes = torch.searchsorted(torch.tensor(judged), labels[keep])
    generator = torch.Generator().manual_seed(seed)
    fold_of: dict[int, int] = {}
    for c in judged:
        own = of_class[c][torch.randperm(len(of_class[c]), generator=generator)]
        for place, source in enumerate(own.tolist()):
            fold_of.setdefault(source, place % folds)
    fold = torch.tensor([fold_of[source] for source in sources.tolist()])
    right = torch.zeros(len(x), dtype=torch.bool)
    for number in fold.unique().tolist():
        test = fold == number
        probe = fit(x[~test], classes[~test], len(judged), penalty, steps=steps)
        right[test] = probe.predict(x[test]) == classes[test]
    return bca(*balanced_accuracy(right, classes, sources), seed=seed)


def pixels(images: Tensor) -> Tensor:
    """The reference features: ``images`` uint8 ``[n, 3, S, S]`` as grey pictures of 16 x 16 pixels, ``[n, 256]``."""
    grey = torch.cat([part.float().mean(1, keepdim=True) for part in images.split(256)])
    return F.interpolate(grey, (PIXELS, PIXELS), mode="area").flatten(1) / 255
