"""Real processes that really crash, hang and starve; what `dex.prepare.workers` does then is tested there."""

import textwrap

import numpy as np
import pytest

from dex.inference.collection import Collection, Decoded, Note, Row
from dex.inference.reading import OUTPUT_MB, decoded
from dex.prepare.readers import Limits

MISBEHAVE = """
    import os, time
    import numpy as np
    from dex.inference.collection import Decoded, Note, Row

    class Reader:
        has_paths = True

        def __init__(self, folder):
            self.folder = folder

        def read(self, unit, beat):
            with open(self.folder / "attempts", "a") as file:
                file.write(unit + "\\n")
            if unit.startswith("crash"):
                os.abort()
            elif unit.startswith("hang"):
                time.sleep(60)
            elif unit.startswith("eat"):
                np.ones(3 * 2**30, np.uint8)
            elif unit.startswith("fault"):
                raise KeyError("Jane Doe")
            elif unit.startswith("slow"):
                for _ in range(8):
                    time.sleep(0.25)
                    beat()
            return Decoded([np.full((1, 1, 4, 4), len(unit), np.uint8)], [Row(unit, "", "", "", "")], [])

        def refused(self, unit, reason):
            return Decoded([], [], [Note(unit, unit, "", reason)])

        def weight(self, unit):
            return 4.0

        def preload(self):
            pass
"""


@pytest.fixture
def collection(tmp_path, monkeypatch):
    """Makes one of items with these units, which say what happens when they are read."""
    (tmp_path / "misbehave_reader.py").write_text(textwrap.dedent(MISBEHAVE))
    monkeypatch.syspath_prepend(tmp_path)
    import misbehave_reader

    def of(*items):
        reader = misbehave_reader.Reader(tmp_path)
        return Collection("print", [range(len(items))], lambda number: list(items[number]), reader)

    return of


def ids(item):
    return [row.id for row in item.rows]


@pytest.mark.slow
def test_a_bad_unit_costs_only_itself(collection, tmp_path):
    items = collection(["a", "crash", "b", "hang", "c"], ["d", "eat", "fault", "slow"])
    first, second = decoded(items, [0, 1], 1, limits=Limits(seconds=1.0))
    assert ids(first) == ["a", "b", "c"] and ids(second) == ["d", "slow"]
    assert [(note.path, note.refused.partition(": ")[0]) for note in first.notes] == [
        ("crash", "crash"),
        ("hang", "timeout"),
    ]
    assert all("copy the file again, or leave it out" in note.refused for note in first.notes)
    eaten, fault = second.notes
    assert eaten.refused == f"too large: needs more than {512 + OUTPUT_MB} MB of memory"
    assert fault.refused.startswith("unreadable: its header is cut off") and "Jane" not in fault.refused
    assert "KeyError at misbehave_reader.py:" in fault.refused
    tried = (tmp_path / "attempts").read_text().split()
    assert {unit: tried.count(unit) for unit in ("a", "crash", "hang", "eat", "slow")} == {
        **{"a": 1, "crash": 2, "hang": 2},
        **{"eat": 2, "slow": 1},
    }


@pytest.mark.slow
def test_the_order_is_kept_and_only_some_items_are_read_ahead(collection, tmp_path):
    names = [["slow"], *([f"item-{i}"] for i in range(11))]
    items = decoded(collection(*names), range(12), 2)
    assert ids(next(items)) == ["slow"]
    assert len((tmp_path / "attempts").read_text().split()) <= 8  # four ahead for each of two processes
    assert [ids(item) for item in items] == names[1:]


@pytest.mark.slow
def test_the_caller_may_end_it(collection):
    class Asked(Exception):
        pass

    def check():
        raise Asked

    with pytest.raises(Asked):
        list(decoded(collection(["slow"]), [0], 1, check))


def test_without_processes_all_is_read_here():
    class Here:
        def read(self, unit, beat):
            return Decoded([np.zeros((1, 3, 2, 2), np.uint8)], [Row(unit, "", "", "", "")], [Note(unit, "", "", "")])

    both = Collection("print", [range(2)], lambda number: ["a", "b"] if number else ["c"], Here())
    (second, first) = decoded(both, [1, 0], 0)
    assert ids(second) == ["a", "b"] and len(second.images) == len(second.notes) == 2 and ids(first) == ["c"]
    assert list(decoded(both, [], 2)) == []
