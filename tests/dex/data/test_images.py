"""How each format becomes uint8 RGB, and what is refused."""

import io
import os
import pickle
import random
import re
import struct
import zlib

import numpy as np
import pytest
from picture_files import COLOUR, GREY, WIDE, jpeg, npy, only, png, put, smooth
from PIL import Image

from dex.data import Loader, SampleError, open_dataset
from dex.data.images import decode, square

ALPHA = np.where(np.arange(256) < 128, 255, 0).astype(np.uint8)[None].repeat(256, 0)


BLACKED = COLOUR * (ALPHA == 255)[:, :, None]


GREYED = np.repeat((GREY * (ALPHA == 255))[:, :, None], 3, 2)


EIGHT = np.rint(WIDE / 65535 * 255).astype(np.uint8)


@pytest.mark.parametrize(
    "data, kind, expected, tolerance",
    [
        (png(GREY), "png", GREY[:, :, None].repeat(3, 2), 0),
        (png(COLOUR), "png", COLOUR, 0),
        (png(np.dstack([COLOUR, ALPHA])), "png", BLACKED, 0),
        (png(Image.fromarray(np.dstack([GREY, ALPHA]), "LA")), "png", GREYED, 0),
        (png(WIDE), "png", EIGHT[:, :, None].repeat(3, 2), 0),
        (png(Image.fromarray(GREY > 99)), "png", ((GREY > 99) * np.uint8(255))[:, :, None].repeat(3, 2), 0),
        (jpeg(smooth()), "jpg", smooth(), 6),
        (jpeg(Image.fromarray(smooth()).convert("CMYK")), "jpg", smooth(), 6),
        (npy(GREY), "npy", GREY[:, :, None].repeat(3, 2), 0),
        (npy(GREY[:, :, None]), "npy", GREY[:, :, None].repeat(3, 2), 0),
        (npy(np.asfortranarray(COLOUR)), "npy", COLOUR, 0),
        (npy(WIDE), "npy", EIGHT[:, :, None].repeat(3, 2), 0),
        (npy(WIDE.astype(">u2")), "npy", EIGHT[:, :, None].repeat(3, 2), 0),
        (npy(COLOUR / 255), "npy", COLOUR, 0),
        (npy((COLOUR / 255).astype(np.float16)), "npy", COLOUR, 1),
    ],
)
def test_formats(data, kind, expected, tolerance):
    got = square(decode(data, kind), 256)
    assert got.dtype == np.uint8 and got.shape == (256, 256, 3)
    assert np.abs(got.astype(int) - expected.astype(int)).max() <= tolerance


def test_palette():
    image = Image.fromarray(smooth()).quantize(64)
    expected = np.asarray(image.convert("RGB"))
    assert (square(decode(png(image), "png"), 256) == expected).all()
    # a transparent palette entry is black
    used = int(np.asarray(image)[0, 0])
    got = square(decode(png(image, transparency=used), "png"), 256)
    assert (got[np.asarray(image) == used] == 0).all() and (
        got[np.asarray(image) != used] == expected[np.asarray(image) != used]
    ).all()


@pytest.mark.parametrize(
    "orientation, undo",
    [
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a)),
    ],
)
def test_exif_orientation(orientation, undo):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert (square(decode(png(COLOUR, exif=exif), "png"), 256) == undo(COLOUR)).all()


def test_resizing_is_of_the_centre_square_and_antialiased(tmp_path):
    # a disc in a wide picture stays round and in the middle
    y, x = np.mgrid[:600, :1000]
    disc = (((x - 500) ** 2 + (y - 300) ** 2 < 150**2) * 255).astype(np.uint8)
    image = only(put(tmp_path, m__1_dot_png=png(disc)))[:, :, 0] > 127
    rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
    for extent in (rows, columns):
        assert abs(extent[0] + extent[-1] - 255) <= 1 and abs(len(extent) - 300 * 256 / 600) <= 1
    # a one-pixel chessboard becomes grey, not a moire
    board = ((np.indices((1024, 1024)).sum(0) % 2) * 255).astype(np.uint8)
    inner = square(decode(png(board), "png"), 256)[8:-8, 8:-8]
    assert inner.min() >= 120 and inner.max() <= 135
    # extreme shapes do not grow on the way
    assert square(decode(png(np.zeros((8, 200_000), np.uint8)), "png"), 256).shape == (256, 256, 3)


def _png_claiming(width, height):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def _npy_claiming(shape, descr="<f4", body=b"\0" * 16):
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    header += b" " * (63 - (10 + len(header)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def _object_npy(path):
    stream = io.BytesIO()
    np.save(stream, np.array([[Canary(path)]], dtype=object), allow_pickle=True)
    return stream.getvalue()


REFUSED = {
    "npy_149_gib": (_npy_claiming((200_000, 200_000)), "npy", "size: expected"),
    "npy_short": (_npy_claiming((64, 64)), "npy", "expected 16384 bytes, got 16"),
    "npy_negative": (_npy_claiming((-4, 64)), "npy", "size: expected"),
    "npy_rank": (npy(np.zeros((4, 64, 64, 3), np.uint8)), "npy", "shape: expected"),
    "npy_channels": (npy(np.zeros((64, 64, 4), np.uint8)), "npy", "shape: expected"),
    "npy_int": (npy(np.zeros((64, 64), np.int16)), "npy", "dtype: expected uint8, uint16 or float, got int16"),
    "npy_range": (npy(np.full((64, 64), 1.5)), "npy", "within .0, 1., got minimum 1.5"),
    "npy_nan": (npy(np.where(np.eye(64), np.nan, 0.5)), "npy", "expected finite"),
    "npy_header": (b"\x93NUMPY\x01\x00\xff\x00" + b"(" * 255, "npy", "not a readable npy"),
    "npy_version": (
        npy(GREY).replace(b"\x93NUMPY\x01", b"\x93NUMPY\x03"),
        "npy",
        "format version 1.0 or 2.0, got 3.0; save",
    ),
    "npy_empty": (b"", "npy", "not a readable npy"),
    "png_bomb": (_png_claiming(60_000, 60_000), "png", "DecompressionBombError|size: expected"),
    "png_large": (_png_claiming(9_000, 9_000), "png", "size: expected"),
    "png_short": (_png_claiming(100, 100), "png", "not a readable png"),
    "png_text": (b"hello", "png", "not a readable png"),
    "png_tiny": (png(np.zeros((7, 300), np.uint8)), "png", "size: expected at least 8 pixels"),
    "jpg_short": (jpeg(COLOUR)[:5000], "jpg", "not a readable jpg"),
    "gif_inside": (b"GIF89a" + b"\0" * 100, "png", "not a readable png"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_named(name, tmp_path):
    data, kind, reason = REFUSED[name]
    put(tmp_path, **{f"m__x_dot_{kind}": data})
    with pytest.raises(SampleError, match=reason) as caught:
        open_dataset(tmp_path)[0]
    assert caught.value.sample_id == f"m/x.{kind}" and str(tmp_path) not in str(caught.value)
    assert type(pickle.loads(pickle.dumps(caught.value))) is SampleError  # it crosses processes


def test_damaged_files_raise_nothing_else():
    draw = random.Random(0)
    starts = [
        ("png", png(COLOUR[:40, :40])),
        ("png", png(WIDE[:40, :40])),
        ("jpg", jpeg(COLOUR[:40, :40])),
        ("jpg", jpeg(COLOUR[:40, :40], progressive=True)),
        ("npy", npy(COLOUR[:20, :20] / 255)),
    ]
    refused = 0
    for trial in range(1500):
        kind, data = starts[trial % len(starts)]
        data = bytearray(data)
        for _ in range(draw.randrange(1, 6)):
            # headers are where the harm is done
            at = draw.randrange(min(len(data), 200) if draw.random() < 0.7 else len(data))
            data[at] = draw.randrange(256)
        data = data[: draw.randrange(len(data))] if draw.random() < 0.1 else data
        try:
            assert square(decode(bytes(data), kind), 16).shape == (16, 16, 3)
        except ValueError:
            refused += 1
    assert 300 < refused < 1500


def test_no_pickle_is_executed(tmp_path):
    canary = str(tmp_path / "executed")
    put(
        tmp_path / "set",
        m__object_dot_npy=_object_npy(canary),
        m__plain_dot_npy=pickle.dumps(Canary(canary)),
        m__as_dot_png=pickle.dumps(Canary(canary)),
        m__ok_dot_png=png(GREY),
    )
    dataset = open_dataset(tmp_path / "set")
    for index in range(len(dataset)):
        if not dataset.sample_id(index).endswith("ok.png"):
            with pytest.raises(SampleError):
                dataset[index]
    with Loader(dataset, 2, seed=0) as loader:
        assert {sample for _ in range(4) for sample in next(loader).ids} == {"m/ok.png"}
    with pytest.raises(ValueError, match="dtype: expected"):
        decode(_object_npy(canary), "npy")
    assert not os.path.exists(canary)


def saved(image, kind, **options):
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return stream.getvalue()


FLOATS = (WIDE / 65535).astype(np.float32)


@pytest.mark.parametrize(
    "suffix, data, expected, tolerance",
    [
        ("tif", saved(COLOUR, "TIFF"), COLOUR, 0),
        ("TIFF", saved(GREY, "TIFF", compression="tiff_lzw"), GREY, 0),
        ("tif", saved(WIDE, "TIFF"), EIGHT, 0),
        ("tif", saved(WIDE, "TIFF", tiffinfo={262: 0}), 255 - EIGHT, 0),
        ("tif", saved(FLOATS, "TIFF"), EIGHT, 0),
        ("bmp", saved(COLOUR, "BMP"), COLOUR, 0),
        ("gif", saved(Image.fromarray(GREY), "GIF", save_all=True, append_images=[Image.fromarray(GREY.T)]), GREY, 0),
        ("webp", saved(COLOUR, "WEBP", lossless=True), COLOUR, 0),
        ("jp2", saved(COLOUR, "JPEG2000"), COLOUR, 0),
        ("ppm", saved(COLOUR, "PPM"), COLOUR, 0),
        ("pgm", saved(WIDE, "PPM"), EIGHT, 0),
        ("png", saved(COLOUR, "WEBP", lossless=True), COLOUR, 0),  # whatever it is called
        ("tif", saved(smooth(), "TIFF", compression="jpeg"), smooth(), 12),
    ],
)
def test_every_format_of_pictures_is_read_in_a_plain_folder(suffix, data, expected, tolerance, tmp_path):
    got = only(put(tmp_path, **{f"m__x_dot_{suffix}": data}))
    expected = expected if expected.ndim == 3 else expected[:, :, None].repeat(3, 2)
    assert np.abs(got.astype(int) - expected.astype(int)).max() <= tolerance


@pytest.mark.parametrize(
    "data, says",
    [
        (saved(Image.fromarray(GREY), "TIFF", save_all=True, append_images=[Image.fromarray(GREY)]), "several pages"),
        (saved(WIDE.astype(np.int32), "TIFF"), "signed numbers of 32 bits; `dex prepare`"),
        (saved(FLOATS * 900, "TIFF"), r"within \[0, 1\], got minimum .* scale them"),
        (saved(Image.fromarray(COLOUR).convert("LAB"), "TIFF"), "colour mode LAB is not supported; save it as RGB"),
        (b"%PDF-1.4 and so on", "first bytes are not those of a picture"),
        (saved(COLOUR, "TIFF", compression="tiff_lzw")[:4000], "not a readable picture: it"),
        (b"", "the file is empty"),
    ],
)
def test_what_a_plain_folder_cannot_use_is_a_sentence(data, says, tmp_path):
    with pytest.raises(SampleError, match=says) as caught:
        open_dataset(put(tmp_path, m__x_dot_tif=data))[0]
    assert not re.search(r"\w+(Error|Exception)\b", str(caught.value).replace("SampleError", ""))
