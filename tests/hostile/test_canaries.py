"""Rows 23 and 24: patient data and keys that lie about, and every artifact that must not have them."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import seeds
from PIL import Image, PngImagePlugin
from test_fuzz import dex_prepare

from dex.data import verify
from dex.prepare import run as prepare

pytestmark = pytest.mark.slow

KEYS = {
    "WANDB_API_KEY": "c0ffee5ec7e7c0ffee5ec7e7c0ffee5ec7e7abcd",
    "HF_TOKEN": "hf_CanaryTokenThatNobodyMaySee00000",
    "AWS_SECRET_ACCESS_KEY": "CanaryAws/wJalrXUtnFEMI+K7MDENGbPxRfi",
}
NUMBERS = "1.2.826.0.1.3680043.8.777000777."


class Canaries:
    """Values that are found nowhere else. names: of files and folders, which the private folder may hold."""

    def __init__(self):
        self.values: list[str] = []
        self.names: list[str] = []

    def text(self) -> str:
        self.values.append(f"QzCanary{len(self.values):03d}")
        return self.values[-1]

    def uid(self) -> str:
        self.values.append(f"{NUMBERS}{1000 + len(self.values)}")
        return self.values[-1]

    def name(self) -> str:
        self.names.append(f"QzNamed{len(self.names):03d}")
        return self.names[-1]


TAGS = (
    "PatientName",
    "PatientID",
    "OtherPatientNames",
    "PatientAddress",
    "PatientComments",
    "EthnicGroup",
    "InstitutionName",
    "InstitutionAddress",
    "StudyDescription",
    "SeriesDescription",
    "ImageComments",
    "AccessionNumber",
    "ReferringPhysicianName",
    "OperatorsName",
    "StationName",
    "StudyID",
    "ProtocolName",
    "DeviceSerialNumber",
    "RequestingPhysician",
    "AdmissionID",
)


def dicom(canaries: Canaries, image: np.ndarray, **tags) -> bytes:
    """A CT slice with canaries in tags, private tags, sequences and UIDs."""
    import pydicom
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    inner, person = Dataset(), Dataset()
    person.PersonName, person.PatientID = canaries.text(), canaries.text()
    inner.OtherPatientIDsSequence = Sequence([person])
    inner.CodeMeaning = canaries.text()
    fields = {name: canaries.text() for name in TAGS} | {
        "StudyInstanceUID": canaries.uid(),
        "SeriesInstanceUID": canaries.uid(),
        "FrameOfReferenceUID": canaries.uid(),
        "RequestAttributesSequence": Sequence([inner]),
        "Modality": "CT",
        "RescaleSlope": "2",
        "RescaleIntercept": "-200",
        "PixelSpacing": ["1", "1"],
    }
    data = seeds.dicom(image, **fields | tags)
    dataset = pydicom.dcmread(io.BytesIO(data))
    block = dataset.private_block(0x0011, canaries.text(), create=True)
    block.add_new(1, "LO", canaries.text())
    block.add_new(2, "OB", canaries.text().encode() + b"\0" * 4)
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = canaries.uid()
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.save_as(stream)
    return stream.getvalue()


def nifti(canaries: Canaries) -> bytes:
    import nibabel

    image = nibabel.Nifti1Image(seeds.volume(40) * 2 - 200, np.eye(4))
    for field in ("descrip", "aux_file", "intent_name", "db_name"):
        image.header[field] = canaries.text().encode()
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", canaries.text().encode()))
    return image.to_bytes()


def exif(canaries: Canaries) -> Image.Exif:
    found = Image.Exif()
    for tag in (0x010E, 0x013B, 0x0131, 0x8298):  # description, artist, software, copyright
        found[tag] = canaries.text()
    return found


def png(canaries: Canaries) -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text("Patient", canaries.text())
    text.add_text("Packed", canaries.text() * 3, zip=True)
    text.add_itxt("Name", canaries.text())
    return seeds.pillow(seeds.picture(60, 64), "PNG", pnginfo=text, exif=exif(canaries))


def tiff(canaries: Canaries) -> bytes:
    tags = {270: canaries.text(), 315: canaries.text(), 316: canaries.text(), 65000: canaries.text()}
    return seeds.pillow(seeds.picture(62, 64), "TIFF", tiffinfo=tags)


def nrrd(canaries: Canaries) -> bytes:
    data = seeds.volume(64).transpose(2, 1, 0)
    head = f"NRRD0004\n# {canaries.text()}\ntype: short\ndimension: 3\nsizes: 48 48 4\nencoding: raw\nendian: little\n"
    return f"{head}content: {canaries.text()}\nPatient:={canaries.text()}\n\n".encode() + data.tobytes()


def files(canaries: Canaries) -> dict[str, bytes]:
    """Path -> bytes: sound files of every format, and broken ones that hold as much."""
    found: dict[str, bytes] = {}

    def put(suffix: str, data: bytes) -> None:
        found[f"{canaries.name()}/{canaries.name()}{suffix}"] = data

    for i in range(30):
        put(".dcm", dicom(canaries, seeds.picture(i, 64)))
    put("", dicom(canaries, seeds.picture(31, 64)))
    put(".nii", nifti(canaries))
    put(".png", png(canaries))
    put(".jpg", seeds.pillow(seeds.picture(61, 64), "JPEG", exif=exif(canaries), comment=canaries.text()))
    put(".tif", tiff(canaries))
    put(".nrrd", nrrd(canaries))
    put(".npz", seeds.npz(**{canaries.text(): seeds.picture(63, 64)}))
    sound = dicom(canaries, seeds.picture(70, 64))
    for keep in (140, 400, 900, len(sound) - 2000):
        put(".dcm", sound[:keep])
    # numbers that are none, whose text a library's message would show
    sound = dicom(canaries, seeds.picture(71, 64))
    for number in (b"-200", b"2 ", b"1\\1 "):
        value = canaries.text().encode()[-8:]
        put(".dcm", sound.replace(number, value[-len(number) :].rjust(len(number), b"Q"), 1))
    put(".dcm", dicom(canaries, seeds.picture(72, 64), BurnedInAnnotation="YES"))
    put(".dcm", dicom(canaries, seeds.picture(73, 64), PhotometricInterpretation=canaries.text().upper()))
    for suffix, make in ((".nii", nifti), (".png", png), (".tif", tiff), (".nrrd", nrrd)):
        data = make(canaries)
        put(suffix, data[: len(data) // 2])
        put(suffix, data[:100] + canaries.text().encode() + data[100:])
    return found


def forms(value: str) -> list[bytes]:
    """How a value might stand in a file, lower case; hashes without a salt can be guessed."""
    encoded = value.encode()
    plain = [encoded.lower(), value.lower().encode("utf-16-le"), encoded.hex().encode()]
    return plain + [hashlib.new(name, encoded).hexdigest().encode() for name in ("md5", "sha1", "sha256")]


def contents(root: Path) -> dict[str, bytes]:
    """Name -> bytes of every file below a folder, of the members of tars, and what is packed in pictures."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(root))] = data = path.read_bytes()
            if path.suffix == ".tar":
                with tarfile.open(path) as tar:
                    for member in tar:
                        image = tar.extractfile(member).read()
                        found[f"{path.name}/{member.name}"] = image
                        if not member.name.endswith(".json"):
                            found[f"{path.name}/{member.name} info"] = repr(Image.open(io.BytesIO(image)).info).encode()
            elif path.suffix == ".png":
                found[f"{path.name} info"] = repr(Image.open(io.BytesIO(data)).info).encode()
    return found


def leaks(artifacts: dict[str, bytes], values: list[str]) -> list[tuple[str, str]]:
    searched = [(value, form) for value in values for form in forms(value)]
    found = []
    for name, data in artifacts.items():
        data = name.lower().encode() + b"\0" + data.lower()
        found += [(name, value) for value, form in searched if form in data]
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A source full of canaries; what `dex prepare` (twice, and once more where it stops) and `dex pretrain` leave."""
    pytest.importorskip("pydicom"), pytest.importorskip("nibabel"), pytest.importorskip("SimpleITK")
    base, canaries = tmp_path_factory.mktemp("made"), Canaries()
    root = base / canaries.name()
    for name, data in files(canaries).items():
        (root / name).parent.mkdir(parents=True)
        (root / name).write_bytes(data)
    said = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        for name, *options in (
            ("ct", "--modality", "CT", "--max-unreadable", "100"),
            ("x-ray", "--max-unreadable", "100", "--encoding", "png", "--planes", "axial", "coronal"),
            ("stopped", "--modality", "CT", "--max-unreadable", "3"),
            ("judged", "--modality", "CT", "--max-unreadable", "100"),
        ):
            private = prepare.private_folder(base / name)
            private.mkdir(mode=0o700)
            (private / "salt").write_bytes(bytes(range(32)))
            said[name] = dex_prepare(root, base / name, *options, trust=name != "judged")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        arguments = (
            "pretrain --preset demo --steps 2 --run.evaluate-every 1 --run.device cpu --run.precision fp32 "
            "--run.log-every 1 --run.checkpoint-every 1 --data.batch-size 4 --model.img-size 64 --model.embed-dim 32 "
            "--model.depth 2 --model.num-heads 2 --model.num-experts 4 --model.decoder-embed-dim 16 "
            f"--model.decoder-depth 1 --model.decoder-num-heads 2 --data {base / 'ct'} --out {base / 'run'}"
        )
        said["run"] = subprocess.run(
            [sys.executable, "-m", "dex", *arguments.split()],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
    return base, canaries, said


def test_all_ended_as_they_should(made):
    base, canaries, said = made
    assert {name: done.returncode for name, done in said.items()} == {
        "ct": 0,
        "x-ray": 0,
        "stopped": 1,
        "judged": 0,
        "run": 0,
    }, {name: done.stderr[-1500:] for name, done in said.items()}
    assert len(canaries.values) + len(canaries.names) >= 50
    for name in ("ct", "x-ray"):
        assert verify(base / name) == []
        (source,) = json.loads((base / name / "card.json").read_text())["sources"]
        assert source["kept"] >= 30 and source["refused"]["unreadable"] >= 5
        assert source["refused"]["burned-in"] == source["burned_in_declared"] == 1


def test_every_canary_is_in_the_source(made):
    """Those of damaged files may have lost theirs."""
    base, canaries, _ = made
    data = b"\0".join(path.read_bytes() for path in (base / canaries.names[0]).rglob("*") if path.is_file())
    there = [value for value in canaries.values if value.encode() in data]
    assert len(there) > 0.9 * len(canaries.values) and len(there) >= 50


def test_no_patient_data_and_no_key_in_any_artifact(made, figures):
    base, canaries, said = made
    artifacts, private = {}, {}
    for name in ("ct", "x-ray", "judged", "run"):
        artifacts |= {f"{name}: {file}": data for file, data in contents(base / name).items()}
    for name in ("ct", "x-ray", "stopped", "judged"):
        private |= {f"{name}: {file}": data for file, data in contents(base / f"{name}.private").items()}
    for name, done in said.items():
        artifacts[f"{name}: stdout"], artifacts[f"{name}: stderr"] = done.stdout.encode(), done.stderr.encode()
    assert not (base / "stopped").exists()
    kinds = ("shard-00000.tar", "card.html", "manifest.json", "metrics.jsonl", "run.json", "state.json", "tfevents")
    assert all(any(kind in name for name in artifacts) for kind in (*kinds, ".safetensors", "pictures/"))

    assert leaks(artifacts, canaries.values + canaries.names) == []
    assert leaks(private, canaries.values) == []
    # tables of paths, the listing and folder they come from, pictures left out, also of a run that was stopped
    paths = leaks(private, canaries.names)
    told = {name.split(": ")[1].split("/")[0] for name, _ in paths}
    assert {"ids", "units"} <= told <= {"ids", "units", "plan.json", "left_out.html", "left_out.json", "chunks"}
    assert leaks(artifacts | private, list(KEYS.values())) == []
    figures["row 23"] = {
        "canaries": len(canaries.values) + len(canaries.names),
        "artifacts searched": len(artifacts) + len(private),
        "bytes searched": sum(map(len, (artifacts | private).values())),
        "found": 0,
    }
    figures["row 24"] = {"keys": len(KEYS), "found": 0}


def test_the_search_finds_what_is_there(made, tmp_path):
    canaries = made[1]
    value = canaries.values[0]
    hidden = {
        "a": value.upper().encode(),
        "b": b"x" + value.encode("utf-16-le"),
        "c": hashlib.sha256(value.encode()).hexdigest().encode(),
        value: b"",
    }
    assert {name for name, _ in leaks(hidden, [value])} == set(hidden)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        data = png(canaries)
        member = tarfile.TarInfo("a.png")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    assert {found for _, found in leaks(contents(tmp_path), canaries.values)} >= set(canaries.values[-7:])
