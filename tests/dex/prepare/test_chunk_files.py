"""A chunk's three files: whole or not there, of one process, cut back to where the work was."""

import errno
import hashlib
import json

import pytest

from dex.prepare import unfinished
from dex.prepare.chunk_files import Busy, CannotWrite, ChunkFiles, is_done, paths

TAIL = 4


@pytest.fixture
def private(tmp_path):
    for name in ("chunks", "ids"):
        (tmp_path / name).mkdir()
    return tmp_path


def files(private, identity="one"):
    return ChunkFiles(private, "000-000001", identity, TAIL)


def line_of(data):
    return {"id": "x", "size": len(data) - TAIL, "sha256": hashlib.sha256(data).hexdigest()}


def test_files_have_their_names_when_all_of_them_are_written(private):
    with files(private) as chunk:
        chunk.add({"id": "a"}, b"data")
        chunk.add({"id": "b"}, b"more")
        chunk.show({"dropped": "blank"})
        chunk.note({"id": "a", "path": "p"})
        assert not is_done(private, "000-000001")
        chunk.finish({"kept": 2})
    binary, lines, ids = paths(private, "000-000001")
    assert is_done(private, "000-000001") and binary.read_bytes() == b"datamore"
    first, second, third, end = map(json.loads, lines.read_text().splitlines())
    assert (first, second, third) == ({"id": "a", "offset": 0}, {"id": "b", "offset": 4}, {"dropped": "blank"})
    assert end["end"]["bytes"] == 8 and end["end"]["counts"] == {"kept": 2}
    assert json.loads(ids.read_text()) == {"id": "a", "path": "p"}
    assert {path.name for path in private.glob("*/*")} == {"000-000001.bin", "000-000001.jsonl"}


def test_one_process_at_a_time(private):
    with files(private), pytest.raises(Busy), files(private):
        pass


def test_what_was_written_after_a_place_is_taken_back(private):
    with files(private) as chunk:
        chunk.add({"id": "a"}, b"data")
        sizes = chunk.flush()
        chunk.add({"id": "b"}, b"more")
        chunk.cut(sizes)
        assert chunk.flush() == sizes
        with pytest.raises(RuntimeError, match="shorter"):
            chunk.cut((100, 0, 0))


def test_a_killed_run_goes_on_where_its_files_bear_it_out(private, monkeypatch):
    monkeypatch.setattr(unfinished, "EVERY", 0)
    data = b"image" + b"tail"
    with files(private) as chunk:
        chunk.add(line_of(data), data)
        chunk.show({"dropped": "blank"})
        chunk.keep(chunk.flush(), {"next": 3})
    with files(private) as chunk:
        sizes, state = chunk.left()
        assert state == {"next": 3} and sizes[0] == len(data) and sizes[2] == 0
    with files(private, "another") as chunk:
        assert chunk.left() is None


def test_a_full_disk_gets_its_room_back(private):
    with pytest.raises(CannotWrite) as error, files(private) as chunk:
        chunk.add({"id": "a"}, b"data")
        raise CannotWrite(OSError(errno.ENOSPC, "No space left on device"))
    assert error.value.error.errno == errno.ENOSPC
    assert list(private.glob("*/*")) == []
