"""From one unit to its images: what is kept, what is counted, and what a file can do to a reader."""

import dataclasses
import io
import itertools
import json
import os
import shutil
import sys
import textwrap
from collections import Counter

import nibabel
import numpy as np
import pytest
from PIL import Image
from small_runs import SETTINGS, lines, picture, save, save_dicom, save_series, source, start

from dex.data import ShardDataset, verify
from dex.prepare import chunks, filters, readers, workers
from dex.prepare.chunks import Counts
from dex.prepare.sources import Tile
from dex.prepare.summary import notes, table


def test_a_file_that_no_tile_fits_into_is_refused(tmp_path):
    """With `whole: false` it would otherwise give no image and no reason."""
    root = tmp_path / "root"
    save(root, "large.png", picture(0, 96))
    save(root, "small.png", picture(1, 48))
    facts, _ = start([source(root, whole=False, tiles=(Tile(64, 32),))], tmp_path / "out")
    (one,) = facts["sources"]
    assert one["refused"] == {"inconsistent": 1} and one["kept"] == 4 and not one["dropped"]
    (row,) = (row for row in map(json.loads, open(tmp_path / "out.private" / "log.jsonl")) if row["event"] == "refused")
    assert "none of the description's tiles fits into it" in row["detail"]


def test_every_slice_and_file_is_accounted_for(here, tmp_path):
    root = tmp_path / "root"
    for i in range(4):
        save(root, f"a/{i}.png", picture(i))
    save(root, "b/same.png", picture(0))
    near = picture(1).copy()
    near[:2, :2] += 3
    save(root, "b/near.png", near)
    save(root, "b/blank.png", np.full((64, 64), 90, np.uint8))
    dot = np.zeros((64, 64), np.uint8)
    dot[20:30, 20:30] = 255
    save(root, "b/dot.png", dot)
    save(root, "b/small.png", picture(7, 20))
    (root / "b/broken.png").write_bytes((root / "b/near.png").read_bytes()[:200])
    (root / "b/empty.png").write_bytes(b"")
    save_dicom(root / "us/1.dcm", picture(8), BurnedInAnnotation="YES", PatientID="77-A")
    save_dicom(root / "us/2.dcm", picture(9), BurnedInAnnotation="NO", PatientID="77-A")
    facts, _ = start([source(root)], tmp_path / "out")
    (one,) = facts["sources"]
    assert one["dropped"] == {
        "foreground": 1,
        "blank": 1,
        "too small": 1,
        "exact duplicate": 1,
        "near duplicate": 1,
    }
    assert one["refused"] == {"unreadable": 2, "burned-in": 1} and one["burned_in_declared"] == 1
    assert one["units"] == 12 and one["seen"] == 10 and one["kept"] == 5
    assert facts["duplicates"] == [{"source": "pictures", "of": "pictures", "exact": 1, "near": 1}]
    log = [json.loads(line) for line in open(tmp_path / "out.private" / "log.jsonl")]
    assert sorted(row["reason"] for row in log if row["event"] == "refused") == [
        "burned-in",
        "unreadable",
        "unreadable",
    ]
    facts, _ = start([source(root)], tmp_path / "taken", settings=dataclasses.replace(SETTINGS, allow_burned_in=True))
    assert facts["sources"][0]["kept"] == 6 and facts["sources"][0]["refused"] == {"unreadable": 2}
    assert "near duplicate 1" in table(facts) and "unreadable 2" in table(facts)


def test_the_private_folder_says_which_file_of_a_folder_was_refused(here, tmp_path):
    root = tmp_path / "root"
    save_dicom(root / "us/1.dcm", picture(8), PatientID="77-A")
    (root / "us/broken.dcm").write_bytes(b"no image")
    (root / "us/short.dcm").write_bytes((root / "us/1.dcm").read_bytes()[:140])
    facts, _ = start([source(root)], tmp_path / "out")
    assert facts["sources"][0]["refused"] == {"unreadable": 2}
    (ids,) = (tmp_path / "out.private" / "ids").iterdir()
    refused = [row for row in map(json.loads, ids.read_text().splitlines()) if "refused" in row]
    assert {row["file"]: row["refused"] for row in refused} == {"broken.dcm": "unreadable", "short.dcm": "unreadable"}
    assert {row["path"] for row in refused} == {"us"}
    assert "broken.dcm" not in (tmp_path / "out.private" / "log.jsonl").read_text()


def test_volumes_whose_data_are_in_a_file_of_their_own(here, tmp_path):
    values = [np.stack([picture(n + k, 40).astype(np.int16) * 2 - 200 for k in range(3)]) for n in (70, 80, 90)]
    for number, (name, patient) in enumerate((("a", "p1"), ("b", "p2"))):
        folder = tmp_path / "root" / patient
        folder.mkdir(parents=True)
        head = f"NDims = 3\nDimSize = 40 40 3\nElementType = MET_SHORT\nElementDataFile = {name}.raw\n"
        (folder / f"{name}.mhd").write_text(head)
        (folder / f"{name}.raw").write_bytes(values[number].astype("<i2").tobytes())
    nibabel.save(nibabel.Nifti1Pair(values[2].transpose(2, 1, 0), np.diag([-1, -1, 1, 1])), folder / "c.hdr")
    facts, said = start([source(tmp_path / "root", modality="CT")], tmp_path / "out")
    assert facts["images"] == 9 and facts["sources"][0]["refused"] == {} and facts["sources"][0]["patients"] == 2
    assert not any("passed over" in line for line in said) and "6 files in 3 units" in said[0]
    dataset = ShardDataset(tmp_path / "out")
    for number in range(9):  # identity of MHD is left, posterior, superior, as of the turned NIfTI: 40 pixels become 64
        want = Image.fromarray(picture((70, 80, 90)[number // 3] + number % 3, 40)).resize((64, 64), Image.BILINEAR)
        got = dataset[number].image.numpy()[0].astype(float)
        assert np.corrcoef(np.asarray(want).ravel(), got.ravel())[0, 1] > 0.98
    os.utime(folder / "b.raw", ns=(0, 1))
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(ValueError, match="the files have changed"):
        start([source(tmp_path / "root", modality="CT")], tmp_path / "out")


def test_a_folder_has_time_for_each_of_its_files(here, tmp_path, monkeypatch):
    given = []

    class Report:
        begun = 0

        def begin(self, unit, silence, total):
            given.append((silence, total))

        def beat(self, done=None):
            pass

        save = beat

    def inline(work, jobs, **_):
        for job in jobs:
            yield job, work(workers.Task(job, None, {}), Report())

    monkeypatch.setattr(workers, "run", inline)
    save_series(tmp_path / "root" / "a", 1, 5, iter(f"{k}.dcm" for k in range(5)))
    save_series(tmp_path / "root" / "b", 2, 1, iter(["0.dcm"]))
    with open(tmp_path / "root" / "b" / "0.dcm", "ab") as file:
        file.write(bytes(2**20))
    start([source(tmp_path / "root", modality="CT")], tmp_path / "out", limits=readers.Limits(seconds=4.0))
    assert [silence for silence, _ in given] == [4.0, 4.0]
    assert 20.0 < given[0][1] < 21.0 and 8.0 < given[1][1] < 8.1  # five files of 9 kB, one of a MiB


def test_ct_as_pictures(here, tmp_path):
    """Windowed by whoever made them; sixteen bits could mean anything, and are refused."""
    save(tmp_path / "root", "a/1.png", picture(1))
    save(tmp_path / "root", "a/2.png", picture(2).astype(np.uint16) * 100)
    facts, _ = start([source(tmp_path / "root", modality="CT")], tmp_path / "out")
    assert facts["images"] == 1 and facts["sources"][0]["refused"] == {"inconsistent": 1}
    assert np.array_equal(ShardDataset(tmp_path / "out")[0].image.numpy()[0], picture(1))


def test_nothing_stays_of_a_stack_that_fails_half_way(here, two, tmp_path, monkeypatch):
    real = chunks.slices
    left = iter([2])  # slices of the first volume

    def failing(stack, *arguments):
        slices = real(stack, *arguments)
        if stack.volume and (count := next(left, 0)):
            yield from itertools.islice(slices, count)
            raise readers.Refused("not finite", "here")
        yield from slices

    monkeypatch.setattr(chunks, "slices", failing)
    facts, _ = start(two, tmp_path / "out")
    volumes = facts["sources"][1]
    assert volumes["refused"] == {"not finite": 1} and volumes["seen"] == volumes["kept"] == 6
    assert len(lines(tmp_path / "out")) == 14 + 6 and verify(tmp_path / "out") == []
    ids = [json.loads(text) for path in (tmp_path / "out.private" / "ids").iterdir() for text in open(path)]
    assert len(ids) == 14 + 6 + 1


def test_sixteen_bits(here, tmp_path):
    deep = (picture(1).astype(np.uint16) << 8) + 7
    save(tmp_path / "root", "a.png", deep)
    facts, _ = start([source(tmp_path / "root")], tmp_path / "out", settings=chunks.Settings(64, 16, "png"))
    assert facts["bits"] == 16
    image = Image.open(io.BytesIO(ShardDataset(tmp_path / "out").image_bytes(0)))
    low, high = np.percentile(deep, [1, 99])
    want = np.rint((deep.astype(np.float64).clip(low, high) - low) / (high - low) * 65535)
    assert image.mode.startswith("I;16") and np.abs(np.asarray(image).astype(int) - want).max() <= 1


MISBEHAVE = """
    import os, signal, time
    import numpy as np
    from dex.prepare import chunks
    from dex.prepare import readers

    real = readers.read
    heap = []  # what a library never gives back

    def read(files, format, **options):
        if "crash" in files[0].name:
            os.kill(os.getpid(), signal.SIGSEGV)
        if "hang" in files[0].name:
            time.sleep(120)
        if "eat" in files[0].name:
            np.ones(2**40, np.uint8)
        if "grow" in files[0].name:
            try:
                heap.append(np.ones(100 * 2**20, np.uint8))
            except MemoryError:
                raise readers.Refused("too large") from None
        if "fault" in files[0].name:
            raise KeyError(files[0].name)
        if "slow" in files[0].name:
            for _ in range(70):  # for longer than the limit, but never silent for so long
                time.sleep(0.1)
                options["beat"]()
        if "late" in files[0].name:
            yield next(real(files, format, **options))
            raise readers.Refused("unreadable", "later")
        yield from real(files, format, **options)

    def work(task, report):
        readers.read = read
        return chunks.work(task, report)
"""


@pytest.mark.slow
def test_a_reader_that_crashes_hangs_or_eats_memory_costs_one_unit(tmp_path, monkeypatch):
    """Real workers; what no file is known to do to a reader is done in its place. Six seconds of silence, since other
    work on the machine must not pass for a reader that hangs."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "misreader.py").write_text(textwrap.dedent(MISBEHAVE))
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    monkeypatch.delitem(sys.modules, "misreader", raising=False)
    import misreader

    for i, name in enumerate(["a", "crash", "c", "eat", "fault", "grow1", "grow2", "hang", "late", "slow"]):
        save(tmp_path / "root", f"{name}.png", picture(i))
    with open(tmp_path / "root" / "slow.png", "ab") as file:
        file.write(bytes(9 * 2**20))  # what it may take in all grows with its size
    with monkeypatch.context() as patch:
        patch.setattr(chunks, "work", misreader.work)
        limits = readers.Limits(memory_mb=160, seconds=6.0)
        facts, _ = start([source(tmp_path / "root")], tmp_path / "out", limits=limits, max_unreadable=20)
    (one,) = facts["sources"]
    assert one["refused"] == {"crash": 1, "timeout": 1, "too large": 1, "unreadable": 2}
    assert one["units"] == 10 and one["seen"] == one["kept"] == 6
    dataset = ShardDataset(tmp_path / "out")
    for place, seed in enumerate([0, 2, 5, 6, 8, 9]):
        assert np.array_equal(dataset[place].image.numpy()[0], picture(seed))
    log = (tmp_path / "out.private" / "log.jsonl").read_text()
    assert "KeyError at misreader.py" in log and "fault.png" not in log


CANARIES = {
    "PatientName": "Canary^Name",
    "PatientID": "CANARY-ID-1",
    "PatientBirthDate": "19010203",
    "InstitutionName": "Canary Hospital",
    "StudyDescription": "canary study",
    "ImageComments": "canary comment",
    "AccessionNumber": "CANARYACC",
    "ReferringPhysicianName": "Canary^Doctor",
}


def test_no_patient_data_leaves_the_reader(here, tmp_path, capfd):
    root = tmp_path / "canaryroot"
    for i in range(6):
        save_dicom(root / "canaryfolder" / f"{i}" / f"canaryfile{i}.dcm", picture(i), **CANARIES)
    broken = root / "canaryfolder" / "9" / "canarybroken.dcm"
    save_dicom(broken, picture(9), **CANARIES)
    broken.write_bytes(broken.read_bytes()[:-3000])
    facts, said = start([source(root)], tmp_path / "out")
    assert facts["images"] == 6 and sum(facts["sources"][0]["refused"].values()) == 1
    texts = "\n".join([*said, table(facts), *notes(facts), *capfd.readouterr()]).encode()
    for path in (tmp_path / "out").rglob("*"):
        texts += path.read_bytes() if path.is_file() else b""
    texts += (tmp_path / "out.private" / "log.jsonl").read_bytes()
    for canary in (*CANARIES.values(), "canaryroot", "canaryfolder", "canaryfile", "canarybroken"):
        assert canary.lower().encode() not in texts.lower()
    assert b"canarybroken" not in texts and len(texts) > 10_000
    # and they can be found where they belong
    assert "canaryfolder" in "".join(path.read_text() for path in (tmp_path / "out.private" / "ids").iterdir())


def test_counts_of_reasons_are_filters_own():
    assert set(chunks.UNREADABLE) <= set(readers.REASONS) and len(filters.DROPPED) == 6


def test_counts_by_modality_survive_the_way_out_and_back():
    first, second = Counts(units=1, seen=5, kept=4, dropped=Counter(blank=1)), Counts(units=2, refused=Counter(crash=2))
    for counts, names in ((first, ("CT", "")), (second, ("CT", "MR"))):
        for number, name in enumerate(names):
            counts.part(name).add(Counts(seen=number + 1, dropped=Counter(blank=number)))
    before = Counts.from_dict(first.to_dict())
    assert before == first
    first.add(second)
    assert (first.units, first.seen, first.refused["crash"]) == (3, 5, 2)
    assert {name: part.seen for name, part in first.parts.items()} == {"CT": 2, "": 2, "MR": 2}
    assert first.since(before) == Counts(units=2, refused=Counter(crash=2))
    assert Counts.from_dict(json.loads(json.dumps(first.to_dict()))) == first


def test_noise_in_colour_is_a_jpeg_too():
    """Which takes more than eight bits a pixel."""
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    data = chunks.encode(noise, "jpg")
    assert len(data) > 256 * 256
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (256, 256) and image.mode == "RGB"
        assert np.abs(np.asarray(image).astype(int) - noise).mean() < 10


def test_large_pictures_of_pathology_are_cut_and_others_shrunk(here, tmp_path):
    """The picture is tissue on the left, and nothing on the right."""
    y, x = np.mgrid[0:300, 0:400]
    tissue = np.where(x < 192, 100 + 60 * np.sin(x / 7) * np.sin(y / (9 + x / 80)), 240).astype(np.uint8)
    for folder in ("pathology", "x-ray"):
        (tmp_path / "root" / folder).mkdir(parents=True)
        Image.fromarray(tissue).save(tmp_path / "root" / folder / "a.tif")
    fields = {"modality": "from-folders", "normalisation": "auto", "planes": ("auto",), "trusted": False}
    routed = source(tmp_path / "root", **fields)
    settings = chunks.Settings(size=64, encoding="png")
    facts, _ = start([routed], tmp_path / "out", settings=settings, limits=readers.Limits(pixels=100_000))
    rows = lines(tmp_path / "out")
    dataset = ShardDataset(tmp_path / "out")
    labels = {"pathology": [], "X-ray": []}
    ids = [json.loads(line) for path in (tmp_path / "out.private/ids").iterdir() for line in path.open()]
    label_of = {one["id"]: one["label"] for one in ids if "label" in one}
    for number, row in enumerate(rows):
        labels[row["modality"]].append(label_of[row["id"]])
        if row["modality"] == "pathology":
            left, top = (int(part[1:]) for part in label_of[row["id"]].split("-")[1:3])
            assert np.array_equal(dataset[number].image.numpy()[0], tissue[top : top + 64, left : left + 64])
    assert labels["X-ray"] == ["image"]
    assert sorted(labels["pathology"]) == sorted(
        f"image-x{x}-y{y}-s64" for x in (0, 64, 128) for y in (0, 64, 128, 192)
    )
    assert sum(one["seen"] for one in facts["sources"]) == 25 and not any(one["refused"] for one in facts["sources"])


def test_files_whose_modality_the_command_alone_says_are_counted(here, tmp_path):
    """A folder's name bears it out, and so do a header and a table."""
    for seed, place in enumerate(("a", "b", "xray/c", "DR/d")):
        save(tmp_path / "root", f"{place}.png", picture(seed))
    save(tmp_path / "root", "blank.png", np.zeros((64, 64), np.uint8))
    save_dicom(tmp_path / "root" / "e.dcm", picture(99), Modality="DX", SOPClassUID="1.2.840.10008.5.1.4.1.1.1.1")
    facts, _ = start([source(tmp_path / "root", trusted=False)], tmp_path / "out")
    (row,) = facts["sources"]
    assert row["kept"] == 5 and row["modality_assumed"] == 3
    assert "modality of 3 files from the command only" in (tmp_path / "out" / "card.html").read_text()
    facts, _ = start([source(tmp_path / "root")], tmp_path / "trusted")
    assert "modality_assumed" not in facts["sources"][0]
