"""Two gloo ranks that share an evaluation find what one finds alone, and go on training as if they had not looked.

Run as a program, this file is one rank: ``test_evaluation_ranks.py RANK IMAGES CONFIG``.
"""

import json
import sys

import pytest
import torch

from dex import config
from dex.analysis.instruments import columns
from dex.common.ranks import ALONE, announced, full, start, stop
from dex.data import open_dataset
from dex.train.plan import resolve
from dex.train.trainer import Trainer


def plain(found):
    """What an evaluation found, as JSON."""
    fields = found._asdict()
    fields["mass"] = [layer.tolist() for layer in found.mass]
    fields["instruments"] = columns(found.instruments) if found.instruments else None
    return {k: v.double().sum().item() if isinstance(v, torch.Tensor) else v for k, v in fields.items()}


def look(c, images, ranks):
    """Evaluations of the first model, of averages after two steps, and what training did afterwards."""
    trainer = Trainer(resolve(c, open_dataset(images), ranks))
    forwards = []
    first_block = trainer.model.encoder.blocks[0]
    first_block.register_forward_hook(lambda *arguments: forwards.append(len(arguments[1][0])))
    first = plain(trainer.evaluate())
    computed = sum(forwards)
    trainer.train_step(), trainer.train_step()
    weights = [full(p).detach().clone() for p in trainer.model.parameters()]
    averaged = plain(trainer.evaluate_average())
    kept = all(map(torch.equal, weights, [full(p).detach() for p in trainer.model.parameters()]))
    trainer.row()
    trainer.train_step()
    after = trainer.row()["loss"]
    trainer.close()
    return {"first": first, "averaged": averaged, "kept": kept, "after": after, "computed": computed}


@pytest.fixture
def sharing(tiny, change):
    # The balance loss is local to what a rank computes at once; the first steps of AdamW must not be chaotic.
    return change(
        tiny, data__batch_size=2, run__evaluate_images=5, optim__ema=0.5, optim__base_lr=0.002, optim__eps=1e-3,
        schedule__balance_weight=(0.0, 0.0),
    )  # fmt: skip


def near(want):
    if isinstance(want, dict):
        return {key: near(value) for key, value in want.items()}
    if isinstance(want, list) and want and isinstance(want[0], list):
        return [near(value) for value in want]
    if isinstance(want, list) and want and isinstance(want[0], int):
        return want
    if want is None or isinstance(want, str) or (isinstance(want, list) and want and isinstance(want[0], str)):
        return want
    return pytest.approx(want, rel=1e-4, abs=1e-6)


def test_two_ranks_find_what_one_finds_in_about_half_the_work(sharing, images, on_two_ranks, tmp_path):
    (tmp_path / "c.yaml").write_text(config.to_yaml(sharing))
    alone = look(sharing, images, ALONE)
    assert alone["first"]["loss"] != alone["averaged"]["loss"] and alone["first"]["images"] == 5
    for seen in on_two_ranks(__file__, images, tmp_path / "c.yaml"):
        for strategy in ("ddp", "fsdp"):
            found = seen[strategy]
            assert found["kept"], strategy
            for name in ("first", "averaged"):
                assert (found[name]["instruments"] is None) == (name == "averaged")
                assert {k: v for k, v in found[name].items() if k != "mass"} == near(
                    {k: v for k, v in alone[name].items() if k != "mass"}
                ), (strategy, name)
                got, want = torch.tensor(found[name]["mass"][0]), torch.tensor(alone[name]["mass"][0])
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
            assert found["after"] == pytest.approx(alone["after"], rel=1e-4), strategy
            assert found["computed"] <= 0.7 * alone["computed"], strategy


def main(images, path):
    torch.set_num_threads(1)
    ranks = start(announced(), torch.device("cpu"), 60)
    c = config.read_yaml(path, config.Config())
    seen = {}
    for strategy in ("ddp", "fsdp"):
        values = config.to_dict(c)
        values["parallel"]["strategy"] = strategy
        seen[strategy] = look(config.from_dict(values, c), images, ranks)
    print(json.dumps(seen))
    stop(ranks)


if __name__ == "__main__":
    main(*sys.argv[2:])
