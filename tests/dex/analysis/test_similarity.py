import pytest
import torch

from dex.analysis.similarity import cka, expert_similarity
from dex.model.build import build_model


def drawn(n, width, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rotation_and_scale_do_not_matter():
    x = drawn(40, 6)
    rotation = torch.linalg.qr(drawn(6, 6, 1)).Q
    assert cka(x, 3 * x @ rotation + 5) == pytest.approx(1.0)


def test_independent_features_have_nothing_in_common_even_when_they_are_wider_than_inputs_are_many():
    values = [cka(drawn(30, 200, s), drawn(30, 200, 100 + s)) for s in range(20)]
    assert abs(sum(values) / 20) < 0.05
    biased = (drawn(30, 200) @ drawn(30, 200).T).norm()  # of centred kernels the biased estimate is near 1 here
    assert biased > 0


def test_what_does_not_vary_is_no_number_and_few_inputs_are_refused():
    assert cka(torch.ones(5, 2), drawn(5, 2)) != cka(torch.ones(5, 2), drawn(5, 2))
    with pytest.raises(ValueError, match="one, other: expected the same number of rows, at least 4, got 3 and 3"):
        cka(drawn(3, 2), drawn(3, 2))


def test_experts_that_are_copies_are_alike_and_drawn_ones_are_less(tiny, change):
    size = tiny.model.img_size
    images = torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = build_model(tiny)
    apart = expert_similarity(model, images, batch_size=2)
    assert model.training and len(apart) == len(model.encoder.dex_layers)
    for layer, matrix in zip(model.encoder.dex_layers, apart, strict=True):
        assert matrix.shape == (layer.num_experts + 1,) * 2 and torch.equal(matrix, matrix.T)
        assert matrix[~torch.eye(len(matrix), dtype=torch.bool)].max() < 0.99
        layer.copy_director_to_experts_()
    for matrix in expert_similarity(model, images):
        torch.testing.assert_close(matrix, torch.ones_like(matrix))
