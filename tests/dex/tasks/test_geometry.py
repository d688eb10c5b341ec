"""Masks in the space of their volume, against nibabel's and SimpleITK's reading of the same files."""

import itertools

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
import torch
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from dex.prepare import readers
from dex.tasks import geometry
from dex.tasks.cases import Grid

SHAPE = (5, 6, 4)  # I, J, K
VALUES = np.random.default_rng(0).integers(-900, 900, SHAPE).astype(np.int16)
PLANES = ("axial", "coronal", "sagittal", "stored")


def frames_of(files, format, plane):
    """Positive voxels as a mask in frames as `dex prepare` cuts them, and the grid."""
    (stack,) = readers.read(files, format, **({"decide": None} if format == "dicom" else {}))
    frames = np.stack([frame.pixels > 0 for frame in stack.frames((plane,), 1)]).astype(np.uint8)
    found = stack.geometry
    shape = (stack.shape[1], stack.shape[0], stack.length)
    return frames, Grid(np.array(found.affine), shape, plane, found.axes, found.signs, ())


def affine_of(image):
    """Of an image of SimpleITK, in right-anterior-superior."""
    out = np.eye(4)
    out[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    out[:3, 3] = image.GetOrigin()
    return np.diag([-1, -1, 1, 1]) @ out


def oblique():
    rotation = np.linalg.qr(np.eye(3) + 0.2 * np.random.default_rng(3).normal(size=(3, 3)))[0]
    affine = np.eye(4)
    affine[:3, :3] = rotation * np.sign(np.diag(rotation)) * (1.5, 0.7, 3.0)
    affine[:3, 3] = (-20.5, 11.25, 300)
    return affine


@pytest.mark.parametrize("plane", PLANES)
def test_a_mask_of_a_nifti_file_has_its_header(tmp_path, plane):
    base = nibabel.Nifti1Image(VALUES, oblique())
    for order, flips in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        turn = np.stack([order, flips], axis=1)
        image = base.as_reoriented(turn)
        image.set_sform(image.affine, code="mni")
        image.set_qform(image.affine, code="aligned")
        image.header.set_xyzt_units("mm", "sec")
        nibabel.save(image, path := tmp_path / "a b é.nii.gz")
        frames, grid = frames_of([path], "nifti", plane)
        geometry.write_mask(out := tmp_path / "mask.nii.gz", frames, path, grid)
        mask, source = nibabel.load(out), nibabel.load(path)
        assert np.array_equal(np.asarray(mask.dataobj), np.asarray(source.dataobj) > 0)
        assert mask.get_data_dtype() == np.uint8 and mask.shape == source.shape
        for name in ("qform_code", "sform_code", "xyzt_units", "srow_x", "quatern_b", "qoffset_z"):
            assert np.array_equal(mask.header[name], source.header[name]), name
        assert np.array_equal(mask.header["pixdim"][:4], source.header["pixdim"][:4])
        assert np.array_equal(mask.affine, source.affine)


def test_a_nifti_file_with_one_form_only_and_a_nifti_2_file(tmp_path):
    for kind, code in ((nibabel.Nifti1Image, "sform"), (nibabel.Nifti2Image, "qform")):
        image = kind(VALUES, oblique())
        other = {"sform": image.set_qform, "qform": image.set_sform}[code]
        other(None, code=0)
        nibabel.save(image, path := tmp_path / "a.nii")
        frames, grid = frames_of([path], "nifti", "axial")
        geometry.write_mask(out := tmp_path / "mask.nii.gz", frames, path, grid)
        mask, source = nibabel.load(out), nibabel.load(path)
        assert type(mask) is kind
        assert np.array_equal(mask.affine, source.affine)
        assert (mask.header["qform_code"], mask.header["sform_code"]) == (
            source.header["qform_code"],
            source.header["sform_code"],
        )


def test_a_mask_of_an_mgh_file_is_where_nibabel_sees_the_volume(tmp_path):
    nibabel.save(nibabel.MGHImage(VALUES.astype(np.int32), oblique()), path := tmp_path / "a.mgz")
    frames, grid = frames_of([path], "mgh", "coronal")
    geometry.write_mask(out := tmp_path / "mask.nii.gz", frames, path, grid)
    assert np.allclose(nibabel.load(out).affine, nibabel.load(path).affine, atol=1e-4)
    assert np.array_equal(np.asarray(nibabel.load(out).dataobj), VALUES > 0)


@pytest.mark.parametrize("name", ["a.mha", "a.nrrd", "a.mhd", "a.nhdr"])
@pytest.mark.parametrize("plane", PLANES)
def test_a_mask_of_an_mha_or_nrrd_file_is_on_its_grid(tmp_path, name, plane):
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(VALUES.transpose(2, 1, 0)))
    affine = np.diag([-1, -1, 1, 1]) @ oblique()
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    SimpleITK.WriteImage(image, str(path := tmp_path / name))
    files = [path, *(path.with_name(other) for other in readers.beside(path, "metaimage"))]
    frames, grid = frames_of(files, "metaimage", plane)
    ending = geometry.suffix(path, grid)
    assert ending == {"a.mha": ".mha", "a.mhd": ".mha"}.get(name, ".nrrd")
    geometry.write_mask(out := tmp_path / f"mask{ending}", frames, path, grid)
    mask = SimpleITK.ReadImage(str(out))
    assert mask.GetPixelID() == SimpleITK.sitkUInt8
    assert np.array_equal(SimpleITK.GetArrayFromImage(mask), SimpleITK.GetArrayFromImage(image) > 0)
    for get in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert np.allclose(getattr(mask, get)(), getattr(image, get)(), atol=1e-6), get
    assert not list(tmp_path.glob("*.partial*"))


def save_series(folder, affine, order):
    """VALUES as a CT series whose slices lie along k, in right-anterior-superior of ``affine``; the files' names and
    instance numbers go by ``order``."""
    lps = np.diag([-1, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    series, frame, study = (generate_uid() for _ in range(3))
    for number, k in enumerate(order):
        head = pydicom.Dataset()
        head.file_meta = pydicom.dataset.FileMetaDataset()
        head.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        head.file_meta.MediaStorageSOPClassUID = head.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        head.file_meta.MediaStorageSOPInstanceUID = head.SOPInstanceUID = generate_uid()
        head.Modality, head.PatientID, head.SeriesInstanceUID, head.StudyInstanceUID = "CT", "p", series, study
        head.FrameOfReferenceUID, head.InstanceNumber = frame, number + 1
        head.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        head.Rows, head.Columns = SHAPE[1], SHAPE[0]
        head.PixelSpacing, head.SliceThickness = [f"{v:.8g}" for v in (spacing[1], spacing[0])], f"{spacing[2]:.8g}"
        cosines = (lps[:3, :3] / spacing).T[:2].ravel()
        head.ImageOrientationPatient = [f"{v:.12f}" for v in cosines]
        head.ImagePositionPatient = [f"{v:.8f}" for v in (lps @ (0, 0, k, 1))[:3]]
        head.BitsAllocated = head.BitsStored = 16
        head.HighBit, head.PixelRepresentation, head.SamplesPerPixel = 15, 1, 1
        head.PhotometricInterpretation, head.RescaleSlope, head.RescaleIntercept = "MONOCHROME2", 1, 0
        head.PixelData = np.ascontiguousarray(VALUES[:, :, k].T).tobytes()
        head.save_as(folder / f"{number:03d}.dcm", enforce_file_format=True)


@pytest.mark.parametrize("tilted", [False, True])
@pytest.mark.parametrize("turned", ["axial", "sagittal", "coronal", "down"])
def test_a_mask_of_a_dicom_series_is_where_simpleitk_sees_the_series(tmp_path, turned, tilted):
    affine = oblique()
    columns = {"axial": (0, 1, 2), "sagittal": (1, 2, 0), "coronal": (0, 2, 1), "down": (0, 1, 2)}[turned]
    affine[:3, :3] = affine[:3, columns]
    if turned == "down":
        affine[:3, 2] *= -1
    if np.linalg.det(affine[:3, :3]) * (1 if turned == "down" else -1) > 0:
        affine[:3, 0] *= -1
    if tilted:  # a gantry: the next slice is not straight above
        affine[:3, 2] += 0.1 * affine[:3, 1]
    save_series(tmp_path, affine, [2, 0, 3, 1])
    files = sorted(tmp_path.iterdir())
    frames, grid = frames_of(files, "dicom", "axial" if turned in ("axial", "down") else "stored")
    geometry.write_mask(out := tmp_path / "mask.nii.gz", frames, tmp_path, grid)
    mask = nibabel.load(out)
    assert mask.get_data_dtype() == np.uint8 and mask.header.get_xyzt_units()[0] == "mm"
    assert mask.header["sform_code"] == 1 and mask.header["qform_code"] == (0 if tilted else 1)

    inside = np.argwhere(np.asarray(mask.dataobj) > 0)
    expected = np.argwhere(VALUES > 0)
    assert sorted_points(mask.affine, inside) == pytest.approx(sorted_points(affine, expected), abs=1e-3)

    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path))
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(names)
    image = reader.Execute()
    if not tilted:  # SimpleITK itself says nothing of a shear
        voxels = np.argwhere(SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0) > 0)
        points = sorted_points(affine_of(image), voxels)
        assert points == pytest.approx(sorted_points(mask.affine, inside), abs=1e-3)


def sorted_points(affine, voxels):
    points = np.round(voxels @ affine[:3, :3].T + affine[:3, 3], 2)
    return points[np.lexsort(points.T)]


def test_probabilities_of_a_volume(tmp_path):
    nibabel.save(nibabel.Nifti1Image(VALUES, oblique()), path := tmp_path / "a.nii.gz")
    frames, grid = frames_of([path], "nifti", "sagittal")
    share = np.random.default_rng(5).dirichlet(np.ones(3), frames.shape).astype(np.float32)  # [n, H, W, C]
    steps = geometry.in_steps(np.moveaxis(share, 3, 1))
    geometry.write_probabilities(out := tmp_path / "p.nii.gz", steps, path, grid)
    got = np.asarray(nibabel.load(out).dataobj)
    expected = geometry.to_volume(share, grid)
    assert got.shape == (*SHAPE, 3)
    assert np.abs(got - expected).max() <= 0.5 / geometry.LEVELS + 1e-6
    geometry.write_probabilities(out := tmp_path / "p.mha", steps, path, grid)
    image = SimpleITK.ReadImage(str(out))
    assert image.GetNumberOfComponentsPerPixel() == 3
    got = SimpleITK.GetArrayFromImage(image)
    assert np.abs(got - expected.transpose(2, 1, 0, 3)).max() <= 0.5 / geometry.LEVELS + 1e-6
    geometry.write_probabilities(out := tmp_path / "p.npy", steps, path, None)
    assert np.abs(np.load(out) - np.moveaxis(share, 3, 1)).max() <= 0.5 / geometry.LEVELS + 1e-6


def test_a_picture_is_a_png_of_its_size(tmp_path):
    from PIL import Image

    mask = np.arange(35, dtype=np.uint8).reshape(1, 5, 7)
    geometry.write_mask(out := tmp_path / "m.png", mask, tmp_path / "a.jpg", None)
    assert np.array_equal(np.asarray(Image.open(out)), mask[0])
    assert geometry.suffix(tmp_path / "a.jpg", None) == ".png"
    with pytest.raises(ValueError, match="frames: expected one"):
        geometry.write_mask(tmp_path / "n.png", np.zeros((2, 5, 7), np.uint8), tmp_path / "a.jpg", None)
    assert not (tmp_path / "n.png").exists()


def test_frames_that_are_not_those_of_the_grid_are_refused():
    grid = Grid(np.eye(4), SHAPE, "axial", (0, 1, 2), (1, 1, 1), ())
    with pytest.raises(ValueError, match=r"frames: expected those of a volume \[5, 6, 4\]"):
        geometry.to_volume(np.zeros((3, 6, 5), np.uint8), grid)


def test_placements_are_those_of_dex_prepare():
    from dex.prepare.slices import _square_pixels

    for height, width, spacing in ((512, 512, (1, 1)), (191, 233, (1.5, 1.5)), (20, 512, (5, 0.9)), (1, 700, (1, 1))):
        place = geometry.placement(height, width, 64, spacing)
        assert place.square[2:] == _square_pixels(height, width, spacing, 64)
        assert place.frame == (0, 0, height, width)


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (3.0, 1.0)])
def test_back_from_the_square_image(spacing):
    """Blocks of whole pixels come back as they were; probabilities stay shares."""
    frame = torch.zeros(1, 16, 32, dtype=torch.uint8)
    frame[0, 4:12, 8:24] = 3
    place = geometry.placement(16, 32, 64, spacing)
    top, left, tall, wide = place.square
    square = torch.zeros(1, 64, 64, dtype=torch.uint8)
    content = torch.nn.functional.interpolate(frame[None].float(), (tall, wide), mode="nearest-exact")
    square[:, top : top + tall, left : left + wide] = content[0].to(torch.uint8)

    shares = torch.stack([square[0] != 3, square[0] == 3])[None].float()
    back = geometry.back_probabilities(shares, place, 16, 32)
    assert torch.allclose(back.sum(1), torch.ones(1, 16, 32))
    assert torch.equal(back.argmax(1).to(torch.uint8) * 3, frame)


def test_outside_of_a_crop_there_is_background():
    place = geometry.Placement((2, 3, 4, 4), (0, 0, 8, 8))
    ones = torch.ones(1, 8, 8, dtype=torch.uint8)
    shares = geometry.back_probabilities(torch.stack([0 * ones, ones], 1).float(), place, 8, 10)
    assert int(shares[:, 1].sum()) == 16 and shares[0, 1, 2:6, 3:7].all()
    assert torch.equal(shares.sum(1), torch.ones(1, 8, 10))
