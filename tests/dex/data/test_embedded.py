"""The embedded set: what its manifest and card say is what is there."""

import json
import re
import subprocess
import sys
from collections import Counter, defaultdict

import pytest
import torch

from dex.data import Loader, open_dataset, verify
from dex.data.dataset import EMBEDDED

REAL = ("CT", "MR", "X-ray", "ultrasound", "fundus", "pathology", "clinical photography")
EMPTY = ("PET", "OCT", "endoscopy")


@pytest.fixture(scope="module")
def dataset():
    return open_dataset(None)


@pytest.fixture(scope="module")
def card():
    return [json.loads(line) for line in (EMBEDDED / "card.jsonl").read_text().splitlines()]


def test_counts_are_those_of_the_manifest(dataset):
    assert dataset.modalities == REAL
    assert dataset.empty_modalities == EMPTY
    rows = {row["name"]: row for row in dataset.manifest["modalities"]}
    counts = {split: dataset.split(split).modality_counts() for split in ("train", "val")}
    for name in REAL:
        assert counts["train"][name] == rows[name]["train"] > 0
        assert counts["val"][name] == rows[name]["val"] > 0
        assert dataset.modality_counts()[name] == rows[name]["train"] + rows[name]["val"]
    for name in EMPTY:
        assert rows[name] == {"name": name, "train": 0, "val": 0, "empty": True}
    assert len(dataset) == dataset.manifest["samples"] == len(dataset.split("train")) + len(dataset.split("val"))
    assert len(dataset) >= 600


def test_every_image_decodes_and_is_not_blank(dataset):
    for index in range(len(dataset)):
        image, modality, sample_id = dataset[index]
        assert image.shape == (3, 256, 256) and image.dtype == torch.uint8
        assert dataset.sample_id(index) == sample_id and dataset.modality_index()[index] == modality
        assert image.max() > image.min()


def test_hashes_and_size():
    assert verify() == verify(EMBEDDED) == []
    assert sum(path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file()) <= 12 * 10**6


def test_no_source_is_on_both_sides_unless_it_is_alone(dataset, card):
    sides, sources = defaultdict(set), defaultdict(set)
    for row in card:
        sides[row["group"]].add(row["split"])
        sources[row["modality"]].add(row["group"])
    alone = {modality for modality, groups in sources.items() if len(groups) == 1}
    torn = {row["modality"] for row in card if len(sides[row["group"]]) == 2}
    assert torn == alone == {"fundus", "clinical photography"}
    text = (EMBEDDED / "DATA_CARD.md").read_text()
    assert "one source only, a single picture: fundus, clinical photography" in text


def test_card_names_every_image(dataset, card):
    assert [row["id"] for row in card] == [dataset.sample_id(index) for index in range(len(dataset))]
    assert len({row["id"] for row in card}) == len(card)
    for row in card:
        assert all(row[key] for key in ("package", "version", "member", "licence", "modality", "split", "view"))
        assert (EMBEDDED / "licences" / f"{row['package']}-{row['version']}.txt").stat().st_size > 500
    text = (EMBEDDED / "DATA_CARD.md").read_text()
    for name, count in Counter(row["modality"] for row in card).items():
        assert re.search(rf"^\| {name} \| {count} \|", text, re.M)
    for name in EMPTY:
        assert f"| {name} | **empty** | 0 | 0 | 0 |" in text


def test_order_of_the_first_batch_is_pinned(dataset):
    # the order is promised to depend on (seed, epoch) alone, so on no library's version either
    first = next(Loader(dataset.split("train"), 4, seed=0)).ids
    assert first == next(Loader(open_dataset(None).split("train"), 4, seed=0, num_workers=1)).ids
    from dex.data.order import permutation

    assert permutation(0, 0, 10).tolist() == [4, 8, 0, 1, 7, 6, 2, 5, 3, 9]
    assert permutation(7, 3, 10).tolist() == [2, 7, 6, 1, 8, 9, 0, 3, 4, 5]


def test_import_is_light():
    code = (
        "import sys, dex.data; dex.data.open_dataset(None); heavy = {'matplotlib', 'tyro', 'nibabel', 'pydicom', "
        "'triton'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
