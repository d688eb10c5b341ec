"""Crop, flip and rotation against independent implementations on single images."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from dex.data import IMAGENET_MEAN, IMAGENET_STD, augment, center, denormalize, sample_keys
from dex.data.augmentation import Crop, brightness, draw, render, uniform, with_channels

MEAN, STD = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)


def noise(batch=1, height=64, width=64, seed=0):
    return torch.randint(
        0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def keys(count, seed=0, first=0):
    return sample_keys(seed, torch.arange(first, first + count))


def crop(box, flip=False, angle=0.0):
    return Crop(torch.tensor([box]), torch.tensor([0]), torch.tensor([flip]), torch.tensor([angle]))


def pixels(result):
    """float64 [S, S, 3] in units of 0 .. 255."""
    return denormalize(result)[0].permute(1, 2, 0).double().numpy() * 255


def slow(image, box, flip, angle, size):
    """The definition, pixel by pixel, in float64; image uint8 [H, W, 3]; no antialiasing."""
    height, width = image.shape[:2]
    top, left, h, w = box
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    out = np.zeros((size, size, 3))
    for row in range(size):
        for column in range(size):
            x, y = (2 * column + 1) / size - 1, (2 * row + 1) / size - 1
            u, v = cos * x - sin * y, sin * x + cos * y
            if max(abs(u), abs(v)) > 1 + 1e-5:  # the margin that render documents
                continue
            u = -u if flip else u
            px = min(max(left + (u + 1) / 2 * w - 0.5, 0), width - 1)
            py = min(max(top + (v + 1) / 2 * h - 0.5, 0), height - 1)
            x0, y0 = int(px), int(py)
            x1, y1 = min(x0 + 1, width - 1), min(y0 + 1, height - 1)
            fx, fy = px - x0, py - y0
            out[row, column] = (1 - fy) * ((1 - fx) * image[y0, x0] + fx * image[y0, x1]) + fy * (
                (1 - fx) * image[y1, x0] + fx * image[y1, x1]
            )
    return (out / 255 - MEAN) / STD


@pytest.mark.parametrize(
    "box, flip, angle",
    [
        ((0, 0, 256, 256), False, 0.0),
        ((0, 0, 256, 256), True, 0.0),
        ((20, 31, 200, 190), False, 7.3),
        ((5, 66, 230, 180), True, -14.9),
        ((0, 0, 190, 254), True, 15.0),
    ],
)
def test_against_the_definition(box, flip, angle):
    image = noise(1, 256, 256)
    expected = slow(image[0].permute(1, 2, 0).numpy(), box, flip, angle, 192)
    got = render(image, crop(box, flip, angle), 192)[0].permute(1, 2, 0).double().numpy()
    # a pixel within rounding of the rotated edge may fall on either side
    off = np.abs(got - expected).max(axis=2)
    assert (off > 2e-4).sum() <= 2 and np.sort(off.ravel())[-3] <= 2e-4


def test_identity():
    image = noise(3)
    boxes = torch.tensor([[0, 0, 64, 64]] * 3)
    still = Crop(boxes, torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.bool), torch.zeros(3))
    got = denormalize(render(image, still, 64)) * 255
    assert (got - image).abs().max() < 5e-3
    # exactly the box where no resampling is needed
    image = noise(1, 80, 80)
    box = render(image, crop((10, 5, 64, 64)), 64)
    assert np.abs(pixels(box) - image[0, :, 10:74, 5:69].permute(1, 2, 0).numpy()).max() < 5e-3


def test_flip_is_that_of_pillow():
    image = noise(1)
    flipped = Image.fromarray(image[0].permute(1, 2, 0).numpy()).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    got = pixels(render(image, crop((0, 0, 64, 64), flip=True), 64))
    assert np.abs(got - np.asarray(flipped, float)).max() < 5e-3


@pytest.mark.parametrize("flip", [False, True])
def test_flip_then_rotation_is_that_of_pillow(flip):
    # smooth, so that interpolation rounding hides neither the order nor the direction of the turn
    y, x = np.mgrid[:128, :128] / 127
    picture = Image.fromarray(np.stack([255 * x, 255 * y, 255 * x * y], 2).astype(np.uint8))
    tensor = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None]
    expected = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else picture
    expected = np.asarray(expected.rotate(12.0, Image.Resampling.BILINEAR), float)
    got = pixels(render(tensor, crop((0, 0, 128, 128), flip, 12.0), 128))
    inside = np.asarray(Image.new("L", (128, 128), 255).rotate(12.0)) > 0
    inside[1:-1, 1:-1] &= inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    assert np.abs(got - expected)[inside].max() < 2.5


def test_rotated_corners_are_black_even_inside_a_larger_image():
    white = torch.full((1, 3, 100, 100), 255, dtype=torch.uint8)
    got = pixels(render(white, crop((20, 20, 60, 60), angle=15.0), 60))
    for row, column in ((0, 0), (0, 59), (59, 0), (59, 59)):
        assert np.abs(got[row, column]).max() < 1e-3
    assert got[30, 30].min() > 254.9
    # the share that a square loses when it turns by t about its centre
    t = math.radians(15)
    # four right triangles, whose hypotenuse on the square's side is what 1 = a + a cos t + a sin t leaves
    hypotenuse = 1 / (1 + math.cos(t) + math.sin(t))
    lost = 4 * 0.5 * hypotenuse**2 * math.cos(t) * math.sin(t)
    assert abs((got[:, :, 0] < 1).mean() - lost) < 0.01


def test_downsampling_is_antialiased():
    board = ((torch.arange(256)[:, None] + torch.arange(256)) % 2 * 255).to(torch.uint8).expand(1, 3, 256, 256)
    for size in (128, 64, 32):
        got = pixels(render(board, crop((0, 0, 256, 256)), size))
        assert np.abs(got - 127.5).max() < 2
        assert np.abs(pixels(center(board, size))[4:-4, 4:-4] - 127.5).max() < 8


def test_box_statistics():
    image = torch.full((1, 3, 256, 256), 200, dtype=torch.uint8)
    parts = [draw(image.expand(100, 3, 256, 256), keys(100, seed)) for seed in range(20)]
    chosen = Crop(*(torch.cat(column) for column in zip(*parts, strict=True)))
    top, left, h, w = chosen.boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= 256).all() and (left + w <= 256).all()
    taken = chosen.tries < 10
    area, aspect = (h * w).double() / 65536, w / h
    # whole pixels: half a pixel a side
    assert area[taken].min() > 0.5 - 0.006 and area[taken].max() <= 1
    assert aspect.min() > 0.75 - 0.01 and aspect.max() < 4 / 3 + 0.01
    assert (chosen.boxes[~taken] == torch.tensor([0, 0, 256, 256])).all()
    assert abs(aspect.log().mean()) < 0.015
    assert abs(chosen.flip.double().mean() - 0.5) < 0.04
    assert chosen.angle.abs().max() <= 15 and abs(chosen.angle.mean()) < 0.7 and abs(chosen.angle.std() - 8.66) < 0.3
    # uniform over the places that the box leaves
    place = (top[taken & (h < 240)].double() + 0.5) / (257 - h[taken & (h < 240)])
    assert abs(place.mean() - 0.5) < 0.02 and abs(place.std() - 12**-0.5) < 0.02


@pytest.mark.parametrize(
    "height, width, low",
    [(256, 256, 32768), (512, 512, 0.2 * 512**2), (300, 300, 32768), (64, 64, 2048), (200, 120, 12000)],
)
def test_smallest_area(height, width, low):
    image = torch.full((1, 3, height, width), 200, dtype=torch.uint8)
    chosen = draw(image.expand(150, 3, height, width), keys(150))
    taken = chosen.tries < 10
    area = (chosen.boxes[:, 2] * chosen.boxes[:, 3])[taken].double()
    assert low * 0.98 <= area.min() <= low * 1.1 and taken.any()


def test_brightness_is_exact():
    images = noise(4, 40, 56)
    boxes = draw(images, keys(4)).boxes[:, None]
    for data in (images, images.double() / 255):
        got = brightness(data, boxes)
        for image, box, value in zip(images, boxes[:, 0], got[:, 0], strict=True):
            top, left, h, w = box.tolist()
            assert abs(value - image[:, top : top + h, left : left + w].double().mean() / 255) < 1e-12


def test_near_black_crops_are_drawn_again():
    images = torch.zeros(100, 3, 256, 256, dtype=torch.uint8)
    images[:, :, :, 128:] = 26  # mean 0.051 of the whole right half: only boxes wholly within it pass
    images[:50, :, :, 128:] = 60
    chosen = draw(images, keys(100))
    boxes = chosen.boxes[:, None]
    taken = chosen.tries < 10
    assert (brightness(images, boxes)[:, 0][taken] >= 0.05).all()
    assert (chosen.tries[:50] > 0).any() and (chosen.tries[:50] < 10).all()
    # the same numbers without the rule: the first box that fits was passed over exactly when it was too dark
    bright = draw(torch.full_like(images, 255), keys(100))
    again = chosen.tries != bright.tries
    assert again.any() and (brightness(images, bright.boxes[:, None])[:, 0][again] < 0.05).all()
    assert (brightness(images, bright.boxes[:, None])[:, 0][~again & taken] >= 0.05).all()
    # nothing bright at all: the centre square
    dark = draw(torch.zeros(5, 3, 30, 50, dtype=torch.uint8), keys(5))
    assert (dark.boxes == torch.tensor([0, 10, 30, 30])).all() and (dark.tries == 10).all()


def test_an_image_fares_alike_in_every_batch():
    images, mine = noise(6), keys(6, seed=1, first=100)
    whole = augment(images, 48, mine)
    assert torch.equal(whole, augment(images, 48, mine)) and whole.shape == (6, 3, 48, 48)
    assert whole.dtype == torch.float32
    for parts in ([2, 2, 2], [1, 5], [4, 2], [6]):
        split = [augment(part, 48, own) for part, own in zip(images.split(parts), mine.split(parts), strict=True)]
        assert torch.equal(torch.cat(split), whole)
    turned = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(augment(images[turned], 48, mine[turned]), whole[turned])
    assert not torch.equal(whole, augment(images, 48, keys(6, seed=2, first=100)))
    same = augment(images[:1].expand(6, 3, 64, 64), 48, mine)
    assert len({image.numpy().tobytes() for image in same}) == 6
    before, keys_before, state = images.clone(), mine.clone(), torch.get_rng_state()
    augment(images.float(), 48, mine)
    center(images, 64)
    assert torch.equal(images, before) and torch.equal(mine, keys_before)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "wrong", [None, 0, torch.Generator(), torch.zeros(2), torch.zeros(3).long(), torch.zeros(2, 1).long()]
)
def test_keys_that_do_not_fit(wrong):
    with pytest.raises(ValueError, match=r"^keys: expected int64 \[2\]"):
        augment(noise(2), 32, wrong)
    with pytest.raises(ValueError, match="^keys: expected a tensor on the images' device cpu, got one on meta"):
        augment(noise(2), 32, torch.zeros(2, dtype=torch.int64, device="meta"))


def test_float_and_uint8_agree():
    images = noise(4)
    eight = augment(images, 64, keys(4))
    for dtype, bound in ((torch.float32, 1e-4), (torch.float64, 1e-4), (torch.float16, 5e-3)):
        assert (augment((images.double() / 255).to(dtype), 64, keys(4)) - eight).abs().max() < bound
    untouched = images.float() / 255
    copy = untouched.clone()
    assert (center(untouched, 64) - center(images, 64)).abs().max() < 1e-5 and torch.equal(untouched, copy)


def test_strided_input():
    images = noise(4, 64, 64).contiguous(memory_format=torch.channels_last)
    assert torch.equal(augment(images, 64, keys(4)), augment(images.contiguous(), 64, keys(4)))
    apart = torch.stack([keys(4), keys(4, 1)], 1)[:, 0]
    assert torch.equal(augment(images, 64, apart), augment(images, 64, keys(4)))


def test_every_shape_is_traced_without_values():
    # on "meta" there are no values: whatever looked at one, which on a GPU means waiting for it, would raise
    images = torch.empty(5, 3, 256, 256, dtype=torch.uint8, device="meta")
    places = torch.empty(5, dtype=torch.int64, device="meta")
    out = augment(images, 224, sample_keys(0, places))
    assert out.shape == center(images, 224).shape == (5, 3, 224, 224)


class HostTraffic(TorchDispatchMode):
    """Records what on a GPU would make the host wait: numbers from host lists, values read back, blocking copies."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        waits = name in {"lift_fresh", "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select"}
        if name == "_to_copy":
            waits = out.device != args[0].device and not kwargs.get("non_blocking", False)
        elif name == "copy_":
            waits = args[0].device != args[1].device and not (len(args) > 2 and args[2])
        if waits:
            self.seen.append(name)
        return out


@pytest.mark.parametrize(
    "wait, name",
    [
        (lambda x: torch.tensor([1.0], device=x.device), "lift_fresh"),
        (lambda x: x[0].item(), "_local_scalar_dense"),
        (lambda x: bool(x[0] > 0), "_local_scalar_dense|is_nonzero"),
        (lambda x: x.to("meta"), "_to_copy"),
        (lambda x: torch.empty(2, device="meta").copy_(x), "copy_"),
    ],
)
def test_host_traffic_is_seen(wait, name):
    with HostTraffic() as traffic:
        wait(torch.ones(2))
    assert set(traffic.seen) & set(name.split("|"))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_host_never_waits(device, dtype):
    # "cpu" shows host lists made into tensors; "meta" refuses tolist and numpy, which leave no trace on the CPU
    images = torch.zeros(5, 3, 300, 256, dtype=dtype, device=device)
    places = torch.zeros(5, dtype=torch.int64, device=device)
    with HostTraffic() as traffic:
        for size in (224, 64):
            out = augment(images, size, sample_keys(3, places))
        denormalize(center(images, 224))
        denormalize(out)
    assert traffic.seen == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_host_never_waits_on_cuda():
    images, places = noise(8, 256, 256).cuda(), torch.arange(8).cuda()
    augment(images, 224, sample_keys(0, places))  # the first call may load libraries
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.tensor([1.0], device="cuda")
        augment(images, 224, sample_keys(1, places))
        augment(images.float() / 255, 64, sample_keys(1, places))
        denormalize(center(images, 224))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_agrees():
    images = noise(8, 256, 256)
    places = torch.arange(1000, 1008)
    mine, theirs = sample_keys(4, places), sample_keys(4, places.cuda())
    assert theirs.is_cuda and torch.equal(mine, theirs.cpu())
    assert torch.equal(uniform(mine, 42), uniform(theirs, 42).cpu())
    here, there = augment(images, 224, mine), augment(images.cuda(), 224, theirs)
    assert there.is_cuda and ((here - there.cpu()).abs() > 2e-3).sum() < 50


def test_centre():
    images = noise(2)
    expected = (images.permute(0, 2, 3, 1).double().numpy() / 255 - MEAN) / STD
    assert np.abs(center(images, 64).permute(0, 2, 3, 1).numpy() - expected).max() < 1e-6
    wide = noise(1, 40, 70)
    assert torch.equal(center(wide, 40), center(wide[:, :, :, 15:55].contiguous(), 40))
    halved = center(noise(1, 128, 128), 64)
    pillow = Image.fromarray(noise(1, 128, 128)[0].permute(1, 2, 0).numpy()).resize((64, 64), Image.Resampling.BILINEAR)
    assert np.abs(pixels(halved) - np.asarray(pillow, float)).max() < 1.01


def test_empty_batch():
    empty = torch.empty(0, 3, 64, 64, dtype=torch.uint8)
    assert augment(empty, 32, keys(0)).shape == center(empty, 32).shape == (0, 3, 32, 32)


@pytest.mark.parametrize(
    "images, size, name",
    [
        (torch.zeros(3, 64, 64), 32, "images"),
        (torch.zeros(2, 2, 64, 64), 32, "images"),
        (np.zeros((2, 3, 8, 8)), 32, "images"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.int32), 32, "images"),
        (torch.zeros(2, 3, 0, 8), 32, "images"),
        (torch.zeros(2, 3, 64, 64), 0, "size"),
        (torch.zeros(2, 3, 64, 64), 32.0, "size"),
        (torch.zeros(2, 3, 64, 64), (32, 32, 32), "size"),
        (torch.zeros(2, 3, 64, 64), (32, 0), "size"),
    ],
)
def test_arguments(images, size, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        augment(images, size, keys(2))
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        center(images, size)


def test_denormalize():
    images = noise(2)
    assert (denormalize(center(images, 64)) * 255 - images).abs().max() < 1e-4
    assert denormalize(center(images, 64)[0]).shape == (3, 64, 64)
    with pytest.raises(ValueError, match="^images: expected a float tensor"):
        denormalize(images)


@pytest.mark.parametrize("size", [(32, 64), (64, 32), (48, 64)])
def test_a_rectangle_is_cut_without_stretching(size):
    """A disc stays one, in the centre as in every crop whose aspect is the result's; colours come to grey alike."""
    y, x = np.mgrid[0:128, 0:128] - 63.5
    disc = torch.from_numpy(((x * x + y * y < 30 * 30) * 255).astype(np.uint8)).expand(1, 3, 128, 128)
    out = pixels(center(disc, size))[..., 0] > 127
    rows, columns = out.any(1).sum(), out.any(0).sum()
    assert out.shape == size and abs(int(rows) - int(columns)) <= 1 and rows > 20
    assert augment(disc, size, keys(1)).shape == (1, 3, *size)


def test_crops_of_a_rectangle_lie_around_its_shape():
    images = torch.full((256, 1, 128, 128), 200, dtype=torch.uint8)
    boxes = draw(images, keys(256), (32, 64)).boxes.double()
    aspects = boxes[:, 3] / boxes[:, 2]
    assert 1.45 < aspects.min() and aspects.max() < 2.75 and 1.8 < aspects.log().mean().exp() < 2.2
    assert (boxes[:, 2] * boxes[:, 3] >= 0.48 * 64 * 128).all()


def test_a_turned_rectangle_keeps_its_angles():
    """A bar along the middle, turned by 15 degrees, leaves the middle as far as 15 degrees say."""
    image = torch.zeros(1, 1, 129, 129, dtype=torch.uint8)
    image[:, :, 62:67] = 255
    turn = crop((32, 0, 64, 128), angle=15.0)
    turned = pixels(render(image, turn, (64, 128)))[..., 0]
    rows = (turned[:, [44, 84]] * np.arange(64)[:, None]).sum(0) / turned[:, [44, 84]].sum(0)
    assert abs(abs(rows[1] - rows[0]) - 40 * np.tan(np.pi / 12)) < 0.7


def test_luminance_is_pillows():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    grey = with_channels(torch.from_numpy(image).permute(2, 0, 1)[None], 1)[0, 0]
    assert np.abs(grey.numpy().astype(int) - np.asarray(Image.fromarray(image).convert("L"))).max() <= 1
    assert with_channels(grey[None, None], 3).shape == (1, 3, 64, 64)
