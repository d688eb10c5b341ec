"""What tables and files of sides say of a source's files, before anything is read."""

import os

import pytest
from small_runs import lines, picture, save, save_dicom, save_series, save_volume, start

from dex.prepare import discover
from dex.prepare.run import Failed
from dex.prepare.sources import resolve


def table(folder, text, name="list.csv"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


@pytest.fixture
def mixed(tmp_path):
    """Pictures of three folders, a volume, and two series of DICOM in one folder."""
    for i in range(12):
        save(tmp_path / "data", f"{'abc'[i % 3]}/{i:02d}.png", picture(i))
    save_volume(tmp_path / "data" / "vol" / "x.nii.gz", 300)
    for patient in range(2):
        save_series(
            tmp_path / "data",
            10 + patient,
            3,
            (f"ct/{patient}{k}.dcm" for k in range(3)),
            SOPClassUID="1.2.840.10008.5.1.4.1.1.2",
        )
    return tmp_path / "data"


def splits(out):
    sides = {}
    for row in lines(out):
        sides.setdefault(row["group"], set()).add(row["split"])
    return sides


def test_a_table_says_of_each_file_what_it_is(mixed, here, tmp_path):
    rows = [f"a/{i:02d}.png,X-ray,{'P1' if i < 6 else 'P2'},{'train' if i < 6 else 'val'},7" for i in range(0, 12, 3)]
    file = table(mixed, "path,modality,patient,split,age\nvol/x.nii.gz,CT,P9,train,1\n" + "\n".join(rows))
    facts, said = start(resolve(file), tmp_path / "out")
    assert [(one["modality"], one["kept"], one["train"], one["val"]) for one in facts["sources"]] == [
        ("CT", 6, 6, 0),
        ("X-ray", 4, 2, 2),
    ]
    assert {row["modality"]: row["split"] for row in lines(tmp_path / "out")}["CT"] == "train"
    sides = splits(tmp_path / "out")
    assert len(sides) == 3 and all(len(each) == 1 for each in sides.values())
    assert "table: passed over columns (age): 1" in said and facts["split"][0]["by"] == "stated"


def test_rows_of_dicom_files_are_read_together_as_a_folder_is(mixed, here, tmp_path):
    names = sorted(os.listdir(mixed / "ct"))
    facts, _ = start(resolve(table(mixed, "file\n" + "\n".join(f"ct/{name}" for name in names))), tmp_path / "files")
    whole, _ = start(resolve(table(mixed, "file\nct\n", "folder.txt".replace("txt", "csv"))), tmp_path / "folder")
    assert facts["images"] == whole["images"] == 6 and facts["sources"][0]["units"] == whole["sources"][0]["units"] == 1
    assert [row["sha256"] for row in lines(tmp_path / "files")] == [row["sha256"] for row in lines(tmp_path / "folder")]
    # what is said of them differently parts them
    text = "file,patient\n" + "\n".join(f"ct/{name},P{name[0]}" for name in names)
    facts, _ = start(resolve(table(mixed, text)), tmp_path / "two")
    assert facts["sources"][0]["units"] == 2 and facts["images"] == 6 and len(splits(tmp_path / "two")) == 2


def test_paths_outside_the_table_and_another_root(mixed, here, tmp_path):
    file = table(tmp_path / "lists", f"path,modality\n{mixed}/a/00.png,X-ray\n../data/b/01.png,X-ray\n")
    assert start(resolve(file), tmp_path / "one")[0]["images"] == 2
    file = table(tmp_path / "lists", "path,modality\na/00.png,X-ray\n")
    assert start(resolve(file, root=str(mixed)), tmp_path / "two")[0]["images"] == 1
    # the set may lie beside the table
    assert start(resolve(table(mixed, "path,modality\na/00.png,X-ray\n")), mixed / "set")[0]["images"] == 1


@pytest.mark.parametrize(
    "text, says",
    [
        ("path\na/00.png\nnone.png\n", "list.csv: line 3: path: expected a file or a folder, got nothing there"),
        ("path\na/00.png\na/03.png\n./a/00.png\n", "lines 2, 4: path: expected each file once, got 1 again"),
        ("path\na\na/00.png\n", "lines 2, 3: path: expected each file once"),
        ("path\nlink.png\n", "line 2: path: expected a file, got a symbolic link"),
        ("path,modality\na/00.png,CT\n", "line 2: modality: expected X-ray, as in --modality"),
        (
            "path,patient,split\na/00.png,P,train\na/03.png,P,val\n",
            "expected each patient on one side, got 1 of 1 on both",
        ),
    ],
)
def test_wrong_tables_are_named_before_anything_is_written(mixed, text, says, tmp_path):
    os.symlink(mixed / "a/00.png", mixed / "link.png")
    file = table(mixed, text)
    with pytest.raises(ValueError, match=says) as error:
        start(resolve(file, modality="X-ray"), tmp_path / "out", salt=None)
    assert "00.png" not in str(error.value) and not (tmp_path / "out.private").exists()


def test_a_header_that_contradicts_its_row_is_left_out(here, tmp_path):
    save_dicom(tmp_path / "data" / "us.dcm", picture(1), SOPClassUID="1.2.840.10008.5.1.4.1.1.6.1")
    save(tmp_path / "data", "x.png", picture(2))
    text = "path,modality\nus.dcm,CT\nx.png,X-ray\n"
    facts, _ = start(resolve(table(tmp_path / "data", text)), tmp_path / "out")
    assert facts["images"] == 1 and [row["refused"] for row in facts["left_out"]] == [{"another modality": 1}]


def test_sides_by_path_folder_and_patient(mixed, here, tmp_path):
    file = table(tmp_path, "name,split\na,val\nb/01.png,val\nb,train\n", "sides.csv")
    with pytest.raises(ValueError, match="sides.csv: lines 3, 4: expected each file on one side, got both"):
        start(resolve(mixed, modality="X-ray", split_file=file), tmp_path / "out")
    file = table(tmp_path, "name,split\na,val\nb/01.png,val\n", "sides.csv")
    facts, _ = start(resolve(mixed, modality="X-ray", files=("[abc]/*",), split_file=file), tmp_path / "out")
    assert (facts["train"], facts["val"]) == (7, 5)
    # what a pattern finds in the paths is a patient
    file = table(tmp_path, "patient,split\n1,val\n", "sides.csv")
    asked = {"modality": "X-ray", "files": ("[abc]/*",), "patient": r"/(\d)\d\.png", "split_file": file}
    facts, _ = start(resolve(mixed, **asked), tmp_path / "by-pattern")
    assert (facts["train"], facts["val"]) == (10, 2)


def test_sides_of_patients_that_headers_name(mixed, here, tmp_path):
    file = table(tmp_path, "patient,split\nMRN-11,val\n", "sides.csv")
    facts, _ = start(resolve(mixed, modality="CT", trusted=True, files=("ct/*",), split_file=file), tmp_path / "out")
    assert (facts["train"], facts["val"]) == (3, 3) and all(
        len(each) == 1 for each in splits(tmp_path / "out").values()
    )
    file = table(tmp_path, "path,split\nct/00.dcm,val\n", "sides.csv")  # of one series, the rest of which is train
    with pytest.raises(Failed, match="split: expected each patient on one side, got 1 patients on both"):
        start(resolve(mixed, modality="CT", trusted=True, files=("ct/*",), split_file=file), tmp_path / "torn")
    assert not (tmp_path / "torn").exists()


@pytest.mark.parametrize(
    "text, says",
    [
        ("path,split\nnone.png,val\n", "sides.csv: line 2: expected paths or patients of the source, got others"),
        ("patient,split\na,val\nnobody,val\n", "line 3: expected paths or patients"),
        ("patient,split\na,val\na,train\n", "lines 2, 3: expected each on one side, got both"),
    ],
)
def test_sides_of_what_is_not_there(mixed, text, says, tmp_path):
    file = table(tmp_path, text, "sides.csv")
    with pytest.raises(ValueError, match=says):
        start(resolve(mixed, modality="X-ray", files=("[abc]/*",), split_file=file), tmp_path / "out", salt=None)
    assert not (tmp_path / "out.private").exists()


def test_another_table_is_another_input(mixed, tmp_path):
    digests = set()
    for text in ("path\na/00.png\n", "path,patient\na/00.png,P\n", "path,patient\na/00.png,Q\n"):
        (one,) = resolve(table(mixed, text), modality="X-ray")
        digests.add(discover.discover(one, mixed).digest)
    assert len(digests) == 3
