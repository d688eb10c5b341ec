import re

import pytest
import torch

import dex
from dex.data import center
from dex.inference.int8 import Int8Experts
from dex.inference.plain import GatheredExperts, plain
from dexkernels import DEXLayer


@pytest.mark.parametrize("path", ["experts", "director"])
def test_the_plain_encoder_computes_the_same(trained, images, path):
    loaded = dex.load(trained, path=path)
    pictures = torch.cat([loaded.preprocess(images / "mr" / f"{i:03d}.png").images for i in range(5)])
    made = plain(loaded.encoder)
    assert not any(isinstance(module, DEXLayer) for module in made.modules()) and len(loaded.encoder.dex_layers) == 2
    with torch.no_grad():
        batch = center(pictures, 64)
        torch.testing.assert_close(made(batch), loaded.encoder(batch), rtol=1e-5, atol=1e-5)
    assert made.blocks[0].attn.qkv.weight is loaded.encoder.blocks[0].attn.qkv.weight  # nothing is copied


@pytest.mark.parametrize(("experts", "top_k", "temperature"), [(4, 1, 0.5), (4, 4, 0.5), (5, 2, 0.1), (1, 1, 0.5)])
def test_gathered_experts_are_the_layer(experts, top_k, temperature):
    torch.manual_seed(0)
    layer = DEXLayer(8, 12, experts, top_k, temperature=temperature).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        x = torch.randn(6, 5, 8, dtype=torch.float64)
        torch.testing.assert_close(GatheredExperts(layer)(x), layer(x), rtol=1e-12, atol=1e-12)


OPTIONS = [{"route_from": "mean"}, {"activation": "gelu_tanh"}, {"route_from": "mean", "activation": "gelu_tanh"}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("stand_in", [GatheredExperts, Int8Experts])
def test_what_stands_in_for_a_layer_has_its_options(stand_in, options):
    """With weights that eight bits hold, so that 8-bit experts are exact but for the order of sums."""
    torch.manual_seed(0)
    layer = DEXLayer(8, 16, 4, 2, **options).double().eval()
    with torch.no_grad():
        layer.router_weight.normal_()
        for weight in (layer.experts.fc1_weight, layer.experts.fc2_weight):
            weight.copy_(torch.randint(-127, 128, weight.shape)).mul_(2.0**-7)
            weight[..., 0] = 127 * 2.0**-7
        x = torch.randn(6, 5, 8, dtype=torch.float64)
        torch.testing.assert_close(stand_in(layer)(x), layer(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stand_in", [GatheredExperts, Int8Experts])
@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({"routing": "token"}, "routing='token', layout='tokens', windows=1"),
        ({"route_from": "mean", "layout": "channels_last"}, "routing='image', layout='channels_last', windows=1"),
        ({"route_from": "mean", "windows": 4}, "routing='image', layout='tokens', windows=4"),
    ],
)
def test_a_layer_that_nothing_can_stand_in_for_is_refused(stand_in, options, got):
    with pytest.raises(ValueError, match=f"^layer: expected routing='image' .*, got {re.escape(got)}$"):
        stand_in(DEXLayer(8, 16, 4, 2, **options))


def test_the_control_is_plain_already(control):
    loaded = dex.load(control)
    with torch.no_grad():
        batch = torch.randn(2, 3, 64, 64)
        assert torch.equal(plain(loaded.encoder)(batch), loaded.encoder(batch))
