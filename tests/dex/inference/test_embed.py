import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dex
from dex.data import center, open_dataset
from dex.inference.embed import embed
from dex.model import VisionTransformer
from dex.train import run as training


@pytest.fixture
def loaded(trained):
    return dex.load(trained)


@pytest.fixture
def batch(images):
    dataset = open_dataset(images)
    return torch.stack([dataset[i].image for i in range(0, 120, 10)])


def test_features_are_those_of_the_trainers_encoder(tiny, tmp_path):
    """The images that the evaluator looks at: the same bits. The evaluator itself shuffles the patches."""
    run = training.prepare(tiny, tmp_path / "run")
    assert run.run() == 0
    evaluator = run.trainer._evaluator
    evaluator.evaluate()
    held_out = evaluator._images.images
    got = dex.load(tmp_path / "run").embed(held_out)
    with torch.no_grad():
        want = run.trainer.model.eval().encoder(center(held_out, 64))
    assert len(held_out) == 6 and torch.equal(got.cls, want[:, 0])
    torch.testing.assert_close(got.cls, evaluator._whole(held_out).cls, rtol=1e-5, atol=1e-5)


def test_features_are_the_encoders(loaded, batch):
    with torch.no_grad():
        tokens = loaded.encoder(center(batch, 64))
    got = loaded.embed(batch, layers=(1, 0))
    assert torch.equal(got.cls, tokens[:, 0]) and torch.equal(got.patches, tokens[:, 1:].mean(1))
    with torch.no_grad():
        last = loaded.encoder.norm(got.layers[1])
    assert list(got.layers) == [0, 1]
    torch.testing.assert_close(last, got.cls, rtol=1e-5, atol=1e-6)


def test_experts_and_gates_are_the_layers_own(loaded, batch):
    got = loaded.embed(batch)
    with torch.no_grad():
        auxes = loaded.encoder.forward_aux(center(batch, 64), return_aux=True)[1]
    for gates, indices, aux in zip(got.gates, got.expert_indices, auxes, strict=True):
        assert torch.equal(gates, aux.gates) and torch.equal(indices, aux.expert_indices)
    loaded.encoder.train()  # no exploration noise, whatever the mode
    try:
        again = loaded.embed(batch)
    finally:
        loaded.encoder.eval()
    assert all(torch.equal(a, b) for a, b in zip(again.gates, got.gates, strict=True))


def test_experts_of_a_model_that_routes_from_the_mean_token(batch):
    torch.manual_seed(0)
    encoder = VisionTransformer(64, 8, 32, 2, 2, num_experts=4, top_k=2, route_from="mean", temperature=0.2).eval()
    got = embed(encoder, [batch])
    with torch.no_grad():
        auxes = encoder.forward_aux(center(batch, 64), return_aux=True)[1]
    for gates, indices, aux in zip(got.gates, got.expert_indices, auxes, strict=True):
        torch.testing.assert_close(gates, aux.gates)
        assert torch.equal(indices, aux.expert_indices)


def test_the_director_and_the_control_route_nothing(trained, control, batch):
    for run, path in ((trained, "director"), (control, None)):
        got = dex.load(run, path=path).embed(batch)
        assert got.gates == got.expert_indices == [] and got.cls.shape == (12, 32)


def test_nothing_is_left_on_the_encoder(loaded, batch):
    loaded.embed(batch, layers=(0,))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in loaded.encoder.modules())


def test_files_and_arrays_of_any_form_agree(loaded, images):
    files = [images / "ct" / "001.png", str(images / "us" / "002.png")]
    want = loaded.embed(files)
    arrays = [loaded.preprocess(file).images[0] for file in files]
    for inputs in (
        [loaded.preprocess(file) for file in files],
        arrays,
        [array.numpy() for array in arrays],
        torch.stack(arrays),
        torch.stack(arrays).numpy(),
    ):
        got = loaded.embed(inputs)
        assert torch.equal(got.cls, want.cls) and torch.equal(got.patches, want.patches)
    floats = loaded.embed(torch.stack(arrays) / 255)
    torch.testing.assert_close(floats.cls, want.cls, rtol=1e-4, atol=1e-5)
    assert loaded.embed(files[0]).cls.shape == (1, 32)


def test_one_channel_is_grey(loaded):
    grey = torch.randint(0, 256, (3, 1, 80, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    want = loaded.embed(grey.expand(-1, 3, -1, -1)).cls
    for inputs in (grey, list(grey), [image[0].numpy() for image in grey]):
        assert torch.equal(loaded.embed(inputs).cls, want)


def test_images_of_different_sizes_share_batches(loaded):
    big, small = torch.rand(3, 3, 100, 90), torch.rand(4, 1, 64, 64)
    got = loaded.embed([big, small], batch_size=5)
    want = torch.cat([center(big, 64), center(small.expand(-1, 3, -1, -1), 64)])
    with torch.no_grad():
        tokens = torch.cat([loaded.encoder(want[:5]), loaded.encoder(want[5:])])
    assert torch.equal(got.cls, tokens[:, 0])


def test_no_image_gives_no_feature(loaded):
    got = loaded.embed(torch.zeros(0, 3, 64, 64, dtype=torch.uint8), layers=(1,))
    assert got.cls.shape == got.layers[1].shape == (0, 32) and got.gates[0].shape == (0, 2)
    assert loaded.embed([]).patches.shape == (0, 32)


def test_bf16_is_near(loaded, batch):
    got, want = loaded.embed(batch, precision="bf16").cls, loaded.embed(batch).cls
    assert got.dtype == torch.float32 and F.cosine_similarity(got, want).min() > 0.99


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (torch.zeros(3, 3, 3, 64, 64), {}, r"inputs: expected paths, or images .*, got \[3, 3, 3, 64, 64\]"),
        (torch.zeros(2, 4, 64, 64), {}, r"inputs: expected .* of one or three channels, got \[2, 4, 64, 64\]"),
        (np.zeros((64, 64, 3)), {}, r"inputs: expected .*, got \[64, 64, 3\]"),
        ([7], {}, "inputs: expected .*, got int"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), {}, "inputs: expected uint8, or floats .*, got torch.int64"),
        (torch.full((1, 3, 8, 8), 2.0), {}, "inputs: expected floats within .*, got minimum 2.0, maximum 2.0"),
        (torch.full((1, 3, 8, 8), float("nan")), {}, "inputs: expected floats within .*, got minimum nan"),
        (torch.zeros(1, 3, 8, 8), {"layers": (2,)}, "layers: expected numbers of blocks, 0 to 1, got 2"),
        (torch.zeros(1, 3, 8, 8), {"batch_size": 0}, "batch_size: expected a positive whole number, got 0"),
        (torch.zeros(1, 3, 8, 8), {"precision": "fp8"}, "precision: expected one of fp32, bf16, got 'fp8'"),
    ],
)
def test_wrong_input_is_named(loaded, inputs, options, message):
    with pytest.raises(ValueError, match=message):
        loaded.embed(inputs, **options)


def test_embed_takes_an_encoder_of_ones_own(loaded, batch):
    assert torch.equal(embed(loaded.encoder, [batch]).cls, loaded.embed(batch).cls)
