"""Shard sets: WebDataset tars with an own index, hashed throughout, read and written without pickle.

A set is a folder:

    manifest.json             what the set is; names and hashes every other file, and itself
    shard-00000.tar           members <key>.jpg (or png, npy) and <key>.json, USTAR: any WebDataset reader takes them
    shard-00000.index.jsonl   one line a sample: id, key, kind, modality, split, group, offset, size, sha256 (of the
                              image's bytes, which lie at `offset` in the tar); more keys may stand there

`group` names what must not be torn apart by a split: a patient, a series, a slide.
Reading goes by the index alone: tar headers are for others. Opening a set checks the manifest against itself, every
index against its hash and every offset against the shard's size; each image is checked against its hash when it is
read; `verify` reads everything.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from . import images
from .dataset import IMAGE_SIZE, SPLITS, Dataset, SampleError

MANIFEST = "manifest.json"
FORMAT = "dex-shards"
VERSION = 1
KINDS = ("jpg", "png", "npy")

_FILE_NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_DOCUMENT_NAME = re.compile(r"(?!.*\.\.)([A-Za-z0-9][A-Za-z0-9._-]{0,199}/)?[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_HEX = re.compile(r"[0-9a-f]{64}")
_MAX_TABLE_BYTES = 64 * 2**20
_MAX_LINE_BYTES = 2**16
_PARTIAL = ".partial"
_ROW = np.dtype(
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


class ShardDataset(Dataset):
    """A shard set, opened for reading; see `open_dataset`.

    ValueError names the file and what is wrong with it when manifest, indices and shards do not fit each other.
    Kept per sample: 62 bytes and its id, in two buffers that the workers of a loader share. Indices are parsed line by
    line, so that opening needs little more.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root).resolve(strict=True)
        manifest, raw = read_manifest(self.root)
        self.manifest = manifest
        self.name = manifest["name"]
        self.image_size = manifest["image_size"]
        self.fingerprint = hashlib.sha256(raw).hexdigest()
        rows = manifest["modalities"]
        self.modalities = tuple(row["name"] for row in rows if not row["empty"])
        self.empty_modalities = tuple(row["name"] for row in rows if row["empty"])

        number = {name: index for index, name in enumerate(self.modalities)}
        parts = []
        ids = bytearray()
        for shard_number, entry in enumerate(manifest["shards"]):
            _check_file_size(self.root, entry["file"], entry["bytes"])
            part = []
            for line in read_index(self.root, entry):
                if line["modality"] not in number:
                    raise ValueError(f"{entry['index']}: modality {line['modality']!r} is not in the manifest")
                ids += line["id"].encode()
                part.append(
                    (
                        bytes.fromhex(line["sha256"]),
                        line["offset"],
                        len(ids),
                        shard_number,
                        line["size"],
                        number[line["modality"]],
                        KINDS.index(line["kind"]),
                        line["split"] == "val",
                    )
                )
            parts.append(np.array(part, _ROW))
        self._rows = np.concatenate(parts)
        parts.clear()
        self._ids = bytes(ids)
        for row in rows:
            for split in SPLITS:
                mine = self._rows["modality"] == number.get(row["name"], -1)
                here = int((mine & (self._rows["val"] == (split == "val"))).sum())
                if here != row[split]:
                    raise ValueError(
                        f"{MANIFEST}: {row[split]} {split} samples of {row['name']!r} declared, the indices hold {here}"
                    )

    def __len__(self) -> int:
        return len(self._rows)

    def sample_id(self, index: int) -> str:
        index = self._check_index(index)
        start = int(self._rows["id_end"][index - 1]) if index else 0
        return self._ids[start : int(self._rows["id_end"][index])].decode()

    def modality_index(self) -> np.ndarray:
        return self._rows["modality"].astype(np.int64)

    def _in_split(self, name: str) -> np.ndarray:
        return self._rows["val"] == (name == "val")

    def image_bytes(self, index: int) -> bytes:
        """The encoded image of sample `index`, checked against its hash; SampleError when it is not what it was."""
        row = self._rows[self._check_index(index)]
        entry = self.manifest["shards"][int(row["shard"])]
        try:
            data = _read(self.root, entry["file"], int(row["offset"]), int(row["size"]))
        except (OSError, ValueError) as error:
            raise SampleError(self.sample_id(index), f"{entry['file']}: {_reason(error)}") from error
        if hashlib.sha256(data).digest() != row["sha256"].tobytes():
            raise SampleError(self.sample_id(index), f"{entry['file']}: sha256 of its bytes differs from the index")
        return data

    def read(self, index: int, out: np.ndarray) -> tuple[int, str]:
        data = self.image_bytes(index)
        sample_id, row = self.sample_id(index), self._rows[index]
        try:
            image, maximum = images.decode_with_maximum(data, KINDS[int(row["kind"])])
            if image.size != (self.image_size, self.image_size):
                raise ValueError(
                    f"size: expected {self.image_size} x {self.image_size}, got {image.width} x {image.height}"
                )
        except ValueError as error:
            raise SampleError(sample_id, str(error)) from error
        self.note_maximum(sample_id, maximum)
        images.to_planes(image, out)
        return int(row["modality"]), sample_id


def verify(path: str | Path | None = None) -> list[str]:
    """Read every byte of a shard set (None: the embedded one) and say, one line each, what is not as it was written.

    An empty list: manifest, indices, shards and documents have their sizes and hashes, every index line points at the
    image it describes, and the tars hold nothing but those samples. FileNotFoundError when there is no manifest.
    """
    from .dataset import EMBEDDED

    root = Path(EMBEDDED if path is None else path)
    if not (root / MANIFEST).exists():
        raise FileNotFoundError(f"path: expected a folder with {MANIFEST}, got {str(root)!r}")
    root = root.resolve()
    try:
        manifest, _ = read_manifest(root)
    except ValueError as error:
        return [str(error)]
    problems = []
    seen: set[str] = set()
    for document in manifest["documents"]:
        problems += _verify_file(root, document["file"], document["bytes"], document["sha256"])
    for entry in manifest["shards"]:
        found = _verify_file(root, entry["file"], entry["bytes"], entry["sha256"])
        try:
            lines = list(read_index(root, entry))
            if not found:
                found = _verify_members(root, entry, lines)
            for line in lines:
                if line["id"] in seen:
                    found.append(f"{entry['index']}: id {line['id']!r} occurs twice")
                seen.add(line["id"])
        except ValueError as error:
            found.append(str(error))
        problems += found
    if not problems:
        try:
            ShardDataset(root)
        except ValueError as error:
            problems.append(str(error))
    return problems


class ShardWriter:
    """Write a shard set to the folder `root`; the set exists only once `close()` has renamed its manifest into place.

    name: of the set; modalities: all names it knows of, in order; those that stay without a sample are written down as
    empty. samples_per_shard: a new shard is begun after so many.

    Until `close()` every file has the suffix ".partial"; an error inside the `with` block, or in `close()`, removes
    what was written. The same calls give the same bytes: nothing of the time, the user or the machine is stored.
    ValueError when the folder already holds a manifest.

        with ShardWriter(folder, name="mine", modalities=("CT", "MR")) as writer:
            writer.add("patient-3/slice-12", jpeg, kind="jpg", modality="CT", split="train", group="patient-3")
    """

    def __init__(
        self,
        root: str | Path,
        *,
        name: str,
        modalities: Iterable[str],
        image_size: int = IMAGE_SIZE,
        samples_per_shard: int = 10_000,
    ):
        self.root = Path(root)
        self.name, self.modalities, self.image_size = name, tuple(modalities), image_size
        self.samples_per_shard = samples_per_shard
        if len(set(self.modalities)) != len(self.modalities) or not self.modalities:
            raise ValueError(f"modalities: expected one or more different names, got {self.modalities}")
        self.root.mkdir(parents=True, exist_ok=True)
        if (self.root / MANIFEST).exists():
            raise ValueError(f"root: expected a folder without {MANIFEST}, got {str(root)!r}")
        for leftover in self.root.glob(f"*{_PARTIAL}"):  # of a writer that was killed
            leftover.unlink()
        self._counts = {modality: dict.fromkeys(SPLITS, 0) for modality in self.modalities}
        self._ids: set[str] = set()
        self._shards: list[dict] = []
        self._documents: list[dict] = []
        self._begun: list[str] = [MANIFEST]  # every name that discard() may have to remove, the manifest first
        self._tar = None
        self._tar_digest = hashlib.sha256()
        self._lines: list[bytes] = []
        self._table_bytes = 0
        self._closed = False

    def add(
        self,
        sample_id: str,
        data: bytes,
        *,
        kind: str,
        modality: str,
        split: str,
        group: str,
        meta: dict | None = None,
        checked: bool = False,
    ) -> None:
        """Append one encoded image of image_size x image_size; `meta` (JSON) goes into the sample's .json member.

        checked: the caller has just encoded `data` as such an image itself, so it is not decoded again.
        """
        if sample_id in self._ids or not sample_id:
            raise ValueError(f"sample_id: expected a new, non-empty id, got {sample_id!r}")
        if modality not in self._counts:
            raise ValueError(f"modality: expected one of {self.modalities}, got {modality!r}")
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        if not checked:
            image = images.decode(data, kind)
            if image.size != (self.image_size, self.image_size):
                raise ValueError(
                    f"data: expected an image of {self.image_size} x {self.image_size}, "
                    f"got {image.width} x {image.height}"
                )
        full = len(self._lines) == self.samples_per_shard or self._table_bytes > _MAX_TABLE_BYTES - _MAX_LINE_BYTES
        if self._tar is not None and full:
            self._finish_shard()
        key = f"{len(self._ids):08d}"
        common = {"id": sample_id, "modality": modality, "split": split, "group": group}
        described = _json_line({**common, **(meta or {})})
        line = _json_line(
            {
                **common,
                "key": key,
                "kind": kind,
                "offset": (0 if self._tar is None else self._tar.tell()) + tarfile.BLOCKSIZE,
                "size": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        )
        if len(line) > _MAX_LINE_BYTES:
            raise ValueError(
                f"sample_id, group: expected an index line of at most {_MAX_LINE_BYTES} bytes, got {len(line)}"
            )
        if self._tar is None:
            names = [f"shard-{len(self._shards):05d}.tar", f"shard-{len(self._shards):05d}.index.jsonl"]
            self._begun += names
            self._tar = open(self._partial(names[0]), "wb")
        self._member(f"{key}.{kind}", data)
        self._member(f"{key}.json", described)
        self._lines.append(line)
        self._table_bytes += len(line)
        self._ids.add(sample_id)
        self._counts[modality][split] += 1

    def add_document(self, file: str, data: bytes) -> None:
        """Put a card, a table or a licence (`folder/name` or `name`) beside the shards, hashed like them."""
        if not _DOCUMENT_NAME.fullmatch(file):
            raise ValueError(f"file: expected a plain name, or one in one folder, got {file!r}")
        (self.root / file).parent.mkdir(exist_ok=True)
        self._begun.append(file)
        _write_synced(self._partial(file), data)
        self._documents.append({"file": file, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})

    def close(self) -> None:
        """Finish the last shard, move all files into place, the manifest last."""
        if self._closed:
            return
        try:
            if not self._ids:
                raise ValueError("a shard set needs at least one sample, none was added")
            self._finish_shard()
            body = {
                "format": FORMAT,
                "version": VERSION,
                "name": self.name,
                "image_size": self.image_size,
                "samples": len(self._ids),
                "modalities": [
                    {"name": name, **counts, "empty": not any(counts.values())} for name, counts in self._counts.items()
                ],
                "shards": self._shards,
                "documents": sorted(self._documents, key=lambda entry: entry["file"]),
            }
            _write_synced(self._partial(MANIFEST), _manifest_bytes(body))
            for file in self._files():
                os.replace(self._partial(file), self.root / file)
            _sync_folder(self.root)
            os.replace(self._partial(MANIFEST), self.root / MANIFEST)
            _sync_folder(self.root)
            self._closed = True
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Remove everything written so far; the writer is of no use afterwards."""
        if self._closed:
            return
        self._closed = True
        if self._tar is not None:
            self._tar.close()
        for file in self._begun:
            self._partial(file).unlink(missing_ok=True)
            (self.root / file).unlink(missing_ok=True)  # there was no manifest: files of this name are ours
            if "/" in file and not any((self.root / file).parent.iterdir()):
                (self.root / file).parent.rmdir()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.close() if kind is None else self.discard()

    def _files(self) -> list[str]:
        return [name for entry in self._shards for name in (entry["file"], entry["index"])] + [
            entry["file"] for entry in self._documents
        ]

    def _partial(self, file: str) -> Path:
        return self.root / f"{file}{_PARTIAL}"

    def _member(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)  # its defaults: mode 0644, uid, gid and mtime 0, no user name
        info.size = len(data)
        self._write(info.tobuf(tarfile.USTAR_FORMAT) + data + b"\0" * (-len(data) % tarfile.BLOCKSIZE))

    def _write(self, data: bytes) -> None:
        self._tar.write(data)
        self._tar_digest.update(data)

    def _finish_shard(self) -> None:
        file = f"shard-{len(self._shards):05d}.tar"
        index = f"shard-{len(self._shards):05d}.index.jsonl"
        self._write(b"\0" * (2 * tarfile.BLOCKSIZE))
        size = self._tar.tell()
        self._tar.flush()
        os.fsync(self._tar.fileno())
        self._tar.close()
        self._tar = None
        digest, self._tar_digest = self._tar_digest.hexdigest(), hashlib.sha256()
        table = b"".join(self._lines)
        _write_synced(self._partial(index), table)
        self._shards.append(
            {
                "file": file,
                "bytes": size,
                "sha256": digest,
                "samples": len(self._lines),
                "index": index,
                "index_bytes": len(table),
                "index_sha256": hashlib.sha256(table).hexdigest(),
            }
        )
        self._lines, self._table_bytes = [], 0


def read_manifest(root: Path) -> tuple[dict, bytes]:
    """The manifest and its bytes; ValueError when it is not exactly what a writer wrote, or names files elsewhere."""
    try:
        raw = _read(root, MANIFEST, 0, None)
        manifest = json.loads(raw)
        body = {key: value for key, value in manifest.items() if key != "sha256"}
        if manifest["format"] != FORMAT or manifest["version"] != VERSION:
            raise ValueError(
                f"expected {FORMAT} version {VERSION}, got {manifest['format']!r} version {manifest['version']!r}"
            )
        if _manifest_bytes(body) != raw:
            raise ValueError("its own sha256 does not fit: it was edited or damaged")
        _check_fields(
            manifest,
            {"name": str, "image_size": int, "samples": int, "modalities": list, "shards": list, "documents": list},
        )
        for row in manifest["modalities"]:
            _check_fields(row, {"name": str, "train": int, "val": int, "empty": bool})
            if row["empty"] != (row["train"] + row["val"] == 0):
                raise ValueError(f"modality {row['name']!r}: 'empty' contradicts its counts")
        for entry in manifest["shards"]:
            _check_fields(
                entry,
                {
                    "file": str,
                    "bytes": int,
                    "sha256": str,
                    "samples": int,
                    "index": str,
                    "index_bytes": int,
                    "index_sha256": str,
                },
            )
            _check_names(_FILE_NAME, entry["file"], entry["index"])
        for entry in manifest["documents"]:
            _check_fields(entry, {"file": str, "bytes": int, "sha256": str})
            _check_names(_DOCUMENT_NAME, entry["file"])
        if not manifest["shards"]:
            raise ValueError("shards: expected at least one, got none")
        if sum(entry["samples"] for entry in manifest["shards"]) != manifest["samples"]:
            raise ValueError("'samples' is not the sum over the shards")
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise ValueError(f"{MANIFEST}: {_reason(error)}") from error
    return manifest, raw


def read_index(root: Path, entry: dict) -> Iterator[dict]:
    """The lines of one shard's index, one after the other, fields and bounds checked, once its hash has been.

    ValueError, on the way too, names the file and the fault. Memory: the file and one line.
    """
    try:
        raw = _read(root, entry["index"], 0, None)
        if len(raw) != entry["index_bytes"] or hashlib.sha256(raw).hexdigest() != entry["index_sha256"]:
            raise ValueError("size or sha256 differs from the manifest")
        count = raw.count(b"\n") + (raw[-1:] not in (b"", b"\n"))
        if count != entry["samples"]:
            raise ValueError(f"expected {entry['samples']} lines, got {count}")
        for text in io.BytesIO(raw):
            if len(text) > _MAX_LINE_BYTES:
                raise ValueError(f"expected lines of at most {_MAX_LINE_BYTES} bytes, got {len(text)}")
            line = json.loads(text)
            _check_fields(line, _INDEX_FIELDS)
            line["id"].encode()  # a lone surrogate is no text
            if line["kind"] not in KINDS or line["split"] not in SPLITS or not _HEX.fullmatch(line["sha256"]):
                raise ValueError(f"sample {line['id']!r}: unknown kind, split or malformed sha256")
            if not _FILE_NAME.fullmatch(line["key"]):  # the name of a member
                raise ValueError(f"sample {line['id']!r}: expected a plain name as key, got {line['key']!r}")
            if (
                line["offset"] < 0
                or not 0 < line["size"] <= images.MAX_FILE_BYTES
                or (line["offset"] + line["size"] > entry["bytes"])
            ):
                raise ValueError(
                    f"sample {line['id']!r}: {line['size']} bytes at {line['offset']} do not lie within "
                    f"the {entry['bytes']} bytes of {entry['file']}"
                )
            yield line
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise ValueError(f"{entry['index']}: {_reason(error)}") from error


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


def _check_file_size(root: Path, file: str, size: int) -> None:
    try:
        status = os.lstat(root / file)
    except OSError as error:
        raise ValueError(f"{file}: {_reason(error)}") from error
    if not stat.S_ISREG(status.st_mode) or status.st_size != size:
        raise ValueError(f"{file}: expected a regular file of {size} bytes, got {status.st_size}")


def _read(root: Path, file: str, offset: int, size: int | None) -> bytes:
    """`size` bytes at `offset`, or the whole of a table; never through a symbolic link."""
    descriptor, here = _open(root, file)
    try:
        if size is None:
            size = here
            if size > _MAX_TABLE_BYTES:
                raise ValueError(f"expected at most {_MAX_TABLE_BYTES} bytes, got {size}")
        elif offset + size > here:
            raise ValueError(f"{size} bytes at {offset} do not lie within its {here} bytes")
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


def _open(root: Path, file: str) -> tuple[int, int]:
    """Descriptor and size of the regular file `name` or `folder/name` below `root`, neither of them a link."""
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


def _hash_file(root: Path, file: str) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with os.fdopen(_open(root, file)[0], "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def _verify_file(root: Path, file: str, size: int, digest: str) -> list[str]:
    try:
        here_size, here_digest = _hash_file(root, file)
    except (OSError, ValueError) as error:
        return [f"{file}: {_reason(error)}"]
    if here_size != size:
        return [f"{file}: expected {size} bytes, got {here_size}"]
    return [] if here_digest == digest else [f"{file}: sha256 differs from the manifest"]


def _verify_members(root: Path, entry: dict, lines: list[dict]) -> list[str]:
    problems: list[str] = []
    members: dict[str, tarfile.TarInfo] = {}
    expected = {f"{line['key']}.{line['kind']}": line for line in lines}
    try:
        with os.fdopen(_open(root, entry["file"])[0], "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                # whoever unpacks the tar would take every one of them
                if member.name in members or not member.isreg():
                    problems.append(f"{entry['file']}: member {member.name!r} occurs twice or is no regular file")
                members[member.name] = member
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        return [f"{entry['file']}: {_reason(error)}"]
    allowed = set(expected) | {f"{line['key']}.json" for line in lines}
    for name in sorted(set(members) ^ allowed):
        problems.append(f"{entry['file']}: member {name!r} is {'missing' if name in allowed else 'not in the index'}")
    for name, line in expected.items():
        member = members.get(name)
        if member and (member.offset_data, member.size) != (line["offset"], line["size"]):
            problems.append(f"{entry['file']}: member {name!r} is not where the index says")
        data = _read(root, entry["file"], line["offset"], line["size"])
        if hashlib.sha256(data).hexdigest() != line["sha256"]:
            problems.append(f"{entry['file']}: sample {line['id']!r}: sha256 of its bytes differs from the index")
    return problems


def _json_line(record: dict) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _manifest_bytes(body: dict) -> bytes:
    # the hash covers every other field; the exact layout is compared too, so no byte of the file can change unseen
    digest = hashlib.sha256(json.dumps(body, separators=(",", ":")).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1).encode() + b"\n"


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"field {error}" if isinstance(error, KeyError) else str(error)
