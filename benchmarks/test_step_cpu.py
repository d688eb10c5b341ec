"""The whole pretraining step of the demo on a CPU, in float32, against two baselines of the same data and sizes.

A step is reading, augmentation, forward, backward, GEMA, clipping and AdamW. The baselines are a masked autoencoder
with a loop over experts in plain torch (`plain`), with the same loader and augmentation, and the monolithic control of
this library. For 16 images of 65 tokens, D 192, H 768, E 8, K 2 and 4 layers, experts and director take 17.4 GFLOP, the
rest 16.4; the control's MLPs take 14.9.
"""

from dataclasses import replace

import pytest
import torch

from dex.common import random as numbers
from dex.config import preset
from dex.data import Loader, augment
from dex.train.plan import open_data, resolve
from dex.train.trainer import Trainer

from .plain import PlainMAE

TINY = {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_experts": 3}
TINY |= {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 1}


def config_of(name, tiny):
    config = preset(name)
    model = replace(config.model, **{k: v for k, v in TINY.items() if k != "num_experts" or config.model.num_experts})
    return replace(
        config,
        model=model if tiny else config.model,
        data=replace(config.data, num_workers=0, batch_size=2 if tiny else config.data.batch_size),
        run=replace(config.run, precision="fp32", device="cpu"),
    )


@pytest.fixture
def trainers(tiny):
    configs = {name: config_of(name, tiny) for name in ("demo", "demo-monolithic")}
    dataset = open_data(configs["demo"])
    trainers = {name: Trainer(resolve(config, dataset)) for name, config in configs.items()}
    yield trainers
    for trainer in trainers.values():
        trainer.close()


@pytest.fixture
def plain_step(trainers):
    """A step of the plain masked autoencoder."""
    plan = trainers["demo"].plan
    config, m = plan.config, plan.config.model
    encoder, decoder = (
        (m.embed_dim, m.depth, m.num_heads),
        (m.decoder_embed_dim, m.decoder_depth, m.decoder_num_heads),
    )
    model = PlainMAE(m.img_size, m.patch_size, encoder, decoder, m.num_experts, m.top_k)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=config.optim.betas, weight_decay=1e-6, fused=True)
    loader = Loader(plan.train, config.data.batch_size, seed=0, temperature=config.data.temperature, num_workers=0)

    def step():
        batch = next(loader)
        images = augment(batch.images, m.img_size, numbers.sample_keys(0, batch.places))
        optimizer.zero_grad()
        out = model(images)
        (out.pixels + 0.01 * out.align + 0.1 * out.balance).backward()
        model.update_directors([mass.detach() for mass in out.gate_mass], 0.99)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    yield step
    loader.close()


def test_demo_step(trainers, plain_step, compare, report, own_library):
    dex, monolithic = trainers.values()
    candidates = {"DEX": dex.train_step, "plain": plain_step, "monolithic": monolithic.train_step}
    t = compare(candidates, rounds=11, warmup=2)
    ms = {name: f"{name} {seconds * 1e3:.0f} ms" for name, seconds in t.items()}
    case = "the demo's whole step"
    least = 1.2 if own_library else 0.95
    report(case, "plain torch, loop over experts", t["plain"] / t["DEX"], least, f"{ms['DEX']}, {ms['plain']}", 1.2)
    report(case, "monolithic control", t["monolithic"] / t["DEX"], 0.8, f"{ms['DEX']}, {ms['monolithic']}", 1 / 1.2)
    assert dex.step == monolithic.step and all(p.isfinite().all() for p in dex.model.parameters())
