"""Vision transformers of other programs compute the same here, up to the eps of their norms."""

import pytest
import torch
from torch import nn

from dex.model import MaskedAutoencoder
from dex.model.foreign import read_onnx, timm_names
from dex.model.weights import load_pretrained

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="needs transformers, of the extra 'adapt'")


@pytest.fixture
def images():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def model(**options):
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_experts": 4}
    return MaskedAutoencoder(**{**sizes, "decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2, **options})


def drawn(module):
    """With weights that hide no mistake, LayerScale's among them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.4, generator=generator)
    return module.double().eval()


def test_a_hugging_face_vit_keeps_its_function(transformers, images):
    host = drawn(transformers.ViTModel(transformers.ViTConfig(**SIZES, intermediate_size=64, layer_norm_eps=1e-6)))
    mine = model().double().eval()
    report = load_pretrained(mine, host.state_dict())
    assert (
        report.upcycled
        and report.naming == "dense ViT"
        and set(report.ignored)
        == {
            "head.pooler.dense.weight",
            "head.pooler.dense.bias",
        }
    )
    with torch.no_grad():
        want = host(pixel_values=images).last_hidden_state
        torch.testing.assert_close(mine.encoder(images), want, rtol=1e-9, atol=1e-9)


def test_dinov2_keeps_its_function_with_layer_scale_folded(transformers, images):
    host = drawn(transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, layer_norm_eps=1e-6)))
    mine = model().double().eval()
    load_pretrained(mine, {f"backbone.{name}": tensor for name, tensor in host.state_dict().items()})
    with torch.no_grad():
        want = host(pixel_values=images).last_hidden_state
        torch.testing.assert_close(mine.encoder(images), want, rtol=1e-9, atol=1e-9)


def older(name):
    """A name of transformers 5 as version 4 has it."""
    for new, old in (
        ("layers.", "encoder.layer."),
        ("attention.q_proj", "attention.attention.query"),
        ("attention.k_proj", "attention.attention.key"),
        ("attention.v_proj", "attention.attention.value"),
        ("attention.o_proj", "attention.output.dense"),
        ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    ):
        name = name.replace(new, old)
    return name


def hugging_face_state(width=4, layers=("layers.0",)):
    """The tensors of a ViT under the names of transformers 5, drawn."""
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return torch.randn(*shape, generator=generator)

    state = {
        "embeddings.cls_token": tensor(1, 1, width),
        "embeddings.position_embeddings": tensor(1, 5, width),
        "embeddings.patch_embeddings.projection.weight": tensor(width, 3, 2, 2),
        "embeddings.patch_embeddings.projection.bias": tensor(width),
        "layernorm.weight": tensor(width),
        "layernorm.bias": tensor(width),
    }
    for layer in layers:
        for name in ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"):
            state |= {f"{layer}.{name}.weight": tensor(width, width), f"{layer}.{name}.bias": tensor(width)}
        for name in ("layernorm_before", "layernorm_after"):
            state |= {f"{layer}.{name}.weight": tensor(width), f"{layer}.{name}.bias": tensor(width)}
        state |= {f"{layer}.mlp.fc1.weight": tensor(2 * width, width), f"{layer}.mlp.fc1.bias": tensor(2 * width)}
        state |= {f"{layer}.mlp.fc2.weight": tensor(width, 2 * width), f"{layer}.mlp.fc2.bias": tensor(width)}
    return state


def test_names_of_both_versions_are_one():
    state = hugging_face_state()
    new, old = timm_names(state), timm_names({f"vit.{older(name)}": tensor for name, tensor in state.items()})
    assert set(new) == set(old) and all(torch.equal(new[name], old[name]) for name in new)
    query = state["layers.0.attention.q_proj.weight"]
    assert torch.equal(new["blocks.0.attn.qkv.weight"][:4], query) and "blocks.0.mlp.fc2.bias" in new


def test_layer_scale_under_timms_names_is_folded():
    proj, gamma = nn.Linear(4, 4), torch.tensor([1.0, -2.0, 0.5, 0.0])
    state = {"blocks.0.attn.proj.weight": proj.weight, "blocks.0.attn.proj.bias": proj.bias}
    state |= {"blocks.0.ls1.gamma": gamma, "mask_token": torch.zeros(1, 4)}
    folded = timm_names(state)
    assert set(folded) == {"blocks.0.attn.proj.weight", "blocks.0.attn.proj.bias"}
    x = torch.randn(3, 4)
    got = x @ folded["blocks.0.attn.proj.weight"].T + folded["blocks.0.attn.proj.bias"]
    torch.testing.assert_close(got, gamma * proj(x))
    assert "blocks.0.ls1.gamma" in state  # the caller's stays as it was


def test_timms_names_pass_through():
    state = {"blocks.0.mlp.fc1.weight": torch.zeros(1), "mask_token": torch.zeros(1, 1, 8)}
    assert timm_names(state) == state


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("embeddings.register_tokens", "weights: expected a vision transformer without register tokens"),
        ("encoder.layer.0.mlp.weights_in.weight", "weights: expected MLPs of two linear maps with GELU, got gated"),
        ("blocks.0.mlp.w12.weight", "weights: expected MLPs of two linear maps"),
    ],
)
def test_what_this_network_cannot_be_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        timm_names({name: torch.zeros(1)})


def test_a_bias_that_is_missing_is_named(transformers):
    host = transformers.ViTModel(transformers.ViTConfig(**SIZES, intermediate_size=64, qkv_bias=False))
    with pytest.raises(ValueError, match=r"blocks.0.attn.qkv.bias"):
        load_pretrained(model(), host.state_dict())


def test_onnx_initialisers_get_their_modules_names(tmp_path):
    onnx = pytest.importorskip("onnx", reason="needs onnx, of the extra 'export'")
    from onnx import helper, numpy_helper

    draw = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(2, 4, generator=draw), torch.randn(2, generator=draw)
    cls, patches = torch.randn(1, 1, 4, generator=draw), torch.randn(1, 9, 4, generator=draw)
    named = {"onnx::MatMul_7": weight.T, "body.fc1.bias": bias, "onnx::Concat_1": cls, "onnx::Reshape_2": patches}
    initializers = [numpy_helper.from_array(t.contiguous().numpy(), name) for name, t in named.items()]
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["y"], name="/body/fc1/MatMul"),
        helper.make_node("Add", ["body.fc1.bias", "y"], ["z"], name="/body/fc1/Add"),
        helper.make_node(
            "Concat", ["onnx::Concat_1", "onnx::Reshape_2"], ["p"], name="/body/embeddings/Concat", axis=1
        ),
    ]
    ports = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("x", "z", "p")]
    file = tmp_path / "model.onnx"
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", ports[:1], ports[1:], initializers)), file)
    state = read_onnx(file)
    assert set(state) == {"body.fc1.weight", "body.fc1.bias", "body.embeddings.position_embeddings"}
    assert torch.equal(state["body.fc1.weight"], weight)
    assert torch.equal(state["body.embeddings.position_embeddings"], torch.cat([cls, patches], 1))
    with pytest.raises(FileNotFoundError, match="path: no such file"):
        read_onnx(tmp_path / "absent.onnx")
    file.write_bytes(b"no model")
    with pytest.raises(ValueError, match=f"path: expected an ONNX model; {file}"):
        read_onnx(file)
