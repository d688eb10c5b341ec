"""`upcycle_` turns the MLPs of an existing model into DEX layers that start as copies; `to_dense_` undoes it.

A host's own modules stay. The DEX layer replaces the first linear map of an MLP; the activation and the second map,
which the layer computes too, become `Absorbed`, an identity. So residuals, outer dropout, hooks and names of the host
survive, inside the MLP's module or around it, and the director can return to the same places.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks
from .choices import AlignKind, BackendName, LayoutName, PathName, RouteFrom, RoutingName
from .layer import DEXLayer
from .layout import LAYOUTS, Layout
from .ops.dense import ACTIVATIONS

PLACES = (
    ("fc1", "act", "fc2"),  # timm
    ("fc1", "activation_fn", "fc2"),  # transformers >= 5: ViT, ViTMAE, ViTMSN, DeiT
    ("fc1", "activation", "fc2"),  # transformers: DINOv2
    ("intermediate.dense", "intermediate.intermediate_act_fn", "output.dense"),  # transformers 4: residual in output
)
"""Paths of the first map, the activation and the second map of an MLP, relative to its module."""

ENCODER_LAYER_PLACES = ("linear1", "activation", "linear2")

GATED = ("gate_proj", "fc1_g", "w12", "weights_in")
"""Names of parts by which gated MLPs are recognised, which compute another function and are refused."""

GATED_PLACES = ("", "", "")

CLS_FIRST = {
    "timm.models.vision_transformer.VisionTransformer": "cls_token",
    "torchvision.models.vision_transformer.VisionTransformer": "class_token",
    "transformers.models.deit.modeling_deit.DeiTModel": "embeddings.cls_token",
    "transformers.models.dinov2.modeling_dinov2.Dinov2Model": "embeddings.cls_token",
    "transformers.models.vit.modeling_vit.ViTModel": "embeddings.cls_token",
    "transformers.models.vit_mae.modeling_vit_mae.ViTMAEModel": "embeddings.cls_token",
    "transformers.models.vit_msn.modeling_vit_msn.ViTMSNModel": "embeddings.cls_token",
}
"""Hosts whose blocks have the CLS token at position 0, unless this attribute is None. Other hosts may add their
``cls_token`` last, or after the blocks: their users pass ``route_from``."""


NO_CLS = ("transformers.models.swin.modeling_swin.SwinLayer", "transformers.models.swinv2.modeling_swinv2.Swinv2Layer")
"""Hosts without a CLS token whose attention sees windows, but whose MLP sees all tokens of an image."""

WHOLE_IMAGES = (*NO_CLS, "timm.models.beit.Beit", "timm.models.swin_transformer.SwinTransformerBlock")
"""Hosts that have `WINDOW_MARKS`, but whose MLPs see all tokens of an image at once."""

WINDOW_MARKS = ("window_size", "shift_size", "patch_area", "partition_op", "unfolding")
"""Attributes that, unless 0 or None, suggest that a block around an MLP, or attention beside it, cuts images into
windows."""

WRAPPERS = (
    "torch.nn.parallel.distributed.DistributedDataParallel",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel",
)
DTENSOR = "torch.distributed.tensor.DTensor"


class Absorbed(nn.Identity):
    """Replaces an activation or linear map that is now part of the preceding `DEXLayer`."""


class _Mlp(NamedTuple):
    name: str
    """Path of ``module`` in the model; "" for the model itself."""
    module: nn.Module
    places: tuple[str, str, str]
    inside: dict[str, nn.Module]
    """Modules that may run between the two maps: they must do nothing."""

    def get(self, place: int):
        value = self.module
        for part in self.places[place].split("."):
            value = getattr(value, part, None)
        return value

    def set(self, place: int, value) -> None:
        path, _, name = self.places[place].rpartition(".")
        owner = self.module.get_submodule(path)
        if not isinstance(value, nn.Module) and name in owner._modules:
            delattr(owner, name)
        setattr(owner, name, value)

    def place(self, first, activation, second) -> None:
        for place, value in enumerate((first, activation, second)):
            self.set(place, value)
        if isinstance(self.module, nn.TransformerEncoderLayer):
            # In eval without gradient a fused kernel reads the weights of linear1 and linear2 instead of calling
            # them; torch does not use it for an unknown activation.
            exact = activation is F.gelu or (isinstance(activation, nn.GELU) and activation.approximate == "none")
            self.module.activation_relu_or_gelu = 2 if exact else 0


class LayerOptions(TypedDict, total=False):
    """Arguments of `DEXLayer` that `upcycle_` passes on."""

    routing: RoutingName
    temperature: float
    align: AlignKind
    usage_momentum: float
    path: PathName
    backend: BackendName | None


def upcycle_(
    model: nn.Module,
    num_experts: int = 8,
    top_k: int = 2,
    *,
    route_from: RouteFrom | None = None,
    select: Callable[[str], bool] | None = None,
    layout: LayoutName = "tokens",
    windows: int | None = None,
    **options: Unpack[LayerOptions],
) -> dict[str, DEXLayer]:
    """Turn the MLPs of ``model`` into DEX layers, in place; director and experts start as copies of the MLP.

        layers = dexkernels.upcycle_(vit, num_experts=8, top_k=2)
        list(layers)[:2]  # ['blocks.0.mlp', 'blocks.1.mlp']: the modules whose MLP became a layer
        layers["blocks.0.mlp"].align  # 'kd'

    MLPs are found in timm's and transformers' vision transformers, in `torch.nn.TransformerEncoderLayer`, in modules
    with ``fc1``, ``act`` and ``fc2``, and in `torch.nn.Sequential` with ``Linear(D, H), GELU, Linear(H, D)``. The GELU
    may be exact or the tanh approximation; a layer keeps its MLP's. Call it before building the optimizer and before
    DDP, FSDP or `torch.compile` wrap the model.

    At the start the model computes the same function, in training, in evaluation and without gradient: gates add up
    to 1 and all experts are equal, so outputs differ only by rounding. Models for which this fails are refused.

    Args:
        model: a module whose blocks pass images in ``layout``; pass a part of a model (an encoder) to leave the rest
            dense.
        num_experts, top_k: E and K.
        route_from: ``"cls"`` or ``"mean"``, see `DEXLayer`. None: ``"cls"`` in hosts known to have the CLS token at
            position 0 (`CLS_FIRST`), ``"mean"`` for maps and windows, otherwise refused, unless ``routing="token"``,
            which does not need it.
        select: takes a module's path and returns whether to convert its MLP; None converts all.
        layout: ``"tokens"``, ``"channels_last"`` or ``"channels_first"``, see `DEXLayer`. The maps of an MLP are
            `torch.nn.Linear`, with ``"channels_first"`` `torch.nn.Conv2d` of kernel size 1.
        windows: number of windows of each image that an MLP sees, as consecutive entries of the first dimension; 1:
            whole images. None: 1, but a host that seems to cut images into windows (`WINDOW_MARKS`) is refused.
        options: further arguments of `DEXLayer`.

    Returns: path of each MLP's module -> its DEX layer, in the order of the model's modules.
    Raises: ValueError naming the module, the reason and the remedy: an activation other than the GELU, a gated MLP,
        dropout between the maps, no bias, half precision, hooks or shared weights on the maps, tokens before images
        (``[N, B, D]``), nested tensors, windows, no known CLS token, DDP or FSDP around the model or in it. The model
        is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    _check_unwrapped(model, "upcycle_")
    if route_from not in (None, "cls", "mean"):
        raise ValueError(f"route_from: expected 'cls', 'mean' or None, got {route_from!r}")
    if select is not None and not callable(select):
        raise ValueError(f"select: expected a function of a module's path, got {select!r}")
    checks.check_choice("layout", layout, tuple(LAYOUTS))
    if "activation" in options:
        raise ValueError("activation: expected none, as each layer keeps the activation of its MLP, got a value")
    host = Layout(layout, 1 if windows is None else windows)
    kind = nn.Conv2d if layout == "channels_first" else nn.Linear
    mlps = [mlp for mlp in _find(model, kind) if select is None or select(mlp.name)]
    if not mlps:
        raise ValueError(
            "model: expected an MLP with fc1/act/fc2, a torch.nn.TransformerEncoderLayer, "
            f"or Sequential({kind.__name__}, GELU, {kind.__name__}){' that is selected' if select else ''}, got none: "
            "name your MLP's maps fc1 and fc2 and the module between them act, or put the three in a Sequential"
        )
    uses = Counter(id(held) for m in model.modules() for held in (*m._modules.values(), *m._parameters.values()))
    layers = {}
    for mlp in mlps:
        _check(mlp, model, uses, kind)
        source = route_from
        if options.get("routing") != "token":
            if windows is None:
                _check_windows(mlp, model)
            source = _route_from(mlp, model, route_from, host)
        layers[mlp.name] = _dex_layer(mlp, num_experts, top_k, host, route_from=source or "cls", **options)

    for mlp, (fc1, _, fc2) in _replace(mlps, layers, host):
        layers[mlp.name].replaced.add((*fc1.parameters(), *fc2.parameters()), "upcycle_")
    return layers


def _replace(mlps: list[_Mlp], layers: dict[str, DEXLayer], layout: Layout) -> list[tuple[_Mlp, list]]:
    """Put the layers in place and return the replaced modules. If the function of an MLP changes, all is restored."""
    replaced = []
    try:
        for mlp in mlps:
            before = _probe(mlp, layout)
            replaced.append((mlp, [mlp.get(place) for place in range(3)]))
            training = mlp.module.training
            mlp.place(layers[mlp.name], Absorbed().train(training), Absorbed().train(training))
            change = (_probe(mlp, layout) - before).norm()
            if not change <= (1e-3 if before.dtype == torch.float32 else 1e-9) * before.norm():
                raise _refused(
                    mlp,
                    "a module that computes fc2(gelu(fc1(x)))",
                    f"one whose output changes by {change:.1e}",
                    "move its other computations before fc1 or after fc2",
                )
    except Exception:
        for mlp, originals in reversed(replaced):
            mlp.place(*originals)
        raise
    return replaced


def to_dense_(model: nn.Module) -> list[str]:
    """Undo `upcycle_`, in place: the director of every DEX layer becomes the host's MLP, under the host's own names.

    The state dict then has the keys of the original model. The function equals that with ``layer.path = "director"``.

    Returns: the paths of the MLPs' modules. Raises: ValueError for a DEX layer that `upcycle_` did not place; the
    model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    _check_unwrapped(model, "to_dense_")
    mlps = list(_find(model, DEXLayer))
    placed = {id(mlp.get(0)) for mlp in mlps}
    for name, module in model.named_modules():
        if isinstance(module, DEXLayer) and id(module) not in placed:
            raise ValueError(
                f"model: expected DEX layers placed by upcycle_, got {name!r}; set its path to 'director' instead"
            )
    if not mlps:
        raise ValueError("model: expected DEX layers placed by upcycle_, got none")
    for mlp in mlps:
        layer = mlp.get(0)
        director = layer.director.requires_grad_(True)
        fc1, fc2 = (
            _convolution(linear) if layer.layout == "channels_first" else linear
            for linear in (director.fc1, director.fc2)
        )
        mlp.place(fc1, nn.GELU(ACTIVATIONS[layer.activation]).train(mlp.module.training), fc2)
    return [mlp.name for mlp in mlps]


def _check_unwrapped(model: nn.Module, call: str) -> None:
    """Raise ValueError if DDP or FSDP hold the parameters that ``call`` replaces: they would sum stale gradients."""
    for name, module in model.named_modules():
        if _path(module) in WRAPPERS:
            raise ValueError(
                f"{name or 'model'}: expected a model that is not yet distributed over ranks, got {_type(module)}: "
                f"call {call} first, then wrap the model"
            )


def _find(model: nn.Module, first: type[nn.Module]) -> Iterator[_Mlp]:
    """MLPs whose maps have type ``first``, Linear or Conv2d (not upcycled), or whose first is a `DEXLayer` (upcycled).

    Maps of other types in these places are found too, so that they can be refused.
    """
    inside_dex = {id(m) for layer in model.modules() if isinstance(layer, DEXLayer) for m in layer.modules()}
    for name, module in model.named_modules():
        if id(module) in inside_dex:
            continue
        mlp = _as_mlp(name, module, first)
        if mlp is None:
            continue
        upcycled = isinstance(mlp.get(0), DEXLayer)
        if upcycled == (first is DEXLayer) and (not upcycled or isinstance(mlp.get(2), Absorbed)):
            yield mlp


def _as_mlp(name: str, module: nn.Module, kind: type[nn.Module]) -> _Mlp | None:
    if isinstance(module, nn.TransformerEncoderLayer):
        return _Mlp(name, module, ENCODER_LAYER_PLACES, {"dropout": module.dropout})
    if isinstance(module, nn.Sequential):
        return _sequential(name, module, kind)
    if any(hasattr(module, name) for name in GATED):
        return _Mlp(name, module, GATED_PLACES, {})
    candidates = [_Mlp(name, module, places, {}) for places in PLACES]
    mlps = [mlp for mlp in candidates if isinstance(mlp.get(0), nn.Module) and isinstance(mlp.get(2), nn.Module)]
    if not mlps:
        return None
    mlp = next((mlp for mlp in mlps if mlp.get(1) is not None), mlps[0])
    owner = module.get_submodule(mlp.places[0].rpartition(".")[0])
    maps = [id(mlp.get(place)) for place in range(3)]
    mlp.inside.update({n: m for n, m in owner.named_children() if id(m) not in maps})
    return mlp


def _sequential(name: str, module: nn.Sequential, kind: type[nn.Module]) -> _Mlp | None:
    """Exactly two maps ``D -> H -> D``; the first other module between them, except dropouts, is the activation."""
    children = dict(module.named_children())
    names = list(children)
    dex = [n for n, m in children.items() if isinstance(m, DEXLayer)]
    if dex:
        absorbed = [n for n, m in children.items() if isinstance(m, Absorbed)]
        return _Mlp(name, module, (dex[0], *absorbed), {}) if (len(dex), len(absorbed)) == (1, 2) else None
    maps = [n for n, m in children.items() if isinstance(m, kind)]
    inputs, outputs = ("in_channels", "out_channels") if kind is nn.Conv2d else ("in_features", "out_features")
    if len(maps) != 2 or getattr(children[maps[0]], inputs) != getattr(children[maps[1]], outputs):
        return None
    between = names[names.index(maps[0]) + 1 : names.index(maps[1])]
    active = [n for n in between if not isinstance(children[n], (nn.Dropout, nn.Identity))]
    if not active:
        return None
    return _Mlp(name, module, (maps[0], active[0], maps[1]), {n: children[n] for n in between if n != active[0]})


def _check(mlp: _Mlp, model: nn.Module, uses: Counter, kind: type[nn.Module]) -> None:
    """Raise ValueError naming the part that would not compute the same."""
    if mlp.places is GATED_PLACES:
        raise _refused(mlp, "an MLP fc2(gelu(fc1(x)))", f"the gated {_type(mlp.module)}", "experts are not gated")
    fc1, act, fc2 = (mlp.get(place) for place in range(3))
    for place, linear in ((mlp.places[0], fc1), (mlp.places[2], fc2)):
        _check_map(mlp, place, linear, kind)
        if any(uses[id(held)] > 1 for held in (linear, *linear.parameters())):
            expected = f"unshared weights in {place}"
            raise _refused(mlp, expected, "weights shared with another module", "give it a copy.deepcopy of them")
    for place, module in zip(mlp.places, (fc1, act, fc2), strict=True):
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        if isinstance(module, nn.Module) and any(getattr(module, h) for h in hooks):
            raise _refused(mlp, f"no hooks on {place}", "hooks, which would be lost", "hook the MLP's module instead")
    (H, D), back = fc1.weight.shape[:2], tuple(fc2.weight.shape[:2])
    if back != (D, H):
        raise _refused(mlp, f"maps D -> H -> D, {mlp.places[2]} [{D}, {H}]", f"{list(back)} (a gated MLP?)")
    activation = _activation(act, fc1.weight)
    if activation is None:
        name = repr(act) if isinstance(act, nn.Module) else getattr(act, "__name__", repr(act))
        remedy = "if forward calls a function, make it a module, torch.nn.GELU()" if act is None else ""
        raise _refused(mlp, f"the exact (erf) or the tanh GELU as {mlp.places[1]}", name, remedy)
    if activation != "gelu" and getattr(mlp.module, "activation_relu_or_gelu", 0):
        raise _refused(
            mlp,
            "activation_relu_or_gelu = 0 with the tanh GELU",
            f"{mlp.module.activation_relu_or_gelu}, with which torch computes another activation in evaluation",
            "set it",
        )
    for name, module in mlp.inside.items():
        if isinstance(module, nn.Dropout) and module.p > 0:
            expected = f"no dropout in the MLP (set {name}.p = 0)"
            remedy = "an expert's hidden features are never dropped, so that the director can follow"
            raise _refused(mlp, expected, f"{name} with p={module.p}", remedy)
        if not isinstance(module, (nn.Dropout, nn.Identity)):
            expected = "only an activation between the maps"
            remedy = "move it before fc1 or after fc2, and train again"
            raise _refused(mlp, expected, f"{name}: {_type(module)}", remedy)
    _check_attention(mlp, model)


def _check_map(mlp: _Mlp, place: str, linear: nn.Module, kind: type[nn.Module]) -> None:
    """Raise ValueError unless a map is plain and loaded."""
    if type(linear) is not kind:
        remedy = "merge adapters and parametrizations into it first, or add them after upcycle_"
        if type(linear) in (nn.Linear, nn.Conv2d):
            remedy = "its layout differs: layout='channels_first' is for Conv2d, the others for Linear"
        raise _refused(mlp, f"torch.nn.{kind.__name__} as {place}", _type(linear), remedy)
    if kind is nn.Conv2d:
        plain = nn.Conv2d(linear.in_channels, linear.out_channels, 1, device="meta")
        names = ("kernel_size", "stride", "padding", "groups")
        if any(getattr(linear, name) != getattr(plain, name) for name in names):
            raise _refused(mlp, f"kernel size 1 and no stride, padding or groups in {place}", repr(linear))
    if _path(linear.weight) == DTENSOR:
        remedy = "call upcycle_ before dexkernels.shard or fully_shard"
        raise _refused(mlp, f"whole weights in {place}", "weights that are cut over ranks", remedy)
    if linear.bias is None:
        remedy = f"bias = torch.nn.Parameter(torch.zeros({linear.weight.shape[0]})) changes nothing"
        raise _refused(mlp, f"a bias in {place}", "bias=False", remedy)
    if linear.weight.dtype not in (torch.float32, torch.float64):
        remedy = "model.float(), and autocast for half precision"
        raise _refused(mlp, f"float32 or float64 weights in {place}", f"{linear.weight.dtype}", remedy)
    if linear.weight.is_meta:
        raise _refused(mlp, f"loaded weights in {place}", "the meta device", "load the weights, then call upcycle_")


def _check_windows(mlp: _Mlp, model: nn.Module) -> None:
    """Raise ValueError if a window may be mistaken for an image."""
    parts = mlp.name.split(".") if mlp.name else []
    around = [model.get_submodule(".".join(parts[:end])) for end in range(len(parts), -1, -1)]
    if any(_path(module) in WHOLE_IMAGES for module in around):
        return
    for module in (*around, *(around[1].children() if len(around) > 1 else ())):
        values = {mark: getattr(module, mark, None) for mark in WINDOW_MARKS}
        mark = next((m for m, v in values.items() if v is not None and not (isinstance(v, int) and v == 0)), None)
        if mark is not None:
            raise _refused(
                mlp,
                "windows=1 (the MLP sees all tokens of an image at once) or its number of windows per image",
                f"None, and {_type(module)}.{mark}: images may be cut into windows, each routed separately",
            )


def _check_attention(mlp: _Mlp, model: nn.Module) -> None:
    block = model.get_submodule(mlp.name.rpartition(".")[0])
    for module in (*mlp.module.children(), *block.children()):
        if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
            raise _refused(
                mlp,
                "[B, N, D] (attention with batch_first=True)",
                "[N, B, D] (batch_first=False)",
                "build the host with batch_first=True and transpose its input; its weights stay",
            )
    for name, host in model.named_modules():
        nested = isinstance(host, nn.TransformerEncoder) and host.use_nested_tensor
        if nested and any(layer is mlp.module for layer in host.layers):
            raise _refused(
                mlp,
                f"no nested tensors in {name or 'model'} (set use_nested_tensor = False)",
                "a fast path that sets padded tokens to 0 in evaluation and bypasses the MLP",
            )


def _route_from(mlp: _Mlp, model: nn.Module, route_from: str | None, layout: Layout) -> str:
    """The source of routing decisions; refused unless it is certain that it is not a patch."""
    if layout != Layout():
        return route_from or "mean"
    parts = mlp.name.split(".") if mlp.name else []
    for end in range(len(parts), -1, -1):
        host = model.get_submodule(".".join(parts[:end]))
        if _path(host) in NO_CLS and route_from != "mean":
            raise _refused(mlp, f"route_from='mean', as {_type(host)} has no CLS token", repr(route_from))
        attribute = CLS_FIRST.get(_path(host))
        if attribute is not None:
            owner, _, token = attribute.rpartition(".")
            has_cls = getattr(host.get_submodule(owner), token, None) is not None
            if has_cls or route_from == "mean":
                return route_from or "cls"
            raise _refused(mlp, f"route_from='mean', as {_type(host)} has no CLS token", repr(route_from))
    if route_from is None:
        raise _refused(
            mlp,
            "route_from='cls' (the CLS token is token 0 of every block) or 'mean' (there is none)",
            "None, and a host that is not known to have a CLS token: pass one of them, or leave this part out",
        )
    return route_from


def _activation(act, like: Tensor) -> str | None:
    """The name in `ACTIVATIONS` whose values match, since hosts have their own classes. The two are 5e-4 apart."""
    if not callable(act) or (isinstance(act, nn.Module) and list(act.parameters())):
        return None
    t = torch.linspace(-6, 6, 257, dtype=like.dtype, device=like.device)
    with torch.no_grad():
        try:
            values = act(t.clone())
            close = {n: (values - F.gelu(t, approximate=a)).abs().max() < 1e-5 for n, a in ACTIVATIONS.items()}
            return next((name for name, is_close in close.items() if is_close), None)
        except Exception:  # Such as a gated activation, which halves the width.
            return None


@torch.no_grad()
def _dex_layer(mlp: _Mlp, num_experts: int, top_k: int, layout: Layout, **options) -> DEXLayer:
    fc1, fc2 = mlp.get(0), mlp.get(2)
    (H, D), activation = fc1.weight.shape[:2], _activation(mlp.get(1), fc1.weight)
    options |= {"activation": activation, "layout": layout.name, "windows": layout.windows}
    with torch.device(fc1.weight.device):
        layer = DEXLayer(D, H, num_experts, top_k, **options)
    layer.to(fc1.weight.dtype).train(mlp.module.training)
    for target, source in ((layer.director.fc1, fc1), (layer.director.fc2, fc2)):
        target.weight.copy_(source.weight.flatten(1))
        target.bias.copy_(source.bias)
    layer.copy_director_to_experts_()
    return layer


def _convolution(linear: nn.Linear) -> nn.Conv2d:
    """The same map as a 1x1 convolution over ``[B, D, H, W]``, sharing the storage."""
    convolution = nn.Conv2d(linear.in_features, linear.out_features, 1, device="meta").train(linear.training)
    convolution.weight = nn.Parameter(linear.weight.detach()[:, :, None, None])
    convolution.bias = linear.bias
    return convolution


@torch.no_grad()
def _probe(mlp: _Mlp, layout: Layout) -> Tensor:
    """The host's outputs for two random images of three tokens (per window), since names alone prove nothing.

    It runs in evaluation, which may use a fused path, and in training, which reveals a functional dropout. Modules
    with buffers, such as running means, are not run in training, which would change the buffers.
    """
    first = mlp.get(0).director.fc1 if isinstance(mlp.get(0), DEXLayer) else mlp.get(0)
    device, width = first.weight.device, first.weight.shape[1]
    shapes = {"tokens": (3, width), "channels_last": (3, 1, width), "channels_first": (width, 3, 1)}
    shape = (2 * layout.windows, *shapes[layout.name])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(first.weight)
    modes = {module: module.training for module in mlp.module.modules()}
    stateful = any(module._buffers for module in modes if not isinstance(module, DEXLayer))
    answers = []
    try:
        # Keeps the caller's random state, and dropout draws the same numbers before and after the replacement.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for training in (False,) if stateful else (False, True):
                mlp.module.train(training)
                answers.append(_run(mlp, x))
    except Exception as error:
        expected = LAYOUTS[layout.name].replace("D", str(width))
        raise _refused(mlp, f"a module that takes {expected}", f"{_type(error)}: {error}") from error
    finally:
        for module, training in modes.items():
            module.training = training
    return torch.cat(answers)


def _run(mlp: _Mlp, x: Tensor) -> Tensor:
    if mlp.places != PLACES[-1]:
        return mlp.module(x)
    h, output = mlp.module.intermediate(x), mlp.module.output
    return output(h, x) if len(inspect.signature(output.forward).parameters) > 1 else output(h)


def _refused(mlp: _Mlp, expected: str, got: str, remedy: str = "") -> ValueError:
    leave = f"leave it dense: select=lambda path: path != {mlp.name!r}" if mlp.name else ""
    hints = "; or ".join(hint for hint in (remedy, leave) if hint)
    return ValueError(f"{mlp.name or 'model'}: expected {expected}, got {got}{': ' if hints else ''}{hints}")


def _path(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _type(module) -> str:
    return type(module).__name__
