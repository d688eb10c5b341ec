"""What tells during training whether experts specialise."""

import json
from dataclasses import replace

import pytest
import torch
from planted import DEPTH, E, Planted, inputs

from dex.analysis.instruments import FEWEST, TENTH, Instruments, Probed, Seen, Whole, columns, is_due, measure, sizes
from dex.analysis.routes import masked_forward
from dex.analysis.sample import Groups
from dex.config import preset
from dex.sizing.estimate import training_flops


def instruments(model, images_each=12, permuted=None):
    """Of a planted model, whose whole images are routed as its masked ones."""
    images, modality, noise = inputs(images_each)
    if permuted is not None:
        modality = modality[torch.randperm(len(modality), generator=torch.Generator().manual_seed(permuted))]
    masked = masked_forward(model, images, noise)
    whole = Whole(masked.cls, images, masked.routes.probabilities)
    groups = torch.arange(len(images))
    return measure(
        Seen(masked, whole, modality, Groups(groups, "images")),
        Probed(whole.features, modality, groups),
        None,
        len(images),
        lambda overrides: masked_forward(model, images, noise, overrides=overrides).loss,
        chosen=[1] * DEPTH,
    )


def test_planted_specialisation_is_found():
    found = instruments(Planted())
    gap = {g.kind: g.gap for g in found.gaps}
    assert gap["other modality"].value == pytest.approx(8.0) and gap["same modality"] == (0, 0, 0)
    assert found.modality_gap.gap.value == pytest.approx(8.0)
    for layer in found.layers:
        assert layer.masked.value == layer.whole.value == pytest.approx(1.0)
        assert layer.sets_masked == layer.sets_whole == E and layer.first_agreement == 1.0 and layer.entropy < 0.01
    assert found.probe.value == 1.0


def test_random_routing_has_no_gap_and_no_information():
    found = instruments(Planted(router="noise"), images_each=40)
    for gap in found.gaps:
        assert gap.gap.low < 0 < gap.gap.high, gap.kind
    for layer in found.layers:
        assert layer.masked.value < layer.masked.null_high and layer.masked.p > 0.05


def test_permuted_modalities_are_no_information():
    """On average over permutations; each lies above the 95 % of the null once in 20 times."""
    found = [instruments(Planted(), permuted=seed).layers[0].masked for seed in range(20)]
    assert abs(sum(layer.value for layer in found) / 20) < 0.02
    assert sum(layer.value > layer.null_high for layer in found) <= 4


def test_equal_experts_have_no_gap():
    assert all(gap.gap == (0, 0, 0) for gap in instruments(Planted(alike=True)).gaps)


def test_a_row_has_numbers_alone_and_survives_json():
    found = instruments(Planted())
    row = json.loads(json.dumps(columns(found)))
    assert row["swap_gap"] == pytest.approx({"same modality": 0, "other modality": 8, "other less same modality": 8})
    assert row["swap_gap_low"].keys() == row["swap_gap_high"].keys() == row["swap_gap"].keys()
    assert row["expert_sets"] == [E] * DEPTH and row["information"] == pytest.approx([1.0] * DEPTH)
    assert row["rankme"].keys() == {"CLS token", "mean of patches"} and row["probe_linear"] == 1.0
    assert row["swap_gap_images"] == found.swapped > 0 and row["probe_images"] == found.probed > 0
    assert columns(Instruments([], None, [], None, None, None, None)) == {}


@pytest.mark.parametrize("name", ["demo", "published-code", "demo-monolithic"])
def test_what_an_evaluation_looks_at_stays_within_its_share(name):
    config = preset(name)
    for steps, batch in ((1000, 16), (5000, 16), (20000, 896)):
        at = replace(config, data=replace(config.data, batch_size=batch))
        found = sizes(at, steps, images=256)
        assert FEWEST <= found.swapped <= 256 and FEWEST <= found.known <= 1024
    assert sizes(at, 20000, images=256) == (256, 1024)  # where there is time all that is of use
    fewer = sizes(replace(config, run=replace(config.run, evaluate_every=1)), 1000, images=256)
    assert fewer == (FEWEST, FEWEST)


def test_the_demo_swaps_enough_images():
    config = preset("demo")
    found = sizes(config, config.schedule.steps, images=64)
    assert found.swapped >= 32 and found.known >= 32
    assert sum(training_flops(config).values()) > 0


def test_evaluations_are_due_in_the_first_tenth_too():
    config = preset("demo")

    def due(every, steps):
        c = replace(config, run=replace(config.run, evaluate_every=every))
        return [step for step in range(steps + 1) if is_due(c, step, steps)]

    assert due(500, 1000) == [0, 100, 500, 1000] and due(400, 1001) == [0, 101, 400, 800, 1001]
    assert due(0, 1000) == [] and due(50, 60) == [0, 50, 60]
    assert due(TENTH, 10 * TENTH) == list(range(0, 1001, 100))
