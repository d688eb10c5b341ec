"""A DEX encoder in evaluation on a CPU.

Latency by batch size against a loop over experts, a dense ViT of the same active size, and 8-bit experts; `dex embed`
of a folder and of a shard set against the bare forward. All MLPs take the same operations: K experts of hidden size H,
or one MLP of K H.
"""

import contextlib
import copy
import io
import os
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from dex.data import ShardWriter, center
from dex.inference.collection import collection
from dex.inference.embed import features
from dex.inference.embed_job import Options, embedded
from dex.inference.int8 import quantize_
from dex.inference.load import Loaded
from dex.inference.tables import write_npz
from dex.model import VisionTransformer
from dexkernels import route

SMALL = {"img_size": 128, "embed_dim": 384, "depth": 4, "num_heads": 6}
"""The width of ViT-S, 65 tokens."""
TINY = {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_experts": 4}
BATCHES = (1, 16, 256)
PICTURES = 192


class LoopedExperts(nn.Module):
    """A loop over experts, each applied to the images that chose it."""

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
    copied = copy.deepcopy(encoder)
    for block in copied.blocks:
        block.mlp, block.dex = LoopedExperts(block.dex), None
    return copied


@pytest.mark.parametrize("batch", BATCHES)
def test_latency(batch, sizes, encoder, compare, report, tiny):
    dense = VisionTransformer(**sizes | {"num_experts": 0, "top_k": 2}).eval()
    eight, loop = copy.deepcopy(encoder), looped(encoder)
    quantize_(eight)
    images = torch.randn(min(batch, 2) if tiny else batch, 3, sizes["img_size"], sizes["img_size"])
    with torch.inference_mode():
        expected = encoder(images)
        torch.testing.assert_close(loop(images), expected, rtol=1e-3, atol=1e-3)
        error = float((eight(images) - expected).norm() / expected.norm())
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


@pytest.fixture(scope="module")
def inputs(tiny, tmp_path_factory):
    """A folder of PNG files of 256 x 256 pixels, and a shard set of the same images as JPEG."""
    folder, rng = tmp_path_factory.mktemp("inputs"), np.random.default_rng(0)
    (folder / "pictures").mkdir()
    with ShardWriter(folder / "shards", name="pictures", modalities=("CT",), image_size=256) as writer:
        for i in range(6 if tiny else PICTURES):
            small = Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8))
            image = small.resize((256, 256), Image.Resampling.BICUBIC)
            image.save(folder / "pictures" / f"{i:04d}.png")
            image.save(stream := io.BytesIO(), "JPEG", quality=90)
            names = {"modality": "CT", "split": "train", "group": f"p/{i}"}
            writer.add(f"p/{i}", stream.getvalue(), kind="jpg", **names)
    return folder


@pytest.mark.parametrize("kind", ["pictures", "shards"])
def test_embedding(kind, inputs, sizes, compare, report, tiny, tmp_path):
    """Reading in other processes, batching, forward and table, with a ViT-S of 65 tokens: within 20 % of the encoder
    alone. It is measured in steady state: the processes have read as far ahead as they can before the first turn. The
    processor time of everything but the forward is also reported, since on a CPU with busy cores nothing hides it."""
    encoder = VisionTransformer(**sizes | ({} if tiny else {"depth": 12})).eval()
    model = nn.Module()
    model.encoder = encoder
    loaded = Loaded(model, None, (), 0, tmp_path)
    images = collection(inputs / kind, tmp_path / "private")
    options = Options(tmp_path / "out", workers=min(8, len(os.sched_getaffinity(0))))
    arrays = [torch.from_numpy(array) for item in range(images.items) for array in images.read(item).images]
    batches = center(torch.cat([array.expand(-1, 3, -1, -1) for array in arrays]), sizes["img_size"])
    batches = batches.split(options.batch_size)
    parts = embedded(loaded, images, [0] * 100, options, None)

    def bare():
        return torch.cat([features(encoder, batch).cls for batch in batches])

    def whole():
        part = next(parts)
        write_npz(tmp_path / "part.npz", part.rows, part.embedding)
        return part.embedding.cls

    assert torch.equal(bare(), whole())
    with contextlib.closing(parts):
        t = compare({"bare": bare, "whole": whole}, rounds=5, warmup=1)
    began = time.process_time()
    bare()
    forward = time.process_time() - began
    alone = Loaded(model_without_blocks(sizes), None, (), 0, tmp_path)
    began = time.process_time()
    (part,) = embedded(alone, images, [0], options._replace(workers=0), None)
    write_npz(tmp_path / "part.npz", part.rows, part.embedding)
    rest = time.process_time() - began
    count = len(part.rows)
    detail = f"{count / t['whole']:.0f} images/s, encoder alone {count / t['bare']:.0f}; "
    detail += f"processor time of the rest {rest / forward:.1%} of the forward's"
    report(f"dex embed of {kind}", "bare forward", t["bare"] / t["whole"], 1 / 1.2, detail)


def model_without_blocks(sizes):
    """The model of `test_embedding`, without blocks."""
    model = nn.Module()
    model.encoder = VisionTransformer(**sizes).eval()
    model.encoder.blocks = nn.ModuleList()
    return model
