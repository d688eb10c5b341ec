"""The step of a fine-tuning: what it computes, and that it depends on nothing but seed and step."""

from dataclasses import replace

import pytest
import torch

from dex.tasks.finetune import _Earlier as Earlier
from dex.tasks.finetune import _with_data, plan
from dex.tasks.trainer import TaskTrainer


@pytest.fixture
def trainer_of(pretrained, disc_data, shade_data):
    def make(settings, kind="segmentation"):
        data = disc_data if kind == "segmentation" else shade_data
        planned, model = plan(pretrained, data, settings)
        return TaskTrainer(_with_data(planned, data, Earlier(), lambda *said: None), model)

    return make


def weights(trainer):
    return {name: p.clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("kind", ["segmentation", "classification"])
def test_steps_are_the_same_bits_every_time(trainer_of, quick, kind):
    settings = replace(quick, dropout=0.3)
    first, second = (trainer_of(settings, kind) for _ in range(2))
    for trainer in (first, second):
        torch.rand(7)  # what others draw does not matter
        for _ in range(3):
            assert trainer.train_step() == []
    before = weights(first)
    assert all(torch.equal(p, before[name]) for name, p in second.model.named_parameters())
    assert first.row()["loss"] == second.row()["loss"]


def test_the_learning_rate_warms_up_over_epochs_and_falls_to_0(trainer_of, quick):
    trainer = trainer_of(replace(quick, epochs=4, warmup_epochs=1))
    per_epoch = trainer.plan.steps_per_epoch
    assert per_epoch == -(-len(trainer.plan.train) // 8) and trainer.steps == 4 * per_epoch
    rates = [trainer.learning_rate_at(step) for step in range(trainer.steps)]
    assert rates[per_epoch - 1] == max(rates) == quick.lr and rates[0] == quick.lr / per_epoch and rates[-1] == 0


def test_only_what_the_mode_trains_moves(trainer_of, quick):
    trainer = trainer_of(replace(quick, mode="frozen"))
    before = weights(trainer)
    trainer.train_step()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith("head.") for name in moved)


def test_directors_follow_only_with_gema(trainer_of, quick):
    def directors(settings):
        trainer = trainer_of(settings)
        before = weights(trainer)
        trainer.train_step()
        after = weights(trainer)
        return any(not torch.equal(after[n], before[n]) for n in after if ".director." in n)

    assert not directors(quick)
    assert directors(replace(quick, gema=True, momentum=0.9))
    assert not directors(replace(quick, balance_weight=0.1))


def test_losses_of_pretraining_count_by_their_weight(trainer_of, quick):
    plain = trainer_of(quick)
    plain.train_step()
    assert "align_loss" not in plain.row()
    trainer = trainer_of(replace(quick, align_weight=0.5, balance_weight=2.0))
    trainer.train_step()
    row = trainer.row()
    expected = row["loss"] + 0.5 * row["align_loss"] + 2.0 * row["balance_loss"]
    assert row["total"] == pytest.approx(expected, rel=1e-5) and row["balance_loss"] > 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_trains_too(trainer_of, quick, precision):
    trainer = trainer_of(replace(quick, precision=precision))
    before = weights(trainer)
    assert trainer.train_step() == [] and (trainer.loss_scale is not None) == (precision == "fp16")
    exact = trainer_of(quick)
    exact.train_step()
    assert trainer.row()["loss"] == pytest.approx(exact.row()["loss"], rel=0.05)
    for _ in range(20):  # fp16 may need a smaller scale first
        trainer.train_step()
        if any(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters()):
            return
    raise AssertionError("nothing has moved")


def test_a_non_finite_step_changes_nothing_and_names_its_image(trainer_of, quick, monkeypatch):
    trainer = trainer_of(quick)
    trainer.train_step()
    before = weights(trainer)
    real = trainer.image_loss

    def one_nan(logits, targets):
        loss = real(logits, targets)
        return torch.where(torch.arange(len(loss)) == 2, loss * float("nan"), loss)

    monkeypatch.setattr(trainer, "image_loss", one_nan)
    (bad,) = trainer.train_step()
    batch = trainer.plan.train.batch(1, quick.batch_size, quick.seed)
    assert bad.samples == [batch.ids[2]] and bad.step == 1
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert trainer.row()["skipped"] == 1


def test_balanced_weights_reach_the_loss(trainer_of, quick):
    plain, balanced = trainer_of(quick), trainer_of(replace(quick, class_weights="balanced"))
    logits = torch.zeros(1, 2, 32, 32)
    masks = torch.ones(1, 32, 32, dtype=torch.uint8)  # the rarer class
    assert balanced.image_loss(logits, masks) > 2 * plain.image_loss(logits, masks)


@pytest.mark.parametrize("kind", ["segmentation", "classification"])
@pytest.mark.parametrize("aux", [{}, {"gema": True, "momentum": 0.9, "align_weight": 0.5, "class_weights": "balanced"}])
def test_micro_batches_are_the_batch_within_rounding(trainer_of, quick, kind, aux):
    settings = replace(quick, lr=3e-4, **aux)
    whole, parted = trainer_of(settings, kind), trainer_of(replace(settings, micro_batch=2), kind)
    seen = []
    real = parted.image_loss
    parted.image_loss = lambda logits, targets: seen.append(len(logits)) or real(logits, targets)
    for _ in range(3):
        assert whole.train_step() == parted.train_step() == []
    assert seen == [2, 2, 2, 2] * 3
    first, second = whole.row(), parted.row()
    for row in (first, second):
        row.pop("balance_loss", None)  # of each micro-batch, as in pretraining; its weight is 0 here
    assert second == pytest.approx(first, rel=1e-4)
    before = weights(whole)
    for name, p in parted.model.named_parameters():
        a, b = p, before[name]
        if name.endswith("attn.qkv.bias"):  # softmax ignores the keys' bias: its gradient is rounding, made lr by Adam
            a, b = (torch.cat([v.chunk(3)[0], v.chunk(3)[2]]) for v in (a, b))
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), name


def test_a_non_finite_image_of_any_micro_batch_is_named(trainer_of, quick):
    trainer = trainer_of(replace(quick, micro_batch=2))
    before = weights(trainer)
    real, calls = trainer.image_loss, []

    def third_is_nan(logits, targets):
        calls.append(len(logits))
        return real(logits, targets) * (float("nan") if len(calls) == 2 else 1.0)

    trainer.image_loss = third_is_nan
    (bad,) = trainer.train_step()
    assert bad.samples == list(trainer.plan.train.batch(0, quick.batch_size, quick.seed).ids[2:4])
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


@pytest.mark.parametrize("settings", [{"mode": "lora"}, {"path": "director"}, {"gema": True, "momentum": 0.9}])
def test_the_fused_step_is_adamw_within_rounding(trainer_of, quick, settings):
    settings = replace(quick, lr=3e-4, **settings)
    plain, fused = trainer_of(settings), trainer_of(replace(settings, fused=True))
    for _ in range(3):
        assert plain.train_step() == fused.train_step() == []
    assert type(fused.optimizer) is not type(plain.optimizer)
    before = weights(plain)
    for name, p in fused.model.named_parameters():
        assert torch.allclose(p, before[name], rtol=1e-4, atol=1e-5), name
