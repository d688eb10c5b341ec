"""One image laid upon the other: known shifts and scales are found, and what is left tells copies from others."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dex.data import open_dataset
from dex.prepare.alignment import COPY, RELATED, SIDE, align

STILL = torch.tensor([[0.0, 0.0, 1.0]])


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """float32 [8, 256, 256], of several modalities."""
    dataset = open_dataset(None)
    levels = [dataset[index].image.float().mean(dim=0) for index in range(0, len(dataset), 80)]
    return torch.stack(levels)


def small(images: torch.Tensor) -> torch.Tensor:
    return F.adaptive_avg_pool2d(images[:, None], SIDE)[:, 0]


def cut(images: torch.Tensor, left: float, top: float, side: float) -> torch.Tensor:
    """float32 [P, 256, 256]: a square of each, resized."""
    box = (left, top, left + side, top + side)
    resized = [Image.fromarray(image.numpy()).resize((256, 256), Image.Resampling.BICUBIC, box=box) for image in images]
    return torch.stack([torch.from_numpy(np.array(image)) for image in resized])


@pytest.mark.parametrize("left, top, side", [(0, 0, 256), (4, 9, 243), (10, 2, 240), (3, 3, 250)])
def test_where_a_crop_lies(images, left, top, side):
    result = align(small(images), small(cut(images, left, top, side)), STILL.expand(len(images), 3))
    assert (result.finest > COPY).all() and (result.fine > COPY).all() and (result.coarse > 0.97).all()
    centre = torch.tensor([left + side / 2 - 128, top + side / 2 - 128]) / 256
    assert torch.allclose(result.shift, centre.expand_as(result.shift), atol=0.004)
    assert torch.allclose(result.scale, torch.full_like(result.scale, side / 256), atol=0.006)


@pytest.mark.parametrize("change", [lambda x: 0.7 * x + 20, lambda x: 255 * (x / 255) ** 1.2, lambda x: 200 - 0.5 * x])
def test_gain_and_offset_do_not_count(images, change):
    """Nor does a mild gamma; a negative is no copy."""
    result = align(small(images), small(change(images)), STILL.expand(len(images), 3))
    copies = float(change(torch.tensor(200.0)) - change(torch.tensor(100.0))) > 0
    assert ((result.fine > RELATED) == copies).all()


def test_others_are_not_related(images):
    result = align(small(images), small(images.roll(1, dims=0)), STILL.expand(len(images), 3))
    assert (result.fine < RELATED).all()


def test_own_detail_lowers_the_fine_correlation_alone(images):
    draw = torch.Generator().manual_seed(0)
    detail = F.interpolate(torch.randn(len(images), 1, 64, 64, generator=draw), size=(256, 256), mode="bicubic")[:, 0]
    spread = images.std(dim=(1, 2), keepdim=True)
    result = align(small(images), small(images + 0.2 * spread * detail), STILL.expand(len(images), 3))
    assert (result.coarse > 0.97).all() and (result.finest < COPY).all()


def test_without_detail_nothing_is_compared():
    slope = torch.linspace(0, 20, SIDE).expand(1, SIDE, SIDE)
    result = align(slope, slope.clone(), STILL)
    assert result.coarse.item() > 0.99 and result.fine.item() == -1
    even = torch.full((1, SIDE, SIDE), 80.0)
    assert align(even, even, STILL).coarse.item() == -1
