"""Hosts that keep an image as a map, or cut it into windows: upcycled with their layout said, or refused by name."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dexkernels
from dexkernels import DEXLayer
from dexkernels.testing import relative_error

from .hosts import D, H, TimmMlp, look_trained_, need

E, K = 4, 2


class ConvMlp(TimmMlp):
    """As timm's ConvMlp: the maps are convolutions of kernel size 1 over ``[B, D, H, W]``."""

    def __init__(self, **options):
        super().__init__(**options)
        self.fc1, self.fc2 = nn.Conv2d(D, H, 1), nn.Conv2d(H, D, 1)


class MapBlock(nn.Module):
    """A depthwise convolution and an MLP, over maps; the MLP sees them with the channels where ``last`` says."""

    def __init__(self, mlp, last):
        super().__init__()
        self.conv, self.mlp, self.last = nn.Conv2d(D, D, 3, padding=1, groups=D), mlp, last

    def forward(self, x):
        h = self.conv(x)
        h = self.mlp(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.last else self.mlp(h)
        return x + h


def sequence(kind):
    return nn.Sequential(kind(D, H), nn.GELU(), nn.Identity(), kind(H, D))


convolution = functools.partial(nn.Conv2d, kernel_size=1)

MAPS = {
    "channels_last": lambda: nn.Sequential(*(MapBlock(TimmMlp(), True) for _ in range(2))),
    "channels_last, sequence": lambda: nn.Sequential(*(MapBlock(sequence(nn.Linear), True) for _ in range(2))),
    "channels_first": lambda: nn.Sequential(*(MapBlock(ConvMlp(), False) for _ in range(2))),
    "channels_first, sequence": lambda: nn.Sequential(*(MapBlock(sequence(convolution), False) for _ in range(2))),
    "channels_first, tanh": lambda: nn.Sequential(
        *(MapBlock(ConvMlp(act=functools.partial(nn.GELU, "tanh")), False) for _ in range(2))
    ),
}


def maps():
    return torch.randn(3, D, 4, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MAPS)
def test_maps_there_and_back(name):
    dense = look_trained_(MAPS[name]())
    model, layout = copy.deepcopy(dense), name.split(",")[0]
    layers = dexkernels.upcycle_(model, E, K, layout=layout)
    assert list(layers) == ["0.mlp", "1.mlp"]
    assert {(n.layout, n.route_from) for n in layers.values()} == {(layout, "mean")}
    x = maps().requires_grad_()
    assert relative_error(model(x), dense(x)) < 2e-6
    gates = []
    for layer in layers.values():
        layer.register_forward_hook(lambda layer, inputs, y: gates.append(layer.recording.calls[0].gates))
    with dexkernels.collect_aux(model) as aux:
        y = model(x)
    (y.square().mean() + aux.losses()).backward()
    aux.update_directors(0.5)
    assert [g.shape for g in gates] == [(3, K)] * 2  # one decision for an image
    assert dexkernels.to_dense_(model) == ["0.mlp", "1.mlp"]
    assert {n: p.shape for n, p in model.state_dict().items()} == {n: p.shape for n, p in dense.state_dict().items()}
    dense.load_state_dict(model.state_dict())
    assert torch.equal(dense(x), model(x)) and all(p.requires_grad for p in model.parameters())


def test_maps_in_the_wrong_layout_are_refused():
    first, last = MAPS["channels_first"](), MAPS["channels_last"]()
    with pytest.raises(
        ValueError, match="0.mlp: expected torch.nn.Linear as fc1, got Conv2d: .*layout='channels_first'"
    ):
        dexkernels.upcycle_(first, E, K, layout="channels_last")
    with pytest.raises(ValueError, match="0.mlp: expected torch.nn.Conv2d as fc1, got Linear: .*layout"):
        dexkernels.upcycle_(last, E, K, layout="channels_first")
    with pytest.raises(ValueError, match="layout: expected one of"):
        dexkernels.upcycle_(last, E, K, layout="NHWC")
    with pytest.raises(ValueError, match="route_from: expected 'mean' with layout='channels_last'"):
        dexkernels.upcycle_(last, E, K, layout="channels_last", route_from="cls")
    wide = MAPS["channels_first"]()
    wide[1].mlp.fc2 = nn.Conv2d(H, D, 3, padding=1)
    with pytest.raises(ValueError, match="1.mlp: expected kernel size 1 and no stride, padding or groups in fc2, got"):
        dexkernels.upcycle_(wide, E, K, layout="channels_first")
    assert not any(isinstance(m, DEXLayer) for model in (first, last, wide) for m in model.modules())


def swin(name="Swin"):
    transformers = need("transformers")
    config = getattr(transformers, f"{name}Config")(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4, mlp_ratio=2.0,
    )  # fmt: skip
    return look_trained_(getattr(transformers, f"{name}Model")(config)).eval()


@pytest.mark.parametrize("name", ["Swin", "Swinv2"])
def test_swin_is_routed_by_image_not_by_window(name):
    """Its attention sees 4 windows of an image in the first stage, its MLPs all 64 tokens of the image at once."""
    model = swin(name)
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    want = model(x).last_hidden_state
    for route_from in (None, "cls"):
        with pytest.raises(ValueError, match="expected route_from='mean', as Swin.*Layer has no CLS token"):
            dexkernels.upcycle_(model, E, K, route_from=route_from)
    # Swin V2 also has MLPs that make the bias of attention from positions.
    layers = dexkernels.upcycle_(model, E, K, route_from="mean", select=lambda path: "position_bias" not in path)
    assert len(layers) == 4
    with dexkernels.collect_aux(model) as aux:
        got = model(x).last_hidden_state
    assert relative_error(got, want) < 2e-6
    assert [call.gates.shape for calls in aux.calls.values() for call in calls] == [(3, K)] * 4
    aux.losses().backward()
    aux.update_directors(0.9)


def test_mobilevit_says_how_many_windows_an_image_has():
    """Its MLPs get each image as 4 interleaved windows, one after the other."""
    transformers = need("transformers")
    config = transformers.MobileViTConfig(
        image_size=64, patch_size=2, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16],
        num_attention_heads=2, mlp_ratio=2.0, hidden_act="gelu", hidden_dropout_prob=0.0,
    )  # fmt: skip
    model = look_trained_(transformers.MobileViTModel(config)).eval()
    x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    want = model(x).last_hidden_state
    with pytest.raises(ValueError, match="expected windows=1 .* got None, and MobileViTLayer.unfolding: images may"):
        dexkernels.upcycle_(model, E, K, route_from="mean")
    assert not any(isinstance(m, DEXLayer) for m in model.modules())
    layers = dexkernels.upcycle_(model, E, K, windows=4)
    with dexkernels.collect_aux(model) as aux:
        got = model(x).last_hidden_state
    assert relative_error(got, want) < 1e-5
    assert {call.gates.shape for calls in aux.calls.values() for call in calls} == {(3, K)} and len(layers) > 3
    # One image after the other: the images of a batch do not change each other's experts.
    with dexkernels.collect_aux(model) as alone:
        model(x[1:2])
    for name, (call,) in aux.calls.items():
        assert torch.equal(call.expert_indices[1:2], alone.calls[name][0].expert_indices)


class WindowBlock(nn.Module):
    """Attention and MLP, both over windows of ``window_size`` tokens; the mark is on the attention alone."""

    def __init__(self, mark="window_size"):
        super().__init__()
        self.attn, self.mlp = nn.Identity(), TimmMlp()
        setattr(self.attn, mark, 4)

    def forward(self, x):
        windows = x.reshape(-1, 4, D)
        return x + self.mlp(self.attn(windows)).view_as(x)


@pytest.mark.parametrize("mark", ["window_size", "shift_size", "patch_area", "partition_op"])
def test_windows_are_never_taken_for_images_silently(mark):
    dense = look_trained_(nn.Sequential(WindowBlock(mark), WindowBlock(mark)))
    model, x = copy.deepcopy(dense), torch.randn(3, 8, D, generator=torch.Generator().manual_seed(0))
    with pytest.raises(
        ValueError, match=f"0.mlp: expected windows=1 .* got None, and Identity.{mark}: images may be cut"
    ):
        dexkernels.upcycle_(model, E, K, route_from="mean")
    with pytest.raises(ValueError, match="route_from: expected 'mean' with windows=2"):
        dexkernels.upcycle_(model, E, K, route_from="cls", windows=2)
    layers = dexkernels.upcycle_(model, E, K, windows=2)
    with dexkernels.collect_aux(model) as aux:
        y = model(x)
    assert relative_error(y, dense(x)) < 2e-6
    assert {call.gates.shape for calls in aux.calls.values() for call in calls} == {(3, K)}
    # An image is routed from the mean of all its tokens.
    layer, whole = layers["0.mlp"], DEXLayer(D, H, E, K, route_from="mean")
    whole.load_state_dict(layer.state_dict())
    assert torch.equal(aux.calls["0.mlp.fc1"][0].gates, whole(x, return_aux=True)[1].gates)


def test_tanh_in_torchs_encoder_layer():
    """Given as a function it is not taken for the exact GELU by torch's fused evaluation."""
    layer = nn.TransformerEncoderLayer(
        D, 2, H, dropout=0.0, activation=lambda x: F.gelu(x, approximate="tanh"), batch_first=True
    )
    dense = look_trained_(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).eval()
    model, x = copy.deepcopy(dense), torch.randn(3, 4, D, generator=torch.Generator().manual_seed(0))
    layers = dexkernels.upcycle_(model, E, K, route_from="mean")
    assert {layer.activation for layer in layers.values()} == {"gelu_tanh"}
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            assert relative_error(model(x), dense(x)) < 2e-6
    dexkernels.to_dense_(model)
    assert {(m.activation.approximate, m.activation_relu_or_gelu) for m in model.layers} == {("tanh", 0)}
    with torch.no_grad():
        assert relative_error(model(x), dense(x)) < 2e-6


def test_the_activation_is_the_hosts():
    with pytest.raises(ValueError, match="activation: expected none, as each layer keeps the activation of its MLP"):
        dexkernels.upcycle_(nn.Sequential(MapBlock(TimmMlp(), True)), layout="channels_last", activation="gelu")
