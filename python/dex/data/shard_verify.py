"""Verify every byte of a shard set."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

from .dataset import EMBEDDED
from .shard_format import MANIFEST, open_file, read_bytes, read_index, read_manifest, reason_of
from .shards import ShardDataset


def verify(path: str | Path | None = None) -> list[str]:
    """Read every byte of a shard set (None: the embedded one) and return the problems found, one line each.

    An empty list means that manifest, indices, shards and documents have the right sizes and hashes, every index line
    points to its image, and the tars have no other members. FileNotFoundError: there is no manifest.
    """
    root = Path(EMBEDDED if path is None else path)
    if not (root / MANIFEST).exists():
        raise FileNotFoundError(f"path: expected a folder with {MANIFEST}, got {str(root)!r}")
    root = root.resolve()
    try:
        manifest, _ = read_manifest(root)
    except ValueError as error:
        return [str(error)]
    problems = []
    if "next" in manifest:
        problems.append(f"{MANIFEST}: a withdrawal was interrupted; `dex data withdraw DIR` finishes it")
    seen: set[str] = set()
    for document in manifest["documents"]:
        problems += _verify_file(root, document["file"], document["bytes"], document["sha256"])
    for entry in manifest["shards"]:
        damage = _verify_file(root, entry["file"], entry["bytes"], entry["sha256"])
        try:
            lines = list(read_index(root, entry))
            if not damage:
                damage = _verify_members(root, entry, lines)
            for line in lines:
                if line["id"] in seen:
                    damage.append(f"{entry['index']}: id {line['id']!r} occurs twice")
                seen.add(line["id"])
        except ValueError as error:
            damage.append(str(error))
        problems += damage
    if not problems:
        try:
            ShardDataset(root)
        except ValueError as error:
            problems.append(str(error))
    return problems


def _hash_file(root: Path, file: str) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with open_file(root, file) as stream:
        while block := stream.read(2**20):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def _verify_file(root: Path, file: str, size: int, digest: str) -> list[str]:
    try:
        actual_size, actual_digest = _hash_file(root, file)
    except (OSError, ValueError) as error:
        return [f"{file}: {reason_of(error)}"]
    if actual_size != size:
        return [f"{file}: expected {size} bytes, got {actual_size}"]
    return [] if actual_digest == digest else [f"{file}: sha256 differs from the manifest"]


def _verify_members(root: Path, entry: dict, lines: list[dict]) -> list[str]:
    problems: list[str] = []
    members: dict[str, tarfile.TarInfo] = {}
    expected = {f"{line['key']}.{line['kind']}": line for line in lines}
    try:
        with open_file(root, entry["file"]) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                # Any of these would be extracted by a program that unpacks the tar
                if member.name in members or not member.isreg():
                    problems.append(f"{entry['file']}: member {member.name!r} occurs twice or is not a regular file")
                members[member.name] = member
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        return [f"{entry['file']}: {reason_of(error)}"]
    allowed = set(expected) | {f"{line['key']}.json" for line in lines}
    for name in sorted(set(members) ^ allowed):
        problems.append(f"{entry['file']}: member {name!r} is {'missing' if name in allowed else 'not in the index'}")
    for name, line in expected.items():
        member = members.get(name)
        if member and (member.offset_data, member.size) != (line["offset"], line["size"]):
            problems.append(f"{entry['file']}: member {name!r} is not where the index says")
        data = read_bytes(root, entry["file"], line["offset"], line["size"])
        if hashlib.sha256(data).hexdigest() != line["sha256"]:
            problems.append(f"{entry['file']}: sample {line['id']!r}: sha256 of its bytes differs from the index")
    return problems
