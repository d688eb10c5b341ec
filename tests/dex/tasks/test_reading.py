"""Cases read in processes with limits."""

import numpy as np
import pytest

from dex.prepare import readers, workers
from dex.tasks import reading
from dex.tasks.cases import open_task, read
from dex.tasks.task import Case, Layout, Task

TASK = Task("t", kind="classification", classes=("a", "b"), layout=Layout("own"))


@pytest.fixture
def cases(tmp_path, save_png):
    made = []
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 20, 3), dtype=np.uint8)
        made.append(Case(f"t/{i}", f"p{i}", "train", save_png(tmp_path / f"ä {i}.png", pixels), i % 2))
    return made


def same(several, cases, task):
    for got, case in zip(several, cases, strict=True):
        wanted = read(case, task)
        assert np.array_equal(got.images, wanted.images) and got.label == wanted.label
        assert (got.masks is None and wanted.masks is None) or np.array_equal(got.masks, wanted.masks)


@pytest.mark.slow
def test_processes_of_their_own(cases):
    same(reading.frames_of(cases, TASK, 2), cases, TASK)
    cases[5].image.write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"ä 5\.png"):
        list(reading.frames_of(cases, TASK, 2))


@pytest.mark.parametrize("processes", [0, 2])
def test_frames_come_in_order_whoever_reads_them(cases, processes, inline_workers):
    same(reading.frames_of(cases, TASK, processes), cases, TASK)
    assert list(reading.frames_of([], TASK, processes)) == []


def test_volumes_and_masks(tmp_path, volume, save_nifti, inline_workers):
    for i in range(3):
        save_nifti(tmp_path / f"d/images/{i}.nii.gz", volume.values, volume.affine)
        save_nifti(tmp_path / f"d/masks/{i}.nii.gz", volume.labels, volume.affine)
    data = open_task(tmp_path / "d", classes=["one", "two"], modality="CT", split="test")
    same(reading.frames_of(data.cases, data.task, 2), data.cases, data.task)


@pytest.mark.parametrize("processes", [0, 2])
def test_the_first_file_that_cannot_be_used_is_named(cases, processes, inline_workers):
    cases[5].image.write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    cases[7].image.unlink()
    several = reading.frames_of(cases, TASK, processes)
    for case in cases[:5]:
        assert np.array_equal(next(several).images, read(case, TASK).images)
    with pytest.raises(ValueError, match=r"file: expected .*ä 5\.png"):
        next(several)


def test_a_reader_that_dies_and_one_that_hangs_are_named(cases):
    """The work itself, in this process: what a parent says of a unit that it gave up."""
    for reason in ("crash", "timeout"):
        job = workers.Task(reading._Job(0, cases[0]), None, {0: reason})
        failed = reading._work(TASK, readers.Limits(), job, None)
        assert "ä 0.png" in failed.reason and "twice" in failed.reason


def test_no_memory(cases, monkeypatch):
    class Report:
        begun = 1

        def begin(self, *_):
            pass

        def beat(self, *_):
            pass

    def greedy(*_):
        raise MemoryError

    monkeypatch.setattr(reading, "read", greedy)
    job = workers.Task(reading._Job(0, cases[0]), None, {})
    assert "MB of memory, got" in reading._work(TASK, readers.Limits(), job, Report()).reason
    Report.begun = 2
    with pytest.raises(MemoryError):
        reading._work(TASK, readers.Limits(), job, Report())


def test_what_check_raises_ends_it(cases, inline_workers):
    def stop():
        raise KeyboardInterrupt

    for processes in (0, 2):
        with pytest.raises(KeyboardInterrupt):
            list(reading.frames_of(cases, TASK, processes, stop))
