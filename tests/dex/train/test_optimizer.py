import pytest
import torch

from dex.data import open_dataset
from dex.model.build import build_model
from dex.train.optimizer import adamw, depth_of, is_vector, parameter_groups, set_learning_rate
from dex.train.plan import resolve
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
    from dex.train import checkpoint

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
