import pytest
import torch

from dex.data import open_dataset
from dex.sizing.estimate import estimate
from dex.train import forecast as module
from dex.train.forecast import Forecast, forecast
from dex.train.plan import resolve
from dex.train.trainer import Trainer


@pytest.fixture
def plan(tiny, images):
    return resolve(tiny, open_dataset(images))


@pytest.fixture
def timed(monkeypatch):
    """``timed(seconds, computed)``: what the clocks say about the steps that are tried. Returns how many there were."""
    real = Trainer.train_step

    def install(seconds, computed):
        clocks, steps = [0.0, 0.0], []

        def train_step(self):
            clocks[0] += seconds[len(steps)]
            clocks[1] += computed[len(steps)]
            steps.append(self.step)
            return real(self)

        monkeypatch.setattr(Trainer, "train_step", train_step)
        monkeypatch.setattr(module.time, "perf_counter", lambda: clocks[0])
        monkeypatch.setattr(module.time, "process_time", lambda: clocks[1])
        return steps

    return install


def test_the_first_step_is_tried_and_not_counted(plan, timed):
    steps = timed([90, 3, 2, 5], [90, 3, 2, 5])
    result = forecast(plan)
    assert steps == [0, 1, 2, 3] and result.seconds == 3 * plan.steps
    assert result.sentence(plan.steps) == (
        "about 36s for 12 steps, an estimate from 3 tried here, 3 s each; evaluations and checkpoints come on top"
    )


def test_a_shared_processor_is_named(plan, timed):
    timed([4, 4, 4, 4], [1, 1, 1, 1])
    assert forecast(plan).basis.endswith(". Other programs used the processor meanwhile")


def test_a_run_of_one_step_tries_one(tiny, change, images, timed):
    one = resolve(change(tiny, schedule__steps=1), open_dataset(images))
    steps = timed([7], [7])
    assert forecast(one).seconds == 7 and steps == [0]


def test_a_large_step_is_not_tried_on_a_cpu(plan, monkeypatch, timed):
    monkeypatch.setattr(module, "MOST_OPERATIONS", 1)
    steps = timed([], [])
    result = forecast(plan)
    assert result.seconds is None and steps == []
    assert result.sentence(plan.steps).startswith("not known: a step has ") and "no figures for CPUs" in result.basis


def test_a_model_that_would_fill_the_memory_is_not_tried(plan, monkeypatch, timed):
    assert module._available() > 1e6
    monkeypatch.setattr(module, "_available", lambda: 1e6)
    steps = timed([], [])
    assert "is tried only with twice that; 1 MB are available" in forecast(plan).basis and steps == []


@pytest.mark.parametrize(
    ("name", "precision", "part"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", "40% of the peak of NVIDIA H100 80GB HBM3, assumed, not measured"),
        ("Some GPU", "bf16", "there are no figures for Some GPU"),
        ("NVIDIA H100 80GB HBM3", "fp32", "are for bf16, and the run computes in fp32"),
    ],
)
def test_a_gpu_is_estimated_from_figures_or_not_at_all(name, precision, part, plan, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    result = forecast(plan._replace(device=torch.device("cuda"), precision=precision))
    assert part in result.basis
    if "assumed" in part:
        work = estimate(plan.config, plan.steps).flops_per_image * plan.config.data.batch_size
        assert result.seconds == pytest.approx(plan.steps * work / (0.4 * 989e12))
        assert f"{part}" in result.sentence(12)
    else:
        assert result == Forecast(None, result.basis)
