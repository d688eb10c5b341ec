"""FSDP2 and HSDP on two and on four gloo ranks: whatever the placements, the weights are those of one process.

Run as a program, this file is one rank: ``test_sharding.py RANK RANKS STORE OUT``.
"""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from dexkernels import DEXLayer, collect_aux, shard, upcycle_
from dexkernels.testing import randomize_

pytestmark = [
    pytest.mark.skipif(torch.get_default_device().type != "cpu", reason="its ranks are of the CPU"),
    pytest.mark.skipif("config.getoption('--backend')", reason="its ranks take the default backend"),
]

D, H, E, BATCH, STEPS = 8, 12, 3, 8, 3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(D), DEXLayer(D, H, E, 2)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Host(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(2)), nn.Linear(D, D)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def fresh():
    torch.manual_seed(0)
    host = Host()
    for seed, block in enumerate(host.blocks):
        randomize_(block.mlp, seed)
    return host


def wrapped(how, ranks):
    """The host as training calls it; and the host."""
    host = fresh()
    if how == "ddp after requires_grad_(True)":
        return DistributedDataParallel(host.requires_grad_(True)), host
    if how == "blocks, torch's placements":
        for block in host.blocks:
            fully_shard(block)
        return fully_shard(host), host
    if how == "layers, torch's placements":
        for block in host.blocks:
            fully_shard(block.mlp)
        return fully_shard(host), host
    if how == "the whole at once":
        return fully_shard(host), host
    if how == "hsdp":
        return shard(host, init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))), host
    if how == "shard":
        return shard(host), host
    raise ValueError(how)


def trained(net, host, rank, ranks):
    """Weights after three steps, each rank with its part of the images: of the sum of squares, so that every image
    counts the same however they are parted."""
    optimizer = torch.optim.SGD([p for p in host.parameters() if p.requires_grad], lr=0.1)
    assert not any("director" in n and p.requires_grad for n, p in host.named_parameters())
    for step in range(STEPS):
        x = torch.randn(BATCH, 3, D, generator=torch.Generator().manual_seed(step))
        x = x.view(ranks, BATCH // ranks, 3, D)[rank]
        with collect_aux(host) as aux:
            y = net(x)
        (y.square().mean() + aux.losses(align=0.1, balance=0.0)).backward()
        aux.update_directors(0.5)
        optimizer.step()
        optimizer.zero_grad()
    return {n: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for n, p in host.state_dict().items()}


def built_before_shard():
    host = fresh()
    optimizer = torch.optim.SGD([p for block in host.blocks for p in block.mlp.experts.parameters()], lr=0.1)
    trained(shard(host), host, 0, 1)
    del optimizer


def upcycled_after(spread):
    upcycle_(spread(nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D))), E, 2, route_from="mean")


def ways(ranks):
    more = ["hsdp"] if ranks == 4 else []
    fixed = ["ddp after requires_grad_(True)", "blocks, torch's placements", "layers, torch's placements"]
    return [*fixed, "the whole at once", "shard", *more]


def main(rank, ranks, store, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    seen = {how: trained(*wrapped(how, ranks), rank, ranks) for how in ways(ranks)}
    sharded = shard(fresh())
    seen["placements"] = {n: str(p.placements) for n, p in sharded.named_parameters()}
    half = shard(fresh(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    seen["half"] = trained(half, half, rank, ranks)
    errors = seen["errors"] = []
    apart = fresh()
    fully_shard(apart.blocks[0].mlp.director)
    uneven = nn.Sequential(DEXLayer(D, 13, E, 2))
    unnamed = init_device_mesh("cpu", (1, ranks))
    for act in (
        lambda: apart.blocks[0].mlp.update_director(torch.ones(E), 0.5),
        lambda: shard(uneven),
        lambda: shard(fresh(), unnamed),
        lambda: shard(shard(fresh())),
        lambda: shard(DistributedDataParallel(fresh())),
        built_before_shard,
        lambda: upcycled_after(fully_shard),
        lambda: upcycled_after(DistributedDataParallel),
    ):
        try:
            act()
        except ValueError as error:
            errors.append(str(error))
    if rank == 0:
        torch.save(seen, out)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may abort a process that takes Python down


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def seen(request, tmp_path_factory):
    """What rank 0 of several saw."""
    ranks, folder = request.param, tmp_path_factory.mktemp("ranks")
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *map(str, (rank, ranks, folder / "store", folder / "out.pt"))],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        for process in processes:
            log, _ = process.communicate(timeout=180)
            assert process.returncode == 0, log
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return ranks, torch.load(folder / "out.pt")


@pytest.fixture(scope="module")
def alone():
    host = fresh()
    return trained(host, host, 0, 1)


def test_every_placement_trains_as_one_process_does(seen, alone):
    ranks, found = seen
    start = fresh().state_dict()
    assert not torch.equal(alone["blocks.0.mlp.director.fc1.weight"], start["blocks.0.mlp.director.fc1.weight"])
    for how in ways(ranks):
        assert found[how].keys() == alone.keys()
        for name, want in alone.items():
            torch.testing.assert_close(found[how][name], want, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_shard_cuts_experts_and_directors_along_the_same_features(seen):
    placements = seen[1]["placements"]
    for name, placement in placements.items():
        assert placement == f"(Shard(dim={1 if '.experts.' in name else 0}),)", name
    assert sum(".experts." in name for name in placements) == 8


def test_parameters_gathered_in_bfloat16_are_no_half_precision_layer(seen, alone):
    """Their masters are float32, in which directors follow."""
    name = "blocks.0.mlp.director.fc1.weight"
    assert seen[1]["half"][name].dtype == torch.float32
    torch.testing.assert_close(seen[1]["half"][name], alone[name], rtol=0.1, atol=0.02)


def test_what_cannot_work_is_refused_by_name(seen):
    ranks, found = seen
    assert len(found["errors"]) == 8
    assert found["errors"][0].startswith("experts: expected them to be cut over ranks like their director, got whole")
    assert found["errors"][2].startswith("mesh: expected names of its two dimensions")
    assert f"to be a multiple of the {ranks} ranks that share it" in found["errors"][1]
    cut = "blocks.0.mlp: expected a DEX layer that is not cut yet, got a cut one: call shard only once"
    assert found["errors"][3] == cut
    assert found["errors"][4].startswith("model: expected a model outside DDP")
    built = "optimizer: expected one that was built after shard, got SGD with 4 parameters"
    assert found["errors"][5].startswith(built)
    assert found["errors"][6].startswith("model: expected whole weights in 0, got weights that are cut over ranks")
    assert found["errors"][7].startswith("model: expected a model that is not yet distributed over ranks, got")


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="model: expected at least one DEXLayer in it, got none; call upcycle_ first"):
        shard(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="mesh: expected initialised ranks"):
        shard(copy.deepcopy(fresh()))


if __name__ == "__main__":
    rank, ranks, store, out = sys.argv[1:]
    main(int(rank), int(ranks), store, out)
