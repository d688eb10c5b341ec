from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dex.analysis import gradients
from dex.analysis.gradients import conflict, groups_of
from dex.model.build import build_model


class Pulled(nn.Module):
    """A point that each image pulls towards itself: the gradient of its loss is ``2 (point - image)``."""

    def __init__(self):
        super().__init__()
        self.point, self.unused = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))

    def forward(self, images, mask_ratio, mask_noise):
        return SimpleNamespace(loss=(self.point - images).square().sum(1).mean())


def test_opposed_orthogonal_and_agreeing_modalities():
    x, y = torch.eye(3)[0], torch.eye(3)[1]
    images = torch.stack([x, x, x, -x, -x, y, y, y, y, 5 * x])
    modality = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3])
    model = Pulled()
    model.point.grad = torch.ones(3)
    groups = {"point": [model.point], "unused": [model.unused]}
    found = conflict(model, images, modality, torch.zeros(10, 1), 4, groups=groups, batch_size=2)
    assert found.groups == ("point", "unused") and model.training and torch.equal(model.point.grad, torch.ones(3))
    want = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(found.between[0, :3, :3], want)
    assert found.between[0, 3].isnan().all() and found.between[0, :, 3].isnan().all()  # one image has no halves
    assert found.within[0, :3].tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert found.between[1].isnan().all()


def test_a_step_along_the_gradient_of_one_modality_is_what_its_cosine_says(tiny):
    """On a real model: a modality of which another one is the copy has its gradient."""
    torch.manual_seed(0)
    model = build_model(tiny)
    size = tiny.model.img_size
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, size, size, generator=generator).repeat(2, 1, 1, 1)
    noise = torch.rand(4, (size // tiny.model.patch_size) ** 2, generator=generator).repeat(2, 1)
    found = conflict(model, images, torch.tensor([0] * 4 + [1] * 4), noise, 2)
    assert set(found.groups) == set(groups_of(model))
    torch.testing.assert_close(found.between[:, 0, 1], found.within[:, 0])
    sizes = sum(p.numel() for group in groups_of(model).values() for p in group)
    assert sizes == sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = {f"layer {i}: {part}" for i in range(tiny.model.depth) for part in ("attention", "experts", "router")}
    assert set(found.groups) == layers | {"embedding", "decoder"}


def test_a_model_too_large_for_one_pass_gives_the_same_in_several(tiny, monkeypatch):
    torch.manual_seed(0)
    model = build_model(tiny)
    size = tiny.model.img_size
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(1))
    noise = torch.rand(8, (size // tiny.model.patch_size) ** 2, generator=torch.Generator().manual_seed(2))
    asked = []
    whole = gradients._gradient
    monkeypatch.setattr(gradients, "_gradient", lambda *a: asked.append(len(a[-1])) or whole(*a))
    arguments = (model, images, torch.tensor([0] * 4 + [1] * 4), noise, 2)
    at_once = conflict(*arguments)
    count = len(at_once.groups)
    assert asked == [count] * 4  # two modalities, two halves
    asked.clear()
    largest = max(sum(p.numel() for p in group) for group in groups_of(model).values())
    monkeypatch.setattr(gradients, "MEMORY", 4 * 4 * largest)
    in_turns = conflict(*arguments)
    assert len(asked) > 4 and sum(asked) == 4 * count
    torch.testing.assert_close(in_turns.between, at_once.between, rtol=1e-6, atol=1e-7)


def test_each_pass_fits_or_holds_one_group(monkeypatch):
    monkeypatch.setattr(gradients, "MEMORY", 4 * 2 * 10)  # room for 10 parameters of two halves
    assert gradients._passes([4, 6, 1, 30, 2, 8, 1], 2) == [2, 1, 1, 2, 1]
    assert gradients._passes([4], 0) == [1] and gradients._passes([], 2) == []
