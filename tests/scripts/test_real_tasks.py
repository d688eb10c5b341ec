"""The page of the real tasks is what its results say, and its words follow from the numbers alone."""

import copy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import real_tasks_data
import real_tasks_page

ROOT = Path(__file__).resolve().parents[2]

ESTIMATE = {"value": 0.02, "low": None, "high": None, "patients": 2, "cases": 2, "why": "fewer than 4 patients"}


def pair(first, second, value, by_seed, no_verdict=("2 test patients, fewer than 10",)):
    estimate = ESTIMATE | {"value": value}
    said = {"first": first, "second": second, "estimate": estimate, "by_seed": by_seed, "verdict": "not measured"}
    return said | {"no_verdict": list(no_verdict), "sentence": f"{first} minus {second}: Dice {value:+.3f}."}


TASK = {
    "task": "ct-organs",
    "kind": "segmentation",
    "metric": "dice",
    "classes": ["spleen", "liver"],
    "patients": 2,
    "cases": 2,
    "folds": [{"name": "ct-organs-dicom", "task": "ct-organs", "images": 90}],
    "note": "Two series.",
    "licence": "Apache-2.0",
    "values": {
        arm: {"by_seed": [0.5, 0.25, 0.75], "by_class": [[0.5, 0.4], [0.25, None], [0.75, 0.6]]}
        for arm in ("dex", "monolithic", "random")
    },
    "pairs": [
        pair("dex", "monolithic", 0.02, [0.01, 0.02, 0.03]),
        pair("dex", "random", -0.1, [-0.3, 0.1, -0.1]),
        pair("monolithic", "random", -0.12, [-0.1, -0.1, -0.16]),
    ],
    "leaks": {"ct-organs-dicom": "none found in 20 images against pretraining"},
}
RESULTS = {
    "machine": {"cpu": "a processor", "cpus": 2, "torch": "2.13.0", "commit": "0123456789abcdef", "dirty": False},
    "settings": {"lr": 1e-3},
    "seeds": [0, 1, 2],
    "arms": ["dex", "monolithic", "random"],
    "pretraining": {"sentences": ["Equal compute: so many images."]},
    "runs": 18,
    "processor_seconds": 1234.0,
    "tasks": [TASK],
}


def test_the_page_is_what_its_results_say():
    command = [sys.executable, str(ROOT / "scripts/real_tasks.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_small_samples_give_no_verdict():
    page = real_tasks_page.text(RESULTS)
    assert "No task has more than 2 test patients or origins. So no verdict about DEX and its control is drawn" in page
    assert "The DEX's mean is above the control's on 1 of 1 tasks; all seeds agree in sign on 1." in page
    assert "against its own random start on 0 of 1 tasks" in page
    assert "| ct-organs | Dice | 0.000 | 2 | 0.500 (0.500, 0.250, 0.750) |" in page and "| +0.020 |" in page
    assert "| liver | – | – | – |" in page
    assert "Leak check: none found in 20 images against pretraining." in page
    assert "18 fine-tunings took 21 minutes of processor time" in page and "Not measured yet" not in page


def test_scores_near_their_reference_are_called_so():
    assert "above the reference" not in real_tasks_page.text(RESULTS)
    results = copy.deepcopy(RESULTS)
    for arm in RESULTS["arms"]:
        results["tasks"][0]["values"][arm]["by_seed"] = [0.02, 0.04, 0.2]
    assert "No arm is 0.1 above the reference, chance or an empty mask, on ct-organs: " in real_tasks_page.text(results)
    results["tasks"][0] |= {"kind": "classification", "classes": ["axial", "coronal"], "metric": "balanced_accuracy"}
    for arm in RESULTS["arms"]:
        results["tasks"][0]["values"][arm]["by_seed"] = [0.55, 0.65, 0.59]
    page = real_tasks_page.text(results)
    assert "| balanced accuracy | 0.500 |" in page and "above the reference" in page


def test_enough_patients_give_one():
    results = copy.deepcopy(RESULTS)
    first = results["tasks"][0]["pairs"][0]
    first["no_verdict"], first["estimate"] = [], ESTIMATE | {"low": 0.01, "high": 0.03}
    results["tasks"][0]["patients"] = 12
    page = real_tasks_page.text(results)
    assert "On 1 of 1 tasks there are enough patients for a verdict." in page and "+0.020 [+0.010, +0.030]" in page


def test_without_results_there_is_the_plan_alone():
    page = real_tasks_page.text(None)
    assert "**Not measured yet.**" in page and "## Results" not in page and "results.json" not in page


@pytest.mark.slow
def test_tasks_of_the_embedded_images_share_no_origin_between_training_and_test(tmp_path):
    """Both kinds, from the shipped set itself; every image becomes a file whose name gives its origin."""
    folds = [*real_tasks_data._modality(tmp_path), *real_tasks_data._planes(tmp_path)]
    assert [fold.name for fold in folds] == ["modality", "plane-aorta", "plane-abdomen"]
    for fold in folds:
        files = [path.relative_to(tmp_path / fold.name) for path in (tmp_path / fold.name).rglob("*.png")]
        sides = {side: {path.name.partition("~")[0] for path in files if path.parts[0] == side} for side in SIDES}
        assert all(sides.values()) and not sides["test"] & (sides["train"] | sides["val"])
        classes = {side: Counter(path.parts[1] for path in files if path.parts[0] == side) for side in SIDES}
        assert classes["test"].keys() <= classes["train"].keys() and len(classes["train"]) >= 3
        assert sum(classes["train"].values()) == fold.images


SIDES = ("train", "val", "test")
