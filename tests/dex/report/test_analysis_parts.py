import csv
import io

from dex.analysis.intervals import Interval
from dex.report import analysis_parts as parts


def test_a_file_of_a_block_holds_numbers_in_full():
    block = parts.block("swap", "Title", "", "", [], (("a", "b, c"), [(1 / 3, None), ("x,y", 2)]))
    rows = list(csv.reader(io.StringIO(block.files["swap.csv"].decode(), newline="")))
    assert rows == [["a", "b, c"], [repr(1 / 3), ""], ["x,y", "2"]]


def test_a_block_brings_its_files():
    block = parts.block("swap", "Title", "less < more", "<p>x</p>", [], (("a",), [(1,)]))
    assert block.files == {"swap.csv": b"a\n1\n"} and "less &lt; more" in block.content
    assert "Files beside this page: swap.csv" in block.content


def test_cells():
    assert parts.cell(None) == parts.cell(float("nan")) == parts.interval_cell(None) == "–"
    assert parts.cell(0.12345) == "0.123" and parts.interval_cell(Interval(0.5, 0.4, 0.6)) == "0.500 [0.400, 0.600]"
    assert parts.numbered(["CT", "MR"]) == (["CT 1", "MR 2"], ["1", "2"])
    assert parts.bar(None) is None and parts.bar(Interval(1, 0, 2)) == (1, 0, 2)
    assert "&lt;" in parts.rows_table(["", "a<b"], [["x", "1"]])


def test_the_models_of_an_analysis(analysis):
    assert [m.name for m in parts.models(analysis)] == ["step 12", "step 0", "step-00000010"]
    assert set(parts.names(analysis)) <= {"ct", "mr", "us"}
    assert [analysis.material.modalities[m] for m in parts.present(analysis)] == parts.names(analysis)
