import pytest
import torch

from dex.analysis.linear_probe import PENALTIES, choose_penalty, fit


def clusters(n=90, classes=3, width=8, noise=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    return torch.eye(classes, width)[labels] * 3 + noise * torch.randn(n, width, generator=generator), labels


def test_it_is_scikit_learns_logistic_regression():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="needs scikit-learn")
    features, labels = clusters()
    penalty = 0.1
    probe = fit(features, labels, 3, penalty)
    x = (features.double() - probe.mean) / probe.std
    # Theirs minimises C * sum(losses) + |w|^2 / 2; ours the mean loss + penalty / 2 * |w|^2 / D.
    other = linear_model.LogisticRegression(C=8 / (penalty * 90), tol=1e-8, max_iter=2000).fit(
        x.numpy(), labels.numpy()
    )
    weight = torch.from_numpy(other.coef_)
    torch.testing.assert_close(probe.weight - probe.weight.mean(0), weight - weight.mean(0), rtol=1e-3, atol=1e-4)


def test_the_gradient_is_zero_at_the_optimum():
    features, labels = clusters()
    probe = fit(features, labels, 3, 0.01)
    weight = probe.weight.clone().requires_grad_()
    x = (features.double() - probe.mean) / probe.std
    loss = torch.nn.functional.cross_entropy(x @ weight.T + probe.bias, labels) + 0.01 / 2 * weight.square().sum() / 8
    loss.backward()
    assert weight.grad.abs().max() < 1e-5


def test_where_it_begins_does_not_matter():
    features, labels = clusters()
    want = fit(features, labels, 3, 0.01)
    again = fit(features, labels, 3, 0.01, start=fit(features, labels, 3, 1.0))
    torch.testing.assert_close(again.weight, want.weight, rtol=1e-3, atol=1e-4)


def test_scale_and_shift_of_features_do_not_matter():
    features, labels = clusters()
    moved = features * torch.logspace(-3, 3, 8) + 100
    assert torch.equal(fit(features, labels, 3, 0.1).predict(features), fit(moved, labels, 3, 0.1).predict(moved))
    constant = torch.cat([features, torch.ones(90, 1)], 1)
    assert fit(constant, labels, 3, 0.1).weight.isfinite().all()


def test_rare_classes_count_as_much():
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 95 + [1] * 5)
    features = labels[:, None] + 0.8 * torch.randn(100, 1, generator=generator)
    assert (fit(features, labels, 2, 0.01).predict(features[95:]) == 1).float().mean() >= 0.6


def test_the_penalty_is_chosen_by_the_folds():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    noise = torch.randn(60, 200, generator=generator)  # more features than images, and nothing in them
    folds = torch.arange(60) // 2 % 3
    assert choose_penalty(noise, labels, folds, 2) in PENALTIES
    features, labels = clusters(noise=0.01)
    assert choose_penalty(features, labels, torch.arange(90) // 3 % 3, 3) == max(
        PENALTIES
    )  # all are right: the largest


def test_a_feature_that_is_not_finite_is_judged_and_ends_nothing():
    features, labels = clusters()
    broken = features[:2].clone()
    broken[0, 0] = float("nan")
    assert fit(features, labels, 3, 0.1).predict(broken).shape == (2,)


@pytest.mark.parametrize(
    ("rows", "penalty", "message"), [(0, 0.1, "features: expected one row"), (90, 0.0, "penalty: expected a positive")]
)
def test_wrong_arguments_are_named(rows, penalty, message):
    features, labels = clusters()
    with pytest.raises(ValueError, match=message):
        fit(features[:rows], labels, 3, penalty)
