"""Small sound files of every format, which the tests damage. Of a format whose data are in a file of their own it is
the header; BESIDE has the data, and what they must be called."""

import functools
import gzip
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 48


def picture(seed: int, side: int = SIDE) -> np.ndarray:
    """uint8 [side, side]: blobs on a slope, no two seeds alike."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    image = 40 + 60 * x
    for _ in range(5):
        cy, cx, r = rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8), rng.uniform(0.1, 0.3)
        image = image + rng.uniform(10, 40) * ((x - cx) ** 2 + (y - cy) ** 2 < r * r)
    return image.clip(0, 255).astype(np.uint8)


def colour(seed: int) -> np.ndarray:
    return np.stack([picture(seed), picture(seed + 100), picture(seed + 200)], axis=2)


def pillow(image: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return stream.getvalue()


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def volume(seed: int, dtype=np.int16) -> np.ndarray:
    return np.stack([picture(seed + k) for k in range(4)], axis=2).astype(dtype)


def dicom(image: np.ndarray, frames: int = 1, **tags) -> bytes:
    """Explicit little endian, 8 bits."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3.4"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.SeriesInstanceUID, data.Modality = "1.2.3", "US"
    data.PhotometricInterpretation, data.SamplesPerPixel = "MONOCHROME2", 1
    data.Rows, data.Columns = image.shape[-2:]
    data.NumberOfFrames = frames
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation = 7, 0
    data.PixelData = image.tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    stream = io.BytesIO()
    data.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


DICOM_FILES = (
    "SC_rgb_small_odd.dcm",
    "MR_small_bigendian.dcm",
    "MR_small_implicit.dcm",
    "MR_small.dcm",
    "MR_small_RLE.dcm",
    "MR_small_jp2klossless.dcm",
    "MR_small_jpeg_ls_lossless.dcm",
    "SC_rgb_rle_2frame.dcm",
    "SC_rgb_small_odd_jpeg.dcm",
    "SC_rgb_jpeg_gdcm.dcm",
    "JPEGLSNearLossless_16.dcm",
    "JPEG2000.dcm",
    "JPGExtended.dcm",
    "image_dfl.dcm",
    "nested_priv_SQ.dcm",
    "693_J2KI.dcm",
)


def _dicoms() -> list[bytes]:
    import pydicom.data

    folder = Path(pydicom.data.__file__).parent / "test_files"
    found = [folder / name for name in DICOM_FILES]
    return [path.read_bytes() for path in found if path.exists()] + [
        dicom(np.stack([picture(1), picture(2)]), frames=2),
        dicom(picture(3), PixelSpacing=["0.5", "0.7"], WindowCenter="10"),
    ]


def _nifti(dtype, kind: str = "Nifti1Image") -> bytes:
    import nibabel

    return getattr(nibabel, kind)(volume(7, dtype), np.diag([1.0, 1.5, 2.0, 1.0])).to_bytes()


def _niftis() -> list[bytes]:
    return [_nifti(np.int16), _nifti(np.uint8), _nifti(np.float32, "Nifti2Image")]


def _through_a_file(suffix: str, write: Callable[[str], None]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"seed{suffix}"
        write(str(path))
        return path.read_bytes()


def _itk(suffix: str, compress: bool, dtype=np.int16) -> bytes:
    import SimpleITK

    image = SimpleITK.GetImageFromArray(volume(11, dtype).transpose(2, 0, 1))
    return _through_a_file(suffix, lambda path: SimpleITK.WriteImage(image, path, compress))


BESIDE = {suffix: ("jane-doe.img", volume(11).tobytes(order="F")) for suffix in (".hdr", ".mhd", ".nhdr")}


def _pairs() -> list[bytes]:
    import nibabel

    kinds = (nibabel.Nifti1Pair, nibabel.Nifti2Pair)
    return [kind(volume(11), np.diag([1.0, 1.5, 2.0, 1.0])).header.binaryblock for kind in kinds]


def _detached(suffix: str) -> list[bytes]:
    (whole,) = [_itk(suffix, False)]
    if suffix == ".mha":
        return [whole[: whole.index(b"LOCAL")] + b"jane-doe.img\n"]
    return [whole[: whole.index(b"\n\n")] + b"\ndata file: jane-doe.img\n"]


def _video(suffix: str, codec: str) -> bytes:
    import cv2

    def write(path: str) -> None:
        writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*codec), 10, (64, 48))
        for i in range(4):
            writer.write(np.ascontiguousarray(np.pad(colour(i), ((0, 0), (0, 16), (0, 0)))))
        writer.release()

    return _through_a_file(suffix, write)


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "a description", 6
    return exif


def _tiffs() -> list[bytes]:
    pages = [Image.fromarray(picture(i)) for i in range(3)]
    sixteen = Image.fromarray(picture(5).astype(np.uint16) * 257)
    return [
        pillow(picture(4), "TIFF"),
        pillow(pages[0], "TIFF", save_all=True, append_images=pages[1:]),
        pillow(sixteen, "TIFF", compression="tiff_lzw"),
        pillow(colour(6), "TIFF", compression="tiff_adobe_deflate"),
        pillow(colour(7), "TIFF", compression="jpeg"),
        pillow(Image.fromarray(picture(8) > 90), "TIFF", compression="group4"),
        pillow(Image.fromarray(picture(9).astype(np.float32)), "TIFF"),
    ]


_MAKERS: dict[str, tuple[str | None, Callable[[], list[bytes]]]] = {
    ".png": (
        None,
        lambda: [
            pillow(picture(0), "PNG"),
            pillow(colour(1), "PNG", exif=_exif()),
            pillow(picture(2).astype(np.uint16) * 200, "PNG"),
            pillow(Image.fromarray(picture(3)).convert("P"), "PNG", transparency=3),
            pillow(Image.fromarray(colour(4)).convert("RGBA"), "PNG"),
        ],
    ),
    ".jpg": (
        None,
        lambda: [
            pillow(picture(0), "JPEG"),
            pillow(colour(1), "JPEG", progressive=True, exif=_exif()),
            pillow(Image.fromarray(colour(2)).convert("CMYK"), "JPEG"),
        ],
    ),
    ".tif": (None, _tiffs),
    ".bmp": (None, lambda: [pillow(picture(0), "BMP"), pillow(colour(1), "BMP")]),
    ".npy": (
        None,
        lambda: [
            npy(picture(0)),
            npy(colour(1)),
            npy(volume(2, np.float32)),
            npy(np.asfortranarray(volume(3, np.uint16))),
        ],
    ),
    ".npz": (None, lambda: [npz(a=picture(0), b=volume(1)), npz(x=colour(2))]),
    ".dcm": ("pydicom", _dicoms),
    ".nii": ("nibabel", _niftis),
    ".nii.gz": ("nibabel", lambda: [gzip.compress(data, mtime=0) for data in _niftis()]),
    ".mha": ("SimpleITK", lambda: [_itk(".mha", False), _itk(".mha", True), _itk(".mha", False, np.uint8)]),
    ".nrrd": ("SimpleITK", lambda: [_itk(".nrrd", False), _itk(".nrrd", True)]),
    ".hdr": ("nibabel", _pairs),
    ".mhd": ("SimpleITK", lambda: _detached(".mha")),
    ".nhdr": ("SimpleITK", lambda: _detached(".nrrd")),
    ".mp4": ("cv2", lambda: [_video(".mp4", "mp4v")]),
    ".avi": ("cv2", lambda: [_video(".avi", "MJPG"), _video(".avi", "XVID")]),
}


@functools.cache
def seeds() -> dict[str, list[bytes]]:
    """Sound files by suffix, of the formats whose libraries are installed."""
    found = {}
    for suffix, (module, make) in _MAKERS.items():
        if module is not None:
            try:
                __import__(module)
            except ImportError:
                continue
        found[suffix] = make()
    return found
