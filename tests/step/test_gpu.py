"""On a GPU: a step never waits for it, and a CUDA graph of the step replays with other images and schedules."""

import contextlib

import pytest
import torch

pytest.importorskip("yaml", reason="a training step is configured in YAML")

from dexkernels import backends  # noqa: E402

from .small import trainer  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and backends.why_not("grouped_mlp", "triton") is not None,
        reason="the plain-torch experts read the sizes of their groups on the host",
    ),
]

WARM, STEPS = 3, 8
"""Steps before a step is watched or captured, which compile kernels and allocate moments; steps of a run."""


@contextlib.contextmanager
def waits_are_errors():
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("parallel", [{}, {"micro_batch": 4}, {"checkpointing": True}], ids=str)
def test_no_step_waits(precision, parallel):
    t = trainer("cuda", "triton", precision, **parallel)
    for _ in range(WARM):
        t.train_step()
    with waits_are_errors():
        for _ in range(WARM, STEPS):
            t.train_step()
    assert t.flush() == [] and t.row()["skipped"] == 0


def test_a_wait_is_found(monkeypatch):
    t = trainer("cuda", "triton")
    t.train_step()
    real = type(t)._compute

    def reading(self, *arguments):
        out = real(self, *arguments)
        out[0].losses[0].item()
        return out

    monkeypatch.setattr(type(t), "_compute", reading)
    with waits_are_errors(), pytest.raises(RuntimeError, match="synchroniz"):
        t.train_step()
    plain = trainer("cuda", "reference")
    plain.train_step()
    with waits_are_errors(), pytest.raises(RuntimeError, match="synchroniz"):
        plain.train_step()


def captured(t, moving: bool = True):
    """`_compute` of a trainer as a CUDA graph: the first call captures it, each copies its arguments in and replays.

    Not ``moving``: the schedule stays what it was at the first call, as if the graph had frozen it.
    """
    eager, held = t._compute, {}

    def compute(images, modality, mask_noise, router_noise):
        given = [images, modality, mask_noise, *router_noise]
        if not held:
            mine = [tensor.clone() for tensor in given]
            held["schedule"] = [value.clone() for value in t._schedule]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                held["out"] = eager(mine[0], mine[1], mine[2], mine[3:])
            held["graph"], held["mine"] = graph, mine
        for tensor, new in zip(held["mine"], given, strict=True):
            tensor.copy_(new)
        if not moving:
            for value, first in zip(t._schedule, held["schedule"], strict=True):
                value.copy_(first)
        held["graph"].replay()
        return held["out"]

    return compute


def run(wrap, precision: str):
    """Weights, buffers and moments after `STEPS` steps, of which all but the first ones go through ``wrap``."""
    t = trainer("cuda", "triton", precision)
    choices = []
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for step in range(STEPS):
            if step == WARM:
                torch.cuda.synchronize()
                t._compute = wrap(t)
            t.train_step()
            choices.append(t._slots.clone())
    assert t.flush() == [] and t.nonfinite_in_a_row == 0
    return {name: tensor.double() for name, tensor in t.tensors().items()}, torch.stack(choices).diff(dim=0)


def distance(got, want) -> float:
    """Largest relative error of a tensor."""
    assert got.keys() == want.keys()
    return max(float((got[k] - want[k]).norm() / want[k].norm().clamp(min=1e-6)) for k in want)


@pytest.mark.parametrize("precision, near", [("fp32", 1e-4), ("bf16", 2e-2)])
def test_a_captured_step_replays_with_other_images_and_schedules(precision, near):
    """Eager and replayed runs agree, although later steps route elsewhere; a graph that froze its schedule does not."""
    eager, choices = run(lambda t: t._compute, precision)
    assert len(choices[WARM:].unique(dim=0)) > 1, "the steps were to route differently"
    replayed, again = run(captured, precision)
    assert torch.equal(choices, again) and distance(replayed, eager) < near
    frozen, _ = run(lambda t: captured(t, moving=False), precision)
    assert distance(frozen, eager) > 3 * near
