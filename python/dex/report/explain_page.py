"""The page of ``dex explain``: a scan, its experts, its loss with other experts, and the most similar training images.

It contains the scan and training images: share it only with people who may see both.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dex.analysis.conclusion import format_interval
from dex.analysis.intervals import Interval
from dex.analysis.one_image import change
from dex.inference.explain_job import Explanation, Neighbour
from dex.report import document
from dex.report.analysis_parts import reading, rows_table
from dex.report.charts import esc, image_uri
from dex.report.document import Section
from dex.report.parts import grid
from dex.report.pictures import matrix

MODE = 0o600
_SIDE = 160
_PRIVATE = (
    "This page contains the scan and training images. Nothing has been sent anywhere; anyone you give this page to "
    "receives the images"
)


def write(explanation: Explanation, out: Path) -> None:
    """Write the page to ``out``, whole or not at all, readable by its owner alone."""
    title = explanation.file if len(explanation.labels) == 1 else f"{explanation.file}, {explanation.label}"
    sections = [
        Section("route", "Which experts it takes", _route(explanation)),
        Section("experts", "With another expert", _experts(explanation)),
        Section("modalities", "With the experts of a modality", _usual(explanation)),
        Section("alike", "Similar training images", _similar(explanation)),
    ]
    page = document.document(
        "Why these experts?", title, _headline(explanation), [_PRIVATE, *explanation.notes], sections
    )
    document.write(page, out, MODE)


def sentence(explanation: Explanation) -> str:
    """How much the scan's loss depends on its experts, no more than the intervals allow."""
    own = explanation.alternatives.own
    text = f"The masked loss is {float(own.mean()):.3f}, mean of {len(own)} masks"
    by_name = {usual.modality: usual.change for usual in explanation.usual}
    own_modality = by_name.pop(explanation.modality, None)
    if own_modality is not None:
        difference = format_interval(own_modality, signed=True)
        text += f"; with the usual experts of {explanation.modality} it changes by {difference}"
    higher = [name for name, interval in by_name.items() if interval.low > 0]
    lower = [name for name, interval in by_name.items() if interval.high < 0]
    unclear = [name for name in by_name if name not in higher + lower]
    parts = [
        f"{word} with those of {', '.join(names)}"
        for word, names in (("higher", higher), ("lower", lower), ("not clearly different", unclear))
        if names
    ]
    return f"{text}. It is {'; '.join(parts)}." if parts else f"{text}."


def _headline(explanation: Explanation) -> str:
    modality = explanation.modality or "not stated"
    several = f", image {explanation.label} of {len(explanation.labels)}" if len(explanation.labels) > 1 else ""
    about = f"{explanation.run}, step {explanation.step:,}. Modality: {modality}{several}."
    return (
        f'<p class="verdict">{esc(sentence(explanation))}</p><p class="lead">{esc(about)}</p>'
        f'<figure class="scan">{_thumbnail(explanation.image, "the scan", 320)}</figure>'
    )


def _route(explanation: Explanation) -> str:
    whole, masked = explanation.whole, explanation.alternatives.routes
    count = len(explanation.alternatives.own)
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
            f"Masked, mean of {count} masks",
            names,
            columns,
            of_masked,
            top=1.0,
            marked=most,
            unit="framed: chosen most often",
        ),
    ]
    lines = []
    for i, name in enumerate(names):
        experts, gates = whole.experts[i][0].tolist(), whole.gates[i][0].tolist()
        with_gates = ", ".join(f"{e} ({g:.0%})" for e, g in zip(experts, gates, strict=True))
        same_first = int((masked.experts[i][:, 0].cpu() == experts[0]).sum())
        same_set = int((masked.experts[i].cpu().long().sort(1).values == torch.tensor(sorted(experts))).all(1).sum())
        lines.append([name, with_gates, f"{same_first} of {count}", f"{same_set} of {count}"])
    read = (
        "The router's probabilities of all experts. The encoder is used on whole images but trained on masked ones, "
        "and the losses below are those of masked images. Compare the two: where they differ, the experts have "
        "learned less that is of use for this scan. Probabilities show what the router prefers, not what the experts "
        "contribute, which the next section measures."
    )
    header = ["", "whole: experts (gate)", "masked: same first expert", "masked: same set"]
    return reading(read) + grid(figures) + rows_table(header, lines)


def _experts(explanation: Explanation) -> str:
    own = explanation.alternatives.own
    base = float(own.mean())
    changes = [[change(losses, own) for losses in layer] for layer in explanation.alternatives.swapped]
    width = max(len(layer) for layer in changes)
    values = [_padded([100 * c.value / base for c in layer], width) for layer in changes]
    top = max((abs(v) for row in values for v in row if v is not None), default=1.0)
    firsts = [_most(experts[:, :1])[0] for experts in explanation.alternatives.routes.experts]
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
            lines.append([name, str(first), _percent(best, others[best], base), _percent(worst, others[worst], base)])
    read = (
        "The change of the masked loss when, in one layer, another expert takes the place and the gate of the first "
        "choice; if it was chosen too, the two trade places. Values near 0 are experts that could be exchanged. The "
        "framed expert is not at 0 if some masks choose another one first. Intervals are over the masks of this scan. "
        "The table picks the best of several alternatives, so a value below 0 occurs by chance more often than its "
        "interval suggests."
    )
    header = ["", "first expert", "best other", "worst other"]
    return reading(read) + grid([figure]) + rows_table(header, lines)


def _percent(expert: int, interval: Interval, base: float) -> str:
    value, low, high = (100 * v / base for v in interval)
    return f"{expert}: {value:+.1f} % [{low:.1f}, {high:.1f}]"


def _usual(explanation: Explanation) -> str:
    if not explanation.usual:
        return ""
    base = float(explanation.alternatives.own.mean())
    ordered = sorted(explanation.usual, key=lambda usual: usual.change.value)
    lines = []
    for usual in ordered:
        sets = "; ".join("+".join(map(str, s.experts.tolist())) for s in usual.sets)
        share = sum(s.share for s in usual.sets) / len(usual.sets)
        percent = f"{100 * usual.change.value / base:+.1f} %"
        lines.append([usual.modality, format_interval(usual.change, signed=True), percent, f"{share:.0%}", sets])
    read = (
        "The change of this scan's masked loss when all layers use the set of experts that is most frequent among a "
        f"modality's training images, with their mean gates; from {explanation.compared} training images. If experts "
        "follow modality, the scan's own modality costs least. Intervals are over the masks of this scan. A set that "
        "few of a modality's images use is not typical of it."
    )
    header = ["usual experts of", "change of the loss", "", "images that use them", "experts by layer"]
    return reading(read) + rows_table(header, lines)


def _similar(explanation: Explanation) -> str:
    if not explanation.neighbours:
        return ""
    own = [set(experts[0].tolist()) for experts in explanation.whole.experts]
    figures = []
    for n in explanation.neighbours:
        shared = sum(len(a & set(b)) / len(a | set(b)) for a, b in zip(own, n.experts, strict=True)) / len(own)
        figures.append(_neighbour(n, shared))
    read = (
        f"The most similar of {explanation.compared} training images, taken from all modalities in turn. Similarity is "
        "the mean of the cosines of CLS tokens and of patch means, after the mean over training images is subtracted. "
        "Below each image: its experts by layer, unmasked, and the share of its expert sets in common with the scan "
        "(Jaccard index). Images that look similar to the model need not look similar to a radiologist."
    )
    return reading(read) + f'<div class="thumbs">{"".join(figures)}</div>'


def _neighbour(neighbour: Neighbour, shared: float) -> str:
    routes = "; ".join("+".join(map(str, experts)) for experts in neighbour.experts)
    return (
        f"<figure>{_thumbnail(neighbour.image, neighbour.id, _SIDE)}<figcaption><b>{esc(neighbour.modality)}</b> "
        f"cosine {neighbour.similarity:.2f}, shared {shared:.0%}<br><small>{esc(routes)}</small><br>"
        f"<small>{esc(neighbour.id)}</small></figcaption></figure>"
    )


def _thumbnail(image: Tensor, alt: str, side: int) -> str:
    data = io.BytesIO()
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture.thumbnail((side, side))
    picture.save(data, "JPEG", quality=88)
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img {size} alt="{esc(alt)}" src="{image_uri(data.getvalue(), "jpeg")}">'


def _padded(values: list[float], width: int) -> list[float | None]:
    return [*values, *[None] * (width - len(values))]


def _most(experts: Tensor) -> list[int]:
    """The K experts that are most frequent in ``[V, K]``."""
    count = experts.cpu().long().flatten().bincount()
    return count.argsort(descending=True)[: experts.shape[1]].tolist()
