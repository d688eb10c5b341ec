"""The sections of an analysis that say what the experts are: routes, swaps, ablations, likeness."""

from __future__ import annotations

import torch
from torch import Tensor

from dex.analysis.conclusion import told
from dex.analysis.gradients import Conflict
from dex.analysis.swap import KINDS
from dex.inference.analyse_job import Analysis
from dex.report.analysis_parts import (
    Block,
    bar,
    block,
    cell,
    models,
    names,
    numbered,
    pair,
    present,
    rows_table,
)
from dex.report.charts import heatmap
from dex.report.parts import grid
from dex.report.pictures import Bars, bars, matrix

_COLOURS = dict(zip(KINDS, (2, 1, 0), strict=True))


def swap(analysis: Analysis) -> Block | None:
    """The swap gap by layer."""
    shown = [m for m in models(analysis) if m.found.gaps]
    if not analysis.found.gaps:
        return None
    values = [v for m in shown for g in m.found.gaps for v in (g.gap.low, g.gap.high)]
    span, figures, rows = (min(values), max(values)), [], []
    for model in shown:
        places = sorted({g.layer for g in model.found.gaps if g.layer is not None})
        by = {(g.kind, g.layer): g for g in model.found.gaps}
        series = [
            Bars(kind, [bar(by[kind, p].gap) if (kind, p) in by else None for p in (*places, None)], _COLOURS[kind])
            for kind in KINDS
            if any(g.kind == kind for g in model.found.gaps)
        ]
        unit = f"rise of the masked loss; own experts {model.found.loss.value:.3f}"
        groups = [*(f"layer {p}" for p in places), "all"]
        figures.append(bars(f"Swap gap, {model.name}", groups, series, unit=unit, span=span))
        for g in model.found.gaps:
            layer = "all" if g.layer is None else g.layer
            rows.append((model.name, g.kind, layer, *g.gap, g.own))
    lines = []
    for kind in KINDS:
        told_of = [next((g for g in m.found.gaps if g.kind == kind and g.layer is None), None) for m in shown]
        if any(told_of):
            lines.append([f"{kind}, all layers", *("–" if g is None else told(g.gap, signed=True) for g in told_of)])
    beyond = [m.found.modality_gap for m in shown]
    if any(beyond):
        lines.append(["other less same, paired", *("–" if g is None else told(g.gap, signed=True) for g in beyond)])
        rows += [(m.name, g.kind, "all", *g.gap, g.own) for m, g in zip(shown, beyond, strict=True) if g is not None]
    lines.append(["own experts (loss)", *(told(m.found.loss) for m in shown)])
    read = (
        "How much an image's masked loss rises when it is given the experts of another image of its modality, of "
        "an image of another modality, or random ones; in one layer alone, or in all at once. Experts that have "
        "specialised make the bar of the other modality rise above 0 and above that of the same modality, with the "
        "whole of its interval. Bars whose intervals hold 0 mean experts that can be exchanged, whatever the "
        "heatmap below looks like. The measure says that routing matters, not that it makes the model better: that "
        "takes a comparison with the monolithic control. Experts that are random and different also have a small "
        "gap, which step 0 shows."
    )
    header = ("model", "kind", "layer", "gap", "low", "high", "own_loss")
    drawn = pair(figures) + rows_table(["", *(m.name for m in shown)], lines)
    return block("swap", "Are the experts interchangeable?", read, drawn, figures, (header, rows))


def heatmaps(analysis: Analysis) -> Block | None:
    """Expert by modality, beside step 0 and chance, and the corrected information."""
    if not analysis.found.layers:
        return None
    shown = [m for m in models(analysis) if m.found.layers]
    kept, words = present(analysis), names(analysis)
    panels, rows, figures = {}, [], []
    for model in shown:
        for place, layer in enumerate(model.found.layers):
            kinds = [(model.name, layer.mass)]
            if model is shown[0]:
                kinds.append(("modalities permuted", layer.chance))
            for name, mass in kinds:
                share = (mass / mass.sum(1, keepdim=True).clamp(min=1e-12))[kept].tolist()
                panels[name, place] = share
                rows += [
                    (name, place, word, e, v) for word, row in zip(words, share, strict=True) for e, v in enumerate(row)
                ]
    top = max(v for share in panels.values() for row in share for v in row)
    order = [name for name in (shown[0].name, "step 0", "modalities permuted") if any(n == name for n, _ in panels)]
    order += [m.name for m in shown if m.name not in order]
    for place in range(len(analysis.found.layers)):
        for name in order:
            if (name, place) in panels:
                figures.append(heatmap(f"layer {place}, {name}", words, panels[name, place], top))
    read = (
        "The share of each modality's gate mass that each expert takes, masked images. The heatmap is no evidence "
        "of specialisation: a random router on random features shows one too, which is what step 0 is here for, "
        "and permuted labels show how uneven chance alone looks. The number is the corrected information of expert "
        "set and modality: 0 is chance, 1 tells the modality; chance stays below the column 'chance below' 19 "
        "times in 20. It says that routes follow modality, which step 0's do as well, not that the experts differ."
    )
    table = [
        [f"layer {place}, {view}", *(v for m in shown for v in _information(m.found.layers, place, view))]
        for place in range(len(analysis.found.layers))
        for view in ("masked", "whole")
    ]
    header = ["corrected information", *(h for m in shown for h in (m.name, "chance below", "p"))]
    drawn = rows_table(header, table) + f'<p class="soft">The full colour is a share of {top:.0%}.</p>' + grid(figures)
    data = (("model", "layer", "modality", "expert", "share"), rows)
    return block("experts", "Which expert takes which modality", read, drawn, figures, data, len(order))


def _information(layers: list, place: int, view: str) -> list[str]:
    if place >= len(layers):
        return ["–"] * 3
    found = getattr(layers[place], view)
    return [cell(found.value), cell(found.null_high), cell(found.p)]


def routing(analysis: Analysis) -> Block | None:
    """Entropy, sets in use, agreement of masked and whole images, and the information, as numbers."""
    if not analysis.found.layers:
        return None
    shown = [m for m in models(analysis) if m.found.layers]
    fields = ("entropy", "sets_masked", "sets_whole", "first_agreement")
    heads = ("entropy of p", "sets, masked", "sets, whole", "same first expert")
    rows, lines = [], []
    for place in range(len(analysis.found.layers)):
        for model in shown:
            if place < len(model.found.layers):
                layer = model.found.layers[place]
                entropy, masked, whole, agreement = values = [getattr(layer, f) for f in fields]
                lines.append(
                    [f"layer {place}, {model.name}", cell(entropy), str(masked), str(whole), f"{agreement:.0%}"]
                )
                rows.append((model.name, place, *values, *layer.masked, *layer.whole))
    read = (
        "Entropy of all probabilities of the router over log E: near 1 it has not decided, near 0 it is certain; "
        "it sees experts that are never chosen, which the entropy of the chosen gates does not. Sets: how many "
        "different sets of experts the held-out images take; few of them are few networks. Same first expert: how "
        "often a masked image and the whole one choose alike; where they do not, what was learned on masked images "
        "serves whole ones less. None of it says that the experts differ."
    )
    header = ["", *heads]
    data_header = ("model", "layer", *fields)
    data_header += tuple(f"{view}_{f}" for view in ("masked", "whole") for f in ("value", "raw", "null_high", "p"))
    return block("routing", "How the router decides", read, rows_table(header, lines), [], (data_header, rows))


def overlap(analysis: Analysis) -> Block | None:
    """Jaccard index of expert sets between modalities."""
    if not analysis.found.layers:
        return None
    kept, words = present(analysis), names(analysis)
    row_names, columns = numbered(words)
    figures, rows = [], []
    for place, layer in enumerate(analysis.found.layers):
        values = _nested(layer.overlap[kept][:, kept])
        unit = f"random sets: {layer.random_overlap:.2f}"
        figures.append(matrix(f"layer {place}", row_names, columns, values, top=1.0, unit=unit))
        for a, row in zip(words, values, strict=True):
            rows += [(place, a, b, v, layer.random_overlap) for b, v in zip(words, row, strict=True)]
    read = (
        "Mean Jaccard index of the expert sets of two images: 1 is the same set, and the number above each layer "
        "is what sets drawn at random have. Dark off the diagonal: the modalities share experts. Dark everywhere "
        "can also be a router that sends all images to a few experts; see the number of sets."
    )
    data = (("layer", "modality", "other", "jaccard", "random"), rows)
    return block("overlap", "Do modalities share experts?", read, grid(figures), figures, data, 2)


def ablation(analysis: Analysis) -> Block | None:
    """Rise of the loss by modality without an expert, in percent."""
    if not analysis.found.ablations:
        return None
    kept, words, found = present(analysis), names(analysis), analysis.found
    losses = [found.modality_loss[word] for word in words]
    rises = [
        [[100 * v / loss for v in row] for row, loss in zip(a.rise.T[kept].tolist(), losses, strict=True)]
        for a in found.ablations
    ]
    top = max((abs(v) for layer in rises for row in layer for v in row), default=1.0)
    figures, rows, lines = [], [], []
    for place, (layer, a) in enumerate(zip(rises, found.ablations, strict=True)):
        experts = [str(e) for e in range(len(layer[0]))]
        figures.append(
            matrix(f"layer {place}", words, experts, layer, top=top, digits=1, unit="% of the modality's loss")
        )
        for m, (word, row) in enumerate(zip(words, layer, strict=True)):
            users = a.users.T[kept][m].tolist()
            rows += [(place, word, e, float(a.rise[e, kept[m]]), v, users[e]) for e, v in enumerate(row)]
        means = sorted(sum(row[e] for row in layer) / len(layer) for e in range(len(experts)))
        middle = means[len(means) // 2]
        lines.append([f"layer {place}", *(f"{v:+.2f} %" for v in (means[0], middle, means[-1]))])
    read = (
        "The rise of each modality's masked loss when one expert is taken away and the images that used it take "
        "their next most probable one. The reference is the spread over experts: one that matters no more than the "
        "others says nothing, and neither does a value near 0, which is also that of an expert that few images "
        "use."
    )
    header = ("layer", "modality", "expert", "rise", "rise_percent", "share_of_users")
    spread = rows_table(["mean over modalities", "least", "median expert", "most"], lines)
    return block("ablation", "What is lost without an expert", read, grid(figures) + spread, figures, (header, rows), 2)


def similarity(analysis: Analysis) -> Block | None:
    """CKA of experts and director."""
    if not analysis.found.similarity:
        return None
    shown = [m for m in models(analysis) if m.found.similarity]
    figures, rows, lines = [], [], []
    for place, layer in enumerate(analysis.found.similarity):
        words = [str(e) for e in range(len(layer) - 1)]
        figures.append(matrix(f"layer {place}", [*words, "director"], [*words, "D"], _nested(layer), top=1.0))
        line = [f"layer {place}"]
        for model in shown:
            if place >= len(model.found.similarity):
                line += ["–", "–"]
                continue
            of_layer = model.found.similarity[place].double()
            experts = of_layer[:-1, :-1]
            apart = experts[~_diagonal(len(experts))]
            line += [cell(float(v.nanmean())) if len(v) else "–" for v in (apart, of_layer[-1, :-1])]
            kinds = [*(str(e) for e in range(len(experts))), "director"]
            for a, row in zip(kinds, _nested(of_layer), strict=True):
                rows += [(model.name, place, a, b, v) for b, v in zip(kinds, row, strict=True)]
        lines.append(line)
    read = (
        "Centred kernel alignment of what experts and director (D) make of the same tokens: 1 is equal up to "
        "rotation and scale, 0 nothing in common. Experts that started as copies begin at 1, drawn ones lower: "
        "read the number beside that of step 0. A high value between experts means like functions; it does not say "
        "whether the loss would notice an exchange, which the swap gap does."
    )
    header = ["mean", *(f"{m.name}: {what}" for m in shown for what in ("experts", "director to experts"))]
    data = (("model", "layer", "one", "other", "cka"), rows)
    drawn = rows_table(header, lines) + grid(figures)
    return block("similarity", "Do experts and director compute alike?", read, drawn, figures, data, 2)


def gradients(analysis: Analysis) -> Block | None:
    """Cosines of the gradients of modalities."""
    conflict = analysis.found.conflict
    if conflict is None:
        return None
    kept, words = present(analysis), names(analysis)
    row_names, columns = numbered(words)
    other = analysis.other.findings.conflict if analysis.other else None
    apart = ~_diagonal(len(kept))
    rows, lines = [], []
    for place, group in enumerate(conflict.groups):
        between = conflict.between[place][kept][:, kept]
        rows += [
            (group, a, b, v)
            for a, row in zip(words, _nested(between), strict=True)
            for b, v in zip(words, row, strict=True)
        ]
        values = between[apart]
        values = values[values.isfinite()]
        spread = [float(values.mean()), float(values.min()), float(values.max())] if len(values) else [None] * 3
        line = [group, *map(cell, spread), cell(float(conflict.within[place][kept].nanmean()))]
        if other is not None:
            line += _of_control(other, group, kept, apart)
        lines.append(line)
    drawn_groups = _some_groups(conflict.groups)
    figures = [
        matrix(
            group,
            row_names,
            columns,
            _nested(conflict.between[conflict.groups.index(group)][kept][:, kept]),
            top=1.0,
        )
        for group in drawn_groups
    ]
    read = (
        "Cosine of the gradients of two modalities' masked losses, by group of weights. The diagonal, two halves "
        "of one modality's images, is the reference: noise alone keeps it below 1, and modalities whose cosine is "
        "that of two halves of one do not conflict. Near 0 is no conflict either: the gradients have nothing to do "
        "with each other. Only values clearly below 0 pull apart."
    )
    header = ["mean cosine", "between modalities", "least", "most", "halves of one modality"]
    if other is not None:
        header += [f"{analysis.other.name}: between", "halves"]
    data = (("parameters", "modality", "other", "cosine"), rows)
    drawn = rows_table(header, lines) + grid(figures)
    return block("gradients", "Do modalities pull in different directions?", read, drawn, figures, data, 2)


def _of_control(conflict: Conflict, group: str, kept: list[int], apart: Tensor) -> list[str]:
    for name in (group, group.replace("experts", "MLP"), group.replace("MLP", "experts")):
        if name in conflict.groups:
            place = conflict.groups.index(name)
            between = conflict.between[place][kept][:, kept][apart]
            return [cell(float(v.nanmean())) for v in (between, conflict.within[place][kept])]
    return ["–", "–"]


def _some_groups(groups: tuple[str, ...]) -> list[str]:
    """Experts (or MLPs) and attention of the first, a middle and the last layer, and the decoder."""
    layers = sorted({int(g.split()[1].rstrip(":")) for g in groups if g.startswith("layer")})
    some = dict.fromkeys([layers[0], layers[len(layers) // 2], layers[-1]]) if layers else {}
    wanted = [g for layer in some for g in groups if g.startswith(f"layer {layer}:") and not g.endswith("router")]
    return [*wanted, *(g for g in groups if g == "decoder")]


def _diagonal(size: int) -> Tensor:

    return torch.eye(size, dtype=torch.bool)


def _nested(values: Tensor) -> list[list[float | None]]:
    """A matrix as lists; NaN as None."""
    return [[None if v != v else v for v in row] for row in values.tolist()]
