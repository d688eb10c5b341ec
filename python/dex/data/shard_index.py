"""The index of a shard as arrays.

A corpus has millions of lines. Those that ``ShardWriter`` writes for plain names are read by one pattern for the whole
index; an index with any other line is read line by line, with the checks and errors of ``shard_format``.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import images
from .dataset import SPLITS
from .shard_format import KINDS, parse_lines, read_table

ROW: np.dtype[np.void] = np.dtype(
    [
        ("sha256", "V32"),
        ("offset", np.int64),
        ("id_end", np.int64),
        ("shard", np.int32),
        ("size", np.int32),
        ("modality", np.int32),
        ("kind", np.int8),
        ("val", np.bool_),
    ]
)

_TEXT = rb"[ !#-\[\]-~]{0,8192}+"  # Printable ASCII without escapes; a line stays within MAX_LINE_BYTES
_LINES = re.compile(
    rb'(?:\{"group":"%(text)s","id":"%(text)s","key":"(?![^"]*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{0,199}",'
    rb'"kind":"(?:%(kinds)s)","modality":"%(text)s","offset":(?:0|[1-9][0-9]{0,17}),"sha256":"[0-9a-f]{64}",'
    rb'"size":[1-9][0-9]{0,8},"split":"(?:%(splits)s)"\}\n)*+'
    % {b"text": _TEXT, b"kinds": "|".join(KINDS).encode(), b"splits": "|".join(SPLITS).encode()}
)
_QUOTES = 32
"""Of such a line. Between them are, counted from 0: 7 the id, 15 kind, 19 modality, 22 offset, 25 sha256, 28 size and
31 split."""


class Rows(NamedTuple):
    """The samples of one shard."""

    rows: np.ndarray
    """``ROW [samples]``; ``shard`` is 0, and ``id_end`` is where the sample's id ends in ``ids``."""
    ids: bytes
    """All ids, joined."""


def read_rows(root: Path, entry: dict[str, Any], modalities: dict[str, int]) -> Rows:
    """The index of shard ``entry`` of the manifest; ``modalities`` numbers the names.

    ValueError names the file and the fault, as in ``shard_format.read_index``, also for a modality without a number.
    """
    table = read_table(root, entry)
    return _by_pattern(table, entry, modalities) or _by_line(table, entry, modalities)


def _by_pattern(table: bytes, entry: dict[str, Any], modalities: dict[str, int]) -> Rows | None:
    """None unless every line matches the pattern and is within its limits."""
    if not table or not _LINES.fullmatch(table):
        return None
    parts = table.split(b'"')  # Not groups of matches: millions of tuples would keep the garbage collector busy
    ids, kinds, names, hashes, splits = (parts[i::_QUOTES] for i in (7, 15, 19, 25, 31))
    offset, size = (np.array([int(text[1:-1]) for text in parts[i::_QUOTES]]) for i in (22, 28))
    numbers = {name.encode(): number for name, number in modalities.items()}
    if not numbers.keys() >= set(names):
        return None
    count = len(ids)
    rows = np.zeros(count, ROW)
    rows["sha256"] = np.frombuffer(bytes.fromhex(b"".join(hashes).decode()), "V32")
    if size.max() > images.MAX_FILE_BYTES or (offset + size).max() > entry["bytes"]:
        return None
    rows["offset"], rows["size"] = offset, size
    rows["id_end"] = np.fromiter(itertools.accumulate(map(len, ids)), np.int64, count)
    rows["modality"] = np.fromiter(map(numbers.__getitem__, names), np.int32, count)
    kind_numbers = {kind.encode(): number for number, kind in enumerate(KINDS)}
    rows["kind"] = np.fromiter(map(kind_numbers.__getitem__, kinds), np.int8, count)
    rows["val"] = np.fromiter(map(b"val".__eq__, splits), np.bool_, count)
    return Rows(rows, b"".join(ids))


def _by_line(table: bytes, entry: dict[str, Any], modalities: dict[str, int]) -> Rows:
    parts, ids = [], bytearray()
    for line in parse_lines(table, entry):
        if line["modality"] not in modalities:
            raise ValueError(f"{entry['index']}: modality {line['modality']!r} is not in the manifest")
        ids += line["id"].encode()
        parts.append(
            (
                bytes.fromhex(line["sha256"]),
                line["offset"],
                len(ids),
                0,
                line["size"],
                modalities[line["modality"]],
                KINDS.index(line["kind"]),
                line["split"] == "val",
            )
        )
    return Rows(np.array(parts, ROW), bytes(ids))
