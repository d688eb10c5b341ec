"""What a new run starts from: files of elsewhere, runs of one's own, and what names neither."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from dex.data import open_dataset
from dex.model.build import build_model
from dex.train import initial
from dex.train.plan import plan, resolve
from dex.train.run import pretrain
from dex.train.runlog import RunLog
from dex.train.trainer import Trainer


@pytest.fixture
def dense(tiny, tmp_path):
    """A file with the MAE of a monolithic model as wide as one expert of ``tiny``."""
    config = replace(tiny, model=replace(tiny.model, num_experts=0, top_k=1))
    torch.manual_seed(5)
    state = build_model(config).reference_state_dict()
    path = tmp_path / "mae.safetensors"
    save_file({name: t.contiguous() for name, t in state.items()}, path)
    return path, state


def test_a_dense_mae_becomes_directors_and_experts(tiny, change, images, dense):
    path, state = dense
    drawn = Trainer(resolve(tiny, open_dataset(images))).model
    trainer = Trainer(resolve(change(tiny, model__init=str(path)), open_dataset(images)))
    assert trainer.initial.upcycled and trainer.initial.naming == "dense ViT"
    for i, layer in enumerate(trainer.model.encoder.dex_layers):
        assert torch.equal(layer.director.fc1.weight, state[f"blocks.{i}.mlp.fc1.weight"])
        assert all(torch.equal(expert, layer.director.fc2.weight) for expert in layer.experts.fc2_weight)
        assert torch.equal(layer.router_weight, drawn.encoder.dex_layers[i].router_weight)
    assert torch.equal(trainer.model.mask_token, state["mask_token"])


def test_routers_are_drawn_as_linear_maps_are(tiny, change, dense):
    for init in (None, str(dense[0])):
        config = change(tiny, model__router_init="linear", model__init=init)
        torch.manual_seed(0)
        model = build_model(config)
        if init:
            initial.load_initial(model, config)
        bound = tiny.model.embed_dim**-0.5
        for layer in model.encoder.dex_layers:
            assert 0.8 * bound < layer.router_weight.abs().max() <= bound
    torch.manual_seed(0)
    wide = build_model(tiny).encoder.dex_layers[0].router_weight  # Xavier: sqrt(6 / (D + E))
    assert wide.abs().max() > 1.1 * bound


def test_the_layers_are_what_the_configuration_says(tiny, change):
    options = {"model__route_from": "mean", "model__temperature": 0.7, "model__usage_momentum": 0.9}
    for layer in build_model(change(tiny, **options)).encoder.dex_layers:
        assert (layer.route_from, layer.temperature, layer.usage_momentum) == ("mean", 0.7, 0.9)


def test_a_run_starts_from_a_run_and_says_so(tiny, change, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert pretrain(change(tiny, run__stop_at=2), first) == 0
    checkpoint = next((first / "checkpoints").iterdir())
    config = change(tiny, model__init=str(first), run__stop_at=1, run__seed=3)
    assert pretrain(config, second) == 0
    shown = capsys.readouterr()
    assert f"weights of {first}: published DEX" in shown.out + shown.err
    assert RunLog(second).config().model.init == str(first)
    models = []
    for place in (first, checkpoint):
        model = build_model(tiny)
        report = initial.load_initial(model, change(tiny, model__init=str(place)))
        assert report == ("published DEX", False, (), (), ())
        models.append(model.state_dict())
    assert all(torch.equal(t, models[1][name]) for name, t in models[0].items())


def test_what_a_file_lacks_is_said_to_be_drawn(tiny, change, dense, tmp_path, capsys):
    path = tmp_path / "encoder.safetensors"
    save_file({name: t for name, t in dense[1].items() if not name.startswith(("decoder", "mask"))}, path)
    assert pretrain(change(tiny, model__init=str(path), run__stop_at=1), tmp_path / "run") == 0
    shown = capsys.readouterr()
    line = f"weights of {path}: dense ViT, upcycled; randomly initialised: the routers and the decoder"
    assert line in (shown.out + shown.err).splitlines()


def test_a_resume_needs_the_file_no_more(tiny, change, dense, tmp_path):
    config = change(tiny, model__init=str(dense[0]), run__stop_at=1)
    assert pretrain(config, tmp_path / "run") == 0
    dense[0].unlink()
    assert pretrain(change(config, run__stop_at=2), tmp_path / "run", resume="auto") == 0
    with pytest.raises(FileNotFoundError, match="model.init: .*nothing at .*mae.safetensors"):
        pretrain(config, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("what", ["nothing", "folder", "empty run", "text", "other width"])
def test_what_does_not_fit_is_named_before_anything_is_written(what, tiny, change, dense, tmp_path):
    place = tmp_path / what
    config = change(tiny, model__init=str(place))
    if what in ("folder", "empty run"):
        place.mkdir()
        (place / ("checkpoints" if what == "empty run" else "x")).mkdir()
    elif what == "text":
        place = place.with_suffix(".pth")
        place.write_text("no weights")
        config = change(tiny, model__init=str(place))
    elif what == "other width":
        config = change(tiny, model__init=str(dense[0]), model__mlp_ratio=2 * tiny.model.mlp_ratio)
    with pytest.raises((ValueError, FileNotFoundError), match="^model.init: ") as error:
        pretrain(config, tmp_path / "run")
    assert str(place if what != "other width" else dense[0]) in str(error.value)
    assert not (tmp_path / "run").exists()
    if what in ("nothing", "folder"):
        with pytest.raises((ValueError, FileNotFoundError), match="^model.init: "):
            plan(config, tmp_path / "run")
