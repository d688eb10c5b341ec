import pytest
import torch

from dex.data import open_dataset
from dex.model.build import build_model
from dex.train import checkpoint
from dex.train.continuation import Override
from dex.train.optimizer import adamw, depth_of, is_vector, parameter_groups, set_learning_rate
from dex.train.plan import resolve
from dex.train.run import pretrain
from dex.train.runlog import read_rows
from dex.train.trainer import Trainer


def named(config):
    return [(n, p) for n, p in build_model(config).named_parameters() if p.requires_grad]


def test_vectors_are_what_mae_does_not_decay(tiny):
    names = [name for name, _ in named(tiny)]
    kept = {name for name in names if not is_vector(name)}
    assert all(name.endswith("weight") and ".norm" not in name for name in kept)
    assert {"encoder.patch_embed.weight", "encoder.blocks.0.dex.router_weight", "decoder_pred.weight"} <= kept
    assert {"encoder.blocks.1.dex.experts.fc1_weight", "encoder.blocks.1.dex.experts.fc2_weight"} <= kept
    left_out = set(names) - kept
    assert {"mask_token", "encoder.cls_token", "encoder.norm.weight", "decoder_norm.weight"} <= left_out
    # All experts' biases are one matrix: a rule by dimensions would miss them.
    assert {"encoder.blocks.0.dex.experts.fc1_bias", "encoder.blocks.0.norm1.weight"} <= left_out


def test_depths_go_from_the_patches_to_the_decoder(tiny):
    want = {
        "encoder.cls_token": 0,
        "encoder.patch_embed.bias": 0,
        "encoder.blocks.0.norm1.weight": 1,
        "encoder.blocks.1.dex.experts.fc1_weight": 2,
        "encoder.norm.weight": 3,
        "decoder_blocks.0.mlp.fc1.weight": 3,
        "mask_token": 3,
    }
    assert {name: depth_of(name, 2) for name in want} == want


def test_every_parameter_is_in_one_group_and_the_groups_are_few(tiny, change):
    assert len(parameter_groups(tiny, named(tiny))) == 1
    c = change(tiny, optim__layer_decay=0.5, optim__decay_exclude="vectors")
    parameters = named(c)
    groups = parameter_groups(c, parameters)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for _, p in parameters)
    assert {(group["weight_decay"], group["lr_scale"]) for group in groups} == {
        (decay, scale) for decay in (0.0, 1e-6) for scale in (0.125, 0.25, 0.5, 1.0)
    }


def test_a_step_is_as_long_as_its_group_says(tiny, change):
    """Of equal gradients AdamW's first step is one learning rate long, whatever they are."""
    c = change(tiny, optim__layer_decay=0.5, optim__decay_exclude="vectors", optim__weight_decay=0.1)
    parameters = named(c)
    lr = torch.zeros(())
    optimizer = adamw(c, parameters, lr)
    optimizer.found_inf = torch.zeros(())
    set_learning_rate(optimizer, lr, 0.01)
    before = {name: p.detach().clone() for name, p in parameters}
    for _, p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, p in parameters:
        rate = 0.01 * 0.5 ** (3 - depth_of(name, 2))
        decay = 1.0 if is_vector(name) else 1.0 - rate * 0.1
        torch.testing.assert_close(p.detach(), before[name] * decay - rate, rtol=1e-4, atol=1e-6)


def test_what_was_trained_so_goes_on_after_a_save(tiny, change, images, tmp_path):
    c = change(tiny, optim__layer_decay=0.7, optim__decay_exclude="vectors", optim__ema=0.9)
    whole, first, second = (Trainer(resolve(c, open_dataset(images))) for _ in range(3))
    for _ in range(2):
        first.train_step()
    saver = checkpoint.Saver(tmp_path, 1)
    saver.save(2, first.tensors(), first.state())
    saver.wait()
    second.restore(checkpoint.load(tmp_path / "step-00000002"))
    for _ in range(4):
        whole.train_step()
    for _ in range(2):
        second.train_step()
    a, b = whole.tensors(), second.tensors()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert any(name.startswith("ema.") for name in a)
    plain = Trainer(resolve(tiny, open_dataset(images)))
    for _ in range(4):
        plain.train_step()
    assert plain.row()["loss"] != pytest.approx(whole.row()["loss"], rel=1e-6)


FUSED = {
    "alone": {},
    "averages, rates by depth, decay of matrices": {
        "optim__ema": 0.9, "optim__layer_decay": 0.5, "optim__decay_exclude": "vectors",
    },
    "bf16": {"run__precision": "bf16"},
    "micro-batches": {"parallel__micro_batch": 4},
    "no experts": {"model__num_experts": 0},
}  # fmt: skip


@pytest.mark.parametrize("what", FUSED)
def test_fused_is_the_same_to_rounding(tiny, change, what):
    ends = []
    for fused in (False, True):
        c = change(tiny, optim__fused=fused, optim__weight_decay=0.1, **FUSED[what])
        trainer = Trainer(resolve(c, open_dataset(c.data.path)))
        for _ in range(4):
            assert not trainer.train_step()
        ends.append({name: t.clone() for name, t in trainer.tensors().items()})
        trainer.close()
    assert ends[0].keys() == ends[1].keys()
    bound = 2e-2 if what == "bf16" else 1e-4
    for name, t in ends[0].items():
        scale = max(float(t.abs().max()), 1e-6)
        assert float((t - ends[1][name]).abs().max()) <= bound * scale, name


def trained(trainer, steps):
    for _ in range(steps):
        trainer.train_step()
    trainer.flush()
    return trainer


def saved(trainer, folder):
    saver = checkpoint.Saver(folder, 1)
    saver.save(trainer.step, trainer.tensors(), trainer.state())
    saver.wait()
    return checkpoint.load(folder / f"step-{trainer.step:08d}")


def unequal(a, b):
    a, b = a.tensors(), b.tensors()
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def overflow(trainer):
    """Let the next step overflow in float16."""
    if trainer.loss_scale is not None:
        trainer.loss_scale.value.fill_(2.0**24)


RESUMED = {
    "fp32": {},
    "bf16": {"run__precision": "bf16"},
    "fp16": {"run__precision": "fp16"},
    "rates by depth, average": {"optim__layer_decay": 0.5, "optim__ema": 0.9},
}


@pytest.mark.slow
@pytest.mark.parametrize("what", RESUMED)
def test_a_resumed_fused_run_is_the_unbroken_one(tiny, change, images, tmp_path, what):
    """Bit for bit, although the copies of the experts begin anew."""
    c = change(tiny, optim__fused=True, optim__weight_decay=0.1, **RESUMED[what])
    whole, first, second = (Trainer(resolve(c, open_dataset(images))) for _ in range(3))
    overflow(whole), overflow(first)
    trained(whole, 3), trained(first, 3)
    second.restore(saved(first, tmp_path))
    assert unequal(first, second) == []
    overflow(whole), overflow(second)
    trained(whole, 5), trained(second, 5)
    assert unequal(whole, second) == [] and whole.state() == second.state()
    skipped = whole.row()["skipped"]
    assert 2 <= skipped < 8 if what == "fp16" else skipped == 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("begins", [True, False], ids=["fused, then not", "not fused, then fused"])
def test_a_run_goes_on_with_the_other_optimizer(tiny, change, images, tmp_path, begins, precision):
    """Nothing is lost in between, and the end is that of a run that never changed, to rounding."""
    c = change(tiny, optim__weight_decay=0.1, run__precision=precision)
    first, second, whole = (
        Trainer(resolve(change(c, optim__fused=fused), open_dataset(images))) for fused in (begins, not begins, begins)
    )
    assert type(first.optimizer) is not type(second.optimizer)
    second.restore(saved(trained(first, 3), tmp_path))
    assert unequal(first, second) == []
    trained(second, 3), trained(whole, 6)
    ours, unbroken = second.tensors(), whole.tensors()
    assert ours.keys() == unbroken.keys()
    for name, t in unbroken.items():
        bound = (1e-4 if precision == "fp32" else 2e-2) * max(float(t.abs().max()), 1e-6)
        assert float((ours[name] - t).abs().max()) <= bound, name
    assert all(float(ours[name]) == float(t) for name, t in unbroken.items() if name.startswith("step."))


@pytest.mark.slow
def test_a_run_is_continued_with_the_other_optimizer_by_an_override(tiny, change, tmp_path):
    c = change(tiny, schedule__steps=4, run__log_every=1)
    assert pretrain(change(c, run__stop_at=2), tmp_path / "run", resume=None) == 0
    fused = change(c, optim__fused=True)
    with pytest.raises(ValueError, match="optim.fused: expected False, got True.*--override FIELD"):
        pretrain(fused, tmp_path / "run", resume="auto")
    assert pretrain(fused, tmp_path / "run", resume="auto", override=Override(("optim.fused",), "faster")) == 0
    (event,) = (e for e in read_rows(tmp_path / "run/events.jsonl") if e["event"] == "overridden")
    assert (event["field"], event["was"], event["now"], event["reason"]) == ("optim.fused", False, True, "faster")
    assert [row["step"] for row in read_rows(tmp_path / "run/metrics.jsonl")] == [1, 2, 3, 4]


def test_a_fused_step_that_overflows_in_float16_changes_nothing_but_the_scale(tiny, change, images):
    t = Trainer(resolve(change(tiny, optim__fused=True, run__precision="fp16"), open_dataset(images)))
    t.loss_scale.value.fill_(2.0**8)
    trained(t, 2)
    t.loss_scale.value.fill_(2.0**24)
    before = {name: tensor.clone() for name, tensor in t.tensors().items()}
    assert t.train_step() == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in t.tensors().items())
    assert t.loss_scale.value == 2.0**23
    while t.loss_scale.value > 2.0**8 and t.row()["skipped"]:
        assert t.train_step() == []
    assert not torch.equal(
        t.tensors()["model.encoder.blocks.0.dex.director.fc1.weight"],
        before["model.encoder.blocks.0.dex.director.fc1.weight"],
    )
