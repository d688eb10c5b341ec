"""What all data sets share: views, and the warning about 16-bit images that use little of their range."""

import hashlib
import logging

import numpy as np
import pytest
from number_set import Numbers
from picture_files import WIDE, npy, only, png, put

from dex.data import Loader, open_dataset

TWELVE = (WIDE // 16).clip(0, 4095)


def _warnings(caplog):
    return [record.getMessage() for record in caplog.records if "16-bit" in record.getMessage()]


@pytest.mark.parametrize(
    "data, suffix", [(png(TWELVE), "png"), (npy(TWELVE), "npy"), (npy(TWELVE.astype(">u2")), "npy")]
)
def test_twelve_bits_in_sixteen_are_warned_of_once(data, suffix, tmp_path, caplog):
    put(tmp_path, **{f"m__{number}_dot_{suffix}": data for number in range(3)}, m__a_dot_png=png(WIDE))
    dataset = open_dataset(tmp_path)
    parts = [dataset, dataset.split("train"), dataset.split("val")]
    assert dataset.dim is None and _warnings(caplog) == []
    for part in parts:
        for index in range(len(part)):
            assert part[index].image.max() == (255 if part.sample_id(index) == "m/a.png" else 16)  # the rule stands
    (message,) = _warnings(caplog)
    assert f"'m/0.{suffix}' has no value above 4095" in message and "full range" in message and "[0, 1]" in message
    assert caplog.records[-1].name == "dex.data" and {part.dim for part in parts} == {(f"m/0.{suffix}", 4095)}


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_warn_once_between_them(workers, tmp_path, caplog):
    dataset = open_dataset(put(tmp_path, **{f"m__{number}_dot_png": png(TWELVE) for number in range(8)}))
    with caplog.at_level(logging.WARNING, "dex.data"):
        for _ in range(2):
            with Loader(dataset, 2, seed=0, num_workers=workers) as loader:
                first = next(loader).ids[0]
                for _ in range(5):
                    next(loader)
    (message,) = _warnings(caplog)
    assert repr(first) in message


@pytest.mark.parametrize(
    "data, suffix",
    [
        (png(WIDE), "png"),
        (png(np.full((64, 64), 2**14, np.uint16)), "png"),
        (png(np.zeros((64, 64), np.uint16)), "png"),  # black on purpose
        (npy(np.full((64, 64), 9, np.uint8)), "npy"),
        (npy(np.full((64, 64), 0.01)), "npy"),
        (png(np.full((64, 64), 9, np.uint8)), "png"),
    ],
)
def test_what_uses_its_range_or_has_eight_bits_is_not_warned_of(data, suffix, tmp_path, caplog):
    assert only(put(tmp_path, **{f"m__1_dot_{suffix}": data})).shape == (256, 256, 3)
    assert _warnings(caplog) == []


def test_views():
    class Split(Numbers):
        def _in_split(self, name):
            return (np.arange(self.count) % 5 == 0) == (name == "val")

    whole = Split(20)
    train, val = whole.split("train"), whole.split("val")
    assert len(train) == 16 and [val[index].id for index in range(4)] == ["n0", "n5", "n10", "n15"]
    assert val.modality_counts() == {"even": 2, "odd": 2} and val.modality_index().tolist() == [0, 1, 0, 1]
    assert len({whole.fingerprint, train.fingerprint, val.fingerprint}) == 3
    assert Split(20).split("val").fingerprint == val.fingerprint
    chosen = np.array([0, 5, 10, 15], "<i8").tobytes()
    assert val.fingerprint == hashlib.sha256(f"{whole.fingerprint}/val/".encode() + chosen).hexdigest()
    assert val.earlier_fingerprint is None
    with pytest.raises(IndexError):
        val[4]
    with pytest.raises(ValueError, match="^split: expected one of train, val, got 'test'"):
        whole.split("test")
    with pytest.raises(ValueError, match="expected a whole data set"):
        val.split("train")
