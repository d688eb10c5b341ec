"""A tiny pretrained run, folders with tasks that it can learn in seconds, and files as users have them."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest


@pytest.fixture(scope="session")
def shades(tmp_path_factory) -> Path:
    """A folder per class: dark and bright pictures, 24 of each, one a patient."""
    from PIL import Image

    root = tmp_path_factory.mktemp("shades")
    rng = np.random.default_rng(0)
    for label, level in (("bright", 150), ("dark", 60)):
        (root / label).mkdir()
        for i in range(24):
            picture = (level + rng.integers(-40, 40, (32, 32))).astype(np.uint8)
            Image.fromarray(picture).save(root / label / f"{label[0]}{i:02d}.png")
    return root


@pytest.fixture
def disc_data(discs, tmp_path):
    from dex.tasks.cases import open_task

    return open_task(discs, discs, classes=["disc=255"], private=tmp_path / "private")


@pytest.fixture
def shade_data(shades, tmp_path):
    from dex.tasks.cases import open_task

    return open_task(shades, shades, private=tmp_path / "private")


@pytest.fixture
def quick():
    """Settings of seconds."""
    from dex.tasks.recipe import Settings

    return Settings(
        epochs=3, warmup_epochs=1, batch_size=8, lr=3e-3, feature_size=4, device="cpu", precision="fp32", workers=0
    )


SHAPE = (12, 10, 9)
"""I, J, K of a volume."""


class Volume(NamedTuple):
    """A volume whose voxels of two classes are bright; labels: 0, 1, 2 of ``[I, J, K]``."""

    values: np.ndarray
    labels: np.ndarray
    affine: np.ndarray


@pytest.fixture
def volume() -> Volume:
    """Oblique, of uneven spacing: 0 HU is background, 100 HU class 1, 300 HU class 2, in places of no symmetry."""
    rng = np.random.default_rng(4)
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:5, 2:9, 3:6] = 1
    labels[7:9, 1:4, 1:3] = 2
    labels[rng.random(SHAPE) < 0.05] = 1
    labels[0, 0, 0] = 2
    rotation = np.linalg.qr(np.eye(3) + 0.15 * rng.normal(size=(3, 3)))[0]
    affine = np.eye(4)
    affine[:3, :3] = rotation * np.sign(np.diag(rotation)) * (0.8, 1.1, 1.5)
    affine[:3, 3] = (-30.25, 12.5, 400)
    return Volume(np.array([0, 100, 300], np.int16)[labels], labels, affine)


@pytest.fixture
def save_nifti():
    import nibabel

    def save(path: Path, values: np.ndarray, affine: np.ndarray, turn: np.ndarray | None = None) -> Path:
        """turn: another order and direction of the file's axes, as of nibabel."""
        image = nibabel.Nifti1Image(values, affine)
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(image if turn is None else image.as_reoriented(turn), path)
        return path

    return save


@pytest.fixture
def save_png():
    from PIL import Image

    def save(path: Path, pixels: np.ndarray, palette: list[int] | None = None) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels, mode=None if palette is None else "P")
        if palette is not None:
            image.putpalette(palette)
        image.save(path)
        return path

    return save


@pytest.fixture
def save_series():
    """Writes a CT series of ``values [F, R, C]`` in HU; the files' names are not in the order of the slices."""
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    def save(folder: Path, values: np.ndarray, *, patient: str = "P1", reverse: bool = False) -> list:
        folder.mkdir(parents=True, exist_ok=True)
        series, study, frame = generate_uid(), generate_uid(), generate_uid()
        heads = []
        for number, pixels in enumerate(values):
            head = pydicom.Dataset()
            head.file_meta = pydicom.dataset.FileMetaDataset()
            head.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            head.SOPClassUID, head.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", generate_uid()
            head.file_meta.MediaStorageSOPClassUID = head.SOPClassUID
            head.file_meta.MediaStorageSOPInstanceUID = head.SOPInstanceUID
            head.SeriesInstanceUID, head.StudyInstanceUID, head.FrameOfReferenceUID = series, study, frame
            head.Modality, head.PatientID, head.ImageType = "CT", patient, ["ORIGINAL", "PRIMARY", "AXIAL"]
            head.ImagePositionPatient = [-10.0, 20.0, 50.0 + 2.0 * number * (-1 if reverse else 1)]
            head.ImageOrientationPatient, head.PixelSpacing = [1, 0, 0, 0, 1, 0], [0.75, 0.5]
            head.SliceThickness, head.InstanceNumber = 2.0, len(values) - number
            head.Rows, head.Columns, head.SamplesPerPixel = *pixels.shape, 1
            head.PhotometricInterpretation, head.BitsAllocated, head.BitsStored = "MONOCHROME2", 16, 16
            head.HighBit, head.PixelRepresentation = 15, 1
            head.RescaleSlope, head.RescaleIntercept, head.RescaleType = 1, 0, "HU"
            head.PixelData = pixels.astype("<i2").tobytes()
            head.save_as(folder / f"{(number * 7) % len(values):03d}.dcm", enforce_file_format=True)
            heads.append(head)
        return heads

    return save


@pytest.fixture
def save_segmentation():
    """Writes a DICOM segmentation of ``labels [F, R, C]`` on the slices of ``heads``; empty frames are left out."""
    import pydicom
    from pydicom import Dataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    def save(path: Path, labels: np.ndarray, heads: list, names: list[str], shift: float = 0.0) -> Path:
        head, first = Dataset(), heads[0]
        head.file_meta = pydicom.dataset.FileMetaDataset()
        head.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        head.SOPClassUID, head.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.66.4", generate_uid()
        head.file_meta.MediaStorageSOPClassUID = head.SOPClassUID
        head.file_meta.MediaStorageSOPInstanceUID = head.SOPInstanceUID
        head.Modality, head.PatientID = "SEG", first.PatientID
        head.SeriesInstanceUID, head.StudyInstanceUID = generate_uid(), first.StudyInstanceUID
        head.SegmentationType, head.SegmentSequence = "BINARY", []
        frames, groups = [], []
        for number, name in enumerate(names, 1):
            segment = Dataset()
            segment.SegmentNumber, segment.SegmentLabel, segment.SegmentAlgorithmType = number, name, "MANUAL"
            head.SegmentSequence.append(segment)
            for place in reversed(range(len(labels))):
                if (labels[place] == number).any():
                    group, identity, position = Dataset(), Dataset(), Dataset()
                    identity.ReferencedSegmentNumber = number
                    x, y, z = heads[place].ImagePositionPatient
                    position.ImagePositionPatient = [x, y, z + shift]
                    group.SegmentIdentificationSequence, group.PlanePositionSequence = [identity], [position]
                    groups.append(group)
                    frames.append(labels[place] == number)
        shared, measures, turned = Dataset(), Dataset(), Dataset()
        measures.PixelSpacing, turned.ImageOrientationPatient = first.PixelSpacing, first.ImageOrientationPatient
        shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [turned]
        head.SharedFunctionalGroupsSequence, head.PerFrameFunctionalGroupsSequence = [shared], groups
        head.Rows, head.Columns, head.NumberOfFrames = *labels.shape[1:], len(frames)
        head.SamplesPerPixel, head.PhotometricInterpretation = 1, "MONOCHROME2"
        head.BitsAllocated, head.BitsStored, head.HighBit, head.PixelRepresentation = 1, 1, 0, 0
        head.PixelData = np.packbits(np.concatenate([f.ravel() for f in frames]), bitorder="little").tobytes()
        if len(head.PixelData) % 2:
            head.PixelData += b"\0"
        path.parent.mkdir(parents=True, exist_ok=True)
        head.save_as(path, enforce_file_format=True)
        return path

    return save
