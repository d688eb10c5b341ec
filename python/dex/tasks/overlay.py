"""A picture of an image, its true mask and its predicted mask.

Colours distinguish eight classes, also for colour-blind readers, and each region shows the number of its class. Truth
and prediction differ by panel, not by colour. Shape letters: H, W of a frame; n frames.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dex.tasks.task import IGNORED

COLOURS = (
    (99, 197, 194),
    (242, 160, 90),
    (106, 85, 176),
    (176, 58, 91),
    (143, 206, 136),
    (183, 165, 242),
    (61, 125, 58),
    (138, 109, 0),
)
"""Light and dark tones of the pages' palette: the eight with the largest minimum difference, also without red, green
or blue."""
_PAGE, _INK, _QUIET = (250, 249, 246), (28, 36, 41), (90, 101, 108)
_FILL = 0.38
_PANEL, _LARGEST = 320, 640
"""Minimum and maximum of a panel's longer side, in pixels."""
_MARGIN, _LINE = 10, 18
_NUMBERED = 0.004
"""Share of a panel's pixels from which a region shows its number."""


def overlay(
    image: np.ndarray,
    prediction: np.ndarray | None,
    classes: Sequence[str],
    *,
    truth: np.ndarray | None = None,
    title: str = "",
    spacing: tuple[float, float] = (1.0, 1.0),
) -> np.ndarray:
    """uint8 ``[h, w, 3]``: panels "image" and, if given, "truth" and "prediction", above a legend.

    image: uint8 ``[H, W]`` or ``[H, W, 3]``. prediction, truth: uint8 ``[H, W]``, 0 background, i + 1 ``classes[i]``,
    255 ignored. spacing: of rows and columns; pixels are shown square. The prediction's panel shows the truth's
    outlines in white. ValueError: sizes differ, or a value is beyond the classes.
    """
    masks = {"truth": truth, "prediction": prediction}
    for name, mask in masks.items():
        _check(name, mask, image, len(classes))
    height, width = _sides(*image.shape[:2], spacing)
    grey = _resized(image, height, width, Image.Resampling.BICUBIC)
    large = {name: _resized(m, height, width, Image.Resampling.NEAREST) for name, m in masks.items() if m is not None}
    panels = [("image", grey)]
    for name, mask in large.items():
        panel = painted(grey, mask)
        if name == "prediction" and truth is not None:
            panel[_outline(large["truth"])] = 255
        panels.append((name, _numbered(panel, mask, len(classes))))
    shown = sorted({int(v) for mask in masks.values() if mask is not None for v in np.unique(mask)} - {0})
    return _laid_out(panels, shown, classes, title, truth is not None and prediction is not None)


def png(picture: np.ndarray) -> bytes:
    """A picture from ``overlay`` as a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def telling_frame(prediction: np.ndarray, truth: np.ndarray | None = None) -> int:
    """The number of the frame of masks ``[n, H, W]`` with most labelled pixels in the truth, or in the prediction if
    the truth is empty or None; the middle frame if nothing is labelled."""
    for masks in (truth, prediction):
        if masks is not None:
            labelled = ((masks != 0) & (masks != IGNORED)).sum((1, 2))
            if labelled.any():
                return int(labelled.argmax())
    return len(prediction) // 2


def painted(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image ``[H, W, 3]`` with the mask's classes filled and outlined; ignored pixels are hatched."""
    out = image.astype(np.float32)
    rows, columns = np.indices(mask.shape)
    for value in np.unique(mask[mask != 0]):
        region = mask == value
        if value == IGNORED:
            out[region & ((rows + columns) % 8 < 2)] = _QUIET
            continue
        colour = np.array(colour_of(int(value) - 1), np.float32)
        out[region] = (1 - _FILL) * out[region] + _FILL * colour
    edge = _outline(mask)
    for value in np.unique(mask[edge]):
        if value not in (0, IGNORED):
            out[edge & (mask == value)] = colour_of(int(value) - 1)
    return out.round().clip(0, 255).astype(np.uint8)


def colour_of(number: int) -> tuple[int, int, int]:
    """The colour of a class, from 0; beyond the eighth class colours repeat, and only numbers distinguish classes."""
    return COLOURS[number % len(COLOURS)]


def _check(name: str, mask: np.ndarray | None, image: np.ndarray, classes: int) -> None:
    if mask is None:
        return
    if mask.shape != image.shape[:2]:
        raise ValueError(f"{name}: expected a mask {list(image.shape[:2])} as its image, got {list(mask.shape)}")
    most = int(mask.max(initial=0, where=mask != IGNORED))
    if most > classes:
        raise ValueError(f"{name}: expected values of 0 to {classes}, or {IGNORED}, got {most}")


def _sides(height: int, width: int, spacing: tuple[float, float]) -> tuple[int, int]:
    tall, wide = height * spacing[0], width * spacing[1]
    scale = min(max(_PANEL, max(height, width)), _LARGEST) / max(tall, wide)
    return max(1, round(tall * scale)), max(1, round(wide * scale))


def _resized(array: np.ndarray, height: int, width: int, how: Image.Resampling) -> np.ndarray:
    picture = Image.fromarray(np.ascontiguousarray(array)).resize((width, height), how)
    colours = array.ndim == 3 or how == Image.Resampling.BICUBIC
    return np.asarray(picture.convert("RGB") if colours else picture)


def _outline(mask: np.ndarray) -> np.ndarray:
    """bool ``[H, W]``: pixels of a class with a neighbour that is not of it."""
    padded = np.pad(mask, 1, mode="edge")
    edge = np.zeros(mask.shape, bool)
    for rows, columns in ((0, 1), (2, 1), (1, 0), (1, 2)):
        edge |= padded[rows : rows + mask.shape[0], columns : columns + mask.shape[1]] != mask
    return edge & (mask != 0) & (mask != IGNORED)


def _numbered(panel: np.ndarray, mask: np.ndarray, classes: int) -> np.ndarray:
    picture = Image.fromarray(panel)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for value in range(1, classes + 1):
        pixels = np.argwhere(mask == value)
        if len(pixels) < _NUMBERED * mask.size:
            continue
        middle = pixels[((pixels - pixels.mean(0)) ** 2).sum(1).argmin()]  # A pixel of the class, also in a ring
        place = (int(middle[1]), int(middle[0]))
        draw.text(place, str(value), (255, 255, 255), font, "mm", stroke_width=2, stroke_fill=(0, 0, 0))
    return np.asarray(picture)


def _laid_out(
    panels: Sequence[tuple[str, np.ndarray]], shown: Sequence[int], classes: Sequence[str], title: str, both: bool
) -> np.ndarray:
    height, width = panels[0][1].shape[:2]
    total = len(panels) * (width + _MARGIN) + _MARGIN
    names = ["ignored" if v == IGNORED else f"{v} {classes[v - 1]}" for v in shown] or ["nothing labelled"]
    font, bold = ImageFont.load_default(12), ImageFont.load_default(14)
    each = min(total - 2 * _MARGIN, 28 + math.ceil(max(font.getlength(name) for name in names)))
    across = max(1, (total - 2 * _MARGIN) // each)
    top = _MARGIN + (_LINE + 4 if title else 0) + _LINE
    legend = top + height + _MARGIN
    lines = math.ceil(len(names) / across) + both
    page = Image.new("RGB", (total, legend + lines * _LINE + _MARGIN // 2), _PAGE)
    draw = ImageDraw.Draw(page)
    if title:
        draw.text((_MARGIN, _MARGIN - 2), _cut(title, bold, total - 2 * _MARGIN), _INK, bold)
    for number, (name, panel) in enumerate(panels):
        left = _MARGIN + number * (width + _MARGIN)
        draw.text((left, top - _LINE), name, _QUIET, font)
        page.paste(Image.fromarray(panel), (left, top))
    for number, name in enumerate(names):
        x, y = _MARGIN + number % across * each, legend + number // across * _LINE
        if shown:
            value = shown[number]
            colour = _QUIET if value == IGNORED else colour_of(value - 1)
            draw.rectangle((x, y + 2, x + 13, y + 13), colour, _INK)
        draw.text((x + 19 if shown else x, y), _cut(name, font, each - 22 if shown else each), _INK, font)
    if both:
        text = "White outlines in the prediction: truth."
        draw.text((_MARGIN, legend + (lines - 1) * _LINE), text, _QUIET, font)
    return np.asarray(page)


def _cut(text: str, font: ImageFont.FreeTypeFont, most: float) -> str:
    while text and font.getlength(text) > most:
        text = text[:-2].rstrip("…") + "…" if len(text) > 2 else ""
    return text
