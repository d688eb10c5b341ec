"""UNETR's decoder: sizes for every patch, where it looks, and that all of it learns."""

import pytest
import torch

from dex.model import VisionTransformer
from dex.model.unetr import UNETR, skip_blocks


@pytest.mark.parametrize(
    "depth, blocks", [(12, (3, 6, 9)), (24, (6, 12, 18)), (32, (8, 16, 24)), (4, (1, 2, 3)), (2, (1,)), (1, ())]
)
def test_skips_are_quarters_of_the_depth(depth, blocks):
    assert skip_blocks(depth) == blocks


@pytest.mark.parametrize("patch, size", [(2, 8), (4, 16), (8, 24), (14, 42), (16, 48), (32, 64), (12, 36)])
@pytest.mark.parametrize("depth", [2, 4])
def test_every_patch_gives_full_size_and_everything_learns(patch, size, depth):
    torch.manual_seed(0)
    encoder = VisionTransformer(size, patch, 16, depth, 2, 2, 1)
    head = UNETR(size, patch, 16, depth, classes=3, feature_size=4)
    images = torch.randn(2, 3, size, size)
    tokens, _, hidden = encoder.forward_hidden(images, head.after)
    logits = head(images, tokens, hidden)
    assert logits.shape == (2, 3, size, size)
    logits.square().mean().backward()
    silent = [name for name, p in head.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A bias before an instance norm takes no gradient; MONAI's blocks have none but in the last map.
    assert not silent
    assert all(p.grad is not None for p in encoder.blocks.parameters() if p.requires_grad)


def test_it_is_as_large_as_unetr_of_monai_in_two_dimensions():
    from monai.networks.nets import UNETR as Whole

    whole = Whole(3, 4, (64, 64), feature_size=16, hidden_size=96, mlp_dim=96, num_heads=2, spatial_dims=2)
    decoder = sum(p.numel() for name, p in whole.named_parameters() if not name.startswith("vit"))
    ours = UNETR(64, 16, 96, 12, classes=4, feature_size=16)
    assert sum(p.numel() for p in ours.parameters()) == decoder


def test_the_encoder_hands_out_states_after_blocks():
    torch.manual_seed(0)
    encoder = VisionTransformer(16, 8, 16, 3, 2, 2, 1)
    images = torch.randn(2, 3, 16, 16)
    tokens, _, hidden = encoder.forward_hidden(images, (1, 3))
    assert list(hidden) == [1, 3]
    assert torch.equal(encoder.norm(hidden[3]), tokens) and torch.equal(tokens, encoder(images))
    seen = []
    encoder.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    encoder(images)
    assert torch.equal(seen[0], hidden[1])


@pytest.mark.parametrize("size, patch, word", [(16, 1, "patch_size"), (16, 16, "img_size"), (30, 16, "img_size")])
def test_sizes_that_cannot_be_decoded_are_refused(size, patch, word):
    with pytest.raises(ValueError, match=word):
        UNETR(size, patch, 16, 4, classes=2)
