"""LoRA: equal at first, trained alone, merged into plain weights."""

import pytest
import torch

from dex.model import VisionTransformer
from dex.model.lora import LowRank, add_lora_, merge_lora_


def encoder_of(kind):
    torch.manual_seed(0)
    experts = 0 if kind == "monolithic" else 4
    encoder = VisionTransformer(32, 8, 32, 2, 2, experts, 2)
    if kind == "director":
        for layer in encoder.dex_layers:
            layer.path = "director"
    return encoder


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def step(encoder, images):
    """One step of descent on what takes a gradient."""
    trained = [p for p in encoder.parameters() if p.requires_grad]
    encoder(images).square().mean().backward()
    assert all(p.grad is not None for p in trained)
    with torch.no_grad():
        for p in trained:
            p -= 0.5 * p.grad / p.grad.norm().clamp(min=1e-6)


@pytest.mark.parametrize("kind", ["experts", "director", "monolithic"])
def test_training_reaches_low_rank_weights_alone_and_merging_keeps_the_function(kind, images):
    encoder = encoder_of(kind)
    before, names = encoder(images), set(encoder.state_dict())
    add_lora_(encoder, 4, 8.0)
    assert torch.equal(encoder(images), before)
    trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"down", "up"}
    assert len(trained) == 2 * 4 * 2  # of 2 blocks: qkv, proj, fc1, fc2
    plain = {name: p.clone() for name, p in encoder.named_parameters() if not p.requires_grad}
    step(encoder, images), step(encoder, images)
    for name, p in encoder.named_parameters():
        if name in plain:
            assert torch.equal(p, plain[name])
    adapted = encoder(images)
    assert (adapted - before).abs().max() > 0.01
    merge_lora_(encoder)
    assert set(encoder.state_dict()) == names and not any(isinstance(m, LowRank) for m in encoder.modules())
    torch.testing.assert_close(encoder(images), adapted, rtol=1e-5, atol=1e-5)


def test_experts_get_a_pair_each():
    encoder = encoder_of("experts")
    add_lora_(encoder, 3, 6.0)
    tensors = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    assert all(name.endswith((".down", ".up")) for name in tensors)
    stacked = [t for name, t in tensors.items() if ".experts." in name]
    assert {tuple(t.shape) for t in stacked} == {(4, 3, 32), (4, 128, 3), (4, 3, 128), (4, 32, 3)}


@pytest.mark.parametrize("rank, alpha, word", [(0, 1.0, "lora_rank"), (33, 1.0, "1 to 32"), (2, 0.0, "lora_alpha")])
def test_what_cannot_work_is_refused_and_changes_nothing(rank, alpha, word):
    encoder = encoder_of("experts")
    names = set(encoder.state_dict())
    with pytest.raises(ValueError, match=word):
        add_lora_(encoder, rank, alpha)
    assert set(encoder.state_dict()) == names and encoder.patch_embed.weight.requires_grad


def test_a_second_lora_is_refused():
    encoder = encoder_of("director")
    add_lora_(encoder, 2, 4.0)
    with pytest.raises(ValueError, match="merge_lora_"):
        add_lora_(encoder, 2, 4.0)


def test_autocast_computes_with_adapted_experts(images):
    encoder = encoder_of("experts")
    add_lora_(encoder, 2, 4.0)
    step(encoder, images), step(encoder, images)
    with torch.autocast("cpu", torch.bfloat16):
        low = encoder(images)
        low.float().square().mean().backward()
    torch.testing.assert_close(low.float(), encoder(images), rtol=0.1, atol=0.1)
    assert all(p.grad is not None for name, p in encoder.named_parameters() if name.endswith(".up"))
