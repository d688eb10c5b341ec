"""One DICOM file: the few header elements in use, read within limits, and its frames, decoded one at a time."""

from __future__ import annotations

import hashlib
import io
import math
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydicom
from pydicom.datadict import tag_for_keyword
from pydicom.encaps import generate_frames, get_frame
from pydicom.filereader import read_dataset, read_partial
from pydicom.multival import MultiValue
from pydicom.pixels import apply_color_lut, as_pixel_options, convert_color_space, get_decoder
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000TransferSyntaxes,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
    RLELossless,
)

from ..files import BoundedFile, Limits, Unpacked, check_scans, has_magic, opened, quiet, quietly
from ..stack import Refused
from . import bits, elements
from .codestream import j2k_size, jpeg_colour, jpeg_size, rle_segments, whole_spectrum

HEADER_READS = 1_000_000  # Each element takes two or three reads and about 400 bytes of objects
HEADER_VALUE = 2**20
MAX_ITEMS = 150_000  # Of all sequences: each is an object of 2 kB and takes as long as ten elements
MAX_FRAMES = 50_000
STRIP = 2**20

# Only these are read. Everything else in the file is skipped, including names and private data.
KEYWORDS = """
SOPClassUID SOPInstanceUID Modality ImageType BodyPartExamined SeriesDescription PresentationIntentType ConversionType
ComplexImageComponent VolumeBasedCalculationTechnique SeriesType
PatientID PatientName PatientBirthDate PatientWeight BurnedInAnnotation
StudyInstanceUID SeriesInstanceUID SeriesDate SeriesTime AcquisitionDate AcquisitionTime AcquisitionDateTime
InstanceNumber AcquisitionNumber TemporalPositionIdentifier EchoNumbers EchoTime DiffusionBValue TriggerTime
ImagePositionPatient ImageOrientationPatient PixelSpacing ImagerPixelSpacing NominalScannedPixelSpacing
PixelAspectRatio SpacingBetweenSlices SliceThickness SamplesPerPixel PhotometricInterpretation PlanarConfiguration Rows
Columns BitsAllocated BitsStored HighBit PixelRepresentation PixelPaddingValue PixelPaddingRangeLimit NumberOfFrames
PresentationLUTShape
RescaleSlope RescaleIntercept RescaleType
ModalityLUTSequence RedPaletteColorLookupTableDescriptor GreenPaletteColorLookupTableDescriptor
BluePaletteColorLookupTableDescriptor RedPaletteColorLookupTableData GreenPaletteColorLookupTableData
BluePaletteColorLookupTableData SegmentedRedPaletteColorLookupTableData SegmentedGreenPaletteColorLookupTableData
SegmentedBluePaletteColorLookupTableData SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence
DetectorInformationSequence Units DecayCorrection CorrectedImage SUVType RadiopharmaceuticalInformationSequence
DecayCorrected AttenuationCorrected DecayCorrectionDateTime
SeriesNumber ProtocolName SequenceName SliceLocation InversionTime FlipAngle RepetitionTime KVP ConvolutionKernel
ContrastBolusAgent ContentTime FrameReferenceTime DiffusionGradientOrientation NominalPercentageOfCardiacPhase
NominalCardiacTriggerDelayTime TemporalPositionTimeOffset
ExtendedOffsetTable ExtendedOffsetTableLengths
""".split()
GE_PET, PHILIPS_PET = "GEMS_PETD_01", "Philips PET Private Group"
SIEMENS_MR, SIEMENS_CSA = "SIEMENS MR HEADER", "SIEMENS CSA HEADER"
GE_PARAMETERS, PHILIPS_MR = "GEMS_PARM_01", "Philips Imaging DD 001"
_PRIVATE = [(0x0009, 0x0010), (0x0009, 0x100D), (0x7053, 0x0010), (0x7053, 0x1000), (0x7053, 0x1009)]
_PRIVATE += [(0x0019, 0x0010), (0x0019, 0x100A), (0x0019, 0x100C), (0x0029, 0x0010), (0x0029, 0x1010)]
_PRIVATE += [(0x0043, 0x0010), (0x0043, 0x1039), (0x2001, 0x0010), (0x2001, 0x1003)]
_TAGS = [tag_for_keyword(keyword) for keyword in KEYWORDS] + [group << 16 | element for group, element in _PRIVATE]
_WANTED = frozenset(_TAGS)
_ENDING, _END = (*JPEGTransferSyntaxes, *JPEGLSTransferSyntaxes), b"\xff\xd9"
_PIXELS = {0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData", 0x7FE00010: "PixelData"}


class _Header(BoundedFile):
    """A file that counts its elements and items while they are read."""

    def __init__(self, raw: io.RawIOBase, size: int):
        super().__init__(raw, size)
        self.calls, self.largest, self.items = HEADER_READS, HEADER_VALUE, MAX_ITEMS

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if size == 8 and data[:4] in (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00"):
            self.items -= 1
            if self.items < 0:
                raise Refused("too large", f"more than {MAX_ITEMS} items")
        return data


class Place(NamedTuple):
    """Where the pixels of a file start, how many bytes are left from there, and how they are encoded."""

    syntax: pydicom.uid.UID
    offset: int
    left: int
    keyword: str
    representation: str


def read_header(path: Path, limits: Limits) -> tuple[pydicom.Dataset, Place | None]:
    """The elements in KEYWORDS, and the place of the pixels (None for an object without pixels)."""
    with quiet("DICOM header"), _opened(path, limits, _Header) as file:
        magic = has_magic(file)
        simple = elements.plain(file, _WANTED, _PIXELS) if magic else None
        source = _inflated(path, limits) if magic and simple is None else None
        if simple is not None:
            source, head, syntax = file, simple.head, simple.syntax
            file.seek(simple.pixels)
        elif source is not None:
            source = _Header(source, len(source.getbuffer()))
            head = read_dataset(source, False, True, stop_when=_at_pixels, specific_tags=_TAGS)
            syntax = DeflatedExplicitVRLittleEndian
        else:
            file.seek(0)
            source = file
            head = read_partial(file, stop_when=_at_pixels, force=not magic, specific_tags=_TAGS)
            syntax = head.file_meta.get("TransferSyntaxUID")
            if not syntax:
                implicit, little = head.original_encoding
                syntax = (
                    ImplicitVRLittleEndian if implicit else (ExplicitVRLittleEndian if little else ExplicitVRBigEndian)
                )
        _with_converted(head)
        element = source.read(8)
        if not magic and "Rows" not in head and "SOPClassUID" not in head:
            raise Refused("unreadable", "not a DICOM file; give it its own suffix, or leave it out")
        if len(element) < 8:
            return head, None
        order = "<" if syntax.is_little_endian else ">"
        group, member, length = struct.unpack(f"{order}HHL", element)
        representation = element[4:6].decode("ascii", "replace")
        if representation in ("OB", "OW", "OF", "OD", "UN"):  # Whatever the transfer syntax says
            length = struct.unpack(f"{order}L", source.read(4))[0]
        else:
            representation = ""
        keyword = _PIXELS.get(group << 16 | member)
        if keyword is None or length == 0:
            return head, None
        return head, Place(syntax, source.tell(), source.size - source.tell(), keyword, representation)


def without_pixels(path: Path, limits: Limits, detail: str = "an object without pixels") -> Refused:
    """Why a file without pixels gives no image: truncated before them, or created without them."""
    with quiet("DICOM header"), _opened(path, limits) as file:
        if has_magic(file) and elements.is_cut_off(file, _PIXELS):
            return Refused("unreadable", "truncated within its header, before the pixels; copy it again")
    return Refused("no image", detail)


def _opened(path: Path, limits: Limits, kind: type[BoundedFile] = BoundedFile) -> BoundedFile:
    """The file at ``path``, unpacked if it is packed by gzip. Raises Refused if that would not fit into memory."""
    file = opened(path, kind)
    if file.read(2) != b"\x1f\x8b":
        file.seek(0)
        return file
    with file:
        file.calls = 2**62  # Packed data are read in small blocks
        unpacked, data = Unpacked(file), bytearray()
        while block := unpacked.read(2**20):
            data += block
            if len(data) > limits.memory // 4:
                raise Refused("too large", f"unpacks to more than {limits.memory // 4} bytes")
    return kind(_Unpacked(data), len(data))


class _Unpacked(io.BytesIO):
    """A buffer with a name, because pydicom asks every buffered file for one."""

    name = ""


def _with_converted(head: pydicom.Dataset) -> None:
    """Add the attributes that an enhanced file, converted from single images, keeps of them in a separate sequence."""
    shared = (head.get("SharedFunctionalGroupsSequence") or [{}])[0]
    for element in (shared.get("UnassignedSharedConvertedAttributesSequence") or [()])[0]:
        if element.tag in _TAGS and element.tag not in head:
            head.add(element)


def _at_pixels(tag, vr, length) -> bool:
    return int(tag) in _PIXELS


def _inflated(path: Path, limits: Limits) -> io.BytesIO | None:
    """The data set of a deflated file, or None for another transfer syntax. Raises Refused if it is too large."""
    with _opened(path, limits) as file:
        syntax, start = _meta(file)
        if syntax != DeflatedExplicitVRLittleEndian:
            return None
        file.seek(start)
        if file.size > limits.memory // 4:
            raise Refused("too large", f"{file.size} deflated bytes")
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        most = limits.memory // 3
        data = inflate.decompress(file.read(), most)
    if len(data) == most:
        raise Refused("too large", f"inflates to more than {most} bytes")
    return io.BytesIO(data)


def _meta(file: BoundedFile) -> tuple[str, int]:
    """The transfer syntax, and the offset of the end of the file meta group (always explicit, little endian)."""
    file.seek(132)
    syntax = ""
    for _ in range(100):
        start = file.tell()
        element = file.read(8)
        if len(element) < 8 or element[:2] != b"\x02\x00":
            return syntax, start
        number, representation, length = struct.unpack("<2xH2sH", element)
        if representation in (b"OB", b"OW", b"SQ", b"UN", b"UT"):
            length = struct.unpack("<L", file.read(4))[0]
        if number == 0x0010:
            syntax = file.read(min(length, 64)).rstrip(b"\0 ").decode("ascii", "replace")
        else:
            file.seek(length, 1)
    return syntax, file.tell()


@dataclass(slots=True, kw_only=True)
class Pixels:
    """How to decode the frames of one file. ``colour``: frames become uint8 [H, W, 3] RGB. ``inverse``: low values are
    bright, by MONOCHROME1 or the presentation LUT's shape. ``invert``: such frames have 8 bits and become 255 - x.
    ``dtype``: of the frames from ``frames``. ``padding``: lowest and highest stored value that mean "not measured".
    ``slices``: of a mosaic, ``beside`` per row; these are its frames, and ``sides`` is the size of the whole."""

    path: Path
    syntax: pydicom.uid.UID
    offset: int
    options: dict[str, Any]
    limits: Limits
    shift: int
    colour: bool
    eight: bool
    invert: bool
    dtype: np.dtype
    inverse: bool = False
    palette: np.ndarray | None = field(default=None, repr=False)
    modality_lut: np.ndarray | None = field(default=None, repr=False)
    first: int = 0
    padding: tuple[int, int] | None = None
    slices: int = 0
    beside: int = 1

    @property
    def sides(self) -> tuple[int, int]:
        return self.options["rows"], self.options["columns"]

    @property
    def shape(self) -> tuple[int, int]:
        return self.sides[0] // self.beside, self.sides[1] // self.beside

    @property
    def count(self) -> int:
        return self.slices or self.options["number_of_frames"]

    @property
    def photometric(self) -> str:
        return self.options["photometric_interpretation"]

    @quietly("DICOM pixels")
    def frames(self, numbers: list[int]) -> Iterator[np.ndarray]:
        """The frames with these numbers, in this order, each [H, W] or [H, W, 3] of ``dtype``."""
        with _opened(self.path, self.limits) as file:
            source = file
            if self.syntax == DeflatedExplicitVRLittleEndian:
                data = _inflated(self.path, self.limits)
                source = BoundedFile(data, len(data.getbuffer()))
            source.largest = self.limits.memory // 4
            source.seek(self.offset)
            wanted = [0] if self.slices else numbers
            for frame in (
                self._compressed(source, wanted) if self.syntax.is_compressed else self._native(source, wanted)
            ):
                for part in map(self._slice_of(frame), numbers) if self.slices else (frame,):
                    yield self._finished(part)

    def _slice_of(self, frame: np.ndarray) -> Callable[[int], np.ndarray]:
        height, width = self.shape

        def part(number: int) -> np.ndarray:
            top, left = number // self.beside * height, number % self.beside * width
            return frame[top : top + height, left : left + width]

        return part

    def _native(self, source: BoundedFile, numbers: list[int]) -> Iterator[np.ndarray]:
        syntax = ExplicitVRLittleEndian if self.syntax == DeflatedExplicitVRLittleEndian else self.syntax
        for number in numbers:
            if self.options["bits_allocated"] in bits.PACKED:

                def read(start: int, count: int) -> bytes:
                    source.seek(self.offset + start)
                    return source.read(count)

                signed = self.options.get("pixel_representation") == 1
                yield bits.frame(read, self.sides, self.options["bits_allocated"], signed, number)
                continue
            source.seek(self.offset)
            array, _ = get_decoder(syntax).as_array(source, index=number, raw=True, **self.options)
            yield self._rgb(array, self.photometric)

    def _compressed(self, source: BoundedFile, numbers: list[int]) -> Iterator[np.ndarray]:
        decoder = get_decoder(self.syntax)
        if not decoder.is_available:
            raise Refused("unsupported", "no decoder for its transfer syntax; decompress it with a DICOM tool")
        options = {k: v for k, v in self.options.items() if k != "extended_offsets"} | {"number_of_frames": 1}
        for data in self._encapsulated(source, numbers):
            self._check_codestream(data)
            if self.syntax in JPEGTransferSyntaxes:
                data = whole_spectrum(data)
            array, photometric = _decoded(decoder, data, options)
            # The decoder invents missing data. If the stream is complete, appended bytes do not change the result.
            if self.syntax in _ENDING and data.find(_END, data.rfind(b"\xff\xda")) < 0:
                if not np.array_equal(array, _decoded(decoder, data + b"\x55" * 64 + _END, options)[0]):
                    raise Refused("unreadable", "the compressed data end early: truncated; copy it again")
            if self.syntax in JPEGTransferSyntaxes and self.options["samples_per_pixel"] == 3:
                photometric = jpeg_colour(data) or photometric  # Headers declare RGB for streams that are not
            yield self._rgb(array, photometric)

    def _encapsulated(self, source: BoundedFile, numbers: list[int]) -> Iterator[bytes]:
        declared = self.options["number_of_frames"]
        known = {"number_of_frames": declared, "extended_offsets": self.options.get("extended_offsets")}
        if numbers == sorted(set(numbers)):
            wanted = iter(numbers)
            number = next(wanted, None)
            for index, data in enumerate(generate_frames(source, **known)):
                if index == number:
                    yield data
                    number = next(wanted, None)
                if number is None:
                    return
            raise Refused("unreadable", f"{declared} frames declared, {index + 1} read")
        for number in numbers:
            source.seek(self.offset)
            yield get_frame(source, number, **known)

    def _check_codestream(self, data: bytes) -> None:
        """Decoders allocate by the sizes in the codestream, so these must match the header."""
        if len(data) > self.limits.memory // 4:
            raise Refused("too large", f"{len(data)} bytes in one compressed frame")
        rows, columns, samples = *self.sides, self.options["samples_per_pixel"]
        if self.syntax == RLELossless:
            segments = rle_segments(data)
            wanted = samples * self.options["bits_allocated"] // 8
            if segments != wanted:
                raise Refused(
                    "inconsistent", f"{segments} RLE segments, {wanted} expected; decompress it with a DICOM tool"
                )
            return
        if self.syntax in JPEG2000TransferSyntaxes:
            declared = j2k_size(data)
        elif self.syntax in JPEGTransferSyntaxes or self.syntax in JPEGLSTransferSyntaxes:
            declared = jpeg_size(data)
            check_scans(data)
        else:
            raise Refused("unsupported", "no decoder for its transfer syntax; decompress it with a DICOM tool")
        if declared != (rows, columns, samples):
            raise Refused("inconsistent", f"compressed image of {declared}, header of {(rows, columns, samples)}")

    def _rgb(self, array: np.ndarray, photometric: str) -> np.ndarray:
        if self.options["samples_per_pixel"] == 1 or photometric == "RGB":
            return array
        if photometric not in ("YBR_FULL", "YBR_FULL_422"):
            raise Refused("unsupported", "its colour space; convert it to RGB or grey")
        if array.dtype != np.uint8:
            raise Refused("unsupported", "YBR of more than 8 bits; convert it to RGB or grey")
        out = np.empty(array.shape, np.uint8)
        rows = max(1, STRIP // array.shape[1])
        for top in range(0, len(array), rows):  # In strips: the conversion uses float64
            out[top : top + rows] = convert_color_space(array[top : top + rows], "YBR_FULL", "RGB")
        return out

    def _finished(self, array: np.ndarray) -> np.ndarray:
        if self.shift > 0:  # The value does not start at bit 0
            array = array >> self.shift
        if self.padding is not None:
            array = self._without_padding(array)
        table = self.palette if self.palette is not None else self.modality_lut
        if table is not None:
            return table[np.clip(array.astype(np.int32) - self.first, 0, len(table) - 1)]
        if not self.eight:
            return array.astype(self.dtype, copy=False)
        bits = min(self.options["bits_stored"], 8 * array.dtype.itemsize)
        if bits > 8:
            array = array >> (bits - 8)
        array = array.astype(np.uint8, copy=False)
        if bits < 8:
            top = 2**bits - 1
            array = (np.arange(256).clip(0, top) * 255 // top).astype(np.uint8)[array]
        return 255 - array if self.invert else array

    def _without_padding(self, array: np.ndarray) -> np.ndarray:
        """Replace padding by the darkest measured value of the frame, or by 0 if there is none. Padding may be far
        outside the measured range and would dominate the percentiles."""
        low, high = self.padding
        measured = (array < low) | (array > high)
        if measured.all():
            return array
        if not measured.any():
            return np.zeros_like(array)
        range_of = np.iinfo(array.dtype)
        if self.inverse:
            darkest = array.max(where=measured, initial=range_of.min)
        else:
            darkest = array.min(where=measured, initial=range_of.max)
        return np.where(measured, array, darkest)


def describe(path: Path, head: pydicom.Dataset, place: Place, limits: Limits) -> Pixels:
    """How to decode a file. Raises Refused for an inconsistent header, or for sizes above the limits."""
    syntax = place.syntax
    options = as_pixel_options(head)
    options.update(pixel_keyword=place.keyword, transfer_syntax_uid=syntax)
    if place.representation:
        options["pixel_vr"] = place.representation
    options.setdefault("samples_per_pixel", 1)
    options.setdefault("photometric_interpretation", "MONOCHROME2")
    floating = place.keyword != "PixelData"
    if not floating:
        options.setdefault("pixel_representation", 0)
        options.setdefault("bits_stored", options.get("bits_allocated"))
    for name in ("rows", "columns", "bits_allocated", "number_of_frames", "samples_per_pixel"):
        if not isinstance(options.get(name), int):
            raise Refused("unreadable", f"{name} is missing or not a number")
        options[name] = int(options[name])
    photometric = options["photometric_interpretation"] = str(options["photometric_interpretation"])
    allocated, samples = options["bits_allocated"], options["samples_per_pixel"]
    limits.check_frame(options["rows"], options["columns"])
    packed = allocated == 12 and samples == 1 and syntax.is_little_endian and not syntax.is_encapsulated
    supported = packed or allocated in (1, 8, 16, 32, 64)
    if samples not in (1, 3) or not supported or options["number_of_frames"] < 1:
        raise Refused("unsupported", f"{samples} samples of {allocated} bits per pixel; export it as grey or RGB")
    if samples == 3:
        options.setdefault("planar_configuration", 0)
    count = options["number_of_frames"]
    if count > MAX_FRAMES:
        raise Refused("too large", f"{count} frames in one file, at most {MAX_FRAMES}")
    if syntax.is_compressed and syntax != DeflatedExplicitVRLittleEndian:
        needed = 8 * count  # At least the tag and length of an item per frame
        limits.check_all(count * options["rows"] * options["columns"] * samples * max(1, allocated // 8), place.left)
    else:
        needed = count * options["rows"] * options["columns"] * samples * allocated // 8
        needed = needed // 3 * 2 if photometric == "YBR_FULL_422" else needed
    if needed > place.left:
        raise Refused("unreadable", f"{needed} bytes declared, {place.left} there: truncated; copy it again")
    stored = allocated if floating else options["bits_stored"]
    if not isinstance(stored, int) or not 1 <= stored <= allocated:
        raise Refused("unreadable", "bits stored outside 1 to bits allocated")
    shift, high = 0, head.get("HighBit")
    if not floating and not syntax.is_compressed and isinstance(high, int) and stored - 1 < high < allocated:
        shift, options["bits_stored"] = high + 1 - stored, high + 1
    signed = options.get("pixel_representation") == 1
    colour = samples == 3 or photometric == "PALETTE COLOR"
    inverse = not colour and (photometric == "MONOCHROME1" or text(head, "PresentationLUTShape") == "INVERSE")
    palette, first = (None, 0)
    if photometric == "PALETTE COLOR" and samples == 1:
        palette, first = _palette(head, syntax)
    lut = None
    item = (head.get("ModalityLUTSequence") or [{}])[0]
    if not colour and item.get("LUTDescriptor") is not None and item.get("LUTData") is not None:  # Some are empty
        first = _first(item.LUTDescriptor, signed)
        lut = _table(item.LUTData, item.LUTDescriptor, syntax)
    rescaled = (head.get("RescaleSlope", 1) or 1) != 1 or (head.get("RescaleIntercept", 0) or 0) != 0
    eight = colour or (not floating and lut is None and stored <= 8 and not signed and not rescaled)
    if floating:
        dtype = np.dtype(f"f{allocated // 8}")
    elif eight:
        dtype = np.dtype(np.uint8)
    elif lut is not None:
        dtype = lut.dtype
    else:
        dtype = np.dtype(f"{'i' if signed else 'u'}{-(-allocated // 8)}")
    pixels = Pixels(
        path=path,
        syntax=syntax,
        offset=place.offset,
        options=options,
        limits=limits,
        shift=shift,
        colour=colour,
        eight=eight,
        inverse=inverse,
        invert=eight and inverse,
        dtype=dtype,
        palette=palette,
        modality_lut=lut,
        first=first,
        padding=None if colour or floating or allocated == 1 else _padding(head, allocated, signed),
    )
    if not limits.holds(0, *pixels.sides, samples * -(-allocated // 8)):
        raise Refused("too large", f"{pixels.sides} pixels of {samples * allocated} bits")
    return pixels


def text(source: Any, name: str) -> str:
    """An element's value as stripped text, "" if absent."""
    value = source.get(name)
    return "" if value is None else str(value).strip()


def listed(value: Any) -> list[Any]:
    """The values of an element with any multiplicity."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, MultiValue | list | tuple) else [value]


def private(head: Any, group: int, creator: str, element: int) -> Any:
    """The value of an element of a private block, if the block has the expected creator; else None."""
    block = head.get((group, 0x0010), None)
    member = head.get((group, 0x1000 | element), None)
    if block is None or member is None or str(block.value).strip() != creator:
        return None
    return member.value


def number(value: Any) -> float | None:
    """A finite number, or None."""
    try:
        finite = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return finite if math.isfinite(finite) else None


def _first(descriptor, signed: bool) -> int:
    first = int(descriptor[1])
    return first - 2**16 if signed and first >= 2**15 else first


def _padding(head, allocated: int, signed: bool) -> tuple[int, int] | None:
    """The lowest and highest padding value, independent of the sign in which the element is written."""
    value = number(head.get("PixelPaddingValue"))
    if value is None:
        return None
    limit = number(head.get("PixelPaddingRangeLimit"))
    ends = [int(end) % 2**allocated for end in (value, value if limit is None else limit)]
    if signed:
        ends = [end - 2**allocated if end >= 2 ** (allocated - 1) else end for end in ends]
    return min(ends), max(ends)


def _table(data, descriptor, syntax) -> np.ndarray:
    """uint16 [n]: a lookup table whose entries are bytes or words."""
    count = int(descriptor[0]) or 2**16
    if isinstance(data, bytes):
        wide = len(data) >= 2 * count
        order = "<" if syntax.is_little_endian else ">"
        values = np.frombuffer(data, f"{order}u2" if wide else "u1", count)
    else:
        values = np.asarray(listed(data)[:count], np.int64) % 2**16
    if not len(values):
        raise Refused("unreadable", "an empty lookup table: its header is damaged; export it again")
    return values.astype(np.uint16)


def _palette(head, syntax) -> tuple[np.ndarray, int]:
    """The palette, uint8 [n, 3], and the stored value of its first entry."""
    descriptor = head.RedPaletteColorLookupTableDescriptor
    first = _first(descriptor, head.get("PixelRepresentation") == 1)
    if "RedPaletteColorLookupTableData" in head:
        tables = [
            _table(head[f"{c}PaletteColorLookupTableData"].value, descriptor, syntax) for c in ("Red", "Green", "Blue")
        ]
        if len({len(table) for table in tables}) != 1:
            raise Refused("inconsistent", "palettes of several lengths; convert it to RGB")
        palette = np.stack(tables, axis=1)
    else:
        head.set_original_encoding(syntax.is_implicit_VR, syntax.is_little_endian)
        count = int(descriptor[0]) or 2**16
        palette = apply_color_lut(np.arange(first, first + count, dtype=np.int32)[None], head)[0, :, :3]
    return (palette >> 8 if palette.max() > 255 else palette).astype(np.uint8), first


def _decoded(decoder, data: bytes, options: dict) -> tuple[np.ndarray, str]:
    """A single compressed frame, decoded, and its photometric interpretation."""
    # pydicom expects the frame within an empty offset table and one fragment.
    item = b"\xfe\xff\x00\xe0\0\0\0\0\xfe\xff\x00\xe0" + struct.pack("<L", len(data)) + data
    array, properties = decoder.as_array(item, index=0, raw=True, decoding_plugin="pylibjpeg", **options)
    return array, properties["photometric_interpretation"]


def digest(path: Path, place: Place, limits: Limits) -> bytes:
    """The SHA-256 of a file's pixels, as they are stored."""
    with _opened(path, limits) as file:
        source: io.BufferedIOBase | io.BytesIO | None = file
        if place.syntax == DeflatedExplicitVRLittleEndian:
            source = _inflated(path, limits)
        source.seek(place.offset)
        total = hashlib.sha256()
        while block := source.read(2**20):
            total.update(block)
        return total.digest()
