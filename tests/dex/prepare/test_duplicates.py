"""Duplicates against brute force over Python integers, and the cases that decide what a duplicate is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dex.data import open_dataset
from dex.prepare import duplicates
from dex.prepare.duplicates import EXACT, KEEP, NEAR, between, find
from dex.prepare.normalise import difference_hash


def near(a: int, b: int) -> bool:
    distance = (a ^ b).bit_count()
    return distance <= 10 and 10 * distance <= (a | b).bit_count()


def brute_force(pixels, hashes, unit, volume):
    numbers = [int.from_bytes(row.tobytes(), "big") for row in hashes]
    kept, kind, of = [], [], []
    for i in range(len(numbers)):
        exact = [j for j in kept if (pixels[i] == pixels[j]).all()]
        alike = [
            j for j in kept if near(numbers[i], numbers[j]) and not (unit[i] == unit[j] and volume[i] and volume[j])
        ]
        kind.append(EXACT if exact else NEAR if alike else KEEP)
        of.append((exact or alike or [-1])[0])
        if kind[-1] == KEEP:
            kept.append(i)
    return kind, of


def brute_force_between(hashes_a, pixels_a, hashes_b, pixels_b):
    numbers = [[int.from_bytes(row.tobytes(), "big") for row in hashes] for hashes in (hashes_a, hashes_b)]
    kind, of = [], []
    for i, number in enumerate(numbers[1]):
        exact = [j for j in range(len(pixels_a)) if (pixels_a[j] == pixels_b[i]).all()]
        alike = [j for j, other in enumerate(numbers[0]) if near(number, other)]
        kind.append(EXACT if exact else NEAR if alike else KEEP)
        of.append((exact or alike or [-1])[0])
    return kind, of


def clusters(seed: int, count: int):
    """Images around some centres, from nearly empty hashes to nearly full ones; some pixels occur twice."""
    rng = np.random.default_rng(seed)
    density = rng.choice([0, 0.01, 0.03, 0.05, 0.1, 0.2, 0.3, 0.36, 0.5, 0.9], rng.integers(1, 40))
    centres = rng.random((len(density), 256)) < density[:, None]
    bits = centres[rng.integers(len(centres), size=count)]
    bits ^= np.argsort(rng.random((count, 256)), axis=1) < rng.integers(0, 14, count)[:, None]
    hashes, pixels = np.packbits(bits, axis=1), rng.integers(0, 256, (count, 32), np.uint8)
    twice, origin = np.flatnonzero(rng.random(count) < 0.1), rng.integers(0, count, count)
    pixels[twice] = pixels[origin[twice]]
    hashes[twice[::2]] = hashes[origin[twice[::2]]]
    unit = rng.integers(0, 8, count)
    return pixels, hashes, unit, (rng.random(8) < 0.6)[unit]


def table(*numbers: int) -> np.ndarray:
    return np.frombuffer(b"".join(number.to_bytes(32, "big") for number in numbers), np.uint8).reshape(-1, 32)


def different(count: int) -> np.ndarray:
    return table(*range(1, count + 1))


def apart(count: int) -> dict:
    """Arguments for images that are no slices of volumes and have different pixels."""
    return {"pixels": different(count), "unit": np.zeros(count, np.int64), "volume": np.zeros(count, bool)}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("block", "pairs", "open_pairs"), [(4096, 2**18, 2**22), (64, 20, 50)])
def test_equals_brute_force(seed, block, pairs, open_pairs, monkeypatch):
    for name, value in (("_BLOCK", block), ("_PAIRS", pairs), ("_OPEN_PAIRS", open_pairs)):
        monkeypatch.setattr(duplicates, name, value)
    images = clusters(seed, 900)
    kind, of = find(*images)
    expected = brute_force(*images)
    assert set(expected[0]) == {KEEP, EXACT, NEAR}
    assert kind.tolist() == expected[0] and of.tolist() == expected[1]
    assert kind.dtype == np.int8 and of.dtype == np.int64


@pytest.mark.parametrize("seed", range(4))
def test_between_equals_brute_force(seed, monkeypatch):
    monkeypatch.setattr(duplicates, "_BLOCK", 100)
    pixels, hashes = clusters(seed, 800)[:2]
    arguments = hashes[:500], pixels[:500], hashes[500:], pixels[500:]
    kind, of = between(*arguments)
    expected = brute_force_between(*arguments)
    assert set(expected[0]) == {KEEP, EXACT, NEAR}
    assert kind.tolist() == expected[0] and of.tolist() == expected[1]


@st.composite
def few_images(draw):
    """Up to 12 images whose hashes are a step or two of some bits away from each other."""
    start = draw(st.sampled_from([0, (1 << 9) - 1, (1 << 91) - 1, (1 << 100) - 1, (1 << 256) - 1]))
    hashes = []
    for _ in range(draw(st.integers(1, 12))):
        number = draw(st.sampled_from([start, *hashes]))
        first, length = draw(st.integers(0, 255)), draw(st.integers(0, 12))
        hashes.append(number ^ ((((1 << length) - 1) << first) & ((1 << 256) - 1)))
    count = len(hashes)
    numbers = st.lists(st.integers(0, 3), min_size=count, max_size=count)
    unit = draw(numbers)
    volume = [draw(st.booleans()) for _ in range(count)]
    return table(*draw(numbers)), table(*hashes), np.array(unit), np.array(volume)


@settings(max_examples=150, deadline=None)
@given(few_images())
def test_any_few_images_equal_brute_force(images):
    kind, of = find(*images)
    expected = brute_force(*images)
    assert (kind.tolist(), of.tolist()) == expected


@pytest.mark.parametrize(
    ("ones", "distance", "alike"),
    [(120, 10, True), (120, 11, False), (99, 10, True), (98, 10, True), (80, 9, False), (81, 9, True), (90, 10, True)]
    + [(9, 1, True), (8, 1, False), (0, 0, True), (5, 0, True), (18, 2, True), (17, 2, False), (89, 10, False)],
)
def test_bounds_of_near(ones, distance, alike):
    """The second hash has the ones of the first and `distance` more: |a or b| = ones + distance."""
    a, b = (1 << ones) - 1, (1 << (ones + distance)) - 1
    for order in ((a, b), (b, a)):
        kind, _ = find(hashes=table(*order), **apart(2))
        assert kind.tolist() == [KEEP, NEAR if alike else KEEP]


def test_only_kept_images_are_compared_with():
    """a ~ b ~ c but not a ~ c: b is dropped for a, so that c stays; it is c that d repeats."""
    a = (1 << 150) - 1
    b, c, d = a >> 8, a >> 16, a >> 17
    kind, of = find(hashes=table(a, b, c, d), **apart(4))
    assert kind.tolist() == [KEEP, NEAR, KEEP, NEAR] and of.tolist() == [-1, 0, -1, 2]


def test_slices_of_one_volume_are_only_exact_duplicates():
    full = (1 << 150) - 1
    hashes, pixels = table(full, full, full, full, full), table(1, 2, 1, 3, 4)
    unit, volume = np.array([7, 7, 7, 8, 7]), np.array([True, True, True, True, False])
    kind, of = find(pixels, hashes, unit, volume)
    assert kind.tolist() == [KEEP, KEEP, EXACT, NEAR, NEAR] and of.tolist() == [-1, -1, 0, 0, 0]


@pytest.mark.parametrize("volume", [(True, False), (False, True), (False, False)])
def test_both_must_be_slices_of_the_volume(volume):
    full = (1 << 150) - 1
    kind, _ = find(table(1, 2), table(full, full), np.zeros(2, np.int64), np.array(volume))
    assert kind.tolist() == [KEEP, NEAR]


def test_exact_goes_before_near():
    full = (1 << 150) - 1
    kind, of = find(table(1, 2, 2), table(full, 1, full), np.arange(3), np.zeros(3, bool))
    assert kind.tolist() == [KEEP, KEEP, EXACT] and of.tolist() == [-1, -1, 1]


@pytest.mark.parametrize("ones", [0, 3, 60, 150])
def test_many_equal_hashes(ones):
    """Clusters in which every band is equal: one volume keeps all of its slices, everything else goes."""
    count = 20_000
    hashes = np.repeat(table((1 << ones) - 1), count, axis=0)
    pixels = np.zeros((count, 32), np.uint8)
    pixels[:, :4] = np.arange(count, dtype=np.uint32).view(np.uint8).reshape(-1, 4)
    unit = np.arange(count) % 4
    kind, of = find(pixels, hashes, unit, np.ones(count, bool))
    assert (kind == np.where(unit == 0, KEEP, NEAR)).all()
    assert (of == np.where(unit == 0, -1, 0)).all()


def test_same_images_in_the_embedded_set_are_found_after_a_change():
    """Brighter, noisier, JPEG again, smaller: near duplicates of the image they were made from."""
    dataset = open_dataset(None)
    rng = np.random.default_rng(0)
    originals, changed = [], []
    for index in range(0, len(dataset), 40):
        image = dataset[index].image.numpy().transpose(1, 2, 0).copy()
        noisy = np.clip(image * 0.9 + 12 + rng.normal(0, 2, image.shape), 0, 255).astype(np.uint8)
        small = np.asarray(Image.fromarray(noisy).resize((128, 128)))
        originals.append(difference_hash(image))
        changed.append(difference_hash(small))
    hashes = table(*originals), table(*changed)
    kind, of = between(hashes[0], different(len(originals)), hashes[1], table(*range(100, 100 + len(changed))))
    found = of == np.arange(len(of))
    assert found.mean() >= 0.7 and (kind[found] == NEAR).all()


def test_no_images():
    empty = np.empty((0, 32), np.uint8)
    kind, of = find(empty, empty, np.empty(0, np.int64), np.empty(0, bool))
    assert len(kind) == len(of) == 0
    assert between(empty, empty, table(5), table(6))[0].tolist() == [KEEP]
    assert between(table(5), table(6), empty, empty)[0].tolist() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hashes": np.zeros((3, 16), np.uint8)}, r"hashes: expected uint8 \[n, 32\]"),
        ({"pixels": np.zeros((3, 32), np.int16)}, r"pixels: expected uint8 \[n, 32\], got int16"),
        ({"hashes": table(1, 2)}, "hashes: expected 3 rows"),
        ({"unit": np.zeros(3)}, "unit: expected 3 rows, one per image, got float64"),
        ({"volume": np.zeros(2, bool)}, "volume: expected 3 rows"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        find(**{"hashes": table(1, 2, 3), **apart(3), **change})


def test_between_names_wrong_arguments():
    with pytest.raises(ValueError, match="pixels_b: expected 1 rows"):
        between(table(1), table(1), table(1), table(1, 2))
