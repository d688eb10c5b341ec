"""The page of `dex explain`: one scan, its route, what other experts would cost, and the training images like it.

It holds the scan and training images: it belongs to whoever may see both.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dex.analysis.conclusion import told
from dex.analysis.intervals import Interval
from dex.analysis.one_image import change
from dex.inference.explain_job import Explanation, Neighbour
from dex.report import document
from dex.report.analysis_parts import reading, rows_table
from dex.report.charts import esc
from dex.report.document import Section
from dex.report.parts import grid
from dex.report.pictures import matrix

MODE = 0o600
_SIDE = 160
_PRIVATE = (
    "This page holds the scan itself and images of the training set. Nothing has left this machine; who receives the "
    "page receives the images"
)


def write(found: Explanation, out: Path) -> None:
    """Write the page to ``out``, whole or not at all, readable by its owner alone."""
    title = found.file if len(found.labels) == 1 else f"{found.file}, {found.label}"
    sections = [
        Section("route", "The route", _route(found)),
        Section("experts", "With another expert", _experts(found)),
        Section("modalities", "With the experts of a modality", _usual(found)),
        Section("alike", "Training images that are alike", _alike(found)),
    ]
    page = document.document("Why these experts?", title, _headline(found), [_PRIVATE, *found.notes], sections)
    document.write(page, out, MODE)


def sentence(found: Explanation) -> str:
    """What its experts are worth to the scan, no more than the intervals allow."""
    own = f"The masked loss is {float(found.alternatives.own.mean()):.3f}, mean of {len(found.alternatives.own)} masks"
    if not found.usual:
        return f"{own}."
    by_name = {usual.modality: usual.change for usual in found.usual}
    own_kind = by_name.pop(found.modality, None)
    text = f"{own}"
    if own_kind is not None:
        text += f"; with the usual experts of {found.modality} it changes by {told(own_kind, signed=True)}"
    dearer = [name for name, interval in by_name.items() if interval.low > 0]
    cheaper = [name for name, interval in by_name.items() if interval.high < 0]
    same = [name for name in by_name if name not in dearer + cheaper]
    parts = [
        f"{word} with those of {', '.join(names)}"
        for word, names in (("higher", dearer), ("lower", cheaper), ("not told apart", same))
        if names
    ]
    return f"{text}. It is {'; '.join(parts)}." if parts else f"{text}."


def _headline(found: Explanation) -> str:
    kind = found.modality or "not stated"
    several = f", image {found.label} of {len(found.labels)}" if len(found.labels) > 1 else ""
    about = f"{found.run}, step {found.step:,}. Modality: {kind}{several}."
    return (
        f'<p class="verdict">{esc(sentence(found))}</p><p class="lead">{esc(about)}</p>'
        f'<figure class="scan">{_thumbnail(found.image, "the scan", 320)}</figure>'
    )


def _route(found: Explanation) -> str:
    whole, masked = found.whole, found.alternatives.routes
    count = len(found.alternatives.own)
    names = [f"layer {i}" for i in range(len(whole.gates))]
    width = max(p.shape[1] for p in whole.probabilities)
    columns = [str(e) for e in range(width)]
    of_whole = [_padded(p[0].tolist(), width) for p in whole.probabilities]
    of_masked = [_padded(p.mean(0).tolist(), width) for p in masked.probabilities]
    chosen = [(i, e) for i, experts in enumerate(whole.experts) for e in experts[0].tolist()]
    most = [(i, e) for i, experts in enumerate(masked.experts) for e in _most(experts)]
    figures = [
        matrix("The whole image", names, columns, of_whole, top=1.0, marked=chosen, unit="framed: chosen"),
        matrix(
            f"Masked, mean of {count} masks", names, columns, of_masked, top=1.0, marked=most, unit="framed: most often"
        ),
    ]
    lines = []
    for i, name in enumerate(names):
        experts, gates = whole.experts[i][0].tolist(), whole.gates[i][0].tolist()
        chosen_now = ", ".join(f"{e} ({g:.0%})" for e, g in zip(experts, gates, strict=True))
        same = int((masked.experts[i][:, 0].cpu() == experts[0]).sum())
        sets = int((masked.experts[i].cpu().long().sort(1).values == torch.tensor(sorted(experts))).all(1).sum())
        lines.append([name, chosen_now, f"{same} of {count}", f"{sets} of {count}"])
    read = (
        "The router's probabilities of all experts. A user of the encoder gives whole images; the loss below is "
        "that of masked ones, as in training. Where the two differ, what training taught serves this scan less. "
        "Probabilities say what the router prefers, not what the experts are worth: that is the next section."
    )
    header = ["", "whole: experts (gate)", "masked: same first expert", "masked: same set"]
    return reading(read) + grid(figures) + rows_table(header, lines)


def _experts(found: Explanation) -> str:
    own = found.alternatives.own
    base = float(own.mean())
    changes = [[change(losses, own) for losses in layer] for layer in found.alternatives.swapped]
    width = max(len(layer) for layer in changes)
    values = [_padded([100 * c.value / base for c in layer], width) for layer in changes]
    top = max((abs(v) for row in values for v in row if v is not None), default=1.0)
    firsts = [_most(experts[:, :1])[0] for experts in found.alternatives.routes.experts]
    names = [f"layer {i}" for i in range(len(changes))]
    figure = matrix(
        "Change of the masked loss",
        names,
        [str(e) for e in range(width)],
        values,
        top=top,
        digits=1,
        unit="% of the scan's own; framed: its most frequent first expert",
        marked=list(enumerate(firsts)),
    )
    lines = []
    for name, layer, first in zip(names, changes, firsts, strict=True):
        others = {e: c for e, c in enumerate(layer) if e != first}
        if others:
            best, worst = (pick(others, key=lambda e: others[e].value) for pick in (min, max))
            lines.append([name, str(first), _told(best, others[best], base), _told(worst, others[worst], base)])
    read = (
        "What the masked loss becomes when an expert takes the place, and the gate, of the first choice in one "
        "layer; one that was chosen too trades places with it. The framed expert is not at 0 where other masks "
        "choose another one first. Intervals are over the masks of this one scan. The best of several alternatives "
        "is picked here, so that a value below 0 comes by chance more often than its interval says."
    )
    header = ["", "first expert", "best other", "worst other"]
    return reading(read) + grid([figure]) + rows_table(header, lines)


def _told(expert: int, interval: Interval, base: float) -> str:
    share = [100 * v / base for v in interval]
    return f"{expert}: {share[0]:+.1f} % [{share[1]:.1f}, {share[2]:.1f}]"


def _usual(found: Explanation) -> str:
    if not found.usual:
        return ""
    base = float(found.alternatives.own.mean())
    ordered = sorted(found.usual, key=lambda usual: usual.change.value)
    lines = []
    for usual in ordered:
        sets = "; ".join("+".join(map(str, s.experts.tolist())) for s in usual.sets)
        share = sum(s.share for s in usual.sets) / len(usual.sets)
        percent = f"{100 * usual.change.value / base:+.1f} %"
        lines.append([usual.modality, told(usual.change, signed=True), percent, f"{share:.0%}", sets])
    read = (
        "The masked loss of this scan when all layers take the set of experts that a modality's training images "
        f"most often take, with their mean gates; from {found.compared} training images. Intervals are over the "
        "masks of this scan. Where few of a modality's images take that set, it stands for little."
    )
    header = ["usual experts of", "change of the loss", "", "images that take them", "experts by layer"]
    return reading(read) + rows_table(header, lines)


def _alike(found: Explanation) -> str:
    if not found.neighbours:
        return ""
    own = [set(experts[0].tolist()) for experts in found.whole.experts]
    figures = []
    for n in found.neighbours:
        shared = sum(len(a & set(b)) / len(a | set(b)) for a, b in zip(own, n.experts, strict=True)) / len(own)
        figures.append(_neighbour(n, shared))
    read = (
        f"The nearest of {found.compared} training images, spread over the modalities, by the mean cosine of CLS "
        "tokens and means of patches once their mean is taken away; below each its experts by layer as whole "
        "images, and how much of its sets the scan shares (Jaccard index). Alike to the model is not alike to a "
        "radiologist."
    )
    return reading(read) + f'<div class="thumbs">{"".join(figures)}</div>'


def _neighbour(neighbour: Neighbour, shared: float) -> str:
    routes = "; ".join("+".join(map(str, experts)) for experts in neighbour.experts)
    return (
        f"<figure>{_thumbnail(neighbour.image, neighbour.id, _SIDE)}<figcaption><b>{esc(neighbour.modality)}</b> "
        f"cosine {neighbour.similarity:.2f}, shared {shared:.0%}<br><small>{esc(routes)}</small><br>"
        f"<small>{esc(neighbour.id)}</small></figcaption></figure>"
    )


def _thumbnail(image: Tensor, words: str, side: int) -> str:
    data = io.BytesIO()
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture.thumbnail((side, side))
    picture.save(data, "JPEG", quality=88)
    encoded = base64.b64encode(data.getvalue()).decode()
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img {size} alt="{esc(words)}" src="data:image/jpeg;base64,{encoded}">'


def _padded(values: list[float], width: int) -> list[float | None]:
    return [*values, *[None] * (width - len(values))]


def _most(experts: Tensor) -> list[int]:
    """The K experts that rows of ``[V, K]`` hold most often."""
    count = experts.cpu().long().flatten().bincount()
    return count.argsort(descending=True)[: experts.shape[1]].tolist()
