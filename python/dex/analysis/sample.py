"""A fixed sample of a data set for repeated measurements.

Shape letters: B images, S image side.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from dex.data import SampleError
from dex.data.dataset import Dataset
from dex.data.shard_format import read_index
from dex.data.shards import ShardDataset

FEW_SOURCES = 5
"""With fewer sources than this, intervals over sources mean nothing, and groups are patients instead."""


class Sample(NamedTuple):
    """Some images of a data set."""

    images: Tensor
    """uint8 ``[B, C, S, S]`` on the host."""
    modality: Tensor
    """int64 ``[B]``."""
    ids: list[str]


class Groups(NamedTuple):
    """Groups of images that are not independent of each other."""

    of: Tensor
    """int64 ``[B]``: group of each image."""
    kind: str
    """``"sources"``, ``"patients"`` or ``"images"``, to describe an interval."""


def spread_out(dataset: Dataset, wanted: int) -> Sample:
    """Up to ``wanted`` images of alternating modalities; unreadable images are left out."""
    modalities = torch.as_tensor(dataset.modality_index())
    present = modalities.unique().tolist()
    order = []
    for m in present:
        indices = torch.nonzero(modalities == m).flatten()
        # Spread over the modality, since neighbours may be slices of one volume.
        count = min(len(indices), -(-wanted // len(present)))
        order += [(turn, m, int(indices[turn * len(indices) // count])) for turn in range(count)]
    images, modality, ids = [], [], []
    for _, m, index in sorted(order)[:wanted]:
        with contextlib.suppress(SampleError):
            images.append(dataset[index].image)
            modality.append(m)
            ids.append(dataset.sample_id(index))
    if not images:
        return Sample(torch.zeros(0, 3, 1, 1, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), [])
    return Sample(torch.stack(images), torch.tensor(modality), ids)


def groups(dataset: Dataset, ids: list[str]) -> Groups:
    """Sources of the images if there are at least ``FEW_SOURCES``, else their patients, else single images.

    Ids of a shard set begin with the source, and its indices have the patients. A plain folder has neither. dataset:
    the whole set.
    """
    if not isinstance(dataset, ShardDataset):
        return Groups(torch.arange(len(ids)), "images")
    sources = [name.split("/")[0] for name in ids]
    if len(set(sources)) >= FEW_SOURCES:
        return Groups(_numbered(sources), "sources")
    wanted, patients = set(ids), {}
    for entry in dataset.manifest["shards"]:
        for line in read_index(dataset.root, entry):
            if line["id"] in wanted:
                patients[line["id"]] = line.get("group") or line["id"]
    return Groups(_numbered([patients[name] for name in ids]), "patients")


def _numbered(names: list[str]) -> Tensor:
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[name] for name in names], dtype=torch.int64)
