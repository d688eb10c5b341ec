"""Lines of CSV."""

import csv
import io

from dex.common.csv_lines import csv_lines


def test_cells_are_read_as_they_were_written():
    rows = [
        ["id", "file", "note"],
        ["1", "a\rb.png", "carriage return"],
        ["2", "a\nb", 'quote "x", comma'],
        ["3", "a\r\nb", ""],
        ["\udcff", " é ", "\t;"],
    ]
    assert list(csv.reader(io.StringIO(csv_lines(rows), newline=""), strict=True)) == rows


def test_lines_end_with_a_line_feed_and_none_is_empty():
    assert csv_lines([("a", None), (1, 0.5)]) == "a,\n1,0.5\n"
    assert csv_lines([]) == ""
