"""A small run whose images lie in memory: 64 pixels, 2 layers, 4 experts, 8 images a step."""

import numpy as np

from dex.config import Config, from_dict
from dex.data.dataset import Dataset
from dex.train.plan import resolve
from dex.train.trainer import Trainer


class Noise(Dataset):
    """64 images of noise, each with a mean of its own, of two modalities; every fourth is held out."""

    name, modalities, fingerprint, image_size = "noise", ("a", "b"), "0" * 64, 64

    def __len__(self):
        return 64

    def read(self, index, out):
        out[:] = np.random.default_rng(index).integers(16 + index, 128 + 2 * index, out.shape)
        return index % 2, str(index)

    def sample_id(self, index):
        return str(index)

    def modality_index(self):
        return np.arange(len(self)) % 2

    def _in_split(self, name):
        return (np.arange(len(self)) % 4 == 3) == (name == "val")


def configuration(
    device: str,
    backend: str | None,
    precision: str = "fp32",
    num_experts: int = 4,
    optim: dict | None = None,
    **parallel,
) -> Config:
    model = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model |= {"num_experts": num_experts, "backend": backend}
    decoder = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, "norm_pix_loss": False}
    settings = {
        "model": model | decoder,
        "data": {"batch_size": 8},
        "optim": {"base_lr": 0.2} | (optim or {}),
        "schedule": {"steps": 12, "warmup": 0.25, "momentum": (0.5, 0.9), "balance_weight": (0.02, 0.0)},
        "run": {"device": device, "precision": precision, "evaluate_every": 0},
        "parallel": parallel,
    }
    return from_dict(settings, Config())


def trainer(*arguments, **options) -> Trainer:
    """Arguments as in `configuration`."""
    return Trainer(resolve(configuration(*arguments, **options), Noise()))
