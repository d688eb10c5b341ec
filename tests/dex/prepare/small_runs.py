"""Small real sources, and runs of `dex.prepare` on them."""

import hashlib
import json

import nibabel
import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset

from dex.prepare import chunks
from dex.prepare import run as prepare
from dex.prepare.run import Options
from dex.prepare.sources import Source
from dex.prepare.summary import Progress

SETTINGS = chunks.Settings(size=64, encoding="png")


SALT = bytes(range(32))


def picture(seed, side=64):
    """uint8 [side, side]: blobs on a slope, no two seeds alike."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    image = 20 + 30 * x
    for _ in range(6):
        cy, cx, r = rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8), rng.uniform(0.1, 0.3)
        image = image + rng.uniform(20, 60) * ((x - cx) ** 2 + (y - cy) ** 2 < r * r)
    return image.clip(0, 255).astype(np.uint8)


def save(root, name, image):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(root / name)


def save_volume(path, seed, frames=6, side=40):
    """CT numbers, right-front-up axes: frame k is picture(seed + k), 0..255 -> -200..310 HU."""
    values = np.stack([picture(seed + k, side).astype(np.int16) * 2 - 200 for k in range(frames)], axis=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)


def save_dicom(path, image, **tags):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=[str(path)])
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.SeriesInstanceUID = pydicom.uid.generate_uid(entropy_srcs=[str(path), "series"])
    data.Modality, data.PhotometricInterpretation, data.SamplesPerPixel = "US", "MONOCHROME2", 1
    data.Rows, data.Columns = image.shape
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation = 7, 0
    data.PixelData = image.tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)


def source(root, name="pictures", modality="X-ray", **fields):
    rule = {"CT": "ct"}.get(modality, "display")
    given = {"name": name, "modality": modality, "normalisation": rule, "files": ("**/*",), "trusted": True}
    return Source(**{**given, **fields, "root": str(root)})


def described(**fields):
    """A source that lies nowhere."""
    return Source(**{"name": "mine", "modality": "CT", "normalisation": "ct", "files": ("**/*",), **fields})


def start(sources, out, salt=SALT, **options):
    private = prepare.private_folder(out)
    if salt is not None and not private.exists():
        private.mkdir(parents=True)
        (private / "salt").write_bytes(salt)
    said = []
    run = prepare.prepare(sources, Options(out, **{"settings": SETTINGS, **options}), said.append)
    facts = run.run(Progress())
    return facts, said


def digest(out):
    return hashlib.sha256((out / "manifest.json").read_bytes()).hexdigest()


def lines(out):
    rows = []
    for path in sorted(out.glob("*.index.jsonl")):
        rows += map(json.loads, path.read_text().splitlines())
    return rows


def save_series(root, patient, count, names, **tags):
    """CT slices at 2 mm; that at k is picture(100 * patient + k), 0..255 -> -200..310 HU."""
    for k in range(count):
        values = picture(100 * patient + k).astype(np.int16) * 2 - 200
        place = {"ImagePositionPatient": [0, 0, 2 * k], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
        scale = {"RescaleSlope": 1, "RescaleIntercept": 0, "PixelSpacing": [1, 1], "Modality": "CT"}
        deep = {"BitsAllocated": 16, "BitsStored": 16, "HighBit": 15, "PixelRepresentation": 1}
        identity = {"SeriesInstanceUID": f"1.2.{patient}", "PatientID": f"MRN-{patient}"}
        save_dicom(root / next(names), values, **{**place, **scale, **deep, **identity, **tags})


def make_older(out):
    """Turn the private folder into one of a version that knew units alone."""
    private = prepare.private_folder(out)
    (private / "duplicates.jsonl").unlink()
    for path in (private / "units").glob("*-passed-over.jsonl"):
        path.unlink()
    for path in (private / "ids").iterdir():
        rows = [json.loads(line) for line in open(path)]
        keep = ("id", "path", "label", "refused")
        old = [{name: row[name] for name in keep if name in row} for row in rows if "id" in row]
        path.write_text("".join(json.dumps(row) + "\n" for row in old))
    plan = json.loads((private / "plan.json").read_text())
    for entry in plan["sources"]:
        del entry["root"]
    (private / "plan.json").write_text(json.dumps(plan))
