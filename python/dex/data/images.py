"""Decode untrusted pictures and NPY files to uint8 RGB. Nothing is unpickled, and declared sizes are checked first.

Pillow uses four bytes per pixel; the largest decoded image, a rotated or opaque copy of it, and its file together stay
below 512 MB.
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
"""Picture formats by Pillow's names."""
IN_SHARDS = PICTURES[:2]
DISPLAY = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV")
"""Pillow's modes with at most 8 bits per channel, which are meant for display."""
PREPARE = "`dex prepare` converts it"

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
    """A decoded image."""

    image: Image.Image
    """Of mode L or RGB."""
    maximum: int | None
    """Largest stored value of a 16-bit grey picture or a uint16 NPY, else None (16-bit colour PNG decodes to 8
    bits)."""


class _Refused(ValueError):
    """An image that cannot be used, with our own message."""


def decode(data: bytes, kind: str, formats: Sequence[str] = IN_SHARDS) -> Image.Image:
    """The image in ``data`` as a Pillow image of mode L or RGB, upright (EXIF); declared sizes are checked first.

    kind: "npy", or the name of a picture in messages: "png", "jpg", "picture". formats: accepted formats of a picture,
    some of ``PICTURES``. ValueError says what is wrong. Transparent pixels are blended with black. Only the first frame
    of an animation is decoded.
    """
    return decode_with_maximum(data, kind, formats).image


def decode_with_maximum(data: bytes, kind: str, formats: Sequence[str] = IN_SHARDS) -> Decoded:
    """``decode``, with the largest value of a 16-bit image."""
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
        raise ValueError(f"size: expected at most {MAX_PIXELS} pixels in total, got more") from error
    except Exception as error:  # Decoders raise OSError, SyntaxError, struct.error and more
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
        raise _Refused(f"colour mode {image.mode} is not supported; save it as RGB")
    return Decoded(to_l_or_rgb(image), None)


def _check_tiff(image: Image.Image) -> bool:
    """Check that a TIFF has a single usable image, and return whether low values are bright. Raises _Refused."""
    if reason := bombs.too_much_of_tiff(image, MAX_PIXELS):
        raise _Refused(reason)
    bits, sign = max(image.tag_v2.get(_BITS, (1,))), max(image.tag_v2.get(_SAMPLE_FORMAT, (_UNSIGNED,)))
    if image.mode == "I" or (sign == _SIGNED and image.mode != "F"):
        raise _Refused(f"{'' if sign == _SIGNED else 'un'}signed numbers of {bits} bits; {PREPARE}")
    inverted = image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    first = image.size, image.mode
    try:
        image.seek(1)
        several_pages = (image.size, image.mode) == first
        image.seek(0)
    except EOFError:
        several_pages = False
    if several_pages:
        raise _Refused("it has several pages, but a plain folder has one image per file; `dex prepare` reads all pages")
    return inverted and image.mode not in DISPLAY  # Pillow inverts images of at most 8 bits itself


def _inverse(array: np.ndarray, inverted: bool) -> np.ndarray:
    return 255 - array if inverted else array


def square(image: Image.Image, size: int) -> np.ndarray:
    """uint8 ``[size, size, 3]``: the centre square of ``image`` (L or RGB), resized with antialiasing."""
    array = np.asarray(_square(image, size))
    return np.repeat(array[:, :, None], 3, axis=2) if array.ndim == 2 else array


def to_planes(image: Image.Image, out: np.ndarray) -> None:
    """Write ``square`` to ``out``, uint8 ``[C, size, size]``, contiguous; C is 3, or 1 for luminance."""
    image = _square(image, out.shape[-1])
    if len(out) == 1 and image.mode != "L":
        image = image.convert("L")
    bands = image.getbands()
    planes = out.reshape(len(out), -1)
    for number, band in enumerate(bands):
        # Band by band is three times as fast as an array [S, S, 3] and its transposed copy
        planes[number :: len(bands)] = np.frombuffer(image.tobytes("raw", band), np.uint8)


def _square(image: Image.Image, size: int) -> Image.Image:
    # Crop and resize in one call, so that a very long image is never enlarged as a whole
    width, height = image.size
    if (width, height) == (size, size):
        return image
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
"""By format version; 3.0 differs only in field names, which images do not have."""


def _npy(data: bytes) -> tuple[np.ndarray, int | None]:
    """uint8 ``[H, W]`` or ``[H, W, 3]`` from the bytes of a .npy file; the header is checked before any allocation.

    uint8 is unchanged; uint16 is divided by 65535; floats must be finite and within [0, 1]. Other dtypes and objects
    (which need pickle) are refused. Shapes: [H, W], [H, W, 1], [H, W, 3].
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = _NPY_HEADERS.get(version)
        header = None if read_header is None else read_header(stream)
    except Exception as error:  # A header is a literal: SyntaxError, RecursionError and others
        reason = "the file is empty" if not data else faults.sentence(error)
        raise ValueError(f"not a readable npy: {reason}") from error
    if header is None:
        major, minor = version
        raise ValueError(
            f"not a readable npy: expected format version 1.0 or 2.0, got {major}.{minor}; save the array again with "
            "numpy.save"
        )
    shape, fortran_order, dtype = header
    if dtype.hasobject or not (dtype.kind == "f" or dtype in (np.dtype("u1"), np.dtype("<u2"), np.dtype(">u2"))):
        hint = "arrays of objects are never read" if dtype.hasobject else PREPARE
        raise ValueError(f"dtype: expected uint8, uint16 or float, got {dtype}; {hint}")
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 3)):
        raise ValueError(f"shape: expected [H, W], [H, W, 1] or [H, W, 3], got {list(shape)}; {PREPARE}")
    _check_size(shape[1], shape[0])
    count = int(np.prod(shape, dtype=object))
    if count * dtype.itemsize != len(data) - stream.tell():
        raise ValueError(
            f"shape {list(shape)} of {dtype}: expected {count * dtype.itemsize} bytes, got {len(data) - stream.tell()}"
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
            f"float values: expected finite values within [0, 1], got minimum {low}, maximum {high}; scale them, or "
            "use `dex prepare`"
        )
    return np.rint(array.astype(np.float32) * 255).astype(np.uint8)


def _check_size(width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE or width * height > MAX_PIXELS:
        raise ValueError(
            f"size: expected at least {MIN_SIDE} pixels per side and at most {MAX_PIXELS} in total, got {width} x "
            f"{height}"
        )


def _upright(image: Image.Image) -> Image.Image:
    if image.format == "TIFF":  # Pillow rotates it
        image.load()
        return image
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # The pixels may be fine despite unreadable metadata
        orientation = 1
    image.load()
    return image.transpose(TRANSPOSE[orientation]) if orientation in TRANSPOSE else image


def to_l_or_rgb(image: Image.Image) -> Image.Image:
    # At MAX_PIXELS every copy counts, so convert only if necessary
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
    for top in range(0, len(array), 256):  # In strips, since a 32-bit copy of the whole image would need most memory
        # 65535 = 255 * 257, so this rounds to the nearest of 256 levels
        out[top : top + 256] = (array[top : top + 256].clip(0, 65535).astype(np.uint32) + 128) // 257
    return out, int(array.max())
