"""The sections of an analysis about features: losses, spectra, probe, maps, and curves over the steps."""

from __future__ import annotations

import io
from collections.abc import Callable

import torch
from PIL import Image

from dex.analysis.conclusion import format_interval
from dex.analysis.examine import Findings, Layer, paired
from dex.analysis.plots import feature_maps, pixels
from dex.analysis.swap import KINDS
from dex.inference.analyse_job import Analysis
from dex.report.analysis_parts import (
    Block,
    bar,
    block,
    cell,
    gap_in_all_layers,
    interval_cell,
    models,
    names,
    pair,
    present,
    reading,
    rows_table,
)
from dex.report.charts import Line, curves, image_uri
from dex.report.parts import grid
from dex.report.pictures import Bars, along, bars

_FEATURES = (("cls", "CLS token"), ("patches", "mean of patches"))


def heldout(analysis: Analysis) -> Block:
    """The masked loss by modality."""
    shown, modalities = models(analysis), names(analysis)
    counts = analysis.material.held_out.modality.bincount(minlength=len(analysis.material.modalities)).tolist()
    counts = [counts[m] for m in present(analysis)]
    rows = [
        (m.name, name, count, m.findings.modality_loss[name], None, None)
        for m in shown
        for name, count in zip(modalities, counts, strict=True)
    ]
    rows += [(m.name, "all", sum(counts), *m.findings.loss) for m in shown]
    lines = [
        [name, str(count), *(cell(m.findings.modality_loss[name], 4) for m in shown)]
        for name, count in zip(modalities, counts, strict=True)
    ]
    lines.append(["all", str(sum(counts)), *(format_interval(m.findings.loss) for m in shown)])
    drawn = rows_table(["masked loss", "images", *(m.name for m in shown)], lines)
    if analysis.other is not None and analysis.other.comparable:
        difference = paired(analysis.findings, analysis.other.findings, analysis.material.groups)
        against = f"This run minus {analysis.other.name}, on the same images and masks"
        drawn += f"<p>{against}: {format_interval(difference, signed=True)}.</p>"
        rows.append((f"this run less {analysis.other.name}", "all", sum(counts), *difference))
    read = (
        "Mean squared error over the masked patches of held-out images. A lower loss alone does not mean better "
        "features. Losses with and without norm_pix_loss, or with different image or patch sizes, are not comparable."
    )
    data = (("model", "modality", "images", "loss", "low", "high"), rows)
    return block("heldout", "Held-out loss", read, drawn, [], data)


def probe(analysis: Analysis) -> Block | None:
    """The linear probe beside pixels and step 0."""
    if analysis.findings.probe is None:
        return None
    values = [("16×16 pixels", analysis.pixels)]
    by_step = sorted(models(analysis), key=lambda m: m.name != "step 0")  # The references come first
    values += [(m.name, m.findings.probe) for m in by_step]
    values = [(name, interval) for name, interval in values if interval is not None]
    series = Bars("balanced accuracy", [bar(interval) for _, interval in values], 0)
    unit = "balanced accuracy on unseen sources"
    figure = bars("Linear probe of the modality", [n for n, _ in values], [series], unit=unit, key=False, span=(0, 1))
    groups = analysis.material.probed_groups
    count = len(groups.of.unique())
    read = (
        "A linear probe on standardised features (patch mean and CLS token) predicts the modality of "
        f"{len(groups.of)} images; each fold of the {count} {groups.kind} is predicted by a probe fitted on the rest. "
        "Compare with 16×16 grey pixels, which already go far. Overlapping intervals show no difference. A higher "
        "accuracy alone is not better: collapsed features can separate modalities and nothing else."
    )
    rows = [(name, *interval) for name, interval in values]
    drawn = pair([figure]) + rows_table(["", "balanced accuracy"], [[n, format_interval(i)] for n, i in values])
    return block(
        "probe", "What a linear map can read", read, drawn, [figure], (("features", "value", "low", "high"), rows)
    )


def spectra(analysis: Analysis) -> Block | None:
    """Singular values and ranks."""
    if analysis.findings.cls is None:
        return None
    shown = models(analysis)
    figures, rows, lines = [], [], []
    for field, title in _FEATURES:
        spectra_lines = []
        for place, model in enumerate(shown):
            spectrum = getattr(model.findings, field)
            if spectrum is None:
                continue
            s = spectrum.singular_values
            share = (s / s[0].clamp(min=1e-300)).tolist()
            points = [(i, v if v > 1e-6 else None) for i, v in enumerate(share, 1)]
            spectra_lines.append(Line(model.name, points, place, bare=True))
            rows += [(model.name, field, i, v) for i, v in enumerate(s.tolist(), 1)]
            numbers = (spectrum.rankme, spectrum.effective_rank)
            cosines = (spectrum.cosine, spectrum.centred_cosine)
            lines.append([f"{title}, {model.name}", *(cell(v, 1) for v in numbers), *(cell(v) for v in cosines)])
        figure = curves(f"Singular values, {title}", spectra_lines, unit="largest = 1", log=True, key=True)
        figures.append(along(figure, "component"))
    read = (
        "Singular values of the centred features of unmasked held-out images. A slow fall means that many directions "
        "are in use; a steep one means collapse. RankMe and effective rank count the directions, and cannot exceed the "
        "number of images or the width: compare them with step 0, not with other data sets. A high cosine of CLS "
        "tokens is usually a common offset, which does no harm if the centred cosine is low; it says nothing about "
        "experts."
    )
    header = ["", "RankMe", "effective rank", "cosine", "cosine, centred"]
    data = (("model", "features", "component", "singular_value"), rows)
    drawn = grid(figures) + rows_table(header, lines)
    return block("spectra", "How many directions features use", read, drawn, figures, data, 2)


def maps(analysis: Analysis) -> Block | None:
    """Principal components of patches, and attention, image by image."""
    if analysis.maps is None:
        return None
    picture = pixels(feature_maps(*_drawn(analysis)))
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "PNG", optimize=True)

    read = (
        "Colours are the first three principal components over the patches of all these images: patches of equal "
        "colour have similar features, also across images. Look for anatomy in one colour. Attention is from the CLS "
        "token in the last block, mean over heads; it is scaled per image, so faint structure looks strong. Compare "
        "with step 0: an untrained model shows structure too, since its patches hold pixels. Neither says anything "
        "about experts."
    )
    html = (
        f'<figure class="picture"><div class="scroll"><img width="{picture.shape[1]}" height="{picture.shape[0]}" '
        f'alt="images, principal components of patches and attention" src="{image_uri(data.getvalue(), "png")}"></div>'
        '</figure><p class="files">Files beside this page: maps.png</p>'
    )
    return Block("maps", "Where features differ within images", reading(read) + html, {"maps.png": data.getvalue()})


def _drawn(analysis: Analysis) -> tuple:
    own, start = analysis.maps, analysis.start_maps
    columns = {"components": own.colours.numpy(), "attention": own.attention.numpy()}
    if start is not None:
        columns |= {"components, step 0": start.colours.numpy(), "attention, step 0": start.attention.numpy()}
    return own.images.permute(0, 2, 3, 1).numpy(), own.labels, columns


def steps(analysis: Analysis) -> Block | None:
    """The main measures over the steps."""
    if len(analysis.curve) < 2:
        return None
    curve, rows, charts = analysis.curve, [], []
    end = curve[-1].step
    gaps = {kind: [(f.step, gap_in_all_layers(f, kind)) for f in curve] for kind in KINDS}
    lines = [
        Line(kind, [(step, gap and gap.gap.value) for step, gap in points], (2, 1, 0)[place], dots=True)
        for place, (kind, points) in enumerate(gaps.items())
    ]
    charts.append(curves("Swap gap, all layers", lines, unit="rise of the masked loss", end=end, key=True))
    for kind, points in gaps.items():
        rows += [(step, f"swap gap, {kind}", *gap.gap) for step, gap in points if gap is not None]
    singles = {
        "held-out loss": lambda f: f.loss,
        "corrected information, masked": lambda f: _mean_of_layers(f, lambda layer: layer.masked.value),
        "chance below": lambda f: _mean_of_layers(f, lambda layer: layer.masked.null_high),
        "corrected information, whole": lambda f: _mean_of_layers(f, lambda layer: layer.whole.value),
        "entropy of p": lambda f: _mean_of_layers(f, lambda layer: layer.entropy),
        "same first expert": lambda f: _mean_of_layers(f, lambda layer: layer.first_agreement),
        "expert sets, masked": lambda f: _mean_of_layers(f, lambda layer: float(layer.sets_masked)),
        "RankMe, CLS": lambda f: f.cls and f.cls.rankme,
        "RankMe, mean of patches": lambda f: f.patches and f.patches.rankme,
        "linear probe": lambda f: f.probe,
    }
    points = {name: [(f.step, value(f)) for f in curve] for name, value in singles.items()}
    for name, values in points.items():
        for step, value in values:
            if value is not None:
                rows.append((step, name, *(value if isinstance(value, tuple) else (value, None, None))))
    together = {
        "Held-out loss": ("held-out loss",),
        "Corrected information": ("corrected information, masked", "corrected information, whole", "chance below"),
        "Router": ("entropy of p", "same first expert"),
        "Expert sets in use": ("expert sets, masked",),
        "RankMe": ("RankMe, CLS", "RankMe, mean of patches"),
        "Linear probe": ("linear probe",),
    }
    for title, parts in together.items():
        lines = [
            Line(name.removeprefix(f"{title}, ").removeprefix("corrected information, "), values, i, dots=True)
            for i, name in enumerate(parts)
            for values in [[(step, _value(v)) for step, v in points[name]]]
        ]
        if title == "Linear probe" and analysis.pixels is not None:
            flat = [(f.step, analysis.pixels.value) for f in curve]
            lines.append(Line("16×16 pixels", flat, 7, faint=True))
        unit = "mean over layers" if title in ("Corrected information", "Router", "Expert sets in use") else ""
        charts.append(curves(title, lines, end=end, key=len(lines) > 1, unit=unit))
    table = [
        [
            f"{f.step:,}",
            *(interval_cell(g and g.gap) for g in (gap_in_all_layers(f, k) for k in KINDS)),
            interval_cell(f.probe),
        ]
        for f in curve
    ]
    read = (
        "Every step is measured on the same images and masks. A gap that rises while the exploration noise still "
        "falls may only show exploration ending. Look into a probe below that of pixels, or a rank that falls to a few "
        "directions."
    )
    header = ["step", *(f"swap gap, {kind}" for kind in KINDS), "linear probe"]
    drawn = grid(charts) + rows_table(header, table)
    data = (("step", "measure", "value", "low", "high"), rows)
    return block("steps", "Over the steps", read, drawn, charts, data, 3)


def _value(value: object) -> float | None:
    return value[0] if isinstance(value, tuple) else value


def _mean_of_layers(model: Findings, value: Callable[[Layer], float]) -> float | None:
    if not model.layers:
        return None
    return float(torch.tensor([value(layer) for layer in model.layers], dtype=torch.float64).mean())
