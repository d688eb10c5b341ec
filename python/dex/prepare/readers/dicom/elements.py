"""Read the wanted elements of a plain DICOM header in a fraction of the time that pydicom takes to skip the others.
pydicom still converts their values, and reads every header that is not plain.

A plain header has a preamble and the magic, is little endian and not deflated, has its elements in order, and none of
the wanted ones is a sequence. ``plain`` returns None for any other header, and wherever pydicom would warn or raise.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Container
from typing import Any, NamedTuple

from pydicom import Dataset
from pydicom.charset import convert_encodings, default_encoding
from pydicom.datadict import dictionary_has_tag, dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement, convert_raw_data_element
from pydicom.tag import BaseTag
from pydicom.uid import UID, ImplicitVRLittleEndian, PrivateTransferSyntaxes

from ..files import BoundedFile

BLOCK = 2**14  # Bytes read at a time
MOST = 10_000  # Elements, including those of sequences
LONGEST = 2**16  # Bytes of a value
DEEPEST = 8  # Nested sequences
_OPEN = 0xFFFFFFFF
_LONG = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
_SHORT = frozenset(
    (b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN", b"SH", b"SL")
    + (b"SS", b"ST", b"TM", b"UI", b"UL", b"US")
)
_SIMPLE = frozenset(word.decode() for word in _SHORT) | {"UC", "UR", "UT"}
_SHARED = 256  # Largest number of bytes of a value that may be shared
_TAG, _LONG_HEAD, _SHORT_LENGTH = struct.Struct("<HHL"), struct.Struct("<L"), struct.Struct("<H")
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_CHARACTERS, _SYNTAX, _META_END = 0x00080005, 0x00020010, 0x0002FFFF


class Head(Dataset):
    """A data set that is fast for many look-ups, most of absent elements and some repeated. Do not change it after the
    first look-up.

    The files of a series share most values, and pydicom takes longer to convert a value than to find it. Values with
    the same bytes are therefore converted once and shared."""

    def __getitem__(self, key: Any) -> Any:
        element = self._dict.get(key) if isinstance(key, int) else None
        if isinstance(element, RawDataElement) and _is_shared(element):
            encoding = self.original_character_set or self._character_set
            self._dict[element.tag] = element = _converted(
                int(element.tag),
                element.VR,
                element.value,
                element.is_implicit_VR,
                encoding if isinstance(encoding, str) else tuple(encoding),
            )
            return element
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        if isinstance(key, tuple):  # Of a private block, mostly absent
            return self[BaseTag(key[0] << 16 | key[1])] if key[0] << 16 | key[1] in self._dict else default
        tag = _tag(key) if isinstance(key, str) else None
        if tag is None:
            return super().get(key, default)
        if tag not in self._dict:
            return default
        values = self.__dict__.setdefault("_values", {})
        if key not in values:
            values[key] = self[tag].value
        return values[key]


def _is_shared(raw: RawDataElement) -> bool:
    """Whether the value depends only on the arguments of ``_converted``."""
    if len(raw.value) > _SHARED or raw.tag.is_private or raw.tag == _CHARACTERS:
        return False
    return (raw.VR or _representation(int(raw.tag))) in _SIMPLE


@functools.lru_cache(maxsize=2**13)
def _converted(
    tag: int, representation: str | None, value: bytes, implicit: bool, encoding: str | tuple[str, ...]
) -> DataElement:
    raw = RawDataElement(_named(tag), representation, len(value), value, 0, implicit, True, True)
    return convert_raw_data_element(raw, encoding=encoding if isinstance(encoding, str) else list(encoding))


@functools.cache
def _representation(tag: int) -> str:
    """The value representation of an element that does not declare one; "" if it is in no dictionary."""
    return dictionary_VR(tag) if dictionary_has_tag(tag) else ""


@functools.cache
def _tag(keyword: str) -> BaseTag | None:
    number = tag_for_keyword(keyword)
    return None if number is None else _named(number)


@functools.lru_cache(maxsize=2**12)
def _named(tag: int) -> BaseTag:
    """The same object for each tag: comparing two objects is slow."""
    return BaseTag(tag)


class Plain(NamedTuple):
    """head: the wanted elements. pixels: offset of the element with the pixels, or the size of a file without."""

    head: Dataset
    syntax: UID
    pixels: int


class _NotPlain(Exception):
    """The header is left to pydicom."""


class _CutOff(_NotPlain):
    """The file ends within an element."""


def plain(file: BoundedFile, wanted: Container[int], pixels: Container[int]) -> Plain | None:
    """The wanted elements before the first one of ``pixels``, of a file with the magic of DICOM."""
    try:
        descriptor = file.fileno()
    except OSError:  # An unpacked file, in memory
        return None
    scan = _Scan(descriptor, file.size)
    try:
        syntax = scan.syntax()
        implicit = syntax == ImplicitVRLittleEndian
        raw = scan.elements(implicit, wanted, pixels)
    except (_NotPlain, struct.error):
        return None
    head = Head(raw)
    encoding: object = default_encoding
    if _CHARACTERS in raw:
        encoding = convert_encodings(convert_raw_data_element(raw[BaseTag(_CHARACTERS)]).value)
    head.set_original_encoding(implicit, True, encoding)
    return Plain(head, syntax, scan.place)


def is_cut_off(file: BoundedFile, pixels: Container[int]) -> bool:
    """Whether a file with the magic of DICOM ends within an element of its header, or right after the file meta
    group."""
    try:
        scan = _Scan(file.fileno(), file.size)
        scan.elements(scan.syntax() == ImplicitVRLittleEndian, (), pixels)
    except _CutOff:
        return True
    except (_NotPlain, struct.error, OSError):
        return False
    return scan.ends_early


class _Scan:
    """Steps over the elements of a file. place: offset of the next one. ends_early: as in ``is_cut_off``, once all
    elements were seen."""

    def __init__(self, descriptor: int, size: int):
        self._descriptor, self._size = descriptor, size
        self._data, self._start = os.pread(descriptor, BLOCK, 0), 0
        self._left = MOST
        self.place, self.ends_early = 132, False

    def syntax(self) -> UID:
        """The transfer syntax in the file meta group. Skips the group."""
        syntax = ""
        while (element := self._next(False, meta=True)) is not None and element[0] <= _META_END:
            tag, _, length, head = element
            if tag >> 16 != 2:
                raise _NotPlain
            if tag == _SYNTAX:
                syntax = self._value(head, length).rstrip(b"\0 ").decode("ascii", "replace")
            self._step(head + length)
        if element is None and not syntax:
            raise _CutOff
        uid = UID(syntax)
        if not syntax or uid in PrivateTransferSyntaxes or not uid.is_transfer_syntax or uid.is_deflated:
            raise _NotPlain
        if not uid.is_little_endian:
            raise _NotPlain
        return uid

    def elements(self, implicit: bool, wanted: Container[int], pixels: Container[int]) -> dict[BaseTag, RawDataElement]:
        raw: dict[BaseTag, RawDataElement] = {}
        before = -1
        while (element := self._next(implicit)) is not None and element[0] not in pixels:
            tag, representation, length, head = element
            if tag <= before:
                raise _NotPlain
            before = tag
            if tag in wanted or tag == _CHARACTERS:
                if length > LONGEST or representation in (b"SQ", b"UN") or (implicit and _representation(tag) == "SQ"):
                    raise _NotPlain
                name, value = _named(tag), self._value(head, length)
                word = None if implicit else representation.decode("ascii")
                raw[name] = RawDataElement(name, word, length, value, self.place + head, implicit, True, True)
            if length == _OPEN:
                self._step(head)
                self._sequence(implicit, 1)
            else:
                self._step(head + length)
        if element is None:
            self.ends_early = before < 0 or self.place > self._size
            self.place = self._size
        return raw

    def _next(self, implicit: bool, meta: bool = False) -> tuple[int, bytes, int, int] | None:
        """Tag, value representation, length, and number of bytes before the value of the next element; None at the end
        of the file. meta: whether the element may be the first one after the file meta group, of which only the tag is
        read, because its encoding is not yet known."""
        self._left -= 1
        if self._left < 0:
            raise _NotPlain
        at = self.place - self._start
        if at + 12 > len(self._data) and self._start + len(self._data) < self._size:
            self._data, self._start, at = os.pread(self._descriptor, BLOCK, self.place), self.place, 0
        if at + 8 > len(self._data):
            if self.place < self._size:
                raise _CutOff
            return None
        group, member, length = _TAG.unpack_from(self._data, at)
        tag = group << 16 | member
        if group == 0xFFFE or (meta and tag > _META_END):
            return tag, b"", length, 8
        representation = self._data[at + 4 : at + 6]
        if implicit:
            if representation in _SHORT or representation in _LONG:  # Perhaps the header is explicit after all
                raise _NotPlain
            return tag, b"", length, 8
        if representation in _SHORT:
            return tag, representation, _SHORT_LENGTH.unpack_from(self._data, at + 6)[0], 8
        if representation not in _LONG:
            raise _NotPlain
        return tag, representation, _LONG_HEAD.unpack_from(self._data, at + 8)[0], 12

    def _value(self, head: int, length: int) -> bytes:
        at = self.place + head - self._start
        value = self._data[at : at + length]
        if len(value) < length:
            value = os.pread(self._descriptor, length, self.place + head)
        if len(value) < length:
            raise _CutOff
        return value

    def _step(self, count: int) -> None:
        self.place += count

    def _sequence(self, implicit: bool, depth: int) -> None:
        """Step over the items and the end of a sequence without a length."""
        if depth > DEEPEST:
            raise _NotPlain
        while True:
            tag, _, length, head = self._next(implicit) or (0, b"", 0, 0)
            if tag not in (_ITEM, _SEQUENCE_END):
                raise _NotPlain
            self._step(head)
            if tag == _SEQUENCE_END:
                return
            if length != _OPEN:
                self._step(length)
                continue
            while (element := self._next(implicit)) is not None and element[0] != _ITEM_END:
                _, representation, length, head = element
                self._step(head)
                if length != _OPEN:
                    self._step(length)
                elif representation in (b"SQ", b""):
                    self._sequence(implicit, depth + 1)
                else:
                    raise _NotPlain
            if element is None:
                raise _CutOff
            self._step(8)
