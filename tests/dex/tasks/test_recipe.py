"""Settings: whose defaults they are, and what is refused."""

from dataclasses import replace

import pytest

from dex.tasks import recipe
from dex.tasks.recipe import Settings


def test_defaults_say_whose_they_are():
    told = {field.name: recipe.describe(field) for field in recipe.fields()}
    stated = {name for name, text in told.items() if "as the supplement states" in text}
    assert stated == {"mode", "start", "warmup_epochs", "lr"}
    ours = {name for name, text in told.items() if "not stated by the paper" in text}
    assert ours == set(told) - stated - recipe.RUNTIME
    assert {"path", "epochs", "batch_size", "img_size", "feature_size", "gema", "flips"} <= ours
    settings = Settings()
    assert (settings.lr, settings.warmup_epochs, settings.mode) == (1e-4, 10.0, "full")
    assert not settings.wants_aux and (settings.align_weight, settings.balance_weight) == (0, 0)


@pytest.mark.parametrize("name", recipe.PRESETS)
def test_presets_are_sound(name):
    recipe.check(recipe.preset(name))
    assert recipe.preset(name).lr == 1e-4


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match="preset: expected one of paper, cpu, got 'gpu'"):
        recipe.preset("gpu")


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"mode": "half"}, "mode"),
        ({"epochs": 0}, "epochs"),
        ({"epochs": 2.5}, "epochs"),
        ({"epochs": True}, "epochs"),
        ({"epochs": 10}, "warmup_epochs: expected at least 0 and less than the 10 epochs, got 10.0"),
        ({"lr": 0.0}, "lr"),
        ({"lr": float("nan")}, "lr: expected a finite number"),
        ({"lr": "fast"}, "lr: expected a number"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"batch_size": 0}, "batch_size"),
        ({"img_size": 0}, "img_size"),
        ({"dropout": 1.0}, "dropout"),
        ({"lora_alpha": 0.0}, "lora_alpha"),
        ({"momentum": 1.5}, "momentum"),
        ({"scale": 1.0}, "scale"),
        ({"rotation": 200.0}, "rotation"),
        ({"patience": 0}, "patience"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"timeout": 0.0}, "timeout"),
        ({"gema": True, "path": "director"}, "gema: expected mode full and path experts"),
        ({"gema": True, "mode": "lora"}, "gema: expected mode full and path experts"),
        ({"align_weight": 0.1, "mode": "frozen"}, "align_weight"),
    ],
)
def test_what_cannot_work_is_refused_by_name(changes, name):
    with pytest.raises(ValueError, match=name):
        recipe.check(replace(Settings(), **changes))


def test_a_resumed_run_may_change_what_decides_no_number():
    other = replace(Settings(), keep_checkpoints=7, lr=1e-3)
    assert recipe.differences(Settings(), other) == {"lr": (1e-4, 1e-3)}


def test_settings_go_to_plain_values_and_back():
    settings = replace(Settings(), mode="lora", patience=3, img_size=64)
    assert recipe.from_dict(recipe.to_dict(settings), Settings(), "file") == settings
    with pytest.raises(ValueError, match="speed: expected one of .* in file"):
        recipe.from_dict({"speed": 1}, Settings(), "file")
