"""From the bytes of an untrusted PNG, JPEG or NPY to uint8 RGB. Nothing here unpickles; sizes are checked first.

Pillow keeps four bytes a pixel; the largest image decoded, a copy of it turned or made opaque, and its file together
stay under 512 MB.
"""

from __future__ import annotations

import io
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image

MAX_PIXELS = 40_000_000
MAX_FILE_BYTES = 128 * 2**20
MIN_SIDE = 8

_ORIENTATION_TAG = 0x0112
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
    """`image` of mode L or RGB; `maximum`: the largest stored value of a grey 16-bit PNG or a uint16 NPY, else None
    (of a 16-bit colour PNG the decoder gives 8 bits only)."""

    image: Image.Image
    maximum: int | None


def decode(data: bytes, kind: str) -> Image.Image:
    """The image in `data` as a Pillow image of mode L or RGB, upright (EXIF), every declared size checked.

    kind: "png", "jpg" or "npy". ValueError says what is wrong. What lies behind transparency is black.
    """
    return decode_with_maximum(data, kind).image


def decode_with_maximum(data: bytes, kind: str) -> Decoded:
    """`decode`, and how much of its 16 bits the image uses."""
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"expected at most {MAX_FILE_BYTES} bytes, got {len(data)}")
    if kind == "npy":
        array, maximum = _npy(data)
        return Decoded(Image.fromarray(array), maximum)
    if kind not in ("png", "jpg"):
        raise ValueError(f"kind: expected png, jpg or npy, got {kind!r}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
            _check_size(image.width, image.height)
            image = _upright(image)
            if image.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):
                array, maximum = _sixteen_to_eight(np.asarray(image))
                return Decoded(Image.fromarray(array), maximum)
            return Decoded(to_l_or_rgb(image), None)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more
        raise ValueError(f"not a readable {kind}: {type(error).__name__}: {error}") from error


def square(image: Image.Image, size: int) -> np.ndarray:
    """uint8 [size, size, 3]: the centre square of `image` (L or RGB) at `size`, antialiased."""
    array = np.asarray(_square(image, size))
    return np.repeat(array[:, :, None], 3, axis=2) if array.ndim == 2 else array


def to_planes(image: Image.Image, out: np.ndarray) -> None:
    """`square` into `out` uint8 [3, size, size], contiguous."""
    image = _square(image, out.shape[-1])
    bands = image.getbands()
    planes = out.reshape(3, -1)
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
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(stream)
    except Exception as error:  # the header is parsed as a literal: SyntaxError, RecursionError and others come too
        raise ValueError(f"not a readable npy: {type(error).__name__}: {error}") from error
    if dtype.hasobject or not (dtype.kind == "f" or dtype in (np.dtype("u1"), np.dtype("<u2"), np.dtype(">u2"))):
        raise ValueError(f"dtype: expected uint8, uint16 or float, got {dtype}")
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 3)):
        raise ValueError(f"shape: expected [H, W], [H, W, 1] or [H, W, 3], got {list(shape)}")
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
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # NaN fails both
            raise ValueError(f"float values: expected finite and within [0, 1], got minimum {low}, maximum {high}")
        return np.rint(array.astype(np.float32) * 255).astype(np.uint8), None
    return _sixteen_to_eight(array) if dtype.itemsize == 2 else (np.ascontiguousarray(array), None)


def _check_size(width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE or width * height > MAX_PIXELS:
        raise ValueError(
            f"size: expected at least {MIN_SIDE} pixels a side and at most {MAX_PIXELS} in all, got {width} x {height}"
        )


def _upright(image: Image.Image) -> Image.Image:
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
