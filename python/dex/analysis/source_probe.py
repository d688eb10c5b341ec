"""Can a linear probe predict the modality of images from unseen sources?

A probe that is tested on its training sources may only recognise sources. Shape letters: n images, D width, C classes,
G sources.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dex.analysis.intervals import Interval, balanced_accuracy, bca
from dex.analysis.linear_probe import STEPS, fit

FOLDS = 5
"""The sources of each class are spread over the folds in random order."""
PENALTY = 0.1
"""Of ``dex.analysis.linear_probe.fit``; the same for all probes, so that they can be compared."""
PIXELS = 16
"""Side of the reference pictures in pixels."""


def leave_sources_out(features: Tensor, labels: Tensor, sources: Tensor, *, steps: int = STEPS) -> Interval | None:
    """Balanced accuracy of a standardised linear probe, cross-validated by source, with its interval over sources
    (``dex.analysis.intervals.bca``).

    Only classes with at least two sources are used, since others cannot be learned without their own source. None if
    there are fewer than two such classes.

    Args:
        features: ``[n, D]``. labels, sources: int64 ``[n]``.
        steps: largest number of optimizer steps.
    """
    labels, sources = labels.cpu(), sources.cpu()
    by_class = {c: sources[labels == c].unique() for c in labels.unique().tolist()}
    used = [c for c, sources_of_class in by_class.items() if len(sources_of_class) >= 2]
    if len(used) < 2:
        return None
    keep = (labels[:, None] == torch.tensor(used)).any(1)
    x, sources = features.cpu()[keep].double(), sources[keep]
    classes = torch.searchsorted(torch.tensor(used), labels[keep])
    generator = torch.Generator().manual_seed(0)
    fold_of: dict[int, int] = {}
    for c in used:
        shuffled = by_class[c][torch.randperm(len(by_class[c]), generator=generator)]
        for number, source in enumerate(shuffled.tolist()):
            fold_of.setdefault(source, number % FOLDS)
    fold = torch.tensor([fold_of[source] for source in sources.tolist()])
    right = torch.zeros(len(x), dtype=torch.bool)
    for number in fold.unique().tolist():
        test = fold == number
        probe = fit(x[~test], classes[~test], len(used), PENALTY, steps=steps)
        right[test] = probe.predict(x[test]) == classes[test]
    return bca(*balanced_accuracy(right, classes, sources))


def pixels(images: Tensor) -> Tensor:
    """The reference features: ``images`` uint8 ``[n, 3, S, S]`` as grey pictures of 16 x 16 pixels, ``[n, 256]``."""
    grey = torch.cat([part.float().mean(1, keepdim=True) for part in images.split(256)])
    return F.interpolate(grey, (PIXELS, PIXELS), mode="area").flatten(1) / 255
