"""From finished chunks to the shard set: seconds and memory of `dex.prepare.join` for DEX_JOIN_IMAGES images.

The corpus has 5,000,000, which take 15 GB of disk and some minutes. Lines and hashes are those of `test_duplicates`;
all images are one small picture, so the measured cost is that of an image without its bytes.
"""

import hashlib
import io
import json
import os
import resource
import time
from pathlib import Path

import numpy as np
from PIL import Image

from dex.prepare import join
from dex.prepare.chunk_files import paths
from dex.prepare.chunks import HISTOGRAM, Counts, Settings
from dex.prepare.sources import Source
from dex.prepare.splits import PATIENT

from . import test_duplicates
from .timing import apart

IMAGES = int(os.environ.get("DEX_JOIN_IMAGES", "100000"))
SECONDS_PER_MILLION = 600
"""Limit; reading the corpus takes hours."""
CHUNK = 5000
"""Images of a chunk."""
SETTINGS = Settings(size=32)


def write_chunks(private: Path, count: int) -> list[str]:
    """Write chunks in the format of `dex prepare`; returns their names."""
    for folder in ("chunks", "ids"):
        (private / folder).mkdir(parents=True)
    pixels, hashes, unit, volume = test_duplicates.images(count)
    stream = io.BytesIO()
    Image.fromarray(np.arange(1024, dtype=np.uint8).reshape(32, 32)).save(stream, "JPEG", quality=30)
    data = stream.getvalue() + np.full(256, 4, HISTOGRAM).tobytes()
    common = {"kind": "jpg", "size": len(stream.getvalue()), "sha256": hashlib.sha256(data).hexdigest(), "offset": 0}
    names = []
    for number, start in enumerate(range(0, count, CHUNK)):
        name = f"000-{number:06d}"
        binary, lines, _ = paths(private, name)
        binary.write_bytes(data)
        rows = []
        for i in range(start, min(start + CHUNK, count)):
            patient = f"{unit[i] // 3:032x}"
            line = {
                "id": f"corpus/{i:032x}",
                "label": f"axial-{i % 100:03d}",
                "group": patient,
                "by": PATIENT,
                "series": f"{unit[i]:032x}",
                "split": "val" if unit[i] // 3 % 20 == 0 else "train",
                "unit": int(unit[i] % 50),
                "stack": 0,
                "volume": bool(volume[i]),
                "pixels_sha256": pixels[i].tobytes().hex(),
                "dhash": hashes[i].tobytes().hex(),
                "share": 0.5,
                "text": False,
            }
            rows.append(json.dumps(line | common, separators=(",", ":")).encode() + b"\n")
        body = b"".join(rows)
        counts = Counts(units=len(rows) // 100, seen=len(rows), kept=len(rows)).to_dict()
        end = {"bytes": len(data), "sha256": hashlib.sha256(body).hexdigest(), "counts": counts}
        lines.write_bytes(body + json.dumps({"end": end}).encode() + b"\n")
        names.append(name)
    return names


def joined(private: Path, names: list[str]) -> tuple[int, dict[str, float], float]:
    """Number of images written, seconds of each step, peak growth of this process in MB."""
    source = Source(name="corpus", modality="CT", normalisation="ct", files=("**/*",), root="/")
    steps, began = {}, time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def say(text: str) -> None:
        steps[{"looking": "lines read", "writing": "duplicates"}[text.split()[0]]] = time.perf_counter() - began

    _, facts, _ = join.join([join.Part(source, names)], private, SETTINGS, say)
    steps["written"] = time.perf_counter() - began
    return facts["images"], steps, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def test_join(tiny, report, tmp_path):
    count = 3_000 if tiny else IMAGES
    names = apart(write_chunks, tmp_path, count)
    written, steps, megabytes = apart(joined, tmp_path, names)
    assert 0.7 * count < written < 0.95 * count  # The rest are duplicates.
    size = sum(path.stat().st_size for path in (tmp_path / "set").iterdir())
    limit = SECONDS_PER_MILLION * count / 1e6
    after = ", ".join(f"{name} after {seconds:.1f} s" for name, seconds in steps.items())
    detail = f"{after}; {megabytes:,.0f} MB; {written:,} written, {size / 1e9:.2f} GB"
    report(f"joining {count:,} images", f"{limit:.0f} s", limit / steps["written"], 0 if tiny else 1, detail)
