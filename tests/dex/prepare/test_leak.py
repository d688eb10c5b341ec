"""Overlap of two sets: planted copies in other formats and sizes, shifted, cropped, mirrored and turned ones, and
neighbours in a volume are found, counted and named, nothing else is."""

import csv
import io
import json

import numpy as np
import pytest
from PIL import Image

from dex.data import ShardWriter, open_dataset
from dex.prepare import leak
from dex.prepare.leak import Leak, Pair
from dex.prepare.leak import leak as find_leak


def encode(image: np.ndarray, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, {"jpg": "JPEG", "png": "PNG"}[kind], **options)
    return stream.getvalue()


def found(**counts) -> dict[str, int]:
    return dict.fromkeys(leak.KINDS, 0) | counts


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """Real images [256, 256, 3] that are no near duplicates of each other."""
    dataset = open_dataset(None)
    return [dataset[index].image.numpy().transpose(1, 2, 0) for index in range(0, 400, 25)]


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """A shard set of the first ten pictures: six CT of the source "first", four MR of "second"."""
    root = tmp_path_factory.mktemp("trained") / "trained"
    with ShardWriter(root, name="trained", modalities=("CT", "MR")) as writer:
        for number, picture in enumerate(pictures[:10]):
            source, modality = ("first", "CT") if number < 6 else ("second", "MR")
            writer.add(
                f"{source}/{number}", encode(picture, "png"), kind="png", modality=modality, split="train", group=""
            )
    return root


@pytest.fixture
def tested(pictures, tmp_path):
    """A folder: two exact copies, two near ones, three other pictures, two files that cannot be read."""
    root = tmp_path / "tested"
    files = {
        "CT/same.png": encode(pictures[1], "png"),
        "CT/larger.png": encode(np.asarray(Image.fromarray(pictures[2]).resize((512, 512))), "png"),
        "MR/same.png": encode(pictures[7], "png"),
        "MR/jpeg.jpg": encode(pictures[3], "jpg", quality=80),
        **{f"CT/other-{number}.png": encode(pictures[number], "png") for number in (10, 11, 12)},
        "CT/broken.png": b"no picture",
        "MR/broken.jpg": encode(pictures[0], "jpg")[:2000],
    }
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def test_planted_copies(trained, tested):
    report = find_leak(trained, tested)
    assert report.overlap
    assert report.b.found == found(exact=2, near=2) == report.a.found
    assert (report.a.images, report.b.images) == (10, 9)
    assert report.b.unreadable == 2 and report.b.unreadable_ids == ("CT/broken.png", "MR/broken.jpg")
    assert report.a.unreadable == 0
    assert report.by_modality == (
        {"modality": "CT", "images": 6} | found(exact=1, near=1),
        {"modality": "MR", "images": 3} | found(exact=1, near=1),
    )
    assert report.by_source == (
        {"source": "CT", "of": "first"} | found(exact=1, near=1),
        {"source": "MR", "of": "first"} | found(near=1),
        {"source": "MR", "of": "second"} | found(exact=1),
    )
    assert report.pairs == (
        Pair("near", "CT/larger.png", "first/2"),
        Pair("exact", "CT/same.png", "first/1"),
        Pair("near", "MR/jpeg.jpg", "first/3"),
        Pair("exact", "MR/same.png", "second/7"),
    )


def test_no_overlap(pictures, trained, tmp_path):
    (tmp_path / "others").mkdir()
    for number in (10, 11, 12):
        (tmp_path / "others" / f"{number}.png").write_bytes(encode(pictures[number], "png"))
    report = find_leak(trained, tmp_path / "others")
    assert not report.overlap and report.b.found == found() and report.pairs == ()
    assert report.by_source == ()
    assert report.to_text().splitlines() == [
        "others: 0 of 3 images occur in trained (0 exact, 0 near, 0 moved, 0 neighbour)",
        "trained: 0 of 10 images occur in others (0 exact, 0 near, 0 moved, 0 neighbour)",
        "no overlap found",
    ]


def test_near_copies_alone_are_an_overlap(pictures, trained, tmp_path):
    (tmp_path / "jpegs").mkdir()
    (tmp_path / "jpegs" / "3.jpg").write_bytes(encode(pictures[3], "jpg", quality=80))
    report = find_leak(trained, tmp_path / "jpegs")
    assert report.b.found == found(near=1) and report.overlap and report.to_json()["overlap"] is True
    assert "no overlap" not in report.to_text()


def test_unreadable_images_of_the_first_set(pictures, tested, tmp_path):
    """They shift no id: what stands behind them is named as itself. A source is what stands before the first "/"."""
    (tmp_path / "b" / "CT" / "deep").mkdir(parents=True)
    (tmp_path / "b" / "CT" / "deep" / "again.png").write_bytes(encode(pictures[7], "png"))
    report = find_leak(tested, tmp_path / "b")
    assert (report.a.unreadable, report.b.unreadable) == (2, 0)
    assert report.pairs == (Pair("exact", "CT/deep/again.png", "MR/same.png"),)
    assert report.by_source == ({"source": "CT", "of": "MR"} | found(exact=1),)


def test_a_copy_among_many_copies(pictures, trained, tmp_path):
    """Each image counts once on its side, however often the other side holds it."""
    (tmp_path / "copies").mkdir()
    for number in range(5):
        (tmp_path / "copies" / f"{number}.png").write_bytes(encode(pictures[4], "png"))
    report = find_leak(trained, tmp_path / "copies")
    assert report.b.found == found(exact=5) and report.a.found == found(exact=1)


def test_embedded_set_against_itself():
    report = find_leak(None, None)
    dataset = open_dataset(None)
    assert report.b.found == found(exact=len(dataset))
    assert {row["modality"]: row["exact"] for row in report.by_modality} == dataset.modality_counts()
    assert all(row["source"] == row["of"] for row in report.by_source)
    assert len(report.pairs) == len(dataset) and all(pair.a == pair.b for pair in report.pairs)
    lines = report.to_text().splitlines()
    assert len([line for line in lines if line.startswith("  exact ")]) == leak.EXAMPLES


def test_text_and_json_say_the_same(trained, tested):
    report = find_leak(trained, tested)
    data = json.loads(json.dumps(report.to_json()))
    assert data["overlap"] is True and data["b"]["found"] == found(exact=2, near=2)
    assert data["b"]["unreadable_ids"] == ["CT/broken.png", "MR/broken.jpg"]
    assert [tuple(row.values()) for row in data["pairs"]] == [tuple(pair) for pair in report.pairs]
    lines = report.to_text().splitlines()
    assert lines[0] == "tested: 4 of 9 images occur in trained (2 exact, 2 near, 0 moved, 0 neighbour)"
    assert lines[1] == "  not compared, unreadable: 2 (CT/broken.png, MR/broken.jpg)"
    assert "  exact  MR/same.png    second/7" in lines
    assert "  MR             3      1     1      0          0" in lines


def test_large_numbers_have_separators():
    side = leak.Side("many", 1234567, 0, (), found(exact=1200, near=34))
    row = {"modality": "CT", "images": 1234567} | found(exact=1200, near=34)
    source, pair = {"source": "", "of": "x"} | found(exact=1200, near=34), Pair("near", "1", "x/1")
    text = Leak(side, side, (row,), (source,), (pair,)).to_text()
    assert "1,234 of 1,234,567 images" in text and "1,200" in text


def test_workers_change_nothing(trained, tested, monkeypatch):
    monkeypatch.setattr(leak, "_CHUNK", 2)
    monkeypatch.setattr(leak, "_CHUNKS_PER_WORKER", 2)
    assert find_leak(trained, tested, workers=2) == find_leak(trained, tested)


def test_wrong_arguments(trained, tmp_path):
    with pytest.raises(ValueError, match="workers: expected at least 1, got 0"):
        find_leak(trained, trained, workers=0)
    with pytest.raises(FileNotFoundError, match="path: expected a folder"):
        find_leak(trained, tmp_path / "nothing")


def crop(picture: np.ndarray, share: float) -> np.ndarray:
    side = round(256 * share)
    return np.asarray(Image.fromarray(picture[5 : 5 + side, 3 : 3 + side]).resize((256, 256), Image.Resampling.BICUBIC))


def shift(picture: np.ndarray, down: int, right: int) -> np.ndarray:
    wide = np.pad(picture, ((8, 8), (8, 8), (0, 0)), mode="edge")
    return wide[8 - down : 264 - down, 8 - right : 264 - right]


MOVED = {
    "mirrored left to right": lambda picture: picture[:, ::-1],
    "mirrored top to bottom": lambda picture: picture[::-1],
    "turned by a half": lambda picture: np.rot90(picture, 2),
    "turned by a quarter": np.rot90,
    "cropped to 95%": lambda picture: crop(picture, 0.95),
    "shifted by 2.0%": lambda picture: shift(picture, 3, -5),
    "mirrored left to right, cropped to 95%": lambda picture: crop(picture, 0.95)[:, ::-1],
}


@pytest.mark.parametrize("how", MOVED)
def test_moved_copies(pictures, trained, tmp_path, how):
    (tmp_path / "moved").mkdir()
    for number in (0, 2, 5, 8):
        moved = np.ascontiguousarray(MOVED[how](pictures[number]))
        (tmp_path / "moved" / f"{number}.jpg").write_bytes(encode(moved, "jpg", quality=90))
    report = find_leak(trained, tmp_path / "moved")
    sources = {0: "first", 2: "first", 5: "first", 8: "second"}
    assert [(pair.kind, pair.b, pair.a) for pair in report.pairs] == [
        ("moved", f"{number}.jpg", f"{source}/{number}") for number, source in sources.items()
    ]
    assert report.b.found == found(moved=4) == report.a.found and report.overlap
    said = [pair.how for pair in report.pairs]
    assert said == [how] * 4 or (how.startswith("shifted") and all(one.startswith("shifted by") for one in said))


def test_a_neighbour_in_a_volume_is_no_copy(tmp_path):
    """Noise and fine structures of their own beside what both slices show."""
    rng = np.random.default_rng(0)

    def smooth(seed, cells):
        few = np.random.default_rng(seed).normal(0, 1, (cells, cells)).astype(np.float32)
        return np.asarray(Image.fromarray(few).resize((256, 256), Image.Resampling.BICUBIC))

    both = 128 + 40 * smooth(1, 6) + 12 * smooth(2, 60)
    slices = [both + 4 * smooth(seed, 60) for seed in (3, 4)]
    for name, image in zip(("a", "b"), slices, strict=True):
        (tmp_path / name).mkdir()
        noisy = (image + rng.normal(0, 1, image.shape)).clip(0, 255).astype(np.uint8)
        (tmp_path / name / "slice.png").write_bytes(encode(noisy, "png"))
    report = find_leak(tmp_path / "a", tmp_path / "b")
    assert report.pairs == (Pair("neighbour", "slice.png", "slice.png"),) and report.overlap
    assert report.a.found == found(neighbour=1)


def test_all_pairs_are_written(trained, tested, tmp_path):
    report = find_leak(trained, tested)
    report.write(tmp_path / "pairs.csv")
    with open(tmp_path / "pairs.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [list(Pair._fields), *map(list, report.pairs)]
    report.write(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report.to_json()))
