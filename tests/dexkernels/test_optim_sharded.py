"""`DEXAdamW` on two gloo ranks: DDP and both ways to shard give what torch's AdamW and `update_directors` give.

Run as a program, this file is one rank: ``test_optim_sharded.py RANK STORE OUT``.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dexkernels import DEXLayer, shard
from dexkernels.layer import update_directors
from dexkernels.ops import backends
from dexkernels.optim import DEXAdamW
from dexkernels.testing import randomize_

pytestmark = [
    pytest.mark.skipif(torch.get_default_device().type != "cpu", reason="its ranks are of the CPU"),
    pytest.mark.skipif("config.getoption('--backend')", reason="its ranks take the default backend"),
]

WORLD, E, D, H = 2, 4, 8, 12
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-6}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = randomize_(DEXLayer(D, H, E, 2), 5)

    def forward(self, x):
        return self.layer(x, return_aux=True)


def spread(way):
    net = Net()
    if way == "ddp":
        return net, DistributedDataParallel(net, broadcast_buffers=False)
    if way == "fully_shard":
        return net, fully_shard(net)
    return net, shard(net, init_device_mesh("cpu", (WORLD,))) or net


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def train(rank, way, fused):
    """The weights after three steps, the second of which rank 1 asks to skip, and how often GEMA was called alone."""
    net, outer = spread(way)
    if fused:
        optimizer = DEXAdamW(net, **OPTIONS, copies=torch.bfloat16)
    else:
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], **OPTIONS)
    asked, load = [], backends.load
    backends.load = lambda op, backend: asked.append(op) or load(op, backend)
    for i in range(3):
        x = torch.randn(4, 3, D, generator=torch.Generator().manual_seed(10 * i + rank))
        y, aux = outer(x)
        (y.square().mean() + aux.align_loss + aux.balance_loss).backward()
        skip = torch.tensor(i == 1 and rank == 1)
        if fused:
            optimizer.step(gate_mass=[aux.gate_mass], momentum=0.5, skip=skip)
        else:
            update_directors([net.layer], [aux.gate_mass], 0.5, skip=skip)
            if i != 1:
                optimizer.step()
        optimizer.zero_grad()
    backends.load = load
    return {name: whole(t) for name, t in net.state_dict().items()}, asked.count("group_ema_")


WAYS = ("ddp", "shard", "fully_shard")


@pytest.mark.slow
def test_equal_to_the_two_calls(tmp_path):
    command = [sys.executable, __file__]
    ranks = [subprocess.Popen([*command, str(r), tmp_path / "store", tmp_path / f"{r}.pt"]) for r in range(WORLD)]
    assert [p.wait(timeout=240) for p in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"{r}.pt") for r in range(WORLD))
    for way in WAYS:
        ours, alone = first[way, True]
        plain, _ = first[way, False]
        for name, t in plain.items():
            torch.testing.assert_close(ours[name], t, rtol=1e-5, atol=1e-6, msg=f"{way}: {name}")
            assert torch.equal(ours[name], second[way, True][0][name]), f"{way}: {name}"
        assert alone == (3 if way == "fully_shard" else 0), way
        assert not torch.equal(plain["layer.director.fc1.weight"], Net().layer.director.fc1.weight)


def main(rank, store, out):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=WORLD)
    torch.save({(way, fused): train(int(rank), way, fused) for way in WAYS for fused in (False, True)}, out)
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may abort a process that takes Python down


if __name__ == "__main__":
    main(*sys.argv[1:])
