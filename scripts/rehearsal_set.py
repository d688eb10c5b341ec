"""A shard set with the published corpus's index: 44 sources and 4,973,080 training images, whose bytes are few.

Names, modalities and numbers of images are those of the catalogue in the package. Every sample has its own id, key and
patient, named as `dex prepare` names those of a private source. Their images are real JPEGs of the embedded set: each
shard has the same few, and its index points to them again and again. So the index is whole, and images are read, hashed
and decoded like any others, but `dex data check` would object: the shards lack members.
"""

import hashlib
import itertools
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "python"))

from dex.common import atomic  # noqa: E402
from dex.data.dataset import EMBEDDED, SPLITS  # noqa: E402
from dex.data.shard_format import (  # noqa: E402
    FORMAT,
    MANIFEST,
    VERSION,
    manifest_bytes,
    read_bytes,
    read_index,
    read_manifest,
)
from dex.data.shard_writer import json_line, tar_member  # noqa: E402
from dex.prepare.ids import SALT_BYTES, Names  # noqa: E402
from dex.prepare.sources import Source, read_source, shipped  # noqa: E402

NAME = "rehearsal"
HELD_OUT = 10
"""Images of each source that are held out, in addition to those of the catalogue, which has no held-out images."""
GROUP = 40
"""Images per patient; the catalogue does not say."""
PER_SHARD = 10_000
"""As `dex prepare` writes them."""
KEY = "<key>"
"""Stands for a sample's key until its number is known."""
PER_MODALITY = 4
"""JPEGs of each modality in a shard."""


def corpus() -> list[Source]:
    """The sources of the published corpus, by name."""
    found = [read_source(path) for path in shipped().values()]
    return sorted((s for s in found if s.images and s.package is None), key=lambda source: source.name)


def _write_shard(root: Path, name: str, tar: bytes, table: bytes, samples: int) -> dict:
    """Write a shard with its index; returns its entry in the manifest."""
    (root / f"{name}.tar").write_bytes(tar)
    (root / f"{name}.index.jsonl").write_bytes(table)
    return {
        "file": f"{name}.tar",
        "bytes": len(tar),
        "sha256": hashlib.sha256(tar).hexdigest(),
        "samples": samples,
        "index": f"{name}.index.jsonl",
        "index_bytes": len(table),
        "index_sha256": hashlib.sha256(table).hexdigest(),
    }


def payloads() -> tuple[bytes, dict[str, list[dict]]]:
    """A tar with a few embedded JPEGs, and their offset, size and sha256 by modality."""
    tar, places = b"", {}
    for entry in read_manifest(EMBEDDED)[0]["shards"]:
        for line in read_index(EMBEDDED, entry):
            of_modality = places.setdefault(line["modality"], [])
            if len(of_modality) < PER_MODALITY and line["kind"] == "jpg":
                data = read_bytes(EMBEDDED, entry["file"], line["offset"], line["size"])
                place = {"offset": len(tar) + tarfile.BLOCKSIZE, "size": line["size"], "sha256": line["sha256"]}
                of_modality.append(place)
                tar += tar_member(f"{line['key']}.jpg", data)
    return tar + bytes(2 * tarfile.BLOCKSIZE), {name: images for name, images in places.items() if images}


def index_lines(source: Source, images: list[dict], wanted: int) -> Iterator[str]:
    """The lines of a source's samples without their keys, `wanted` to train and then those held out.

    A patient's samples share the first 24 digits of the hash in their ids; the other 8 count.
    """
    names = Names(source, bytes(SALT_BYTES))
    for number in range(wanted + HELD_OUT):
        if number % GROUP == 0 or number == wanted:
            patient, split = names.patient(f"{source.name} {number}"), "train" if number < wanted else "val"
            common = {"group": patient, "kind": "jpg", "modality": source.modality, "split": split, "key": KEY}
            prefix = names.sample(f"{number}", "")[:-8]
            templates = [json_line({**common, **image, "id": f"{prefix}%08x"}).decode() for image in images]
        yield templates[number % len(images)] % number


def write(root: Path, sources: list[Source], share: float = 1.0) -> dict:
    """Write the set to a new folder. share: of each source's images, at least one. Returns counts for the results."""
    root.mkdir(parents=True)
    tar, places = payloads()
    anything = [image for images in places.values() for image in images]
    counts = {source.modality: dict.fromkeys(SPLITS, 0) for source in sources}
    wanted = {source.name: max(1, round(source.images * share)) for source in sources}
    lines = itertools.chain.from_iterable(
        index_lines(source, places.get(source.modality, anything), wanted[source.name]) for source in sources
    )
    for source in sources:
        counts[source.modality]["train"] += wanted[source.name]
        counts[source.modality]["val"] += HELD_OUT
    shards, samples = [], 0
    while part := list(itertools.islice(lines, PER_SHARD)):
        table = "".join(line.replace(KEY, f"{samples + i:08d}") for i, line in enumerate(part)).encode()
        shards.append(_write_shard(root, f"shard-{len(shards):05d}", tar, table, len(part)))
        samples += len(part)
    body = {
        "format": FORMAT,
        "version": VERSION,
        "name": NAME,
        "image_size": 256,
        "samples": samples,
        "modalities": [{"name": name, **count, "empty": False} for name, count in counts.items()],
        "shards": shards,
        "documents": [],
    }
    atomic.write(root / MANIFEST, manifest_bytes(body))
    return {
        "sources": len(sources),
        "train": sum(count["train"] for count in counts.values()),
        "held_out": sum(count["val"] for count in counts.values()),
        "modalities": {name: count["train"] for name, count in counts.items()},
        "borrowed": sorted(set(counts) - set(places)),
        "shards": len(shards),
        "index_bytes": sum(entry["index_bytes"] for entry in shards),
        "jpegs": len(anything),
        "jpeg_bytes": round(sum(image["size"] for image in anything) / len(anything)),
    }
