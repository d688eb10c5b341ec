"""Plain folders: what is taken, how each format becomes uint8 RGB, what is refused and how."""

import io
import logging
import os
import pickle
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dex.data import Loader, SampleError, open_dataset
from dex.data.images import decode, npy_to_uint8, square

rng = np.random.default_rng(0)
GREY = rng.integers(0, 256, (256, 256), dtype=np.uint8)
COLOUR = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)


def png(image, **options):
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, "PNG", **options)
    return stream.getvalue()


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def put(folder, **files):
    for name, data in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def only(folder):
    return open_dataset(folder)[0].image.permute(1, 2, 0).numpy()


def test_modalities_ids_and_order(tmp_path, caplog):
    put(
        tmp_path,
        b__deep__2_dot_png=png(GREY),
        b__10_dot_PNG=png(GREY),
        a__z_dot_npy=npy(GREY),
        top_dot_jpeg=_jpeg(GREY),
        a__notes_dot_txt=b"x",
        README=b"x",
    )
    (tmp_path / "a" / "Ä.png").write_bytes(png(COLOUR))
    dataset = open_dataset(tmp_path)
    assert [dataset[index].id for index in range(5)] == ["a/z.npy", "a/Ä.png", "b/10.PNG", "b/deep/2.png", "top.jpeg"]
    assert dataset.modalities == ("a", "b", "unknown")
    assert dataset.modality_counts() == {"a": 2, "b": 2, "unknown": 1}
    assert dataset.modality_index().tolist() == [0, 0, 1, 1, 2]
    assert dict(dataset.ignored) == {".txt": 1, "without suffix": 1}
    assert "ignored 1 .txt, 1 without suffix" in caplog.text
    assert dataset[0].image.shape == (3, 256, 256) and dataset[0].image.dtype == torch.uint8


def test_fingerprint_is_of_paths_and_sizes(tmp_path):
    one, two = put(tmp_path / "one", m__1_dot_npy=npy(GREY)), put(tmp_path / "two", m__1_dot_npy=npy(255 - GREY))
    assert open_dataset(one).fingerprint == open_dataset(two).fingerprint
    put(two, m__2_dot_npy=npy(GREY))
    assert open_dataset(one).fingerprint != open_dataset(two).fingerprint


def test_split_is_stable_and_about_one_in_twenty(tmp_path):
    for number in range(400):
        put(tmp_path, **{f"m__{number}_dot_npy": b""})
    dataset = open_dataset(tmp_path)
    train, val = dataset.split("train"), dataset.split("val")
    ids = {val.sample_id(index) for index in range(len(val))}
    assert len(train) + len(val) == 400 and 8 <= len(val) <= 35
    put(tmp_path, m__new_dot_npy=b"")
    later = open_dataset(tmp_path).split("val")
    assert ids <= {later.sample_id(index) for index in range(len(later))} <= ids | {"m/new.npy"}


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="path: expected a folder"):
        open_dataset(tmp_path / "absent")
    put(tmp_path, m__notes_dot_txt=b"x")
    with pytest.raises(ValueError, match=r"path: expected PNG, JPEG or NPY .* found none \(ignored: \{'.txt': 1\}\)"):
        open_dataset(tmp_path)
    with pytest.raises(ValueError, match="path: expected a folder .* got the file"):
        open_dataset(tmp_path / "m" / "notes.txt")


@pytest.mark.parametrize("inside", ["images", "shards"])
def test_an_empty_path_is_not_the_current_folder(inside, tmp_path, monkeypatch):
    put(tmp_path, **({"1_dot_png": png(GREY)} if inside == "images" else {"manifest_dot_json": b"{}"}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^path: expected a folder .* got ''"):
        open_dataset("")


def _jpeg(array, **options):
    stream = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(stream, "JPEG", quality=95, **options)
    return stream.getvalue()


def _smooth():
    x = np.linspace(0, 255, 256)
    return np.stack(
        [np.broadcast_to(x, (256, 256)), np.broadcast_to(x[:, None], (256, 256)), np.full((256, 256), 90.0)], 2
    ).astype(np.uint8)


ALPHA = np.where(np.arange(256) < 128, 255, 0).astype(np.uint8)[None].repeat(256, 0)
BLACKED = COLOUR * (ALPHA == 255)[:, :, None]
GREYED = np.repeat((GREY * (ALPHA == 255))[:, :, None], 3, 2)
WIDE = rng.integers(0, 65536, (256, 256), dtype=np.uint16)
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
        (_jpeg(_smooth()), "jpg", _smooth(), 6),
        (_jpeg(Image.fromarray(_smooth()).convert("CMYK")), "jpg", _smooth(), 6),
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


TWELVE = (WIDE // 16).clip(0, 4095)


def _warnings(caplog):
    return [record.getMessage() for record in caplog.records if "16-bit" in record.getMessage()]


@pytest.mark.parametrize(
    "data, suffix", [(png(TWELVE), "png"), (npy(TWELVE), "npy"), (npy(TWELVE.astype(">u2")), "npy")]
)
def test_twelve_bits_in_sixteen_are_warned_of_once(data, suffix, tmp_path, caplog):
    put(tmp_path, **{f"m__{number}_dot_{suffix}": data for number in range(3)}, m__a_dot_png=png(WIDE))
    dataset = open_dataset(tmp_path)
    parts = [dataset, dataset.split("train"), dataset.split("val")]
    assert dataset.dim is None and _warnings(caplog) == []
    for part in parts:
        for index in range(len(part)):
            assert part[index].image.max() == (255 if part.sample_id(index) == "m/a.png" else 16)  # the rule stands
    (message,) = _warnings(caplog)
    assert f"'m/0.{suffix}' has no value above 4095" in message and "full range" in message and "[0, 1]" in message
    assert caplog.records[-1].name == "dex.data" and {part.dim for part in parts} == {(f"m/0.{suffix}", 4095)}


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_warn_once_between_them(workers, tmp_path, caplog):
    dataset = open_dataset(put(tmp_path, **{f"m__{number}_dot_png": png(TWELVE) for number in range(8)}))
    with caplog.at_level(logging.WARNING, "dex.data"):
        for _ in range(2):
            with Loader(dataset, 2, seed=0, num_workers=workers) as loader:
                first = next(loader).ids[0]
                for _ in range(5):
                    next(loader)
    (message,) = _warnings(caplog)
    assert repr(first) in message


@pytest.mark.parametrize(
    "data, suffix",
    [
        (png(WIDE), "png"),
        (png(np.full((64, 64), 2**14, np.uint16)), "png"),
        (png(np.zeros((64, 64), np.uint16)), "png"),  # black on purpose
        (npy(np.full((64, 64), 9, np.uint8)), "npy"),
        (npy(np.full((64, 64), 0.01)), "npy"),
        (png(np.full((64, 64), 9, np.uint8)), "png"),
    ],
)
def test_what_uses_its_range_or_has_eight_bits_is_not_warned_of(data, suffix, tmp_path, caplog):
    assert only(put(tmp_path, **{f"m__1_dot_{suffix}": data})).shape == (256, 256, 3)
    assert _warnings(caplog) == []


def test_palette():
    image = Image.fromarray(_smooth()).quantize(64)
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
    "npy_short": (_npy_claiming((64, 64)), "npy", "needs 16384 bytes, the file holds 16"),
    "npy_negative": (_npy_claiming((-4, 64)), "npy", "size: expected"),
    "npy_rank": (npy(np.zeros((4, 64, 64, 3), np.uint8)), "npy", "shape: expected"),
    "npy_channels": (npy(np.zeros((64, 64, 4), np.uint8)), "npy", "shape: expected"),
    "npy_int": (npy(np.zeros((64, 64), np.int16)), "npy", "dtype: expected uint8, uint16 or float, got int16"),
    "npy_range": (npy(np.full((64, 64), 1.5)), "npy", "within .0, 1., got minimum 1.5"),
    "npy_nan": (npy(np.where(np.eye(64), np.nan, 0.5)), "npy", "expected finite"),
    "npy_header": (b"\x93NUMPY\x01\x00\xff\x00" + b"(" * 255, "npy", "not a readable npy"),
    "npy_empty": (b"", "npy", "not a readable npy"),
    "png_bomb": (_png_claiming(60_000, 60_000), "png", "DecompressionBombError|size: expected"),
    "png_large": (_png_claiming(9_000, 9_000), "png", "size: expected"),
    "png_short": (_png_claiming(100, 100), "png", "not a readable png"),
    "png_text": (b"hello", "png", "not a readable png"),
    "png_tiny": (png(np.zeros((7, 300), np.uint8)), "png", "size: expected at least 8 pixels"),
    "jpg_short": (_jpeg(COLOUR)[:5000], "jpg", "not a readable jpg"),
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
        ("jpg", _jpeg(COLOUR[:40, :40])),
        ("jpg", _jpeg(COLOUR[:40, :40], progressive=True)),
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
        npy_to_uint8(_object_npy(canary))
    assert not os.path.exists(canary)


def test_links_and_devices_are_not_followed(tmp_path):
    outside = put(tmp_path / "outside", secret_dot_png=png(GREY))
    root = put(tmp_path / "root", m__in_dot_png=png(GREY))
    (root / "m" / "file.png").symlink_to(outside / "secret.png")
    (root / "folder").symlink_to(outside)
    os.mkfifo(root / "m" / "pipe.png")
    dataset = open_dataset(root)
    assert [dataset.sample_id(index) for index in range(len(dataset))] == ["m/in.png"]
    assert dataset.ignored["symbolic link"] == 2
    # swapped for a link, or removed, after the folder was listed
    (root / "m" / "in.png").unlink()
    with pytest.raises(SampleError, match="No such file"):
        dataset[0]
    (root / "m" / "in.png").symlink_to(outside / "secret.png")
    with pytest.raises(SampleError):
        dataset[0]
