"""docs/study.md and its figures, from the rows of the study alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from generated import ROOT, settle
from study_arms import CANDIDATES, CONFIRMED, MAIN, MONO, REFERENCE, SEARCHED, Arm, normalised, study
from study_choice import Effect, Rows, choose, combine, effect, gained_information, loss_of, rows_of

PAGE = ROOT / "docs/study.md"
PICTURES = ROOT / "docs/images"
SOURCE = "benchmarks/results/study/runs.jsonl"
COMMAND = "scripts/study.py --page"
_BESIDE_CLS = ("balance 0", "balance 0.01", "upcycled", "align 0", "frozen director", "token-wise", "random experts")

TEXT = """\
# The study: do experts specialise, and is it worth it?

{count} runs of small models, each with one thing changed. [What is asked](study-plan.md) was written down before the
first of them. Made by `make study` from [its rows](../{source}); not edited. Every run is there; {diverged}.

{first}

![Loss against the monolithic control, and swap gap, of every arm](images/study.png)

## Loss and specialisation by arm

Differences are of held-out masked losses, paired by seed and image: below 0, the arm is better. Intervals are 95 %,
over seeds and sources ({sources} held-out sources). **Bold** intervals leave out 0.

{table}

## Against cls

{beside}

## All runs

{runs}
{search}"""


def write(rows: Rows, check: bool) -> int:
    """The page and, unless it is only checked, its figures; the exit status."""
    rows = {key: row for key, row in rows.items() if not row["tiny"]}
    if not rows:
        print(f"study: expected rows in {SOURCE}, got none: make study")
        return 1
    if not check:
        figure(rows, PICTURES / "study.png")
    return settle(PAGE, page(rows), check=check, source=SOURCE, command=COMMAND)


def arms_of(rows: Rows) -> list[tuple[Arm, int, Arm]]:
    """(arm, steps, its control) of the study that rows are there of, in the plan's order."""
    found: dict[tuple[str, int], tuple[Arm, int, Arm]] = {}
    for spec in study():
        control = normalised(MONO) if spec.arm.changes.get("model", {}).get("norm_pix_loss") else MONO
        if rows_of(rows, spec.arm.name, spec.steps):
            found.setdefault((spec.arm.name, spec.steps), (spec.arm, spec.steps, control))
    return list(found.values())


def page(rows: Rows) -> str:
    whole = [row for row in rows.values() if row["half"] is None]
    diverged = sum(not row["finite"] for row in rows.values())
    lines, sources = [], 0
    for arm, steps, control in arms_of(rows):
        own, against = rows_of(rows, arm.name, steps), rows_of(rows, control.name, steps)
        loss = effect(own, "loss")
        sources = max(sources, loss.sources)
        difference = None if arm.name == control.name else effect(own, "loss", against)
        cells = [told(difference, 4), told(effect(own, "other modality"), 4), told(effect(own, "beyond"), 4)]
        lines.append(
            f"| {arm.name} | {steps:,} | {len(own)} | {loss.value:.4f} | {' | '.join(cells)} | "
            f"{told(gained_information(own), 3)} |"
        )
    head = (
        "| arm | steps | seeds | loss | less the monolithic control | swap gap, another modality | of it beyond the "
        "same modality | information gained |\n| --- | --- | --- | --- | --- | --- | --- | --- |\n"
    )
    return TEXT.format(
        count=len(rows),
        source=SOURCE,
        diverged="one run did not stay finite" if diverged == 1 else f"{diverged or 'no'} runs did not stay finite",
        first=first_words(rows),
        sources=sources,
        table=head + "\n".join(lines) if whole else "No runs of the study yet.",
        beside=beside_cls(rows),
        runs=all_runs(list(rows.values())),
        search=searched(rows),
    )


def first_words(rows: Rows) -> str:
    """The null, then the two main comparisons."""
    parts = []
    null = effect(rows_of(rows, "random experts", 400), "other modality")
    if null is not None:
        verdict = "holds 0, as it must" if not null.shown else "**does not hold 0: the instrument is wrong**"
        parts.append(f"With random experts the swap gap is {told(null, 4)}, which {verdict}.")
    for arm in MAIN[1:]:
        found = effect(rows_of(rows, arm.name, 400), "loss", rows_of(rows, MONO.name, 400))
        if found is not None:
            word = "no difference is shown" if not found.shown else ("lower" if found.value < 0 else "higher")
            parts.append(f"Loss of {arm.name} less the monolithic control's at 400 steps: {told(found, 4)}; {word}.")
    return " ".join(parts) or "The main comparisons have no runs yet."


def beside_cls(rows: Rows) -> str:
    reference, lines = rows_of(rows, "cls", 400), []
    for name in _BESIDE_CLS:
        found = effect(rows_of(rows, name, 400), "loss", reference)
        if found is not None:
            lines.append(f"| {name} | {found.seeds} | {told(found, 4)} |")
    return (
        "| arm | seeds | loss less that of cls |\n| --- | --- | --- |\n" + "\n".join(lines) if lines else "No runs yet."
    )


def all_runs(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in sorted(rows, key=lambda row: (row["half"] is not None, row["arm"], row["steps"], row["seed"])):
        one = {row["seed"]: row}
        loss, gap = effect(one, "loss"), effect(one, "other modality")
        half = "all" if row["half"] is None else f"half {row['half']}"
        probe = "–" if not row["probe"] else f"{row['probe'][0]:.1%}"
        cells = [f"{e.value:.4f}" if e else "–" for e in (loss, gap)]
        end = "" if row["finite"] else " (not finite)"
        lines.append(
            f"| {row['arm']}{end} | {row['steps']:,} | {row['seed']} | {half} | {' | '.join(cells)} | {probe} | "
            f"{row['cpu_s']:.0f} |"
        )
    return (
        "| arm | steps | seed | sources | loss | swap gap | linear probe | processor s |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n" + "\n".join(lines)
    )


def searched(rows: Rows) -> str:
    """What the search found and whether it was confirmed; empty without rows of it."""
    if not any(row["half"] == 0 for row in rows.values()):
        return ""
    candidate = combine(rows, 400)
    arms = [REFERENCE, *(arm for kind in CANDIDATES.values() for arm in kind), *([candidate] if candidate else [])]
    reference, lines = rows_of(rows, REFERENCE.name, 400, 0), []
    for arm in arms:
        own = rows_of(rows, arm.name, 400, 0)
        if own:
            gap, difference = effect(own, "other modality"), effect(own, "loss", reference)
            loss = f"{loss_of(rows, arm, 400, False):.4f}"
            lines.append(f"| {arm.name} | {len(own)} | {loss} | {told(difference, 4)} | {told(gap, 4)} |")
    text = (
        "\n## The search\n\nSeeds "
        f"{', '.join(map(str, SEARCHED))}, the first half of the sources, 400 steps.\n\n"
        "| candidate | seeds | loss | less that of the published recipe | swap gap |\n| --- | --- | --- | --- | --- |\n"
        + "\n".join(lines)
        + "\n"
    )
    try:
        chosen = choose(rows, candidate, 400)
    except RuntimeError as error:
        return f"{text}\n{error}.\n"
    lines, better = [], []
    for steps in (400, 1100):
        own = rows_of(rows, chosen.name, steps, 1)
        for other in (REFERENCE, MONO):
            found = effect(own, "loss", rows_of(rows, other.name, steps, 1))
            better.append(found is not None and found.high < 0 and found.seeds == len(CONFIRMED))
            lines.append(f"| {other.name} | {steps:,} | {0 if found is None else found.seeds} | {told(found, 4)} |")
    verdict = "it is better than both." if all(better) else "it is not shown to be better."
    return (
        f"{text}\nChosen by the rule: **{chosen.name}**. Confirmation on the other half of the sources, seeds "
        f"{', '.join(map(str, CONFIRMED))}: {verdict}\n\n| its loss less that of | steps | seeds | difference |\n"
        "| --- | --- | --- | --- |\n" + "\n".join(lines) + "\n"
    )


def told(found: Effect | None, digits: int) -> str:
    if found is None:
        return "–"
    interval = f"[{found.low:.{digits}f}, {found.high:.{digits}f}]"
    return f"{found.value:+.{digits}f} {f'**{interval}**' if found.shown else interval}"


def figure(rows: Rows, path: Path) -> None:
    """Two panels, a line an arm: loss less the control's, and the swap gap, with their intervals."""
    from matplotlib.figure import Figure

    from dex.analysis import plots

    arms = arms_of(rows)
    drawn = Figure(figsize=(10, 1.4 + 0.27 * max(len(arms), 1)), dpi=120, layout="constrained")
    left, right = drawn.subplots(1, 2, sharey=True)
    for place, (arm, steps, control) in enumerate(arms):
        own = rows_of(rows, arm.name, steps)
        difference = effect(own, "loss", rows_of(rows, control.name, steps)) if arm.name != control.name else None
        for axis, found in ((left, difference), (right, effect(own, "other modality"))):
            if found is not None:
                axis.plot([found.low, found.high], [place, place], color="#107c7c", linewidth=1.6)
                axis.plot([found.value], [place], "o", color="#107c7c", markersize=4)
    left.set_yticks(range(len(arms)), [f"{arm.name}, {steps:,}" for arm, steps, _ in arms], fontsize=8)
    left.invert_yaxis()
    for axis, title in ((left, "loss less the monolithic control's"), (right, "swap gap, another modality's experts")):
        axis.axvline(0, color="#888888", linewidth=0.8)
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", alpha=0.25)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    plots.save(plots.pixels(drawn), path)
