import dataclasses

import pytest
import torch

from dex.analysis.examine import PARTS, Material, examine, material_of, paired, pixel_probe
from dex.analysis.sample import Groups, Sample
from dex.data import open_dataset
from dex.model.build import build_model


@pytest.fixture
def material(tiny):
    """Three modalities of different brightness, four sources each."""
    size, generator = tiny.model.img_size, torch.Generator().manual_seed(0)
    modality = torch.arange(3).repeat(8)
    sources = torch.arange(24) % 3 * 4 + torch.arange(24) // 6
    images = torch.randint(80, (24, 3, size, size), generator=generator, dtype=torch.uint8)
    images = images + (80 * modality)[:, None, None, None].to(torch.uint8)
    sample = Sample(images, modality, [f"{s}/{i}" for i, s in enumerate(sources.tolist())])
    return Material(sample, Groups(sources, "sources"), sample, Groups(sources, "sources"), ("a", "b", "c"))


def test_every_part_of_a_model_is_measured_and_nothing_is_changed(tiny, material):
    torch.manual_seed(0)
    model = build_model(tiny)
    before, said = {n: t.clone() for n, t in model.state_dict().items()}, []
    found = examine(model, 7, tiny, material, batch_size=5, report=said.append)
    assert model.training and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert tuple(said) == PARTS and None not in found
    depth, experts = tiny.model.depth, model.encoder.dex_layers[0].num_experts
    assert len(found.layers) == len(found.ablations) == len(found.similarity) == len(found.distance) == depth
    assert found.layers[0].mass.shape == (3, experts) and found.layers[0].mass.sum() == pytest.approx(24)
    assert found.layers[0].chance.sum(0).tolist() == pytest.approx(found.layers[0].mass.sum(0).tolist())
    assert not torch.allclose(found.layers[0].chance, found.layers[0].mass)
    assert found.image_loss.mean() == pytest.approx(found.loss.value)
    assert len(found.gaps) == 3 * (depth + 1)
    assert found.step == 7 and found.loss.low <= found.loss.value <= found.loss.high
    assert sum(found.modality_loss.values()) / 3 == pytest.approx(found.loss.value, rel=1e-6)
    again = examine(model, 7, tiny, material, batch_size=24)
    assert again.loss.value == pytest.approx(found.loss.value, rel=1e-5)
    assert [g.gap.value for g in again.gaps] == pytest.approx([g.gap.value for g in found.gaps], rel=1e-3, abs=1e-6)
    assert pixel_probe(material).value == 1.0  # brightness tells the modality


def test_parts_are_left_out_and_a_monolithic_model_has_no_experts(tiny, material, change):
    torch.manual_seed(0)
    model = build_model(change(tiny, model__num_experts=0))
    found = examine(model, 0, tiny, material, ("swap", "routing", "ablation", "similarity", "features"))
    assert (found.gaps, found.ablations, found.similarity, found.conflict) == (None, None, None, None)
    assert found.layers == [] and found.probe is not None and found.cls.rankme > 1
    only = examine(model, 0, tiny, material, ("heldout",))
    assert only.layers is None and only.loss == found.loss
    with pytest.raises(ValueError, match="parts: expected some of heldout, .*, got heatmap"):
        examine(model, 0, tiny, material, ("heatmap",))
    none = Sample(torch.zeros(0, 3, 1, 1, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), [])
    with pytest.raises(ValueError, match="data: expected held-out images, got none"):
        examine(model, 0, tiny, material._replace(held_out=none))


def test_experts_that_are_copies_are_interchangeable(tiny, material):
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(tiny))
    for layer in model.encoder.dex_layers:
        layer.copy_director_to_experts_()
    found = examine(model, 0, tiny, material, ("swap", "ablation"))
    assert max(abs(g.gap.value) for g in found.gaps) < 1e-5
    assert max(float(a.rise.abs().max()) for a in found.ablations) < 1e-5


def test_two_models_are_compared_image_by_image(tiny, material):
    torch.manual_seed(0)
    found = examine(build_model(tiny), 0, tiny, material, ("heldout",))
    worse = found._replace(image_loss=found.image_loss + 0.25)
    assert paired(worse, found, material.groups) == pytest.approx((0.25, 0.25, 0.25))
    assert paired(found, worse, material.groups).value == pytest.approx(-0.25)


def test_the_material_is_of_the_held_out_split_and_of_all(tmp_path, images):
    dataset = open_dataset(images)
    material = material_of(dataset, held_out=100, probed=30)
    held_out = dataset.split("val")
    assert sorted(material.held_out.ids) == sorted(held_out.sample_id(i) for i in range(len(held_out)))
    assert (
        len(material.probed.ids) == 30
        and material.groups.kind == "images"
        and material.modalities == ("ct", "mr", "us")
    )
    (tmp_path / "lonely" / "ct").mkdir(parents=True)
    (tmp_path / "lonely" / "ct" / "a.png").write_bytes(next((images / "ct").iterdir()).read_bytes())
    with pytest.raises(
        ValueError, match="data: expected held-out images; the split 'val' of lonely has none that are readable"
    ):
        material_of(open_dataset(tmp_path / "lonely"))
