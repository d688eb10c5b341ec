"""docs/real-tasks.md, from benchmarks/results/tasks/results.json alone."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from generated import commit_of, settle  # noqa: E402

RESULTS = ROOT / "benchmarks/results/tasks/results.json"
PAGE = ROOT / "docs/real-tasks.md"
TITLES = {"dice": "Dice", "balanced_accuracy": "balanced accuracy"}

TEXT = """\
# Real tasks

Labelled images that come with public packages, cut into small tasks: a DEX, a monolithic control of equal compute and
a random start, each fine-tuned with three seeds. Made by `make tasks`{source}; not edited.

{reading}

## The tasks

{folds}

## The plan

It was fixed before the runs: arms, tasks, classes by a rule, settings, seeds, the primary metric (Dice, or balanced
accuracy), the comparison (DEX minus monolithic, paired by patient and seed) and when no verdict is drawn (fewer than 10
test patients or 3 seeds).

- DEX and control are the presets {presets} of `dex pretrain`.{compute}
- Their pretraining set is the embedded one without the origins that the segmentations are cut from ({left_out}).
- Each was pretrained once: seeds are of fine-tuning alone, and another pretraining might turn a difference round.
- The random start is the DEX's architecture, drawn anew by each seed.
- All fine-tune with the same settings, beside the defaults of `dex finetune`: {settings}.
- Epochs: {epochs}; one of a segmentation shows at least {shown} images, listed several times where there are fewer.
  A trial before this plan was still learning after 6 of `ct-organs`, by the loss of its validation slices.
- A tested series is never trained on. The checkpoint is chosen by slices of the *training* series.
- Masks of CT and MR are the output of a model, TotalSegmentator, not of experts: a score says how near one comes to
  that model. That the CT series are of different patients is not verified.
"""
FOLDS = """\
- `ct-organs`: two CT series of the totalsegmentator package, and the structures of which both hold {ml:g} ml. Each
  series is tested on after training on the other.
- `ct-aorta`: three CT series, and the aorta and vertebra T12, which the package labels in all three. Each is tested on
  after training on the other two. The heart that it labels in one is in no other, so it is no task.
- `mr-slab`: **one MR of one subject**, and the structures of which both slabs hold {voxels} voxels. Each slab is tested
  on after training on the other, {gap} slices away.
- `nuclei`: **one fluorescence image** of the stardist package, in tiles; not H&E. Each half is tested on after training
  on the other.
- `plane`: slices of CT and MR volumes, axial, coronal or sagittal. Each body CT is tested on after training on the
  other volumes.
- `modality`: CT, MR, X-ray or ultrasound, by images of the embedded set. Tested on origins that are not trained on.

Of a training volume one slice in {every} is for validation."""
BY_HAND = """
## One of them by hand

From the checkpoint of `make pretrain` to masks of a DICOM series that it was not fine-tuned on:

```bash
python scripts/real_tasks.py runs/real-tasks --data            # fetches the packages and cuts the labelled images
CT=runs/real-tasks/data/ct-organs-dicom
dex finetune RUN $CT.yaml --data $CT --preset cpu --img-size 96 --lr 1e-3 --epochs 18 --warmup-epochs 1 --out runs/ct
dex predict runs/ct $CT/test/images/dicom~0 --out predictions --overlays
```

`runs/ct/report.html` has the scores on the test series, `predictions` the mask as NIfTI in the series' space. `make
pretrain` has seen images of these series, without labels: `dex tasks $CT.yaml --data $CT --run RUN` says so.
"""
SCORES = """
## Results

{table}

A value is the mean over seeds, with all test cases of the folds together; in brackets each seed's. Differences are the
first arm minus the second, with a 95 % BCa interval over patients where there are at least four.

{tasks}
## What it took

{cost}
"""
UNMEASURED = """**Not measured yet.** The plan below is committed before any result: `make tasks` carries it out. It is
sized for 45 minutes on two cores, and goes on where it stopped."""


def page(check: bool) -> int:
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else None
    return settle(PAGE, text(results), check=check, source="its results", command="make tasks")


def text(results: dict | None) -> str:
    """Without results the plan alone."""
    import real_tasks
    import real_tasks_data

    plan = TEXT.format(
        source="" if results is None else " from [its results](../benchmarks/results/tasks/results.json)",
        reading=UNMEASURED if results is None else f"**Read this first.** {reading(results)}",
        presets=" and ".join(f"`{preset}`" for preset in real_tasks.PRETRAINING.values()),
        compute="" if results is None else " " + " ".join(results["pretraining"]["sentences"]),
        left_out=", ".join(f"`{name}`" for name in real_tasks_data.LEFT_OUT),
        settings=", ".join(f"`{name}={value}`" for name, value in real_tasks.SETTINGS.items()),
        epochs=", ".join(f"`{name}` {count}" for name, count in real_tasks.EPOCHS.items()),
        shown=real_tasks_data.SHOWN,
        folds=folds(real_tasks_data),
    )
    if results is None:
        return plan + BY_HAND
    return (
        plan
        + BY_HAND
        + SCORES.format(
            table=table(results),
            tasks="\n".join(section(task, results) for task in results["tasks"]),
            cost=cost(results),
        )
    )


def folds(data) -> str:
    """The tasks, in words."""
    return FOLDS.format(ml=data.LEAST_ML, voxels=data.LEAST_VOXELS, gap=data.GAP, every=data.VAL_EVERY)


def reading(results: dict) -> str:
    """What may be concluded, from the numbers alone."""
    tasks = results["tasks"]
    first = [task["pairs"][0] for task in tasks]
    judged = [pair for pair in first if not pair["no_verdict"]]
    most = max(task["patients"] for task in tasks)
    said = f"No task has more than {most} test patients or origins. "
    if not judged:
        said += "So no verdict about DEX and its control is drawn on any of them: these runs show that the way from a "
        said += "checkpoint to a score works on real files, and what the numbers were; not that one model is better. "
    else:
        said += f"On {len(judged)} of {len(tasks)} tasks there are enough patients for a verdict. "
    signs = [pair["estimate"]["value"] for pair in first if pair["estimate"]["value"] is not None]
    ahead = sum(value > 0 for value in signs)
    said += f"The DEX's mean is above the control's on {ahead} of {len(signs)} tasks"
    agree = sum(len({value > 0 for value in pair["by_seed"] if value is not None}) == 1 for pair in first)
    said += f"; all seeds agree in sign on {agree}. "
    helped = [pair for task in tasks for pair in task["pairs"] if (pair["first"], pair["second"]) == ("dex", "random")]
    above = sum((pair["estimate"]["value"] or 0) > 0 for pair in helped)
    said += f"Pretraining on a few hundred images helped the DEX against its own random start on {above} of "
    return said + f"{len(helped)} tasks, by the same small samples."


def table(results: dict) -> str:
    arms = results["arms"]
    lines = [f"| task | metric | test patients | {' | '.join(arms)} | DEX minus monolithic |"]
    lines.append(f"| --- | --- | --- | {' | '.join('---' for _ in arms)} | --- |")
    for task in results["tasks"]:
        cells = [mean_of(task["values"][arm]["by_seed"]) for arm in arms]
        pair = task["pairs"][0]
        lines.append(
            f"| {task['task']} | {TITLES.get(task['metric'], task['metric'])} | {task['patients']} | "
            f"{' | '.join(cells)} | {signed(pair)} |"
        )
    return "\n".join(lines)


def mean_of(values: list) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "–"
    return f"{sum(known) / len(known):.3f} ({', '.join(f'{value:.3f}' for value in known)})"


def signed(pair: dict) -> str:
    estimate = pair["estimate"]
    if estimate["value"] is None:
        return "–"
    ends = "" if estimate["low"] is None else f" [{estimate['low']:+.3f}, {estimate['high']:+.3f}]"
    return f"{estimate['value']:+.3f}{ends}"


def section(task: dict, results: dict) -> str:
    lines = [f"### {task['task']}", "", f"{task['note']} Data licence: {task['licence']}.", ""]
    for fold in task["folds"]:
        lines.append(
            f"- `{fold['name']}`: {fold['images']:,} training images. Leak check: {task['leaks'][fold['name']]}."
        )
    lines += ["", f"| {TITLES.get(task['metric'], task['metric'])} of | {' | '.join(results['arms'])} |"]
    lines.append(f"| --- | {' | '.join('---' for _ in results['arms'])} |")
    for number, name in enumerate(task["classes"]):
        cells = [mean_of([of_seed[number] for of_seed in task["values"][arm]["by_class"]]) for arm in results["arms"]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append("")
    for pair in task["pairs"]:
        why = f" No verdict: {'; '.join(pair['no_verdict'])}." if pair["no_verdict"] else ""
        lines.append(f"- {pair['sentence']}{why}")
    return "\n".join([*lines, ""])


def cost(results: dict) -> str:
    machine, minutes = results["machine"], results["processor_seconds"] / 60
    return (
        f"{results['runs']} fine-tunings took {minutes:,.0f} minutes of processor time, one thread each, on "
        f"{machine['cpu']} ({machine['cpus']} processors), torch {machine['torch']}, commit {commit_of(machine)}; "
        "the two pretrainings come on top."
    )
