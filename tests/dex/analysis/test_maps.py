import pytest
import torch
import torch.nn.functional as F

from dex.analysis.maps import principal_maps, tokens
from dex.model import VisionTransformer


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return VisionTransformer(16, 4, 16, 2, 2, 3, 1)


def test_tokens_and_attention_are_those_of_the_forward(encoder):
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    found = tokens(encoder, images, batch_size=2)
    assert encoder.training and found.attention.shape == (5, 2, 4, 4)
    with torch.no_grad():
        want = encoder.eval()(images)
        torch.testing.assert_close(torch.cat([found.cls[:, None], found.patches], 1), want)
        x = encoder.blocks[0](torch.cat([_embed(encoder, images)], 1))[0]
        h = encoder.blocks[1].norm1(x)
        attn = encoder.blocks[1].attn
        q, k, v = attn.qkv(h).view(5, 17, 3, 2, 8).permute(2, 0, 3, 1, 4)
        # The values are replaced by unit vectors: what comes out are the weights themselves.
        weights = F.scaled_dot_product_attention(q, k, torch.eye(17).expand(5, 2, 17, 17))[:, :, 0, 1:]
    torch.testing.assert_close(found.attention.flatten(2), weights)


def _embed(encoder, images):
    seen = []
    handle = encoder.blocks[0].register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    encoder(images)
    handle.remove()
    return seen[0]


def test_alike_patches_have_one_colour_in_all_images():
    """Three kinds of patch: three colours, whatever image they are in."""
    kinds = torch.randint(3, (4, 9), generator=torch.Generator().manual_seed(0))
    patches = F.one_hot(kinds, 3).float() @ torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    maps = principal_maps(patches)
    assert maps.shape == (4, 3, 3, 3) and maps.min() >= 0 and maps.max() <= 1
    colours = maps.view(-1, 3)
    means = torch.stack([colours[kinds.flatten() == k].mean(0) for k in range(3)])
    torch.testing.assert_close(colours, means[kinds.flatten()], atol=1e-4, rtol=0)
    assert torch.pdist(means).min() > 0.2
    torch.testing.assert_close(principal_maps(patches), maps)
