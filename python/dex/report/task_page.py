"""The page of an evaluation: the scores of a fine-tuned model, where it fails, and the basis of the numbers.

It may contain images of patients: share it only with people who may see them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dex.report import document
from dex.report.analysis_parts import cell, pair, reading, rows_table
from dex.report.charts import cut, esc, image_uri
from dex.report.document import Section
from dex.report.parts import table
from dex.report.pictures import NAME, matrix
from dex.report.task_charts import Strip, reliability_diagram, strips
from dex.report.task_comparison import Other, compared
from dex.report.task_words import few, interval, plain, title_of, words_table
from dex.tasks import recipe
from dex.tasks.metrics.estimate import FEW_PATIENTS, MIN_PATIENTS, Estimate, counted
from dex.tasks.metrics.evaluation import METRICS, Evaluation, examples
from dex.tasks.overlay import png
from dex.tasks.recipe import Settings

MODE = 0o600
_WORST = 10
_MANY = 20
"""With more classes, empty cells of a confusion matrix are not drawn."""
_BY_PATIENT = {"segmentation": "dice", "classification": "balanced_accuracy"}
"""The metric that counts the patients of a class."""
_MIN_WIDTH = 620
"""A wider picture is shown no narrower than this, in pixels, and scrolls."""
_PRIVATE = "This page contains images of cases; anyone you give this page to receives them"


class Picture(NamedTuple):
    """Image, ground truth and prediction of a case in one picture."""

    case: str
    """Its id."""
    image: np.ndarray
    """uint8 ``[h, w, 3]`` or ``[h, w]``."""


def write(
    out: Path,
    evaluation: Evaluation,
    *,
    settings: Settings | None = None,
    pictures: Sequence[Picture] = (),
    leak: str = "",
    notes: Sequence[str] = (),
    other: Other | None = None,
    seeds: Sequence[Evaluation] = (),
) -> None:
    """Write the page to ``out``, whole or not at all; a page with pictures is readable by its owner only.

    settings: of the fine-tuning. pictures: of the cases of ``dex.tasks.metrics.evaluation.examples``, or any.
    leak: a sentence about the leak check against the pretraining set; "" if it did not run. notes: sentences without a
    full stop. other: a model to compare with. seeds: the evaluations of this model by seed, if there are several.
    ValueError, with nothing written: a picture of an unknown case, or an ``other`` with different cases.
    """
    unknown = sorted({p.case for p in pictures} - {case.id for case in evaluation.cases})
    if unknown:
        raise ValueError(f"pictures: expected cases of the evaluation, got {', '.join(unknown[:3])}")
    for p in pictures:
        if p.image.dtype != np.uint8 or 0 in p.image.shape or not (p.image.ndim == 2 or p.image.shape[2:] == (3,)):
            raise ValueError(
                f"pictures: expected uint8 [h, w, 3] or [h, w], got {p.image.dtype} {list(p.image.shape)} of {p.case}"
            )
    name = _name(evaluation)
    sections = [
        Section("classes", "By class", _classes(evaluation)),
        Section("cases", "Case by case", _cases(evaluation)),
        Section("pictures", "Best, middle and worst", _pictures(evaluation, pictures)),
        Section("confusion", "Which classes are confused", _confusion(evaluation)),
        Section("reliability", "Are its probabilities calibrated?", _reliability(evaluation)),
    ]
    if other is not None:
        sections.append(compared(name, list(seeds) or [evaluation], other))
    sections.append(Section("basis", "Basis of the numbers", _basis(evaluation, settings, leak, notes)))
    notices = [*([_PRIVATE] if pictures else []), *(note[:1].upper() + note[1:] for note in notes)]
    page = document.document("Evaluation of a task", evaluation.task, _headline(evaluation, name), notices, sections)
    document.write(page, out, MODE if pictures else 0o666)


def _name(evaluation: Evaluation) -> str:
    """The name of the model."""
    about = evaluation.about
    return str(about.get("finetuned") or about.get("run") or "the model")


def _headline(evaluation: Evaluation, name: str) -> str:
    summary = evaluation.summary()
    first = summary[evaluation.metric]
    title = title_of(evaluation, evaluation.metric)
    basis = f"{counted(len(evaluation.patients), 'patient')}, {counted(len(evaluation.cases), 'case')}"
    if first.value is None:
        verdict = f"{title} has no value: {first.why}."
    elif first.low is None:
        verdict = f"{title} {first.value:.3f} over {basis}, without an interval: {first.why}."
    else:
        verdict = f"{title} {first.value:.3f}, 95 % interval {first.low:.3f} to {first.high:.3f}, over {basis}."
    baseline = evaluation.baseline()
    if baseline.value is not None:
        verdict += f" Reference: {baseline.name} scores {baseline.value:.3f}."
    facts = [name, *(f"{k} {evaluation.about[k]}" for k in ("mode", "path", "split", "seed") if k in evaluation.about)]
    if "step" in evaluation.about:
        facts.insert(1, f"step {evaluation.about['step']}")
    lines = [
        f'<p class="verdict">{esc(verdict)}</p><p class="lead">{esc(", ".join(map(str, facts)))}.</p>',
        f'<div class="tiles">{"".join(_tile(evaluation, n, e) for n, e in summary.items())}</div>',
    ]
    if few(first.patients) and first.low is not None:
        warning = f"With fewer than {FEW_PATIENTS} patients, intervals cover the truth in less than 95 % of cases."
        lines.append(f'<p class="soft">{warning}</p>')
    return "".join(lines)


def _tile(evaluation: Evaluation, metric: str, estimate: Estimate) -> str:
    better = "" if METRICS[metric].higher_is_better else "; lower is better"
    more = f"{interval(estimate).strip()} {counted(estimate.patients, 'patient')}{better}".strip()
    return (
        f'<div class="tile"><span>{esc(title_of(evaluation, metric))}</span><b>{cell(estimate.value)}</b>'
        f"<span><small>{esc(more)}</small></span></div>"
    )


def _classes(evaluation: Evaluation) -> str:
    names = [n for n, m in METRICS.items() if m.kind == evaluation.kind and m.of_classes]
    names.sort(key=lambda n: n != evaluation.metric)
    columns = {n: evaluation.by_class(n) for n in names}
    segmentation = evaluation.kind == "segmentation"
    header = ["class", *(METRICS[n].of_classes if n == "balanced_accuracy" else title_of(evaluation, n) for n in names)]
    header += ["patients", *(("scored", "missed", "spurious", "empty") if segmentation else ("cases", "predicted"))]
    rows = []
    for of, name in enumerate(evaluation.classes):
        counts = _counts(evaluation, of)
        patients = columns[_BY_PATIENT[evaluation.kind]][of].patients
        rows.append([name, *(plain(columns[n][of]) for n in names), f"{patients:,}", *(f"{c:,}" for c in counts)])
    if segmentation:
        figures = [_strips_of(evaluation, n, columns[n]) for n in ("dice", "hd95")]
    else:
        first = names[0]
        drawn = [
            Strip(name, [], e.value, e.low, e.high) for name, e in zip(evaluation.classes, columns[first], strict=True)
        ]
        title, mean = METRICS[first].of_classes, "with 95 % interval over patients"
        figures = [strips(title, drawn, span=(0.0, 1.0), mean=mean)]
    read = _SEGMENTATION if segmentation else _CLASSIFICATION
    return reading(read.format(unit=evaluation.unit)) + "".join(figures) + rows_table(header, rows)


_SEGMENTATION = (
    "Dice, HD95 in {unit} and NSD are means over cases for each class; the overall value is the mean over classes. A "
    "class that only the prediction or only the truth contains scores Dice 0 (spurious, missed); one that neither "
    "contains is left out (empty). HD95 and NSD use the scored cases only, so a model that misses hard cases looks "
    f"better than it is: check the column missed. A class scored in fewer than {MIN_PATIENTS} patients has no interval."
)
_CLASSIFICATION = (
    "AUC is of each class against all others, sensitivity is the share of its cases that are recognised, and F1 "
    "balances this with false alarms. A class without cases has no AUC and no sensitivity. Intervals are over "
    f"patients; a class of fewer than {MIN_PATIENTS} patients has none."
)


def _counts(evaluation: Evaluation, of: int) -> list[int]:
    if evaluation.kind == "segmentation":
        states = evaluation.states(of)
        return [states[s] for s in ("scored", "missed", "spurious", "empty")]
    return [sum(evaluation.confusion[of]), sum(row[of] for row in evaluation.confusion)]


def _strips_of(evaluation: Evaluation, metric: str, estimates: Sequence[Estimate]) -> str:
    """Every case of a segmentation by class."""
    rows = []
    for of, (name, estimate) in enumerate(zip(evaluation.classes, estimates, strict=True)):
        values = [getattr(case.classes[of], metric) for case in evaluation.cases]
        kept = [v for v in values if v is not None]
        rows.append(Strip(name, kept, estimate.value, estimate.low, estimate.high))
    span = None if metric == "hd95" else (0.0, 1.0)
    return strips(title_of(evaluation, metric), rows, span=span)


def _cases(evaluation: Evaluation) -> str:
    values = evaluation.case_values()
    figure, score = "", "mean Dice of the classes in the case or its prediction"
    if evaluation.kind == "classification":
        score = "probability of the true class"
        rows = []
        for of, name in enumerate(evaluation.classes):
            kept = [v for v, case in zip(values, evaluation.cases, strict=True) if case.label == of]
            rows.append(Strip(name, kept, sum(kept) / len(kept) if kept else None, None, None))
        figure = strips("Probability of the true class", rows, span=(0.0, 1.0), mean="mean")
    order = sorted((i for i, v in enumerate(values) if v is not None), key=lambda i: values[i])[:_WORST]
    lines = [
        [evaluation.cases[i].id, evaluation.cases[i].patient, cell(values[i]), _mistakes(evaluation, i)] for i in order
    ]
    head = f"<h3>Lowest cases</h3><p>By {score}.</p>"
    return figure + head + words_table(["case", "patient", "score", "what went wrong"], lines)


def _mistakes(evaluation: Evaluation, place: int) -> str:
    """The true class of a case and a wrong prediction; for segmentation, the classes missed or spurious."""
    case = evaluation.cases[place]
    if evaluation.kind == "classification":
        predicted = int(np.argmax(case.probabilities))
        wrong = "" if predicted == case.label else f", predicted {evaluation.classes[predicted]}"
        return f"{evaluation.classes[case.label]}{wrong}"
    wrong = [
        f"{name} {c.state}"
        for name, c in zip(evaluation.classes, case.classes, strict=True)
        if c.state in ("missed", "spurious")
    ]
    return ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")


def _pictures(evaluation: Evaluation, pictures: Sequence[Picture]) -> str:
    places = examples(evaluation)
    if not pictures or places is None:
        return ""
    number = {case.id: i for i, case in enumerate(evaluation.cases)}
    values = evaluation.case_values()
    figures = []
    for shown in pictures:
        place = number[shown.case]
        ranks = {"best": places.best, "middle": places.median, "worst": places.worst}
        rank = ", ".join(name for name, example in ranks.items() if example == place).capitalize()
        patient = f"{shown.case} (patient {evaluation.cases[place].patient})"
        description = ", ".join(filter(None, (patient, cell(values[place]), _mistakes(evaluation, place))))
        caption = f"{rank}: {description}" if rank else description
        figures.append(
            f'<figure class="picture"><div class="scroll">{_picture(shown.image, caption)}</div>'
            f"<figcaption>{esc(caption)}</figcaption></figure>"
        )
    return "".join(figures)


def _picture(image: np.ndarray, alt: str) -> str:
    """The image at its own size, shrunk to the page's width but not below ``_MIN_WIDTH``."""
    height, width = image.shape[:2]
    style = f"max-width:{width}px;min-width:{min(width, _MIN_WIDTH)}px"
    size = f'width="{width}" height="{height}" style="{style}"'
    return f'<img {size} alt="{esc(alt)}" src="{image_uri(png(image), "png")}">'


def _numbered(name: str, number: int) -> str:
    """A row's name with its number, cut to the characters shown."""
    return f"{cut(name, NAME - len(str(number)) - 1)} {number}"


def _confusion(evaluation: Evaluation) -> str:
    segmentation = evaluation.kind == "segmentation"
    names = [*(["background"] if segmentation else []), *evaluation.classes]
    rows, columns = [_numbered(name, i) for i, name in enumerate(names)], [str(i) for i in range(len(names))]
    shares = [[v / sum(row) if sum(row) else None for v in row] for row in evaluation.confusion]
    unit, many = "pixels" if segmentation else "cases", len(names) > _MANY
    figure = matrix(
        f"Share of {unit} by truth",
        rows,
        columns,
        [[None if many and not v else v for v in row] for row in shares],
        top=1.0,
        unit="rows: truth, columns: prediction by number",
        marked=[(i, i) for i in range(len(names))],
    )
    lines = [
        [names[i], names[j], f"{evaluation.confusion[i][j]:,}", f"{shares[i][j]:.1%}"]
        for i in range(len(names))
        for j in range(len(names))
        if i != j and evaluation.confusion[i][j]
    ]
    lines.sort(key=lambda line: -int(line[2].replace(",", "")))
    read = (
        f"Each row sums to 1: the {unit} of a true class, by predicted class. Look for dark cells off the diagonal; "
        "the table lists the most frequent mistakes."
    )
    if segmentation:
        read += " Ignored pixels are not counted. Every pixel has the same weight, so large structures dominate."
    mistakes = words_table(["truth", "predicted", unit, "share of the truth"], lines[:_WORST]) if lines else ""
    return reading(read) + pair([figure, f"<div>{mistakes}</div>"])


def _reliability(evaluation: Evaluation) -> str:
    if evaluation.kind != "classification":
        return ""
    reliability = evaluation.reliability()
    read = (
        "A dot on the dashed line is calibrated: predictions of that probability are right that often. Dots below the "
        "line mean an overconfident model. Dots of few cases lie off the line by chance. ECE is the mean distance from "
        f"the line over cases, in {len(reliability.bins)} bins of equal width."
    )
    scores = (
        f"ECE {reliability.ece:.3f}; perfectly calibrated probabilities would give {reliability.by_chance:.3f} on "
        f"average with this number of cases. Brier score {evaluation.estimate('brier').value:.3f}, from 0 to 2."
    )
    return reading(read) + f"<p>{esc(scores)}</p>" + reliability_diagram(reliability)


def _basis(evaluation: Evaluation, settings: Settings | None, leak: str, notices: Sequence[str]) -> str:
    """How the numbers were obtained, the model and data, and the settings; ``notices`` are shown elsewhere."""
    lines = [
        f"Leak check against the pretraining set: {leak or str(evaluation.about.get('leak') or 'not checked')}",
    ]
    summary = evaluation.summary()
    if any(e.low is not None for e in summary.values()):
        lines.append(
            f"Intervals: 95 %, BCa bootstrap over {counted(len(evaluation.patients), 'patient')}, each drawn with all "
            "cases. They show how results vary with patients, not with training"
        )
    if evaluation.kind == "segmentation":
        without = sum(1 for case in evaluation.cases if case.unit != evaluation.unit)
        lines.append(
            f"Distances are in {evaluation.unit}"
            + (", as the files give no spacing" if evaluation.unit == "pixels" else ", by the spacing of each file")
            + (f"; {counted(without, 'case')} without a spacing are not included" if without else "")
        )
        empty = sum(evaluation.states(of)["empty"] for of in range(len(evaluation.classes)))
        lines.append(
            f"Left out because neither truth nor prediction contains the class: {empty:,} of "
            f"{len(evaluation.cases) * len(evaluation.classes):,} pairs of case and class"
        )
    without = [f"{title_of(evaluation, n)}: {e.why}" for n, e in summary.items() if e.why]
    if without:
        lines.append(f"Without an interval: {'; '.join(without)}")
    rare = [
        name
        for of, name in enumerate(evaluation.classes)
        if 0 < evaluation.estimate(_BY_PATIENT[evaluation.kind], of).patients < MIN_PATIENTS
    ]
    if rare and len(evaluation.classes) > 1:
        lines.append(
            f"In fewer than {MIN_PATIENTS} patients: {', '.join(rare)}. Means over classes weight these like the "
            "others, and the intervals of the means hardly reflect them"
        )
    lines += [str(note) for note in evaluation.about.get("notes") or () if note not in notices]
    items = "".join(f"<li>{esc(line)}.</li>" for line in lines)
    return f'<ul class="lead">{items}</ul>{_facts(evaluation)}{_settings(settings)}'


def _facts(evaluation: Evaluation) -> str:
    facts = [(k, v) for k, v in evaluation.about.items() if k not in ("notes", "leak") and _is_plain(v)]
    rows = "".join(f"<tr><th>{esc(k.replace('_', ' '))}</th><td>{esc(v)}</td></tr>" for k, v in facts)
    return (
        f'<div class="groups"><table class="kv"><caption>Model and data</caption>{rows}</table></div>' if rows else ""
    )


def _is_plain(value: Any) -> bool:
    return value is not None and isinstance(value, str | int | float)


def _settings(settings: Settings | None) -> str:
    if settings is None:
        return ""
    rows = []
    for field in recipe.fields():
        value = getattr(settings, field.name)
        stated = field.metadata["stated"]
        choice = "changed here" if value != field.default else recipe.STATED if stated else recipe.OURS
        shown = "none" if value is None else value
        rows.append(f"<tr><th>{esc(field.name)}</th><td>{esc(shown)}</td><td>{esc(choice)}</td></tr>")
    head = "<tr><th>setting</th><th>value</th><th>origin</th></tr>"
    return f"<h3>Recipe</h3>{table(head, rows)}"
