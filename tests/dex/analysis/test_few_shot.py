import pytest
import torch

from dex.analysis.few_shot import Labelled, few_shot, folds_of, interval, knn, linear


def data(patients=24, images=4, classes=3, noise=0.3, width=6, seed=0):
    """Images of patients who have one class each."""
    generator = torch.Generator().manual_seed(seed)
    number = torch.arange(patients).repeat_interleave(images)
    labels = number % classes
    features = torch.eye(classes, width)[labels] + noise * torch.randn(len(number), width, generator=generator)
    return Labelled(features, labels, number)


@pytest.mark.parametrize("seed", range(3))
def test_no_patient_is_torn_apart_and_every_fold_has_every_class(seed):
    d = data()
    fold = folds_of(d, 5, seed)
    assert all(len(fold[d.patients == p].unique()) == 1 for p in range(24))
    for number in range(5):
        assert set(d.labels[fold == number].tolist()) == {0, 1, 2}
    assert not torch.equal(fold, folds_of(d, 5, seed + 1)) and torch.equal(fold, folds_of(d, 5, seed))


def test_few_patients_make_few_folds_and_one_is_refused():
    d = data(patients=6)
    assert folds_of(d, 5, 0).max() == 1
    with pytest.raises(ValueError, match="labels: expected at least 2 patients of each class, got 1 of class 2"):
        folds_of(data(patients=5), 5, 0)


@pytest.mark.slow
def test_planted_classes_are_found_and_noise_is_not():
    for probe in (linear, knn):
        assert probe(data(noise=0.1)).value > 0.98
        blind = [probe(data(noise=100.0, patients=24, images=1, seed=seed)).value for seed in range(4)]
        assert 0.15 < sum(blind) / 4 < 0.5


def test_what_only_tells_patients_apart_is_worth_nothing():
    """Features that name the patient would give 100 % if images were split."""
    d = data(patients=30)
    named = d._replace(features=torch.eye(30)[d.patients])
    assert linear(named).value < 0.6 and knn(named).value < 0.6


def test_the_curve_rises_with_the_shots():
    points = few_shot(data(noise=0.8, patients=48), (1, 4, 16, 1000), draws=5, seeds=2)
    assert {(p.shots, p.seed, p.draw) for p in points} == {
        (shots, seed, draw) for shots in (1, 4, 16) for seed in range(2) for draw in range(5)
    }
    mean = {shots: sum(p.accuracy for p in points if p.shots == shots) / 10 for shots in (1, 4, 16)}
    assert mean[1] < mean[4] < mean[16]
    assert points == few_shot(data(noise=0.8, patients=48), (1, 4, 16, 1000), draws=5, seeds=2)


def test_the_interval_is_over_patients():
    d = data(patients=12, images=50)
    predicted = torch.where(d.patients < 6, d.labels, -1)  # half of the patients, with all their images
    got = interval(predicted, d)
    assert got.value == 0.5 and got.high - got.low > 0.4
