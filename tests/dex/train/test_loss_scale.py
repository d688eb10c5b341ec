import json

import pytest
import torch

from dex.data import open_dataset
from dex.train import checkpoint, loss_scale
from dex.train import trainer as engine
from dex.train.loss_scale import LossScale
from dex.train.plan import resolve
from dex.train.trainer import Trainer

YES, NO = torch.tensor(True), torch.tensor(False)


@pytest.fixture
def trainer(tiny, images, change):
    def build(**fields):
        return Trainer(resolve(change(tiny, **{"run__precision": "fp16"} | fields), open_dataset(images)))

    return build


def weights(trainer):
    return {name: t.detach().clone() for name, t in trainer.tensors().items()}


def same(a, b):
    return [name for name in a if not torch.equal(a[name], b[name])] == []


def test_it_halves_on_an_overflow_and_doubles_after_enough_good_steps(monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWS_AFTER", 3)
    scale, values = LossScale(torch.device("cpu")), []
    for good in (NO, YES, YES, NO, YES, YES, YES, YES):
        scale.update(good, ~good)
        values.append(scale.value.item() / loss_scale.START)
    assert values == [0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.5, 0.5]
    scale.update(NO, NO)  # without images
    assert scale.state() == {"value": 0.5 * loss_scale.START, "good_steps": 1, "overflows": 0}
    again = LossScale(torch.device("cpu"))
    again.restore(json.loads(json.dumps(scale.state())))
    assert again.state() == scale.state()


def test_it_stays_within_its_bounds():
    scale = LossScale(torch.device("cpu"))
    for _ in range(30):
        scale.update(NO, YES)
    assert scale.value == loss_scale.LEAST == loss_scale.MOST / 2**loss_scale.MOST_HALVINGS


def test_gradients_are_those_of_the_loss_itself(trainer):
    """What clipping and AdamW see does not depend on the scale, and is near what float32 gives."""
    norms = {}
    for name, fields, value in (
        ("small", {}, 2.0**4),
        ("large", {}, 2.0**12),
        ("float32", {"run__precision": "fp32"}, None),
    ):
        t = trainer(**fields)
        if value:
            t.loss_scale.value.fill_(value)
        assert t.train_step() == []
        norms[name] = t.row()["grad_norm"]
    assert norms["small"] == pytest.approx(norms["large"], rel=1e-2)
    assert norms["large"] == pytest.approx(norms["float32"], rel=2e-2)


def test_a_step_that_overflows_changes_nothing_but_the_scale_and_is_no_fault_of_an_image(trainer):
    t = trainer()
    t.train_step()
    t.loss_scale.value.fill_(2.0**24)
    before = weights(t)
    assert t.train_step() == []
    assert same(before, weights(t)) and t.loss_scale.value == 2.0**23
    while t.loss_scale.value > 2.0**8 and same(before, weights(t)):
        assert t.train_step() == []
    assert not same(before, weights(t))
    assert t.nonfinite_in_a_row == 0 and t.loss_scale.overflows == 0
    row = t.row()
    assert row["skipped"] >= 1 and row["loss_scale"] == t.loss_scale.value


def test_an_image_that_is_not_finite_is_still_named(trainer, monkeypatch):
    t = trainer()
    t.train_step()
    real = engine.augment

    def poisoned(images, size, keys):
        out = real(images, size, keys)
        out[3, 1, 5, 7] = float("nan")
        return out

    monkeypatch.setattr(engine, "augment", poisoned)
    (bad,) = t.train_step()
    assert len(bad.samples) == 1 and t.nonfinite_in_a_row == 1


def test_overflows_that_no_scale_ends_are_non_finite_steps(trainer):
    t = trainer()
    t.parameters[0].register_hook(lambda gradient: gradient * float("inf"))
    t.loss_scale.overflows = loss_scale.MOST_HALVINGS
    (bad,) = t.train_step()
    assert bad.grad_norm != bad.grad_norm or bad.grad_norm == float("inf")
    assert t.nonfinite_in_a_row == 1


def test_a_resumed_run_is_the_uninterrupted_one(trainer, tmp_path):
    whole, first, second = trainer(), trainer(), trainer()
    for t in (whole, first):
        t.loss_scale.value.fill_(2.0**22)  # so that some steps overflow before the save and some after it
    for _ in range(3):
        first.train_step()
    saver = checkpoint.Saver(tmp_path, 1)
    saver.save(3, first.tensors(), first.state())
    saver.wait()
    second.restore(checkpoint.load(tmp_path / "step-00000003"))
    for _ in range(8):
        whole.train_step()
    for _ in range(5):
        second.train_step()
    assert same(weights(whole), weights(second)) and whole.state() == second.state()
