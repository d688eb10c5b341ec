"""Data sets (a folder or a shard set), batches of uint8 images, and augmentation as batched torch operations.

dataset = open_dataset(None).split("train")          # the embedded set
loader = Loader(dataset, 64, seed=0, num_workers=2)
batch = next(loader)                                  # uint8 [B, 3, S, S], modality, ids, places
keys = sample_keys(0, batch.places.to(device))        # random numbers depend only on seed and place
images = augment(batch.images.to(device), 256, keys)  # float32, ImageNet-normalised
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dex.common.random import sample_keys
    from dex.common.shapes import IMAGENET_MEAN, IMAGENET_STD

    from .augmentation import augment, center, denormalize
    from .dataset import Dataset, Sample, SampleError
    from .folder import FolderDataset
    from .loader import Batch, CorruptDataError, Loader
    from .opening import open_dataset
    from .shard_verify import verify
    from .shard_writer import ShardWriter
    from .shards import ShardDataset

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Batch",
    "CorruptDataError",
    "Dataset",
    "FolderDataset",
    "Loader",
    "Sample",
    "SampleError",
    "ShardDataset",
    "ShardWriter",
    "augment",
    "center",
    "denormalize",
    "open_dataset",
    "sample_keys",
    "verify",
]

# The command line reads the format of shards, and refuses wrong input, before it loads torch.
_HOMES = {
    "dex.common.random": ("sample_keys",),
    "dex.common.shapes": ("IMAGENET_MEAN", "IMAGENET_STD"),
    "dex.data.augmentation": ("augment", "center", "denormalize"),
    "dex.data.dataset": ("Dataset", "Sample", "SampleError"),
    "dex.data.folder": ("FolderDataset",),
    "dex.data.loader": ("Batch", "CorruptDataError", "Loader"),
    "dex.data.opening": ("open_dataset",),
    "dex.data.shard_verify": ("verify",),
    "dex.data.shard_writer": ("ShardWriter",),
    "dex.data.shards": ("ShardDataset",),
}


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
