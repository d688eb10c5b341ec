"""`dex embed` as a user starts it, on little files."""

import io
import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pydicom.data
import pytest
import torch
from PIL import Image

import dex
from dex.common import exits
from dex.data import ShardWriter, center, open_dataset

nibabel = pytest.importorskip("nibabel")


@pytest.fixture
def model():
    """A run folder with a tiny model: 32 pixels, width 16, two layers, four experts."""
    return Path(__file__).parents[1] / "train" / "earlier_run" / "embedded"


@pytest.fixture
def shards(tmp_path):
    """A shard set of 5 pictures of two patients."""
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path / "set", name="little", modalities=("CT",), image_size=32) as writer:
        for i in range(5):
            stream = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 32), dtype=np.uint8)).save(stream, "PNG")
            names = {"modality": "CT", "split": "train", "group": f"p{i % 2}"}
            writer.add(f"p{i % 2}/{i}", stream.getvalue(), kind="png", **names)
    return tmp_path / "set"


def notes(out):
    folder = out.with_name(f"{out.name}.private") / "notes"
    return [json.loads(line) for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()]


def test_npz_of_a_folder(model, images, run, tmp_path):
    out = tmp_path / "features.npz"
    code, printed, _ = run("embed", model, images, "--out", out, "--layers", 0, "--workers", 0)
    assert (code, printed) == (0, f"{out}: 120 images\n")
    table = dict(np.load(out))
    assert set(table) == {
        *("id", "group", "modality", "label", "dropped", "cls", "patches", "layer_00"),
        *("experts_00", "experts_01", "gates_00", "gates_01"),
    }
    dataset = open_dataset(images)
    want = dex.load(model).embed(torch.stack([dataset[i].image for i in range(120)]), layers=(0,))
    by_id = {note["id"]: note["path"] for note in notes(out)}
    order = [by_id[name] for name in table["id"]]
    assert order == [dataset.sample_id(i) for i in range(120)]
    for name, values in {"cls": want.cls, "layer_00": want.layers[0], "experts_01": want.expert_indices[1]}.items():
        assert np.array_equal(table[name], values.numpy())


def test_ids_are_salted_unless_public(model, images, run, tmp_path):
    folder = images / "ct"
    names = {}
    for name, options in (("a", ()), ("b", ()), ("public", ("--public",))):
        assert run("embed", model, folder, "--out", tmp_path / f"{name}.npz", "--workers", 0, *options)[0] == 0
        names[name] = dict(np.load(tmp_path / f"{name}.npz"))
    assert names["public"]["id"][3] == "folder/003.png/image"
    assert not any("003" in text for text in (names["a"]["id"][3], names["a"]["group"][3]))
    assert set(names["a"]["id"]).isdisjoint(names["b"]["id"])  # every set has a salt of its own
    private = tmp_path / "a.npz.private"
    assert private.stat().st_mode & 0o77 == 0 and (private / "salt").stat().st_mode & 0o77 == 0


def test_scans_that_cannot_be_read_are_counted(model, run, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    values = np.random.default_rng(0).integers(-1000, 1000, (40, 48, 3), dtype=np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / "a.nii")
    (folder / "b.nii").write_bytes(b"no volume")
    out = tmp_path / "features.npz"
    code, printed, _ = run("embed", model, folder, "--modality", "CT", "--out", out, "--workers", 0)
    assert (
        code == 0
        and "refused: 1 files or parts of files (unreadable 1); " in printed
        and printed.endswith(f"{out}: 3 images\n")
    )
    assert [note["path"] for note in notes(out) if note["refused"]] == ["b.nii"]
    assert list(np.load(out)["label"]) == ["axial-000", "axial-001", "axial-002"]
    (folder / "a.nii").unlink()
    code, _, err = run("embed", model, folder, "--modality", "CT", "--out", tmp_path / "none.npz", "--workers", 0)
    assert code == 1 and err.startswith("dex embed: input: expected at least one readable image; ")
    code, _, err = run("embed", model, folder, "--out", out)
    assert code == 2 and "modality: expected one, since files of the formats nifti do not state theirs" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("absent", "INPUT", "--out", "x.npz"), "run: expected a run folder"),
        (("MODEL", "absent", "--out", "x.npz"), "input: expected a shard set, a folder or a file; nothing at absent"),
        (("MODEL", "INPUT", "--out", " "), "out: expected a folder"),
        (("MODEL", "INPUT", "--out", "there.npz"), "out: expected a new file; there.npz exists. Choose another --out"),
        (("MODEL", "notes.txt", "--out", "x.npz"), "input: expected a regular file of the formats array, dicom, "),
        (("MODEL", "INPUT", "--out", "x.npz", "--layers", "9"), "layers: expected numbers of blocks, 0 to 1, got 9"),
        (("MODEL", "INPUT", "--out", "x.npz", "--batch-size", "0"), "batch-size: expected at least 1, got 0"),
        (("MODEL", "INPUT", "--out", "x.npz", "--img-size", "33"), "img_size: expected a multiple of the patch size"),
        (("MODEL", "INPUT", "--out", "x.npz", "--modality", "CTT"), "modality: expected one of CT"),
    ],
)
def test_wrong_input_is_one_line(options, message, model, images, run, tmp_path):
    for name in ("there.npz", "notes.txt"):
        (tmp_path / name).touch()
    code, _, err = run("embed", *[{"MODEL": model, "INPUT": images}.get(o, o) for o in options])
    assert code == 2 and err.startswith(f"dex embed: {message}") and err.count("\n") == 1


def test_parquet_needs_its_extra(model, images, run, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    code, _, err = run("embed", model, images, "--out", "features")
    assert code == 2 and "pip install -e '.[train,data,adapt]'" in err


class TestParquet:
    """Parts; need pyarrow (extra ``adapt``)."""

    @pytest.fixture(autouse=True)
    def small_parts(self, monkeypatch):
        self.parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow, of the extra 'adapt'")
        monkeypatch.setattr("dex.inference.collection.PART_ITEMS", 3)

    def test_parts_are_the_archive(self, model, images, run, tmp_path):
        assert run("embed", model, images, "--out", "features", "--public", "--workers", 2)[0] == 0
        assert run("embed", model, images, "--out", "one.npz", "--public", "--workers", 0)[0] == 0
        assert len(list((tmp_path / "features").glob("part-*.parquet"))) == 3
        table, archive = self.parquet.read_table(tmp_path / "features"), np.load(tmp_path / "one.npz")
        assert set(table.column_names) == set(archive) and table.num_rows == 120
        for name in table.column_names:
            assert np.array_equal(np.array(table[name].to_pylist()), archive[name]), name
        summary = json.loads((tmp_path / "features" / "_summary.json").read_text())
        assert summary == {"images": 120, "refused": 0}

    def test_a_second_start_writes_what_is_missing(self, model, images, run, tmp_path):
        out = tmp_path / "features"
        assert run("embed", model, images, "--out", out, "--workers", 0)[0] == 0
        before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
        (out / "part-00001.parquet").unlink()
        (out / "part-00001.parquet.7-abcd.partial").write_bytes(b"killed")
        assert run("embed", model, images, "--out", out, "--workers", 0)[0] == 0
        after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
        assert {name: data for name, (data, _) in after.items()} == {name: data for name, (data, _) in before.items()}
        assert {n for n in after if after[n][1] != before[n][1]} == {"part-00001.parquet", "_summary.json"}

    def test_another_start_is_refused_by_name(self, model, images, run, tmp_path):
        out = tmp_path / "features"
        assert run("embed", model, images, "--out", out, "--workers", 0)[0] == 0
        for options, what in (
            (("--layers", 0), "layers [], now it is [0]"),
            (("--path", "director"), "path experts, now it is director"),
            (("--batch-size", 7), "batch_size 64, now it is 7"),
        ):
            code, _, err = run("embed", model, images, "--out", out, *options)
            assert code == 2 and f"out: {out} was begun with {what}; give another --out" in err
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "file").touch()
        code, _, err = run("embed", model, images, "--out", tmp_path / "full")
        assert code == 2 and "out: expected a new or empty folder" in err

    def test_ranks_share_the_parts(self, model, images, run, tmp_path, monkeypatch):
        assert run("embed", model, images, "--out", "alone", "--workers", 0, "--public")[0] == 0
        for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
            monkeypatch.setenv(name, value)
        for rank in ("1", "0"):
            monkeypatch.setenv("RANK", rank)
            code, printed, _ = run("embed", model, images, "--out", "shared", "--workers", 0, "--public")
            assert code == 0 and printed.endswith("other ranks are still working\n") == (rank == "1")
        for path in (tmp_path / "alone").iterdir():
            assert (tmp_path / "shared" / path.name).read_bytes() == path.read_bytes()

    @pytest.mark.slow
    def test_a_killed_start_goes_on_to_the_same_bytes(self, model, images, run, tmp_path, dex_process, monkeypatch):
        assert run("embed", model, images, "--out", "whole", "--workers", 0, "--public")[0] == 0
        script = tmp_path / "sitecustomize.py"  # small parts and a slow disk in the process
        script.write_text(
            "import time\nimport dex.inference.collection as c\nimport dex.inference.tables as t\nc.PART_ITEMS = 3\n"
            "write = t.write_parquet\n"
            "t.write_parquet = lambda *a: (write(*a), time.sleep(2))\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        out = tmp_path / "features"
        for sent, code, parts in ((signal.SIGKILL, -9, 1), (signal.SIGTERM, exits.PREEMPTED, 2)):
            process = dex_process("embed", model, images, "--out", out, "--workers", 0, "--public")
            deadline = time.monotonic() + 120
            while len(list(out.glob("*.parquet"))) < parts and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(sent)
            assert process.wait(60) == code and len(list(out.glob("*.parquet"))) == parts
        assert run("embed", model, images, "--out", out, "--workers", 0, "--public")[0] == 0
        for path in (tmp_path / "whole").iterdir():
            assert (out / path.name).read_bytes() == path.read_bytes()

    def test_a_shard_set_keeps_its_names(self, model, shards, run, tmp_path):
        assert run("embed", model, shards, "--out", tmp_path / "features", "--workers", 0)[0] == 0
        rows = self.parquet.read_table(tmp_path / "features").to_pylist()
        assert [(row["id"], row["group"], row["modality"]) for row in rows] == [
            (f"p{i % 2}/{i}", f"p{i % 2}", "CT") for i in range(5)
        ]
        dataset = open_dataset(shards)
        loaded = dex.load(model)
        with torch.no_grad():
            tokens = loaded.encoder(center(torch.stack([dataset[i].image for i in range(5)]), 32))
        assert np.array_equal(np.array([row["cls"] for row in rows], np.float32), tokens[:, 0].numpy())
        code, _, err = run("embed", model, shards, "--out", "more", "--modality", "CT")
        assert code == 2 and "modality: expected none for a shard set" in err


def blobs(height, width, count, seed=0):
    """float32 ``[height, width, count]``, each another smooth image."""
    rng = np.random.default_rng(seed)
    small = [Image.fromarray(rng.uniform(100, 900, (7, 7)).astype(np.float32)) for _ in range(count)]
    return np.stack([np.asarray(one.resize((width, height), Image.Resampling.BICUBIC)) for one in small], 2)


def scans_by_folder(root):
    """A DICOM slice, a volume of thick coronal slices, a photograph larger than what is stored, a flat picture."""
    rng = np.random.default_rng(0)
    for name in ("CT", "MR", "fundus"):
        (root / name).mkdir(parents=True)
    shutil.copy(pydicom.data.get_testdata_file("CT_small.dcm", download=False), root / "CT" / "a.dcm")
    coronal = np.array([[1.0, 0, 0, 0], [0, 0, 8, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(blobs(60, 50, 4), coronal), root / "MR" / "b.nii.gz")
    small = Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    small.resize((1200, 1600), Image.Resampling.BICUBIC).save(root / "fundus" / "c.jpg")
    Image.new("RGB", (300, 300), (9, 9, 9)).save(root / "fundus" / "d.png")


def stored_numbers(root):
    """16-bit PNG of HU + 32768."""
    root.mkdir()
    Image.fromarray((blobs(90, 70, 1)[..., 0] + 32268).astype(np.uint16)).save(root / "a.png")


def several_volumes(root):
    root.mkdir()
    values = blobs(60, 50, 12).reshape(60, 50, 4, 3)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([1.0, 1.0, 4.0, 1.0])), root / "a.nii")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "options", "count"),
    [
        (scans_by_folder, ("--modality", "from-folders"), 6),
        (stored_numbers, ("--modality", "CT", "--slope", 1, "--intercept", -32768), 1),
        (several_volumes, ("--modality", "MR", "--volumes", "all", "--planes", "axial"), 12),
    ],
)
def test_images_are_those_of_prepare_bit_by_bit(write, options, count, model, run, tmp_path, monkeypatch):
    """From the same files and options: what `dex prepare` stores without loss, and what reaches the model here."""
    write(tmp_path / "scans")
    code, _, err = run("prepare", "scans", "--out", "set", "--encoding", "png", "--workers", 1, *options)
    assert code == 0, err
    prepared = [sample.image.numpy().tobytes() for sample in open_dataset(tmp_path / "set")]
    seen = []
    monkeypatch.setattr("dex.inference.embed_job.center", lambda *given: seen.append(given[0]) or center(*given))
    assert run("embed", model, "scans", "--out", "a.npz", "--workers", 1, *options)[0] == 0
    kept = [not dropped for dropped in np.load(tmp_path / "a.npz")["dropped"]]
    images = torch.cat([some.expand(-1, 3, -1, -1) for some in seen])  # where all are grey they come in one channel
    embedded = [image.numpy().tobytes() for image, wanted in zip(images, kept, strict=True) if wanted]
    assert len(prepared) == len(set(prepared)) == count and sorted(prepared) == sorted(embedded)
