"""The labelled images of `scripts/real_tasks.py`, cut from packages that the catalogue of `dex prepare` pins by hash.

    DATA/NAME.yaml                    a fold, a task of `dex finetune`
    DATA/NAME/{train,val,test}/...    its images and masks; the name before "~" is the patient

A fold is tested on series that it was not trained on. ``val`` has every fifth slice of the training series. It only
chooses a checkpoint: since its neighbours are in ``train``, its scores are not a result.
"""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import yaml
from PIL import Image

from dex.common import atomic
from dex.data import open_dataset
from dex.data.dataset import EMBEDDED
from dex.prepare import packages, readers, sources

ROOT = "totalsegmentator-2.18.0"
FILES = f"{ROOT}/tests/reference_files"
LEAST_ML = 20.0
"""Volume that a structure must have in both series to be a class of `ct-organs`."""
LEAST_VOXELS = 150
"""Voxels that a structure must have in both slabs to be a class of `mr-slab`."""
VAL_EVERY = 5
"""One of this many slices of a training volume is for validation, so that it contains each class."""
SHOWN = 160
"""Minimum number of training images of an epoch: fewer are repeated, so that epochs have similar lengths."""
GAP = 2
"""Slices (2 mm or more) between the two slabs of the MR."""
LEFT_OUT = ("ts-aorta", "ts-abdomen", "ts-dicom", "ts-mr", "nuclei-he")
"""Origins in the embedded set that tasks use, and that are left out of the pretraining of these runs."""
BASE = {"public": True, "url": "https://pypi.org/project/totalsegmentator/2.18.0/", "licence": "Apache-2.0"}
MODEL_LABELS = "The labels are the output of a model (TotalSegmentator), not of experts."


class Series(NamedTuple):
    """A volume with its label map, both ``[I, J, K]`` with K upwards, or a DICOM series with its label map."""

    name: str
    labels: np.ndarray
    affine: np.ndarray
    values: np.ndarray | None
    """None: the slices are ``files``."""
    files: tuple[Path, ...] = ()

    @property
    def voxel_ml(self) -> float:
        return abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000


class Fold(NamedTuple):
    name: str
    """Name of its YAML file and folder."""
    task: str
    """The task that it is a fold of."""
    images: int
    """Number of training images."""


def build(out: Path, cache: Path) -> list[Fold]:
    """All folds, created unless they exist."""
    index = out / "folds.json"
    if not index.is_file():
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        folds = [*_ct(out, cache), *_mr(out, cache), *_nuclei(out, cache), *_modality(out), *_planes(out)]
        atomic.write(index, json.dumps([fold._asdict() for fold in folds], indent=1) + "\n")
    return [Fold(**fold) for fold in json.loads(index.read_text(encoding="utf-8"))]


def without_sources(out: Path) -> Path:
    """A copy of the embedded shard set without `LEFT_OUT`."""
    from dex.data import shard_rewrite

    if not (out / "manifest.json").is_file():
        removed = frozenset(entry["id"] for entry in _embedded() if entry["origin"] in LEFT_OUT)
        with atomic.writing_folder(out) as folder:
            shutil.copytree(EMBEDDED, folder, dirs_exist_ok=True)
            shard_rewrite.carry_out(folder, shard_rewrite.plan(folder, removed, {}, "2026-11-30"))
    return out


def _package(source: str) -> packages.Package:
    return sources.read_source(sources.shipped()[source]).package


def _unpacked(cache: Path) -> Path:
    patterns = [f"{FILES}/{name}" for name in ("*.nii.gz", "example_ct_dicom/*", "aorta_report/**/*.nii.gz")]
    patterns.append(f"{ROOT}/totalsegmentator/map_to_binary.py")
    return packages.unpack(_package("totalsegmentator-ct-abdomen"), patterns, cache)


def _class_maps(root: Path) -> dict[str, dict[int, str]]:
    """The package's own table of label numbers; it is parsed, not executed."""
    text = (root / ROOT / "totalsegmentator/map_to_binary.py").read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "class_map":
            return ast.literal_eval(node.value)
    raise ValueError(f"class_map: expected a table in {root / ROOT}, got none")


def _nifti(path: Path, labels: np.ndarray | Path, name: str) -> Series:
    """A volume with K upwards."""
    image = nibabel.load(path)
    if isinstance(labels, Path):
        labels = np.asarray(nibabel.load(labels).dataobj)
    if image.affine[2, 2] <= 0 or labels.shape != image.shape:
        raise ValueError(f"{path}: expected ascending slices, and labels of {image.shape}, got {labels.shape}")
    return Series(name, labels.astype(np.uint8), image.affine, np.asarray(image.dataobj))


def _dicom(folder: Path, labels: Path, name: str) -> Series:
    (stack,) = readers.read(sorted(folder.iterdir()), "dicom", decide=None)
    image = nibabel.load(labels)
    files = tuple(folder / file for file, _ in stack.origins)
    if image.affine[2, 2] <= 0 or image.shape != (stack.shape[1], stack.shape[0], len(files)):
        raise ValueError(f"{labels}: expected the grid of the series with ascending slices, got {image.shape}")
    return Series(name, np.asarray(image.dataobj).astype(np.uint8), image.affine, None, files)


def _ct(out: Path, cache: Path) -> Iterator[Fold]:
    root = _unpacked(cache)
    files, names = root / FILES, _class_maps(root)["total"]
    abdomen = _nifti(files / "example_ct.nii.gz", files / "example_seg_fast_force_split.nii.gz", "abdomen")
    series = _dicom(files / "example_ct_dicom", files / "example_seg_dicom.nii.gz", "dicom")
    shared = [
        value for value in names if min((s.labels == value).sum() * s.voxel_ml for s in (abdomen, series)) >= LEAST_ML
    ]
    note = f"Two CT series, each tested on after training on the other. {MODEL_LABELS} "
    note += "That the series are of different patients is not verified."
    classes = {names[value]: (value,) for value in shared}
    yield from _leave_one_out(out, "ct-organs", "CT", [abdomen, series], classes, note)
    numbers = {name: value for value, name in names.items()}
    models = files / "aorta_report/test_result/models"
    thorax_labels = np.zeros(nibabel.load(models / "ct_cropped.nii.gz").shape, np.uint8)
    for name in ("aorta", "vertebrae_T12"):
        thorax_labels[np.asarray(nibabel.load(models / f"{name}.nii.gz").dataobj) > 0] = numbers[name]
    thorax = _nifti(models / "ct_cropped.nii.gz", thorax_labels, "thorax")
    classes = {name: (numbers[name],) for name in ("aorta", "vertebrae_T12")}
    note = note.replace("Two CT series, each tested on after training on the other.", "Three CT series, leave one out.")
    yield from _leave_one_out(out, "ct-aorta", "CT", [abdomen, series, thorax], classes, note)


def _mr(out: Path, cache: Path) -> Iterator[Fold]:
    root = _unpacked(cache)
    files, names = root / FILES, _class_maps(root)["total_mr"]
    whole = _nifti(files / "example_mr_sm.nii.gz", files / "example_seg_mr.nii.gz", "mr")
    half = (whole.labels.shape[2] - GAP) // 2
    depth = whole.labels.shape[2]
    slabs = [_slices(whole, range(half), "lower"), _slices(whole, range(half + GAP, depth), "upper")]
    shared = [v for v in names if min(int((slab.labels == v).sum()) for slab in slabs) >= LEAST_VOXELS]
    note = f"Two slabs of ONE MR of one subject, {GAP} slices apart: no result about other subjects. {MODEL_LABELS}"
    yield from _leave_one_out(out, "mr-slab", "MR", slabs, {names[v]: (v,) for v in shared}, note)


def _slices(series: Series, numbers: Sequence[int], name: str) -> Series:
    """Some of the slices, with an affine that spaces them evenly from the first to the last."""
    numbers, affine = list(numbers), series.affine.copy()
    affine[:3, 3] += affine[:3, 2] * numbers[0]
    affine[:3, 2] *= (numbers[-1] - numbers[0]) / max(1, len(numbers) - 1) or 1
    values = None if series.values is None else series.values[:, :, numbers]
    files = tuple(series.files[number] for number in numbers) if series.files else ()
    return Series(name, series.labels[:, :, numbers], affine, values, files)


def _leave_one_out(
    out: Path, task: str, modality: str, series: Sequence[Series], classes: Mapping[str, Sequence[int]], note: str
) -> Iterator[Fold]:
    """A fold for each series, which is its test set."""
    for tested in series:
        folder = out / f"{task}-{tested.name}"
        count = 0
        for part in series:
            if part is tested:
                _write(folder / "test", part, f"{part.name}~0", classes)
                continue
            numbers = range(part.labels.shape[2])
            val = numbers[VAL_EVERY // 2 :: VAL_EVERY]
            train = [number for number in numbers if number not in val]
            _write(folder / "val", _slices(part, val, part.name), f"{part.name}-val~0", classes)
            for copy in range(-(-SHOWN // (len(train) * (len(series) - 1)))):
                _write(folder / "train", _slices(part, train, part.name), f"{part.name}~{copy}", classes)
            count += len(train)
        values = {"kind": "segmentation", "modality": modality, "metric": "dice", "plane": "axial"}
        values |= {"classes": list(classes), "title": f"{task}, tested on {tested.name}", "note": note, **BASE}
        rule = {"mask": "{split}/masks/{series}~{copy}.nii.gz", "split": "{split}", "patient": "{series}"}
        images = "{split}/images/{series}~{copy}"
        rules = [{"image": f"{images}.nii.gz", **rule}, {"image": images, **rule}]
        yield _fold(folder, task, count, values, rules)


def _write(side: Path, series: Series, name: str, classes: Mapping[str, Sequence[int]]) -> None:
    for kind in ("images", "masks"):
        (side / kind).mkdir(parents=True, exist_ok=True)
    mask = np.zeros(series.labels.shape, np.uint8)
    for number, values in enumerate(classes.values(), 1):
        mask[np.isin(series.labels, values)] = number
    nibabel.save(nibabel.Nifti1Image(mask, series.affine), side / f"masks/{name}.nii.gz")
    if series.values is None:
        (side / f"images/{name}").mkdir()
        for file in series.files:
            shutil.copyfile(file, side / f"images/{name}/{file.name}.dcm")
        return
    values = series.values.astype(np.int16)
    if not np.array_equal(values, series.values):
        raise ValueError(f"{series.name}: expected 16-bit integers, got values outside their range or fractions")
    nibabel.save(nibabel.Nifti1Image(values, series.affine), side / f"images/{name}.nii.gz")


def _nuclei(out: Path, cache: Path) -> Iterator[Fold]:
    """The left and the right half of one picture, in tiles."""
    patterns = ["stardist/data/images/img2d.tif", "stardist/data/images/mask2d.tif"]
    root = packages.unpack(_package("stardist-pathology-nuclei-fluorescence"), patterns, cache)
    image, mask = (_tiff(root / name) for name in patterns)
    if int(image.max()) > 255:
        raise ValueError(f"img2d: expected 8-bit values, got a maximum of {image.max()}")
    image, mask = image.astype(np.uint8), (mask > 0).astype(np.uint8)
    side = 120
    halves = {"left": (0, 120), "right": (272, 392)}
    note = "Two halves of ONE fluorescence image, 32 pixels apart: no result about other images. Not H&E."
    for tested in halves:
        folder, count = out / f"nuclei-{tested}", 0
        for half, columns in halves.items():
            for row in range(4):
                for left in columns:
                    place = np.s_[row * 128 : row * 128 + side, left : left + side]
                    split = "test" if half == tested else "val" if row == 3 else "train"
                    count += split == "train"
                    name = f"{half}{'-val' if split == 'val' else ''}~{row}-{left}"
                    for kind, array in (("images", image), ("masks", mask)):
                        (folder / split / kind).mkdir(parents=True, exist_ok=True)
                        for copy in range(-(-SHOWN // 6) if split == "train" else 1):
                            file = folder / split / kind / f"{name}-{copy}.png"
                            Image.fromarray(np.ascontiguousarray(array[place])).save(file)
        values = {"kind": "segmentation", "modality": "pathology", "metric": "dice", "classes": ["nucleus"]}
        values |= {"title": f"nuclei in fluorescence, tested on the {tested} half", "note": note, "public": True}
        values |= {"licence": "BSD-3-Clause", "url": "https://pypi.org/project/stardist/0.9.2/"}
        rule = {"image": "{split}/images/{half}~{tile}.png", "mask": "{split}/masks/{half}~{tile}.png"}
        yield _fold(folder, "nuclei", count, values, [{**rule, "split": "{split}", "patient": "{half}"}])


def _tiff(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def _modality(out: Path) -> Iterator[Fold]:
    """The embedded images, trained and tested on different origins."""
    note = "Images by origin: none of the origins that are tested on is trained on. The training images are in the "
    note += "pretraining set too, without labels."
    test = [entry for entry in _embedded() if entry["split"] == "val" and entry["modality"] in _SHARED]
    train = [entry for entry in _embedded() if entry["split"] == "train" and entry["modality"] in _SHARED]
    held = {"CT": "ts-brain-atlas", "MR": "nibabel-epi", "X-ray": "angiogram", "ultrasound": "lymph-node"}
    sides = {entry["id"]: "val" if held[entry["modality"]] == entry["origin"] else "train" for entry in train}
    sides |= {entry["id"]: "test" for entry in test}
    chosen = [*train, *test]
    yield _classification(out, "modality", chosen, {e["id"]: e["modality"] for e in chosen}, sides, note, "")


_SHARED = ("CT", "MR", "X-ray", "ultrasound")
"""Modalities with origins on both sides of the split of the embedded set."""


def _planes(out: Path) -> Iterator[Fold]:
    """Axial, coronal or sagittal slices of volumes; each body CT is the test set once."""
    note = (
        "Slices of volumes: the volume that is tested on is not trained on. Those of the head are in the pretraining "
    )
    note += "set too, without labels."
    volumes = ("ts-aorta", "ts-abdomen", "ts-brain-atlas", "mni-t1")
    entries = [entry for entry in _embedded() if entry["origin"] in volumes]
    planes = {entry["id"]: entry["view"].partition("-")[0] for entry in entries}
    for tested in volumes[:2]:
        sides = {
            e["id"]: "test" if e["origin"] == tested else "val" if e["origin"] == volumes[2] else "train"
            for e in entries
        }
        yield _classification(out, f"plane-{tested.removeprefix('ts-')}", entries, planes, sides, note, "CT")


def _embedded() -> list[dict[str, str]]:
    """The index of the embedded images, with the origin (a source of the set) and the view of each."""
    lines = [line for path in sorted(EMBEDDED.glob("*.index.jsonl")) for line in path.read_text("utf-8").splitlines()]
    entries = [json.loads(line) for line in lines]
    return [
        entry | {"origin": entry["id"].partition("/")[0], "view": entry["id"].rpartition("/")[2]} for entry in entries
    ]


def _classification(
    out: Path,
    name: str,
    entries: Sequence[Mapping[str, str]],
    labels: Mapping[str, str],
    sides: Mapping[str, str],
    note: str,
    modality: str,
) -> Fold:
    dataset = open_dataset()
    places = {dataset.sample_id(number): number for number in range(len(dataset))}
    folder = out / name
    for number, entry in enumerate(entries):
        image = dataset[places[entry["id"]]].image.permute(1, 2, 0).numpy()
        place = folder / sides[entry["id"]] / labels[entry["id"]]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{entry['origin']}~{number:04d}.png")
    values = {"kind": "classification", "metric": "balanced_accuracy", "classes": sorted(set(labels.values()))}
    values |= {"title": name, "note": note, "public": True, "modality": modality, "licence": "see the data card"}
    rule = {"image": "{split}/{class}/{origin}~{number}.png", "label": "{class}"}
    count = sum(side == "train" for side in sides.values())
    task = name.partition("-")[0]
    return _fold(folder, task, count, values, [{**rule, "split": "{split}", "patient": "{origin}"}])


def _fold(folder: Path, task: str, images: int, values: dict, rules: list[dict]) -> Fold:
    layout = {"state": "verified", "source": "scripts/real_tasks_data.py", "rules": rules}
    text = yaml.safe_dump({"name": folder.name, **values, "layout": layout}, sort_keys=False)
    atomic.write(folder.with_suffix(".yaml"), text)
    return Fold(folder.name, task, int(images))
