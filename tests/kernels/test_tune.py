"""scripts/tune.py without a GPU, and the table that it writes: who reads it, and that it says what was measured."""

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")

from dexkernels.ops.grouped_mlp import triton as grouped_mlp  # noqa: E402
from dexkernels.ops.grouped_mlp.records import Slots  # noqa: E402
from dexkernels.ops.grouped_mlp.triton import _tuned, configurations, gather  # noqa: E402
from dexkernels.ops.triton_common import Tile  # noqa: E402
from dexkernels.records import MLPWeights  # noqa: E402

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/tune.py"


@pytest.fixture(scope="module")
def tune():
    spec = importlib.util.spec_from_file_location("tune", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


@pytest.fixture
def launched(monkeypatch):
    """``(kernel, keyword arguments)`` of every launch; none of them runs."""
    found = []
    monkeypatch.setattr(
        type(gather.fc1_kernel), "run", lambda self, *_, **kwargs: found.append((self.__name__, kwargs))
    )
    return found


def forward(B, N, E=4, **options):
    m, half = {"device": "meta"}, {"device": "meta", "dtype": torch.float16}
    slots = Slots(
        torch.empty(B, 2, **m),
        torch.empty(2 * B, dtype=torch.int64, **m),
        torch.empty(E + 1, dtype=torch.int64, **m),
    )
    weights = MLPWeights(*(torch.empty(s, **half) for s in ((E, 64, 32), (E, 64), (E, 32, 64), (E, 32))))
    grouped_mlp.forward(torch.empty(B, N, 32, **half), slots, weights, True, **options)


FEW, MANY = {"B": 4, "N": 65}, {"B": 64, "N": 65}


def test_a_measured_tile_serves_its_class_of_shapes_alone(launched, monkeypatch):
    shipped = configurations.TILES["fc1", "half", 80]
    monkeypatch.setattr(_tuned, "TILES", {("fc1", "half", 80, "few"): (32, 64, 32, 4, 2)})

    def rows(**options):
        launched.clear()
        forward(**options)
        return [kwargs["ROWS"] for name, kwargs in launched if name == "fc1_kernel"]

    assert rows(**FEW) == [32] and rows(**MANY) == [shipped.rows]
    assert rows(**FEW, tiles=configurations.TILES) == [shipped.rows]


def test_a_measured_path_is_taken_where_it_applies(launched, monkeypatch):
    monkeypatch.setattr(_tuned, "PATHS", {(80, "half", "few"): "aligned"})

    def kernels(**options):
        launched.clear()
        forward(**options)
        return {name for name, _ in launched}

    assert "fc1_blocks_kernel" in kernels(**FEW)
    assert "fc1_blocks_kernel" not in kernels(**MANY) | kernels(B=4, N=5) | kernels(**FEW, path="gather")


def test_classes_of_shapes():
    assert [configurations.shape_class(rows, 8) for rows in (0, 8 * 1024 - 1, 8 * 1024)] == ["few", "few", "many"]


def test_the_table_comes_back(tune):
    tiles = {("fc1", "half", 90, "many"): Tile(64, 256, 64, 8, 4, True), ("fc1", "half", 80, "few"): (64, 64, 32, 4, 3)}
    paths = {(90, "half", "many"): "aligned"}
    read = {}
    exec(tune.table(tiles, paths, "a GPU, a date"), read)
    assert read["TILES"] == tiles and read["PATHS"] == paths


def test_the_committed_table_is_the_tuners(tune):
    text = Path(_tuned.__file__).read_text()
    noted = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ") and "fmt" not in line]
    assert text == tune.table(_tuned.TILES, _tuned.PATHS, "".join(noted))
    assert bool(noted) == bool(_tuned.TILES or _tuned.PATHS), "what was measured says on what"
    for name, precision, arch, kind in _tuned.TILES:
        assert (name, precision, arch) in configurations.TILES and kind in configurations.CLASSES


def test_a_neighbour_differs_in_one_number(tune):
    for key, tile in configurations.TILES.items():
        near = list(tune.neighbours(key, tile))
        assert len(near) >= 5 and len(set(near)) == len(near)
        for other in near:
            changed = [f for f in Tile._fields if getattr(tile, f) != getattr(other, f)]
            assert len(changed) == 1 and changed[0] not in tune.FIXED.get(key[0], ())


def test_the_climb_takes_what_is_right_and_faster(tune):
    cost = {1: 10.0, 2: 9.0, 3: 8.9, 4: 5.0, 5: 1.0}

    def climbed(wrong=()):
        seen = []

        def times(some):
            seen.extend(some)
            return [cost[n] for n in some]

        near = lambda n: iter([m for m in (n - 1, n + 1) if m in cost])  # noqa: E731
        return tune.climb(1, near, lambda n: n not in wrong, times), seen

    # From 2 to 3 is less than the 2 % that count.
    assert climbed() == (2, [1, 2, 2, 3])
    cost[3] = 7.0
    assert climbed()[0] == 5
    best, seen = climbed(wrong={4})
    assert best == 3 and 4 not in seen


SHAPE = {"B": 4, "N": 5, "D": 16, "H": 32, "E": 4, "K": 2}


def test_wrong_results_and_changing_bits_are_no_candidates(tune, monkeypatch):
    timer = tune.Timer(torch.device("cuda" if torch.get_default_device().type == "cuda" else "cpu"), tiny=True)
    bench = tune.Bench(timer, torch.float32, SHAPE)
    assert bench.right(configurations.TILES, "gather")
    assert len(bench.times([(configurations.TILES, "gather")] * 2)) == 2
    real, calls = grouped_mlp.forward, itertools.count()
    for scale in (lambda: 1.001, lambda: 1 + 1e-6 * (next(calls) % 2)):

        def forward(*args, scale=scale, **kwargs):
            result = real(*args, **kwargs)
            return result._replace(out=result.out * scale())

        monkeypatch.setattr(grouped_mlp, "forward", forward)
        assert not bench.right(configurations.TILES, "gather")


def test_what_is_faster_and_compiles_well_goes_into_the_table(tune, monkeypatch):
    timer = tune.Timer(torch.device("cuda" if torch.get_default_device().type == "cuda" else "cpu"), tiny=True)
    bench = tune.Bench(timer, torch.float32, SHAPE)
    arch, key = tune.architecture(bench.grad.device), "to_slots"
    stages = configurations.TILES[key, "float", arch].stages
    monkeypatch.setattr(tune, "LADDERS", {"stages": (stages, stages + 1, stages + 2)})
    monkeypatch.setattr(
        bench, "times", lambda runs: [1 / tiles[key, "float", arch].stages for tiles, path in runs if path == "gather"]
    )
    spilling = {stages + 2}

    def facts(key, tile, dtype, arch):
        return tune.Facts(255, 0, 9 if tile.stages in spilling else 0, 1000, "fma")

    monkeypatch.setattr(tune, "facts", facts)
    monkeypatch.setattr(tune, "taking", lambda key, *_: key[0] == "to_slots")
    found, path = tune.tune(bench, tune.keys(torch.float32, arch), arch)
    assert {k: tile.stages for k, tile in found.items()} == {(key, "float", arch): stages + 1} and path is None


def test_list_needs_no_gpu():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, SCRIPT, "--list", "--shipped"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert lines.keys() == {name for name, precision, arch in configurations.TILES if (precision, arch) == ("half", 90)}
    for key, line in lines.items():
        assert f"rows {configurations.TILES[key, 'half', 90].rows}" in line and "m64n" in line
        assert line.endswith("a candidate")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 2 and "expected a GPU that torch can use" in done.stderr
