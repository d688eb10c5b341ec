"""Large folders are parted into their series by the headers."""

import json
import sys
import textwrap

import numpy as np
import pydicom
import pytest
from small_runs import digest, lines, picture, save_series, source, start

from dex.data import ShardDataset
from dex.prepare import discover, readers, scan
from dex.prepare import run as prepare
from dex.prepare.summary import notes


@pytest.fixture
def flat(tmp_path, here, monkeypatch):
    """One folder with the slices of three patients in turn, a file without header and one of another folder's."""
    monkeypatch.setattr(discover, "LARGE", 12)
    monkeypatch.setattr(scan, "BLOCK", 5)
    root = tmp_path / "flat"
    for patient in range(3):
        names = (f"all/{number:03d}.dcm" for number in range(patient, 100, 3))
        save_series(root, patient, 6, names)
    (root / "all" / "900.dcm").write_bytes(b"no DICOM at all")
    save_series(root, 3, 1, iter(["other/1.dcm"]))
    return source(root, "flat", "CT")


def test_a_large_folder_is_parted_into_series(flat, tmp_path):
    out = tmp_path / "out"
    facts, said = start([flat], out)
    (one,) = facts["sources"]
    assert (one["units"], one["seen"], one["kept"], one["patients"]) == (5, 19, 19, 4)
    assert one["refused"] == {"unreadable": 1} and "flat: 20 files in 5 units, " in said[0]
    rows, dataset = lines(out), ShardDataset(out)
    for patient in range(3):  # by series, in the order of space
        for k in range(6):
            want = ((picture(100 * patient + k) * 2.0).clip(0, 600) / 600 * 255).round()
            assert np.abs(dataset[6 * patient + k].image.numpy()[0] - want).max() <= 1
        assert len({row["group"] for row in rows[6 * patient : 6 * patient + 6]}) == 1
    found = {}
    for text in sorted((tmp_path / "out.private" / "ids").iterdir()):
        for row in map(json.loads, text.read_text().splitlines()):
            found.setdefault(row["path"], []).append(row.get("label") or row["file"])
    assert list(found) == ["all/000.dcm", "all/001.dcm", "all/002.dcm", "all/900.dcm", "other"]
    assert found["all/001.dcm"] == [f"axial-{k:03d}" for k in range(6)] and found["all/900.dcm"] == ["900.dcm"]
    assert not (tmp_path / "out.private" / "headers").exists()


def test_parts_and_later_starts_do_not_read_the_headers_again(flat, tmp_path, monkeypatch):
    want = start([flat], tmp_path / "whole")[0] and digest(tmp_path / "whole")
    read, real = [], readers.series_of

    def series_of(path, format, limits):
        read.append(path.name)
        if len(read) == 8:  # the second block of five is not finished
            raise KeyboardInterrupt
        return real(path, format, limits)

    monkeypatch.setattr(readers, "series_of", series_of)
    with pytest.raises(KeyboardInterrupt):
        start([flat], tmp_path / "out", shard=(1, 2))
    files = [f"{number:03d}.dcm" for number in range(18)] + ["900.dcm"]
    assert read == files[10:18]  # the second machine begins in the middle
    (block,) = (tmp_path / "out.private" / "headers" / "flat").iterdir()
    block.with_suffix(".tmp").write_bytes(block.read_bytes()[:9])
    assert start([flat], tmp_path / "out", shard=(0, 2))[0] is None
    assert read[8:] == files[:10] + files[15:]
    start([flat], tmp_path / "out", shard=(1, 2))
    start([flat], tmp_path / "out")
    assert digest(tmp_path / "out") == want and len(read) == 8 + 14


def test_a_damaged_record_of_headers_is_made_anew(flat, tmp_path, monkeypatch):
    want = start([flat], tmp_path / "whole")[0] and digest(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "parted", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            start([flat], tmp_path / "out")
    blocks = sorted((tmp_path / "out.private" / "headers" / "flat").iterdir())
    assert len(blocks) == 4
    for block, data in zip(blocks, (b"", b"[]", b"[1", blocks[3].read_bytes()), strict=True):
        block.write_bytes(data)
    start([flat], tmp_path / "out")
    assert digest(tmp_path / "out") == want


def test_unknown_patients_of_a_flat_folder_are_parted_by_series(flat, tmp_path):
    """Nobody knows whose the series are: they may be one patient's, and that is said."""
    root = tmp_path / "unknown"
    for series in range(3):
        save_series(root, series, 5, (f"{number:03d}.dcm" for number in range(series, 100, 3)))
    for path in root.iterdir():
        data = pydicom.dcmread(path)
        data.PatientID = "ANONYMOUS"
        data.save_as(path)
    facts, _ = start([source(root, "unknown", "CT", val_share=0.3)], tmp_path / "out")
    rows = lines(tmp_path / "out")
    assert len(rows) == 15 and len({row["group"] for row in rows}) == 3 and facts["sources"][0]["patients"] == 0
    assert {row["split"] for row in rows} == {"train", "val"}
    assert len({(row["group"], row["split"]) for row in rows}) == 3  # no series is torn
    (note,) = notes(facts)
    assert "1 patient, by headers and folders, is too few" in note and "split by series" in note


@pytest.mark.slow
def test_a_header_that_crashes_or_hangs_costs_one_file(tmp_path, monkeypatch):
    """Real workers, as below; the file comes to its readers once more."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "misheader.py").write_text(textwrap.dedent(MISHEAD))
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    monkeypatch.delitem(sys.modules, "misheader", raising=False)
    import misheader

    monkeypatch.setattr(discover, "LARGE", 12)
    names = iter(["hang.dcm", *(f"{number:03d}.dcm" for number in range(13)), "crash.dcm"])
    save_series(tmp_path / "root", 1, 15, names)
    with monkeypatch.context() as patch:
        patch.setattr(scan, "work", misheader.work)
        facts, said = start(
            [source(tmp_path / "root", modality="CT")], tmp_path / "out", limits=readers.Limits(seconds=3.0)
        )
    (one,) = facts["sources"]
    assert (one["units"], one["kept"], one["refused"]) == (2, 15, {})
    (ids,) = (tmp_path / "out.private" / "ids").iterdir()
    found = [json.loads(line)["path"] for line in ids.read_text().splitlines()]
    assert found == ["000.dcm"] * 13 + ["crash.dcm"] * 2


MISHEAD = """
    import os, signal, time
    from dex.prepare import readers
    from dex.prepare import scan

    real = readers.series_of

    def series_of(path, format, limits):
        if "crash" in path.name:
            os.kill(os.getpid(), signal.SIGSEGV)
        if "hang" in path.name:
            time.sleep(60)
        return real(path, format, limits)

    def work(task, report):
        readers.series_of = series_of
        return scan.work(task, report)
"""
