import pytest
import torch

from dex.analysis import evaluation, maps
from dex.analysis.evaluation import Evaluator
from dex.analysis.information import distinct_sets, first_agreement, probability_entropy
from dex.analysis.instruments import FEWEST
from dex.analysis.probe import knn_accuracy
from dex.analysis.routes import masked_forward
from dex.analysis.spectra import spectrum
from dex.analysis.swap import gaps, swap
from dex.analysis.usage import gate_entropy
from dex.common.random import step_seed
from dex.data import center, open_dataset
from dex.model.build import build_model
from dexkernels import shadows


@pytest.fixture
def evaluator(tiny, images, change):
    def build(**fields):
        torch.manual_seed(0)
        config, dataset = change(tiny, **fields), open_dataset(images)
        train, held_out = dataset.split("train"), dataset.split("val")
        return Evaluator(
            config, build_model(config), train, held_out, torch.device("cpu"), "fp32", dataset=dataset, steps=12
        )

    return build


def test_an_evaluation_is_always_the_same_and_draws_nothing_of_training(evaluator):
    e = evaluator()
    before = {name: t.clone() for name, t in e.model.state_dict().items()}
    first, second = e.evaluate(), e.evaluate()
    assert e.model.training
    assert all(torch.equal(t, before[name]) for name, t in e.model.state_dict().items())
    for name, value in first._asdict().items():
        again = getattr(second, name)
        assert torch.equal(value, again) if isinstance(value, torch.Tensor) else name == "mass" or value == again, name
    assert all(map(torch.equal, first.mass, second.mass))


def test_the_loss_is_the_mean_over_images_and_modalities_share_it(evaluator):
    e = evaluator(data__batch_size=4)
    losses = []
    e.model.register_forward_hook(lambda model, arguments, out: losses.append(out.image_loss))
    result = e.evaluate()
    whole = torch.cat(losses[:2])  # 6 images in batches of 4, before those that are given others' experts
    assert result.loss == pytest.approx(whole.mean().item(), rel=1e-6)
    count = {name: result.labels.count(name) for name in result.modality_loss}
    assert sum(count.values()) == 6
    assert sum(n * result.modality_loss[name] for name, n in count.items()) / 6 == pytest.approx(result.loss, rel=1e-6)


def test_held_out_images_take_turns_between_modalities(evaluator):
    e = evaluator()
    seen = []
    for layer in e.model.encoder.dex_layers:
        layer.register_forward_hook(lambda layer, arguments, out: seen.append(out[1].gates if len(out) == 2 else None))
    result = e.evaluate()
    # 6 images are one batch, whose loss comes first
    assert result.gate_entropy == [pytest.approx(float(gate_entropy(gates))) for gates in seen[:2]]
    assert all(0 < entropy < 1 for entropy in result.gate_entropy)
    present = [name for name, n in e.held_out.modality_counts().items() if n]
    assert set(result.labels[: len(present)]) == set(present)
    assert len(result.labels) <= 6 and result.original.shape == (len(result.labels), 3, 64, 64)
    for picture in (result.original, result.masked, result.reconstruction):
        assert picture.min() >= 0 and picture.max() <= 1
    same = result.masked == result.original
    assert (~same).flatten(2).any(-1).any()
    assert torch.equal(result.reconstruction[same], result.original[same])  # visible patches are the image's own
    for layer in result.mass:
        torch.testing.assert_close(layer.sum(), torch.tensor(float(len(result.labels)), dtype=torch.float64))


def test_the_probe_knows_enough_images_of_every_modality(evaluator, monkeypatch):
    asked = []

    def probe(known, known_modality, held_out, modality, k):
        asked.append((len(known), known_modality.bincount().tolist(), len(held_out), k))
        return knn_accuracy(known, known_modality, held_out, modality, k=k)

    monkeypatch.setattr(evaluation, "knn_accuracy", probe)
    assert 0 <= evaluator().evaluate().probe <= 1
    # With k = 20 most of an image's neighbours would be of other modalities.
    assert asked == [(FEWEST, [6, 5, 5], 6, 2)]


def test_no_held_out_image_is_no_evaluation(evaluator, images):
    e = evaluator()
    nothing = open_dataset(images)
    nothing._in_split = lambda name: [name == "train"] * len(nothing)
    e.held_out = nothing.split("val")
    assert e.evaluate() is None


def test_in_bf16_the_experts_are_copied_once_in_an_evaluation(evaluator, monkeypatch):
    made = []
    copies = shadows._copies
    monkeypatch.setattr(shadows, "_copies", lambda *arguments: made.append(1) or copies(*arguments))
    e = evaluator(data__batch_size=2)
    e.precision = "bf16"
    first = e.evaluate(probe=False)
    assert len(made) == len(e.experts) == 2
    e.model.encoder.blocks[0].dex.experts.fc1_weight.data.add_(1.0)
    assert e.evaluate(probe=False).loss != first.loss and len(made) == 4  # none is kept from one evaluation to the next


def test_the_instruments_are_those_of_dex_analyse(evaluator):
    """On the same images and masks; a random encoder's experts are alike enough that nothing is shown of them."""
    e = evaluator(run__evaluate_images=24, data__batch_size=24)
    e.evaluate()
    result = e.evaluate().instruments
    images = e._images
    pictures = center(images.images, 64)
    count = len(pictures)
    torch.manual_seed(step_seed(evaluation._SEED, 0))
    noise = torch.rand(count, 16)
    want = swap(e.model, pictures, images.modality, noise)
    assert {gap.kind: gap.gap for gap in result.gaps} == {
        gap.kind: gap.gap for gap in gaps(want, torch.arange(count)) if gap.layer is None and gap.kind != "random"
    }
    routes = masked_forward(e.model, pictures, noise).routes
    whole = masked_forward(e.model, pictures, noise, mask_ratio=0.0).routes
    for place, layer in enumerate(result.layers):
        assert layer.entropy == pytest.approx(probability_entropy(routes.probabilities[place]), abs=1e-9)
        assert layer.sets_masked == distinct_sets(routes.experts)[place]
        assert layer.first_agreement == first_agreement(routes.experts[place], whole.experts[place])
    tokens = maps.tokens(e.model.encoder, pictures)
    assert result.cls_rank == pytest.approx(spectrum(tokens.cls).rankme, rel=1e-4)
    assert result.patch_rank == pytest.approx(spectrum(tokens.patches.mean(1)).rankme, rel=1e-4)
    assert 0 <= result.probe.low <= result.probe.value <= result.probe.high <= 1
    assert 0 <= result.pixels.low <= result.pixels.value <= 1


def test_a_monolithic_model_has_features_and_no_experts_to_measure(evaluator):
    result = evaluator(model__num_experts=0).evaluate().instruments
    assert result.gaps == [] and result.layers == [] and result.modality_gap is None
    assert result.cls_rank > 0 and result.probe is not None


def test_weights_that_are_not_finite_end_no_run(evaluator):
    e = evaluator()
    with torch.no_grad():
        e.model.encoder.patch_embed.weight.fill_(float("nan"))
    result = e.evaluate().instruments
    assert result.gaps == [] and result.cls_rank is None and result.probe is None
    assert e.evaluate(pictures=0, probe=False).instruments is None
