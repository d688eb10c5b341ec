"""The cases of `mlp_cases` on the aligned path, whose tiles are two blocks of 64 tokens high."""

import pytest
import torch

from dexkernels.ops.triton_common import Tile

from . import mlp_cases

ON_CUDA = torch.get_default_device().type == "cuda"
DTYPES = [torch.float16] if ON_CUDA else [torch.float32, torch.float16]
"""float32 has no tiles of this path; in the interpreter it shows errors that half precision hides."""

both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: "fp32" if d == torch.float32 else "fp16")


def tiles(cols=32, depth=16, height=16):
    """The rows of the products are blocks of 64 tokens and can't be smaller. Narrow tiles go without halves."""
    found = mlp_cases.tiles(32, 32, 16, halves=True)
    for kind in ("half", "float"):
        for name, rows in (
            ("fc1_blocks", 128),
            ("to_images", 64),
            ("to_images_even", 128),
            ("to_images_pairs", 128),
            ("to_slots_blocks", 128),
            ("hidden_grad_blocks", 128),
        ):
            found[name, kind, 90] = Tile(rows, cols, depth, 4, 2, halves=cols > 16)
        found["weight_grad_blocks", kind, 90] = Tile(height, cols, depth, 4, 2)
    return found


def run(*case, **kwargs):
    return mlp_cases.run(*case, **{"path": "aligned", "tiling": tiles()} | kwargs)


def check(*case, **kwargs):
    return mlp_cases.check(*case, **{"path": "aligned", "tiling": tiles()} | kwargs)
