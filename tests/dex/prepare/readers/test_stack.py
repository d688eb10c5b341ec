"""Percentiles against numpy, orientation against nibabel, and what a Refused may carry."""

import itertools
import pickle

import numpy as np
import pytest

from dex.prepare.readers import Geometry, Refused, Stack
from dex.prepare.readers.stack import cut


def stack_of(array, keep=True, **fields):
    """A stack that loads the frames of [F, H, W, ...] one by one."""

    def load(wanted):
        return ((number, array[number]) for number in range(len(array)) if wanted(number))

    values = {
        "quantity": "raw",
        "length": len(array),
        "shape": array.shape[1:3],
        "dtype": array.dtype,
        "channels": array.shape[3] if array.ndim == 4 else 1,
        "load": load,
        "holds": lambda stored: keep,
    }
    return Stack(**(values | fields))


DRAW = np.random.default_rng(5)
ARRAYS = {
    "uint8": DRAW.integers(0, 256, (3, 7, 5), dtype=np.uint8),
    "int8": DRAW.integers(-128, 128, (3, 7, 5), dtype=np.int8),
    "uint16": DRAW.integers(0, 65536, (3, 7, 5), dtype=np.uint16),
    "int16": DRAW.integers(-(2**15), 2**15, (3, 7, 5), dtype=np.int16),
    "few": DRAW.integers(-2, 2, (3, 7, 5), dtype=np.int16),
    "int32": DRAW.integers(-(10**6), 10**6, (3, 7, 5), dtype=np.int32),
    "float32": DRAW.normal(0, 1e-3, (3, 7, 5)).astype(np.float32),
    "float64": DRAW.lognormal(0, 5, (3, 7, 5)) * DRAW.choice([-1, 1], (3, 7, 5)),
    "zeros": np.array([[[0.0, -0.0, 1.0, -1.0, -0.0, 0.0]]], np.float32),
    "one": np.array([[[3]]], np.uint16),
    "colour": DRAW.integers(0, 256, (2, 4, 5, 3), dtype=np.uint8),
}
PERCENTS = [(1, 99), (0, 100), (12.5, 50), (33.3, 33.4)]


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("keep", [False, True])
def test_percentiles(name, keep):
    array = ARRAYS[name]
    quantity = "display8" if array.dtype == np.uint8 else "raw"
    stack = stack_of(array, keep, quantity=quantity)
    for percents in PERCENTS:
        expected = np.percentile(array.astype(np.float32), percents)
        assert stack.percentiles(*percents) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("name", ["int16", "uint8", "float64"])
@pytest.mark.parametrize("slope, intercept", [(2.5, -7.0), (-0.5, 3.0), ([1.0, -2.0, 0.5], [0.0, 10.0, -3.0])])
def test_percentiles_of_rescaled_numbers(name, slope, intercept):
    array = ARRAYS[name]
    slope, intercept = (np.array(v) if isinstance(v, list) else v for v in (slope, intercept))
    stack = stack_of(array, slope=slope, intercept=intercept)
    numbers = array * np.reshape(slope, (-1, 1, 1)) + np.reshape(intercept, (-1, 1, 1))
    for percents in PERCENTS:
        expected = np.percentile(numbers.astype(np.float32), percents)
        assert stack.percentiles(*percents) == pytest.approx(expected, rel=1e-6)
    got = np.stack([frame.pixels for frame in stack.frames(("stored",), 1)])
    assert got.dtype == np.float32 and np.allclose(got, numbers, rtol=1e-6)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("slope", "intercept"), [(1.0, 0.0), (2.0, -3.0), (np.array([1.0, 2.0, -0.5]), np.zeros(3))])
def test_nan_is_background(keep, dtype, slope, intercept):
    array = DRAW.normal(5, 2, (3, 7, 5)).astype(dtype)
    array[0, 2:5, 1:4] = array[2] = np.nan
    before = array.copy()
    stack = stack_of(array, keep, slope=slope, intercept=intercept)
    assert not stack.masked
    numbers = (array * np.reshape(slope, (-1, 1, 1)) + np.reshape(intercept, (-1, 1, 1))).astype(np.float32)
    expected = np.where(np.isnan(numbers), np.nanmin(numbers), numbers)
    got = np.stack([frame.pixels for frame in stack.frames(("stored",), 1)])
    assert np.allclose(got, expected, rtol=1e-6) and stack.masked
    assert stack.percentiles(1, 99) == pytest.approx(np.percentile(expected, (1, 99)), rel=1e-6)
    assert np.array_equal(array, before, equal_nan=True)  # the reader's own numbers stay


def test_nearly_nothing_but_nan_is_refused():
    array = np.full((2, 10, 10), np.nan, np.float32)
    array[0, 0, :3] = 1, 2, 3
    with pytest.raises(Refused, match="not finite: 197 of 200 values are NaN"):
        stack_of(array).percentiles(1, 99)
    array[0, 0, 3] = 4
    assert stack_of(array).percentiles(0, 100) == (1, 4)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", ["int16", "float32"])
def test_numbers_of_one_part_say_nothing_about_another(keep, name):
    array = ARRAYS[name]
    stack = stack_of(array, keep, parts=(0, 1, 1))
    assert stack.percentiles(1, 99, 0) == pytest.approx(np.percentile(array[0].astype(np.float32), (1, 99)), rel=1e-6)
    assert stack.percentiles(1, 99, 1) == pytest.approx(np.percentile(array[1:].astype(np.float32), (1, 99)), rel=1e-6)
    assert [frame.part for frame in stack.frames(("stored",), 1)] == [0, 1, 1]


def test_rescaled_numbers_are_what_the_description_says():
    stack = stack_of(ARRAYS["uint16"], slope=2.0, intercept=5.0, windowed=True)
    stack.rescale(0.5, -32768.0)
    got = next(iter(stack.frames(("stored",), 1))).pixels
    assert np.allclose(got, (ARRAYS["uint16"][0] * 2.0 + 5) * 0.5 - 32768)
    assert (stack.quantity, stack.described, stack.windowed) == ("raw", True, False)
    with pytest.raises(Refused, match="slope and intercept of colours"):
        stack_of(ARRAYS["colour"], quantity="display8").rescale(2.0, 0.0)


def test_frames_that_are_not_finite_or_not_alike():
    for bad in (-np.inf, np.inf, 1e300):
        array = np.zeros((2, 3, 3))
        array[1, 1, 1] = bad
        with pytest.raises(Refused, match="not finite"):
            list(stack_of(array).frames(("stored",), 1))
        with pytest.raises(Refused, match="not finite"):
            stack_of(array).percentiles(1, 99)
    with pytest.raises(Refused, match="inconsistent"):
        stack_of(np.zeros((2, 3, 3)), shape=(3, 4)).percentiles(1, 99)
    with pytest.raises(Refused, match="inconsistent"):
        stack_of(np.zeros((2, 3, 3)), length=3).percentiles(1, 99)
    for slope in (0.0, np.nan, np.array([1.0, np.inf])):
        with pytest.raises(Refused, match="slope"):
            stack_of(np.zeros((2, 3, 3)), slope=slope)


def test_asking_for_frames():
    stack = stack_of(ARRAYS["int16"])
    assert [f.label for f in stack.frames(("axial", "coronal"), 2)] == ["frame-0000", "frame-0002"]
    assert [f.label for f in stack_of(ARRAYS["one"]).frames(("axial",), 3)] == ["image"]
    with pytest.raises(ValueError, match="planes"):
        next(stack.frames(("oblique",), 1))
    with pytest.raises(ValueError, match="stride"):
        next(stack.frames(("axial",), 0))
    with pytest.raises(ValueError, match="quantity"):
        stack_of(ARRAYS["int16"], quantity="Hounsfield")


def test_orientation_agrees_with_nibabel():
    orientations = pytest.importorskip("nibabel.orientations")
    draw = np.random.default_rng(1)
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            spacing = draw.uniform(0.5, 4, 3)
            linear = np.zeros((3, 3))
            linear[order, range(3)] = signs
            tilt = np.linalg.qr(np.eye(3) + 0.15 * draw.normal(size=(3, 3)))[0]
            tilt *= np.sign(np.diag(tilt))
            affine = np.eye(4)
            affine[:3, :3] = tilt @ linear * spacing
            geometry = Geometry.from_affine(affine)
            frames = draw.integers(0, 1000, (3, 4, 5))
            target = orientations.io_orientation(affine)
            expected = orientations.apply_orientation(frames.transpose(2, 1, 0), target)
            assert np.array_equal(geometry.canonical(frames), expected)
            assert geometry.spacing == pytest.approx(spacing)
            assert np.array_equal(geometry.affine, affine)


def test_planes_are_those_of_the_embedded_set():
    """The formulas by which the embedded set's volumes were cut."""
    unit = np.random.default_rng(2).integers(0, 99, (4, 5, 6))
    flipped = unit[::-1, ::-1, ::-1]
    assert np.array_equal(cut(unit, "axial", 2), unit[::-1, ::-1, 2].T)
    assert np.array_equal(cut(unit, "coronal", 1), flipped[:, unit.shape[1] - 1 - 1, :].T)
    assert np.array_equal(cut(unit, "sagittal", 3), flipped[unit.shape[0] - 1 - 3].T)


def test_singular_axes_are_refused_and_unknown_spacing_is_one():
    with pytest.raises(Refused, match="axes"):
        Geometry.from_affine(np.diag([1, 1, 0, 1]))
    with pytest.raises(Refused, match="axes"):
        Geometry.from_affine(np.full((4, 4), np.nan))
    assert Geometry.from_affine(np.eye(4), (1, 0, 2)).spacing == (1, 1, 1)
    assert Geometry.from_affine(np.eye(3)).affine is None


def test_a_refusal_pickles_and_names_only_known_reasons():
    error = pickle.loads(pickle.dumps(Refused("too large", "9 bytes")))
    assert (error.reason, error.detail, str(error)) == ("too large", "9 bytes", "too large: 9 bytes")
    assert isinstance(error, ValueError) and str(Refused("crash")) == "crash"
    with pytest.raises(ValueError, match="reason"):
        Refused("other")


@pytest.mark.parametrize(
    ("axes", "spacing", "even", "plane", "count"),
    [
        ("RAS", (1.0, 1.0, 5.0), True, "axial", 4),  # axial slices, however thick
        ("RSA", (1.0, 1.0, 4.0), True, "frame", 4),  # few coronal ones
        ("ASR", (1.0, 1.5, 3.1), True, "frame", 4),  # few sagittal ones
        ("ASR", (1.0, 1.5, 3.0), True, "axial", 5),
        ("ASR", (1.0, 1.0, 1.0), True, "axial", 5),
        ("ASR", (1.0, 1.0, 1.0), False, "frame", 4),
        ("RAS", (4.0, 1.0, 1.0), True, "sagittal", 6),  # sagittal slices, turned to where axial ones lie
        ("RAS", (1.0, 4.0, 1.0), True, "coronal", 5),
        ("ARS", (1.0, 5.0, 2.0), True, "sagittal", 5),
        ("ASR", (1.0, 6.0, 1.5), True, "axial", 5),
        ("RAS", (2.0, 1.0, 1.0), True, "axial", 4),
    ],
)
def test_the_automatic_plane_is_axial_but_not_across_thick_slices(axes, spacing, even, plane, count):
    """axes: where columns, rows and frames point; a stack of 4 frames of 5 rows and 6 columns."""
    linear = np.zeros((3, 3))
    for column, letter in enumerate(axes):
        linear["RAS".index(letter), column] = 1
    geometry = Geometry.from_affine(linear * spacing, spacing, even)
    array = DRAW.integers(0, 100, (4, 5, 6), dtype=np.int16)
    frames = list(stack_of(array, geometry=geometry, volume=True).frames(("auto",), 1))
    assert {frame.label.rpartition("-")[0] for frame in frames} == {plane} and len(frames) == count
    if plane == "frame":
        assert (np.stack([frame.pixels for frame in frames]) == array).all()
    both = list(stack_of(array, geometry=geometry, volume=True).frames(("auto", "stored"), 1))
    assert len({frame.label for frame in both}) == len(both) == (4 if plane == "frame" else count + 4)


def test_a_stack_without_geometry_has_no_automatic_plane():
    assert [frame.label for frame in stack_of(ARRAYS["int16"]).frames(("auto",), 1)] == [
        "frame-0000",
        "frame-0001",
        "frame-0002",
    ]


@pytest.mark.parametrize("keep", [False, True])
def test_a_sample_is_some_frames_as_they_are_stored(keep):
    array, loads = ARRAYS["int16"], []
    stack = stack_of(array, keep, slope=2.0)
    assert (np.stack(list(stack.sample({0, 2}))) == array[[0, 2]]).all()
    load = stack.load
    one = stack_of(array[:1], keep, load=lambda wanted: loads.append(1) or load(wanted))
    for _ in range(2):
        assert (next(one.sample([0])) == array[0]).all()
    assert len(loads) == (1 if keep else 2)  # a picture is decoded once
