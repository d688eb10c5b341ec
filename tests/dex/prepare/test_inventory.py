"""What is passed over, what is estimated, and a folder whose one file hangs."""

from collections import Counter

import pytest
from PIL import Image
from small_runs import picture, save

from dex.prepare import inventory
from dex.prepare.chunks import Settings
from dex.prepare.inventory import Inventory
from dex.prepare.sources import resolve
from dex.prepare.survey import Alike, Kind, Leaf, Measured, Survey


def of(leaves, sample, workers=2):
    survey = Survey(leaves=leaves, refused=Counter(), idle=1.0)
    return Inventory("folder", 9, 900, survey, sample, {}, None, workers)


def test_an_estimate_is_what_the_sample_gave_of_each_kind():
    ct, named, film = Kind("nifti", "CT", False), Kind("nifti", "CT", True), Kind("video", "ultrasound", False)
    leaves = {
        Leaf(ct, "axial", 64, 64): Alike(10, 1000),
        Leaf(ct, "axial", 20, 20): Alike(1, 50, small=50),
        Leaf(named, "axial", 64, 64): Alike(6, 600),
        Leaf(film, "", 64, 64): Alike(2, 70),
    }
    sample = {
        ct: Measured(units=2, expected=200, kept=150, bytes=15_000, seconds=4.0),
        named: Measured(units=3, expected=300, kept=100, bytes=10_000, seconds=1.0, refused=Counter({"label map": 2})),
    }
    estimate = of(leaves, sample).estimate
    assert (estimate.slices, estimate.small, estimate.unmeasured, estimate.sampled) == (1720, 50, 70, 500)
    assert (estimate.kept, estimate.bytes, estimate.label_maps) == (750 + 200, 75_000 + 20_000, 4)
    assert estimate.seconds == pytest.approx(20.0 + 2.0 + 1.0)


def test_a_kind_that_was_not_drawn_is_estimated_as_others_of_its_format():
    drawn, other = Kind("dicom", "CT", False), Kind("dicom", "MR", False)
    leaves = {Leaf(kind, "axial", 64, 64): Alike(1, 100) for kind in (drawn, other)}
    estimate = of(leaves, {drawn: Measured(units=1, expected=10, kept=9, bytes=90, seconds=1.0)}).estimate
    assert (estimate.kept, estimate.unmeasured) == (180, 0)


def test_the_same_folder_gives_the_same_inventory(inline_workers, tmp_path):
    for number in range(30):
        save(tmp_path / "scans", f"p{number}/{number:02}.png", picture(number))
    Image.new("L", (20, 20), 9).save(tmp_path / "scans" / "small.png")
    sources = resolve(tmp_path / "scans", modality="X-ray")
    one, other = (inventory.take(sources, Settings(size=64), processes=1)[0] for _ in range(2))
    assert {kind: (m.expected, m.kept, m.bytes) for kind, m in one.sample.items()} == {
        kind: (m.expected, m.kept, m.bytes) for kind, m in other.sample.items()
    }
    assert (one.estimate.slices, one.estimate.small, one.files) == (31, 1, 31)
    assert one.survey.groups.isdisjoint(other.survey.groups)  # the salt is forgotten


def test_one_bad_file_of_a_large_folder_parts_it_into_series(monkeypatch, tmp_path):
    """As a real run does, so that a reader that dies costs its series and not the folder."""
    calls = []
    monkeypatch.setattr(
        inventory.run, "parted_by_headers", lambda source, root, listing, *rest: calls.append(1) or listing
    )

    def given_up(work, jobs, **_):
        for job in jobs:
            yield job, Survey(given_up=not calls)

    monkeypatch.setattr(inventory.workers, "run", given_up)
    save(tmp_path / "scans", "a.png", picture(0))
    inventory.take(resolve(tmp_path / "scans", modality="X-ray"), Settings(size=64), processes=1)
    assert calls == [1]
