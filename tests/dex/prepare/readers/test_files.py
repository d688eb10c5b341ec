"""Opening, unpacking and silence: what every reader relies on."""

import errno
import gzip
import logging
import os
import zlib

import numpy as np
import pytest
from volume_files import DRAW

from dex.common import faults
from dex.prepare.readers import Refused
from dex.prepare.readers.files import Unpacked, fill, opened, quiet


@pytest.mark.parametrize("cuts", [(), (0,), (17, 17, 5000), (1, 2, 3)])
def test_gzip_members_are_one_file(tmp_path, cuts):
    data = DRAW.integers(0, 256, 2**18, dtype=np.uint8).tobytes()
    places = [0, *cuts, len(data)]
    members = [gzip.compress(data[a:b]) for a, b in zip(places, places[1:], strict=False)]
    for tail in (b"", bytes(10), bytes(2**17), b"x", bytes(9) + b"\x1f", b"appended " * 2**14):
        (tmp_path / "a.gz").write_bytes(b"".join(members) + tail)
        with opened(tmp_path / "a.gz") as raw:
            file = Unpacked(raw)
            assert file.read(540) == data[:540]
            file.seek(352)
            assert file.read(2**20) == data[352:] and file.read(1) == b""
            file.seek(2**17 + 1)
            assert file.read(9) == data[2**17 + 1 :][:9]


@pytest.mark.parametrize("harm", [lambda d: d[:-1], lambda d: d[:-9], lambda d: d[:-6] + b"abcdef"])
def test_damaged_gzip_is_refused(tmp_path, harm):
    (tmp_path / "a.gz").write_bytes(harm(gzip.compress(bytes(5000))))
    with opened(tmp_path / "a.gz") as raw, pytest.raises((Refused, zlib.error)):
        file = Unpacked(raw)
        assert len(file.read(5000)) == 5000
        file.read(1)


def test_only_regular_files_are_opened(tmp_path):
    plain = tmp_path / "a"
    plain.write_bytes(b"0123456789")
    (tmp_path / "link").symlink_to(plain)
    os.mkfifo(tmp_path / "pipe")
    before = len(os.listdir("/dev/fd"))
    for name in ("link", "pipe", "absent", ".", "a\0b"):
        with pytest.raises(Refused) as caught:
            opened(os.path.join(tmp_path, name))
        assert caught.value.reason == "unreadable" and str(tmp_path) not in str(caught.value)
    with pytest.raises(Refused):
        opened("/dev/zero")
    assert len(os.listdir("/dev/fd")) == before
    with opened(plain) as file:
        assert file.read(10**15) == b"0123456789"  # no more is allocated than is there
        file.seek(2)
        assert file.read() == b"23456789"
        file.seek(0)
        file.largest = 4
        assert file.read(4) == b"0123"
        with pytest.raises(Refused, match="too large"):
            file.read(5)
        file.calls = 1
        file.read(1)
        with pytest.raises(Refused, match="too large"):
            file.read(1)
        file.calls = 10
        file.seek(8)
        with pytest.raises(Refused, match="ends after 2"):
            fill(file, np.empty(3, np.uint8))


def test_no_text_of_an_exception_leaves():
    with pytest.raises(Refused) as caught, quiet("thing"):
        raise KeyError("Canary^Patient")
    says = f"unreadable: thing: {faults.sentence(KeyError())} (KeyError at test_files.py:"  # or the code's fault
    assert str(caught.value).startswith(says) and caught.value.__cause__ is None
    assert "Canary" not in f"{caught.value} {caught.value!r}"
    with pytest.raises(Refused, match="too large"), quiet("thing"):
        raise MemoryError
    for kind in (KeyboardInterrupt, SystemExit):
        with pytest.raises(kind), quiet("thing"):
            raise kind
    panic = type("PanicException", (BaseException,), {})  # as pyo3 has it
    with pytest.raises(Refused, match="unreadable: thing: it is damaged"), quiet("thing"):
        raise panic
    with pytest.raises(Refused, match="constant"), quiet("thing"):
        raise Refused("constant")


def test_a_process_without_descriptors_blames_no_file():
    for number in (errno.EMFILE, errno.ENFILE):
        with pytest.raises(OSError, match=os.strerror(number)), quiet("thing"):
            raise OSError(number, os.strerror(number))
    with pytest.raises(Refused, match="the system cannot read it: Input/output error"), quiet("thing"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_no_log_of_a_library_leaves(caplog):
    """Whichever library it is: its messages may hold what a header says."""
    with pytest.raises(Refused), quiet("thing"):
        logging.getLogger("some.library").critical("Canary^Patient")
        raise ValueError
    assert caplog.records == []
    logging.getLogger("some.library").warning("afterwards")
    assert [record.getMessage() for record in caplog.records] == ["afterwards"]
