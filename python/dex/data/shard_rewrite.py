"""Take samples out of a shard set: whatever stops it, the folder holds a set that fits its hashes.

1. Shards that lose samples are written anew beside the old ones (`shard-00003.next.tar`), changed documents as
   `card.html.next`. The set is the old one.
2. One rename of the manifest: it names the new shards and, under "next", the files that they are to become. The samples
   are out of the set.
3. `settle` gives the new files the names of the old ones, whose bytes are gone with that, and the manifest its last
   form.

A call that was cut short is finished by `settle`, or by the next one.
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
    """What `plan` has written beside the set. before, after: the set's fingerprints."""

    switch: bytes
    before: str
    after: str


def lines(root: Path, manifest: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The shard's entry and the index line of every sample, in order."""
    for entry in manifest["shards"]:
        for line in read_index(root, entry):
            yield entry, line


def image(root: Path, entry: dict[str, Any], line: dict[str, Any]) -> bytes:
    """A sample's encoded image. ValueError when it is not what was written."""
    data = read_bytes(root, entry["file"], line["offset"], line["size"])
    if hashlib.sha256(data).hexdigest() != line["sha256"]:
        raise ValueError(f"{entry['file']}: sample {line['id']!r}: sha256 of its bytes differs from the index")
    return data


def described(root: Path, entry: dict[str, Any], line: dict[str, Any]) -> bytes:
    """A sample's .json member, which follows its image. ValueError where it does not."""
    place = line["offset"] + line["size"] + -line["size"] % tarfile.BLOCKSIZE
    try:
        head = tarfile.TarInfo.frombuf(read_bytes(root, entry["file"], place, tarfile.BLOCKSIZE), "ascii", "strict")
        if head.name != f"{line['key']}.json" or not head.isreg():
            raise ValueError
        return read_bytes(root, entry["file"], place + tarfile.BLOCKSIZE, head.size)
    except (tarfile.TarError, ValueError):
        raise ValueError(f"{entry['file']}: expected {line['key']}.json behind its image, as dex writes it") from None


def plan(root: Path, ids: frozenset[str], documents: Mapping[str, bytes], date: str) -> Change:
    """Write the shards of the set without the samples `ids`, and new documents, beside the set, which stays as it is.

    documents: of those that the set has, by name. date: of the withdrawal, which the manifest will hold with the number
    of samples. ValueError when a shard is not what was written, or when no sample would be left; an error leaves
    nothing.
    """
    manifest, raw = read_manifest(root)
    with contextlib.ExitStack() as undo:
        undo.callback(_sweep, root, manifest)
        shards = [_without(root, entry, ids) for entry in manifest["shards"]]
        samples = sum(entry["samples"] for entry in shards)
        if not samples:
            raise ValueError("all images of the set would go, and a set has at least one: remove its folder")
        before = hashlib.sha256(raw).hexdigest()
        withdrawal = {"date": date, "images": manifest["samples"] - samples, "before": before}
        last = {key: value for key, value in manifest.items() if key != "sha256"} | {
            "samples": samples,
            "modalities": _counts(root, manifest, ids),
            "shards": [_renamed(entry, old) for entry, old in zip(shards, manifest["shards"], strict=True)],
            "documents": [_document(root, entry, documents) for entry in manifest["documents"]],
            "withdrawals": [*manifest.get("withdrawals", ()), withdrawal],
        }
        passing = last | {
            "shards": shards,
            "documents": [entry for entry in manifest["documents"] if entry["file"] not in documents],
            "next": {"shards": last["shards"], "documents": last["documents"]},
        }
        atomic.sync_path(root)
        undo.pop_all()
    return Change(manifest_bytes(passing), before, hashlib.sha256(manifest_bytes(last)).hexdigest())


def carry_out(root: Path, change: Change) -> None:
    """Put the planned set in the place of the one that is there."""
    _write_manifest(root, change.switch)
    settle(root)


def fingerprint(root: Path) -> str:
    """Of the set, as `ShardDataset` gives it."""
    return hashlib.sha256(read_manifest(root)[1]).hexdigest()


def settle(root: Path) -> bool:
    """Finish a change that was cut short after the manifest named its files, and remove the files of one that was cut
    short before. Whether there was one to finish."""
    manifest, _ = read_manifest(root)
    following = manifest.get("next")
    if following is None:
        _sweep(root, manifest)
        return False
    body = {key: value for key, value in manifest.items() if key not in ("sha256", "next")} | following
    check_manifest(body)
    for new, last in zip(manifest["shards"], body["shards"], strict=True):
        for name in ("file", "index"):
            if new[name] != last[name]:
                _place(root / new[name], root / last[name])
    for entry in body["documents"]:
        with contextlib.suppress(FileNotFoundError):  # it has its name already
            os.replace(_next_document(root, entry["file"]), root / entry["file"])
    atomic.sync_path(root)
    _write_manifest(root, manifest_bytes(body))
    _sweep(root, body)
    return True


def _without(root: Path, entry: dict[str, Any], ids: frozenset[str]) -> dict[str, Any]:
    """The entry of the shard without these samples; a file of its own where it has one of them."""
    kept = list(read_index(root, entry))
    before = len(kept)
    kept = [line for line in kept if line["id"] not in ids]
    if len(kept) == before:
        return entry
    tar, index = _next(entry["file"]), _next(entry["index"])
    digest, table = hashlib.sha256(), bytearray()
    with open(root / tar, "wb") as file:

        def write(data: bytes) -> None:
            digest.update(data)
            file.write(data)

        for line in kept:
            data, about = image(root, entry, line), described(root, entry, line)
            table += json_line({**line, "offset": file.tell() + tarfile.BLOCKSIZE})
            write(tar_member(f"{line['key']}.{line['kind']}", data))
            write(tar_member(f"{line['key']}.json", about))
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
    """Let `target` be the file `source`, which keeps its name until the manifest no longer has it."""
    work = atomic.work_name(target)
    work.unlink(missing_ok=True)
    if target.exists() and target.samefile(source):  # a rename between two names of one file does nothing
        return
    try:
        os.link(source, work)
    except OSError:  # a file system without links
        shutil.copyfile(source, work)
        atomic.sync_path(work)
    os.replace(work, target)


def _sweep(root: Path, manifest: dict[str, Any]) -> None:
    """Remove what a change leaves or left beside the files of `manifest`."""
    names = {entry[name] for entry in manifest["shards"] for name in ("file", "index")}
    left: Iterable[Path] = [
        *(root / _next(name) for name in names),
        *(atomic.work_name(root / name) for name in names),
        *(_next_document(root, entry["file"]) for entry in manifest["documents"]),
    ]
    for path in left:
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
    """What is said of a sample beside its image."""
    return json.loads(described(root, entry, line))
