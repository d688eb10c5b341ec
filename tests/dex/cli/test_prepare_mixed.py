"""A folder as a hospital has it, with files of every kind: each image ends with its own modality, all else by name."""

import json
import shlex
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from dex.data import ShardDataset

pydicom = pytest.importorskip("pydicom")
nibabel = pytest.importorskip("nibabel")
cv2 = pytest.importorskip("cv2")

from pydicom.dataset import FileDataset, FileMetaDataset  # noqa: E402

ROOT = "1.2.840.10008.5.1.4.1.1."
SIDE = 64
ORIGINAL = ("ORIGINAL", "PRIMARY")
NAME = "Doe^Jane"  # also in series descriptions


@pytest.fixture
def run(run, inline_workers):
    return run


def picture(seed, side=SIDE):
    """Float [side, side] within 0 and 1: soft blobs and a little noise, no two seeds alike."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    image = 0.1 + 0.2 * x
    for _ in range(8):
        cy, cx, r = rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8), rng.uniform(0.1, 0.3)
        image = image + rng.uniform(0.1, 0.3) / (1 + np.exp((np.hypot(x - cx, y - cy) - r) * 40))
    image = image + rng.normal(0, 0.02, image.shape)
    return ((image - image.min()) / np.ptp(image)).astype(np.float64)


class Folder:
    """Writes files and remembers what must become of each: a modality, or the reason it is left out."""

    def __init__(self, root):
        self.root = root
        self.modality: dict[str, str] = {}  # of units
        self.slices: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self._seed = 0

    def place(self, path):
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        self._seed += 1
        return target, self._seed

    def expect(self, path, modality="", slices=1, reason=""):
        if reason:
            self.reasons[reason] += 1
        else:
            self.modality[path] = modality
            self.slices[modality] += slices

    def dicom(self, path, kind, modality, *image_type, series, z=None, truth="", reason="", frames=0, **elements):
        target, seed = self.place(path)
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = ROOT + kind
        meta.MediaStorageSOPInstanceUID = f"1.2.9.{seed}"
        meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        data = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        data.SeriesInstanceUID, data.StudyInstanceUID = f"1.2.3.{series}", "1.2.3"
        data.PatientName, data.PatientID = NAME, path.split("/")[0]
        data.Modality = modality
        data.SeriesDescription = f"{NAME} {elements.pop('SeriesDescription', '')}"
        if image_type:
            data.ImageType = list(image_type)
        if z is not None:
            data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, z], [1, 0, 0, 0, 1, 0]
            data.PixelSpacing, data.SliceThickness, data.InstanceNumber = [1, 1], 2, int(z) + 1
        if elements.pop("pixels", True):
            pixels = np.stack([picture(1000 * seed + number) for number in range(max(1, frames))])
            colour = elements.get("PhotometricInterpretation", "").startswith("RGB")
            if colour:
                pixels = np.repeat((pixels * 255).astype(np.uint8)[..., None], 3, axis=-1)
                data.SamplesPerPixel, data.PlanarConfiguration = 3, 0
            else:
                pixels = (pixels * 1000).astype(np.uint16)
                data.SamplesPerPixel = 1
            data.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
            if frames:
                data.NumberOfFrames = frames
            data.Rows = data.Columns = SIDE
            data.BitsAllocated = data.BitsStored = 8 * pixels.itemsize
            data.HighBit, data.PixelRepresentation = data.BitsStored - 1, 0
            data.PixelData = pixels.tobytes()
        if modality == "CT":
            data.RescaleSlope, data.RescaleIntercept, data.RescaleType = 1, -500, "HU"
        for name, value in elements.items():
            setattr(data, name, value)
        data.save_as(target, enforce_file_format=True)
        self.expect(path.rpartition("/")[0], truth, max(1, frames), reason)

    def nifti(self, path, values, truth="", reason="", intent=0):
        target, _ = self.place(path)
        image = nibabel.Nifti1Image(values, np.diag([1, 1, 2, 1]))
        image.header.set_intent(intent)
        nibabel.save(image, target)
        self.expect(path, truth, values.shape[2], reason)

    def picture(self, path, pixels, truth="", reason=""):
        target, _ = self.place(path)
        Image.fromarray(pixels).save(target)
        self.expect(path, truth, 1, reason)

    def film(self, path, truth):
        target, seed = self.place(path)
        writer = cv2.VideoWriter(str(target), cv2.VideoWriter_fourcc(*"MJPG"), 25, (SIDE, SIDE))
        for number in range(31):
            frame = (picture(1000 * seed + number) * 255).astype(np.uint8)
            writer.write(np.repeat(frame[..., None], 3, axis=2))
        writer.release()
        self.expect(path, truth, 2)


def dicom_files(folder):
    for z in range(12):
        folder.dicom(f"p1/ct/{z}", "2", "CT", *ORIGINAL, "AXIAL", series=1, z=2 * z, truth="CT")
        folder.dicom(f"p1/mr/{z}", "4", "MR", *ORIGINAL, "M", "ND", series=2, z=2 * z, truth="MR")
        folder.dicom(f"p3/pet/{z}.dcm", "128", "PT", *ORIGINAL, series=3, z=2 * z, truth="PET", Units="BQML")
    for n in range(4):
        folder.dicom(f"p1/cr/{n}", "1", "CR", *ORIGINAL, series=4, truth="X-ray")
        folder.dicom(f"p2/mg/{n}", "1.2", "MG", *ORIGINAL, series=5, truth="X-ray")
        folder.dicom(
            f"p2/us/{n}", "6.1", "US", *ORIGINAL, series=6, truth="ultrasound", PhotometricInterpretation="RGB"
        )
        folder.dicom(f"p2/op/{n}", "77.1.5.1", "OP", series=7, truth="fundus", PhotometricInterpretation="RGB")
        folder.dicom(
            f"p2/xc/{n}", "77.1.4", "XC", series=8, truth="clinical photography", PhotometricInterpretation="RGB"
        )
        # what lies among the images of a series
        folder.dicom(f"p1/ct/loc{n}", "2", "CT", *ORIGINAL, "LOCALIZER", series=1, reason="localizer")
        folder.dicom(f"p1/ct/shot{n}", "7", "CT", "DERIVED", "SECONDARY", series=9, reason="secondary capture")
        folder.dicom(f"p1/mr/adc{n}", "4", "MR", "DERIVED", "PRIMARY", "ADC", series=2, z=2 * n, reason="derived map")
        folder.dicom(f"p1/mr/p{n}", "4", "MR", *ORIGINAL, "P", "ND", series=10, z=2 * n, reason="derived map")
    folder.dicom("p2/cine/0", "3.1", "US", *ORIGINAL, series=11, truth="ultrasound", frames=5)
    for n, (reason, kind, modality, image_type, elements) in enumerate(
        [
            ("localizer", "4", "MR", (*ORIGINAL, "M"), {"SeriesDescription": "localizer"}),
            ("screenshot", "2", "CT", ("DERIVED", "SECONDARY", "SCREEN SAVE"), {}),
            ("dose report", "7", "CT", ("DERIVED", "SECONDARY", "DOSE_INFO"), {}),
            ("dose report", "88.67", "SR", (), {"pixels": False}),
            ("structured report", "88.33", "SR", (), {"pixels": False}),
            ("key object selection", "88.59", "KO", (), {"pixels": False}),
            ("presentation state", "11.1", "PR", (), {"pixels": False}),
            ("encapsulated document", "104.1", "DOC", (), {"pixels": False}),
            ("waveform", "9.1.1", "ECG", (), {"pixels": False}),
            ("segmentation", "66.4", "SEG", ("DERIVED", "PRIMARY"), {}),
            ("radiotherapy object", "481.2", "RTDOSE", (), {}),
            ("radiotherapy object", "481.3", "RTSTRUCT", (), {"pixels": False}),
            ("projection", "4", "MR", ("DERIVED", "SECONDARY", "PROJECTION IMAGE"), {}),
            ("rendering", "2", "CT", ("DERIVED", "SECONDARY", "AXIAL"), {"PhotometricInterpretation": "RGB"}),
            ("for processing", "1.2.1", "MG", ORIGINAL, {}),
            ("whole slide", "77.1.6", "SM", ORIGINAL, {}),
            ("unknown modality", "20", "NM", ORIGINAL, {}),
            ("unknown modality", "481.1", "RTIMAGE", ORIGINAL, {}),
            ("contradictory header", "4", "CT", ORIGINAL, {}),
            ("contradictory header", "2", "MR", ORIGINAL, {}),
        ]
    ):
        folder.dicom(f"p4/other/{n}", kind, modality, *image_type, series=100 + n, reason=reason, **elements)


def other_files(folder):
    volume = np.stack([picture(5000 + k) for k in range(8)], axis=2)
    labels = np.zeros(volume.shape, np.uint8)
    labels[10:40, 20:50, 2:7], labels[15:25, 25:35, 3:6] = 1, 2
    atlas = np.kron(np.arange(64).reshape(8, 8), np.ones((8, 8))).astype(np.int16)
    tissue = np.where(volume > 0.4, volume / volume.max(), 0).astype(np.float32)
    folder.nifti("mri/p5/t1.nii.gz", (volume * 900).astype(np.int16), truth="MR")
    folder.nifti("mri/p5/t1_seg.nii.gz", labels, reason="label map")
    folder.nifti("mri/p5/regions.nii", np.repeat(atlas[..., None], 8, axis=2), reason="label map")
    folder.nifti("mri/p5/declared.nii", (volume * 9).astype(np.int16), reason="label map", intent=1002)
    folder.nifti("mri/p5/wm.nii.gz", tissue, reason="probability map")
    folder.nifti("labelsTr/p5.nii.gz", labels, reason="label map")  # of no modality, and needs none
    for n in range(6):
        colour = np.stack([picture(6000 + 3 * n + c) for c in range(3)], axis=2)
        colour = (colour * 255).astype(np.uint8)
        folder.picture(f"p6/Dermoscopy/{n}.jpg", colour, truth="clinical photography")
        folder.picture(f"p6/Endoscopy/{n}.png", np.roll(colour, 9, axis=0)[::-1].copy(), truth="endoscopy")
    folder.picture("p6/Endoscopy/0_mask.png", labels[:, :, 4] * np.uint8(100), reason="label map")
    folder.film("p7/echo/a.avi", truth="ultrasound")


@pytest.fixture
def mixed(tmp_path):
    folder = Folder(tmp_path / "scans")
    dicom_files(folder)
    other_files(folder)
    return folder


def kept(out):
    """Unit -> modality, of every image kept."""
    dataset = ShardDataset(out)
    modalities = dataset.modality_index()
    ids = {}
    for path in (out.parent / f"{out.name}.private" / "ids").iterdir():
        for row in map(json.loads, path.read_text().splitlines()):
            if "refused" not in row:
                ids[row["id"]] = row["path"]
    return Counter(
        (ids[dataset.sample_id(number)], dataset.modalities[int(modalities[number])]) for number in range(len(dataset))
    )


def refused(out):
    rows = []
    for path in (out.parent / f"{out.name}.private" / "ids").iterdir():
        rows += [row for row in map(json.loads, path.read_text().splitlines()) if "refused" in row]
    return Counter(row["refused"] for row in rows)


def test_a_mixed_folder_ends_in_right_labels_and_named_refusals(mixed, run, tmp_path):
    code, out, err = run("prepare", "scans", "--out", "set", "--size", SIDE)
    assert (code, out) == (2, "") and not (tmp_path / "set").exists()
    assert "6 .jpg" in err and "6 .png" in err and "1 .avi" in err and "2 .nii, 2 .nii.gz" in err
    command = err.splitlines()[-1]
    assert command == "dex prepare scans --out set --size 64 --modality from-folders"
    code, out, err = run(*shlex.split(command)[1:])
    assert (code, err) == (0, "")
    wrong = {unit: modality for unit, modality in kept(tmp_path / "set") if mixed.modality.get(unit) != modality}
    assert wrong == {}
    assert refused(tmp_path / "set") == mixed.reasons
    images = Counter()
    for (_, modality), count in kept(tmp_path / "set").items():
        images[modality] += count
    assert images == mixed.slices
    card = json.loads((tmp_path / "set" / "card.json").read_text())
    by_modality = {row["modality"]: row for row in card["sources"]}
    assert {modality: row["kept"] for modality, row in by_modality.items()} == mixed.slices
    assert by_modality["MR"]["normalisation"] == "mr" and by_modality["PET"]["normalisation"] == "pet"
    left_out = Counter(card["left_out"][0]["refused"])
    for row in card["sources"]:
        left_out.update(row["refused"])
    assert left_out == mixed.reasons
    page = (tmp_path / "set" / "card.html").read_text()
    assert 'id="left-out"' in page and "secondary capture" in page and "label map" in page
    assert f"note: {mixed.reasons['label map']} label maps are left out" in out
    for text in (page, out, (tmp_path / "set.private" / "log.jsonl").read_text(), json.dumps(card)):
        assert "Jane" not in text


def test_headers_that_contradict_the_modality_given_are_left_out(mixed, run, tmp_path):
    command = ("prepare", "scans", "--modality", "mri", "--files", "p*/**", "--out", "set", "--size", SIDE)
    code, out, _ = run(*command)
    assert code == 0
    counts = refused(tmp_path / "set")
    slices = {unit: count for (unit, _), count in kept(tmp_path / "set").items()}
    assert slices.pop("p1/mr") == 12
    assert {path.rpartition("/")[0] for path in slices} == {"p7/echo"}  # a film without colour, as was said
    # CT, PET, X-ray, ultrasound, fundus and photographs by headers; pictures by their folders
    assert counts["another modality"] == 12 + 12 + 8 + 5 + 4 + 4 + 13
    assert f"note: {counts['another modality']} files are left out: their headers or folders say another" in out
    del counts["another modality"]
    assert counts + Counter({"label map": 5, "probability map": 1}) == mixed.reasons


def test_pictures_that_contradict_the_modality_given_are_left_out(run, pictures, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "scans" / "a").mkdir(parents=True)
    for n in range(4):
        colour = np.stack([picture(10 * n + c) for c in range(3)], axis=2) * 255
        Image.fromarray(colour.astype(np.uint8)).save(tmp_path / "scans" / "a" / f"photo{n}.png")
        grey = np.repeat((picture(70 + n) * 255).astype(np.uint8)[..., None], 3, axis=2)
        grey[2:6, 2:30] = 255, 0, 0  # a mark, and a tint
        grey[..., 2] = np.clip(grey[..., 2] * 0.95 + rng.integers(0, 4), 0, 255)
        Image.fromarray(grey).save(tmp_path / "scans" / "a" / f"scan{n}.png")
    pictures(tmp_path / "scans" / "Dermoscopy", 2)
    pictures(tmp_path / "scans" / "photos", 3, first=9)
    code, _, _ = run("prepare", "scans", "--modality", "MR", "--out", "set", "--size", SIDE)
    assert code == 0 and refused(tmp_path / "set") == {"rendering": 4, "another modality": 2}
    assert sum(kept(tmp_path / "set").values()) == 4 + 3
    code, _, _ = run("prepare", "scans", "--modality", "MR", "--trust", "--out", "all", "--size", SIDE)
    assert code == 0 and sum(kept(tmp_path / "all").values()) == 13
    code, _, _ = run("prepare", "scans", "--pattern", "MR=**/*.png", "--out", "named", "--size", SIDE)
    assert code == 0 and refused(tmp_path / "named") == {"rendering": 4}


def test_what_neither_header_nor_folder_says_ends_with_the_command_to_give(run, pictures, tmp_path):
    pictures(tmp_path / "scans", 3)
    code, out, err = run("prepare", "scans", "--out", "a set", "--modality", "auto")
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert lines[0].startswith(
        "dex prepare: folder: expected files whose modality a header or the command names, got 3"
    )
    assert lines[2] == "dex prepare scans --out 'a set' --modality auto --pattern 'MODALITY=**/*.png'"
    assert lines[4] == "dex prepare scans --out 'a set' --modality from-folders"
    assert not list(tmp_path.glob("a set*"))
    for modality in ("X-ray", "dx"):
        again = shlex.split(lines[2].replace("MODALITY", modality))[1:]
        again[again.index("a set")] = modality
        code, out, err = run(*again, "--size", SIDE)
        assert (code, err) == (0, "") and ShardDataset(tmp_path / modality).modalities == ("X-ray",)
    code, out, err = run("prepare", "scans", "--out", "b", "--modality", "from-folders")
    assert code == 2 and "--modality from-folders --pattern 'MODALITY=**/*.png'" in err
    assert "the same command" in err and err.count("dex prepare scans") == 1
    code, _, err = run("prepare", "scans", "--out", "b", "--modality", "MR", "--pattern", "CT=*.png")
    assert code == 2 and "pattern: expected --modality auto or from-folders with it, got 'MR'" in err


def test_a_command_that_is_suggested_changes_no_modality_that_a_folder_says(run, pictures, tmp_path):
    pictures(tmp_path / "scans" / "fundus", 3)
    pictures(tmp_path / "scans", 2, first=10)
    asked = ("prepare", "scans", "--size", SIDE, "--modality", "from-folders", "--out")
    code, _, err = run(*asked, "set")
    command = next(line for line in err.splitlines() if "MODALITY=" in line)
    assert code == 2 and command.endswith("--modality from-folders --pattern 'MODALITY=*/*.png'")
    code, _, err = run(*shlex.split(command.replace("MODALITY", "X-ray"))[1:])
    assert (code, err) == (0, "") and ShardDataset(tmp_path / "set").modality_counts() == {"X-ray": 2, "fundus": 3}
    pictures(tmp_path / "scans" / "other", 2, first=20)
    code, _, err = run(*asked, "b")
    assert code == 2 and "a suffix and a depth do not separate those with .png from files whose folders" in err
    assert "the folder of each: --pattern 'MODALITY=FOLDER/*'" in err and err.count("MODALITY=") == 1
    ways = ("--pattern", "X-ray=*/*.png", "--pattern", "X-ray=other/*/*.png")
    code, _, err = run(*asked, "b", *ways)
    assert (code, err) == (0, "") and ShardDataset(tmp_path / "b").modality_counts() == {"X-ray": 4, "fundus": 3}


def test_a_modality_of_ones_own_and_one_that_is_trusted(mixed, run, tmp_path):
    scintigraphy = ("prepare", "scans", "--files", "p4/**", "--modality", "scintigraphy", "--normalisation", "mr")
    code, _, _ = run(*scintigraphy, "--out", "own", "--size", SIDE)
    assert code == 0 and set(kept(tmp_path / "own")) == {("p4/other", "scintigraphy")}
    assert sum(kept(tmp_path / "own").values()) == 2  # nuclear medicine and a radiotherapy image
    code, _, _ = run("prepare", "scans", "--files", "p1/ct/**", "--modality", "MR", "--trust", "--out", "all")
    assert code == 0 and sum(kept(tmp_path / "all").values()) == 20 and not refused(tmp_path / "all")


def test_a_dry_run_promises_what_the_run_then_does(mixed, run, tmp_path):
    """Modalities, slices, patients and what headers leave out are exact; label maps by their numbers are estimated."""
    (tmp_path / "scans" / "notes.txt").write_text(NAME)
    (tmp_path / "scans" / "link").symlink_to("p1")
    command = ("scans", "--modality", "from-folders", "--size", SIDE)
    code, out, err = run("data", "inventory", *command, "--out", "page")
    assert code == 0 and not (tmp_path / "set").exists()
    (inventory,) = json.loads((tmp_path / "page" / "inventory.json").read_text())
    code, _, _ = run("prepare", *command, "--out", "set")
    assert code == 0
    card = json.loads((tmp_path / "set" / "card.json").read_text())

    exact = inventory["exact"]
    by_pixels = Counter({"label map": 4, "probability map": 1})  # the fifth label map is declared
    left_out = Counter()
    for row in exact["left_out"]:
        left_out[row["reason"]] += row["count"]
    assert left_out + by_pixels == mixed.reasons == refused(tmp_path / "set")
    slices = Counter()
    for row in exact["images"]:
        named = row["named_like_label_maps"] or row["modality"] == "" or row["format"] == "nifti"
        slices[row["modality"]] += 0 if named else row["slices"]
    assert slices + Counter({"MR": 8, "": 0}) == mixed.slices
    assert exact["passed_over"] == {".txt": 1, "symbolic links": 1} and exact["undetermined"] == []
    estimate = inventory["estimate"]
    assert 0.8 * card["images"] <= estimate["kept"] <= 1.2 * card["images"]
    assert {row["format"] for row in estimate["rates"]} == {"dicom", "nifti", "picture", "video"}
    page = (tmp_path / "page" / "inventory.html").read_text()
    for text in (out, err, page, json.dumps(inventory)):
        assert not any(word in text for word in ("Jane", "p1", "Dermoscopy", "t1_seg", "notes"))
    assert "Content-Security-Policy" in page and "secondary capture" in page and "symbolic links" in out


def test_a_dry_run_lists_what_it_cannot_place_and_ends_with_the_command(mixed, run, tmp_path):
    code, out, err = run("prepare", "scans", "--dry-run", "--size", SIDE)
    assert code == 2 and "unknown" in out and "secondary capture" in out
    assert "6 .jpg" in err and err.splitlines()[-1] == "dex prepare scans --dry-run --size 64 --modality from-folders"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scans"]
    code, out, err = run(*shlex.split(err.splitlines()[-1])[1:])
    assert code == 0 and "unknown, named like label maps" in out and "Estimate" in out
