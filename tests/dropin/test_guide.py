"""The Python blocks of docs/your-own-model.md that need other packages or several ranks, each by itself.

What a block needs stands after its ```python; tests/test_docs.py runs the others.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dexkernels

from .hosts import need

PAGE = Path(__file__).parents[2] / "docs" / "your-own-model.md"
BLOCKS = re.findall(r"^```python ?([^\n]*)\n(.*?)^```", PAGE.read_text(), flags=re.M | re.S)


@pytest.mark.parametrize("info, code", [block for block in BLOCKS if block[0].startswith("needs=")])
def test_each_block_runs_by_itself(info, code, tmp_path, monkeypatch):
    for module in info.removeprefix("needs=").split(","):
        need(module)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"{PAGE.name}, {info}", "exec"), {"__name__": "__main__"})


def test_every_block_belongs_to_a_test():
    assert {info for info, _ in BLOCKS} == {
        "", "needs=transformers", "needs=transformers,accelerate", "needs=accelerate", "needs=lightning",
        "needs=timm", "torchrun",
    }  # fmt: skip


def plain_loop():
    """The model and the steps of the recipes below, with nothing but torch: two steps of two micro-batches."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(
        32, 4, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    model = torch.nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
    dexkernels.upcycle_(model, num_experts=4, top_k=2, route_from="cls")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    images = torch.randn(16, 9, 32)
    start = {name: t.clone() for name, t in model.state_dict().items()}
    for step in images.split(8):
        aux = dexkernels.collect_aux(model)  # of a single step
        for micro_batch in step.split(4):
            with aux:
                y = model(micro_batch)
            ((y.square().mean() + aux.losses(align=0.01, balance=0.01)) / 2).backward()
        aux.update_directors(momentum=0.99)
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, start[name])}
    assert {"layers.0.linear1.director.fc1.weight", "layers.1.linear1.experts.fc1_weight"} <= moved
    return model.state_dict()


@pytest.mark.parametrize("info", ["needs=accelerate", "needs=lightning"])
def test_recipes_compute_what_a_plain_loop_does(info, tmp_path, monkeypatch):
    need(info.removeprefix("needs="))
    (code,) = (code for kind, code in BLOCKS if kind == info)
    assert code.count("noise_std=0.1") == 1
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code.replace("noise_std=0.1", "noise_std=0.0"), info, "exec"), names)
    got = {name.removeprefix("model."): t.cpu() for name, t in names["model"].state_dict().items()}
    want = plain_loop()
    assert got.keys() == want.keys()
    for name, t in want.items():
        torch.testing.assert_close(got[name], t)


def run_on_two_ranks(code, result, folder):
    """The block as it stands, on two gloo ranks; each saves ``result``, an expression."""
    script = folder / "train.py"
    script.write_text(
        f"{code}torch.save({result}, {str(folder)!r} + f'/{{dist.get_rank()}}.pt')\n"
        "dist.barrier()\ndist.destroy_process_group()\n"
        "__import__('os')._exit(0)  # gloo's threads may abort a process that takes Python down\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]


@pytest.mark.slow
def test_distributed_recipe_keeps_directors_identical(tmp_path):
    code = next(code for info, code in BLOCKS if info == "torchrun" and "DistributedDataParallel" in code)
    run_on_two_ranks(code, "(model.module.state_dict(), aux.calls)", tmp_path)
    (one, calls_one), (two, calls_two) = (torch.load(tmp_path / f"{r}.pt", weights_only=False) for r in (0, 1))
    assert all(torch.equal(t, two[name]) for name, t in one.items())
    # Not because nothing moved, nor because both ranks saw the same.
    assert not torch.equal(one["layers.0.linear1.director.fc1.weight"], one["layers.0.linear1.experts.fc1_weight"][0])
    assert one["layers.0.linear1.usage_ema"].sum() > 0
    first, second = (calls["module.layers.0.linear1"][0].gate_mass for calls in (calls_one, calls_two))
    assert not torch.equal(first, second)


@pytest.mark.slow
def test_accelerate_recipe_keeps_directors_identical(tmp_path, monkeypatch):
    need("accelerate")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # gloo, also where there is a GPU
    (code,) = (code for info, code in BLOCKS if info == "needs=accelerate")
    before = "start = [layer.director.fc1.weight.clone() for layer in aux.layers.values()]\nfor (images,)"
    code = "import torch.distributed as dist\n" + code.replace("for (images,)", before)
    run_on_two_ranks(code, "(type(model).__name__, start, model.module.state_dict())", tmp_path)
    (kind, start, one), (_, _, two) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert kind == "DistributedDataParallel" and all(torch.equal(t, two[name]) for name, t in one.items())
    for i, director in enumerate(start):
        assert not torch.equal(director, one[f"layers.{i}.linear1.director.fc1.weight"])


@pytest.mark.slow
def test_sharded_recipe_trains_and_moves_directors(tmp_path):
    code = next(code for info, code in BLOCKS if info == "torchrun" and "dexkernels.shard(model)" in code)
    run_on_two_ranks(code, "{n: p.full_tensor() for n, p in model.named_parameters()}", tmp_path)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(p, two[name]) for name, p in one.items())
    director, experts = (one[f"layers.0.linear1.{n}"] for n in ("director.fc1.weight", "experts.fc1_weight"))
    assert not torch.equal(director, experts[0]) and not torch.equal(experts[0], experts[1])
