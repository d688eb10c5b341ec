"""csrc/adamw_ema, as nvcc compiles it for sm_80 and sm_90a, on the emulator: the bits that it promises."""

import sys
from pathlib import Path

import pytest
import torch
from cuda_adamw import LARGE, Captured, promised
from cuda_library import TARGETS, compiled, nvcc
from ptx_emulator.ptx import PTXError

from dexkernels.ops import backends
from dexkernels.ops.adamw_ema.records import Rule, Update, rates

RULE = Rule(1e-2, (0.9, 0.99), 1e-6, 0.1)


@pytest.fixture(scope="module", params=TARGETS.values())
def ptx(request, tmp_path_factory) -> str:
    compiler = nvcc()
    if compiler is None:
        pytest.skip("there is no nvcc")
    return compiled(compiler, request.param, tmp_path_factory.mktemp("ptx"), operator="adamw_ema")


def make(offset=0, copies=True, shapes=((4, (5, 3)), (1, (2100,)), (3, (1,)), (8, (4, 20)), (0, (70,)), (0, ()))):
    """The first has an expert of no weight, of the third none has any."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        t = torch.randn(shape, generator=generator)
        return torch.empty(t.numel() + offset)[offset:].view(t.shape).copy_(t)

    updates = []
    for E, shape in shapes:
        full = (E, *shape) if E else shape
        u = Update(draw(*full), draw(*full), draw(*full), draw(*full).square(), torch.tensor(4.0))
        if E:
            copy = torch.full((E + 1, *shape), -1.0, dtype=torch.bfloat16) if copies else None
            u = u._replace(director=draw(*shape), group_weights=torch.rand(E, generator=generator), copy=copy)
        updates.append(u)
    updates[0].group_weights[1] = 0
    if len(updates) > 2 and updates[2].director is not None:
        updates[2].group_weights.zero_()
    return updates


def check(updates, exact):
    for i, (got, right) in enumerate(zip(updates, exact, strict=True)):
        for name in ("parameter", "exp_avg", "exp_avg_sq", "director", "copy"):
            value = getattr(got, name)
            assert value is None or torch.equal(value, getattr(right, name)), f"{name} {i}"


@pytest.mark.parametrize("options", [{}, {"copies": False}, {"offset": 1}], ids=["copies", "no copies", "not aligned"])
def test_results_are_the_promised_bits(ptx, options):
    updates = make(**options)
    of_each, momentum = rates(updates, RULE), torch.tensor(0.75, dtype=torch.float64)
    exact = [promised(u, r, 0.75, 0.5) for u, r in zip(updates, of_each, strict=True)]
    Captured(ptx, updates, of_each, momentum, clip=torch.tensor(0.5)).run(seed=1)
    check(updates, exact)


def test_a_captured_launch_reads_its_scalars_anew(ptx):
    updates = make(shapes=((3, (5, 4)), (0, (9,))))
    of_each, momentum = rates(updates, RULE), torch.tensor(0.75, dtype=torch.float64)
    clip, skip = torch.tensor(1.0), torch.tensor(False)
    captured = Captured(ptx, updates, of_each, momentum, clip=clip, skip=skip)
    for m, scale, skipped in ((0.75, 1.0, False), (0.5, 0.25, False), (0.25, 1.0, True)):
        momentum.fill_(m), clip.fill_(scale), skip.fill_(skipped)
        exact = [promised(u, r, m, scale) for u, r in zip(updates, of_each, strict=True)]
        if skipped:
            exact = [Update(*(None if t is None else t.clone() for t in u)) for u in updates]
        captured.run()
        check(updates, exact)


@pytest.mark.slow
def test_the_large_table(ptx):
    updates = make(shapes=((2, (9,)), *((0, (5,)),) * 99))
    of_each, momentum = rates(updates, RULE), torch.tensor(0.9, dtype=torch.float64)
    exact = [promised(u, r, 0.9) for u, r in zip(updates, of_each, strict=True)]
    Captured(ptx, updates, of_each, momentum, capacity=LARGE, blocks=32).run()
    check(updates, exact)


def test_an_entry_that_says_more_than_there_is(ptx):
    updates = make(shapes=((2, (70,)),))
    momentum = torch.tensor(0.9, dtype=torch.float64)
    with pytest.raises(PTXError, match="outside of every allocation: .* past the end of parameter 0"):
        Captured(ptx, updates, rates(updates, RULE), momentum, hidden=4).run()


class OnTheEmulator:
    """In the place of dexkernels/ops/adamw_ema/cuda.py, without skip."""

    def __init__(self, ptx):
        self.ptx, self.launches = ptx, 0

    def why_not(self, update):
        return None

    def adamw_ema_(self, updates, rule, scalars):
        torch._foreach_add_([u.step for u in updates], 1)
        updates = [u if u.director is None else u._replace(group_weights=u.group_weights.float()) for u in updates]
        Captured(
            self.ptx,
            updates,
            rates(updates, rule),
            scalars.momentum.double(),
            clip=scalars.clip_scale.float(),
            capacity=LARGE,
            blocks=32,
            rule=(*rule.betas, rule.eps),
        ).run()
        self.launches += 1


@pytest.mark.slow
def test_the_recorded_steps_are_met(ptx, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "recorded"))
    import trajectory

    emulated = OnTheEmulator(ptx)
    choose = backends.choose
    monkeypatch.setattr(
        backends, "choose", lambda op, *a, **options: "cuda" if op == "adamw_ema_" else choose(op, *a, **options)
    )
    monkeypatch.setitem(sys.modules, backends.TABLES["adamw_ema_"]["cuda"], emulated)
    replayed = trajectory.replay(*trajectory.fused(), torch.float32)
    assert emulated.launches == 8 and replayed.worst() <= 1
