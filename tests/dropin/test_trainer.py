"""`DEXCallback` in a real `transformers.Trainer`, against the same training by hand."""

import copy
import os
import subprocess
import sys
import types

import pytest
import torch

import dexkernels
from dexkernels import DEXLayer
from dexkernels.testing import relative_error

from .hosts import look_trained_, need, vit_config

LR, STEPS, BATCH = 0.1, 3, 2


@pytest.fixture
def transformers():
    need("accelerate")
    return need("transformers")


def vit(transformers):
    config = vit_config("ViTConfig", num_labels=2)
    config.hidden_dropout_prob = 0.0
    model = look_trained_(transformers.ViTForImageClassification(config))
    dexkernels.upcycle_(model, num_experts=4, top_k=2)
    return model


def data(count):
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": i % 2} for i in range(count)]


def options_of(path, **options):
    return {
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "use_cpu": True, "output_dir": str(path),
        "max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": LR, "optim": "sgd",
        "report_to": "none", "train_sampling_strategy": "sequential", "disable_tqdm": True,
    } | options  # fmt: skip


def arguments(transformers, path, **options):
    return transformers.TrainingArguments(**options_of(path, **options))


RANK = """
import os, sys
import torch, transformers
from dex.integrations import DEXCallback
folder = sys.argv[1]
model, samples, options, callback = torch.load(f"{folder}/start.pt", weights_only=False)
args = transformers.TrainingArguments(**options, ddp_backend="gloo", ddp_broadcast_buffers=False)
transformers.Trainer(model, args, train_dataset=samples, callbacks=[DEXCallback(**callback)]).train()
torch.save(model.state_dict(), f"{folder}/{os.environ['RANK']}.pt")
torch.distributed.barrier()
os._exit(0)  # gloo's threads abort the process now and then while Python takes down what is left of DDP
"""


def by_hand(model, samples, accumulate, callback):
    """SGD on the mean over micro-batches of task loss and auxiliary losses; GEMA before every optimizer step."""
    from dex.train.schedules import cosine

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    model.train()
    batches = [samples[i : i + BATCH] for i in range(0, len(samples), BATCH)]
    for step in range(STEPS):
        aux = dexkernels.collect_aux(model, 0.0)
        for batch in batches[step * accumulate : (step + 1) * accumulate]:
            images = torch.stack([s["pixel_values"] for s in batch])
            with aux:
                out = model(pixel_values=images, labels=torch.tensor([s["labels"] for s in batch]))
            ((out.loss + aux.losses(callback.align, callback.balance)) / accumulate).backward()
        aux.update_directors(cosine(*callback.momentum, step, STEPS))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_it_is_the_training_by_hand(transformers, tmp_path, accumulate, checkpointed):
    from dex.integrations import DEXCallback

    model = vit(transformers)
    twin, start = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    samples = data(STEPS * BATCH * accumulate)
    callback = DEXCallback(align=0.5, balance=0.5, momentum=(0.5, 0.9), noise_std=(0.0, 0.0))
    args = arguments(transformers, tmp_path, gradient_accumulation_steps=accumulate)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    transformers.Trainer(model, args, train_dataset=samples, callbacks=[callback]).train()
    by_hand(twin, samples, accumulate, callback)
    want = twin.state_dict()
    for name, tensor in model.state_dict().items():
        assert relative_error(tensor, want[name]) < 1e-5, name
    for part in ("director.fc1.weight", "usage_ema", "experts.fc1_weight", "router_weight"):
        name = f"vit.layers.0.mlp.fc1.{part}"
        assert relative_error(want[name], start[name]) > 1e-4
    # The callback is gone with the training: no hooks, nothing recorded.
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert all(m.recording is None for m in model.modules() if isinstance(m, DEXLayer))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_are_the_training_by_hand_and_equal_each_other(transformers, tmp_path, accumulate):
    """A step of two ranks is one of as many more micro-batches: directors, gates' masses and losses are of all."""
    model = vit(transformers)
    samples = data(STEPS * BATCH * 2 * accumulate)
    options = options_of(tmp_path, gradient_accumulation_steps=accumulate)
    settings = {"align": 0.5, "balance": 0.5, "momentum": (0.5, 0.9), "noise_std": (0.0, 0.0)}
    torch.save((model, samples, options, settings), tmp_path / "start.pt")
    (tmp_path / "train.py").write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.run(
        [*command, tmp_path / "train.py", tmp_path],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    start = copy.deepcopy(model.state_dict())
    by_hand(model, samples, 2 * accumulate, types.SimpleNamespace(**settings))
    want = model.state_dict()
    assert one.keys() == two.keys() == want.keys()
    for name in want:
        assert torch.equal(one[name], two[name]), name
        assert relative_error(one[name], want[name]) < 1e-5, name
    for part in ("director.fc1.weight", "usage_ema", "experts.fc1_weight", "router_weight"):
        name = f"vit.layers.0.mlp.fc1.{part}"
        assert relative_error(want[name], start[name]) > 1e-4


def test_schedules_and_evaluation(transformers, tmp_path, monkeypatch):
    """Noise and momentum move as asked for; evaluation in between is neither noisy nor counted."""
    from dex.integrations import DEXCallback

    seen = {"noise": [], "momentum": [], "mass": []}
    forward, update = DEXLayer.forward, dexkernels.AuxCollector.update_directors

    def watch_forward(self, x, **options):
        if self.training:
            seen["noise"].append(self.recording.noise_std.item())
        else:
            assert self.recording is None
        return forward(self, x, **options)

    def watch_update(self, momentum, **options):
        seen["momentum"].append(momentum)
        seen["mass"].append([m.sum().item() for m in self.gate_mass])
        return update(self, momentum, **options)

    model, samples = vit(transformers), data(4 * STEPS)
    monkeypatch.setattr(DEXLayer, "forward", watch_forward)
    monkeypatch.setattr(dexkernels.AuxCollector, "update_directors", watch_update)
    args = arguments(transformers, tmp_path, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1)
    callback = DEXCallback(momentum=(0.8, 0.9), noise_std=(1.0, 0.0))
    transformers.Trainer(model, args, train_dataset=samples, eval_dataset=samples[:4], callbacks=[callback]).train()
    assert seen["momentum"] == pytest.approx([0.8, 0.85, 0.9])
    assert seen["noise"][:: 2 * 3] == pytest.approx([1.0, 0.5, 0.0])  # 2 micro-batches, 3 layers
    assert seen["mass"] == [pytest.approx([4.0] * 3)] * STEPS


@pytest.mark.parametrize(
    ("options", "message"),
    [({"torch_compile": True}, "args.torch_compile: expected False"), ({"label_smoothing_factor": 0.1}, "with a loss")],
)
def test_what_it_cannot_do_is_refused(transformers, tmp_path, options, message):
    from dex.integrations import DEXCallback

    args = arguments(transformers, tmp_path, **options)
    trainer = transformers.Trainer(vit(transformers), args, train_dataset=data(6), callbacks=[DEXCallback()])
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_wrong_arguments(transformers):
    from dex.integrations import DEXCallback

    with pytest.raises(ValueError, match=r"momentum: expected \(first, last\) in \[0, 1.0\], got"):
        DEXCallback(momentum=(0.9, 1.1))
    with pytest.raises(ValueError, match="noise_std: expected"):
        DEXCallback(noise_std=(-1.0, 0.0))
