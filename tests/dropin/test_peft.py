"""LoRA by peft on an upcycled host: it reaches attention and, on its path, the director; experts refuse it by name."""

import pytest
import torch

import dexkernels
from dexkernels import DEXLayer

from .hosts import need, vit_config


@pytest.fixture
def adapted():
    """``adapted(path, **options of LoraConfig)``: an upcycled ViT with adapters."""
    transformers, peft = need("transformers"), need("peft")

    def build(path="experts", **options):
        torch.manual_seed(0)
        model = transformers.ViTForImageClassification(vit_config("ViTConfig"))
        for layer in dexkernels.upcycle_(model, 4, 2).values():
            layer.path = path
        return peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **options))

    return build


def pixels(model):
    config = model.config
    return torch.randn(3, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(1))


def trained(model):
    """The parameters that a step changes, after GEMA where there are experts."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if any(isinstance(m, DEXLayer) and m.path == "experts" for m in model.modules()):
        with dexkernels.collect_aux(model) as aux:
            logits = model(pixel_values=pixels(model)).logits
        (logits.square().mean() + aux.losses()).backward()
        aux.update_directors(0.5)
    else:
        model(pixel_values=pixels(model)).logits.square().mean().backward()
    optimizer.step()
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def test_adapters_of_attention_train(adapted):
    model = adapted(target_modules=["q_proj", "v_proj"])
    lora = {name for name, _ in model.named_parameters() if "lora_" in name}
    directors = {name for name, _ in model.named_parameters() if ".director." in name}
    assert lora and lora <= trained(model) <= lora | directors  # which GEMA moves by a rounding: experts are copies


def test_adapters_of_the_director_train_on_its_path(adapted):
    model = adapted("director", target_modules=r".*director\.fc[12]")
    lora = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert lora and trained(model) == lora


def test_experts_that_are_trained_whole_beside_adapters_are_followed(adapted):
    model = adapted(target_modules=["q_proj"], modules_to_save=["experts"])
    moved = trained(model)
    assert any("experts.modules_to_save" in name for name in moved)
    assert not any("experts.original_module" in name for name in moved)


@pytest.mark.parametrize(
    "options", [{"target_parameters": ["experts.fc1_weight"]}, {"target_parameters": ["fc2_weight"]}]
)
def test_adapters_of_stacked_experts_are_refused_with_the_way_out(adapted, options):
    model = adapted(target_modules=["q_proj"], **options)
    with pytest.raises(
        ValueError, match="experts: expected the layer's own module, got ParamWrapper: .* path='director'"
    ):
        model(pixel_values=pixels(model))


@pytest.mark.parametrize(
    "options", [{"target_modules": r".*director\.fc[12]"}, {"target_parameters": ["director.fc1.weight"]}]
)
def test_adapters_of_a_director_that_follows_experts_are_refused(adapted, options):
    """They would stay as they are, silently where something else is trained."""
    model = adapted(**options)
    with pytest.raises(
        ValueError, match=r"director\.fc1: expected torch.nn.Linear with path='experts', got .*attention"
    ):
        model(pixel_values=pixels(model))
    assert model.eval()(pixel_values=pixels(model)).logits.isfinite().all()
