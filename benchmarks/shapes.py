"""Measured sizes, their inputs, and the backends that can run.

Letters: B images, N tokens (CLS first), D width, H hidden, E experts, K chosen.
"""

import torch
from torch import Tensor

from dexkernels import Routing
from dexkernels.ops import backends
from dexkernels.records import MLPWeights
from dexkernels.routing import sort_slots

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


def draw(timer, *sizes: int, scale: float = 1.0, dtype=torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator(timer.device).manual_seed(seed)
    return (scale * torch.randn(sizes, generator=generator, device=timer.device)).to(dtype)


def cls_rows(timer, shape: dict, router: Tensor, seed: int) -> Tensor:
    """``[B, D]`` whose logits are permutations of evenly spaced values, so no decision is near a tie."""
    B, E = shape["B"], shape["E"]
    order = draw(timer, B, E, seed=seed).argsort(1).double()
    if shape.get("routing"):
        # Expert 0 takes one of the K places of every image.
        order[:, 0] = E
    logits = order * (4.0 / E)
    return (logits @ torch.linalg.pinv(router.double()).T).float()


def routing_of(timer, shape: dict, seed: int) -> Routing:
    E, K = shape["E"], shape["K"]
    scores = draw(timer, shape["B"], E, seed=seed)
    if shape.get("routing"):
        scores[:, 0] = 10
    gates = draw(timer, shape["B"], K, seed=seed + 1).softmax(1)
    indices = scores.topk(K).indices.int()
    return Routing(gates, indices, gates.sum(), gates.sum(0), *sort_slots(indices, E))


def weights_of(timer, shape: dict, dtype: torch.dtype) -> MLPWeights:
    E, D, H = shape["E"], shape["D"], shape["H"]
    return MLPWeights(
        draw(timer, E, H, D, scale=D**-0.5, dtype=dtype, seed=1),
        draw(timer, E, H, scale=0.1, dtype=dtype, seed=2),
        draw(timer, E, D, H, scale=H**-0.5, dtype=dtype, seed=3),
        draw(timer, E, D, scale=0.1, dtype=dtype, seed=4),
    )


def able(op: str, timer, dtype: torch.dtype = torch.float32) -> list[str]:
    """The backends of ``op`` that can run here; Triton's interpreter, on a CPU, multiplies bf16 wrongly."""
    available = [b for b in backends.BACKENDS if backends.why_not(op, b) is None]
    interpreted = timer.device.type == "cpu" and dtype == torch.bfloat16 and op == "grouped_mlp"
    return [b for b in available if b == "reference" or not interpreted]
