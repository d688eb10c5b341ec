"""Overlap of two sets: planted copies in other formats and sizes are found, counted and named, nothing else is."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from dex.data import ShardWriter, open_dataset
from dex.prepare import leak
from dex.prepare.leak import Leak
from dex.prepare.leak import leak as find_leak


def encode(image: np.ndarray, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, {"jpg": "JPEG", "png": "PNG"}[kind], **options)
    return stream.getvalue()


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
    assert report.b.found == {"exact": 2, "near": 2} == report.a.found
    assert (report.a.images, report.b.images) == (10, 9)
    assert report.b.unreadable == 2 and report.b.unreadable_ids == ("CT/broken.png", "MR/broken.jpg")
    assert report.a.unreadable == 0
    assert report.by_modality == (
        {"modality": "CT", "images": 6, "exact": 1, "near": 1},
        {"modality": "MR", "images": 3, "exact": 1, "near": 1},
    )
    assert report.by_source == (
        {"source": "CT", "of": "first", "exact": 1, "near": 1},
        {"source": "MR", "of": "first", "exact": 0, "near": 1},
        {"source": "MR", "of": "second", "exact": 1, "near": 0},
    )
    assert report.pairs == (
        {"kind": "near", "b": "CT/larger.png", "a": "first/2"},
        {"kind": "exact", "b": "CT/same.png", "a": "first/1"},
        {"kind": "near", "b": "MR/jpeg.jpg", "a": "first/3"},
        {"kind": "exact", "b": "MR/same.png", "a": "second/7"},
    )


def test_no_overlap(pictures, trained, tmp_path):
    (tmp_path / "others").mkdir()
    for number in (10, 11, 12):
        (tmp_path / "others" / f"{number}.png").write_bytes(encode(pictures[number], "png"))
    report = find_leak(trained, tmp_path / "others")
    assert not report.overlap and report.b.found == {"exact": 0, "near": 0} and report.pairs == ()
    assert report.by_source == ()
    assert report.to_text().splitlines() == [
        "others: 0 of 3 images occur in trained (0 exact, 0 near)",
        "trained: 0 of 10 images occur in others (0 exact, 0 near)",
        "no overlap found",
    ]


def test_near_copies_alone_are_an_overlap(pictures, trained, tmp_path):
    (tmp_path / "jpegs").mkdir()
    (tmp_path / "jpegs" / "3.jpg").write_bytes(encode(pictures[3], "jpg", quality=80))
    report = find_leak(trained, tmp_path / "jpegs")
    assert report.b.found == {"exact": 0, "near": 1} and report.overlap and report.to_json()["overlap"] is True
    assert "no overlap" not in report.to_text()


def test_unreadable_images_of_the_first_set(pictures, tested, tmp_path):
    """They shift no id: what stands behind them is named as itself. A source is what stands before the first "/"."""
    (tmp_path / "b" / "CT" / "deep").mkdir(parents=True)
    (tmp_path / "b" / "CT" / "deep" / "again.png").write_bytes(encode(pictures[7], "png"))
    report = find_leak(tested, tmp_path / "b")
    assert (report.a.unreadable, report.b.unreadable) == (2, 0)
    assert report.pairs == ({"kind": "exact", "b": "CT/deep/again.png", "a": "MR/same.png"},)
    assert report.by_source == ({"source": "CT", "of": "MR", "exact": 1, "near": 0},)


def test_a_copy_among_many_copies(pictures, trained, tmp_path):
    """Each image counts once on its side, however often the other side holds it."""
    (tmp_path / "copies").mkdir()
    for number in range(5):
        (tmp_path / "copies" / f"{number}.png").write_bytes(encode(pictures[4], "png"))
    report = find_leak(trained, tmp_path / "copies")
    assert report.b.found == {"exact": 5, "near": 0} and report.a.found == {"exact": 1, "near": 0}


def test_embedded_set_against_itself():
    report = find_leak(None, None)
    dataset = open_dataset(None)
    assert report.b.found == {"exact": len(dataset), "near": 0}
    assert {row["modality"]: row["exact"] for row in report.by_modality} == dataset.modality_counts()
    assert all(row["source"] == row["of"] for row in report.by_source)
    assert len(report.pairs) == leak.EXAMPLES and all(pair["a"] == pair["b"] for pair in report.pairs)


def test_text_and_json_say_the_same(trained, tested):
    report = find_leak(trained, tested)
    data = json.loads(json.dumps(report.to_json()))
    assert data["overlap"] is True and data["b"]["found"] == {"exact": 2, "near": 2}
    assert data["b"]["unreadable_ids"] == ["CT/broken.png", "MR/broken.jpg"]
    assert [tuple(row.items()) for row in data["pairs"]] == [tuple(row.items()) for row in report.pairs]
    lines = report.to_text().splitlines()
    assert lines[0] == "tested: 4 of 9 images occur in trained (2 exact, 2 near)"
    assert lines[1] == "  not compared, unreadable: 2 (CT/broken.png, MR/broken.jpg)"
    assert "  exact  MR/same.png    second/7" in lines
    assert "  MR             3      1     1" in lines


def test_large_numbers_have_separators():
    side = leak.Side("many", 1234567, 0, (), {"exact": 1200, "near": 34})
    row = {"modality": "CT", "images": 1234567, "exact": 1200, "near": 34}
    source, pair = {"source": "", "of": "x", "exact": 1200, "near": 34}, {"kind": "near", "b": "1", "a": "x/1"}
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
