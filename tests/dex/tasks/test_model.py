"""An encoder with a task's head: what trains in each mode, on each path."""

from dataclasses import replace

import pytest
import torch

from dex.model import VisionTransformer
from dex.tasks.model import TaskModel, TaskOutput, outputs_of
from dex.tasks.task import Task

SEGMENTATION = Task("s", kind="segmentation", classes=("a", "b"))
CLASSIFICATION = Task("c", kind="classification", classes=("a", "b", "c"), metric="auc")


def model_of(task, settings, experts=4):
    torch.manual_seed(0)
    return TaskModel(VisionTransformer(32, 8, 32, 2, 2, experts, 2), task, settings)


def trained(model):
    """The parts of the encoder and of the head that take a gradient in a step."""
    images = torch.randn(2, 3, 32, 32)
    model(images).square().mean().backward()
    grown = {name for name, p in model.named_parameters() if p.grad is not None}
    assert grown == {name for name, p in model.named_parameters() if p.requires_grad}
    return {name.partition(".")[0] for name in grown}, grown


@pytest.mark.parametrize("task", [SEGMENTATION, CLASSIFICATION], ids=["segmentation", "classification"])
@pytest.mark.parametrize("path", ["experts", "director"])
@pytest.mark.parametrize("mode", ["full", "frozen", "linear", "lora"])
def test_a_mode_trains_what_it_says(mode, path, task, quick):
    model = model_of(task, replace(quick, mode=mode, path=path))
    parts, names = trained(model)
    assert parts == ({"encoder", "head"} if mode in ("full", "lora") else {"head"})
    routed = {name for name in names if ".experts." in name or "router" in name}
    directed = {name for name in names if ".director." in name}
    if mode in ("full", "lora"):
        assert bool(routed) == (path == "experts") and bool(directed) == (path == "director")
    if mode == "lora":
        assert all(name.endswith((".down", ".up")) for name in names if name.startswith("encoder."))
    shape = (2, 3, 32, 32) if task is SEGMENTATION else (2, 3)
    assert model(torch.randn(2, 3, 32, 32)).shape == shape


def test_a_linear_head_is_a_linear_map(quick):
    for task in (SEGMENTATION, CLASSIFICATION):
        head = model_of(task, replace(quick, mode="linear")).head
        assert {name for name, _ in head.named_parameters()} == {"linear.weight", "linear.bias"}


def test_a_monolithic_run_has_no_director(quick):
    with pytest.raises(ValueError, match="path: expected experts for a monolithic model"):
        model_of(SEGMENTATION, replace(quick, path="director"), experts=0)
    assert trained(model_of(SEGMENTATION, replace(quick, mode="lora"), experts=0))[0] == {"encoder", "head"}


def test_aux_is_of_every_layer(quick):
    model = model_of(CLASSIFICATION, quick)
    out = model(torch.randn(2, 3, 32, 32), return_aux=True)
    assert isinstance(out, TaskOutput) and len(out.aux) == 2


def test_merging_leaves_plain_weights_and_the_same_function(quick):
    model = model_of(SEGMENTATION, replace(quick, mode="lora"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".up"):
                p.normal_(std=0.1)
    images = torch.randn(2, 3, 32, 32)
    model.eval()
    before = model(images)
    model.merge_()
    torch.testing.assert_close(model(images), before, atol=1e-4, rtol=1e-4)
    plain = model_of(SEGMENTATION, quick)
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_outputs_hold_the_background_of_a_segmentation():
    assert (outputs_of(SEGMENTATION), outputs_of(CLASSIFICATION)) == (3, 3)


@pytest.mark.parametrize("task", [SEGMENTATION, CLASSIFICATION], ids=["segmentation", "classification"])
def test_a_run_on_one_channel_has_a_decoder_of_one(quick, task):
    model = TaskModel(VisionTransformer(32, 8, 32, 2, 2, 4, 2, in_chans=1), task, quick)
    assert model(torch.randn(2, 1, 32, 32)).shape[:2] == (2, 3)


def test_a_run_on_rectangles_needs_a_size(quick):
    with pytest.raises(ValueError, match="img_size: expected a square image size, .* the run's images are 32 x 64"):
        TaskModel(VisionTransformer((32, 64), 8, 32, 2, 2, 4, 2), SEGMENTATION, quick)
