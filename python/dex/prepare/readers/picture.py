"""PNG, JPEG, TIFF, BMP, GIF, WebP, JPEG 2000 and PPM.

8-bit display pictures become upright RGB or grey, with black behind transparency; deeper grey keeps its values. Alike
pages of a TIFF are frames; other pages, and the frames of an animation after the first, are left out. A JPEG with
longer sides than requested is decoded at a half, a quarter or an eighth of them. ``large`` reads pictures with more
pixels than a frame may have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dex.common import bombs, formats

from .files import BoundedFile, Limits, only, opened, quiet, quietly
from .reader import Beat, Reader
from .stack import Refused, Stack

if TYPE_CHECKING:
    from PIL import Image

    from . import large

MAX_PAGES = 4_000
MAX_TAG = 2**23  # Bytes of one tag of a TIFF
_DEEP = {"I": np.int32, "F": np.float32}
_ORIENTATION = 0x0112
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_PLANAR, _APART = 284, 2
_WHITE_IS_ZERO, _UNSIGNED, _SIGNED = 0, 1, 2
_STRIP = 2**20
_COSINES = (b"\xc0", b"\xc1", b"\xc2")  # Frame markers of JPEGs by cosine transform: baseline, extended, progressive
_CUTS = (8, 4, 2)  # Possible divisors of the sides of such a JPEG
_CODING_STYLE = 2**16  # Bytes within which a JPEG 2000 declares its number of resolutions
_MAX_SEGMENTS = 1000  # Before the frame of a JPEG
_NO_FRAMES = (0xC4, 0xC8, 0xCC)  # Tables, among the frame markers


def read(
    files: Sequence[Path], limits: Limits, beat: Beat, enough: int | None = None, pieces: int | None = None
) -> Iterator[Stack]:
    path = only(files)
    refused: list[Refused] = []
    with quiet("picture"), opened(path) as file:
        image = _open(file)
        page = _large_page(image, limits, refused)
        if page is not None:
            from . import large

            stack = large.stack(path, _large(file, page, limits), limits, beat, pieces)
            stack.refused = refused
            yield stack
            return
        kind = _kind(image, limits)
        _check_packing(image, file, limits)
        if image.format in ("GIF", "WEBP") and image.is_animated:
            refused.append(Refused("inconsistent", "frames after the first"))
        pages = [0]
        while image.format == "TIFF":  # Pillow's `n_frames` would read all pages first
            page = image.tell() + 1
            try:
                image.seek(page)
            except EOFError:
                break
            if page >= MAX_PAGES:
                raise Refused("too large", f"more than {MAX_PAGES} pages")
            if _kind(image, limits) == kind:
                pages.append(page)
            else:
                refused.append(Refused("inconsistent", "a page unlike the first"))
        by = _divided(image, file, enough)
        fields = _fields(image, kind[3])
        size = file.size
    del image
    (height, width), mode, orientation, dtype = kind
    channels = _channels(mode, dtype)
    if len(pages) > 1:
        limits.check_all(len(pages) * height * width * channels * dtype.itemsize, size)

    @quietly("picture")
    def load(wanted: Callable[[int], bool]) -> Iterator[tuple[int, np.ndarray]]:
        with opened(path) as file:
            image = _open(file)
            for number, page in enumerate(pages):
                if wanted(number):
                    image.seek(page)
                    if _kind(image, limits) != kind:
                        raise Refused("inconsistent", "a page that changed")
                    if by > 1:
                        image.draft(None, (width // by, height // by))
                    yield number, _pixels(image, orientation, channels, dtype)

    shape, extent, sides = (-(-height // by), -(-width // by)), (height / by, width / by), (height, width)
    if orientation >= 5:
        shape, extent, sides = shape[::-1], extent[::-1], sides[::-1]
    yield Stack(
        length=len(pages),
        shape=shape,
        dtype=dtype,
        load=load,
        holds=lambda stored: limits.holds(stored, height, width, 4),
        channels=channels,
        origins=tuple(("", page) for page in pages),
        extent=extent if by > 1 else None,
        sides=sides if by > 1 else None,
        refused=refused,
        **fields,
    )


def _open(file: BoundedFile) -> Image.Image:
    from PIL import Image

    from dex.data.images import PICTURES

    if file.read(4)[:2] in (b"II", b"MM"):  # Pixel data are read in small pieces, or by the decoder itself
        file.largest = MAX_TAG
    file.seek(0)
    with _of_any_size():
        return Image.open(file, formats=PICTURES)


def _large_page(image: Image.Image, limits: Limits, refused: list[Refused]) -> int | None:
    """The first page with more pixels than a frame may have, or None. If there is one, the other pages are refused."""
    large = [image.size[0] * image.size[1] > limits.pixels]
    with _of_any_size():
        while image.format == "TIFF" and len(large) < MAX_PAGES:
            try:
                image.seek(len(large))
            except EOFError:
                break
            large.append(image.size[0] * image.size[1] > limits.pixels)
        if len(large) > 1:
            image.seek(0)
    if True not in large:
        return None
    refused.extend(Refused("inconsistent", "a page beside the large one") for _ in large[1:])
    return large.index(True)


def _large(file: BoundedFile, page: int, limits: Limits) -> large.Picture:
    from . import large

    image = _page(file, page)
    _check_packing(image, file, limits)
    _, mode, orientation, dtype = _kind(image, None)
    channels = _channels(mode, dtype)
    if image.format == "TIFF":
        orientation = int(image.tag_v2.get(_ORIENTATION, 1))
    return large.Picture(
        page=page,
        channels=channels,
        dtype=dtype,
        orientation=orientation if orientation in range(1, 9) else 1,
        divisor=_divisor(image, file),
        open=_page,
        convert=lambda part: _pixels(part, 1, channels, dtype),
        fields=_fields(image, dtype),
    )


def _divisor(image: Image.Image, file: BoundedFile) -> int:
    """The largest power of two by which the decoder can divide the sides of a picture."""
    if image.format in ("JPEG", "MPO") and _is_of_cosines(file):
        return _CUTS[0]
    if image.format != "JPEG2000":
        return 1
    file.seek(0)
    start = file.read(_CODING_STYLE)
    place = start.find(b"\xff\x52", start.find(b"\xff\x4f\xff\x51") + 1)
    return 2 ** min(start[place + 9], 6) if 0 <= place < len(start) - 9 else 1


@contextmanager
def _of_any_size() -> Iterator[None]:
    """Let Pillow open pictures of any size: the caller checks it."""
    from PIL import Image

    most, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = most


def _page(file: BoundedFile, page: int) -> Image.Image:
    file.seek(0)
    image = _open(file)
    with _of_any_size():
        image.seek(page)
    return image


def _channels(mode: str, dtype: np.dtype) -> int:
    return 3 if dtype == np.uint8 and mode not in ("1", "L", "LA", "La") else 1


def _fields(image: Image.Image, dtype: np.dtype) -> dict[str, Any]:
    """The fields of its stack that describe the values."""
    white_is_zero = image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    return {
        "quantity": "display8" if dtype == np.uint8 else "raw",
        "windowed": dtype == np.uint8,
        "inverted": white_is_zero and dtype != np.uint8,  # Pillow itself inverts at most 8 bits
    }


def _check_packing(image: Image.Image, file: BoundedFile, limits: Limits) -> None:
    """Raise Refused if few bytes would keep the decoder busy for long."""
    if image.format in ("JPEG", "MPO") and file.size > limits.memory // 4:
        raise Refused("too large", f"{file.size:,} bytes of JPEG, at most {limits.memory // 4:,}")
    place = file.tell()

    def whole() -> bytes:
        file.seek(0)
        return file.read()

    reason = bombs.too_much(image, file.size, whole)
    file.seek(place)
    if reason:
        raise Refused("too large", reason)


def _divided(image: Image.Image, file: BoundedFile, enough: int | None) -> int:
    """The divisor of a JPEG's sides during decoding: the shorter side keeps ``enough`` pixels."""
    if enough is None or image.format not in ("JPEG", "MPO") or not _is_of_cosines(file):
        return 1
    return next((by for by in _CUTS if min(image.size) >= by * enough), 1)


def _is_of_cosines(file: BoundedFile) -> bool:
    """Whether a JPEG can be decoded at a smaller size, unlike a lossless one. The position in the file is kept."""
    place = file.tell()
    file.seek(2)
    marker = b""
    for _ in range(_MAX_SEGMENTS):
        marker = file.read(2)
        if len(marker) < 2 or marker[0] != 0xFF or (0xC0 <= marker[1] <= 0xCF and marker[1] not in _NO_FRAMES):
            break
        # 0xff before a marker is padding.
        file.seek(int.from_bytes(file.read(2), "big") - 2 if marker[1] != 0xFF else -1, 1)
    file.seek(place)
    return marker[:1] == b"\xff" and marker[1:] in _COSINES


def _kind(image: Image.Image, limits: Limits | None) -> tuple[tuple[int, int], str, int, np.dtype]:
    """(height, width) as stored, mode, EXIF orientation and dtype, before any pixel is decoded. limits: for a picture
    that becomes a frame."""
    from PIL import Image

    from dex.data.images import DISPLAY, TRANSPOSE

    width, height = image.size
    if limits is not None:
        limits.check_frame(height, width)
    mode = image.mode
    if mode not in DISPLAY and mode not in _DEEP and not mode.startswith("I;16"):
        raise Refused("unsupported", "its colour mode; save it as RGB or grey")
    dtype = np.dtype(_DEEP.get(mode, np.uint16 if mode.startswith("I;16") else np.uint8))
    if image.format == "TIFF":
        if limits is not None and (reason := bombs.too_much_of_tiff(image, limits.pixels)):
            raise Refused("too large", reason)
        bits, sign = max(image.tag_v2.get(_BITS, (1,))), max(image.tag_v2.get(_SAMPLE_FORMAT, (_UNSIGNED,)))
        if bits > 8 and len(image.getbands()) > 1 and image.tag_v2.get(_PLANAR) == _APART:
            raise Refused("unsupported", f"colours of {bits} bits in separate planes; save it as PNG")
        if dtype == np.uint8 and sign == _SIGNED:
            raise Refused("unsupported", "signed numbers of 8 bits; save them with 16")
        if mode == "I" and bits == 32 and sign == _UNSIGNED:  # Pillow reads the same bits as signed
            dtype = np.dtype(np.uint32)
        return (height, width), mode, 1, dtype  # Pillow applies the orientation, and the size includes it
    try:
        orientation = Image.Image.getexif(image).get(_ORIENTATION, 1)  # PNG's method would decode the image first
    except Exception:  # Unreadable metadata say nothing about the pixels
        orientation = 1
    return (height, width), mode, orientation if orientation in TRANSPOSE else 1, dtype


def _pixels(image: Image.Image, orientation: int, channels: int, dtype: np.dtype) -> np.ndarray:
    """The upright pixels, converted in strips: a whole opaque image, and numpy's view of it, would be the largest
    copies."""
    from dex.data.images import TRANSPOSE, to_l_or_rgb

    if orientation != 1:
        image = image.transpose(TRANSPOSE[orientation])
    width, height = image.size
    if image.mode in ("L", "RGB") and dtype == np.uint8 and channels == len(image.mode) and width * height <= _STRIP:
        return np.asarray(image)
    out = np.empty((height, width) + ((3,) if channels == 3 else ()), dtype)
    rows = max(1, _STRIP // width)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(height, top + rows)))
        if dtype == np.uint8:
            strip = to_l_or_rgb(strip)
            if channels == 3 and strip.mode == "L":
                strip = strip.convert("RGB")
        out[top : top + rows] = np.asarray(strip).view(dtype) if dtype == np.uint32 else np.asarray(strip)
    return out


def load() -> None:
    from dex.data import images  # noqa: F401


READER = Reader(
    suffixes=formats.of("picture").suffixes,
    read=read,
    needs=formats.of("picture").needs,
    load=load,
    choices=("enough", "pieces"),
)
