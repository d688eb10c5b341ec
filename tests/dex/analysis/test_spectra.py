import pytest
import torch

from dex.analysis.spectra import spectrum


def test_features_of_one_direction_and_of_many():
    one = torch.outer(torch.arange(10.0), torch.ones(6))
    assert spectrum(one).rankme == pytest.approx(1.0, abs=1e-4) and spectrum(one).effective_rank == pytest.approx(1.0)
    many = spectrum(torch.cat([torch.eye(6), -torch.eye(6)]))
    assert many.rankme == pytest.approx(6.0) and many.effective_rank == pytest.approx(6.0)
    assert many.singular_values.tolist() == pytest.approx([2**0.5] * 6)


def test_a_common_offset_is_no_collapse():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    away = spectrum(x + 100)
    assert away.cosine > 0.99 and abs(away.centred_cosine) < 0.05
    assert away.rankme == pytest.approx(spectrum(x).rankme, rel=1e-6)
    pairs = torch.nn.functional.normalize(x, dim=1)
    pairs = pairs @ pairs.T
    assert spectrum(x).cosine == pytest.approx(float((pairs.sum() - pairs.trace()) / (50 * 49)))


def test_equal_features_have_no_rank():
    flat = spectrum(torch.ones(5, 3))
    assert (flat.rankme, flat.effective_rank, flat.centred_cosine) == (0.0, 0.0, 0.0) and flat.cosine == pytest.approx(
        1
    )
    with pytest.raises(ValueError, match=r"features: expected at least two rows \[n, D\], got \[1, 3\]"):
        spectrum(torch.ones(1, 3))
