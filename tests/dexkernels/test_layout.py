"""A layer computes with maps and windows what it computes with their tokens, and gives them back as they came."""

import copy

import pytest
import torch
from layer_cases import D, H, layer_of, step

from dexkernels import DEXLayer, collect_aux
from dexkernels.layout import LAYOUTS, Layout
from dexkernels.testing import relative_error

HOSTS = [("channels_last", 1), ("channels_first", 1), ("tokens", 2), ("channels_last", 3), ("channels_first", 2)]


def tokens(B=4, N=12, dtype=torch.float64):
    return torch.randn(B, N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def as_host(x, layout, windows):
    """``[B, N, D]`` as a host passes it: a map two tokens wide; windows one after the other."""
    B, N, width = x.shape
    x = x.reshape(B * windows, N // windows, width)
    if layout == "tokens":
        return x
    x = x.view(B * windows, -1, 2, width)
    return x if layout == "channels_last" else torch.einsum("bhwd->bdhw", x)


def pair(layout, windows, **options):
    options = {"route_from": "mean"} | options
    return layer_of(**options), layer_of(layout=layout, windows=windows, **options)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("layout", "windows"), HOSTS)
@pytest.mark.parametrize("routing", ["image", "token"])
def test_same_as_with_tokens(layout, windows, routing, strided):
    plain, layer = pair(layout, windows, routing=routing)
    x = tokens()
    want, host = step(plain, x), as_host(x, layout, windows)
    host = (host.repeat_interleave(2, dim=2)[:, :, ::2] if strided else host.contiguous()).detach().requires_grad_()
    assert host.is_contiguous() != strided
    y, aux = layer(host, return_aux=True)
    assert y.shape == host.shape
    upstream = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    ((y * as_host(upstream, layout, windows)).sum() + 3 * aux.align_loss + aux.balance_loss).backward()
    assert relative_error(y, as_host(want["y"], layout, windows)) < 1e-14
    assert relative_error(host.grad, as_host(want["x"], layout, windows)) < 1e-13
    for name, value in aux._asdict().items():
        torch.testing.assert_close(value, want[name])
    for name, p in layer.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, want[name])


@pytest.mark.parametrize(("layout", "windows"), HOSTS)
def test_director_path_and_collect_aux(layout, windows):
    plain, layer = pair(layout, windows)
    x = tokens()
    for m in (plain, layer):
        with collect_aux(m) as aux:
            y = m(x if m is plain else as_host(x, layout, windows))
        m.result = y, aux.losses(), aux.gate_mass[0]
    assert relative_error(layer.result[0], as_host(plain.result[0], layout, windows)) < 1e-14
    torch.testing.assert_close(layer.result[1:], plain.result[1:])
    plain.path = layer.path = "director"
    assert relative_error(layer(as_host(x, layout, windows)), as_host(plain(x), layout, windows)) < 1e-14


@pytest.mark.parametrize(("layout", "windows"), HOSTS)
def test_an_empty_batch(layout, windows):
    layer = pair(layout, windows)[1]
    host = as_host(tokens(), layout, windows)[:0]
    assert layer(host).shape == host.shape


@pytest.mark.parametrize(("layout", "windows"), [("channels_first", 1), ("channels_last", 3)])
def test_one_graph_under_compile(layout, windows):
    layer = pair(layout, windows)[1]
    host = as_host(tokens(), layout, windows)
    compiled = torch.compile(copy.deepcopy(layer), backend="eager", fullgraph=True)
    assert torch.equal(compiled(host), layer(host))


def test_what_does_not_fit_is_refused():
    for layout in ("channels_last", "channels_first"):
        with pytest.raises(ValueError, match=f"route_from: expected 'mean' with layout='{layout}'.* got 'cls'"):
            DEXLayer(D, H, layout=layout)
        DEXLayer(D, H, layout=layout, routing="token")
        layer = layer_of(layout=layout, route_from="mean")
        shape = LAYOUTS[layout].replace("D", str(D)).replace("[", r"\[")
        for x in (tokens(), torch.zeros(2, 4, 4, 4, dtype=torch.float64), 7):
            with pytest.raises(ValueError, match=f"x: expected {shape} with layout='{layout}', got"):
                layer(x)
    with pytest.raises(ValueError, match="route_from: expected 'mean' with windows=4, which has no CLS"):
        DEXLayer(D, H, windows=4)
    with pytest.raises(ValueError, match="layout: expected one of tokens, channels_last, channels_first, got 'NHWC'"):
        DEXLayer(D, H, layout="NHWC")
    for windows in (0, 1.5, True):
        with pytest.raises(ValueError, match="windows: expected a positive integer"):
            DEXLayer(D, H, windows=windows)
    with pytest.raises(
        ValueError, match=r"x: expected a first dimension that is a multiple of windows=3.*got \[4, 12, 9\]"
    ):
        layer_of(windows=3, route_from="mean")(tokens())
    with pytest.raises(ValueError, match=r"expected \[B, N, 9\], got \[4, 4, 3, 9\]: maps need layout='channels_last'"):
        layer_of()(tokens().view(4, 4, 3, D))


def test_the_mask_of_maps_and_windows():
    mask = torch.arange(24).view(4, 3, 2) % 5 > 0
    for name, shape in (("channels_last", (4, 3, 2, D)), ("channels_first", (4, D, 3, 2))):
        assert torch.equal(Layout(name).token_mask(mask, torch.zeros(shape)), mask.view(4, 6))
        assert torch.equal(Layout(name, 2).token_mask(mask, torch.zeros(shape)), mask.view(2, 12))
        with pytest.raises(ValueError, match=r"token_mask: expected torch.bool \[4, 3, 2\]"):
            Layout(name).token_mask(mask.view(4, 6), torch.zeros(shape))
