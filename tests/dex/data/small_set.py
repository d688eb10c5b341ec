"""A small shard set, and changes to it that its own hashes do not show."""

import hashlib
import io
import json

import numpy as np
from PIL import Image

from dex.data import ShardWriter
from dex.data.shard_format import manifest_bytes

MODALITIES = ("CT", "MR", "PET")


rng = np.random.default_rng(0)


IMAGES = [rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(7)]


def png(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def fill(writer):
    for number, image in enumerate(IMAGES):
        writer.add(
            f"s{number}",
            png(image),
            kind="png",
            modality=MODALITIES[number % 2],
            split="val" if number > 4 else "train",
            group=f"g{number // 2}",
            meta={"note": "é"},
        )
    writer.add_document("CARD.md", b"# card\n")
    writer.add_document("licences/x.txt", b"MIT\n")


def write(folder):
    with ShardWriter(folder, name="small", modalities=MODALITIES, image_size=16, samples_per_shard=3) as writer:
        fill(writer)
    return folder


def forge(root, change):
    """Change the manifest as somebody would who also fits its own hash."""
    manifest = json.loads((root / "manifest.json").read_text())
    del manifest["sha256"]
    change(manifest)
    (root / "manifest.json").write_bytes(manifest_bytes(manifest))


def forge_index(root, change):
    path = root / "shard-00000.index.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def fit(manifest):
        manifest["shards"][0].update(
            index_bytes=path.stat().st_size, index_sha256=hashlib.sha256(path.read_bytes()).hexdigest()
        )

    forge(root, fit)
