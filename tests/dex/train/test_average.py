import numpy as np
import pytest
import torch
from torch import nn

import dex
from dex.cli import main
from dex.train import checkpoint
from dex.train.average import WeightAverage
from dex.train.run import pretrain
from dex.train.runlog import read_rows

YES, NO = torch.tensor(True), torch.tensor(False)


def test_it_follows_the_weights_in_good_steps_alone():
    model = nn.Linear(3, 2)
    average = WeightAverage(model, 0.75)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    average.update(YES)
    torch.testing.assert_close(average.tensors()["ema.weight"], start + 0.25)
    kept = average.tensors()["ema.weight"].clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    average.update(NO)
    assert torch.equal(average.tensors()["ema.weight"], kept)
    average.update(YES)
    torch.testing.assert_close(average.tensors()["ema.weight"], start + 0.75 * 0.25 + 0.25 * 2)


def test_the_model_computes_with_it_and_has_its_weights_back_to_the_bit():
    model = nn.Linear(3, 2)
    average = WeightAverage(model, 0.5)
    with torch.no_grad():
        model.weight.mul_(1.7), model.bias.add_(0.1)
    before = [p.detach().clone() for p in model.parameters()]
    kept = {name: t.clone() for name, t in average.tensors().items()}
    with pytest.raises(KeyError), average.in_place():
        assert torch.equal(model.weight, kept["ema.weight"]) and torch.equal(model.bias, kept["ema.bias"])
        raise KeyError
    assert all(map(torch.equal, before, model.parameters()))
    assert all(torch.equal(t, kept[name]) for name, t in average.tensors().items())


def test_a_run_keeps_evaluates_saves_and_exports_it(tiny, change, tmp_path, capsys):
    c = change(tiny, optim__ema=0.8, run__evaluate_every=6)
    out = tmp_path / "out"
    assert pretrain(c, out) == 0
    rows = [row for row in read_rows(out / "metrics.jsonl") if "val_loss" in row]
    assert [row["step"] for row in rows] == [0, 6, 12] and {row["val_images"] for row in rows} == {6}
    assert rows[0]["ema_val_loss"] == rows[0]["val_loss"] and rows[2]["ema_val_loss"] != rows[2]["val_loss"]
    assert rows[2]["ema_val_loss"] < rows[0]["ema_val_loss"]
    saved = checkpoint.tensors(out / "checkpoints" / "step-00000012")
    weights, averaged = dex.load(out).model, dex.load(out, ema=True).model
    for name, parameter in averaged.named_parameters():
        assert torch.equal(parameter, saved[f"ema.{name}"])
    assert any(not torch.equal(a, b) for a, b in zip(weights.parameters(), averaged.parameters(), strict=True))
    assert main(["export", str(out), "--format", "safetensors", "--out", str(tmp_path / "m"), "--ema"]) == 0
    exported = dex.load(tmp_path / "m").model
    assert all(map(torch.equal, averaged.parameters(), exported.parameters()))
    with pytest.raises(ValueError, match="ema: expected a run or a checkpoint, got the exported model"):
        dex.load(tmp_path / "m", ema=True)


def test_it_can_begin_and_end_in_the_middle_of_a_run(tiny, change, tmp_path):
    from dex.train.continuation import Override

    out = tmp_path / "out"
    assert pretrain(change(tiny, run__stop_at=3), out) == 0
    with pytest.raises(ValueError, match="ema: expected a run with an average of the weights .optim.ema."):
        dex.load(out, ema=True)
    begin = Override(("optim.ema",), "to compare")
    assert pretrain(change(tiny, optim__ema=0.5, run__stop_at=4), out, resume="auto", override=begin) == 0
    before = checkpoint.tensors(out / "checkpoints" / "step-00000003")
    after = checkpoint.tensors(out / "checkpoints" / "step-00000004")
    name = "encoder.patch_embed.weight"  # it began as the weights of step 3
    torch.testing.assert_close(after[f"ema.{name}"], (before[f"model.{name}"] + after[f"model.{name}"]) / 2)
    assert pretrain(change(tiny, run__stop_at=5), out, resume="auto", override=begin) == 0
    assert not any(k.startswith("ema.") for k in checkpoint.tensors(out / "checkpoints" / "step-00000005"))


def test_its_features_are_embedded_and_one_that_is_not_there_is_named(tiny, change, images, tmp_path, capsys):
    run, plain = tmp_path / "run", tmp_path / "plain"
    assert pretrain(change(tiny, optim__ema=0.9, schedule__steps=4), run) == 0
    assert pretrain(change(tiny, schedule__steps=1), plain) == 0
    features = []
    for options in ([], ["--ema"]):
        out = tmp_path / f"{len(options)}.npz"
        assert main(["embed", str(run), str(images), "--out", str(out), "--workers", "0", *options]) == 0
        features.append(np.load(out)["cls"])
    averaged = dex.load(run, ema=True).embed(str(images / "ct" / "000.png")).cls.numpy()
    assert not np.array_equal(*features) and np.allclose(features[1][0], averaged[0], atol=1e-5)
    for command in ("embed", "probe"):
        capsys.readouterr()
        assert main([command, str(plain), str(images), "--out", str(tmp_path / f"{command}.npz"), "--ema"]) == 2
        assert "ema: expected" in capsys.readouterr().err
        assert not (tmp_path / f"{command}.npz").exists()
