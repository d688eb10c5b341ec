"""Headers alone say how many slices a unit gives, whatever its format; no pixel is read for it."""

import gzip

import numpy as np
import pytest
from PIL import Image

from dex.prepare import inventory, inventory_page, survey
from dex.prepare.chunks import Settings
from dex.prepare.discover import Unit
from dex.prepare.readers import Limits
from dex.prepare.run import Options, prepare
from dex.prepare.sources import resolve
from dex.prepare.summary import Progress
from dex.prepare.survey import Alike, Kind, Leaf, Survey

nibabel = pytest.importorskip("nibabel")

RNG = np.random.default_rng(0)
SETTINGS = Settings(size=64, encoding="png")


def volume(*shape):
    """int16 noise on a ramp: nothing of it is blank, alike or a label map."""
    return (RNG.normal(500, 90, shape) + np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)) * 9).astype(np.int16)


def write(root):
    """A folder of every format that holds numbers, with 40 to 56 pixels a side."""
    SimpleITK = pytest.importorskip("SimpleITK")
    root.mkdir()
    nibabel.save(nibabel.Nifti1Image(volume(40, 48, 44), np.diag([1, 1, 1.5, 1])), root / "a.nii.gz")
    nibabel.save(nibabel.Nifti1Image(volume(40, 48, 44, 3), np.eye(4)), root / "several.nii")
    grey = RNG.integers(0, 230, (40, 44, 6, 1, 1))
    colour = (grey + RNG.integers(0, 25, (40, 44, 6, 1, 3))).astype(np.uint8)  # a tint, in planes that lie apart
    nibabel.save(nibabel.Nifti1Image(colour, np.eye(4)), root / "colour.nii.gz")
    nibabel.save(nibabel.MGHImage(volume(42, 40, 46), np.diag([1, -1, 1, 1.0])), root / "b.mgz")
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(volume(41, 45, 50)), root / "c.mha")
    np.save(root / "d.npy", volume(40, 44, 56))
    pages = [Image.fromarray(volume(50, 52).astype(np.uint16)) for _ in range(3)]
    pages[0].save(root / "e.tif", save_all=True, append_images=pages[1:])
    return root


@pytest.mark.parametrize(
    "planes, volumes, stride",
    [
        (("axial",), "first", 1),
        (("axial", "coronal", "sagittal"), "all", 3),
        (("stored",), "mean", 2),
        (("auto",), "2", 1),
    ],
)
def test_slices_are_those_of_a_run(planes, volumes, stride, inline_workers, tmp_path):
    sources = resolve(write(tmp_path / "scans"), modality="MR", planes=planes, volumes=volumes, slice_stride=stride)
    (taken,) = inventory.take(sources, SETTINGS, processes=1)
    run = prepare(sources, Options(tmp_path / "out", SETTINGS), lambda text: None)
    (source,) = run.run(Progress())["sources"]
    assert taken.estimate.slices == source["seen"] > 100
    assert {reason: n for (_, reason, _), n in taken.survey.refused.items()} == source["refused"]
    assert taken.estimate.small == source["dropped"].get("too small", 0)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "turned.jpg"])
@pytest.mark.parametrize("modality", ["endoscopy", "pathology"])
def test_the_size_of_a_large_picture_is_its_files(name, modality, inline_workers, tmp_path):
    """Also if it is decoded at a part of its sides, shrunk, or cut into pieces."""
    (tmp_path / "scans").mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6 if name == "turned.jpg" else 1
    pixels = RNG.integers(0, 256, (211, 333, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "scans" / name, exif=turned)
    sources = resolve(tmp_path / "scans", modality=modality)
    (taken,) = inventory.take(sources, SETTINGS, processes=1, limits=Limits(pixels=20_000))
    ((leaf, alike),) = taken.survey.leaves.items()
    assert (leaf.height, leaf.width) == ((333, 211) if name == "turned.jpg" else (211, 333))
    assert alike.slices == (3 * 5 if modality == "pathology" else 1)
    assert f" {leaf.height} x {leaf.width} pixels" in inventory_page.to_text([taken])


def test_no_pixel_is_read(inline_workers, tmp_path):
    """A packed file whose numbers are cut off is surveyed all the same; the sample then finds it damaged."""
    write(tmp_path / "scans")
    path = tmp_path / "scans" / "a.nii.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:2000]))
    (taken,) = inventory.take(resolve(tmp_path / "scans", modality="MR"), SETTINGS, processes=1)
    nifti = Kind("nifti", "MR", False)
    assert taken.survey.leaves[Leaf(nifti, "axial", 48, 40)].stacks == 2
    assert taken.sample[nifti].refused["unreadable"] == 1


def test_what_is_broken_costs_only_itself(tmp_path):
    """In processes of their own, as a run has them."""
    root = write(tmp_path / "scans")
    (root / "x.png").write_bytes(b"no picture")
    (root / "y.nii").write_bytes(b"\0" * 400)
    (taken,) = inventory.take(resolve(root, modality="MR"), SETTINGS, processes=1, limits=Limits(seconds=20))
    refused = {detail: n for (_, reason, detail), n in taken.survey.refused.items() if reason == "unreadable"}
    assert len(refused) == 2 and all(" " in detail for detail in refused)
    assert taken.estimate.slices > 100


def test_surveys_add_up_and_draw_the_same_units():
    kind = Kind("nifti", "MR", False)
    leaf = Leaf(kind, "axial", 40, 48)
    parts = []
    for number in range(30):
        unit = Unit(f"{number}", "nifti", ())
        parts.append(
            Survey(leaves={leaf: Alike(1, 10, 2, (1.0, number + 1.0))}, candidates={kind: [(f"{number:02}", unit)]})
        )
    one, other = Survey(), Survey()
    for part in parts:
        one.add(part)
    for part in reversed(parts):
        other.add(part)
    assert one.leaves[leaf] == Alike(30, 300, 60, (1.0, 30.0)) and one.slices(kind) == 240
    assert one.candidates == other.candidates and len(one.candidates[kind]) == survey.SAMPLED
