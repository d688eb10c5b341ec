"""DICOM files that the tests write themselves; pydicom's own serve for the compressed transfer syntaxes."""

from pathlib import Path

import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
)

from dex.prepare import readers

FILES = Path(pydicom.__file__).parent / "data" / "test_files"


AXIAL = [1, 0, 0, 0, 1, 0]


def write(path, pixels, *, syntax=ExplicitVRLittleEndian, kind=CTImageStorage, stored=None, data=None, **elements):
    """A DICOM file of `pixels`, [H, W], [F, H, W] or, with SamplesPerPixel=3, [H, W, 3]."""
    head = Dataset()
    head.file_meta = FileMetaDataset()
    head.file_meta.TransferSyntaxUID = syntax
    head.file_meta.MediaStorageSOPClassUID = head.SOPClassUID = kind
    head.file_meta.MediaStorageSOPInstanceUID = head.SOPInstanceUID = f"1.2.{path.stem.__hash__() % 10**12}"
    head.SeriesInstanceUID, head.StudyInstanceUID, head.Modality = "1.2.3", "1.2", "CT"
    head.PatientID, head.PatientName = "id-7", "Canary^Patient"
    if pixels is not None:
        colour = elements.get("SamplesPerPixel", 1) == 3
        head.SamplesPerPixel, head.PhotometricInterpretation = 1, "MONOCHROME2"
        head.Rows, head.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
        if pixels.ndim > (3 if colour else 2):
            head.NumberOfFrames = len(pixels)
        head.BitsAllocated = 8 * pixels.itemsize
        head.BitsStored = stored or head.BitsAllocated
        head.HighBit = head.BitsStored - 1
        head.PixelRepresentation = int(pixels.dtype.kind == "i")
        if colour:
            head.PlanarConfiguration = 0
        order = ">" if syntax == ExplicitVRBigEndian else "<"
        body = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes() if data is None else data
        head.PixelData = body + b"\0" * (len(body) % 2)
        head["PixelData"].VR = "OB" if data is not None or pixels.itemsize == 1 else "OW"
    for name, value in elements.items():
        setattr(head, name, value)
    head.save_as(path, enforce_file_format=True)
    return path


def slice_of(path, pixels, z, **elements):
    place = {"ImagePositionPatient": [0, 0, z], "ImageOrientationPatient": AXIAL, "PixelSpacing": [2.0, 3.0]}
    return write(path, pixels, **(place | {"RescaleSlope": 1, "RescaleIntercept": -1024} | elements))


def read(*files):
    return list(readers.read(list(files), "dicom"))


def stored(stack):
    return [frame.pixels for frame in stack.frames(("stored",), 1)]
