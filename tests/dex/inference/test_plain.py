import pytest
import torch

import dex
from dex.data import center
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


def test_the_control_is_plain_already(control):
    loaded = dex.load(control)
    with torch.no_grad():
        batch = torch.randn(2, 3, 64, 64)
        assert torch.equal(plain(loaded.encoder)(batch), loaded.encoder(batch))
