"""A fine-tuned model on a split, at the images' own size."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dex.tasks import evaluate as job
from dex.tasks.cases import open_task, read
from dex.tasks.evaluate import Options, evaluate
from dex.tasks.finetune import finetune
from dex.tasks.frames import Grid
from dex.tasks.load import load_task_model


@pytest.fixture(scope="module")
def loaded(finetuned):
    return load_task_model(finetuned)


@pytest.fixture
def data(finetuned, discs):
    return open_task(discs, discs, classes=["disc=255"], private=finetuned.parent / "private")


def test_scores_are_of_the_images_own_size(loaded, data, monkeypatch):
    truth = {}
    for case in data.of("test"):
        truth[case.id] = read(case, data.task).masks
    cases = iter(data.of("test"))

    def perfect(loaded, images, spacing, **options):
        mask = torch.from_numpy(truth[next(cases).id]).long()
        yield torch.nn.functional.one_hot(mask, 2).movedim(-1, 1).float()

    monkeypatch.setattr(job, "of_frames", perfect)
    evaluation = evaluate(loaded, data, Options())
    assert len(evaluation.cases) == len(data.of("test")) and evaluation.estimate("dice").value == 1.0
    assert sum(map(sum, evaluation.confusion)) == 40 * 56 * len(evaluation.cases)


def test_distances_need_evenly_spaced_slices(loaded, data, monkeypatch):
    grid = Grid(np.eye(4), (56, 40, 1), "axial", (0, 1, 2), (1, 1, 1), (), even=False)
    contents = [read(case, data.task)._replace(grid=grid) for case in data.of("test")]
    monkeypatch.setattr(job, "frames_of", lambda cases, task, processes: iter(contents))
    with pytest.raises(ValueError, match="file: expected evenly spaced slices, which distances in mm need"):
        evaluate(loaded, data, Options())


def test_it_says_what_it_is_about_without_a_path(loaded, data):
    evaluation = evaluate(loaded, data, Options("val"))
    about = evaluation.about
    assert (about["run"], about["split"], about["mode"], about["path"]) == ("run", "val", "full", "experts")
    assert about["checkpoint"] == loaded.sha256 and len(about["data"]) == 64 and about["step"] == loaded.step
    assert not any("/" in str(value) for name, value in about.items() if name != "notes")
    assert 0 <= evaluation.estimate("dice").value <= 1
    again = evaluate(loaded, data, Options("val", batch_size=1))
    assert again.about["data"] == about["data"] and again.confusion == evaluation.confusion
    assert evaluate(loaded, data, Options("test")).about["data"] != about["data"]


def test_a_classification_is_of_cases(pretrained, shade_data, quick, tmp_path):
    settings = replace(quick, epochs=2)
    assert finetune(pretrained, shade_data, settings, tmp_path / "out") == 0
    evaluation = evaluate(load_task_model(tmp_path / "out"), shade_data, Options("val"))
    assert len(evaluation.cases) == len(shade_data.of("val"))
    rows = np.array([case.probabilities for case in evaluation.cases])
    np.testing.assert_allclose(rows.sum(1), 1)
    assert np.array(evaluation.confusion).sum() == len(rows)


@pytest.mark.parametrize(
    "options, word",
    [
        (Options("holdout"), "split: expected one of train, val, test, got 'holdout'"),
        (Options(window=0.9), "window: expected a factor above 1"),
        (Options(batch_size=0), "batch_size: expected at least 1"),
    ],
)
def test_bad_options_are_named(loaded, data, options, word):
    with pytest.raises(ValueError, match=word):
        evaluate(loaded, data, options)


def test_other_tasks_and_empty_splits_are_named(loaded, data, shade_data):
    with pytest.raises(ValueError, match="data: expected a segmentation of disc, .*, got a classification of bright"):
        evaluate(loaded, shade_data, Options())
    nothing = data._replace(cases=data.of("train"))
    with pytest.raises(ValueError, match="split: expected cases to evaluate; .* 0 val, 0 test"):
        evaluate(loaded, nothing, Options())


def test_weights_that_are_no_numbers_are_named(finetuned, data):
    broken = load_task_model(finetuned)
    with torch.no_grad():
        next(broken.model.head.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="finite probabilities"):
        evaluate(broken, data, Options())


def test_patients_that_were_trained_on_are_refused(loaded, data):
    trained = data.of("train")[0]
    leaking = data._replace(cases=(*data.of("test"), trained._replace(split="test")))
    with pytest.raises(ValueError, match="split: expected patients that the model was not trained on; 1 of 4 were"):
        evaluate(loaded, leaking, Options())


def test_pictures_are_of_the_best_the_median_and_the_worst_case(loaded, data):
    evaluation = evaluate(loaded, data, Options())
    shown = dict(job.pictures(loaded, data, evaluation, Options()))
    values = dict(zip([case.id for case in evaluation.cases], evaluation.case_values(), strict=True))
    assert max(values, key=values.get) in shown and min(values, key=values.get) in shown and len(shown) == 3
    assert all(picture.dtype == np.uint8 and picture.ndim == 3 for picture in shown.values())


def test_a_result_is_known_by_its_key_before_it_trains(loaded, data):
    key = job.key_of("weights", data, loaded.settings)
    assert key == job.key_of("weights", data, loaded.settings)
    assert (key.checkpoint, key.mode, key.path, key.seed, key.shots) == ("weights", "full", "experts", 0, None)
    faster = job.key_of("weights", data, replace(loaded.settings, lr=1e-2))
    assert faster.settings != key.settings and faster.data == key.data
    assert job.key_of("weights", data, replace(loaded.settings, device="cuda")) == key
    moved = data._replace(cases=tuple(c._replace(split="train") for c in data.cases))
    assert job.key_of("weights", moved, loaded.settings).data != key.data


def test_what_it_learned_beats_a_constant_prediction_by_its_interval(pretrained, data, quick, tmp_path):
    settings = replace(quick, epochs=6, feature_size=8)
    assert finetune(pretrained, data, settings, tmp_path / "out") == 0
    evaluation = evaluate(load_task_model(tmp_path / "out"), data, Options("val"))
    pixels, disc = 40 * 56, [case.classes[0].truth for case in evaluation.cases]
    constant = np.mean([2 * truth / (truth + pixels) for truth in disc])  # everything is disc; nothing is has Dice 0
    assert evaluation.estimate("dice").low > constant > 0
