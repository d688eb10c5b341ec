"""The sections of an analysis about experts: swaps, routing, ablations, similarity, gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from dex.analysis.conclusion import format_interval
from dex.analysis.gradients import Conflict
from dex.analysis.swap import KINDS
from dex.inference.analyse_job import Analysis
from dex.report.analysis_parts import (
    Block,
    bar,
    block,
    cell,
    gap_in_all_layers,
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
    shown = [m for m in models(analysis) if m.findings.gaps]
    if not analysis.findings.gaps:
        return None
    values = [v for m in shown for g in m.findings.gaps for v in (g.gap.low, g.gap.high)]
    span, figures, rows = (min(values), max(values)), [], []
    for model in shown:
        layers = sorted({g.layer for g in model.findings.gaps if g.layer is not None})
        by = {(g.kind, g.layer): g for g in model.findings.gaps}
        series = [
            Bars(kind, [bar(by[kind, n].gap) if (kind, n) in by else None for n in (*layers, None)], _COLOURS[kind])
            for kind in KINDS
            if any(g.kind == kind for g in model.findings.gaps)
        ]
        unit = f"rise of the masked loss; own experts {model.findings.loss.value:.3f}"
        groups = [*(f"layer {n}" for n in layers), "all"]
        figures.append(bars(f"Swap gap, {model.name}", groups, series, unit=unit, span=span))
        for g in model.findings.gaps:
            layer = "all" if g.layer is None else g.layer
            rows.append((model.name, g.kind, layer, *g.gap, g.own))
    lines = []
    for kind in KINDS:
        gaps = [gap_in_all_layers(m.findings, kind) for m in shown]
        if any(gaps):
            lines.append(
                [f"{kind}, all layers", *("–" if g is None else format_interval(g.gap, signed=True) for g in gaps)]
            )
    paired = [m.findings.modality_gap for m in shown]
    if any(paired):
        lines.append(
            ["other minus same, paired", *("–" if g is None else format_interval(g.gap, signed=True) for g in paired)]
        )
        rows += [(m.name, g.kind, "all", *g.gap, g.own) for m, g in zip(shown, paired, strict=True) if g is not None]
    lines.append(["own experts (loss)", *(format_interval(m.findings.loss) for m in shown)])
    read = (
        "The rise of an image's masked loss when it gets the experts of another image of its modality, of an image of "
        "another modality, or random experts, in one layer or in all at once. If experts have specialised, the whole "
        "interval for the other modality lies above 0 and above the bar for the same modality. If intervals include 0, "
        "experts are interchangeable, whatever the heatmap below looks like. A gap shows that routing matters, not "
        "that it makes the model better; that takes a comparison with the monolithic control. Random, untrained "
        "experts have a small gap too: compare with step 0."
    )
    header = ("model", "kind", "layer", "gap", "low", "high", "own_loss")
    drawn = pair(figures) + rows_table(["", *(m.name for m in shown)], lines)
    return block("swap", "Are the experts interchangeable?", read, drawn, figures, (header, rows))


def heatmaps(analysis: Analysis) -> Block | None:
    """Experts by modality, beside step 0 and chance, and the corrected information."""
    if not analysis.findings.layers:
        return None
    shown = [m for m in models(analysis) if m.findings.layers]
    kept, modalities = present(analysis), names(analysis)
    panels, rows, figures = {}, [], []
    for model in shown:
        for place, layer in enumerate(model.findings.layers):
            kinds = [(model.name, layer.mass)]
            if model is shown[0]:
                kinds.append(("modalities permuted", layer.chance))
            for name, mass in kinds:
                share = (mass / mass.sum(1, keepdim=True).clamp(min=1e-12))[kept].tolist()
                panels[name, place] = share
                rows += [
                    (name, place, modality, e, v)
                    for modality, row in zip(modalities, share, strict=True)
                    for e, v in enumerate(row)
                ]
    top = max(v for share in panels.values() for row in share for v in row)
    order = [name for name in (shown[0].name, "step 0", "modalities permuted") if any(n == name for n, _ in panels)]
    order += [m.name for m in shown if m.name not in order]
    for place in range(len(analysis.findings.layers)):
        for name in order:
            if (name, place) in panels:
                figures.append(heatmap(f"layer {place}, {name}", modalities, panels[name, place], top))
    read = (
        "How the gate mass of each modality is divided among the experts, on masked images. Structure here is no "
        "evidence of specialisation: a random router on random features has some too. Compare with step 0, and with "
        "permuted modalities, which show how uneven chance looks. The table gives the corrected information that the "
        "expert set holds about the modality: 0 is chance, 1 determines the modality; chance stays below 'chance "
        "below' 19 times in 20. A high value means that routes follow modality, as at step 0, not that experts differ."
    )
    table = [
        [f"layer {place}, {view}", *(v for m in shown for v in _information(m.findings.layers, place, view))]
        for place in range(len(analysis.findings.layers))
        for view in ("masked", "whole")
    ]
    header = ["corrected information", *(h for m in shown for h in (m.name, "chance below", "p"))]
    drawn = rows_table(header, table) + f'<p class="soft">Full colour is a share of {top:.0%}.</p>' + grid(figures)
    data = (("model", "layer", "modality", "expert", "share"), rows)
    return block("experts", "Which expert takes which modality", read, drawn, figures, data, len(order))


def _information(layers: list, place: int, view: str) -> list[str]:
    if place >= len(layers):
        return ["–"] * 3
    information = getattr(layers[place], view)
    return [cell(information.value), cell(information.null_high), cell(information.p)]


def routing(analysis: Analysis) -> Block | None:
    """Entropy, sets in use, and the agreement of masked and whole images; the CSV file adds the information."""
    if not analysis.findings.layers:
        return None
    shown = [m for m in models(analysis) if m.findings.layers]
    fields = ("entropy", "sets_masked", "sets_whole", "first_agreement")
    heads = ("entropy of p", "sets, masked", "sets, whole", "same first expert")
    rows, lines = [], []
    for place in range(len(analysis.findings.layers)):
        for model in shown:
            if place < len(model.findings.layers):
                layer = model.findings.layers[place]
                entropy, masked, whole, agreement = values = [getattr(layer, f) for f in fields]
                lines.append(
                    [f"layer {place}, {model.name}", cell(entropy), str(masked), str(whole), f"{agreement:.0%}"]
                )
                rows.append((model.name, place, *values, *layer.masked, *layer.whole))
    read = (
        "Entropy of all router probabilities divided by log E: near 1 the router is undecided, near 0 it is certain. "
        "Unlike the entropy of the chosen gates, it also counts experts that are never chosen. Sets: the number of "
        "different expert sets that held-out images take; few sets are in effect few networks. Same first "
        "expert: how often a masked image and the whole one choose the same; if rarely, what experts learned on masked "
        "images helps whole ones less. None of this shows that the experts differ."
    )
    header = ["", *heads]
    data_header = ("model", "layer", *fields)
    data_header += tuple(f"{view}_{f}" for view in ("masked", "whole") for f in ("value", "raw", "null_high", "p"))
    return block("routing", "How the router decides", read, rows_table(header, lines), [], (data_header, rows))


def overlap(analysis: Analysis) -> Block | None:
    """Jaccard index of expert sets between modalities."""
    if not analysis.findings.layers:
        return None
    kept, modalities = present(analysis), names(analysis)
    row_names, columns = numbered(modalities)
    figures, rows = [], []
    for place, layer in enumerate(analysis.findings.layers):
        values = _nested(layer.overlap[kept][:, kept])
        unit = f"random sets: {layer.random_overlap:.2f}"
        figures.append(matrix(f"layer {place}", row_names, columns, values, top=1.0, unit=unit))
        for a, row in zip(modalities, values, strict=True):
            rows += [(place, a, b, v, layer.random_overlap) for b, v in zip(modalities, row, strict=True)]
    read = (
        "Mean Jaccard index of the expert sets of two images: 1 is the same set; the number above each layer is that "
        "of random sets. Dark cells off the diagonal are modalities that share experts. If all cells are dark, the "
        "router may send all images to a few experts; see the number of sets."
    )
    data = (("layer", "modality", "other", "jaccard", "random"), rows)
    return block("overlap", "Do modalities share experts?", read, grid(figures), figures, data, 2)


def ablation(analysis: Analysis) -> Block | None:
    """Rise of the loss by modality without an expert, in percent."""
    ablations = analysis.findings.ablations
    if not ablations:
        return None
    kept, modalities = present(analysis), names(analysis)
    losses = [analysis.findings.modality_loss[name] for name in modalities]
    rises = [
        [[100 * v / loss for v in row] for row, loss in zip(a.rise.T[kept].tolist(), losses, strict=True)]
        for a in ablations
    ]
    top = max((abs(v) for layer in rises for row in layer for v in row), default=1.0)
    figures, rows, lines = [], [], []
    for place, (layer, a) in enumerate(zip(rises, ablations, strict=True)):
        experts = [str(e) for e in range(len(layer[0]))]
        figures.append(
            matrix(f"layer {place}", modalities, experts, layer, top=top, digits=1, unit="% of the modality's loss")
        )
        for m, (name, row) in enumerate(zip(modalities, layer, strict=True)):
            users = a.users.T[kept][m].tolist()
            rows += [(place, name, e, float(a.rise[e, kept[m]]), v, users[e]) for e, v in enumerate(row)]
        means = sorted(sum(row[e] for row in layer) / len(layer) for e in range(len(experts)))
        median = means[len(means) // 2]
        lines.append([f"layer {place}", *(f"{v:+.2f} %" for v in (means[0], median, means[-1]))])
    read = (
        "The rise of each modality's masked loss when one expert is removed and the images that used it take their "
        "next most probable one. Look for experts that matter far more than the others do, for one modality only; the "
        "table shows the spread over experts. A value near 0 may also mean that few images use the expert."
    )
    header = ("layer", "modality", "expert", "rise", "rise_percent", "share_of_users")
    spread = rows_table(["mean over modalities", "least", "median expert", "most"], lines)
    return block("ablation", "What is lost without an expert", read, grid(figures) + spread, figures, (header, rows), 2)


def similarity(analysis: Analysis) -> Block | None:
    """CKA of experts and director."""
    if not analysis.findings.similarity:
        return None
    shown = [m for m in models(analysis) if m.findings.similarity]
    figures, rows, lines = [], [], []
    for place, layer in enumerate(analysis.findings.similarity):
        experts = [str(e) for e in range(len(layer) - 1)]
        figures.append(matrix(f"layer {place}", [*experts, "director"], [*experts, "D"], _nested(layer), top=1.0))
        line = [f"layer {place}"]
        for model in shown:
            if place >= len(model.findings.similarity):
                line += ["–", "–"]
                continue
            cka = model.findings.similarity[place].double()
            between = cka[:-1, :-1]
            between = between[~_diagonal(len(between))]
            line += [cell(float(v.nanmean())) if len(v) else "–" for v in (between, cka[-1, :-1])]
            mlps = [*(str(e) for e in range(len(cka) - 1)), "director"]
            for a, row in zip(mlps, _nested(cka), strict=True):
                rows += [(model.name, place, a, b, v) for b, v in zip(mlps, row, strict=True)]
        lines.append(line)
    read = (
        "Centred kernel alignment of the outputs of experts and director (D) for the same tokens: 1 is equal up to "
        "rotation and scale, 0 is unrelated. Compare with step 0: experts that start as copies begin at 1, randomly "
        "initialised ones lower. A high value between experts means similar functions; whether an exchange would "
        "change the loss is measured by the swap gap."
    )
    pairs = ("experts", "director to experts")
    header = ["mean", *(f"{m.name}: {pair_of}" for m in shown for pair_of in pairs)]
    data = (("model", "layer", "one", "other", "cka"), rows)
    drawn = rows_table(header, lines) + grid(figures)
    return block("similarity", "Do experts and director compute alike?", read, drawn, figures, data, 2)


def gradients(analysis: Analysis) -> Block | None:
    """Cosines of the gradients of modalities."""
    conflict = analysis.findings.conflict
    if conflict is None:
        return None
    kept, modalities = present(analysis), names(analysis)
    row_names, columns = numbered(modalities)
    other = analysis.other.findings.conflict if analysis.other else None
    off_diagonal = ~_diagonal(len(kept))
    rows, lines = [], []
    for place, group in enumerate(conflict.groups):
        between = conflict.between[place][kept][:, kept]
        rows += [
            (group, a, b, v)
            for a, row in zip(modalities, _nested(between), strict=True)
            for b, v in zip(modalities, row, strict=True)
        ]
        values = between[off_diagonal]
        values = values[values.isfinite()]
        spread = [float(values.mean()), float(values.min()), float(values.max())] if len(values) else [None] * 3
        line = [group, *map(cell, spread), cell(float(conflict.within[place][kept].nanmean()))]
        if other is not None:
            line += _of_control(other, group, kept, off_diagonal)
        lines.append(line)
    figures = [
        matrix(
            group,
            row_names,
            columns,
            _nested(conflict.between[conflict.groups.index(group)][kept][:, kept]),
            top=1.0,
        )
        for group in _some_groups(conflict.groups)
    ]
    read = (
        "Cosine between the gradients of two modalities' masked losses, by group of weights. Look for values clearly "
        "below 0: these modalities pull in opposite directions. Values near 0 are no conflict: the gradients are "
        "unrelated. The diagonal, two halves of one modality's images, is the reference: noise keeps it below 1, and "
        "modalities with a cosine like the diagonal's do not conflict."
    )
    header = ["mean cosine", "between modalities", "least", "most", "halves of one modality"]
    if other is not None:
        header += [f"{analysis.other.name}: between", "halves"]
    data = (("parameters", "modality", "other", "cosine"), rows)
    drawn = rows_table(header, lines) + grid(figures)
    return block("gradients", "Do modalities pull in different directions?", read, drawn, figures, data, 2)


def _of_control(conflict: Conflict, group: str, kept: list[int], off_diagonal: Tensor) -> list[str]:
    """The cells of the run compared with, whose MLPs stand for experts if it is monolithic."""
    for name in (group, group.replace("experts", "MLP"), group.replace("MLP", "experts")):
        if name in conflict.groups:
            place = conflict.groups.index(name)
            between = conflict.between[place][kept][:, kept][off_diagonal]
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
