"""The builder of the embedded set, without the network: orientation, spacing, order, pinned hashes, a failed build."""

import dataclasses
import gzip
import hashlib
import importlib.util
import io
import json
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")

from dex.data.dataset import EMBEDDED  # noqa: E402

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "build_embedded_data.py"


@pytest.fixture(scope="module")
def builder():
    import sys

    spec = importlib.util.spec_from_file_location("build_embedded_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def source(builder, **changes):
    return dataclasses.replace(builder.SOURCES[0], **changes)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "SLA"])
def test_slices_stand_as_a_radiologist_sees_them(builder, axes):
    # brightness marks the patient's right, front and head, whatever order and direction the file stores
    x, y, z = np.meshgrid(np.arange(20), np.arange(30), np.arange(40), indexing="ij")
    ras = np.where(x < 10, 0.0, 50) + np.where(y < 15, 0.0, 100) + np.where(z < 20, 0.0, 200)  # left/right: + is right
    image = nibabel.Nifti1Image(ras.astype(np.int16), np.diag([2.0, 1.0, 3.0, 1.0]))
    target = nibabel.orientations.axcodes2ornt(axes)
    image = image.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), target))
    assert nibabel.aff2axcodes(image.affine) == tuple(axes)
    chosen = source(builder, modality="CT", strides={"axial": 21, "coronal": 17, "sagittal": 15})
    slices = {
        frame.label.split("-")[0]: frame
        for frame in builder.volume_slices(chosen, gzip.compress(image.to_bytes()), "m")
    }
    axial, coronal, sagittal = (slices[name].pixels.astype(int) for name in ("axial", "coronal", "sagittal"))
    assert axial.shape == (30, 20) and coronal.shape == (40, 20) and sagittal.shape == (40, 30)
    assert slices["axial"].spacing == (1, 2) and slices["coronal"].spacing == (3, 2)
    assert slices["sagittal"].spacing == (3, 1)
    assert (axial[:, 0] > axial[:, -1]).all() and (axial[0] > axial[-1]).all()  # right on the left, front up
    assert (coronal[:, 0] > coronal[:, -1]).all() and (coronal[0] > coronal[-1]).all()  # right on the left, head up
    assert (sagittal[:, 0] > sagittal[:, -1]).all() and (sagittal[0] > sagittal[-1]).all()  # front on the left, head up


def test_pixels_become_square_and_padding_takes_the_background(builder):
    pixels = np.full((40, 20), 85, np.uint8)
    pixels[10:30, 5:15] = 200
    content = builder.shrink(builder.Frame("f", pixels, (3.0, 2.0), "m"))
    assert content.shape == (256, round(256 * 40 / 120))
    whole = builder.pad(content)
    assert whole.shape == (256, 256) and (whole[:, :80] == 85).all() and (whole[:, -80:] == 85).all()


def test_series_are_ordered_along_their_normal(builder):
    headers = [
        SimpleNamespace(ImageOrientationPatient=[1, 0, 0, 0, 0, -1], ImagePositionPatient=[5, y, 9])
        for y in (30.0, -2.0, 7.5)
    ]  # coronal: the normal is y
    assert [h.ImagePositionPatient[1] for h in sorted(headers, key=builder.along_normal)] == [-2.0, 7.5, 30.0]


def test_intensities(builder):
    header = pydicom.Dataset()
    header.PhotometricInterpretation = "MONOCHROME1"
    eight = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    xray, ct = source(builder, modality="X-ray"), source(builder, modality="CT")
    assert (builder.intensities(xray, [("m", header, eight)]) == 255 - eight).all()
    header.PhotometricInterpretation = "MONOCHROME2"
    header.RescaleSlope, header.RescaleIntercept = 2, -1024
    stored = np.array([[[0, 412, 562, 712, 4000]]], np.int16)
    assert builder.intensities(ct, [("m", header, stored)]).tolist() == [[[0, 0, 128, 255, 255]]]


def test_a_package_of_another_hash_is_refused(builder, tmp_path):
    package = builder.PACKAGES["nilearn"]
    (tmp_path / package.file).write_bytes(b"something else")
    with pytest.raises(ValueError, match=f"{package.file}: expected sha256 {package.sha256}, got"):
        builder.fetch(package, tmp_path)


def test_archives_give_named_regular_members_only(builder, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("d/2.png", b"two")
        archive.writestr("d/1.png", b"one")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        link = tarfile.TarInfo("d/0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        for name, data in (("d/2.png", b"two"), ("d/1.png", b"one")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    for file in ("a.whl", "a.tar.gz"):
        archive = builder.Archive(tmp_path / file)
        assert archive.match("d/*") == ["d/1.png", "d/2.png"] and archive.read("d/1.png") == b"one"
        with pytest.raises(ValueError, match="no member"):
            archive.match("e/*")


def test_a_failed_build_leaves_the_earlier_set(builder, tmp_path, monkeypatch):
    out = tmp_path / "set"
    out.mkdir()
    (out / "manifest.json").write_text("earlier")

    def build(folder, cache):
        folder.mkdir()
        raise OSError("no space")

    monkeypatch.setattr(builder, "build", build)
    with pytest.raises(OSError):
        builder.replace(out, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["set"] and (out / "manifest.json").read_text() == "earlier"
    (out / "manifest.json").rename(out / "mine.txt")
    with pytest.raises(SystemExit, match="--out: expected an empty folder or an earlier set"):
        builder.replace(out, tmp_path)


def test_the_table_is_the_one_the_set_was_built_from(builder):
    rows = [json.loads(line) for line in (EMBEDDED / "card.jsonl").read_text().splitlines()]
    table = {entry.key: entry for entry in builder.SOURCES}
    assert {row["group"] for row in rows} == set(table) and len(table) == len(builder.SOURCES)
    for row in rows:
        entry = table[row["group"]]
        assert (row["package"], row["modality"]) == (entry.package, entry.modality)
        assert row["version"] == builder.PACKAGES[entry.package].version
    card = (EMBEDDED / "DATA_CARD.md").read_text()
    for package in builder.PACKAGES.values():
        assert package.sha256 in card and len(package.sha256) == len(hashlib.sha256().hexdigest())
