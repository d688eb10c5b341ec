"""Which folder stands for a patient, in folders as labs have them."""

import pytest

from dex.prepare.folders import NONE, Level, Place, level_of


def level(paths, share=0.05, single=True, common=0):
    return level_of([Place(tuple(path.split("/")[:-1]), single) for path in paths], common, share)


def tree(folders, files, name="{}.png"):
    return [f"{folder}/{name.format(k)}" for folder in folders for k in range(files)]


PATIENTS = [f"patient-{k:03d}" for k in range(40)]


@pytest.mark.parametrize(
    "paths, want",
    [
        (tree(PATIENTS, 5), 0),
        (tree(["Doe^Jane", "Roe^Ann", *(f"Mc{chr(97 + k)}" for k in range(20))], 5), 0),
        ([f"{k}.png" for k in range(500)], 0),  # flat: no folder at all
        (tree([f"sub-{k:02d}/ses-{s}/anat" for k in range(20) for s in range(2)], 2), 0),
        (tree([f"{modality}/{patient}" for modality in ("CT", "mri") for patient in PATIENTS], 3), 1),
        (tree([f"{part}/{kind}" for part in ("train", "test") for kind in ("NORMAL", "PNEUMONIA")], 200), NONE),
        (tree(["imagesTr", "imagesTs"], 9), NONE),
        (tree(["benign", "malignant"], 250), NONE),
        (tree([f"kind-{chr(97 + k)}" for k in range(9)], 1000), NONE),
        (tree([f"class_{k}" for k in range(9)], 1000), NONE),
        (tree([f"video{k:02d}" for k in range(12)], 1000), 0),  # frames of numbered films
        (tree([f"2024-03-{k:02d}/{k}-{p}" for k in range(1, 20) for p in range(3)], 2), 1),
        (tree([f"2024-03-{k:02d}" for k in range(1, 20)], 4), 0),
        (tree([f"melanoma/{patient}" for patient in PATIENTS] + [f"nevus/n{patient}" for patient in PATIENTS], 200), 1),
    ],
)
def test_the_folder_of_a_patient(paths, want):
    assert level(paths) == Level(want)


def test_a_folder_below_too_few_is_taken_and_not_trusted():
    sites = tree([f"{site}/{site[-1]}{patient}" for site in ("site-a", "site-b") for patient in PATIENTS], 2)
    assert level(sites) == Level(1, sure=False)
    assert level(sites, share=0.5) == Level(0)  # half may be a site
    assert level(tree(["p1", "p2"], 9)) == Level(0)  # nothing below: `splits` will say that they are too few


def test_volumes_in_a_few_folders_are_no_classes():
    paths = tree([f"kind-{chr(97 + k)}" for k in range(9)], 1000, "{}.nii.gz")
    assert level(paths, single=False) == Level(0)


def test_folders_that_all_share_are_no_level():
    assert level(tree([f"data/img/{patient}" for patient in PATIENTS], 2), common=2) == Level(2)
    assert level(["data/img/1.png"], common=2) == Level(2)


def test_the_order_does_not_matter():
    paths = tree([f"{m}/{p}" for m in ("CT", "MR") for p in PATIENTS], 3)
    assert level(paths) == level(paths[::-1])
