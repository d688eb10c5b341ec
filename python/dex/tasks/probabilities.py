"""Probabilities of a fine-tuned model for frames, at their own size.

Shape letters: n frames, b frames of a batch, H rows and W columns of a frame, S side of the model's images, C outputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dex.analysis.evaluation import autocast
from dex.data import center
from dex.tasks.geometry import back_probabilities
from dex.tasks.load import LoadedTask
from dex.tasks.task_dataset import square

OVERLAP = 0.5
"""Overlap of neighbouring windows, as a share."""


@torch.no_grad()
def of_frames(
    loaded: LoadedTask,
    images: np.ndarray,
    spacing: tuple[float, float] | None = None,
    *,
    batch_size: int = 16,
    precision: str = "fp32",
    window: float | None = None,
) -> Iterator[Tensor]:
    """Batches of the frames' probabilities, in order, float32 on the host: ``[b, C, H, W]`` for segmentation, with the
    background first, or ``[b, C]`` for classification.

    Args:
        images: uint8 ``[n, H, W]`` or ``[n, H, W, 3]``, as from ``dex.tasks.cases.read``.
        spacing: of rows and columns, in mm; None: pixels are square.
        window: None applies the model to whole frames, as in training. A factor above 1 enlarges frames to
            ``window * S`` and averages over overlapping windows of side S; only for segmentation.

    Runs on the model's device. Raises: ValueError naming the argument.
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
        raise ValueError(f"images: expected uint8 [n, H, W] or [n, H, W, 3], got {images.dtype} {list(images.shape)}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size!r}")
    check_window(loaded, window)
    model, segments = loaded.model, loaded.task.kind == "segmentation"
    device = model.encoder.pos_embed.device
    size = loaded.img_size if window is None else round(window * loaded.img_size)
    height, width = images.shape[1:3]
    for start in range(0, len(images), batch_size):
        squares = square(images[start : start + batch_size], None, size, spacing)
        batch = center(squares.images.to(device).expand(-1, 3, -1, -1), size, model.encoder.in_chans)
        with autocast(device, precision):
            logits = model(batch) if window is None else _windows(loaded, batch)
        probabilities = logits.float().softmax(1).cpu()
        yield back_probabilities(probabilities, squares.place, height, width) if segments else probabilities


def check_window(loaded: LoadedTask, window: float | None) -> None:
    """ValueError unless the model can be applied in such windows."""
    if window is None:
        return
    if loaded.task.kind != "segmentation":
        raise ValueError(f"window: expected none for a {loaded.task.kind}, got {window!r}")
    if not 1 < window <= 16:
        raise ValueError(f"window: expected a factor above 1, at most 16, got {window!r}")


def _windows(loaded: LoadedTask, images: Tensor) -> Tensor:
    """Logits ``[b, C, s, s]`` of ``images [b, 3, s, s]``, s above S, averaged over overlapping windows."""
    from monai.inferers import sliding_window_inference

    side = (loaded.img_size, loaded.img_size)
    return sliding_window_inference(
        images, side, len(images), lambda part: F.log_softmax(loaded.model(part).float(), 1), OVERLAP, mode="gaussian"
    )
