"""What is said while a run works, and when it is done."""

import re
from collections import Counter
from types import SimpleNamespace

from small_runs import start

from dex.prepare import summary, workers
from dex.prepare.chunks import Counts
from dex.prepare.summary import Progress, counts, notes, table


def test_a_long_unit_says_how_far_it_is(here, two, tmp_path, monkeypatch, capsys):
    """Lines come while its slices are made, with their number and the rate, though no unit is done."""
    seen = []

    class Report:
        begun = 0

        def begin(self, *_):
            pass

        def save(self, state):
            pass

        def beat(self, done=None):
            seen.append(done)

    def inline(work, jobs, *, on_beat, **_):
        for job in jobs:
            result = work(workers.Task(job, None, {}), Report())
            on_beat(job, 1234)
            yield job, result

    monkeypatch.setattr(workers, "run", inline)
    monkeypatch.setattr(summary, "_EVERY", 0.0)
    start(two[1:], tmp_path / "out")  # two volumes of six slices
    assert [done for done in seen if done is not None] == [1, 2, 3, 4, 5, 6] * 2
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "under way" in line]
    assert re.match(r"units 0/2  kept 0  dropped 0  under way 1,234  [\d.]+ slices/s  left unknown", line)
    assert not line.endswith(" 0.0 slices/s  left unknown")


def facts(**changed):
    """What a card says of a run, of one source where little went wrong."""
    one = {"name": "mine", "modality": "CT", "simulated": False, "units": 1234, "seen": 100, "kept": 90}
    one |= {"train": 80, "val": 10, "dropped": {"blank": 10}, "refused": {}, "text_suspected": 0} | changed
    return {"sources": [one], "train": one["train"], "val": one["val"], "images": one["train"] + one["val"]}


def test_the_table_names_every_source_and_the_sum():
    rows = table(facts(dropped={"blank": 6, "too small": 4}, simulated=True)).splitlines()
    assert rows[0].split() == ["source", "modality", "units", "seen", "kept", "train", "val", "dropped", "refused"]
    assert rows[1].split("  ")[0].strip() == "mine" and "CT (simulated)" in rows[1] and "1,234" in rows[1]
    assert "blank 6, too small 4" in rows[1] and rows[1].endswith("-")  # nothing was refused
    assert rows[2].split() == ["all", "1,234", "100", "90", "80", "10"]


def test_notes_say_what_is_to_be_known_before_training():
    assert notes(facts()) == []
    row = {
        "source": "mine",
        "by": "patient",
        "images": {"train": 90, "val": 0},
        "groups": {"patient": {"train": 1, "val": 0}},
    }
    split = [row | {"wanted": 0.05, "patients": 1, "fits": False, "sure": True}]
    (note,) = notes(facts(val=0) | {"split": split})
    assert note.startswith("mine: no image is held out") and "--split FILE" in note
    (note,) = notes(facts(train=0))
    assert note.startswith("no image to train on")
    assert notes(facts(dropped={"too small": 50})) == []
    (note,) = notes(facts(dropped={"too small": 51}))
    assert note.startswith("51 slices are too small") and "planes: stored" in note
    (note,) = notes(facts(text_suspected=1200))
    assert "burned-in text is suspected in 1,200 of the images" in note


def test_both_sides_are_counted():
    groups = {"patient": {"train": 1200, "val": 1}, "file": {"train": 2, "val": 0}}
    split = {"split": [{"groups": groups}, {"groups": {"patient": {"train": 0, "val": 3}}}]}
    assert counts(facts(train=950, val=50, kept=1000) | split) == [
        "train:    950 images of 1,200 patients, 2 files",
        "held out: 50 images (5.0 %) of 4 patients",
    ]
    assert counts(facts()) == ["train:    80 images", "held out: 10 images (11.1 %)"]  # of a set made before


def test_a_line_says_what_is_done_and_what_is_left(monkeypatch, capsys):
    seconds = 0.0
    monkeypatch.setattr(summary, "time", SimpleNamespace(monotonic=lambda: seconds))
    progress = Progress()
    progress.begin(10, Counts(units=2, seen=20, kept=20))
    progress.finish(
        "000-000000", Counts(units=2, seen=40, kept=30, dropped=Counter(blank=10), refused=Counter(crash=1))
    )
    seconds = 10.0
    progress.update("000-000001", Counts(units=1, seen=5, kept=5))
    progress.update("000-000001", Counts(units=1, seen=5, kept=5))  # too soon for another line
    want = "units 5/10  kept 55  dropped 10  4.5 slices/s  refused 1  left 17s\n"  # of what this start has done
    assert capsys.readouterr().out == want


def test_what_was_left_out_is_counted_and_told():
    refused = {"another modality": 1234, "contradictory header": 2, "label map": 3, "localizer": 9}
    lines = notes(facts(refused=refused))
    assert [line.split()[0] for line in lines] == ["1,234", "2", "3"]
    assert "their headers or folders say another modality" in lines[0] and "label maps are left out" in lines[2]
    whole = facts() | {"left_out": [{"source": "mine", "units": 4, "refused": refused}]}
    assert notes(whole) == lines
    rows = table(whole).splitlines()
    assert rows[2].split()[:3] == ["mine", "-", "4"] and "localizer 9" in rows[2]
    assert rows[3].split()[:2] == ["all", "1,238"]


def test_files_whose_modality_the_command_alone_says_are_counted():
    whole = facts()
    whole["sources"][0] |= {"modality_assumed": 1200}
    name, modality = whole["sources"][0]["name"], whole["sources"][0]["modality"]
    (line,) = [line for line in notes(whole) if "no modality" in line]
    assert line == f"1,200 files of {name} say no modality, nor does a folder; the command says {modality}"
