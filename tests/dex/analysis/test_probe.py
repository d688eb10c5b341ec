import math

import pytest
import torch
from torch import nn

from dex.analysis.probe import director_distance, knn_accuracy
from dex.model import MaskedAutoencoder
from dexkernels import DEXLayer

TINY = {"img_size": 32, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_experts": 4, "decoder_embed_dim": 16}


def by_loop(train, train_labels, test, test_labels, k, temperature):
    """The definition, one pair of images at a time, in float64: the label each image is given."""
    unit = [[v / math.sqrt(sum(x * x for x in row)) for v in row] for row in train.double().tolist()]
    given = []
    for row in test.double().tolist():
        length = math.sqrt(sum(x * x for x in row))
        near = sorted(((sum(a * b for a, b in zip(row, u, strict=True)) / length, i) for i, u in enumerate(unit)))
        votes = {}
        for similarity, i in near[-k:]:
            label = int(train_labels[i])
            votes[label] = votes.get(label, 0.0) + math.exp(similarity / temperature)
        given.append(max(votes, key=votes.get))
    return torch.tensor(given)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.07), (20, 1.0), (1000, 0.2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_knn_is_the_loop(k, temperature, dtype):
    generator = torch.Generator().manual_seed(k)
    train = torch.randn(150, 6, generator=generator, dtype=dtype)
    test = torch.randn(60, 6, generator=generator, dtype=dtype) * 7  # its length must not matter
    labels = torch.randint(0, 4, (150,), generator=generator) * 5 - 3  # neither from 0 nor without holes
    truth = torch.randint(0, 4, (60,), generator=generator) * 5 - 3
    given = by_loop(train, labels, test, truth, k, temperature)
    accuracy, per_class = knn_accuracy(train, labels, test, truth, k, temperature)
    assert accuracy == pytest.approx(float((given == truth).double().mean()), abs=1e-12)
    for label in truth.unique().tolist():
        mine = truth == label
        assert per_class[label] == pytest.approx(float((given == label)[mine].double().mean()), abs=1e-12)
    assert list(per_class) == sorted(per_class)


def test_knn_in_chunks_is_knn(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(300, 8, generator=generator), torch.randint(0, 3, (300,), generator=generator)
    whole = knn_accuracy(features[:200], labels[:200], features[200:], labels[200:])
    monkeypatch.setattr("dex.analysis.probe._SIMILARITIES", 7 * 200)  # 7 images at a time, the last chunk of 2
    assert knn_accuracy(features[:200], labels[:200], features[200:], labels[200:]) == whole


def test_planted_clusters_are_found_and_planted_lies_are_not():
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(5, 12)
    labels = torch.arange(5).repeat_interleave(40)
    train = centres[labels] + 0.1 * torch.randn(200, 12, generator=generator)
    truth = torch.arange(5).repeat_interleave(8)
    test = centres[truth] + 0.1 * torch.randn(40, 12, generator=generator)
    found = knn_accuracy(train, labels, test, truth)
    assert found == (1.0, dict.fromkeys(range(5), 1.0)) and found.balanced == 1.0
    truth = truth.clone()
    truth[:8] = 1  # cluster 0 is said to be class 1: class 1 is then half wrong, class 0 is never asked for
    found = knn_accuracy(train, labels, test, truth)
    assert found.accuracy == 32 / 40 and found.per_class == {1: 0.5, 2: 1.0, 3: 1.0, 4: 1.0}
    assert found.balanced == 3.5 / 4
    truth[:8] = 9  # a class that no training image has
    assert knn_accuracy(train, labels, test, truth).per_class[9] == 0.0


def test_near_neighbours_outvote_many_far_ones_as_the_temperature_says():
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    labels, test = torch.tensor([0, 1, 1, 1]), torch.tensor([[1.0, 0.2]])
    assert knn_accuracy(train, labels, test, torch.tensor([0]), k=4, temperature=0.07).accuracy == 1
    assert knn_accuracy(train, labels, test, torch.tensor([1]), k=4, temperature=10.0).accuracy == 1
    assert knn_accuracy(train, labels, test, torch.tensor([0]), k=4, temperature=1e-4).accuracy == 1  # no overflow


def test_features_that_are_not_finite_find_nothing_and_end_nothing():
    train = torch.eye(3).repeat(4, 1)
    labels = torch.arange(3).repeat(4)
    broken = train.clone()
    broken[0] = float("nan")  # one of four of class 0
    assert knn_accuracy(broken, labels, torch.eye(3), torch.arange(3), k=3).accuracy == 1
    test = torch.eye(3)
    test[0, 1] = float("inf")  # of the label that a row of zeros would be given
    assert knn_accuracy(train, labels, test, torch.arange(3)).per_class == {0: 0.0, 1: 1.0, 2: 1.0}
    nothing = torch.full_like(train, float("nan"))
    assert knn_accuracy(nothing, labels, torch.eye(3), torch.arange(3)).accuracy == 0


def test_knn_takes_bf16_and_gives_no_gradient():
    features = torch.eye(4).bfloat16().requires_grad_()
    assert knn_accuracy(features, torch.arange(4), features, torch.arange(4), k=1).accuracy == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_features": torch.zeros(3)}, "train_features: expected floating point"),
        ({"train_features": torch.zeros(3, 2, dtype=torch.int64)}, "train_features: expected floating point"),
        ({"train_features": torch.zeros(0, 2), "train_labels": torch.zeros(0).long()}, "train_features: expected at l"),
        ({"train_labels": torch.zeros(2).long()}, r"train_labels: expected integers \[3\]"),
        ({"test_labels": torch.zeros(4)}, r"test_labels: expected integers \[4\], got torch.float32 \[4\]"),
        ({"test_features": torch.zeros(4, 5)}, "test_features: expected width 2"),
        ({"k": 0}, "k: expected a whole number of at least 1, got 0"),
        ({"temperature": 0.0}, "temperature: expected a positive finite number, got 0.0"),
    ],
)
def test_knn_names_what_is_wrong(change, message):
    good = {
        "train_features": torch.ones(3, 2),
        "train_labels": torch.zeros(3).long(),
        "test_features": torch.ones(4, 2),
        "test_labels": torch.zeros(4).long(),
    }
    knn_accuracy(**good)
    with pytest.raises(ValueError, match=message):
        knn_accuracy(**good | change)


def test_director_distance_is_its_formula():
    torch.manual_seed(0)
    model = MaskedAutoencoder(**TINY, decoder_depth=1, decoder_num_heads=2)
    want = []
    for layer in model.encoder.dex_layers:
        pairs = [(d.detach().double(), e.detach().double()) for d, e in layer.director_pairs()]
        director = torch.cat([d.flatten() for d, _ in pairs])
        experts = torch.cat([e.flatten(1) for _, e in pairs], 1)
        want.append(float(((experts - director).norm(dim=1) / director.norm()).mean()))
    assert director_distance(model) == pytest.approx(want, rel=1e-6)
    assert all(1.3 < d < 1.5 for d in want)  # drawn separately: about the square root of 2


def test_director_distance_of_copies_of_zeros_and_of_no_experts():
    layer = DEXLayer(8, 16, num_experts=3)
    assert director_distance(layer) == [0.0]
    with torch.no_grad():
        layer.experts.fc1_weight[1].add_(layer.director.fc1.weight)  # one of three, moved in one of four tensors
    weights = torch.cat([p.flatten() for p in layer.director.parameters()])
    moved = float(layer.director.fc1.weight.norm() / weights.norm()) / 3
    assert director_distance(nn.Sequential(layer, nn.Linear(8, 8))) == pytest.approx([moved])
    with torch.no_grad():
        for p in layer.director.parameters():
            p.zero_()
    assert director_distance(layer) == [math.inf]
    with torch.no_grad():
        for p in layer.experts.parameters():
            p.zero_()
        assert director_distance(layer) == [0.0]
        layer.experts.fc1_bias[0, 0] = float("nan")
    assert math.isnan(director_distance(layer)[0])
    assert director_distance(nn.Linear(8, 8)) == []
