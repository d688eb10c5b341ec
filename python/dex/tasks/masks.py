"""Masks as they are stored: what their values mean, and how they lie on their image.

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
from dex.tasks.task import BACKGROUND, IGNORE, IGNORED, NONZERO, Parts, Task

MAX_XML_BYTES = 2**28
JPEG_LEVEL = 128
"""From this value on a pixel of a JPEG mask is not 0: around edges the packing leaves small numbers."""
SHIFT = 0.1
"""Voxels by which a mask may lie beside its image: what rounding in headers leaves."""
_ORIENTATION = 0x0112
_SHOWN = 6


class Stored(NamedTuple):
    """A mask as its file has it."""

    values: np.ndarray
    """Whole numbers ``[F, R, C]``, or colours uint8 ``[F, R, C, 3]``."""
    geometry: readers.Geometry | None = None
    lossy: bool = False


def stored(target: Path | Parts, task: Task, stack: readers.Stack, image: Path) -> np.ndarray:
    """uint8 ``[F, R, C]`` in the order of the image's file: 0 background, i + 1 class i, 255 ignored. Of parts the
    later class counts where they overlap. ValueError naming the file."""
    if stack.length is None:
        raise ValueError(
            f"mask: expected an image or a volume under it; {image} is a video that does not say its length"
        )
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
    """With what lies within the outlines of each class, frame by frame."""
    from scipy.ndimage import binary_fill_holes

    out = classes.copy()
    for filled, frame in zip(out, classes, strict=True):
        for number in np.unique(frame[frame > 0]).tolist():
            filled[binary_fill_holes(frame == number)] = number
    return out


def values_in(target: Path) -> list[str]:
    """The values of a mask, as text, for a message; nothing where it cannot be read."""
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
    """What the values of a task's masks stand for."""

    table: dict[int, int]
    """Value, or packed colour -> number in masks."""
    nonzero: int | None
    """What every other value but 0 stands for."""
    colours: bool
    words: str

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
        words = ", ".join(f"{value} {name}" for value, name in [*shown, *values])
        return cls(table, nonzero, colours, words)

    def classes(self, mask: Stored, file: Path) -> np.ndarray:
        """uint8 ``[F, R, C]``. ValueError naming the file, for a value that means nothing, with count and example."""
        values = mask.values
        if self.colours:
            values = _packed(values) if values.ndim == 4 else values.astype(np.int64) * 0x010101
        else:
            values = _grey(values, file)
        if mask.lossy and self.nonzero is not None and set(self.table) <= {0}:
            return np.where(values >= JPEG_LEVEL, np.uint8(self.nonzero), np.uint8(0))
        seen, place = np.unique(values, return_inverse=True)
        numbers = np.array([self.table.get(int(value), self.nonzero if value else 0) for value in seen], object)
        strange = [i for i, number in enumerate(numbers) if number is None]
        if strange:
            self._refuse(mask, file, values, seen[strange])
        return numbers.astype(np.uint8)[place].reshape(values.shape)

    def _refuse(self, mask: Stored, file: Path, values: np.ndarray, strange: np.ndarray) -> None:
        shown = [_colour(int(v)) if self.colours else f"{v:g}" for v in strange[:_SHOWN]]
        count = int(np.isin(values, strange).sum())
        frame, row, column = (int(places[0]) for places in np.nonzero(values == strange[0]))
        help = "--classes NAME=VALUE ..., or values in the task's YAML, say what a value means"
        if mask.lossy:
            help = "a JPEG does not keep values: save masks as PNG"
        got = ", ".join(shown) + (", ..." if len(strange) > _SHOWN else "")
        raise ValueError(
            f"masks: expected the values {self.words}; got {got} in {count:,} pixels of {file}, {shown[0]} first in "
            f"frame {frame}, row {row}, column {column}; {help}"
        )


def affine_of(geometry: readers.Geometry) -> np.ndarray:
    """float64 ``[4, 4]``; where the file does not place its first voxel, by its axes alone."""
    if geometry.affine is not None:
        return np.array(geometry.affine, np.float64)
    affine = np.eye(4)
    affine[:3, :3] = 0
    for patient, (axis, sign) in enumerate(zip(geometry.axes, geometry.signs, strict=True)):
        affine[patient, axis] = sign * geometry.spacing[axis]
    return affine


def _on_image(mask: Stored, file: Path, stack: readers.Stack, image: Path) -> Stored:
    """The mask in the order of the image's file. ValueError where it is not on the image's grid."""
    shape = (stack.length, *stack.shape)
    if mask.geometry is not None and stack.geometry is not None:
        mask = mask._replace(values=_turned(mask, file, stack, image))
    elif mask.geometry is not None or not (stack.geometry is None or (_is_dicom(image) and stack.length == 1)):
        silent, other = (image, file) if mask.geometry is not None else (file, image)
        raise ValueError(
            f"mask: expected formats that say how their voxels lie for both, or for none; {silent} does not say and "
            f"{other} does: nobody knows whether they are turned; save both as NIfTI"
        )
    else:
        _check_upright(file, image)
    if mask.values.shape[:3] != shape:
        raise ValueError(
            f"mask: expected the size of its image, {_size(shape)}; got {_size(mask.values.shape[:3])} in {file}, "
            f"whose image is {image}"
        )
    return mask


def _turned(mask: Stored, file: Path, stack: readers.Stack, image: Path) -> np.ndarray:
    """The mask's voxels in the order of the image's, where both lie on the same places of the patient."""
    ours, theirs = affine_of(stack.geometry), affine_of(mask.geometry)
    to_image = np.linalg.inv(ours) @ theirs
    axes = [int(np.abs(to_image[:3, axis]).argmax()) for axis in range(3)]  # of the image, along each of the mask
    signs = [1 if to_image[axes[axis], axis] > 0 else -1 for axis in range(3)]
    values = mask.values.transpose(2, 1, 0, *range(3, mask.values.ndim))  # i, j, k
    expected = (*stack.shape[::-1], stack.length)
    there = tuple(values.shape[:3])
    if sorted(axes) == [0, 1, 2] and all(there[axis] == expected[axes[axis]] for axis in range(3)):
        corners = np.array([[*corner, 1] for corner in itertools.product(*((0, n - 1) for n in there))]).T
        wanted = np.ones_like(corners, dtype=np.float64)
        for axis in range(3):
            along = corners[axis]
            wanted[axes[axis]] = along if signs[axis] > 0 else there[axis] - 1 - along
        placed = stack.geometry.affine is not None and mask.geometry.affine is not None
        off = (to_image @ corners - wanted)[:3]
        if not placed:  # where a file lies is unknown: what remains is how it is turned, and its spacing
            off -= off[:, :1]
        if np.abs(off).max() <= SHIFT:
            flipped = values[tuple(slice(None, None, sign) for sign in signs)]
            order = [axes.index(axis) for axis in range(3)]
            return flipped.transpose(*order, *range(3, values.ndim)).transpose(2, 1, 0, *range(3, values.ndim))
    raise ValueError(
        f"mask: expected the grid of its image, {_grid_words(stack.geometry, expected)}; got "
        f"{_grid_words(mask.geometry, there)} in {file}, whose image is {image}; resample the mask onto the image, "
        "nearest neighbour"
    )


def _grid_words(geometry: readers.Geometry, shape: Sequence[int]) -> str:
    spacing = " x ".join(f"{value:.4g}" for value in geometry.spacing)
    words = f"{' x '.join(map(str, shape))} voxels of {spacing} mm"
    if geometry.affine is None:
        return words
    return f"{words} from ({', '.join(f'{row[3]:.4g}' for row in geometry.affine[:3])}) mm"


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]} x {shape[2]}" if shape[0] == 1 else f"{shape[0]} frames of {shape[1]} x {shape[2]}"


def _read(file: Path, colours: bool) -> Stored:
    """ValueError naming the file."""
    format = readers.format_of(file) or (readers.recognised(file) if file.is_file() else None)
    if format is None or file.is_dir():
        raise ValueError(f"mask: expected a file of the formats {', '.join(readers.formats())}; got {file}")
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
        whole = np.rint(values)
        if not np.isfinite(values).all() or np.abs(values - whole).max(initial=0) > 1e-3:
            raise ValueError(f"mask: expected whole numbers; got others in {file}: a map of probabilities is no mask")
        values = whole.astype(np.int64)
    return Stored(values, stack.geometry)


def _picture(file: Path, colours: bool) -> Stored:
    """The pages of a picture: numbers of a palette unless colours are wanted."""
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
                if upright.mode == "P" and image.format == "GIF":  # whose writer numbers the colours as it likes
                    upright = upright.convert("RGB")
                pages.append(_page(upright, colours, file))
                if image.format in ("GIF", "WEBP", "JPEG", "PNG"):
                    break  # frames of an animation are no slices
            lossy = image.format in ("JPEG", "MPO")
        except (readers.Refused, MemoryError):
            raise
        except ValueError as error:
            if str(error).startswith("mask:"):
                raise
            raise readers.Refused("unreadable", faults.sentence(error)) from None
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more
            raise readers.Refused("unreadable", faults.sentence(error)) from None
    if len({page.shape for page in pages}) > 1:
        raise ValueError(f"mask: expected pages of one size; got others in {file}")
    return Stored(np.stack(pages), None, lossy)


def _page(image: Any, colours: bool, file: Path) -> np.ndarray:
    """``[H, W]`` or ``[H, W, 3]``."""
    mode = image.mode
    if mode == "P" and colours:
        image = image.convert("RGB")
    elif mode in ("LA", "PA", "RGBA", "La", "RGBa"):
        alpha = np.asarray(image.getchannel("A" if mode.isupper() else "a"))
        if (alpha != 255).any():
            raise ValueError(f"mask: expected no transparency; got some in {file}: save it as grey, palette or RGB")
        image = image.convert("L" if mode in ("LA", "La") else "RGB")
    elif mode in ("CMYK", "YCbCr", "HSV", "LAB"):
        image = image.convert("RGB")
    values = np.asarray(image)
    if values.dtype == bool:
        return values.astype(np.uint8)
    if values.dtype.kind == "f":
        if not np.isfinite(values).all() or (values != np.rint(values)).any():
            raise ValueError(f"mask: expected whole numbers; got others in {file}")
        return values.astype(np.int64)
    if values.ndim == 3 and not colours and (values == values[..., :1]).all():
        return values[..., 0]
    return values


def _grey(values: np.ndarray, file: Path) -> np.ndarray:
    if values.ndim == 4:
        seen = [_colour(int(code)) for code in np.unique(_packed(values))[:_SHOWN]]
        raise ValueError(
            f"masks: expected numbers; got colours in {file}, such as {', '.join(seen)}; --classes NAME=#rrggbb ..., "
            "or values in the task's YAML, say what a colour means"
        )
    return values


def _packed(values: np.ndarray) -> np.ndarray:
    """int64 ``[F, R, C]`` of colours ``[F, R, C, 3]``: 0xrrggbb."""
    wide = values.astype(np.int64)
    return (wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]


def _colour(code: int) -> str:
    return f"#{code:06x}"


def _check_upright(file: Path, image: Path) -> None:
    """ValueError where the image says that it is to be turned and the mask does not: nobody knows which of the two
    was drawn on."""
    turns = [_turn(path) for path in (image, file)]
    if turns[0] != turns[1]:
        raise ValueError(
            f"mask: expected the EXIF orientation of its image, {turns[0]}; got {turns[1]} in {file}, whose image is "
            f"{image}; save both upright, without that tag"
        )


def _turn(path: Path) -> int:
    from PIL import Image

    from dex.data.images import PICTURES

    if path.is_dir() or readers.format_of(path) != "picture":
        return 1
    try:
        with opened(path) as stream, Image.open(stream, formats=PICTURES) as picture:
            return int(picture.getexif().get(_ORIENTATION, 1) or 1)
    except Exception:  # whoever reads it says what is wrong with it
        return 1


def _is_dicom(file: Path) -> bool:
    if file.is_dir():
        return True
    return (readers.format_of(file) or (readers.recognised(file) if file.is_file() else None)) == "dicom"


def _polygons(file: Path, task: Task, shape: tuple[int, int, int]) -> np.ndarray:
    """Polygons as ImageScope writes them: annotations of a class each, named by an attribute; pixels of the image."""
    from xml.etree import ElementTree

    from PIL import Image, ImageDraw

    expected = "mask: expected the polygons of ImageScope in XML"
    try:
        with opened(file) as stream:
            data = stream.read(MAX_XML_BYTES + 1)
    except readers.Refused as error:
        raise ValueError(f"{expected}; {file}: {error}") from None
    if len(data) > MAX_XML_BYTES or b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        raise ValueError(f"{expected}, without entities and of at most {MAX_XML_BYTES:,} bytes; got others in {file}")
    try:
        root = ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise ValueError(f"{expected}; {file}: {error}") from None
    numbers = {name.lower(): i for i, name in enumerate(task.classes, 1)} | {BACKGROUND: 0, IGNORE: IGNORED}
    meaning = {text.lower(): name.lower() for text, name in task.layout.values}
    canvas = Image.new("L", (shape[2], shape[1]))
    draw = ImageDraw.Draw(canvas)
    if root.tag != "Annotations":
        raise ValueError(f"{expected}, of the root Annotations; got {root.tag[:40]!r} in {file}")
    for annotation in root.iter("Annotation"):
        named = annotation.find("Attributes/Attribute")
        name = (named.get("Name", "") if named is not None else "") or annotation.get("Name", "")
        number = numbers.get(meaning.get(name.lower(), name.lower()))
        for region in annotation.iter("Region"):
            if number is None:
                raise ValueError(
                    f"masks: expected polygons of {', '.join(task.classes)}; got some of {name!r} in {file}"
                )
            try:
                points = [(float(v.get("X", "")), float(v.get("Y", ""))) for v in region.iter("Vertex")]
            except ValueError:
                raise ValueError(f"{expected}, with numbers X and Y of each vertex; got others in {file}") from None
            if len(points) > 2:
                draw.polygon(points, fill=number)
    return np.asarray(canvas)[None]
