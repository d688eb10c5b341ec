"""A data set that is computed: no file, every pixel says which sample it is of."""

import numpy as np

from dex.data import Dataset, SampleError


class Numbers(Dataset):
    """Sample i is a 3 x 4 x 4 image filled with i; those in `corrupt` cannot be read."""

    name, modalities, fingerprint, image_size = "numbers", ("even", "odd"), "0" * 64, 4

    def __init__(self, count, corrupt=()):
        self.count, self.corrupt = count, frozenset(corrupt)

    def __len__(self):
        return self.count

    def sample_id(self, index):
        return f"n{index}"

    def modality_index(self):
        return np.arange(self.count) % 2

    def read(self, index, out):
        if self._check_index(index) in self.corrupt:
            out[:] = 255
            raise SampleError(f"n{index}", "torn")
        out[:] = index % 256
        return index % 2, f"n{index}"
