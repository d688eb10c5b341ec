"""On a GPU: a step never waits for it, and `parallel.cuda_graph` takes the same steps; test_graph.py needs no GPU."""

import contextlib
import tempfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("yaml", reason="a training step is configured in YAML")

from dex.train import checkpoint, cuda_graph  # noqa: E402
from dex.train.trainer import Trainer  # noqa: E402
from dexkernels.ops import backends  # noqa: E402

from .small import trainer  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and backends.why_not("grouped_mlp", "triton") is not None,
        reason="the plain-torch experts read the sizes of their groups on the host",
    ),
]

WARM, STEPS = cuda_graph.WARM_STEPS, 9
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
        out[0].losses.loss.item()
        return out

    monkeypatch.setattr(type(t), "_compute", reading)
    with waits_are_errors(), pytest.raises(RuntimeError, match="synchroniz"):
        t.train_step()
    plain = trainer("cuda", "reference")
    plain.train_step()
    with waits_are_errors(), pytest.raises(RuntimeError, match="synchroniz"):
        plain.train_step()


def run(precision: str = "fp32", stop: int | None = None, evaluate: bool = False, **parallel):
    """A trainer after `STEPS` steps, and the slots that its experts were given in each.

    stop: a checkpoint's place; the steps after it are another trainer's. evaluate: look at held-out images and read a
    row of metrics in between.
    """
    torch._dynamo.reset()
    t, slots = trainer("cuda", "triton", precision, **parallel), []
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for step in range(STEPS):
            if step == stop:
                t = resumed(t, precision, **parallel)
            before = t.window.slots.clone()
            t.train_step()
            slots.append(t.window.slots - before)
            if evaluate and step in (WARM, STEPS - 2):
                t.evaluate()
                t.row()
    assert t.flush() == [] and t.nonfinite_in_a_row == 0
    return t, torch.stack(slots)


def resumed(t, precision, **parallel):
    t.flush()
    with tempfile.TemporaryDirectory() as folder:
        saver = checkpoint.Saver(Path(folder), 1)
        saver.save(t.step, t.tensors(), t.state())
        saver.wait()
        again = trainer("cuda", "triton", precision, **parallel)
        again.restore(checkpoint.load(Path(folder) / f"step-{t.step:08d}"))
    t.close()
    return again


def distance(got, want) -> float:
    """Largest relative error of a tensor among weights, buffers and moments."""
    got, want = ({name: tensor.double() for name, tensor in t.tensors().items()} for t in (got, want))
    assert got.keys() == want.keys()
    return max(float((got[k] - want[k]).norm() / want[k].norm().clamp(min=1e-6)) for k in want)


NEAR = {"fp32": 1e-4, "bf16": 2e-2}


@pytest.mark.parametrize(
    "precision, parallel",
    [
        ("fp32", {}),
        ("bf16", {}),
        ("fp32", {"micro_batch": 4}),
        ("fp32", {"checkpointing": True}),
        ("bf16", {"compile": True}),
        ("bf16", {"compile": True, "checkpointing": True}),
    ],
    ids=str,
)
def test_a_replayed_run_is_the_eager_one(precision, parallel):
    """Later steps route elsewhere, with other schedules; held-out images are seen and rows read in between."""
    eager, slots = run(precision, evaluate=True, **parallel)
    assert len(slots[WARM:].unique(dim=0)) > 1, "the steps were to route differently"
    replayed, again = run(precision, evaluate=True, cuda_graph=True, **parallel)
    assert replayed._graph._graph is not None
    assert torch.equal(slots, again) and distance(replayed, eager) < NEAR[precision]
    one, other = eager.row(), replayed.row()
    assert other["skipped"] == 0 and other["loss"] == pytest.approx(one["loss"], rel=NEAR[precision])


@pytest.mark.parametrize("stop", [2, WARM + 2])
def test_a_resumed_replayed_run_is_the_unbroken_one(stop):
    unbroken, slots = run(cuda_graph=True)
    again, others = run(cuda_graph=True, stop=stop)
    assert torch.equal(slots, others) and distance(again, unbroken) < NEAR["fp32"]


@pytest.mark.parametrize("precision", NEAR)
def test_a_graph_that_froze_its_schedule_is_found(precision, monkeypatch):
    eager, _ = run(precision)
    real = Trainer._compute

    def compute(self, *inputs):
        moving, group = self._schedule, self.optimizer.param_groups[0]
        if not torch.cuda.is_current_stream_capturing():
            self.still = type(moving)(*(value.clone() for value in moving))
        self._schedule, group["lr"] = self.still, self.still.lr
        try:
            return real(self, *inputs)
        finally:
            self._schedule, group["lr"] = moving, moving.lr

    monkeypatch.setattr(Trainer, "_compute", compute)
    frozen, _ = run(precision, cuda_graph=True)
    assert distance(frozen, eager) > 3 * NEAR[precision]


def test_no_replay_waits():
    t = trainer("cuda", "triton", cuda_graph=True)
    for _ in range(WARM + 1):
        t.train_step()
    with waits_are_errors():
        for _ in range(WARM + 1, STEPS):
            t.train_step()
    assert t.flush() == [] and t.row()["skipped"] == 0


def test_experts_that_read_on_the_host_are_refused():
    with pytest.raises(ValueError, match="parallel.cuda_graph: expected experts that never wait for the host"):
        trainer("cuda", "reference", cuda_graph=True)
