"""What an epoch is judged by: the task's metric of the validation cases."""

import numpy as np
import pytest
import torch

from dex.tasks.finetune import _Earlier as Earlier
from dex.tasks.finetune import _with_data, plan
from dex.tasks.judge import value_of
from dex.tasks.trainer import TaskTrainer


def trainer_of(pretrained, data, settings):
    planned, model = plan(pretrained, data, settings)
    return TaskTrainer(_with_data(planned, data, Earlier(), lambda *said: None), model)


def test_dice_is_of_the_argmax_at_the_models_size(pretrained, disc_data, quick, monkeypatch):
    trainer = trainer_of(pretrained, disc_data, quick)
    val = trainer.plan.val
    truth = torch.stack([val.target(i) for i in range(len(val))])
    shown = iter(truth)

    def perfect(images):
        mask = torch.stack([next(shown) for _ in images])
        return torch.nn.functional.one_hot((mask == 1).long(), 2).movedim(-1, 1) * 9.0

    monkeypatch.setattr(trainer.model, "forward", perfect)
    judged = value_of(trainer)
    assert judged.value == 1.0 and judged.loss < 0.01 and trainer.model.training
    monkeypatch.setattr(trainer.model, "forward", lambda images: torch.zeros(len(images), 2, 32, 32))
    assert value_of(trainer).value == 0.0  # ties are background


def test_a_classification_is_judged_by_case(pretrained, shade_data, quick, monkeypatch):
    trainer = trainer_of(pretrained, shade_data, quick)
    labels = np.array(trainer.plan.val.labels)
    assert set(labels) == {0, 1}

    def bright_is_0(images):
        level = images.mean((1, 2, 3))
        return torch.stack([level, -level], 1) * 3

    monkeypatch.setattr(trainer.model, "forward", bright_is_0)
    assert value_of(trainer).value == pytest.approx(1.0)
    monkeypatch.setattr(trainer.model, "forward", lambda images: torch.full((len(images), 2), float("nan")))
    assert value_of(trainer).value is None
