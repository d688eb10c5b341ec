import pytest
import torch
import torch.nn.functional as F

import dex
from dex.inference.int8 import Int8Experts, quantize, quantize_
from dexkernels import DEXLayer


def test_an_entry_is_off_by_half_a_step_at_most():
    weight = torch.randn(3, 7, 50, generator=torch.Generator().manual_seed(0))
    weight *= torch.tensor([0.01, 1.0, 50.0])[:, None, None]
    weight[1, 2] = 0.0
    numbers, scales = quantize(weight)
    assert numbers.dtype == torch.int8 and numbers.abs().max() == 127 and scales.shape == (3, 7)
    error = (numbers * scales[..., None] - weight).abs()
    assert (error <= scales[..., None] * 0.5001).all() and not error[1, 2].any()


@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (4, 4), (1, 1), (6, 1)])
def test_the_layer_is_near_its_experts(experts, top_k):
    torch.manual_seed(0)
    layer = DEXLayer(32, 128, experts, top_k).eval()
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.normal_(std=0.1)
        x = torch.randn(9, 5, 32)
        want, got = layer(x), Int8Experts(layer)(x)
    assert (got - want).norm() / want.norm() < 0.01


def test_exact_weights_give_the_layers_own_output():
    """Weights that eight bits hold: all that is left is the order of sums."""
    torch.manual_seed(0)
    layer = DEXLayer(8, 16, 3, 2).double().eval()
    with torch.no_grad():
        for weight in (layer.experts.fc1_weight, layer.experts.fc2_weight):
            weight.copy_(torch.randint(-127, 128, weight.shape)).mul_(2.0**-7)
            weight[..., 0] = 127 * 2.0**-7
        x = torch.randn(6, 4, 8, dtype=torch.float64)
        torch.testing.assert_close(Int8Experts(layer)(x), layer(x), rtol=1e-10, atol=1e-10)


def test_features_of_a_trained_model_stay_close(trained, images):
    loaded, exact = dex.load(trained), dex.load(trained)
    report = quantize_(loaded.encoder)
    assert report.layers == 2 and 0.25 < report.bytes_after / report.bytes_before < 0.3
    files = [images / "ct" / f"{i:03d}.png" for i in range(8)]
    got, want = loaded.embed(files), exact.embed(files)
    assert F.cosine_similarity(got.cls, want.cls).min() > 0.999 and got.gates == []


def test_what_has_no_experts_is_refused(trained, control):
    for loaded in (dex.load(control), dex.load(trained, path="director")):
        with pytest.raises(ValueError, match="encoder: expected DEX layers that compute with their experts, got none"):
            quantize_(loaded.encoder)
