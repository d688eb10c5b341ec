"""Two gloo ranks: directors stay bit-identical, an expert without images does not stop DDP, the sum is optional;
weights that FSDP2 gathers anew have no stale shadows.

Run as a program, this file is one rank: ``test_distributed.py RANK STORE OUT``.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dexkernels import DEXLayer
from dexkernels.layer import update_directors
from dexkernels.testing import randomize_

pytestmark = [
    pytest.mark.skipif(torch.get_default_device().type != "cpu", reason="its ranks are of the CPU"),
    pytest.mark.skipif("config.getoption('--backend')", reason="its ranks take the default backend"),
]

WORLD, E, D = 2, 6, 8


def batch(rank, step):
    """Other images on each rank, of another distribution."""
    x = torch.randn(4, 3, D, generator=torch.Generator().manual_seed(100 * step + rank))
    x[:, 0, rank] += 2.0
    return x


def fresh():
    return randomize_(DEXLayer(D, 10, E, 2), 5)


def train(rank):
    """50 steps under DDP; no image of any rank reaches experts 4 and 5."""
    layer = fresh()
    ddp = DistributedDataParallel(Host(layer), broadcast_buffers=False)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.05)
    chosen, masses = set(), []
    for i in range(50):
        y, aux = ddp(batch(rank, i))
        (y.square().mean() + 0.1 * aux.align_loss + 0.1 * aux.balance_loss).backward()
        layer.update_director(aux.gate_mass, 0.9)
        optimizer.step()
        assert all(p.grad[4:].count_nonzero() == 0 for p in layer.experts.parameters())
        optimizer.zero_grad()
        chosen |= set(aux.expert_indices.flatten().tolist())
        masses.append(aux.gate_mass)
    return {"state": layer.state_dict(), "chosen": sorted(chosen), "masses": torch.stack(masses)}


class Host(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        out_of_reach = torch.tensor([0.0] * 4 + [-1e3] * 2).expand(x.shape[0], 1, E)
        return self.layer(x, noise_std=1.0, router_noise=out_of_reach, return_aux=True)


MASSES = torch.tensor([[1.0, 2.0, 0.0, 0.5, 0.0, 0.25], [0.0, 1.0, 3.0, 0.0, 0.0, 0.125]])


def reduce(rank):
    """Updates with and without the sum over ranks, of one layer and of two."""
    states = {}
    for name, group in (("default", None), ("world", dist.group.WORLD), ("none", False)):
        layer = fresh()
        layer.update_director(MASSES[rank].clone(), 0.5, process_group=group)
        states[name] = layer.state_dict()
    two = [fresh(), fresh()]
    update_directors(two, [MASSES[rank], MASSES[1 - rank]], 0.5)
    states["first of two"], states["second of two"] = (layer.state_dict() for layer in two)
    poisoned = fresh()
    poisoned.update_director(torch.full((E,), float("nan")) if rank == 1 else MASSES[rank], 0.5)
    states["nan on rank 1"] = poisoned.state_dict()
    skipped = fresh()
    skipped.update_director(MASSES[rank], 0.5, skip=torch.tensor(rank == 1))
    states["skip on rank 1"] = skipped.state_dict()
    given = MASSES[rank].clone()
    fresh().update_director(given, 0.5)
    states["mass afterwards"] = given
    return states


def shard(rank):
    """Outputs and align losses under autocast before and after a change of the weights, sharded and whole."""
    found = []
    for how in ("whole", "sharded", "sharded, the director apart"):
        layer = fresh().eval()
        host = Host(layer)
        if how == "sharded, the director apart":
            fully_shard(layer.director)
        if how != "whole":
            fully_shard(host)
        found.append([])
        for _ in range(2):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                y, aux = host(batch(rank, 0))
            found[-1] += [y, aux.align_loss]
            with torch.no_grad():
                for p in layer.parameters():
                    p.mul_(1.5)
    return found


def main(rank, store, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    torch.save({"train": train(rank), "reduce": reduce(rank), "shard": shard(rank)}, out)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may abort a process that takes Python down


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two ranks saved."""
    folder = tmp_path_factory.mktemp("ranks")
    outs = [folder / f"{rank}.pt" for rank in range(WORLD)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder / "store"), str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    try:
        for process in processes:
            log, _ = process.communicate(timeout=120)
            assert process.returncode == 0, log
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [torch.load(out) for out in outs]


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[k].view(torch.int32), b[k].view(torch.int32)) for k in a)


def test_fifty_steps_keep_the_ranks_bit_identical(ranks):
    one, two = (rank["train"] for rank in ranks)
    assert not torch.equal(one["masses"], two["masses"])
    assert one["chosen"] == two["chosen"] == [0, 1, 2, 3]
    assert same(one["state"], two["state"])
    start = fresh().state_dict()
    for name in ("director.fc1.weight", "director.fc2.bias", "usage_ema", "experts.fc1_weight"):
        assert not torch.equal(one["state"][name], start[name])
    assert one["state"]["usage_ema"].tolist()[4:] == [0.0, 0.0]


def test_gathered_weights_are_copied_anew(ranks):
    """FSDP2 gathers into the same storage and bumps no version."""
    for whole, *others in (rank["shard"] for rank in ranks):
        assert not torch.equal(whole[0], whole[2])
        assert all(all(map(torch.equal, whole, other)) for other in others)


@pytest.fixture
def reduced(ranks):
    return [rank["reduce"] for rank in ranks]


def updated(mass):
    layer = fresh()
    layer.update_director(mass, 0.5)
    return layer.state_dict()


def test_the_mass_is_summed_over_ranks(reduced):
    want = updated(MASSES.sum(0))
    for rank in reduced:
        for name in ("default", "world", "first of two", "second of two"):
            assert same(rank[name], want), name


def test_an_explicit_opt_out_does_not_sum(reduced):
    for rank in range(WORLD):
        assert same(reduced[rank]["none"], updated(MASSES[rank]))
    assert not same(reduced[0]["none"], reduced[1]["none"])


def test_nan_on_one_rank_changes_no_rank(reduced):
    for rank in reduced:
        assert same(rank["nan on rank 1"], fresh().state_dict())


def test_the_callers_mass_is_not_summed_in_place(reduced):
    for rank in range(WORLD):
        assert torch.equal(reduced[rank]["mass afterwards"], MASSES[rank])


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])


def test_a_step_that_one_rank_leaves_out_is_left_out_by_all(reduced):
    for rank in reduced:
        assert same(rank["skip on rank 1"], fresh().state_dict())
