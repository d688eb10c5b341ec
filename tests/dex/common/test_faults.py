"""A library's exception becomes a sentence about the file, and nothing of its text gets out."""

import io
import lzma
import struct
import zipfile
import zlib

import pytest

from dex.common import faults


def raised(action):
    with pytest.raises(BaseException) as caught:
        action()
    return faults.sentence(caught.value)


def pillow(data):
    image = pytest.importorskip("PIL.Image")
    return lambda: image.open(io.BytesIO(data)).load()


PNG_HEAD = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    "action, says",
    [
        (pillow(b"Doe, Jane"), "first bytes are not those of a picture"),
        (lambda: zipfile.ZipFile(io.BytesIO(b"Doe, Jane")), "not a complete zip archive"),
        (lambda: zlib.decompress(b"Doe, Jane"), "compressed data are damaged"),
        (lambda: lzma.decompress(b"Doe, Jane"), "compressed data are damaged"),
        (lambda: struct.unpack("<Q", b"Doe"), "cut off or inconsistent"),
        (lambda: open("/absent/Doe, Jane"), "the system cannot read it: No such file"),
        (lambda: b"Doe\xff".decode("utf-8"), "bytes that are not text"),
        (lambda: {}["Doe"], "cut off or inconsistent"),
        (lambda: 1 // 0, "an impossible number"),
        (lambda: exec("raise RuntimeError('Doe')"), "damaged, cut off or of another format"),
        (lambda: exec("raise OSError('image file is truncated: Doe')"), "ends before its image does"),
        (lambda: exec("raise OSError('broken data stream: Doe')"), "its data are damaged"),
        (lambda: exec("raise NotImplementedError('Doe')"), "variant of its format"),
    ],
)
def test_what_is_wrong_is_a_sentence(action, says):
    sentence = raised(action)
    assert says in sentence and "Doe" not in sentence
    assert not any(word.endswith(("Error", "Exception")) for word in sentence.split())


def test_the_place_in_the_code_is_said_where_the_file_may_not_be_to_blame():
    def described(action):
        with pytest.raises(BaseException) as caught:
            action()
        return faults.described(caught.value)

    for action in (lambda: {}["Doe"], lambda: exec("raise RuntimeError('Doe')")):
        said = described(action)
        assert "Error at " in said and "test_faults.py:" in said and "Doe" not in said
    for action in (lambda: zlib.decompress(b"Doe, Jane"), lambda: open("/absent/Doe, Jane")):
        assert "test_faults.py" not in described(action)
