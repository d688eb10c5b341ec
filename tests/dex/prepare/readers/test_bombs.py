"""The largest files that are read, each in a process whose memory is limited as a worker's is: what it has once the
libraries are loaded, and 512 MiB. Small files that ask for much: `tests/hostile/test_bombs.py`."""

import bz2
import json
import struct
import subprocess
import sys
import zlib

import nibabel
import numpy as np
import pytest
from PIL import Image

MIB = 2**20
READ = """
import json, resource, sys
from dex.prepare import readers
def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
memory, *paths = sys.argv[1:]
limits = readers.Limits(memory_mb=int(memory), pixels=int(memory) * 40_000_000 // 512)
for path in paths:
    readers.load(readers.format_of(path))
limit = status("VmSize") + limits.memory
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in paths:
    stack = frame = None
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = status("VmRSS")
    try:
        count = 0
        for stack in readers.read([path], readers.format_of(path), limits=limits):
            for frame in stack.frames(("axial",), 20):
                count += 1
        outcome = f"{count} frames"
    except readers.Refused as error:
        outcome = error.reason
    print(json.dumps([outcome, status("VmHWM") - before]))
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def run(paths, memory_mb):
    done = subprocess.run(
        [sys.executable, "-c", READ, str(memory_mb), *map(str, paths)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and not done.stderr, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def nifti(shape, dtype):
    header = nibabel.Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header["magic"], header["vox_offset"] = b"n+1", 352
    return header.binaryblock + bytes(4)


def zeros(compress, head, count):
    """`head` and `count` MiB of zeros, compressed piece by piece."""
    block = bytes(MIB)
    return compress.compress(head) + b"".join(compress.compress(block) for _ in range(count)) + compress.flush()


def deflated_dicom(rows, columns, frames):
    pytest.importorskip("pydicom")

    def element(group, number, kind, value):
        value += b"\0" * (len(value) % 2)
        if kind == b"OB":
            return struct.pack("<HH2sHL", group, number, kind, 0, len(value)) + value
        return struct.pack("<HH2sH", group, number, kind, len(value)) + value

    syntax = element(2, 0x10, b"UI", b"1.2.840.10008.1.2.1.99")
    meta = b"\0" * 128 + b"DICM" + element(2, 0, b"UL", struct.pack("<L", len(syntax))) + syntax
    body = element(8, 0x16, b"UI", b"1.2.840.10008.5.1.4.1.1.7") + element(0x28, 2, b"US", struct.pack("<H", 1))
    body += element(0x28, 4, b"CS", b"MONOCHROME2") + element(0x28, 8, b"IS", str(frames).encode())
    for number, value in ((0x10, rows), (0x11, columns), (0x100, 8), (0x101, 8), (0x102, 7), (0x103, 0)):
        body += element(0x28, number, b"US", struct.pack("<H", value))
    size = rows * columns * frames
    body += struct.pack("<HH2sHL", 0x7FE0, 0x10, b"OB", 0, size)
    return meta + zeros(zlib.compressobj(1, zlib.DEFLATED, -15), body, size // MIB)


@pytest.mark.slow
def test_the_largest_that_are_read_fit(tmp_path):
    """With all bounds a quarter of what they are, for the time's sake. Each in a process of its own, which a worker
    that has read other files asks for when it runs out of memory."""
    body = zeros(zlib.compressobj(1, zlib.DEFLATED, 31), nifti((1024, 1024, 40), np.uint16), 80)
    (tmp_path / "a.nii.gz").write_bytes(body)
    Image.new("RGBA", (3160, 3160), (1, 2, 3, 200)).save(tmp_path / "b.png", compress_level=1)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (3160, 3160), (9, 8, 7)).save(tmp_path / "c.jpg", exif=exif)
    Image.new("F", (3160, 3160), 0.5).save(tmp_path / "d.tif")
    (tmp_path / "e.dcm").write_bytes(deflated_dicom(1024, 1024, 40))
    head = (
        "NDims = 3\nDimSize = 1024 1024 40\nElementType = MET_USHORT\nCompressedData = True\nElementDataFile = LOCAL\n"
    )
    (tmp_path / "f.mha").write_bytes(head.encode() + zeros(zlib.compressobj(1), b"", 80))
    head = "NRRD0004\ntype: ushort\ndimension: 3\nsizes: 1024 1024 32\nendian: little\nencoding: bzip2\n\n"
    (tmp_path / "g.nrrd").write_bytes(head.encode() + bz2.compress(bytes(4 * MIB)) * 16)
    colour = zeros(zlib.compressobj(1, zlib.DEFLATED, 31), nifti((1024, 1024, 13, 1, 3), np.uint8), 39)
    (tmp_path / "h.nii.gz").write_bytes(colour)
    names = ("a.nii.gz", "b.png", "c.jpg", "d.tif", "e.dcm", "f.mha", "g.nrrd", "h.nii.gz")
    outcomes = [run([tmp_path / name], memory_mb=128)[0] for name in names]
    expected = ["2 frames", "1 frames", "1 frames", "1 frames", "2 frames", "2 frames", "2 frames", "1 frames"]
    assert [outcome for outcome, _ in outcomes] == expected
    assert max(used for _, used in outcomes) < 128 * MIB
