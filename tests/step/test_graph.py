"""`parallel.cuda_graph` without a GPU: a run that replays its steps is the eager one, bit for bit; `fake_graph.py`."""

import contextlib
import dataclasses
import json
from unittest import mock

import pytest
import torch

pytest.importorskip("yaml", reason="a training step is configured in YAML")

from dex.config import from_dict  # noqa: E402
from dex.data import Batch  # noqa: E402
from dex.train import checkpoint, cuda_graph  # noqa: E402
from dex.train import trainer as engine  # noqa: E402
from dex.train.run import pretrain  # noqa: E402
from dex.train.runlog import read_rows  # noqa: E402
from dex.train.trainer import Trainer  # noqa: E402

from . import small  # noqa: E402
from .fake_graph import Refused, graphs_on_the_cpu  # noqa: E402

pytestmark = pytest.mark.slow

WARM, STEPS = cuda_graph.WARM_STEPS, 9
TIMES = ("images_per_s", "data_wait_s", "memory_mb", "memory_now_mb", "evaluation_s")


@pytest.fixture(autouse=True)
def graphs():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with graphs_on_the_cpu() as made:
        yield made
    torch.set_num_threads(threads)


FUSED = {"optim": {"fused": True}}


def trainer(graph: bool, **options) -> Trainer:
    return small.trainer("cpu", "reference", cuda_graph=graph, **options)


def steps(t: Trainer, count: int) -> None:
    """Their verdicts are left where they are, to be read much later, as a GPU's may."""
    with mock.patch.object(t, "_read_verdicts", lambda keep: []):
        for _ in range(count):
            t.train_step()


def bits(t: Trainer) -> dict[str, bytes]:
    """Weights, buffers, moments, counters and what is told of the steps."""
    held = {name: tensor.detach().numpy().tobytes() for name, tensor in t.tensors().items()}
    return held | {"verdicts": repr(t.flush()).encode(), "state": json.dumps({**t.state(), "config": 0}).encode()}


def differ(a: Trainer, b: Trainer) -> list[str]:
    first, second = bits(a), bits(b)
    assert first.keys() == second.keys()
    return [name for name in first if first[name] != second[name]]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "bf16"},
        {"micro_batch": 4},
        {"micro_batch": 4, "precision": "bf16"},
        {"checkpointing": True},
        {"num_experts": 0, "checkpointing": True},
        {"optim": {"fused": True}},
        {"optim": {"fused": True, "layer_decay": 0.5}, "precision": "bf16"},
    ],
    ids=str,
)
def test_a_replayed_run_is_the_eager_one(graphs, options):
    """Bit for bit, while images, routes and schedules change; rows are read and held-out images seen in between."""
    eager, replayed = trainer(False, **options), trainer(True, **options)
    routes, rows, seen = [], [], []
    for step in range(STEPS):
        for t in (eager, replayed):
            steps(t, 1)
            routes.append(t.window.slots.tolist())
            if step in (1, WARM, WARM + 2):
                rows.append(t.row())
            if step in (WARM - 1, WARM + 1):
                found = t.evaluate()
                seen.append((found.loss, found.probe, found.director_distance))
        assert differ(eager, replayed) == []
    assert rows[::2] == rows[1::2] and seen[::2] == seen[1::2] and routes[::2] == routes[1::2]
    assert eager.row() == replayed.row()
    (graph,) = graphs
    assert graph.replays == STEPS - WARM and len(graph.launches) > 200
    if "num_experts" not in options:
        given = torch.tensor(routes[::2][WARM:]).diff(dim=0)
        assert len(given.unique(dim=0)) == len(given), "the steps were to route differently"


@pytest.mark.parametrize("options", [{}, FUSED], ids=["plain", "fused"])
def test_a_replayed_step_without_a_finite_loss_changes_nothing(monkeypatch, options):
    eager, replayed = trainer(False, **options), trainer(True, **options)
    real = engine.augment

    def poisoned(images, size, keys):
        out = real(images, size, keys)
        out[[3, 6], 1, 5, 7] = float("nan")
        return out

    for t in (eager, replayed):
        steps(t, WARM + 2)
        before = bits(t)
        with monkeypatch.context() as patch:
            patch.setattr(engine, "augment", poisoned)
            steps(t, 1)
        bad = t.flush()
        assert [(b.step, len(b.samples)) for b in bad] == [(WARM + 2, 2)]
        after = bits(t)
        assert [name for name in before if before[name] != after[name]] == ["state"]
        t.stop_requested = True
        steps(t, 2)
        assert t.flush() == [] and t.stopping
    assert differ(eager, replayed) == [] and replayed.row()["skipped"] == 1


@pytest.mark.parametrize("graph", [True, False], ids=["replayed again", "eager from then on"])
@pytest.mark.parametrize("at, options", [(2, {}), (WARM + 2, {}), (WARM + 2, FUSED)], ids=str)
def test_a_resumed_run_is_the_unbroken_one(graphs, tmp_path, at, options, graph):
    unbroken, first = trainer(True, **options), trainer(True, **options)
    steps(unbroken, STEPS)
    steps(first, at)
    first.flush()
    saver = checkpoint.Saver(tmp_path, 1)
    saver.save(at, first.tensors(), first.state())
    saver.wait()
    saved = checkpoint.load(tmp_path / f"step-{at:08d}")
    second = trainer(graph, **options)
    second.restore(saved)
    steps(second, STEPS - at)
    assert differ(unbroken, second) == []
    if graph:  # one that has captured already is taken back
        steps(first, WARM)
        first.flush()
        first.restore(saved)
        steps(first, STEPS - at)
        assert differ(unbroken, first) == []


def test_a_run_with_evaluations_and_saves_goes_on_where_it_was_stopped(graphs, images, tmp_path):
    base = small.configuration("cpu", "reference")
    base = dataclasses.replace(base, data=dataclasses.replace(base.data, path=str(images)))
    run = {"log_every": 2, "evaluate_every": 3, "evaluate_images": 6, "checkpoint_every": 4}
    told = []
    for graph, stops in ((False, [None]), (True, [None]), (True, [7, None])):
        out = tmp_path / f"run-{len(told)}"
        for stop in stops:
            changes = {"run": run | {"stop_at": stop}, "parallel": {"cuda_graph": graph}}
            assert pretrain(from_dict(changes, base), out, resume="auto") == 0
        rows = [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(out / "metrics.jsonl")]
        rows = [row for row in rows if not (row["step"] == 7 and "val_loss" in row)]  # evaluated at its stop
        state = checkpoint.load(out / "checkpoints/step-00000012").state
        weights = checkpoint.tensors(out / "checkpoints/step-00000012")
        weights = {name: tensor.numpy().tobytes() for name, tensor in weights.items()}
        told.append((rows, state | {"config": None}, weights))
    assert told[0] == told[1] == told[2]
    assert [graph.replays for graph in graphs] == [12 - WARM, 7 - WARM, 5 - WARM]


def test_a_batch_of_another_size_is_computed_without_the_graph(graphs, monkeypatch):
    eager, replayed = trainer(False), trainer(True)
    real = Trainer._next_batch

    def half(self):
        batch, error = real(self)
        return Batch(batch.images[:4], batch.modality[:4], batch.ids[:4], batch.places[:4]), error

    for t in (eager, replayed):
        steps(t, WARM + 1)
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_next_batch", half)
            steps(t, 2)
        steps(t, 2)
    assert differ(eager, replayed) == [] and graphs[0].replays == 3


def test_inputs_stay_the_callers_and_results_are_those_of_the_call(graphs):
    total = torch.zeros(3)
    graph = cuda_graph.StepGraph(torch.device("cpu"), [total])
    given = [torch.full((3,), float(i)) for i in range(1, 7)]
    for i, x in enumerate(given, 1):
        assert graph(lambda x: total.add_(x) / 2, x).tolist() == [i * (i + 1) / 4] * 3
    assert [x[0].item() for x in given] == [1, 2, 3, 4, 5, 6] and graphs[0].replays == 6 - WARM


def test_autograd_is_told_that_a_replay_changed_the_weights():
    t = trainer(True)
    steps(t, WARM + 1)
    out = t.model(torch.zeros(2, 3, 64, 64))
    steps(t, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation|was changed between"):
        (out.loss + out.align_loss).backward()


def test_a_closed_trainer_lets_go_of_its_graph():
    t = trainer(True)
    steps(t, WARM + 1)
    t.close()
    assert t._graph is None


# What was put into the replayed run -> what must then differ from the eager one.


def as_number(name):
    """The schedule's value ``name`` as a number, which a graph keeps."""
    real = Trainer._compute

    def compute(self, *inputs):
        tensors, value = self._schedule, getattr(engine.schedule_at(self.config, self.step, self.steps), name)
        self._schedule = tensors._replace(**{name: value})
        group = self.optimizer.param_groups[0]
        group["lr"] = self._schedule.lr
        try:
            return real(self, *inputs)
        finally:
            self._schedule, group["lr"] = tensors, tensors.lr

    return mock.patch.object(Trainer, "_compute", compute)


def elsewhere(self):
    """`Trainer.row` that begins a new window in other memory."""
    row = real_row(self)
    self.window._sums = self.window._sums.clone()
    return row


real_row = Trainer.row
SABOTAGE = {
    **{name: (lambda name=name: as_number(name)) for name in ("lr", "noise_std", "momentum", "balance_weight")},
    "window": lambda: mock.patch.object(Trainer, "row", elsewhere),
}


@pytest.mark.parametrize("case, options", [*((case, {}) for case in SABOTAGE), ("lr", FUSED), ("momentum", FUSED)])
def test_what_a_graph_would_freeze_is_found(case, options):
    eager, replayed = trainer(False, **options), trainer(True, **options)
    for t, change in ((eager, contextlib.nullcontext), (replayed, SABOTAGE[case])):
        with change():
            steps(t, WARM + 1)
            t.row()
            steps(t, 2)
    assert differ(eager, replayed) != []


REFUSED = {
    "a value is read": ("a value is read on the host", lambda out, self: out[0].losses.loss.item()),
    "a size depends on values": ("a value is read on the host", lambda out, self: out[1].nonzero()),
    "a number is drawn": ("a random number generator is asked", lambda out, self: torch.rand(2)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_captured_ends_the_run_by_name(case):
    words, extra = REFUSED[case]
    t, real = trainer(True), Trainer._compute

    def compute(self, *inputs):
        out = real(self, *inputs)
        extra(out, self)
        return out

    with mock.patch.object(Trainer, "_compute", compute):
        steps(t, WARM)
        before = bits(t)
        with pytest.raises(Refused, match=words) as caught:
            steps(t, 1)
    assert "without parallel.cuda_graph" in caught.value.__notes__[0]
    after = bits(t)
    assert [name for name in before if before[name] != after[name]] == []
