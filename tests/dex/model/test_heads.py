"""Heads: shapes, what they read, and what a linear probe leaves out."""

import torch

from dex.model.heads import ClassificationHead, LinearSegmentation, as_map, pooled


def test_pooled_is_cls_beside_the_mean_of_the_patches():
    tokens = torch.arange(2 * 5 * 3, dtype=torch.float32).view(2, 5, 3)
    assert torch.equal(pooled(tokens)[1], torch.tensor([15.0, 16, 17, 22.5, 23.5, 24.5]))


def test_classification_drops_in_training_alone():
    torch.manual_seed(0)
    head, tokens = ClassificationHead(8, 3, dropout=0.5), torch.randn(4, 5, 8)
    assert head(tokens).shape == (4, 3) and not torch.equal(head(tokens), head(tokens))
    head.eval()
    assert torch.equal(head(tokens), head(tokens))


def test_a_linear_probe_has_one_linear_map():
    head = ClassificationHead(8, 3, dropout=0.5, linear=True)
    assert [tuple(p.shape) for p in head.parameters()] == [(3, 16), (3,)]
    tokens = torch.randn(4, 5, 8)
    assert torch.equal(head(tokens), head(tokens))
    assert [tuple(p.shape) for p in LinearSegmentation(8, 3, 16).parameters()] == [(3, 8), (3,)]


def test_the_map_has_patches_row_by_row():
    tokens = torch.arange(5.0).view(1, 5, 1)
    assert torch.equal(as_map(tokens), torch.tensor([[[[1.0, 2], [3, 4]]]]))
    segmentation = LinearSegmentation(8, 3, 16)
    tokens = torch.randn(2, 5, 8)
    tokens[:, 4] = 100 * torch.randn(8)
    logits = segmentation(tokens)
    assert logits.shape == (2, 3, 16, 16)
    expected = segmentation.linear(segmentation.norm(tokens[:, 4]))
    torch.testing.assert_close(logits[:, :, -1, -1], expected)
