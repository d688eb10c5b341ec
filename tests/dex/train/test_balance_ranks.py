"""With the balance loss over the batch, ranks and micro-batches cut one run; without it they make others.

Run as a program, this file is one rank: ``test_balance_ranks.py RANK IMAGES CONFIG``.
"""

import json
import sys

import pytest
import torch

from dex import config
from dex.common.ranks import ALONE, announced, full, start, stop
from dex.data import open_dataset
from dex.train.plan import resolve
from dex.train.trainer import Trainer

STEPS = 15
CUTS = {"ranks": {}, "ranks, micro": {"parallel__micro_batch": 2}, "fsdp": {"parallel__strategy": "fsdp"}}


def train(c, images, ranks):
    """Numbers of all directors after some steps, and the last balance loss."""
    trainer = Trainer(resolve(c, open_dataset(images), ranks))
    for _ in range(STEPS):
        assert trainer.train_step() == []
    named = sorted(trainer.model.named_parameters())
    directors = torch.cat([full(p).detach().flatten() for name, p in named if ".director." in name])
    balance = trainer.row()["balance_loss"]
    trainer.close()
    return {"directors": directors[::101].tolist(), "balance": balance}


def apart(one, other):
    one, other = (torch.tensor(seen["directors"], dtype=torch.float64) for seen in (one, other))
    return float((one - other).norm() / other.norm())


@pytest.fixture
def base(tiny, change):
    # Quiet enough that rounding stays rounding: the first steps of AdamW divide by tiny squares.
    return change(
        tiny, model__balance_over="batch", schedule__balance_weight=(1.0, 1.0), schedule__steps=STEPS,
        schedule__momentum=(0.9, 0.9), optim__base_lr=0.05, optim__eps=1e-4,
    )  # fmt: skip


@pytest.mark.slow
def test_micro_batches_are_one_run_over_the_batch_and_others_over_parts(base, change, images):
    whole = train(base, images, ALONE)
    for size in (4, 1):
        cut = train(change(base, parallel__micro_batch=size, parallel__checkpointing=size == 4), images, ALONE)
        assert apart(cut, whole) < 1e-3 and cut["balance"] == pytest.approx(whole["balance"], rel=1e-4)
    parts = change(base, model__balance_over="part")
    at_once = train(parts, images, ALONE)
    assert apart(at_once, whole) < 1e-3  # computed at once, a part is the batch
    assert apart(train(change(parts, parallel__micro_batch=1), images, ALONE), at_once) > 3e-3


@pytest.mark.slow
def test_two_ranks_are_the_run_of_one(base, images, on_two_ranks, tmp_path):
    (tmp_path / "c.yaml").write_text(config.to_yaml(base))
    whole = train(base, images, ALONE)
    for seen in on_two_ranks(__file__, images, tmp_path / "c.yaml"):
        for name in CUTS:
            assert apart(seen[name], whole) < 1e-3, name
            assert seen[name]["balance"] == pytest.approx(whole["balance"], rel=1e-4), name


def main(images, path):
    torch.set_num_threads(1)
    ranks = start(announced(), torch.device("cpu"), 60)
    c = config.read_yaml(path, config.Config())
    seen = {}
    for name, fields in CUTS.items():
        values = config.to_dict(c)
        for field, value in fields.items():
            section, key = field.split("__")
            values[section][key] = value
        seen[name] = train(config.from_dict(values, c), images, ranks)
    print(json.dumps(seen))
    stop(ranks)


if __name__ == "__main__":
    main(*sys.argv[2:])
