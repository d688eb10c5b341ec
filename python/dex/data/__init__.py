"""Data sets (a folder or a shard set), batches of uint8 images, and augmentation as batched torch operations.

dataset = open_dataset(None).split("train")          # the embedded set
loader = Loader(dataset, 64, seed=0, num_workers=2)
batch = next(loader)                                  # uint8 [B, 3, S, S], modality, ids, places
keys = sample_keys(0, batch.places.to(device))        # random numbers depend only on seed and place
images = augment(batch.images.to(device), 256, keys)  # float32, ImageNet-normalised
"""

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
