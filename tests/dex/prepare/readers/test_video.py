"""Videos: which container is opened, by which demuxer, and what it declares."""

import os
import struct

import numpy as np
import pytest
from flat_files import read

from dex.prepare import readers
from dex.prepare.readers import Refused


def video(path, frames, code, size=(64, 48)):
    cv2 = pytest.importorskip("cv2")
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*code), 10, size)
    assert writer.isOpened()
    for number in range(frames):
        frame = np.zeros((size[1], size[0], 3), np.uint8)
        frame[:, :32] = (255, 0, 0)  # blue, since OpenCV's order is the reverse
        frame[:24, 32:] = 2 * number
        writer.write(frame)
    writer.release()
    return path


@pytest.mark.parametrize("name, code", [("a.mp4", "mp4v"), ("a.avi", "MJPG"), ("a.mkv", "MJPG"), ("a.mov", "mp4v")])
def test_video(tmp_path, name, code):
    (stack,) = read(video(tmp_path / name, 70, code))
    assert stack.quantity == "display8" and not stack.volume and stack.shape == (48, 64)
    got = list(stack.frames(("axial",), 30))
    assert [frame.label for frame in got] == ["frame-0000", "frame-0030", "frame-0060"]
    for number, frame in zip((0, 30, 60), got, strict=True):
        assert frame.pixels.dtype == np.uint8 and np.abs(frame.pixels[36, 10].astype(int) - [0, 0, 255]).max() < 12
        assert np.abs(frame.pixels[10, 50].astype(int) - 2 * number).max() < 8
    assert len(list(stack.frames(("axial",), 1))) == 70  # again, from the start


@pytest.mark.parametrize("name, code", [("a.avi", "MJPG"), ("a.mkv", "mp4v")])
def test_a_video_that_was_cut_off_says_so(tmp_path, name, code):
    data = video(tmp_path / name, 70, code).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    (stack,) = read(tmp_path / name)
    for _ in range(2):
        assert 0 < len(list(stack.frames(("axial",), 1))) < 63
        (part,) = stack.refused
        assert part.reason == "inconsistent" and part.detail.startswith("70 frames declared, ")


def test_what_is_no_video_container_is_not_opened(tmp_path, capfd):
    pytest.importorskip("cv2")
    real = video(tmp_path / "a.mp4", 3, "mp4v")
    playlists = {
        "b.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{real}\n#EXT-X-ENDLIST\n",
        "c.avi": f"ffconcat version 1.0\nfile '{real}'\n",
        "d.mkv": "http://127.0.0.1:9/a.mp4",
        "e.mov": f"v=0\nc=IN IP4 127.0.0.1\n{real}",
    }
    for name, text in playlists.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(Refused, match="not a supported video container"):
            read(tmp_path / name)
    whole = real.read_bytes()
    for content in (whole[:200], whole[:8] + bytes(1000), b"RIFF" + bytes(4) + b"AVI " + bytes(500)):
        (tmp_path / "b.mp4").write_bytes(content)
        with pytest.raises(Refused) as caught:
            list(read(tmp_path / "b.mp4")[0].frames(("axial",), 1))
        assert caught.value.reason in ("unreadable", "no image", "unsupported")
    out, error = capfd.readouterr()
    assert str(tmp_path) not in out + error


def test_only_the_recognised_demuxer_and_files_are_allowed(tmp_path, monkeypatch):
    cv2 = pytest.importorskip("cv2")
    seen = []
    real = cv2.VideoCapture
    monkeypatch.setattr(
        cv2,
        "VideoCapture",
        lambda *arguments: (seen.append((arguments[0], os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"])), real(*arguments))[
            1
        ],
    )
    monkeypatch.setenv("OPENCV_FFMPEG_CAPTURE_OPTIONS", "mine;1")
    read(video(tmp_path / "a.avi", 3, "MJPG"))
    ((name, options),) = seen
    assert name.startswith("/dev/fd/") and options == "protocol_whitelist;file|format_whitelist;avi"
    assert os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] == "mine;1"
    monkeypatch.setattr(readers.video, "_demuxer", lambda file, limits: "mov")  # the content is an AVI's
    with pytest.raises(Refused, match="unreadable"):
        read(tmp_path / "a.avi")


def test_a_video_that_declares_too_much(tmp_path):
    pytest.importorskip("cv2")
    for name, code, mark, back in (("a.avi", "MJPG", b"avih", 40), ("a.mp4", "mp4v", b"tkhd", 80)):
        data = bytearray(video(tmp_path / name, 3, code).read_bytes())
        place = data.index(mark) + back
        if code == "MJPG":
            data[place : place + 8] = struct.pack("<2L", 60000, 60000)
        else:
            data[place : place + 8] = struct.pack(">2L", 60000 << 16, 60000 << 16)
        (tmp_path / name).write_bytes(data)
        with pytest.raises(Refused, match="too large"):
            read(tmp_path / name)
