"""Build the embedded data set from images that come with public packages; the same bytes every time.

    python scripts/build_embedded_data.py --out python/dex/data/embedded [--cache DIR]
    python scripts/build_embedded_data.py --check [--cache DIR]     # rebuild elsewhere, compare with the committed set

`embedded_data.yaml` beside this file names the packages, by version and sha256, and what is taken from them. Fetching,
unpacking, reading and the intensity rules are those of `dex.prepare`. The committed bytes depend on what differs: a
frame is rounded to 8 bits before it is resized, and padding counts for the percentiles.

Needs the extra `data` (nibabel, pydicom, pylibjpeg) beside numpy and Pillow, at the versions in BUILT_WITH for the
same bytes: a JPEG encoder or a resampling filter of another version may differ in the last bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python"))

from dex.data.images import square  # noqa: E402
from dex.data.shard_format import MANIFEST  # noqa: E402
from dex.data.shard_verify import verify  # noqa: E402
from dex.data.shard_writer import ShardWriter  # noqa: E402
from dex.prepare import normalise, readers  # noqa: E402
from dex.prepare.packages import Package, unpack  # noqa: E402
from dex.prepare.readers.dicom.file import read_header  # noqa: E402
from dex.prepare.readers.stack import cut  # noqa: E402
from dex.prepare.slices import places  # noqa: E402
from dex.prepare.sources import Tile  # noqa: E402

TABLE = Path(__file__).with_name("embedded_data.yaml")
BUILT_WITH = {
    "numpy": "2.3.5",
    "pillow": "13.0.0",
    "nibabel": "5.4.2",
    "pydicom": "3.0.2",
    "pylibjpeg-libjpeg": "2.5.0",
    "pylibjpeg-openjpeg": "2.6.0",
}
SIZE = 256
JPEG_QUALITY = 90
SAMPLES_PER_SHARD = 256
LIT = 0.06 * 255
LIMITS = readers.Limits(memory_mb=2048)
FORMATS = {"volume": "nifti", "series": "dicom", "frames": "dicom", "photograph": "picture"}
MODALITIES = (
    "CT",
    "MR",
    "X-ray",
    "ultrasound",
    "fundus",
    "pathology",
    "clinical photography",
    "PET",
    "OCT",
    "endoscopy",
)


@dataclass(frozen=True)
class Bundled(Package):
    licence: str = ""
    licence_member: str = ""  # "" where the package states its licence in its metadata only


@dataclass(frozen=True)
class Cut(Tile):
    """A `Tile` of one frame in every `every`; `split`: where it differs from the source's."""

    split: str = ""
    every: int = 1


@dataclass(frozen=True)
class Source:
    """One independent origin: a volume, a series, a video, a single image. It lies on one side of the split."""

    key: str
    package: str
    members: str  # a name, or a pattern for the files of one series
    modality: str
    split: str
    read: str  # of FORMATS
    strides: dict[str, int] = field(default_factory=dict)  # of each plane of a volume, or of frames
    whole: bool = True
    cuts: tuple[Cut, ...] = ()
    padding: int | None = None  # stored around the image; the reader raises it to the lowest value, this set does not
    min_lit: float = 0.0  # share of pixels of a cut-out above LIT: drops the black around a fundus
    licence: str = ""
    note: str = ""


class Frame(NamedTuple):
    label: str
    pixels: np.ndarray  # uint8 [H, W] or [H, W, 3]
    spacing: tuple[float, float]  # of rows, of columns
    member: str


class Picture(NamedTuple):
    label: str
    split: str
    pixels: np.ndarray  # uint8 [SIZE, SIZE] or [SIZE, SIZE, 3]
    share: float  # of foreground in its content


def read_table(path: Path) -> tuple[dict[str, Bundled], tuple[Source, ...]]:
    """The packages by name, and the sources in their order."""
    table = yaml.safe_load(path.read_text(encoding="utf-8"))
    packages = [Bundled(**{**entry, "fetch": tuple(entry.get("fetch", ()))}) for entry in table["packages"]]
    sources = [Source(**{**entry, "cuts": tuple(map(_cut, entry.get("cuts", ())))}) for entry in table["sources"]]
    return {package.name: package for package in packages}, tuple(sources)


def _cut(entry: dict) -> Cut:
    return Cut(**{**entry, "box": tuple(entry["box"]) if "box" in entry else None})


PACKAGES, SOURCES = read_table(TABLE)


def frames(source: Source, folder: Path) -> Iterator[Frame]:
    """Every frame or slice of a source that its strides select, normalised by the rules of its modality."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    (stack,) = readers.read(paths, FORMATS[source.read], limits=LIMITS)
    if stack.burned_in:
        raise ValueError(f"{source.key}: expected no burned-in annotation, its header declares some")
    if source.read == "series":  # whose frames the reader gives from the feet to the head
        if stack.geometry is None or stack.geometry.axes[2] != 2:
            raise ValueError(f"{source.key}: expected axial slices")
        paths.sort(key=height)
    members = [path.relative_to(folder).as_posix() for path in paths]
    unit = intensities(source, stack)
    if source.read == "volume":
        yield from volume_slices(source, stack, unit, members[0])
    elif source.read == "photograph":
        yield Frame("image", unit[0], stack.spacing, members[0])
    else:
        for number in range(0, len(unit), source.strides.get("frame", 1)):
            member = members[number if source.read == "series" else 0]
            yield Frame(f"frame-{number:03d}", unit[number], stack.spacing, member)


def volume_slices(source: Source, stack: readers.Stack, unit: np.ndarray, member: str) -> Iterator[Frame]:
    """The slices of uint8 [F, H, W], the volume's stored frames; the first one half a stride from the border."""
    canonical = stack.geometry.canonical(unit)
    counts = dict(zip(("sagittal", "coronal", "axial"), canonical.shape, strict=True))
    for plane, stride in source.strides.items():
        for number in range(stride // 2, counts[plane], stride):
            pixels = np.ascontiguousarray(cut(canonical, plane, number))
            yield Frame(f"{plane}-{number:03d}", pixels, stack.geometry.plane_spacing(plane), member)


def height(path: Path) -> float:
    """Where a DICOM file's slice lies, in mm towards the head."""
    header, _ = read_header(path, LIMITS)
    return float(header.ImagePositionPatient[2])


def intensities(source: Source, stack: readers.Stack) -> np.ndarray:
    """uint8 [F, H, W] or [F, H, W, 3], the stored frames of one stack: all of them are scaled together."""
    if source.modality != "CT":  # percentiles need no rescale, which would change last bits
        stack = dataclasses.replace(stack, slope=1.0, intercept=0.0)
    values = np.stack([frame.pixels for frame in stack.frames(("stored",), 1)])
    if stack.quantity == "display8" and source.modality != "MR":
        return values
    if source.padding is not None:
        values[values == values.min()] = source.padding
    rule = normalise.ct_window if source.modality == "CT" else normalise.percentile_range
    unit = normalise.to_uint8(rule(values.astype(np.float64)))
    return 255 - unit if stack.inverted else unit


def pictures(source: Source, frame: Frame, number: int) -> Iterator[Picture]:
    """The whole of the frame, which is the source's `number`-th, and its cut-outs."""
    height, width = frame.pixels.shape[:2]
    if source.whole:
        if source.read == "photograph":  # its surroundings have no level of their own to pad with
            content = whole = square(Image.fromarray(frame.pixels), SIZE)
        else:
            content = shrink(frame)
            whole = pad(content)
        yield Picture(frame.label, source.split, whole, normalise.foreground_share(content))
    for tile in source.cuts:
        for left, top in places(tile, height, width) if number % tile.every == 0 else ():
            content = Image.fromarray(frame.pixels[top : top + tile.size, left : left + tile.size])
            content = np.asarray(content.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
            lit = (content.reshape(SIZE, SIZE, -1).max(axis=2) > LIT).mean()
            share = normalise.foreground_share(content) if lit >= source.min_lit else 0.0
            yield Picture(f"{frame.label}-x{left}-y{top}-s{tile.size}", tile.split or source.split, content, share)


def shrink(frame: Frame) -> np.ndarray:
    """The frame with square pixels, its longer side SIZE."""
    extent = np.array(frame.pixels.shape[:2]) * np.array(frame.spacing)
    height, width = (max(1, round(float(v))) for v in extent * (SIZE / extent.max()))
    return np.asarray(Image.fromarray(frame.pixels).resize((width, height), Image.Resampling.BICUBIC))


def pad(content: np.ndarray) -> np.ndarray:
    """SIZE x SIZE with the content in the middle of its own background level."""
    height, width = content.shape[:2]
    out = np.full((SIZE, SIZE, *content.shape[2:]), normalise.background(content), np.uint8)
    top, left = (SIZE - height) // 2, (SIZE - width) // 2
    out[top : top + height, left : left + width] = content
    return out


def encode(pixels: np.ndarray) -> bytes:
    if pixels.ndim == 3 and (pixels == pixels[:, :, :1]).all():
        pixels = pixels[:, :, 0]
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=JPEG_QUALITY, optimize=True, subsampling=0)
    return stream.getvalue()


class Sifter:
    """Decides which pictures are kept, and counts for every source what was kept and why others were dropped."""

    def __init__(self, sources: Sequence[Source]):
        self.tally = {source.key: Counter() for source in sources}
        self._hashes: list[int] = []

    def keeps(self, source: Source, picture: Picture) -> bool:
        count, digest = self.tally[source.key], normalise.difference_hash(picture.pixels)
        if picture.share < normalise.MIN_FOREGROUND:
            count["foreground"] += 1
        elif any((digest ^ other).bit_count() <= normalise.NEAR_DUPLICATE_BITS for other in self._hashes):
            count["near-duplicate"] += 1
        else:
            self._hashes.append(digest)
            count[picture.split] += 1
            return True
        return False


def build(out: Path, cache: Path) -> None:
    """Write the set to the new folder `out`."""
    sifter = Sifter(SOURCES)
    card: list[dict] = []
    with ShardWriter(
        out, name="embedded", modalities=MODALITIES, image_size=SIZE, samples_per_shard=SAMPLES_PER_SHARD
    ) as writer:
        for source in SOURCES:
            package = PACKAGES[source.package]
            folder = unpack(package, [source.members], cache)
            for number, frame in enumerate(frames(source, folder)):
                for picture in pictures(source, frame, number):
                    if not sifter.keeps(source, picture):
                        continue
                    place = {"modality": source.modality, "split": picture.split, "group": source.key}
                    meta = {
                        "package": package.name,
                        "version": package.version,
                        "member": frame.member,
                        "view": picture.label,
                        "licence": f"{source.licence}, {package.licence} (package)"
                        if source.licence
                        else package.licence,
                    }
                    name = f"{source.key}/{picture.label}"
                    writer.add(name, encode(picture.pixels), kind="jpg", **place, meta=meta)
                    card.append({"id": name, **place, **meta})
        for name, data in licences(cache).items():
            writer.add_document(f"licences/{name}", data)
        writer.add_document("card.jsonl", b"".join(json.dumps(row, sort_keys=True).encode() + b"\n" for row in card))
        writer.add_document("DATA_CARD.md", card_text(card, sifter.tally).encode())


def licences(cache: Path) -> dict[str, bytes]:
    texts = {}
    for name, package in PACKAGES.items():
        # a package without a licence file states the same licence as totalsegmentator, whose text is complete
        owner = PACKAGES[name if package.licence_member else "totalsegmentator"]
        texts[f"{name}-{package.version}.txt"] = (
            unpack(owner, [owner.licence_member], cache) / owner.licence_member
        ).read_bytes()
    texts["mni-icbm152.txt"] = MNI_NOTICE.encode()
    return texts


def card_text(card: list[dict], tally: dict[str, Counter]) -> str:
    sources = Counter((row["modality"], row["split"], row["group"]) for row in card)
    summary, alone = [], []
    for modality in MODALITIES:
        groups = {split: {g for m, s, g in sources if (m, s) == (modality, split)} for split in ("train", "val")}
        images = {
            split: sum(n for (m, s, _), n in sources.items() if (m, s) == (modality, split))
            for split in ("train", "val")
        }
        total, independent = sum(images.values()), len(groups["train"] | groups["val"])
        if groups["train"] & groups["val"]:
            alone.append(modality)
        summary.append(f"| {modality} | {total or '**empty**'} | {images['train']} | {images['val']} | {independent} |")
    total = [len(card), sum(r["split"] == "train" for r in card), sum(r["split"] == "val" for r in card), len(tally)]
    summary.append("| all | " + " | ".join(map(str, total)) + " |")
    origins = []
    for source in SOURCES:
        count, package = tally[source.key], PACKAGES[source.package]
        origins.append(
            f"| {source.key} | {source.modality} | {package.name} {package.version} | `{source.members}` | "
            f"{source.licence or package.licence} | {count['train']} | {count['val']} | "
            f"{count['foreground']} | {count['near-duplicate']} | {source.note} |"
        )
    packages = [f"| {p.name} | {p.version} | {p.licence} | `{p.file}` | `{p.sha256}` |" for p in PACKAGES.values()]
    return CARD.format(
        summary="\n".join(summary),
        origins="\n".join(origins),
        packages="\n".join(packages),
        alone=", ".join(alone),
        empty=", ".join(m for m in MODALITIES if m not in {r["modality"] for r in card}),
        size=SIZE,
        quality=JPEG_QUALITY,
        built=", ".join(f"{name} {version}" for name, version in BUILT_WITH.items()),
        bits=normalise.NEAR_DUPLICATE_BITS,
        foreground=normalise.MIN_FOREGROUND,
        step=normalise.FOREGROUND_STEP,
    )


MNI_NOTICE = """Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute,
McGill University. Permission to use, copy, modify, and distribute this software and its documentation for any purpose
and without fee is hereby granted, provided that the above copyright notice appear in all copies. The authors and McGill
University make no representations about the suitability of this software for any purpose. It is provided "as is"
without express or implied warranty. The authors are not responsible for any data loss, equipment damage, property
loss, or injury to subjects or patients resulting from the use or misuse of this software package.
"""

CARD = """# Embedded data set

Real medical images of {size} x {size} pixels that came with public packages, for tests, demonstration and first
contact. Independent sources are few, and many images are neighbours in one volume or overlapping cut-outs of one
picture: **nothing measured on this set is evidence about a method.** Written by `scripts/build_embedded_data.py`,
which also rebuilds it byte for byte; `card.jsonl` names every image's package, member, view, licence and split.

## What there is

| modality | images | train | val | independent sources |
| --- | --- | --- | --- | --- |
{summary}

Empty, since no package with real images of them was found, and nothing here is simulated: {empty}.

## Splits

A source (volume, series, video or single picture) lies wholly on one side wherever its modality has more than one.
These modalities have one source only, a single picture: {alone}. Their val images are cut from a lower band of that
picture that no train cut-out touches; the one view of the whole picture is in train and shows that band at low
resolution. Their val numbers say nothing about other patients.

## How an image was made

- CT: Hounsfield units clipped to [-200, 400], (x + 200) / 600. MR: clipped to the 1st and 99th percentile of the
  volume or series, min-max. 8-bit images: as stored. Radiographs of more than 8 bits: as MR. MONOCHROME1 inverted;
  palettes and YBR converted to RGB; DICOM series ordered by position along the slice normal.
- Volumes turned to right-front-up axes; axial, coronal and sagittal slices taken at the strides in the script, shown
  as a radiologist sees them, with square pixels (voxel spacing respected), the longer side {size}, padded with the
  slice's own background level. Photographs and pathology: the centre square instead.
- Large pictures also give square cut-outs, resized (bicubic, antialiased). Ultrasound: only cut-outs that lie within
  the scan sector, clear of burned-in text. Files that declare burned-in annotation are not used.
- Kept when the foreground share is at least {foreground}: the share of pixels that differ by more than {step} of full
  scale from the background level, which is the commonest level in the image's outermost ring of pixels. Cut-outs of
  the fundus photograph must also be at least 60 % lit.
- Near-duplicates dropped: a 256-bit difference hash within {bits} bits of an image already kept, over all sources.
- Stored as JPEG, quality {quality}, no chroma subsampling; grey images with one channel.

Nothing else was removed or retouched. Names, dates and identifiers of the DICOM headers are not copied.

## Sources

`fore` and `near` count what the foreground and near-duplicate rules dropped.

| source | modality | package | member | licence | train | val | fore | near | note |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{origins}

## Packages

| package | version | licence | file | sha256 |
| --- | --- | --- | --- | --- |
{packages}

Licences are the packages' own, their texts are in `licences/`. The images were changed as described above. The T1
template comes with nilearn, whose description of it gives no licence; the notice that its makers publish with it is in
`licences/mni-icbm152.txt`.

Built with {built}.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    embedded = ROOT / "python" / "dex" / "data" / "embedded"
    parser.add_argument("--out", type=Path, help="folder to write; an earlier set there is replaced when all is done")
    parser.add_argument("--check", action="store_true", help=f"rebuild, compare with {embedded.relative_to(ROOT)}")
    parser.add_argument("--cache", type=Path, help="keep fetched packages here (default: fetch anew each time)")
    arguments = parser.parse_args()
    if arguments.check == (arguments.out is not None):
        parser.error("give one of --out DIR and --check")
    here = {name: metadata.version(name) for name in BUILT_WITH}
    if here != BUILT_WITH:
        print(f"note: the set was built with {BUILT_WITH}, here are {here}: bytes may differ", file=sys.stderr)

    with tempfile.TemporaryDirectory() as temporary:
        cache = arguments.cache or Path(temporary) / "cache"
        if arguments.check:
            rebuilt = Path(temporary) / "rebuilt"
            build(rebuilt, cache)
            problems = verify(embedded)
            if (rebuilt / MANIFEST).read_bytes() != (embedded / MANIFEST).read_bytes():
                problems.append(f"{MANIFEST}: a rebuild gives another one")
            print("\n".join(problems) or "identical")
            return 1 if problems else 0
        replace(arguments.out, cache)
    return 0


def replace(out: Path, cache: Path) -> None:
    """Build beside `out` and move into its place, so that a failed build leaves an earlier set as it was."""
    if out.exists() and any(out.iterdir()) and not (out / MANIFEST).exists():
        raise SystemExit(f"--out: expected an empty folder or an earlier set, got {str(out)!r}")
    fresh, old = out.with_name(f"{out.name}.new"), out.with_name(f"{out.name}.old")
    for folder in (fresh, old):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        build(fresh, cache)
        if out.exists():
            out.rename(old)
        fresh.rename(out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    manifest = json.loads((out / MANIFEST).read_text())
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{manifest['samples']} images, {size} bytes in {out}")
    for row in manifest["modalities"]:
        print(f"  {row['name']}: {row['train']} train, {row['val']} val{' (empty)' if row['empty'] else ''}")


if __name__ == "__main__":
    sys.exit(main())
