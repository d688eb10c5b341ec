"""csrc/grouped_mlp_sm90's boxes, ring and tensor maps, exhaustively for small sizes, and the code of its kernels.

`python test_grouped_mlp_sm90.py LIBRARY` runs the arithmetic alone: what the sanitizers watch.
"""

import ctypes
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from host_code import check_memory, compiled

CSRC = Path(__file__).resolve().parents[2] / "csrc"
TILE, CHUNK, STAGES = 128, 32, 6


class Host:
    """The C functions on numpy arrays. Every array is exactly as long as it must be."""

    def __init__(self, path: Path):
        self.lib = ctypes.CDLL(str(path))

    def boxes(self, order, offsets, images, tokens, top_k, first, stop):
        """``[128, 3]``: log2 of the rows (-1: no box begins here), image, token of the box at each row of a tile."""
        sizes = np.array([len(offsets) - 1, len(order), images, tokens, top_k], np.int64)
        boxes = np.full((TILE, 3), -9, np.int32)
        self.lib.host_boxes(at(order), at(offsets), at(sizes), at(np.array([0, first, stop], np.int32)), at(boxes))
        return boxes

    def ring(self, steps, count):
        places = np.empty((count, 2), np.uint32)
        self.lib.host_ring(steps, ctypes.c_int64(count), at(places))
        return places

    def map_shape(self, *given):
        shape = np.empty(8, np.uint64)
        self.lib.host_map_shape(at(np.array(given, np.int64)), at(shape))
        return shape.tolist()


def at(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return array.ctypes.data_as(ctypes.c_void_p)


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> Host:
    return Host(compiled("grouped_mlp_sm90.cpp", tmp_path_factory.mktemp("host")))


# ---- boxes


def routing(tokens: int, top_k: int = 2, experts: int = 3, images: int = 4):
    """Slot order and offsets of a routing that leaves an expert without images."""
    rng = np.random.default_rng(tokens)
    chosen = np.stack([rng.permutation(experts - 1)[:top_k] for _ in range(images)]).reshape(-1)
    order = np.argsort(chosen, kind="stable").astype(np.int64)
    return order, np.searchsorted(np.sort(chosen), np.arange(experts + 1)).astype(np.int64)


def check_boxes(host, order, offsets, images, tokens, top_k, first, stop):
    """Every row of a tile is in one box, with its image and token; those past the last are outside of the tensor."""
    of_image = np.concatenate([order // top_k, np.arange(images)])
    boxes = host.boxes(order, offsets, images, tokens, top_k, first, stop)
    covered = 0
    for row in np.flatnonzero(boxes[:, 0] >= 0):
        log2, image, token = boxes[row]
        assert row == covered and (row + 2**log2 - 1) // CHUNK == row // CHUNK, "one warp copies a whole box"
        for i in range(2**log2):
            if row + i < stop - first:
                position, of_row = divmod(first + row + i, tokens)
                assert (image, token + i) == (of_image[position], of_row)
            else:
                assert (image, token) == (0, tokens), "past the last token: zeros"
        covered += 2**log2
    assert covered == TILE
    return boxes


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 17, 31, 32, 33, 64, 65, 130, 257])
def test_boxes_cover_every_row_once(host, tokens):
    order, offsets = routing(tokens)
    rows = (len(order) + 4) * tokens
    for first in sorted({*range(min(rows, 70)), *range(0, rows, 127), rows - 1}):
        for stop in sorted({first + 1, first + 33, first + 100, first + TILE}):
            if stop <= rows:
                check_boxes(host, order, offsets, 4, tokens, 2, first, stop)


def test_an_image_of_a_tile_is_four_boxes_and_65_tokens_need_few(host):
    order, offsets = routing(257)
    assert (check_boxes(host, order, offsets, 0, 257, 2, 0, TILE)[:, 0] >= 0).sum() == 4
    order, offsets = routing(65)
    counts = [
        (check_boxes(host, order, offsets, 0, 65, 2, first, first + TILE)[:, 0] >= 0).sum() for first in range(65)
    ]
    assert max(counts) <= 16 and np.mean(counts) < 12


def test_rows_at_the_limit(host):
    """2^31 - 2^16 rows, as many as Python lets through: one image of many tokens, and many images of one."""
    rows = 2**31 - 2**16
    order, offsets = np.zeros(1, np.int64), np.array([0, 1], np.int64)
    boxes = host.boxes(order, offsets, 0, rows, 1, rows - 100, rows)
    assert boxes[0].tolist() == [5, 0, rows - 100] and boxes[96].tolist() == [2, 0, rows - 4]
    assert boxes[100].tolist() == [4, 0, rows]


# ---- ring


@pytest.mark.parametrize("steps", range(1, 20))
def test_the_ring_is_passed_in_turn(host, steps):
    number = np.arange(200) * steps
    assert (host.ring(steps, 200) == np.stack([number % STAGES, number // STAGES % 2], 1)).all()


# ---- tensor maps


def test_strides_of_a_single_row_or_matrix_are_ones_that_a_map_may_have(host):
    assert host.map_shape(3, 65, 40, 5000, 72, 8) == [40, 65, 3, 144, 10000, 64, 8, 1]
    assert host.map_shape(1, 65, 40, 3, 72, 8)[3:5] == [144, 65 * 144]
    assert host.map_shape(3, 1, 40, 5000, 3, 8)[3:5] == [80, 10000]
    assert host.map_shape(2**20, 2**11, 8, 2**33, 2**22, 1)[:5] == [8, 2**11, 2**20, 2**23, 2**34]


# ---- machine code


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory) -> dict[str, list[str]]:
    """Kernel -> its instructions; the compiler's wrapper has refused spills and C7510."""
    compiler = shutil.which(os.environ.get("CUDACXX") or "nvcc")
    if compiler is None:
        pytest.skip("no nvcc on this machine")
    from test_library import dump

    options = ["-O3", "-std=c++17", "-arch=sm_90a", "-DNDEBUG", f"-I{CSRC}", "-Xptxas=-v,--warn-on-spills", "-cubin"]
    folder, lines = tmp_path_factory.mktemp("sm90"), []
    for name in ("fc1", "hidden_grad"):
        source, cubin = CSRC / f"grouped_mlp_sm90/{name}.cu", folder / f"{name}.cubin"
        command = [sys.executable, CSRC / "strict_nvcc.py", compiler, *options, source, "-o", cubin]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines += dump(cubin, "-sass").splitlines()
    code, kernel = {}, None
    for line in lines:
        if found := re.search(r"Function : (\w+)", line):
            kernel = code.setdefault(found[1], [])
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Zx0-9_.]*)", line):
            kernel.append(found[1])
    return code


PER_KERNEL = {"fc1_sm90_kernel": (2, 32), "hidden_grad_sm90_kernel": (3, 32)}
"""Kernel -> its tensor copies (those of weights that are terms row by row are two), and its stores of 16 bytes."""


@pytest.mark.slow
def test_products_are_wgmma_operands_come_by_tma_and_nothing_is_spilled(machine_code):
    assert len(machine_code) == 4, "two kernels in bfloat16 and float16"
    for name, code in machine_code.items():
        copies, stores = next(counts for kernel, counts in PER_KERNEL.items() if kernel in name)
        kinds = {"HGMMA.64x128x16.F32": 8, "UTMALDG.3D": copies, "USETMAXREG": 2, "STG.E.128": stores}
        assert {kind: sum(op.startswith(kind) for op in code) for kind in kinds} == kinds, name
        # No local memory at all: nothing is spilled. No copies by threads, no products of registers.
        assert not [op for op in code if op.startswith(("LDL", "STL", "LDGSTS", "HMMA", "ATOM", "RED."))], name


# ---- sanitizers


def test_nothing_is_read_or_written_out_of_bounds(tmp_path):
    check_memory("grouped_mlp_sm90.cpp", __file__, tmp_path, "all cases")


def main(library: str, mode: str = "cases") -> None:
    host = Host(Path(library))
    if mode == "overrun":
        # One place more than there is room for: the sanitizer must see it.
        host.lib.host_ring(1, ctypes.c_int64(501), at(np.empty((500, 2), np.uint32)))
        return
    for tokens in (1, 5, 65, 257):
        test_boxes_cover_every_row_once(host, tokens)
    test_rows_at_the_limit(host)
    for steps in itertools.chain(range(1, 8), (2**26,)):
        host.ring(steps, 50)
    test_strides_of_a_single_row_or_matrix_are_ones_that_a_map_may_have(host)
    print("all cases")


if __name__ == "__main__":
    main(*sys.argv[1:])
