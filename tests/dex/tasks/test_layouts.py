"""Files as public loaders and descriptions lay them out, and what the catalogue finds in them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dex.tasks.cases import SPLITS, check_targets, open_task, read
from dex.tasks.task import find, names

SHAPE = (16, 20)
RNG = np.random.default_rng(0)


def picture(path: Path, pixels=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (*SHAPE, 3), dtype=np.uint8) if pixels is None else pixels).save(path)


def mask(path: Path, *values: int):
    """Of each value a stripe, the rest 0."""
    pixels = np.zeros(SHAPE, np.uint8)
    for row, value in enumerate(values):
        pixels[row] = value
    picture(path, pixels)


def volume(path: Path, *values: int, mask=False):
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((10, 12, 6), np.int16) if mask else RNG.integers(-100, 300, (10, 12, 6)).astype(np.int16)
    for row, value in enumerate(values):
        pixels[row % 10, row // 10 : row // 10 + 2] = value
    nibabel.save(nibabel.Nifti1Image(pixels, np.diag([-1.0, 1.0, 2.0, 1.0])), path)


def fives(root):
    for side, count in (("train", 12), ("test", 3)):
        for i in range(1, count + 1):
            picture(root / f"FIVES A Fundus Image Dataset/{side}/Original/{i}_{'ADGN'[i % 4]}.png")
            mask(root / f"FIVES A Fundus Image Dataset/{side}/Ground truth/{i}_{'ADGN'[i % 4]}.png", 255)


def cholecseg8k(root):
    values = (50, 11, 21, 13, 12, 31, 23, 24, 25, 32, 22, 33, 5)
    for video in ("01", "09", "12", "17", "18", "20", "24", "25"):
        for frame in (80, 81):
            stem = root / f"video{video}/video{video}_00080/frame_{frame}_endo"
            picture(stem.with_name(f"{stem.name}.png"))
            mask(stem.with_name(f"{stem.name}_watershed_mask.png"), *values)
            picture(stem.with_name(f"{stem.name}_color_mask.png"))
            picture(stem.with_name(f"{stem.name}_mask.png"))


def bcss(root):
    for number, institute in enumerate(["A2", "AR", "AO", "D8", "BH", "OL", "E2", "LL"]):
        name = f"TCGA-{institute}-A0{number}X-DX1_xmin5_ymin6_MPP-0.2500.png"
        picture(root / "0_Public-data-Amgad2019_0.25MPP/rgbs_colorNormalized" / name)
        mask(root / "0_Public-data-Amgad2019_0.25MPP/masks" / name, 1, 2, 3, 4, 21, 20)


def annotations(path: Path, *names: str):
    regions = "".join(
        f'<Annotation Id="{i}"><Attributes><Attribute Name="{name}" Id="0" Value=""/></Attributes><Regions>'
        f'<Region Id="1"><Attributes/><Vertices><Vertex X="2" Y="{3 * i}"/><Vertex X="9" Y="{3 * i}"/>'
        f'<Vertex X="9" Y="{3 * i + 2}"/></Vertices></Region></Regions></Annotation>'
        for i, name in enumerate(names)
    )
    path.write_text(f'<?xml version="1.0"?>\n<Annotations MicronsPerPixel="0.25">{regions}</Annotations>')


def monusac(root):
    kinds = ("Epithelial", "Lymphocyte", "Neutrophil", "Macrophage")
    for i in range(14):
        for part, where in (
            (i < 10, "MoNuSAC_images_and_annotations"),
            (i >= 10, "MoNuSAC Testing Data and Annotations"),
        ):
            if part:
                stem = root / where / f"TCGA-AA-00{i:02d}-01Z-00-DX1" / f"TCGA-AA-00{i:02d}-01Z-00-DX1_1"
                picture(stem.with_suffix(".tif"))
                annotations(stem.with_suffix(".xml"), *kinds, *(["Ambiguous"] if i == 12 else []))


def tnbc(root):
    for slide in range(1, 12):
        for i in (1, 2):
            picture(root / f"TNBC_NucleiSegmentation/Slide_{slide:02d}/{slide:02d}_{i}.png")
            mask(root / f"TNBC_NucleiSegmentation/GT_{slide:02d}/{slide:02d}_{i}.png", 255)
            picture(root / f"__MACOSX/TNBC_NucleiSegmentation/Slide_{slide:02d}/{slide:02d}_{i}.png")


def dca1(root):
    for i in range(1, 13):
        picture(root / f"Database_134_Angiograms/{i}.pgm", RNG.integers(0, 256, SHAPE, dtype=np.uint8))
        mask(root / f"Database_134_Angiograms/{i}_gt.pgm", 255)


def feta21(root):
    for i in range(1, 11):
        stem = f"feta_2.3/sub-{i:03d}/anat/sub-{i:03d}_rec-{'mial' if i % 2 else 'irtk'}"
        volume(root / f"{stem}_T2w.nii.gz")
        volume(root / f"{stem}_dseg.nii.gz", 1, 2, 3, 4, 5, 6, 7, mask=True)


def idrid(root):
    kinds = {"1. Microaneurysms": "MA", "2. Haemorrhages": "HE", "3. Hard Exudates": "EX", "4. Soft Exudates": "SE"}
    for side, numbers in (("a. Training Set", range(1, 11)), ("b. Testing Set", range(55, 58))):
        for i in numbers:
            picture(root / f"A. Segmentation/1. Original Images/{side}/IDRiD_{i:02d}.jpg")
            truth = root / f"A. Segmentation/2. All Segmentation Groundtruths/{side}"
            for row, (folder, end) in enumerate(kinds.items()):
                if i != 4 or end != "SE":  # not every image has every lesion
                    mask(truth / folder / f"IDRiD_{i:02d}_{end}.tif", *[0] * row, 255)
            mask(truth / "5. Optic Disc" / f"IDRiD_{i:02d}_OD.tif", *[0] * 8, 255)


def scr(root):
    for i in range(1, 13):
        picture(root / f"images/JPCLN{i:03d}.png", RNG.integers(0, 256, SHAPE, dtype=np.uint8))
        parts = ("right lung", "left lung", "heart", "right clavicle", "left clavicle")
        for row, part in enumerate(parts):
            mask(root / f"fold{i % 2 + 1}/masks/{part}/JPCLN{i:03d}.gif", *[0] * row, 255)


def whs_ct(root):
    for i in range(1001, 1011):
        volume(root / f"ct_train/ct_train_{i}_image.nii.gz")
        volume(root / f"ct_train/ct_train_{i}_label.nii.gz", 205, 420, 500, 550, 600, 820, 850, mask=True)
    volume(root / "ct_test/ct_test_2001_image.nii.gz")


def kipa22(root):
    for i in range(10):
        volume(root / f"train/image/{i}.nii.gz")
        volume(root / f"train/label/{i}.nii.gz", 1, 2, 3, 4, mask=True)


def octdl(root):
    kinds = ("AMD", "DME", "ERM", "NO", "RAO", "RVO", "VID")
    lines = ["file_name,disease,subcategory,patient_id,eye"]
    for kind in kinds:
        for i in range(8):
            picture(root / f"OCTDL/{kind}/{kind.lower()}_{i}.jpg")
            lines.append(f"{kind.lower()}_{i},{kind},x,{kind}{i // 2},OD")
    (root / "OCTDL_labels.csv").write_text("\n".join(lines))


def lsc(root):
    for kind in ("CLL", "FL", "MCL"):
        for slide in range(5):
            for part in ("-R1", "-R2", ""):
                picture(root / f"{kind}/sj-{kind}-{slide}{part}_001.tif")


def pdcxr(root):
    for side, count in (("train", 6), ("val", 2), ("test", 3)):
        for i in range(count):
            picture(root / f"chest_xray/{side}/NORMAL/NORMAL-{side}{i}-0001.jpeg")
            picture(root / f"chest_xray/{side}/PNEUMONIA/BACTERIA-{side}{i}-0001.jpeg")
            picture(root / f"chest_xray/{side}/PNEUMONIA/person{side}{i}_virus_1.jpeg")


def uns(root):
    for patient in range(1, 12):
        for i in (1, 2):
            picture(root / f"train/{patient}_{i}.tif")
            mask(root / f"train/{patient}_{i}_mask.tif", 255)
    picture(root / "test/1.tif")


def fhu_hc18(root):
    outline = np.zeros(SHAPE, np.uint8)
    outline[[3, 11], 4:13] = outline[3:12, 4] = outline[3:12, 12] = 255
    for i in range(12):
        for series in ("HC", "2HC") if i < 2 else ("HC",):
            picture(root / f"training_set/{i:03d}_{series}.png", RNG.integers(0, 256, SHAPE, dtype=np.uint8))
            picture(root / f"training_set/{i:03d}_{series}_Annotation.png", outline)
    (root / "training_set_pixel_size_and_HC.csv").write_text("filename\n")


LAYOUTS = {
    **{"fives": fives, "cholecseg8k": cholecseg8k, "bcss": bcss, "monusac": monusac, "tnbc": tnbc, "dca1": dca1},
    **{"feta21": feta21, "idrid": idrid, "scr": scr, "whs-ct": whs_ct, "kipa22": kipa22, "octdl": octdl, "lsc": lsc},
    **{"pdcxr": pdcxr, "uns": uns, "fhu-hc18": fhu_hc18},
}
EXPECTED = {  # cases, patients, whether the files name the test side
    **{"fives": (15, 15, True), "cholecseg8k": (16, 8, False), "bcss": (8, 8, True), "monusac": (14, 14, True)},
    **{"tnbc": (22, 11, False), "dca1": (12, 12, False), "feta21": (10, 10, False), "idrid": (13, 13, True)},
    **{"scr": (12, 12, False), "whs-ct": (10, 10, False), "kipa22": (10, 10, False), "octdl": (56, 28, False)},
    **{"lsc": (45, 15, False), "pdcxr": (33, 33, True), "uns": (22, 11, False), "fhu-hc18": (14, 12, False)},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_found_with_patients_sides_and_classes(tmp_path, name):
    root = tmp_path / "Dàta of mine"
    LAYOUTS[name](root)
    data = open_task(name, root)
    cases, patients, sided = EXPECTED[name]
    assert len(data.cases) == cases and len({case.patient for case in data.cases}) == patients
    counts = check_targets(data)
    assert set(counts) == set(SPLITS) and all(min(count.present) > 0 for count in counts.values())
    assert sided == (not any("is drawn by patient, with seed 0" in note for note in data.notes))
    frames = read(data.cases[0], data.task)
    assert frames.images.dtype == np.uint8 and (frames.masks is None) == (data.task.kind == "classification")
    assert not list(tmp_path.glob("*.private"))  # a public task needs no salt


def test_every_known_layout_is_tested():
    assert {name for name in names() if find(name).layout.state != "unknown"} == set(LAYOUTS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_other_files_say_what_is_expected_where(tmp_path, name):
    picture(tmp_path / "somewhere/picture.png")
    message = f"expected files of {name} below .*, by .*: .*, got 1 files: somewhere/picture.png"
    with pytest.raises(ValueError, match=message):
        open_task(name, tmp_path)


def test_what_is_missing_of_a_known_layout_is_named(tmp_path):
    fives(tmp_path)
    next(tmp_path.rglob("Ground truth/3_*.png")).unlink()
    with pytest.raises(
        ValueError, match=r"mask for each image; .*test/Original/3_N.png has none at .*Ground truth/3_N.png"
    ):
        open_task("fives", tmp_path)


def test_a_mask_of_hc18_is_filled(tmp_path):
    fhu_hc18(tmp_path)
    data = open_task("fhu-hc18", tmp_path)
    assert read(data.cases[0], data.task).masks.sum() == 9 * 9


def test_regions_of_bcss_are_put_together_and_what_is_outside_is_ignored(tmp_path):
    bcss(tmp_path)
    data = open_task("bcss", tmp_path)
    masks = read(data.cases[0], data.task).masks[0]
    assert masks[:7, 0].tolist() == [1, 2, 3, 4, 5, 1, 255]
    assert {case.id.split("-")[-4] for case in data.of("test")} == {"OL", "E2", "LL"}


def test_lesions_of_idrid_that_an_image_lacks(tmp_path):
    idrid(tmp_path)
    data = open_task("idrid", tmp_path)
    (case,) = (case for case in data.cases if case.image.stem == "IDRiD_04")
    assert sorted(np.unique(read(case, data.task).masks)) == [0, 1, 2, 3, 4]


def test_masks_of_a_class_in_another_place(tmp_path):
    scr(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    for fold in ("fold1", "fold2"):
        (tmp_path / fold / "masks/heart").rename(tmp_path / "elsewhere" / fold)
    with pytest.raises(ValueError, match=r"expected masks of heart, for .*JPCLN001.png at .*got none for any of 12"):
        open_task("scr", tmp_path)


def test_a_patient_of_monusac_on_both_sides(tmp_path):
    monusac(tmp_path)
    stem = tmp_path / "MoNuSAC Testing Data and Annotations/TCGA-AA-0003-01Z-00-DX1/TCGA-AA-0003-01Z-00-DX1_2"
    picture(stem.with_suffix(".tif"))
    annotations(stem.with_suffix(".xml"), "Epithelial")
    with pytest.raises(ValueError, match=r"1 in several: TCGA-AA-0003 \(test: .*, train: .*--split draw"):
        open_task("monusac", tmp_path)
    data = open_task("monusac", tmp_path, split="draw")
    assert len({case.split for case in data.cases if "0003" in case.image.name}) == 1


def test_a_table_that_is_not_there_or_lacks_an_image(tmp_path):
    octdl(tmp_path)
    table = tmp_path / "OCTDL_labels.csv"
    text = table.read_text()
    table.write_text(text.replace("rvo_1,", "rvo_x,"))
    with pytest.raises(
        ValueError, match=r"line for each image in .*OCTDL_labels.csv, got none for OCTDL/RVO/rvo_1.jpg"
    ):
        open_task("octdl", tmp_path)
    table.unlink()
    with pytest.raises(ValueError, match="expected the table OCTDL_labels.csv of octdl"):
        open_task("octdl", tmp_path)


def test_a_task_of_unknown_layout_takes_ones_own_forms(tmp_path):
    for i in range(12):
        picture(tmp_path / f"images/{i}.png")
        mask(tmp_path / f"masks/{i}.png", 255)
    data = open_task("dias", tmp_path, classes=["brain artery=nonzero"])
    assert data.task.name == "dias" and len(data.cases) == 12 and data.cases[0].id.startswith("dias/images/")
    with pytest.raises(ValueError, match="classes: expected those of dias, brain artery, got vessel"):
        open_task("dias", tmp_path, classes=["vessel=nonzero"])
    with pytest.raises(ValueError, match="expected labels for tn5000, a classification task, got masks"):
        open_task("tn5000", tmp_path)


def test_overlap_with_pretraining_is_said(tmp_path):
    fhu_hc18(tmp_path)
    assert "overlap with the pretraining corpus: HC18" in open_task("fhu-hc18", tmp_path).notes[0]


def test_the_folder_of_a_task_in_the_environment(tmp_path, monkeypatch):
    dca1(tmp_path / "dca1")
    monkeypatch.setenv("DEX_TASKS", str(tmp_path))
    assert len(open_task("dca1").cases) == 12
    monkeypatch.delenv("DEX_TASKS")
    with pytest.raises(ValueError, match=r"data: expected the folder of the data of dca1, got none, and \$DEX_TASKS"):
        open_task("dca1")
