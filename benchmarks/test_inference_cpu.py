"""A DEX encoder in evaluation on a CPU: latency by batch size against a loop over experts and a dense ViT of the same
active size; experts of 8 bits; `embed` of a folder against the bare forward.

Operations of the MLPs are the same in all of them: K experts of hidden size H, or one MLP of K H.
"""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from dex.data import center
from dex.inference.collection import collection
from dex.inference.embed import features
from dex.inference.embed_job import Options, embedded
from dex.inference.int8 import quantize_
from dex.inference.load import Loaded
from dex.model import VisionTransformer
from dexkernels import route

SMALL = {"img_size": 128, "embed_dim": 384, "depth": 4, "num_heads": 6}
"""The width of ViT-S, 65 tokens."""
TINY = {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_experts": 4}
BATCHES = (1, 16, 256)
PICTURES = 192


class LoopedExperts(nn.Module):
    """`nn.Linear`-wise: for each expert, the images that chose it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        e, layer = self.layer.experts, self.layer
        decision = route(x[:, :1], layer.router_weight, layer.top_k)
        out = torch.zeros_like(x)
        for i in range(layer.num_experts):
            image, choice = (decision.expert_indices == i).nonzero(as_tuple=True)
            h = F.gelu(F.linear(x[image], e.fc1_weight[i], e.fc1_bias[i]))
            y = F.linear(h, e.fc2_weight[i], e.fc2_bias[i])
            out.index_add_(0, image, decision.gates[image, choice][:, None, None] * y)
        return out


@pytest.fixture(scope="module")
def sizes(tiny):
    return TINY if tiny else SMALL


@pytest.fixture(scope="module")
def encoder(sizes):
    torch.manual_seed(0)
    return VisionTransformer(**sizes).eval()


def looped(encoder):
    made = copy.deepcopy(encoder)
    for block in made.blocks:
        block.mlp, block.dex = LoopedExperts(block.dex), None
    return made


@pytest.mark.parametrize("batch", BATCHES)
def test_latency(batch, sizes, encoder, compare, report, tiny):
    dense = VisionTransformer(**sizes | {"num_experts": 0, "top_k": 2}).eval()
    eight, loop = copy.deepcopy(encoder), looped(encoder)
    quantize_(eight)
    images = torch.randn(min(batch, 2) if tiny else batch, 3, sizes["img_size"], sizes["img_size"])
    with torch.inference_mode():
        want = encoder(images)  # no speed of a wrong result
        torch.testing.assert_close(loop(images), want, rtol=1e-3, atol=1e-3)
        error = float((eight(images) - want).norm() / want.norm())
        assert error < 0.02
        t = compare(
            {name: lambda model=model: model(images) for name, model in
             {"dex": encoder, "loop": loop, "dense": dense, "int8": eight}.items()},
            rounds=3 if batch > 16 else 9,
            warmup=1,
        )  # fmt: skip
    case = f"encoder, batch {batch}"
    rate = f"{1e3 * t['dex']:.1f} ms, {len(images) / t['dex']:.0f} images/s"
    report(case, "loop over experts", t["loop"] / t["dex"], 0.9, f"{rate}; loop {1e3 * t['loop']:.1f} ms")
    report(case, "dense ViT of K H", t["dense"] / t["dex"], 0.4, f"{rate}; dense {1e3 * t['dense']:.1f} ms")
    detail = f"{1e3 * t['int8']:.1f} ms; tokens off by {error:.1%}"
    report(f"{case}, int8 experts", "float32 experts", t["dex"] / t["int8"], 0.3, detail)


def test_embedding_of_a_folder(sizes, compare, report, tiny, tmp_path):
    """Reading, decoding, resizing and normalising beside a ViT-S of 65 tokens: within 20 % of the encoder alone."""
    encoder = VisionTransformer(**sizes | ({} if tiny else {"depth": 12})).eval()
    rng = np.random.default_rng(0)
    count = 6 if tiny else PICTURES
    (tmp_path / "pictures").mkdir()
    for i in range(count):
        small = rng.integers(0, 256, (16, 16), dtype=np.uint8)
        Image.fromarray(small).resize((256, 256), Image.Resampling.BICUBIC).save(tmp_path / "pictures" / f"{i:04d}.png")
    model = nn.Module()
    model.encoder = encoder
    loaded = Loaded(model, None, (), 0, tmp_path)
    pictures = collection(tmp_path / "pictures", tmp_path / "private")
    options = Options(tmp_path / "out")
    stored = torch.cat([pictures.read(item).images for item in range(pictures.items)])
    batches = center(stored, sizes["img_size"]).split(options.batch_size)

    def bare():
        return torch.cat([features(encoder, batch).cls for batch in batches])

    def folder():
        return torch.cat([p.embedding.cls for p in embedded(loaded, pictures, [0], options, None)])

    assert torch.equal(bare(), folder())
    t = compare({"bare": bare, "folder": folder}, rounds=3, warmup=1)
    detail = f"{count / t['folder']:.0f} images/s, encoder alone {count / t['bare']:.0f}"
    report("dex embed of a folder of PNG", "bare forward", t["bare"] / t["folder"], 1 / 1.2, detail)
