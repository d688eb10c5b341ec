"""Writes predicted masks in the space of their source files.

The mask of a NIfTI, MHA or NRRD file has the file's shape, orientation and position; that of a DICOM series is a NIfTI
file in the patient's space, right-anterior-superior; that of a picture is a PNG of its size.
Shape letters: n frames, H rows and W columns of a frame, S side of the model's images, C classes and the background.
"""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from dex.common import atomic, formats
from dex.prepare.readers import nifti
from dex.prepare.readers.files import opened
from dex.tasks.cases import Grid

LEVELS = 255
"""Quantisation steps of a probability in a file."""
_GZIP_LEVEL = 4


class Placement(NamedTuple):
    """The position of a frame in the model's square image."""

    frame: tuple[int, int, int, int]
    """Top, left, height and width of the part shown, in pixels of the frame."""
    square: tuple[int, int, int, int]
    """The same box in pixels of the square image; the rest is padding."""


def placement(height: int, width: int, size: int, spacing: tuple[float, float] = (1.0, 1.0)) -> Placement:
    """The placement of a whole frame in a square of side ``size``: pixels become square by ``spacing`` (rows, columns),
    the longer side fills the image, and the shorter one is padded on both sides."""
    extent = np.array((height, width)) * np.array(spacing)
    tall, wide = (max(1, round(float(v))) for v in extent * (size / extent.max()))
    return Placement((0, 0, height, width), ((size - tall) // 2, (size - wide) // 2, tall, wide))


def back_probabilities(probabilities: Tensor, place: Placement, height: int, width: int) -> Tensor:
    """``[n, C, S, S] -> [n, C, height, width]``, bilinear; background outside the part shown."""
    top, left, tall, wide = place.square
    content = probabilities[..., top : top + tall, left : left + wide]
    top, left, tall, wide = place.frame
    resized = F.interpolate(content, (tall, wide), mode="bilinear", align_corners=False)
    if (tall, wide) == (height, width):
        return resized
    out = resized.new_zeros(*resized.shape[:2], height, width)
    out[:, 0] = 1
    out[:, :, top : top + tall, left : left + wide] = resized
    return out


def to_volume(frames: np.ndarray, grid: Grid) -> np.ndarray:
    """A view ``[I, J, K, ...]``, as stored in the file, of frames ``[n, H, W, ...]`` in the order of
    ``dex.prepare.readers.Stack.frames``. ValueError if frames are missing."""
    rest = tuple(range(3, frames.ndim))
    if grid.plane == "stored":
        volume = frames.transpose(2, 1, 0, *rest)
    else:
        order, flips = {  # The inverse of `dex.prepare.readers.stack.cut`
            "axial": ((2, 1, 0), (-1, -1, 1)),
            "coronal": ((2, 0, 1), (-1, 1, -1)),
            "sagittal": ((0, 2, 1), (1, -1, -1)),
        }[grid.plane]
        normal = {"sagittal": 0, "coronal": 1, "axial": 2}[grid.plane]
        if grid.axes[normal] == 2 and grid.signs[normal] < 0:  # Stored frames are not reversed
            frames = frames[::-1]
        canonical = frames.transpose(*order, *rest)[tuple(slice(None, None, step) for step in flips)]
        canonical = canonical[tuple(slice(None, None, sign) for sign in grid.signs)]
        volume = canonical.transpose(*(int(axis) for axis in np.argsort(grid.axes)), *rest)
    if volume.shape[:3] != grid.shape:
        raise ValueError(f"frames: expected those of a volume {list(grid.shape)}, got {list(volume.shape[:3])}")
    return volume


def suffix(source: Path, grid: Grid | None) -> str:
    """The suffix of the file for a mask of ``source``: ``.nii.gz``, ``.mha``, ``.nrrd`` or ``.png``."""
    if grid is None:
        return ".png"
    if source.is_dir():
        return ".nii.gz"
    suffixes = {".mha": ".mha", ".mhd": ".mha", ".nrrd": ".nrrd", ".nhdr": ".nrrd"}
    return suffixes.get(formats.suffix_of(source), ".nii.gz")


def write_mask(path: Path, frames: np.ndarray, source: Path, grid: Grid | None) -> None:
    """Write uint8 ``[n, H, W]`` to ``path``, which ends with ``suffix``, whole or not at all; n is 1 without a grid."""
    if grid is None:
        _write_png(path, frames)
    elif path.name.endswith((".mha", ".nrrd")):
        _write_metaimage(path, to_volume(frames, grid), grid)
    else:
        _write_nifti(path, to_volume(frames, grid), _header(source), grid)


def write_probabilities(path: Path, steps: np.ndarray, source: Path, grid: Grid | None) -> None:
    """Write ``steps``, uint8 ``[n, C, H, W]`` from ``in_steps`` with the background first, as NIfTI ``[I, J, K, C]``
    with slope 1 / 255, as MHA or NRRD with C float components, or, without a grid, as float32 NPY ``[n, C, H, W]``."""
    if grid is None:
        stream = io.BytesIO()
        np.save(stream, steps.astype(np.float32) / LEVELS)
        atomic.write(path, stream.getvalue(), sync=True)
        return
    volume = to_volume(np.moveaxis(steps, 1, 3), grid)
    if path.name.endswith((".mha", ".nrrd")):
        _write_metaimage(path, volume.astype(np.float32) / LEVELS, grid)
    else:
        _write_nifti(path, volume, _header(source), grid, slope=1 / LEVELS)


def in_steps(probabilities: np.ndarray) -> np.ndarray:
    """Probabilities in [0, 1] as uint8 steps, a quarter of the memory of float32."""
    return np.rint(probabilities * np.float32(LEVELS)).astype(np.uint8)


def _write_png(path: Path, frames: np.ndarray) -> None:
    from PIL import Image

    if len(frames) != 1:
        raise ValueError(f"frames: expected one, since the file has no geometry, got {len(frames)}")
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(frames[0])).save(stream, "PNG")
    atomic.write(path, stream.getvalue(), sync=True)


def _header(source: Path) -> Any:
    """The header of a NIfTI file, which states more about its space than an affine does; None for other files."""
    format = formats.format_of(source)
    if source.is_dir() or format is None or format.name != "nifti":
        return None
    with opened(source) as raw:
        return nifti.header_of(raw).header


def _write_nifti(path: Path, volume: np.ndarray, source: Any, grid: Grid, slope: float = 1.0) -> None:
    """source: the header from which qform, sform, spacing and units are copied, or None."""
    import nibabel

    is_nifti2 = source is not None and source.sizeof_hdr == 540
    image_class = nibabel.Nifti2Image if is_nifti2 else nibabel.Nifti1Image
    image = image_class(np.asfortranarray(volume, np.uint8), grid.affine, dtype=np.uint8)
    header = image.header
    if source is None:
        header.set_xyzt_units("mm")
        image.set_sform(grid.affine, code="scanner")
        image.set_qform(grid.affine, code="scanner" if _orthogonal(grid.affine) else "unknown")
    else:
        names = ["qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"]
        names += ["qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units"]
        for name in names:
            header[name] = source[name]
        header["pixdim"][:4] = source["pixdim"][:4]
    header.set_slope_inter(slope, 0)
    stream = io.BytesIO()
    image.to_file_map({"image": nibabel.FileHolder(fileobj=stream), "header": nibabel.FileHolder(fileobj=stream)})
    atomic.write(path, _gzipped(stream.getvalue()), sync=True)


def _gzipped(data: bytes) -> bytes:
    import gzip

    return gzip.compress(data, _GZIP_LEVEL, mtime=0)


def _orthogonal(affine: np.ndarray) -> bool:
    """Whether a quaternion can represent the affine; a tilted gantry shears the volume."""
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.abs(cosines.T @ cosines - np.eye(3)).max() < 1e-4)


def _write_metaimage(path: Path, volume: np.ndarray, grid: Grid) -> None:
    import SimpleITK

    to_lps = np.diag([-1.0, -1.0, 1.0])  # SimpleITK's axes are left, posterior, superior
    linear = to_lps @ grid.affine[:3, :3]
    spacing = np.linalg.norm(linear, axis=0)
    order = (2, 1, 0, *range(3, volume.ndim))
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(volume.transpose(order)), isVector=volume.ndim == 4)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin((to_lps @ grid.affine[:3, 3]).tolist())
    image.SetDirection((linear / spacing).ravel().tolist())
    with tempfile.TemporaryDirectory(prefix="dex-mask-") as folder:  # SimpleITK writes only to file names
        work = Path(folder) / ("mask.mha" if path.name.endswith(".mha") else "mask.nrrd")
        SimpleITK.WriteImage(image, os.fspath(work), True)
        atomic.write(path, work.read_bytes(), sync=True)
