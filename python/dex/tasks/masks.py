"""Reads stored masks: the meaning of their values, and their position on the image.

Shape letters: F frames, R rows and C columns as the image's file stores them; H, W of a picture.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dex.common import bombs, faults
from dex.prepare import readers
from dex.prepare.readers.files import opened
from dex.tasks.patterns import is_dicom
from dex.tasks.task import BACKGROUND, IGNORE, IGNORED, NONZERO, Parts, Task

MAX_XML_BYTES = 2**28
JPEG_LEVEL = 128
"""JPEG masks count as not 0 from this value on, since compression leaves small values around edges."""
SHIFT = 0.1
"""Tolerated shift of a mask against its image, in voxels, for rounding in headers."""
_ORIENTATION = 0x0112
_SHOWN = 6


class Stored(NamedTuple):
    """A mask as stored in its file."""

    values: np.ndarray
    """Integers ``[F, R, C]``, or colours uint8 ``[F, R, C, 3]``."""
    geometry: readers.Geometry | None = None
    lossy: bool = False


def stored(target: Path | Parts, task: Task, stack: readers.Stack, image: Path) -> np.ndarray:
    """uint8 ``[F, R, C]`` in the order of the image's file: 0 background, i + 1 class i, 255 ignored. Where parts
    overlap, the later class counts. ValueError naming the file."""
    if stack.length is None:
        raise ValueError(f"mask: expected an image or a volume; {image} is a video that does not state its length")
    shape = (stack.length, *stack.shape)
    if isinstance(target, Parts):
        out = np.zeros(shape, np.uint8)
        for number, file in enumerate(target.files):
            if file is not None:
                mask = _on_image(_read(file, colours=False), file, stack, image)
                out[_grey(mask.values, file) >= (JPEG_LEVEL if mask.lossy else 1)] = number + 1
        return out
    if target.suffix.lower() == ".xml":
        return _polygons(target, task, shape)
    if _is_dicom(target):
        from dex.tasks import segmentations

        return segmentations.read(target, task, stack, image)
    meaning = Meaning.of(task)
    classes = meaning.classes(_on_image(_read(target, meaning.colours), target, stack, image), target)
    return _filled(classes) if task.layout.outline else classes


def _filled(classes: np.ndarray) -> np.ndarray:
    """The mask with the outlines of each class filled, frame by frame."""
    from scipy.ndimage import binary_fill_holes

    out = classes.copy()
    for filled, frame in zip(out, classes, strict=True):
        for number in np.unique(frame[frame > 0]).tolist():
            filled[binary_fill_holes(frame == number)] = number
    return out


def values_in(target: Path) -> list[str]:
    """The values of a mask as text, for a message; empty if it cannot be read."""
    try:
        if target.suffix.lower() == ".xml" or _is_dicom(target):
            return []
        values = _read(target, colours=False).values
    except ValueError:
        return []
    if values.ndim == 4:
        return [_colour(code) for code in np.unique(_packed(values))[:_SHOWN].tolist()]
    return [f"{value:g}" for value in np.unique(values)[:100].tolist()]


class Meaning(NamedTuple):
    """The meaning of the values in a task's masks."""

    table: dict[int, int]
    """Value, or packed colour -> class number."""
    nonzero: int | None
    """The class number of every other value but 0."""
    colours: bool
    description: str
    """For messages."""

    @classmethod
    def of(cls, task: Task) -> Meaning:
        numbers = {name: i for i, name in enumerate(task.classes, 1)} | {BACKGROUND: 0, IGNORE: IGNORED}
        values = task.layout.values or tuple((str(i), name) for i, name in enumerate(task.classes, 1))
        colours = any(value.startswith("#") for value, _ in values)
        table, nonzero = {0: 0}, None
        for value, name in values:
            if value == NONZERO:
                nonzero = numbers[name]
            elif value.startswith("#"):
                table[int(value[1:], 16)] = numbers[name]
            elif re.fullmatch(r"-?\d+", value):
                table[int(value)] = numbers[name]
        shown = [(str(0), BACKGROUND)] if not any(value in ("0", "#000000") for value, _ in values) else []
        description = ", ".join(f"{value} {name}" for value, name in [*shown, *values])
        return cls(table, nonzero, colours, description)

    def classes(self, mask: Stored, file: Path) -> np.ndarray:
        """uint8 ``[F, R, C]``. ValueError naming the file and the place of a value without a meaning."""
        values = mask.values
        if self.colours:
            values = _packed(values) if values.ndim == 4 else values.astype(np.int64) * 0x010101
        else:
            values = _grey(values, file)
        if mask.lossy and self.nonzero is not None and set(self.table) <= {0}:
            return np.where(values >= JPEG_LEVEL, np.uint8(self.nonzero), np.uint8(0))
        distinct, place = np.unique(values, return_inverse=True)
        numbers = np.array([self.table.get(int(value), self.nonzero if value else 0) for value in distinct], object)
        unknown = [i for i, number in enumerate(numbers) if number is None]
        if unknown:
            self._refuse(mask, file, values, distinct[unknown])
        return numbers.astype(np.uint8)[place].reshape(values.shape)

    def _refuse(self, mask: Stored, file: Path, values: np.ndarray, unknown: np.ndarray) -> None:
        shown = [_colour(int(v)) if self.colours else f"{v:g}" for v in unknown[:_SHOWN]]
        count = int(np.isin(values, unknown).sum())
        frame, row, column = (int(places[0]) for places in np.nonzero(values == unknown[0]))
        hint = "--classes NAME=VALUE ..., or values in the task's YAML, give the meaning of values"
        if mask.lossy:
            hint = "JPEG changes values: save masks as PNG"
        got = ", ".join(shown) + (", ..." if len(unknown) > _SHOWN else "")
        raise ValueError(
            f"masks: expected the values {self.description}, got {got} in {count:,} pixels of {file}, {shown[0]} first "
            f"in frame {frame}, row {row}, column {column}; {hint}"
        )


def affine_of(geometry: readers.Geometry) -> np.ndarray:
    """float64 ``[4, 4]``; from the axes only if the file does not state the position of its first voxel."""
    if geometry.affine is not None:
        return np.array(geometry.affine, np.float64)
    affine = np.eye(4)
    affine[:3, :3] = 0
    for patient, (axis, sign) in enumerate(zip(geometry.axes, geometry.signs, strict=True)):
        affine[patient, axis] = sign * geometry.spacing[axis]
    return affine


def _on_image(mask: Stored, file: Path, stack: readers.Stack, image: Path) -> Stored:
    """The mask in the order of the image's file. ValueError if it is not on the image's grid."""
    shape = (stack.length, *stack.shape)
    if mask.geometry is not None and stack.geometry is not None:
        mask = mask._replace(values=_reoriented(mask, file, stack, image))
    elif mask.geometry is not None or not (stack.geometry is None or (_is_dicom(image) and stack.length == 1)):
        without, other = (image, file) if mask.geometry is not None else (file, image)
        raise ValueError(
            f"mask: expected formats with an orientation for both image and mask, or for neither; {without} has none "
            f"and {other} has one, so they may be rotated against each other; save both as NIfTI"
        )
    else:
        _check_upright(file, image)
    if mask.values.shape[:3] != shape:
        raise ValueError(
            f"mask: expected the size of its image, {_size(shape)}, got {_size(mask.values.shape[:3])} in {file}, "
            f"whose image is {image}"
        )
    return mask


def _reoriented(mask: Stored, file: Path, stack: readers.Stack, image: Path) -> np.ndarray:
    """The mask's voxels in the order of the image's. ValueError if their positions in the patient differ."""
    to_image = np.linalg.inv(affine_of(stack.geometry)) @ affine_of(mask.geometry)
    axes = [int(np.abs(to_image[:3, axis]).argmax()) for axis in range(3)]  # Image axis along each mask axis
    signs = [1 if to_image[axes[axis], axis] > 0 else -1 for axis in range(3)]
    values = mask.values.transpose(2, 1, 0, *range(3, mask.values.ndim))  # i, j, k
    expected = (*stack.shape[::-1], stack.length)
    shape = tuple(values.shape[:3])
    if sorted(axes) == [0, 1, 2] and all(shape[axis] == expected[axes[axis]] for axis in range(3)):
        corners = np.array([[*corner, 1] for corner in itertools.product(*((0, n - 1) for n in shape))]).T
        in_image = np.ones_like(corners, dtype=np.float64)
        for axis in range(3):
            along = corners[axis]
            in_image[axes[axis]] = along if signs[axis] > 0 else shape[axis] - 1 - along
        positions_known = stack.geometry.affine is not None and mask.geometry.affine is not None
        off = (to_image @ corners - in_image)[:3]
        if not positions_known:  # Only orientation and spacing can be compared
            off -= off[:, :1]
        if np.abs(off).max() <= SHIFT:
            flipped = values[tuple(slice(None, None, sign) for sign in signs)]
            order = [axes.index(axis) for axis in range(3)]
            return flipped.transpose(*order, *range(3, values.ndim)).transpose(2, 1, 0, *range(3, values.ndim))
    raise ValueError(
        f"mask: expected the grid of its image, {_grid_text(stack.geometry, expected)}, got "
        f"{_grid_text(mask.geometry, shape)} in {file}, whose image is {image}; resample the mask onto the image with "
        "nearest neighbours"
    )


def _grid_text(geometry: readers.Geometry, shape: Sequence[int]) -> str:
    spacing = " x ".join(f"{value:.4g}" for value in geometry.spacing)
    text = f"{' x '.join(map(str, shape))} voxels of {spacing} mm"
    if geometry.affine is None:
        return text
    return f"{text} from ({', '.join(f'{row[3]:.4g}' for row in geometry.affine[:3])}) mm"


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]} x {shape[2]}" if shape[0] == 1 else f"{shape[0]} frames of {shape[1]} x {shape[2]}"


def _read(file: Path, colours: bool) -> Stored:
    """The mask in a file of any format but XML and DICOM. ValueError naming the file."""
    format = readers.format_of(file) or (readers.recognised(file) if file.is_file() else None)
    if format is None or file.is_dir():
        raise ValueError(f"mask: expected a file of the formats {', '.join(readers.formats())}, got {file}")
    try:
        if format == "picture":
            return _picture(file, colours)
        beside = [file.with_name(name) for name in readers.beside(file, format)]
        stacks = list(readers.read([file, *(other for other in beside if other.is_file())], format))
        return _numbers(stacks[0], file)
    except readers.Refused as error:
        raise ValueError(f"mask: expected a readable mask; {file}: {error}") from None


def _numbers(stack: readers.Stack, file: Path) -> Stored:
    frames = list(stack.sample(range(stack.length)))
    values = np.stack(frames)
    if (np.asarray(stack.slope) != 1).any() or (np.asarray(stack.intercept) != 0).any():
        values = values * np.reshape(stack.slope, (-1, 1, 1)) + np.reshape(stack.intercept, (-1, 1, 1))
    if values.dtype.kind == "f":
        rounded = np.rint(values)
        if not np.isfinite(values).all() or np.abs(values - rounded).max(initial=0) > 1e-3:
            raise ValueError(f"mask: expected whole numbers, got others in {file}: a probability map is not a mask")
        values = rounded.astype(np.int64)
    return Stored(values, stack.geometry)


def _picture(file: Path, colours: bool) -> Stored:
    """The pages of a picture; palette indices unless ``colours``."""
    from PIL import Image

    from dex.data.images import PICTURES, TRANSPOSE

    limits = readers.Limits()
    with opened(file) as stream:
        try:
            image = Image.open(stream, formats=PICTURES)
            limits.check_frame(image.height, image.width)
            if reason := bombs.too_much(image, stream.size, lambda: file.read_bytes()):
                raise readers.Refused("too large", reason)
            if image.format == "TIFF" and (reason := bombs.too_much_of_tiff(image, limits.pixels)):
                raise readers.Refused("too large", reason)
            pages = []
            for page in itertools.count():
                try:
                    image.seek(page)
                except EOFError:
                    break
                limits.check_frame(image.height, image.width)
                limits.check_all((page + 1) * image.height * image.width, stream.size)
                turn = TRANSPOSE.get(image.getexif().get(_ORIENTATION, 1))
                upright = image.transpose(turn) if turn is not None else image
                if upright.mode == "P" and image.format == "GIF":  # GIF writers number colours arbitrarily
                    upright = upright.convert("RGB")
                pages.append(_page(upright, colours, file))
                if image.format in ("GIF", "WEBP", "JPEG", "PNG"):
                    break  # Frames of an animation are not slices
            lossy = image.format in ("JPEG", "MPO")
        except (readers.Refused, MemoryError):
            raise
        except ValueError as error:
            if str(error).startswith("mask:"):
                raise
            raise readers.Refused("unreadable", faults.sentence(error)) from None
        except Exception as error:  # Decoders raise OSError, SyntaxError, struct.error and more
            raise readers.Refused("unreadable", faults.sentence(error)) from None
    if len({page.shape for page in pages}) > 1:
        raise ValueError(f"mask: expected pages of one size, got others in {file}")
    return Stored(np.stack(pages), None, lossy)


def _page(image: Any, colours: bool, file: Path) -> np.ndarray:
    """A page as ``[H, W]`` or ``[H, W, 3]``."""
    mode = image.mode
    if mode == "P" and colours:
        image = image.convert("RGB")
    elif mode in ("LA", "PA", "RGBA", "La", "RGBa"):
        alpha = np.asarray(image.getchannel("A" if mode.isupper() else "a"))
        if (alpha != 255).any():
            raise ValueError(f"mask: expected no transparency, got some in {file}: save it as grey, palette or RGB")
        image = image.convert("L" if mode in ("LA", "La") else "RGB")
    elif mode in ("CMYK", "YCbCr", "HSV", "LAB"):
        image = image.convert("RGB")
    values = np.asarray(image)
    if values.dtype == bool:
        return values.astype(np.uint8)
    if values.dtype.kind == "f":
        if not np.isfinite(values).all() or (values != np.rint(values)).any():
            raise ValueError(f"mask: expected whole numbers, got others in {file}")
        return values.astype(np.int64)
    if values.ndim == 3 and not colours and (values == values[..., :1]).all():
        return values[..., 0]
    return values


def _grey(values: np.ndarray, file: Path) -> np.ndarray:
    if values.ndim == 4:
        colours = [_colour(int(code)) for code in np.unique(_packed(values))[:_SHOWN]]
        raise ValueError(
            f"masks: expected numbers, got colours in {file}, such as {', '.join(colours)}; --classes NAME=#rrggbb "
            "..., or values in the task's YAML, give the meaning of colours"
        )
    return values


def _packed(values: np.ndarray) -> np.ndarray:
    """Colours ``[F, R, C, 3]`` as int64 ``[F, R, C]``: 0xrrggbb."""
    wide = values.astype(np.int64)
    return (wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]


def _colour(code: int) -> str:
    return f"#{code:06x}"


def _check_upright(file: Path, image: Path) -> None:
    """ValueError if image and mask have different EXIF orientations, since it is unclear how the mask was drawn."""
    of_image, of_mask = (_exif_orientation(path) for path in (image, file))
    if of_image != of_mask:
        raise ValueError(
            f"mask: expected the EXIF orientation of its image, {of_image}, got {of_mask} in {file}, whose image is "
            f"{image}; save both upright, without this tag"
        )


def _exif_orientation(path: Path) -> int:
    from PIL import Image

    from dex.data.images import PICTURES

    if path.is_dir() or readers.format_of(path) != "picture":
        return 1
    try:
        with opened(path) as stream, Image.open(stream, formats=PICTURES) as picture:
            return int(picture.getexif().get(_ORIENTATION, 1) or 1)
    except Exception:  # Reading the file will report what is wrong with it
        return 1


def _is_dicom(file: Path) -> bool:
    """Whether it is a DICOM file, or the folder of a series."""
    return file.is_dir() or is_dicom(file)


def _polygons(file: Path, task: Task, shape: tuple[int, int, int]) -> np.ndarray:
    """uint8 ``[1, R, C]`` of ImageScope's polygons: each annotation has one class, named by an attribute; coordinates
    are pixels of the image."""
    from xml.etree import ElementTree

    from PIL import Image, ImageDraw

    expected = "mask: expected the polygons of ImageScope in XML"
    try:
        with opened(file) as stream:
            data = stream.read(MAX_XML_BYTES + 1)
    except readers.Refused as error:
        raise ValueError(f"{expected}; {file}: {error}") from None
    if len(data) > MAX_XML_BYTES or b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        raise ValueError(f"{expected}, without entities and at most {MAX_XML_BYTES:,} bytes large, got {file}")
    try:
        root = ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise ValueError(f"{expected}; {file}: {error}") from None
    numbers = {name.lower(): i for i, name in enumerate(task.classes, 1)} | {BACKGROUND: 0, IGNORE: IGNORED}
    meanings = {text.lower(): name.lower() for text, name in task.layout.values}
    canvas = Image.new("L", (shape[2], shape[1]))
    draw = ImageDraw.Draw(canvas)
    if root.tag != "Annotations":
        raise ValueError(f"{expected}, with the root Annotations, got {root.tag[:40]!r} in {file}")
    for annotation in root.iter("Annotation"):
        attribute = annotation.find("Attributes/Attribute")
        name = (attribute.get("Name", "") if attribute is not None else "") or annotation.get("Name", "")
        number = numbers.get(meanings.get(name.lower(), name.lower()))
        for region in annotation.iter("Region"):
            if number is None:
                raise ValueError(f"masks: expected polygons of {', '.join(task.classes)}, got {name!r} in {file}")
            try:
                points = [(float(v.get("X", "")), float(v.get("Y", ""))) for v in region.iter("Vertex")]
            except ValueError:
                raise ValueError(f"{expected}, with numbers X and Y for each vertex, got others in {file}") from None
            if len(points) > 2:
                draw.polygon(points, fill=number)
    return np.asarray(canvas)[None]
