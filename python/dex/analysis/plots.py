"""Pictures of a run as matplotlib figures, without a display; ``pixels`` renders one, ``save`` writes it.

Shape letters: R rows (images), S side in pixels, E experts, M modalities.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from dex.analysis.few_shot import Point
from dex.common import atomic

_INK = "#333333"


def reconstructions(
    original: np.ndarray, masked: np.ndarray, reconstruction: np.ndarray, labels: Sequence[str], title: str
) -> Figure:
    """Rows of original | masked | reconstruction, two rows side by side; arrays ``[R, S, S, 3]`` in [0, 1]."""
    count = len(labels)
    across = 2 if count > 4 else 1
    down = math.ceil(count / across)
    side, gap, block, row, top = 1.69, 0.07, 5.43, 1.93, 0.6  # Inches
    width, height = block * across + gap, row * down + top - 0.1
    figure = Figure(figsize=(width, height), dpi=110)
    figure.suptitle(title, fontsize=11, color=_INK, y=1 - 0.1 / height, va="top")
    # One pair of axes: a pair for every image would take longer than everything else.
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axis.set_axis_off()
    columns = (original, "original"), (masked, "masked"), (reconstruction, "reconstruction")
    for i in range(count):
        y = top + row * (i % down)
        for c, (images, name) in enumerate(columns):
            x = gap + block * (i // down) + (side + gap) * c
            axis.imshow(np.clip(images[i], 0, 1), interpolation="nearest", extent=(x, x + side, y + side, y))
            weight = "normal" if c else "bold"
            text, place = name if c else labels[i], (x + side / 2, y - 0.04)
            axis.text(*place, text, fontsize=8, color=_INK, weight=weight, ha="center", va="bottom")
    axis.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    return figure


def expert_heatmap(mass: Sequence[np.ndarray], modalities: Sequence[str], title: str) -> Figure:
    """One panel per layer: share of each modality's gate mass by expert; ``mass``: ``[M, E]`` each.

    Modalities without images are left out. All panels have the same scale, from 0 to the largest share.
    """
    present = [m for m in range(len(modalities)) if any(layer[m].sum() > 0 for layer in mass)]
    shares = [layer[present] / np.maximum(layer[present].sum(1, keepdims=True), 1e-12) for layer in mass]
    down = math.ceil(len(mass) / 4)
    across = math.ceil(len(mass) / down)
    experts = max(s.shape[1] for s in shares)
    width = across * max(2.2, 0.3 * experts + 0.3) + 2.2
    height = max(2.6, down * (0.27 * len(present) + 0.75) + 0.8)  # The label of the colour bar needs 2.6
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=11, color=_INK)
    axes = figure.subplots(down, across, squeeze=False, sharey=True)
    top = max(float(s.max(initial=0.0)) for s in shares) or 1.0
    image = None
    for layer, axis in enumerate(axes.flat):
        if layer >= len(shares):
            axis.set_axis_off()
            continue
        image = axis.imshow(shares[layer], cmap="viridis", vmin=0.0, vmax=top, aspect="auto")
        axis.set_title(f"layer {layer}", fontsize=9, color=_INK)
        columns = shares[layer].shape[1]
        axis.set_xticks(range(0, columns, max(1, columns // 8)))
        axis.set_yticks(range(len(present)), [modalities[m] for m in present])
        axis.tick_params(labelsize=8, length=2, colors=_INK)
        if layer + across >= len(shares):
            axis.set_xlabel("expert", fontsize=8, color=_INK)
    bar = figure.colorbar(image, ax=axes, shrink=0.85, aspect=30)
    bar.set_label("share of the modality's gate mass", fontsize=8, color=_INK)
    bar.ax.tick_params(labelsize=8)
    return figure


def loss_curves(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Masked loss, held-out loss, the two auxiliary losses, gradient norm and schedules, from ``metrics.jsonl``."""
    train = [r for r in rows if "loss" in r]
    held_out = [r for r in rows if "val_loss" in r]
    figure = Figure(figsize=(11, 6.2), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=11, color=_INK)
    axes = figure.subplots(2, 3)

    def draw(axis: Any, name: str, lines: Sequence[tuple[str, Sequence[Mapping[str, Any]], str]]) -> None:
        for key, source, label in lines:
            points = [(r["step"], r[key]) for r in source if r.get(key) is not None]
            if points:
                mark = "o" if len(points) < 30 else None
                axis.plot(*zip(*points, strict=True), label=label, linewidth=1.4, marker=mark, markersize=3)
        _style(axis, name, legend=len(lines) > 1)

    draw(axes[0, 0], "masked loss", [("loss", train, "training"), ("val_loss", held_out, "held out")])
    draw(axes[0, 1], "align loss", [("align_loss", train, "align")])
    draw(axes[0, 2], "balance loss", [("balance_loss", train, "balance")])
    by_modality = sorted({m for r in train for m in r["modality_loss"]})
    for name in by_modality:
        points = [(r["step"], r["modality_loss"][name]) for r in train if r["modality_loss"].get(name) is not None]
        axes[1, 0].plot(*zip(*points, strict=True), label=name, linewidth=1.1)
    _style(axes[1, 0], "masked loss by modality", legend=bool(by_modality))
    draw(axes[1, 1], "gradient norm before clipping", [("grad_norm", train, "norm")])
    draw(axes[1, 2], "learning rate", [("lr", train, "lr")])
    for axis in axes[1]:
        axis.set_xlabel("step", fontsize=8, color=_INK)
    return figure


def pixels(figure: Figure) -> np.ndarray:
    """The rendered figure, uint8 ``[height, width, 3]``."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def few_shot_curve(points: Sequence[Point], all_images: float, classes: int) -> Figure:
    """Accuracy by images per class: mean and 10 to 90 % of the draws. all_images: accuracy with all images."""
    shots = sorted({point.shots for point in points})
    values = [np.array([point.accuracy for point in points if point.shots == count]) for count in shots]
    low, high = (np.array([np.quantile(v, share) for v in values]) for share in (0.1, 0.9))
    figure = Figure(figsize=(5, 3.5), dpi=120, layout="constrained")
    axis = figure.subplots()
    axis.fill_between(shots, low, high, alpha=0.2)
    axis.plot(shots, [v.mean() for v in values], marker="o", label="few-shot linear, 10 to 90 % of draws")
    axis.axhline(all_images, linestyle="--", color=_INK, label="linear, all images")
    axis.axhline(1 / classes, linestyle=":", color="grey", label="chance")
    axis.set(xscale="log", xlabel="labelled images per class", ylabel="balanced accuracy", ylim=(0, 1.02))
    axis.set_xticks(shots, [str(count) for count in shots])
    axis.minorticks_off()
    axis.legend(fontsize=8, frameon=False)
    return figure


def save(picture: np.ndarray, path: Path, *, locked: bool = False) -> None:
    """Write ``pixels`` as a PNG atomically; ``locked`` as in ``atomic.writing``."""
    with atomic.writing(path, locked=locked) as file:
        Image.fromarray(picture).save(file, "PNG")


def _style(axis: Any, name: str, legend: bool) -> None:
    axis.set_title(name, fontsize=9, color=_INK)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.tick_params(labelsize=8, colors=_INK)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    if legend and axis.lines:
        axis.legend(fontsize=7, frameon=False, ncols=2 if len(axis.lines) > 5 else 1)


def feature_maps(images: np.ndarray, labels: Sequence[str], columns: Mapping[str, np.ndarray]) -> Figure:
    """A row per image: the image ``[n, S, S, 3]`` and, by title, colours ``[n, G, G, 3]`` in [0, 1] or a map ``[n, G,
    G]``, scaled from its smallest to its largest value."""
    across, down = 1 + len(columns), len(images)
    figure = Figure(figsize=(1.7 * across, 1.72 * down + 0.3), dpi=150, layout="constrained")
    axes = figure.subplots(down, across, squeeze=False)
    for i, row in enumerate(axes):
        for axis, (title, values) in zip(row, {"image": images, **columns}.items(), strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            for side in axis.spines.values():
                side.set_visible(False)
            axis.imshow(values[i], cmap="viridis", interpolation="nearest")
            if i == 0:
                axis.set_title(title, fontsize=8, color=_INK, pad=3)
        row[0].set_ylabel(labels[i], fontsize=8, color=_INK)
    return figure
