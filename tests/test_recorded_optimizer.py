"""`DEXAdamW` along the recorded training steps, which it meets as torch's AdamW and GEMA apart do; spoilt ones do not.

The replay is `tests/recorded/trajectory.py`; tests/kernels and tests/emulator take it through Triton and CUDA.
"""

import copy
import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "recorded"))

import conformance  # noqa: E402
import trajectory  # noqa: E402

from dexkernels import optim  # noqa: E402
from dexkernels.ops.adamw_ema import cpu  # noqa: E402
from dexkernels.optim import DEXAdamW  # noqa: E402

pytestmark = [
    pytest.mark.skipif(torch.get_default_device().type != "cpu", reason="it replays on the CPU"),
    pytest.mark.skipif("config.getoption('--backend')", reason="it replays by plain torch"),
]
MASS = [torch.ones(4)] * 3


@pytest.fixture(autouse=True)
def one_thread_and_small_blocks(monkeypatch):
    monkeypatch.setattr(cpu, "BLOCK", 1000)  # several to an expert
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def furthest(a: trajectory.Replayed, b: trajectory.Replayed) -> float:
    return max(conformance.rel(t, b.weights[name]) for name, t in a.weights.items() if t.is_floating_point())


@pytest.mark.slow
@pytest.mark.parametrize("dtype, rounding", [(torch.float64, 1e-11), (torch.float32, 1e-3)], ids=["float64", "float32"])
def test_the_recorded_steps_are_met_and_the_two_calls_are_equal(dtype, rounding):
    apart, fused = (trajectory.replay(*how, dtype) for how in (trajectory.apart(), trajectory.fused()))
    assert len(fused.shares) == len(apart.shares) > 100
    assert apart.worst() <= 1 and fused.worst() <= 1
    assert fused.worst() <= 2 * apart.worst()
    assert 0 < furthest(fused, apart) < rounding


@pytest.mark.slow
def test_the_recorded_steps_by_two_optimizers_in_turn():
    """Each takes the other's state dict before its step."""
    (build_apart, step_apart), (build_fused, step_fused) = trajectory.apart(), trajectory.fused()
    others, steps = {}, iter(range(8))

    def build(model, **rule):
        others["apart"] = build_apart(model, **rule)
        return build_fused(model, **rule)

    def step(model, fused, *arguments):
        of_torch, take_torchs, lr = others["apart"], next(steps) % 2 == 0, fused.param_groups[0]["lr"]
        first, second = (fused, of_torch) if take_torchs else (of_torch, fused)
        if first.state:
            second.load_state_dict(copy.deepcopy(first.state_dict()))
        for group in second.param_groups:
            group["lr"] = lr
        (step_apart if take_torchs else step_fused)(model, second, *arguments)

    replayed = trajectory.replay(build, step, torch.float64)
    assert replayed.worst() <= 1
    assert {float(s["step"]) for s in replayed.optimizer.state.values()} == {8.0}
    assert {float(s["step"]) for s in others["apart"].state.values()} == {7.0}


def bad_steps(model, optimizer):
    """Between the recorded ones: gradients of NaN and ``skip``, then a gate mass of NaN alone."""
    for p in model.parameters():
        if p.grad is not None:
            p.grad.fill_(float("nan"))
    optimizer.step(gate_mass=MASS, momentum=0.5, clip_scale=torch.tensor(float("nan")), skip=torch.tensor(True))
    broken = [*MASS[:2], torch.tensor([1.0, float("nan"), 1.0, 1.0])]
    optimizer.step(gate_mass=broken, momentum=0.5, skip=torch.tensor(False))


@pytest.mark.slow
def test_bad_steps_in_between_leave_no_trace():
    plain, disturbed = (trajectory.replay(*trajectory.fused(), torch.float64, b) for b in (None, bad_steps))
    assert plain.worst() <= 1
    assert all(torch.equal(t, plain.weights[name]) for name, t in disturbed.weights.items())
    moments = [o.state_dict()["state"] for o in (plain.optimizer, disturbed.optimizer)]
    assert all(torch.equal(t, moments[1][i][name]) for i, s in moments[0].items() for name, t in s.items())


IN_ORDER = """        if (1 - m) * a != 0:
            director.add_(p, alpha=(1 - m) * a)
        _fused_(p, g if clip == 1.0 else g * clip, exp_avg, exp_avg_sq, step, rule)
"""
REVERSED = """        _fused_(p, g if clip == 1.0 else g * clip, exp_avg, exp_avg_sq, step, rule)
        if (1 - m) * a != 0:
            director.add_(p, alpha=(1 - m) * a)
"""
SABOTAGES = {
    "GEMA after the update": (cpu, IN_ORDER, REVERSED),
    "the director keeps all of itself": (cpu, "        director.mul_(m)\n    for", "        pass\n    for"),
    "the experts' share without momentum": (cpu, IN_ORDER, IN_ORDER.replace("alpha=(1 - m) * a", "alpha=a")),
    "experts of equal weight": (cpu, "else u.group_weights.tolist()", "else [1 / E] * E"),
    "one step is not counted": (cpu, "        u.step.add_(1)\n", "        u.step.add_(u.step > 0)\n"),
    "no clipping": (cpu, "g if clip == 1.0 else g * clip", "g"),
    "half of the clipping": (cpu, "float(scalars.clip_scale)", "float(scalars.clip_scale) ** 0.5"),
    "no decay": (cpu, '"weight_decay": rule.weight_decay', '"weight_decay": 0.0'),
    "betas in the other order": (cpu, "first, second = rule.betas", "second, first = rule.betas"),
    "another eps": (cpu, '"eps": rule.eps', '"eps": 10 * rule.eps'),
    "a bad step is taken": (cpu, "and bool(scalars.skip)", "and False"),
    "the moments of a bad step": (cpu, "        return\n    m, clip", "        updates = updates[:1]\n    m, clip"),
    "directors stay": (optim, "            pairs, alone = self._pairs(", "            self._pairs("),
    "matrices stay": (optim, "if p.grad is not None\n            ]", "if p.dim() != 2\n            ]"),
    "usage stays": (optim, "            move_usage(layers, followed)", "            pass"),
    "a gate mass of NaN alone is no bad step": (optim, "            skip = followed.still\n", ""),
    "the first learning rate for ever": (optim, 'Rule(group["lr"]', 'Rule(self.defaults["lr"]'),
    "a momentum for all": (optim, "momentum=1.0 if momentum is None else momentum", "momentum=0.9"),
    "moments begin anew": (optim, "        if not state:\n", "        if True:\n"),
}  # fmt: skip


def spoilt(module: ModuleType, before: str, after: str) -> ModuleType:
    text = Path(module.__file__).read_text()
    assert text.count(before) == 1, f"{before!r} is {text.count(before)} times in {module.__name__}"
    mutant = ModuleType(module.__name__)
    mutant.__package__, mutant.__file__ = module.__package__, module.__file__
    exec(compile(text.replace(before, after), module.__file__, "exec"), vars(mutant))
    return mutant


@pytest.mark.slow
@pytest.mark.parametrize("name", SABOTAGES)
def test_a_spoilt_optimizer_is_seen(name, monkeypatch):
    """By the recorded steps, with bad ones in between."""
    module, before, after = SABOTAGES[name]
    mutant = spoilt(module, before, after)
    optimizer = DEXAdamW
    if module is cpu:
        mutant.BLOCK = cpu.BLOCK
        monkeypatch.setitem(sys.modules, cpu.__name__, mutant)
        monkeypatch.setattr(importlib.import_module(cpu.__package__), "cpu", mutant)
    else:
        optimizer = mutant.DEXAdamW
    try:
        replayed = trajectory.replay(*trajectory.fused(optimizer), torch.float64, bad_steps)
    except ValueError:
        return  # torch itself refuses what the steps have come to
    assert replayed.worst() > 1
