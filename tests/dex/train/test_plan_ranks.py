"""The fingerprint of the data on two ranks of gloo. Run as a program, this file is one of them."""

import errno
import json
import os
import shutil
import sys
import time

import torch

from dex.common import ranks
from dex.data import folder, open_dataset
from dex.data.folder import FolderDataset
from dex.train import plan

SECONDS = 2.0


class Slow(FolderDataset):
    """A folder that takes its time on rank 0, and must not be read on another."""

    def _content_hash(self, path, progress):
        assert self.rank == 0
        time.sleep(SECONDS / len(self))
        if path == b"ct/broken.png":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super()._content_hash(path, progress)


def main(rank, *folders):
    folder.CALL_EVERY = 0.2
    joined = ranks.start(ranks.announced(), torch.device("cpu"), SECONDS / 2)  # shorter than the fingerprint takes
    dataset = Slow(folders[rank % len(folders)])
    dataset.rank, met = rank, []
    try:
        answer = plan.fingerprint_of(dataset, joined, lambda: met.append(rank))
    except (ValueError, ranks.Failed) as error:
        answer = str(error)
    ranks.stop(joined)
    print(json.dumps([answer, len(met)]))


def test_a_fingerprint_may_take_longer_than_ranks_wait(images, on_two_ranks):
    want = open_dataset(images).fingerprint
    for answer, met in on_two_ranks(__file__, images):
        assert answer == want and met > 2


def test_other_files_on_another_rank_are_refused(images, on_two_ranks, tmp_path):
    (tmp_path / "ct").mkdir()
    (tmp_path / "ct" / "000.png").write_bytes((images / "ct" / "000.png").read_bytes())
    for answer, _ in on_two_ranks(__file__, images, tmp_path):
        assert answer == "data.path: expected the same files on every rank; those of rank 1 differ from rank 0's"


def test_a_file_that_rank_0_cannot_read_is_named_on_all(images, on_two_ranks, tmp_path):
    copy = shutil.copytree(images, tmp_path / "copy")
    (copy / "ct" / "broken.png").write_bytes(b"broken")  # see main
    first, second = on_two_ranks(__file__, copy)
    assert first[0] == "ct/broken.png: expected a readable file, got Input/output error (EIO)"
    assert second[0] == f"rank 0: ValueError: {first[0]}"


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
