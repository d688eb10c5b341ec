"""Predicted masks back into the space of the file that they belong to.

A mask of a NIfTI, MHA or NRRD file has its shape, orientation and place; that of a DICOM series becomes a NIfTI file in
the patient's space, right-anterior-superior; that of a picture is a PNG of its size.
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
from dex.prepare.readers.files import Unpacked, opened
from dex.tasks.cases import Grid

LEVELS = 255
"""Steps of a probability in a file."""
_HEADER_BYTES = 540
_GZIP_LEVEL = 4


class Placement(NamedTuple):
    """Where a frame lies in the model's square image: the box of the frame that is shown, and the box that shows it."""

    frame: tuple[int, int, int, int]
    """Top, left, height and width, in pixels of the frame."""
    square: tuple[int, int, int, int]
    """The same, in pixels of the square image; the rest of it is padding."""


def placement(height: int, width: int, size: int, spacing: tuple[float, float] = (1.0, 1.0)) -> Placement:
    """Of a whole frame in a square of side ``size``: pixels become square by ``spacing`` (rows, columns), the longer
    side fills the image, the rest is padding on both sides."""
    extent = np.array((height, width)) * np.array(spacing)
    tall, wide = (max(1, round(float(v))) for v in extent * (size / extent.max()))
    return Placement((0, 0, height, width), ((size - tall) // 2, (size - wide) // 2, tall, wide))


def back_probabilities(probabilities: Tensor, place: Placement, height: int, width: int) -> Tensor:
    """``[n, C, S, S] -> [n, C, height, width]``, linear between pixels; background where the image showed nothing."""
    top, left, tall, wide = place.frame
    content = _content(probabilities, place)
    resized = F.interpolate(content, (tall, wide), mode="bilinear", align_corners=False)
    if (tall, wide) == (height, width):
        return resized
    out = resized.new_zeros(*resized.shape[:2], height, width)
    out[:, 0] = 1
    out[:, :, top : top + tall, left : left + wide] = resized
    return out


def back_masks(masks: Tensor, place: Placement, height: int, width: int) -> Tensor:
    """uint8 ``[n, S, S] -> [n, height, width]``, the nearest pixel; 0 where the image showed nothing."""
    top, left, tall, wide = place.frame
    content = _content(masks, place)[:, None].float()
    out = masks.new_zeros(len(masks), height, width)
    resized = F.interpolate(content, (tall, wide), mode="nearest-exact")[:, 0]
    out[:, top : top + tall, left : left + wide] = resized.to(masks.dtype)
    return out


def _content(images: Tensor, place: Placement) -> Tensor:
    top, left, tall, wide = place.square
    return images[..., top : top + tall, left : left + wide]


def to_volume(frames: np.ndarray, grid: Grid) -> np.ndarray:
    """A view ``[I, J, K, ...]``, as the file stores it, of frames ``[n, H, W, ...]`` in the order in which
    `dex.prepare.readers.Stack.frames` gives them. ValueError: not all frames."""
    rest = tuple(range(3, frames.ndim))
    if grid.plane == "stored":
        volume = frames.transpose(2, 1, 0, *rest)
    else:
        order, flips = {  # of `dex.prepare.readers.stack.cut`, backwards
            "axial": ((2, 1, 0), (-1, -1, 1)),
            "coronal": ((2, 0, 1), (-1, 1, -1)),
            "sagittal": ((0, 2, 1), (1, -1, -1)),
        }[grid.plane]
        normal = {"sagittal": 0, "coronal": 1, "axial": 2}[grid.plane]
        if grid.axes[normal] == 2 and grid.signs[normal] < 0:  # stored frames are not turned round
            frames = frames[::-1]
        canonical = frames.transpose(*order, *rest)[tuple(slice(None, None, step) for step in flips)]
        canonical = canonical[tuple(slice(None, None, sign) for sign in grid.signs)]
        volume = canonical.transpose(*(int(axis) for axis in np.argsort(grid.axes)), *rest)
    if volume.shape[:3] != grid.shape:
        raise ValueError(f"frames: expected those of a volume {list(grid.shape)}; got {list(volume.shape[:3])}")
    return volume


def suffix(source: Path, grid: Grid | None) -> str:
    """Of the file that holds a mask of ``source``: ``.nii.gz``, ``.mha``, ``.nrrd`` or ``.png``."""
    if grid is None:
        return ".png"
    if source.is_dir():
        return ".nii.gz"
    own = formats.suffix_of(source)
    return {".mha": ".mha", ".mhd": ".mha", ".nrrd": ".nrrd", ".nhdr": ".nrrd"}.get(own, ".nii.gz")


def write_mask(path: Path, frames: np.ndarray, source: Path, grid: Grid | None) -> None:
    """Write uint8 ``[n, H, W]``; n is 1 where there is no grid. ``path`` ends with `suffix`; it is there whole or not
    at all."""
    if grid is None:
        _write_png(path, frames)
    elif path.name.endswith((".mha", ".nrrd")):
        _write_metaimage(path, to_volume(frames, grid), grid)
    else:
        _write_nifti(path, to_volume(frames, grid), _header(source), grid)


def write_probabilities(path: Path, steps: np.ndarray, source: Path, grid: Grid | None) -> None:
    """Write ``steps``, uint8 ``[n, C, H, W]`` of `in_steps` with the background first: NIfTI ``[I, J, K, C]`` with the
    slope 1 / 255, MHA and NRRD of C float components, or float32 NPY ``[n, C, H, W]`` where there is no grid."""
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
    """uint8 of probabilities in [0, 1]: a volume of them as floats would take four times its memory."""
    return np.rint(probabilities * np.float32(LEVELS)).astype(np.uint8)


def _write_png(path: Path, frames: np.ndarray) -> None:
    from PIL import Image

    if len(frames) != 1:
        raise ValueError(f"frames: expected one where a file has no geometry; got {len(frames)}")
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(frames[0])).save(stream, "PNG")
    atomic.write(path, stream.getvalue(), sync=True)


def _header(source: Path) -> Any:
    """The header of a NIfTI file, which says more about its space than an affine; None of other files."""
    own = formats.format_of(source)
    if source.is_dir() or own is None or own.name != "nifti":
        return None
    import nibabel

    with opened(source) as raw:
        start = raw.read(3)
        raw.seek(0)
        if start[:2] == b"\x1f\x8b":
            data = Unpacked(raw).read(_HEADER_BYTES)
        elif start == b"BZh":
            import bz2

            data = bz2.BZ2File(raw).read(_HEADER_BYTES)
        else:
            data = raw.read(_HEADER_BYTES)
    two = data[:4] in ((540).to_bytes(4, "little"), (540).to_bytes(4, "big"))
    kind, size = (nibabel.Nifti2Header, 540) if two else (nibabel.Nifti1Header, 348)
    return kind(data[:size], check=False)


def _write_nifti(path: Path, volume: np.ndarray, source: Any, grid: Grid, slope: float = 1.0) -> None:
    """``source``: the header whose qform, sform, spacing and units stay as they are, or None."""
    import nibabel

    if source is not None and source.sizeof_hdr == 540:
        kind = nibabel.Nifti2Image
    else:
        kind = nibabel.Nifti1Image
    image = kind(np.asfortranarray(volume, np.uint8), grid.affine, dtype=np.uint8)
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
    """Whether a quaternion can say it: a tilted gantry shears the volume."""
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
    with tempfile.TemporaryDirectory(prefix="dex-mask-") as folder:  # SimpleITK writes to names alone
        work = Path(folder) / ("mask.mha" if path.name.endswith(".mha") else "mask.nrrd")
        SimpleITK.WriteImage(image, os.fspath(work), True)
        atomic.write(path, work.read_bytes(), sync=True)
