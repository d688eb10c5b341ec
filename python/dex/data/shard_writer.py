"""Write a shard set atomically: its files get their final names at the end, all or none."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dex.common import atomic

from . import images
from .dataset import IMAGE_SIZE, SPLITS
from .shard_format import (
    DOCUMENT_NAME,
    FORMAT,
    KINDS,
    MANIFEST,
    MAX_LINE_BYTES,
    MAX_TABLE_BYTES,
    VERSION,
    manifest_bytes,
)


class ShardWriter:
    """Write a shard set to the folder ``root``; the set exists once ``close()`` has renamed its manifest into place.

    name: of the set. modalities: all names in order; those without a sample are recorded as empty. samples_per_shard:
    largest number of samples in a shard. withdrawals: from an earlier set of the same images, for the manifest
    (``shard_rewrite``).

    Until ``close()`` every file has the suffix ".partial"; an error in the ``with`` block or in ``close()`` removes
    them. The same calls give the same bytes: no time, user or machine is stored.
    ValueError: the folder already has a manifest.

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
        withdrawals: Iterable[dict[str, Any]] = (),
    ):
        self.root: Path = Path(root)
        self.name: str = name
        self.modalities: tuple[str, ...] = tuple(modalities)
        self.image_size: int = image_size
        self.samples_per_shard = samples_per_shard
        self._withdrawals = list(withdrawals)
        if len(set(self.modalities)) != len(self.modalities) or not self.modalities:
            raise ValueError(f"modalities: expected one or more different names, got {self.modalities}")
        self.root.mkdir(parents=True, exist_ok=True)
        if (self.root / MANIFEST).exists():
            raise ValueError(f"root: expected a folder without {MANIFEST}, got {str(root)!r}")
        for leftover in self.root.glob(f"*{atomic.PARTIAL}"):  # Left by a killed writer
            leftover.unlink()
        self._counts = {modality: dict.fromkeys(SPLITS, 0) for modality in self.modalities}
        self._ids: set[str] = set()
        self._shards: list[dict] = []
        self._documents: list[dict] = []
        self._begun: list[str] = [MANIFEST]  # All names that discard() may have to remove, the manifest first
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
        meta: dict[str, Any] | None = None,
        checked: bool = False,
    ) -> None:
        """Append an encoded image of image_size x image_size; ``meta`` (JSON) goes into the sample's .json member.

        checked: the caller has just encoded ``data`` itself, so it is not decoded to check it.
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
        full = len(self._lines) == self.samples_per_shard or self._table_bytes > MAX_TABLE_BYTES - MAX_LINE_BYTES
        if self._tar is not None and full:
            self._finish_shard()
        key = f"{len(self._ids):08d}"
        common = {"id": sample_id, "modality": modality, "split": split, "group": group}
        described = json_line({**common, **(meta or {})})
        line = json_line(
            {
                **common,
                "key": key,
                "kind": kind,
                "offset": (0 if self._tar is None else self._tar.tell()) + tarfile.BLOCKSIZE,
                "size": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        )
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(
                f"sample_id, group: expected an index line of at most {MAX_LINE_BYTES} bytes, got {len(line)}"
            )
        if self._tar is None:
            names = [f"shard-{len(self._shards):05d}.tar", f"shard-{len(self._shards):05d}.index.jsonl"]
            self._begun += names
            self._tar = open(self._partial(names[0]), "wb")
        self._write(tar_member(f"{key}.{kind}", data))
        self._write(tar_member(f"{key}.json", described))
        self._lines.append(line)
        self._table_bytes += len(line)
        self._ids.add(sample_id)
        self._counts[modality][split] += 1

    def add_document(self, file: str, data: bytes) -> None:
        """Add a card, a table or a licence (``folder/name`` or ``name``) beside the shards, hashed like them."""
        if not DOCUMENT_NAME.fullmatch(file):
            raise ValueError(f"file: expected a plain name, or one in one folder, got {file!r}")
        (self.root / file).parent.mkdir(exist_ok=True)
        self._begun.append(file)
        self._write_partial(file, data)
        self._documents.append({"file": file, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})

    def close(self) -> None:
        """Finish the last shard and rename all files into place, the manifest last."""
        if self._closed:
            return
        try:
            if not self._ids:
                raise ValueError("shard set: expected at least one sample, got none")
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
            } | ({"withdrawals": self._withdrawals} if self._withdrawals else {})
            for file in self._files():
                os.replace(self._partial(file), self.root / file)
            atomic.sync_path(self.root)
            atomic.write(self.root / MANIFEST, manifest_bytes(body), sync=True, locked=True)
            self._closed = True
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Remove everything written so far; the writer cannot be used afterwards."""
        if self._closed:
            return
        self._closed = True
        if self._tar is not None:
            self._tar.close()
        for file in self._begun:
            self._partial(file).unlink(missing_ok=True)
            (self.root / file).unlink(missing_ok=True)  # Ours, since the folder had no manifest
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
        return atomic.work_name(self.root / file)

    def _write_partial(self, file: str, data: bytes) -> None:
        self._partial(file).write_bytes(data)
        atomic.sync_path(self._partial(file))

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
        self._write_partial(index, table)
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


def tar_member(name: str, data: bytes) -> bytes:
    """A member of a tar: header, bytes, padding."""
    info = tarfile.TarInfo(name)  # Defaults: mode 0644, uid, gid and mtime 0, no user name
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + b"\0" * (-len(data) % tarfile.BLOCKSIZE)


def json_line(record: dict[str, Any]) -> bytes:
    """``record`` as a line of canonical JSON."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"
