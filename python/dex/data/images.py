"""From the bytes of an untrusted picture or NPY to uint8 RGB. Nothing here unpickles; sizes are checked first.

Pillow keeps four bytes a pixel; the largest image decoded, a copy of it turned or made opaque, and its file together
stay under 512 MB.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from dex.common import bombs, faults

MAX_PIXELS = 40_000_000
MAX_FILE_BYTES = 128 * 2**20
MIN_SIDE = 8
PICTURES = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "PPM")
"""The formats of pictures, as Pillow calls them."""
IN_SHARDS = PICTURES[:2]
DISPLAY = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV")
"""Pillow's modes of 8 bits and fewer, which are made for the eye."""
PREPARE = "`dex prepare` makes images of it"

_ORIENTATION_TAG = 0x0112
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _UNSIGNED, _SIGNED = 0, 1, 2
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Decoded(NamedTuple):
    """`image` of mode L or RGB; `maximum`: the largest stored value of a grey picture of 16 bits or a uint16 NPY, else
    None (of a 16-bit colour PNG the decoder gives 8 bits only)."""

    image: Image.Image
    maximum: int | None


class _Refused(ValueError):
    """In words of our own, what cannot be used."""


def decode(data: bytes, kind: str, formats: Sequence[str] = IN_SHARDS) -> Image.Image:
    """The image in `data` as a Pillow image of mode L or RGB, upright (EXIF), every declared size checked.

    kind: "npy", or what messages call the picture: "png", "jpg", "picture". formats: some of PICTURES, whatever its
    name is; those of a shard without it. ValueError says what is wrong. What lies behind transparency is black. Of an
    animation the first frame is taken.
    """
    return decode_with_maximum(data, kind, formats).image


def decode_with_maximum(data: bytes, kind: str, formats: Sequence[str] = IN_SHARDS) -> Decoded:
    """`decode`, and how much of its 16 bits the image uses."""
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"expected at most {MAX_FILE_BYTES} bytes, got {len(data)}")
    if kind == "npy":
        array, maximum = _npy(data)
        return Decoded(Image.fromarray(array), maximum)
    if kind not in ("png", "jpg", "picture"):
        raise ValueError(f"kind: expected png, jpg, picture or npy, got {kind!r}")
    if not data:
        raise ValueError(f"not a readable {kind}: the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=formats)
            return _decoded(image, data)
    except MemoryError:
        raise
    except _Refused as error:
        raise ValueError(f"not a readable {kind}: {error}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"size: expected at most {MAX_PIXELS} pixels in all, got more") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more
        raise ValueError(f"not a readable {kind}: {faults.sentence(error)}") from error


def _decoded(image: Image.Image, data: bytes) -> Decoded:
    try:
        _check_size(image.width, image.height)
    except ValueError as error:
        raise _Refused(str(error)) from None
    inverted = image.format == "TIFF" and _check_tiff(image)
    if reason := bombs.too_much(image, len(data), lambda: data):
        raise _Refused(reason)
    image = _upright(image)
    if image.mode == "F":
        return Decoded(Image.fromarray(_inverse(_unit_to_eight(np.asarray(image)), inverted)), None)
    if image.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):
        array, maximum = _sixteen_to_eight(np.asarray(image))
        return Decoded(Image.fromarray(_inverse(array, inverted)), maximum)
    if image.mode not in DISPLAY:
        raise _Refused(f"colours of the kind {image.mode} are not read; save it as RGB")
    return Decoded(to_l_or_rgb(image), None)


def _check_tiff(image: Image.Image) -> bool:
    """Whether low numbers are bright, of a TIFF whose first page may be taken as an image. _Refused."""
    if reason := bombs.too_much_of_tiff(image, MAX_PIXELS):
        raise _Refused(reason)
    bits, sign = max(image.tag_v2.get(_BITS, (1,))), max(image.tag_v2.get(_SAMPLE_FORMAT, (_UNSIGNED,)))
    if image.mode == "I" or (sign == _SIGNED and image.mode != "F"):
        raise _Refused(f"{'' if sign == _SIGNED else 'un'}signed numbers of {bits} bits; {PREPARE}")
    inverted = image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    first = image.size, image.mode
    try:
        image.seek(1)
        alike = (image.size, image.mode) == first
        image.seek(0)
    except EOFError:
        alike = False
    if alike:
        raise _Refused("it has several pages, and a plain folder holds one image a file; `dex prepare` takes each")
    return inverted and image.mode not in DISPLAY  # Pillow itself inverts 8 bits and fewer


def _inverse(array: np.ndarray, inverted: bool) -> np.ndarray:
    return 255 - array if inverted else array


def square(image: Image.Image, size: int) -> np.ndarray:
    """uint8 [size, size, 3]: the centre square of `image` (L or RGB) at `size`, antialiased."""
    array = np.asarray(_square(image, size))
    return np.repeat(array[:, :, None], 3, axis=2) if array.ndim == 2 else array


def to_planes(image: Image.Image, out: np.ndarray) -> None:
    """`square` into `out` uint8 [C, size, size], contiguous; C: 3, or 1 for luminance."""
    image = _square(image, out.shape[-1])
    if len(out) == 1 and image.mode != "L":
        image = image.convert("L")
    bands = image.getbands()
    planes = out.reshape(len(out), -1)
    for number, band in enumerate(bands):
        # a band at a time: three times as fast as an array [S, S, 3] and its transposed copy
        planes[number :: len(bands)] = np.frombuffer(image.tobytes("raw", band), np.uint8)


def _square(image: Image.Image, size: int) -> Image.Image:
    # the square is cut first, so that a very long image never grows on the way
    width, height = image.size
    if (width, height) == (size, size):
        return image
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
"""By the version of the format; 3.0 is for names of fields alone, which no image has."""


def npy_to_uint8(data: bytes) -> np.ndarray:
    """uint8 [H, W] or [H, W, 3] from the bytes of a .npy file, whose header is checked before anything is allocated.

    uint8 is taken as it is; uint16 means value / 65535; floats must be finite and within [0, 1]. Other dtypes and
    objects (which only a pickle can hold) are refused. Shapes: [H, W], [H, W, 1], [H, W, 3].
    """
    return _npy(data)[0]


def _npy(data: bytes) -> tuple[np.ndarray, int | None]:
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = _NPY_HEADERS.get(version)
        header = None if read is None else read(stream)
    except Exception as error:  # the header is parsed as a literal: SyntaxError, RecursionError and others come too
        says = "the file is empty" if not data else faults.sentence(error)
        raise ValueError(f"not a readable npy: {says}") from error
    if header is None:
        major, minor = version
        raise ValueError(
            f"not a readable npy: expected version 1.0 or 2.0 of its format, got {major}.{minor}; save the array again "
            "with numpy.save"
        )
    shape, fortran_order, dtype = header
    if dtype.hasobject or not (dtype.kind == "f" or dtype in (np.dtype("u1"), np.dtype("<u2"), np.dtype(">u2"))):
        way = "an array of objects is never read" if dtype.hasobject else PREPARE
        raise ValueError(f"dtype: expected uint8, uint16 or float, got {dtype}; {way}")
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 3)):
        raise ValueError(f"shape: expected [H, W], [H, W, 1] or [H, W, 3], got {list(shape)}; {PREPARE}")
    _check_size(shape[1], shape[0])
    count = int(np.prod(shape, dtype=object))
    if count * dtype.itemsize != len(data) - stream.tell():
        raise ValueError(
            f"shape {list(shape)} of {dtype} needs {count * dtype.itemsize} bytes, "
            f"the file holds {len(data) - stream.tell()}"
        )
    array = np.frombuffer(data, dtype, count, stream.tell()).reshape(shape, order="F" if fortran_order else "C")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if dtype.kind == "f":
        return _unit_to_eight(array), None
    return _sixteen_to_eight(array) if dtype.itemsize == 2 else (np.ascontiguousarray(array), None)


def _unit_to_eight(array: np.ndarray) -> np.ndarray:
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):  # NaN fails both
        raise _Refused(
            f"float values: expected finite and within [0, 1], got minimum {low}, maximum {high}; scale them, or "
            "`dex prepare` does"
        )
    return np.rint(array.astype(np.float32) * 255).astype(np.uint8)


def _check_size(width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE or width * height > MAX_PIXELS:
        raise ValueError(
            f"size: expected at least {MIN_SIDE} pixels a side and at most {MAX_PIXELS} in all, got {width} x {height}"
        )


def _upright(image: Image.Image) -> Image.Image:
    if image.format == "TIFF":  # Pillow turns it
        image.load()
        return image
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # unreadable metadata says nothing about the pixels
        orientation = 1
    image.load()
    return image.transpose(TRANSPOSE[orientation]) if orientation in TRANSPOSE else image


def to_l_or_rgb(image: Image.Image) -> Image.Image:
    # at MAX_PIXELS every copy counts, so nothing is converted that already is what it should be
    if image.has_transparency_data:
        if image.mode not in ("LA", "RGBA"):
            image = image.convert("RGBA")
        opaque = Image.new(image.mode[:-1], image.size)
        opaque.paste(image.getchannel("L") if image.mode == "LA" else image, mask=image.getchannel("A"))
        return opaque
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _sixteen_to_eight(array: np.ndarray) -> tuple[np.ndarray, int]:
    out = np.empty(array.shape, np.uint8)
    for top in range(0, len(array), 256):  # in strips: the 32-bit numbers of a whole image would be its largest copies
        # 65535 = 255 * 257: the nearest of 256 levels
        out[top : top + 256] = (array[top : top + 256].clip(0, 65535).astype(np.uint32) + 128) // 257
    return out, int(array.max())
