"""Measured sizes, their inputs, and the backends that can run.

Letters: B images, N tokens (CLS first), D width, H hidden, E experts, K chosen.
"""

import torch
from torch import Tensor

from dexkernels import Routing
from dexkernels.ops import backends
from dexkernels.records import MLPWeights
from dexkernels.verification import inputs
from dexkernels.verification.inputs import Draw
from dexkernels.verification.record import Sizes

VIT_B, VIT_L, VIT_H = {"D": 768, "H": 3072}, {"D": 1024, "H": 4096}, {"D": 1280, "H": 5120}


def sizes(width: dict, B: int, N: int = 65, E: int = 8, K: int = 2, **more: str) -> dict:
    return {"B": B, "N": N, **width, "E": E, "K": K, **more}


SHAPES = {
    "ViT-B": sizes(VIT_B, 224),
    "ViT-B, N 257": sizes(VIT_B, 56, 257),
    "ViT-B, B 8": sizes(VIT_B, 8),
    "ViT-B, B 64": sizes(VIT_B, 64),
    "ViT-B, B 896": sizes(VIT_B, 896),
    "ViT-B, E 4": sizes(VIT_B, 224, E=4),
    "ViT-B, E 16": sizes(VIT_B, 224, E=16),
    "ViT-B, E 64": sizes(VIT_B, 224, E=64),
    "ViT-B, K 1": sizes(VIT_B, 224, K=1),
    "ViT-B, E 64, K 4": sizes(VIT_B, 224, E=64, K=4),
    "ViT-B, skewed": sizes(VIT_B, 224, routing="half to one"),
    "ViT-L": sizes(VIT_L, 128),
    "ViT-L, N 257": sizes(VIT_L, 32, 257),
    "ViT-H": sizes(VIT_H, 64),
}
"""Around ViT-B with 224 images, 8 experts and 2 chosen, one size varies at a time, so cost can be plotted over it."""

FLOAT32 = ("ViT-B", "ViT-B, B 8", "ViT-B, E 64", "ViT-B, skewed")
"""Shapes that are measured in float32 too; few, since it is ten times slower and not used in training."""

SETS = 3
"""Number of inputs that calls rotate through."""

TINY = {"B": 4, "N": 5, "D": 16, "H": 32, "E": 4, "K": 2}


def tiny_of(name: str) -> dict:
    shape = TINY | {k: v for k, v in SHAPES[name].items() if k in ("routing", "K")}
    return shape | ({"N": 3, "E": 7, "D": 24} if shape["K"] > 2 or name == "ViT-B, E 64" else {})


def sizes_of(shape: dict) -> Sizes:
    return Sizes(*(shape[letter] for letter in "BNDHEK"))


def generator(timer, seed: int, dtype: torch.dtype = torch.float32) -> Draw:
    """Generates on the device itself, since the tensors are large."""
    return Draw(timer.device, seed, dtype=dtype, generated_on=timer.device)


def draw(timer, *sizes: int, scale: float = 1.0, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return generator(timer, seed, dtype)(*sizes, scale=scale)


def always(shape: dict) -> int | None:
    """Expert 0 if it takes one of the K places of every image."""
    return 0 if shape.get("routing") else None


def cls_rows(timer, shape: dict, router: Tensor, seed: int) -> Tensor:
    """``[B, D]`` float32."""
    return inputs.cls_rows(generator(timer, seed), sizes_of(shape), router, always(shape)).float()


def routing_of(timer, shape: dict, seed: int) -> Routing:
    return inputs.routing_of(generator(timer, seed), sizes_of(shape), always=always(shape))


def weights_of(timer, shape: dict, dtype: torch.dtype) -> MLPWeights:
    return inputs.weights_of(generator(timer, 1, dtype), sizes_of(shape))


def able(op: str, timer, dtype: torch.dtype = torch.float32) -> list[str]:
    """The backends of ``op`` that can run here; Triton's interpreter, on a CPU, multiplies bf16 wrongly."""
    available = [b for b in backends.BACKENDS if backends.why_not(op, b) is None]
    interpreted = timer.device.type == "cpu" and dtype == torch.bfloat16 and op == "grouped_mlp"
    return [b for b in available if b == "reference" or not interpreted]
