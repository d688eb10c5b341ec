"""Tables of files: what is read, and mistakes by their lines."""

import json

import pytest

from dex.prepare.table import Row, is_table, read, read_split


def write(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


WANT = [Row(2, "p1/a.dcm", "CT", "P 1", "train"), Row(3, "p2/b.nii.gz", "MR", "P2", "val")]


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.csv", "path,modality,patient,split\np1/a.dcm,ct,P 1,train\np2/b.nii.gz,MRI,P2,Validation\n"),
        (
            "a.csv",
            "\ufeffSplit;Patient ID;Modality;File-Path\r\ntraining;P 1;CT;p1/a.dcm\r\nheld-out;P2;mr;p2/b.nii.gz\r\n",
        ),
        ("a.TSV", "FILE\tsubject_id\tsplit\tmodality\np1/a.dcm\tP 1\tTRAIN\tCT\np2/b.nii.gz\tP2\tval\tMR"),
        ("a.csv", 'path,modality,patient,split\n"p1/a.dcm",CT,"P 1",train\np2/b.nii.gz,MR,P2,val\n\n'),
    ],
)
def test_columns_in_any_order_spelling_and_separator(name, text, tmp_path):
    table = read(write(tmp_path, name, text))
    assert table.rows == WANT and table.passed_over == []


def test_lists_json_lines_and_other_columns(tmp_path):
    assert read(write(tmp_path, "a.txt", "p1/a, b.dcm\n\n  p2/b.dcm\n")).rows == [
        Row(1, "p1/a, b.dcm"),
        Row(3, "p2/b.dcm"),
    ]
    rows = [{"path": "a.png", "age": 3, "patient": 17}, {"path": "b.png", "split": "val", "patient": None}]
    table = read(write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows))))
    assert table.rows == [Row(1, "a.png", patient="17"), Row(2, "b.png", split="val")] and table.passed_over == ["age"]
    table = read(write(tmp_path, "a.csv", "path,site,subject\na.png,x,7\n"), patient="SITE")
    assert table.rows == [Row(2, "a.png", patient="x")] and table.passed_over == ["subject"]
    assert read(write(tmp_path, "b.csv", 'path,patient\n"a\nb.png",1\nc.png,2\n')).rows[1].line == 4


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.table({"path": ["a.png", "b.png"], "patient": [1, None]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet").rows == [Row(1, "a.png", patient="1"), Row(2, "b.png")]
    with pytest.raises(ValueError, match="^b.parquet: expected a Parquet file"):
        read(write(tmp_path, "b.parquet", "path\na.png\n"))


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("a.csv", "", r"line 1: expected a column of paths \(path, file, .*\), got nothing"),
        ("a.csv", "path,modality\n", "expected a row for each file, got none"),
        ("a.csv", "age,site\n3,x\n", r"line 1: expected a column of paths .*, got 2 columns with other names"),
        ("a.csv", "scans/Jane.png,CT\n", r"line 1: expected a column of paths .*, got 2 columns with other names"),
        ("a.csv", "Path,path\na,b\n", "line 1: expected one column called path, got 2"),
        ("a.csv", "path,patient\na.png,1\n,2\n,3\n", "lines 3, 4: expected a path, got none"),
        (
            "a.csv",
            "path,modality\na.png,CT\nb.png,Jane\n",
            "line 3: modality: expected one of CT, MR, .*, got another word$",
        ),
        ("a.csv", "path,split\na.png,train\nb.png,test\n", "line 3: split: expected train or val, got another word$"),
        ("a.csv", "path,split\na.png,train\nb.png\n", "line 3: expected 2 cells, got 1"),
        ("a.csv", "path,split\na.png,train,1\n", "line 2: expected 2 cells, got 3"),
        ("a.csv", 'path\n"a"b\n', "line 2: expected CSV"),
        ("a.csv", "path\na.png\nb\xe4.png\n".encode("latin-1"), "line 3: expected UTF-8, got bytes"),
        ("a.csv", "path\na.png\n".encode("utf-16"), "line 1: expected UTF-8, got UTF-16"),
        ("a.csv", "path\na\0.png\n", "line 2: expected text, got a zero byte"),
        ("a.jsonl", '{"path": "a"}\n["b"]\n', "line 2: expected a JSON object"),
        ("a.jsonl", '{"path": "a"}\n{"path": "b"', "line 2: expected a JSON object"),
        ("a.jsonl", '{"path": "a", "patient": [1]}\n', "line 1: patient: expected text, got list"),
        ("a.xlsx", "path\n", "expected a table"),
    ],
)
def test_mistakes_are_named_by_line_and_show_nobody(name, text, says, tmp_path):
    with pytest.raises(ValueError, match=f"^{name}: {says}") as error:
        read(write(tmp_path, name, text))
    assert "Jane" not in str(error.value)


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="^none.csv: expected a table; No such file"):
        read(tmp_path / "none.csv")
    with pytest.raises(ValueError, match=r"patient: expected a column of a.csv \(path, age\), 'folder', or a regular"):
        read(write(tmp_path, "a.csv", "path,age\na.png,3\n"), patient="who")
    with pytest.raises(ValueError, match="line 1: expected a column of paths") as error:
        read(write(tmp_path, "b.csv", "Jane,3\n"), patient="who")
    assert "Jane" not in str(error.value)
    assert is_table("a/B.CSV") and not is_table("a.yaml")


def test_files_of_sides(tmp_path):
    assert read_split(write(tmp_path, "a.csv", "patient,split\nP1,val\n")) == [Row(2, patient="P1", split="val")]
    assert read_split(write(tmp_path, "b.csv", "id;split\np1/a.png;val\n")) == [Row(2, name="p1/a.png", split="val")]
    assert read_split(write(tmp_path, "c.jsonl", '{"path": "a", "split": "train"}')) == [Row(1, "a", split="train")]
    for name, text, says in (
        ("d.csv", "patient,side_of\nP1,val\n", "line 1: expected a column of paths or patients and one called split"),
        ("e.csv", "split\nval\n", "line 1: expected a column of paths or patients"),
        ("f.csv", "id,split\nP1,\n", "line 2: split: expected train or val, got nothing"),
        ("g.csv", "id,split\n,val\n", "line 2: expected a path or a patient, got none"),
        ("h.csv", "id,split\n", "expected a row for each path or patient"),
        ("i.csv", "id,split\nP1,test\n", "line 2: split: expected train or val, got another word$"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: {says}"):
            read_split(write(tmp_path, name, text))
