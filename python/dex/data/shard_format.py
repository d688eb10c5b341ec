"""The format of shard sets: WebDataset tars with an index, hashed throughout, without pickle.

A set is a folder:

    manifest.json             describes the set; names and hashes of all other files and of itself; past withdrawals
                              (``shard_rewrite``): date, number of images, fingerprint before
    shard-00000.tar           members <key>.jpg (or png, npy) and <key>.json, USTAR, for any WebDataset reader
    shard-00000.index.jsonl   one line per sample: id, key, kind, modality, split, group, offset, size, sha256 (of the
                              image's bytes, which start at ``offset`` in the tar); more keys are allowed

``group`` is what a split must not separate: a patient, a series, a slide.

This module has the names, limits and checks shared by reading (``shards``), writing (``shard_writer``) and verifying
(``shard_verify``). Files are untrusted: no link is followed, and nothing is read beyond a limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from . import images
from .dataset import SPLITS

MANIFEST = "manifest.json"
FORMAT = "dex-shards"
VERSION = 1
KINDS = ("jpg", "png", "npy")

DOCUMENT_NAME = re.compile(r"(?!.*\.\.)([A-Za-z0-9][A-Za-z0-9._-]{0,199}/)?[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
MAX_TABLE_BYTES = 64 * 2**20
MAX_LINE_BYTES = 2**16

_FILE_NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_HEX = re.compile(r"[0-9a-f]{64}")
_INDEX_FIELDS = {
    "id": str,
    "key": str,
    "kind": str,
    "modality": str,
    "split": str,
    "group": str,
    "offset": int,
    "size": int,
    "sha256": str,
}

_SHARD_FIELDS = {
    "file": str,
    "bytes": int,
    "sha256": str,
    "samples": int,
    "index": str,
    "index_bytes": int,
    "index_sha256": str,
}


def read_manifest(root: Path) -> tuple[dict[str, Any], bytes]:
    """The manifest and its bytes. ValueError: it is not exactly as written, or names files outside the folder."""
    with _naming(MANIFEST):
        raw = read_bytes(root, MANIFEST, 0, None)
        manifest = json.loads(raw)
        body = {key: value for key, value in manifest.items() if key != "sha256"}
        if manifest["format"] != FORMAT or manifest["version"] != VERSION:
            raise ValueError(
                f"expected {FORMAT} version {VERSION}, got {manifest['format']!r} version {manifest['version']!r}"
            )
        if manifest_bytes(body) != raw:
            raise ValueError("its sha256 does not match: it was edited or damaged")
        check_manifest(manifest)
    return manifest, raw


def check_manifest(manifest: dict[str, Any]) -> None:
    """ValueError, KeyError or TypeError unless all fields are present, files are in the folder and counts add up."""
    _check_fields(
        manifest,
        {"name": str, "image_size": int, "samples": int, "modalities": list, "shards": list, "documents": list},
    )
    for row in manifest["modalities"]:
        _check_fields(row, {"name": str, "train": int, "val": int, "empty": bool})
        if row["empty"] != (row["train"] + row["val"] == 0):
            raise ValueError(f"modality {row['name']!r}: 'empty' contradicts its counts")
    for entry in manifest["shards"]:
        _check_fields(entry, _SHARD_FIELDS)
        _check_names(_FILE_NAME, entry["file"], entry["index"])
    for entry in manifest["documents"]:
        _check_fields(entry, {"file": str, "bytes": int, "sha256": str})
        _check_names(DOCUMENT_NAME, entry["file"])
    for entry in manifest.get("withdrawals", ()):
        _check_fields(entry, {"date": str, "images": int, "before": str})
    if not manifest["shards"]:
        raise ValueError("shards: expected at least one, got none")
    if sum(entry["samples"] for entry in manifest["shards"]) != manifest["samples"]:
        raise ValueError("'samples' is not the sum over the shards")


def read_index(root: Path, entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Iterate over the lines of a shard's index; first its hash, then the fields and limits of each line are checked.

    ValueError, also during the iteration, names the file and the fault. Needs memory for the file and one line.
    """
    yield from parse_lines(read_table(root, entry), entry)


def read_table(root: Path, entry: dict[str, Any]) -> bytes:
    """The bytes of a shard's index. ValueError: size, hash or number of lines differ from the manifest."""
    with _naming(entry["index"]):
        raw = read_bytes(root, entry["index"], 0, None)
        if len(raw) != entry["index_bytes"] or hashlib.sha256(raw).hexdigest() != entry["index_sha256"]:
            raise ValueError("size or sha256 differs from the manifest")
        count = raw.count(b"\n") + (raw[-1:] not in (b"", b"\n"))
        if count != entry["samples"]:
            raise ValueError(f"expected {entry['samples']} lines, got {count}")
        return raw


def parse_lines(table: bytes, entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Iterate over the lines of ``table``, the index of shard ``entry``; errors as in ``read_index``."""
    with _naming(entry["index"]):
        for text in io.BytesIO(table):
            if len(text) > MAX_LINE_BYTES:
                raise ValueError(f"expected lines of at most {MAX_LINE_BYTES} bytes, got {len(text)}")
            line = json.loads(text)
            _check_fields(line, _INDEX_FIELDS)
            line["id"].encode()  # Fails for a lone surrogate
            if line["kind"] not in KINDS or line["split"] not in SPLITS or not _HEX.fullmatch(line["sha256"]):
                raise ValueError(f"sample {line['id']!r}: unknown kind, split or malformed sha256")
            if not _FILE_NAME.fullmatch(line["key"]):  # The name of a member
                raise ValueError(f"sample {line['id']!r}: expected a plain name as key, got {line['key']!r}")
            if (
                line["offset"] < 0
                or not 0 < line["size"] <= images.MAX_FILE_BYTES
                or (line["offset"] + line["size"] > entry["bytes"])
            ):
                raise ValueError(
                    f"sample {line['id']!r}: {line['size']} bytes at {line['offset']} are not within the "
                    f"{entry['bytes']} bytes of {entry['file']}"
                )
            yield line


@contextlib.contextmanager
def _naming(file: str) -> Iterator[None]:
    """Errors about the contents of ``file`` become a ValueError that names it."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise ValueError(f"{file}: {reason_of(error)}") from error


def _check_fields(record: dict, types: dict[str, type]) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {type(record).__name__}")
    for key, kind in types.items():
        if type(record.get(key)) is not kind or (kind is int and record[key] < 0):
            raise ValueError(f"{key}: expected {kind.__name__}, got {record.get(key)!r}")


def _check_names(pattern: re.Pattern, *names: str) -> None:
    for name in names:
        if not pattern.fullmatch(name) or name == MANIFEST:
            raise ValueError(f"file name: expected a plain name within the folder, got {name!r}")


def check_file_size(root: Path, file: str, size: int) -> None:
    """ValueError unless ``file`` is a regular file of ``size`` bytes."""
    try:
        status = os.lstat(root / file)
    except OSError as error:
        raise ValueError(f"{file}: {reason_of(error)}") from error
    if not stat.S_ISREG(status.st_mode) or status.st_size != size:
        raise ValueError(f"{file}: expected a regular file of {size} bytes, got {status.st_size}")


def read_bytes(root: Path, file: str, offset: int, size: int | None) -> bytes:
    """``size`` bytes at ``offset``, or a whole table; never through a symbolic link."""
    descriptor, file_size = _open(root, file)
    try:
        if size is None:
            size = file_size
            if size > MAX_TABLE_BYTES:
                raise ValueError(f"expected at most {MAX_TABLE_BYTES} bytes, got {size}")
        elif offset + size > file_size:
            raise ValueError(f"{size} bytes at {offset} are not within its {file_size} bytes")
        parts, end = [], offset + size
        while offset < end:
            part = os.pread(descriptor, end - offset, offset)
            if not part:
                raise ValueError("the file ended early")
            parts.append(part)
            offset += len(part)
        return b"".join(parts)
    finally:
        os.close(descriptor)


def open_file(root: Path, file: str) -> IO[bytes]:
    """Open the regular file ``name`` or ``folder/name`` below ``root`` for reading; neither may be a link."""
    descriptor, _ = _open(root, file)
    return os.fdopen(descriptor, "rb")


def _open(root: Path, file: str) -> tuple[int, int]:
    """Descriptor and size of the file, see ``open_file``."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    folder, _, name = file.rpartition("/")
    parent = os.open(root / folder, flags | os.O_DIRECTORY) if folder else None
    try:
        descriptor = os.open(root / name if parent is None else name, flags, dir_fd=parent)
    finally:
        if parent is not None:
            os.close(parent)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ValueError("expected a regular file")
    return descriptor, status.st_size


def manifest_bytes(body: dict[str, Any]) -> bytes:
    """Contents of the manifest file. Its hash covers all other fields, and ``read_manifest`` also compares the layout,
    so that any changed byte is noticed."""
    digest = hashlib.sha256(json.dumps(body, separators=(",", ":")).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1).encode() + b"\n"


def reason_of(error: BaseException) -> str:
    """The message of an error, without the path in an OSError."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"field {error}" if isinstance(error, KeyError) else str(error)
