"""Two gloo ranks fine-tune as one does alone, up to the order of sums.

Run as a program, this file is one rank: ``test_finetune_ranks.py RANK RUN DATA PRIVATE OUT [SETTINGS]``.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dex.tasks.cases import open_task
from dex.tasks.finetune import prepare
from dex.tasks.load import load_task_model
from dex.tasks.recipe import Settings
from dex.train.runlog import read_rows

# Gentle steps: those of AdamW divide by the gradient's size, so that rounding would grow.
SETTINGS = Settings(
    epochs=2,
    warmup_epochs=1,
    batch_size=8,
    lr=3e-4,
    feature_size=4,
    device="cpu",
    precision="fp32",
    workers=0,
    timeout=60.0,
)


def trained(run, folder, private, out, settings="{}"):
    """Exit code, sum of the weights and the rows of one fine-tuning. settings: JSON of what differs from `SETTINGS`."""
    data = open_task(folder, folder, classes=["disc=255"], private=private)
    training = prepare(run, data, replace(SETTINGS, **json.loads(settings)), Path(out))
    code = training.run()
    weights = sum(float(p.double().abs().sum()) for p in load_task_model(out, "last").model.state_dict().values())
    return {"code": code, "weights": weights, "rows": read_rows(Path(out) / "metrics.jsonl")}


def test_two_ranks_are_one(pretrained, discs, tmp_path, on_two_ranks):
    alone = trained(pretrained, discs, tmp_path / "salt", tmp_path / "alone")
    both = on_two_ranks(__file__, pretrained, discs, tmp_path / "salt", tmp_path / "both")
    assert both[0]["code"] == alone["code"] == 0 and both[0]["weights"] == both[1]["weights"]
    assert both[0]["weights"] == pytest.approx(alone["weights"], rel=1e-4)
    for name in ("loss", "grad_norm", "lr", "val_loss", "val_dice"):
        found, expected = ([row[name] for row in of["rows"] if name in row] for of in (both[0], alone))
        assert len(found) == 2 and found == pytest.approx(expected, rel=2e-2, abs=1e-6)
    assert both[0]["rows"][0]["slowest_rank"] in (0, 1) and (tmp_path / "both/cases.csv").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"mode": "frozen", "fused": True}, {"mode": "lora"}, {"path": "director"}])
def test_two_ranks_that_share_the_weights_are_one(pretrained, discs, tmp_path, on_two_ranks, settings):
    settings = {"epochs": 1, "warmup_epochs": 0, "micro_batch": 2} | settings
    alone = trained(pretrained, discs, tmp_path / "salt", tmp_path / "alone", json.dumps(settings))
    spread = json.dumps(settings | {"strategy": "fsdp"})
    both = on_two_ranks(__file__, pretrained, discs, tmp_path / "salt", tmp_path / "both", spread)
    assert both[0]["code"] == both[1]["code"] == alone["code"] == 0
    assert both[0]["weights"] == pytest.approx(alone["weights"], rel=1e-4)
    for name in ("loss", "grad_norm", "val_loss"):
        values, expected = ([row[name] for row in of["rows"] if name in row] for of in (both[0], alone))
        assert values and values == pytest.approx(expected, rel=2e-2)


def test_a_batch_that_ranks_cannot_share_is_named(pretrained, discs, tmp_path, monkeypatch):
    for name, value in {"WORLD_SIZE": "3", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="batch_size: expected a multiple of the 3 ranks, got 8"):
        trained(pretrained, discs, tmp_path / "salt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


if __name__ == "__main__":
    torch.set_num_threads(1)
    printed, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps(trained(*sys.argv[2:])), file=printed, flush=True)
