"""A chunk that a kill left half done is gone on with where it was, unless its files are not what they were."""

import json
import os

import pytest
from small_runs import picture, save, source, start

from dex.prepare import chunk_files, chunks, unfinished, workers
from dex.prepare.run import private_folder

UNITS = 6


class Report:
    begun = 0

    def begin(self, unit, silence, total):
        pass

    def beat(self, done=None):
        pass

    save = beat


@pytest.fixture
def root(tmp_path):
    for number in range(UNITS):
        save(tmp_path / "root", f"p{number}/{number}.png", picture(number))
    (tmp_path / "root" / "p0" / "broken.png").write_bytes(b"no picture")
    return tmp_path / "root"


class Killed(BaseException):
    pass


@pytest.fixture
def run(root, tmp_path, monkeypatch):
    """run(after): a start that dies before it reads one more file; the number of files that were read."""

    def inline(work, jobs, **_):
        for job in jobs:
            yield job, work(workers.Task(job, None, {}), Report())

    monkeypatch.setattr(workers, "run", inline)
    monkeypatch.setattr(unfinished, "EVERY", 0.0)
    real = chunks.UnitWork.run

    def begin(after=10**9, out=tmp_path / "out"):
        read = []

        def counted(unit):
            if len(read) == after:
                raise Killed
            read.append(unit)
            return real(unit)

        monkeypatch.setattr(chunks.UnitWork, "run", counted)
        try:
            start([source(root)], out)
        except Killed:
            pass
        return len(read)

    return begin


def files_of(out):
    return sorted((private_folder(out) / "chunks").iterdir())


def test_nothing_is_read_twice(run, tmp_path):
    assert run(4) == 4 and [path.suffix for path in files_of(tmp_path / "out")].count(".unfinished") == 1
    assert run(1) == 1
    assert run() == UNITS + 1 - 5
    assert run(out=tmp_path / "at-once") == UNITS + 1
    for name in ("shard-00000.tar", "manifest.json", "card.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "at-once" / name).read_bytes()
    private, at_once = (private_folder(tmp_path / name) for name in ("out", "at-once"))
    ids = "ids/000-000000.jsonl"
    assert (private / ids).read_bytes() == (at_once / ids).read_bytes()
    log = [json.loads(line) for line in (private / "log.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in log if row["event"] == "refused"] == ["unreadable"]


def spoil(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("what", [".bin.partial", ".jsonl.partial", "ids", ".unfinished", "short", "identity", "gone"])
def test_what_was_left_is_not_believed(run, tmp_path, monkeypatch, what):
    """Bits that flipped, files that are shorter, a chunk of another job: the chunk is done from its beginning."""
    assert run(4) == 4
    private = private_folder(tmp_path / "out")
    files = {"".join(path.suffixes): path for path in files_of(tmp_path / "out")}
    if what == "ids":
        (path,) = (private / "ids").glob("*.partial")
        spoil(path, 8)
    elif what == "short":
        os.truncate(files[".bin.partial"], 100)
    elif what == "gone":
        files[".jsonl.partial"].unlink()
    elif what == "identity":
        state = json.loads(files[".unfinished"].read_bytes())
        files[".unfinished"].write_text(json.dumps(state | {"identity": "another"}))
    else:
        spoil(files[what], 40)
    assert run() == UNITS + 1
    monkeypatch.undo()


def test_it_is_written_now_and_then(tmp_path, monkeypatch):
    files = [tmp_path / name for name in ("bin", "jsonl", "ids")]
    for path in files:
        path.write_bytes(b"")
    clock = iter([0.0, 0.5, 1.0, 1.0, 1.5])
    monkeypatch.setattr(unfinished.time, "monotonic", lambda: next(clock))
    one = unfinished.Unfinished(tmp_path / "state", files, "chunk", 0)
    one.keep((0, 0, 0), {"next": 1})
    assert one.left() is None
    one.keep((0, 0, 0), {"next": 2})
    one.keep((0, 0, 0), {"next": 3})
    assert one.left() == ((0, 0, 0), {"next": 2})
    one.forget()
    assert one.left() is None


def test_a_chunk_that_is_done_leaves_no_state(run, tmp_path):
    kept = []
    real = chunk_files.ChunkFiles.finish

    def finish(self, counts):
        kept.append(self._final[1].with_suffix(".unfinished").exists())
        real(self, counts)
        kept.append(self._final[1].with_suffix(".unfinished").exists())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunk_files.ChunkFiles, "finish", finish)
        run()
    assert kept == [True, False]
