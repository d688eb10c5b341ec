"""Remove samples from a shard set. Whatever interrupts it, the folder has a set that matches its hashes.

1. Shards that lose samples are rewritten beside the old ones (``shard-00003.next.tar``), changed documents as
   ``card.html.next``. The set is still the old one.
2. One rename replaces the manifest: it names the new shards and, under "next", their final names. The samples are now
   removed from the set.
3. ``settle`` renames the new files over the old ones, which deletes their bytes, and writes the final manifest.

An interrupted call is finished by ``settle`` or by the next call.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dex.common import atomic

from .dataset import SPLITS
from .shard_format import MANIFEST, check_manifest, manifest_bytes, read_bytes, read_index, read_manifest
from .shard_writer import json_line, tar_member

_NEXT = ".next"


class Change(NamedTuple):
    """A planned change, whose files are written beside the set."""

    switch: bytes
    """The manifest that makes it effective."""
    before: str
    """Fingerprint of the set before."""
    after: str
    """Fingerprint of the set afterwards."""


def lines(root: Path, manifest: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Shard entry and index line of every sample, in order."""
    for entry in manifest["shards"]:
        for line in read_index(root, entry):
            yield entry, line


def image(root: Path, entry: dict[str, Any], line: dict[str, Any]) -> bytes:
    """A sample's encoded image. ValueError: it differs from its hash."""
    data = read_bytes(root, entry["file"], line["offset"], line["size"])
    if hashlib.sha256(data).hexdigest() != line["sha256"]:
        raise ValueError(f"{entry['file']}: sample {line['id']!r}: sha256 of its bytes differs from the index")
    return data


def described(root: Path, entry: dict[str, Any], line: dict[str, Any]) -> bytes:
    """A sample's .json member, which follows its image. ValueError: there is none."""
    offset = line["offset"] + line["size"] + -line["size"] % tarfile.BLOCKSIZE
    try:
        header = tarfile.TarInfo.frombuf(read_bytes(root, entry["file"], offset, tarfile.BLOCKSIZE), "ascii", "strict")
        if header.name != f"{line['key']}.json" or not header.isreg():
            raise ValueError
        return read_bytes(root, entry["file"], offset + tarfile.BLOCKSIZE, header.size)
    except (tarfile.TarError, ValueError):
        raise ValueError(f"{entry['file']}: expected {line['key']}.json after its image, as written by dex") from None


def plan(root: Path, ids: frozenset[str], documents: Mapping[str, bytes], date: str) -> Change:
    """Write shards without the samples ``ids``, and new documents, beside the set, which does not change yet.

    documents: new contents of some of the set's documents, by name. date: of the withdrawal, for the manifest.
    ValueError: a shard is damaged, or no sample would be left; an error leaves no files behind.
    """
    manifest, raw = read_manifest(root)
    with contextlib.ExitStack() as undo:
        undo.callback(_sweep, root, manifest)
        shards = [_without(root, entry, ids) for entry in manifest["shards"]]
        samples = sum(entry["samples"] for entry in shards)
        if not samples:
            raise ValueError("ids: expected to keep at least one image, got all images of the set: delete its folder")
        before = hashlib.sha256(raw).hexdigest()
        withdrawal = {"date": date, "images": manifest["samples"] - samples, "before": before}
        final = {key: value for key, value in manifest.items() if key != "sha256"} | {
            "samples": samples,
            "modalities": _counts(root, manifest, ids),
            "shards": [_renamed(entry, old) for entry, old in zip(shards, manifest["shards"], strict=True)],
            "documents": [_document(root, entry, documents) for entry in manifest["documents"]],
            "withdrawals": [*manifest.get("withdrawals", ()), withdrawal],
        }
        intermediate = final | {
            "shards": shards,
            "documents": [entry for entry in manifest["documents"] if entry["file"] not in documents],
            "next": {"shards": final["shards"], "documents": final["documents"]},
        }
        atomic.sync_path(root)
        undo.pop_all()
    return Change(manifest_bytes(intermediate), before, hashlib.sha256(manifest_bytes(final)).hexdigest())


def carry_out(root: Path, change: Change) -> None:
    """Replace the set by the planned one."""
    _write_manifest(root, change.switch)
    settle(root)


def fingerprint(root: Path) -> str:
    """Fingerprint of the set, as in ``ShardDataset``."""
    return hashlib.sha256(read_manifest(root)[1]).hexdigest()


def settle(root: Path) -> bool:
    """Finish a change that was interrupted after the manifest was replaced, or remove the files of one that was
    interrupted before. Returns whether there was a change to finish."""
    manifest, _ = read_manifest(root)
    final = manifest.get("next")
    if final is None:
        _sweep(root, manifest)
        return False
    body = {key: value for key, value in manifest.items() if key not in ("sha256", "next")} | final
    check_manifest(body)
    for new, last in zip(manifest["shards"], body["shards"], strict=True):
        for name in ("file", "index"):
            if new[name] != last[name]:
                _place(root / new[name], root / last[name])
    for entry in body["documents"]:
        with contextlib.suppress(FileNotFoundError):  # Already renamed
            os.replace(_next_document(root, entry["file"]), root / entry["file"])
    atomic.sync_path(root)
    _write_manifest(root, manifest_bytes(body))
    _sweep(root, body)
    return True


def _without(root: Path, entry: dict[str, Any], ids: frozenset[str]) -> dict[str, Any]:
    """The entry of the shard without these samples; the shard is rewritten if it contains one of them."""
    samples = list(read_index(root, entry))
    kept = [line for line in samples if line["id"] not in ids]
    if len(kept) == len(samples):
        return entry
    tar, index = _next(entry["file"]), _next(entry["index"])
    digest, table = hashlib.sha256(), bytearray()
    with open(root / tar, "wb") as file:

        def write(data: bytes) -> None:
            digest.update(data)
            file.write(data)

        for line in kept:
            data, description = image(root, entry, line), described(root, entry, line)
            table += json_line({**line, "offset": file.tell() + tarfile.BLOCKSIZE})
            write(tar_member(f"{line['key']}.{line['kind']}", data))
            write(tar_member(f"{line['key']}.json", description))
        write(b"\0" * (2 * tarfile.BLOCKSIZE))
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
    shutil.copymode(root / entry["file"], root / tar)
    _write(root / index, bytes(table), root / entry["index"])
    return {
        "file": tar,
        "bytes": size,
        "sha256": digest.hexdigest(),
        "samples": len(kept),
        "index": index,
        "index_bytes": len(table),
        "index_sha256": hashlib.sha256(table).hexdigest(),
    }


def _counts(root: Path, manifest: dict[str, Any], ids: frozenset[str]) -> list[dict[str, Any]]:
    rows = {row["name"]: {**row} for row in manifest["modalities"]}
    for _, line in lines(root, manifest):
        if line["id"] in ids:
            rows[line["modality"]][line["split"]] -= 1
    for row in rows.values():
        row["empty"] = not any(row[split] for split in SPLITS)
    return list(rows.values())


def _document(root: Path, entry: dict[str, Any], documents: Mapping[str, bytes]) -> dict[str, Any]:
    data = documents.get(entry["file"])
    if data is None:
        return entry
    _write(_next_document(root, entry["file"]), data, root / entry["file"])
    return {"file": entry["file"], "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _next(file: str) -> str:
    """shard-00003.tar -> shard-00003.next.tar"""
    stem, dot, suffix = file.partition(".")
    return f"{stem}{_NEXT}{dot}{suffix}"


def _next_document(root: Path, file: str) -> Path:
    return root / f"{file}{_NEXT}"


def _renamed(entry: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    return {**entry, "file": old["file"], "index": old["index"]}


def _place(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source``, which keeps its name as long as the manifest uses it."""
    work = atomic.work_name(target)
    work.unlink(missing_ok=True)
    if target.exists() and target.samefile(source):  # A rename between two names of one file does nothing
        return
    try:
        os.link(source, work)
    except OSError:  # A file system without hard links
        shutil.copyfile(source, work)
        atomic.sync_path(work)
    os.replace(work, target)


def _sweep(root: Path, manifest: dict[str, Any]) -> None:
    """Remove the files of a change beside those of ``manifest``."""
    names = {entry[name] for entry in manifest["shards"] for name in ("file", "index")}
    leftovers: Iterable[Path] = [
        *(root / _next(name) for name in names),
        *(atomic.work_name(root / name) for name in names),
        *(_next_document(root, entry["file"]) for entry in manifest["documents"]),
    ]
    for path in leftovers:
        path.unlink(missing_ok=True)
    atomic.sync_path(root)


def _write(path: Path, data: bytes, old: Path) -> None:
    path.write_bytes(data)
    shutil.copymode(old, path)
    atomic.sync_path(path)


def _write_manifest(root: Path, data: bytes) -> None:
    mode = stat.S_IMODE(os.stat(root / MANIFEST).st_mode)
    atomic.write(root / MANIFEST, data, sync=True, mode=mode, locked=True)


def meta(root: Path, entry: dict[str, Any], line: dict[str, Any]) -> dict[str, Any]:
    """The description of a sample in its .json member."""
    return json.loads(described(root, entry, line))
