"""`upcycle_` keeps the host's function, or says what it cannot keep; `to_dense_` gives the host back."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dexkernels
from dexkernels import DEXLayer
from dexkernels.testing import relative_error

from .hosts import DEPTH, HOSTS, Block, D, H, TimmMlp, encoder, look_trained_, need, tokens, vit_config

E, K = 4, 2


def answer(host, model, mode, x):
    """Output, and in training the gradient of x, in one of the host's modes; dropout draws the same each time."""
    torch.manual_seed(7)
    model.train(mode == "train")
    if mode == "no_grad":
        with torch.no_grad():
            return [host.output(model(x))]
    if mode == "inference":
        with torch.inference_mode():
            return [host.output(model(x))]
    x = x.clone().requires_grad_()
    y = host.output(model(x))
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    return [y.detach(), grad]


def pair(host, dtype, top_k=K):
    dense = look_trained_(host.build().to(dtype))
    model = copy.deepcopy(dense).eval()
    layers = dexkernels.upcycle_(model, E, top_k, route_from=host.route_from)
    assert list(layers) == host.names
    assert not any(module.training for module in model.modules())
    return dense, model, layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_function_is_the_same(host, mode, dtype, top_k):
    dense, model, layers = pair(host, dtype, top_k)
    x = host.inputs(1).to(dtype)
    want, got = answer(host, dense, mode, x), answer(host, model, mode, x)
    bound = 2e-6 if dtype == torch.float32 else 4e-15
    assert max(relative_error(g, w) for g, w in zip(got, want, strict=True)) < bound
    # The layers are in use: another expert changes the answer.
    for layer in layers.values():
        with torch.no_grad():
            layer.experts.fc2_bias[:, 0] += 1  # a norm would take out the same change of all
    assert relative_error(answer(host, model, mode, x)[0], want[0]) > 1e-3


def test_a_few_steps_of_training(host):
    _, model, layers = pair(host, torch.float32)
    model.train()
    x = host.inputs(2)
    target = torch.randn(host.output(model(x)).shape, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(6):
        director = [layer.director.fc1.weight.clone() for layer in layers.values()]
        with dexkernels.collect_aux(model, noise_std=0.5) as aux:
            y = host.output(model(x))
        loss = F.mse_loss(y, target) + aux.losses(align=0.01, balance=0.01)
        loss.backward()
        assert all(layer.experts.fc1_weight.grad.isfinite().all() for layer in layers.values())
        aux.update_directors(0.9)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for before, layer in zip(director, layers.values(), strict=True):
        assert not torch.equal(before, layer.director.fc1.weight)
        spread = layer.experts.fc1_weight.std(0).max()
        assert spread > 1e-3


def test_way_back(host):
    dense, model, layers = pair(host, torch.float32)
    for layer in layers.values():
        look_trained_(layer.director, 5)
        layer.path = "director"
    x = host.inputs(4)
    for mode in ("eval", "no_grad"):
        want = answer(host, model, mode, x)
        there = copy.deepcopy(model)
        assert dexkernels.to_dense_(there) == host.names
        assert relative_error(answer(host, there, mode, x)[0], want[0]) < 2e-6
        assert relative_error(answer(host, dense, mode, x)[0], want[0]) > 1e-3
    assert list(there.state_dict()) == list(dense.state_dict())
    assert [p.requires_grad for p in there.parameters()] == [p.requires_grad for p in dense.parameters()]
    dense.load_state_dict(there.state_dict())
    assert relative_error(answer(host, dense, "eval", x)[0], want[0]) < 2e-6
    # And it is a host again.
    assert list(dexkernels.upcycle_(there, E, K, route_from=host.route_from)) == host.names


def test_options_reach_the_layers():
    layers = dexkernels.upcycle_(encoder(), 5, 3, route_from="mean", align="cosine", temperature=1.0)
    assert {(n.num_experts, n.top_k, n.route_from, n.align, n.temperature) for n in layers.values()} == {
        (5, 3, "mean", "cosine", 1.0)
    }


def test_select_and_parts():
    model = encoder()
    assert list(dexkernels.upcycle_(model, E, K, route_from="cls", select=lambda name: name != "layers.1")) == [
        "layers.0",
        "layers.2",
    ]
    assert list(dexkernels.upcycle_(model, E, K, route_from="cls")) == ["layers.1"]
    with pytest.raises(ValueError, match="model: expected an MLP .* got none"):
        dexkernels.upcycle_(model, E, K, route_from="cls")


def test_vit_mae_decoder_is_left_out_or_refused():
    """The decoder of ViTMAE has no CLS token of its own that we know of."""
    config = vit_config("ViTMAEConfig", decoder_hidden_size=D, decoder_intermediate_size=H, decoder_num_hidden_layers=1)
    model = need("transformers").ViTMAEForPreTraining(config)
    with pytest.raises(ValueError, match=r"decoder\.decoder_layers\.0\.mlp: expected route_from"):
        dexkernels.upcycle_(model, E, K)
    assert not any(isinstance(m, DEXLayer) for m in model.modules())
    assert len(dexkernels.upcycle_(model.vit, E, K)) == DEPTH
    with dexkernels.collect_aux(model) as aux:
        loss = model(torch.randn(4, 3, 16, 16)).loss
    (loss + aux.losses()).backward()
    aux.update_directors(0.9)


@pytest.mark.parametrize("name", ["ViT", "ViTMAE", "DeiT", "Dinov2", "ViTMSN"])
def test_known_transformers_have_the_cls_token_first(name):
    """Token 0 after the embeddings is the same for all images, and no other token is; the MLPs keep the function."""
    transformers = need("transformers")
    options = {"mask_ratio": 0.0} if name == "ViTMAE" else {"mlp_ratio": 2} if name == "Dinov2" else {}
    model = look_trained_(getattr(transformers, f"{name}Model")(vit_config(f"{name}Config", **options))).eval()
    embedded = []
    hook = model.embeddings.register_forward_hook(lambda *call: embedded.append(call[-1]))
    x = torch.randn(2, 3, 16, 16)
    want = model(x).last_hidden_state[:, 0]
    hook.remove()
    t = embedded[0] if isinstance(embedded[0], torch.Tensor) else embedded[0][0]
    same = (t[0] == t[1]).all(-1)
    assert same[0] and not same[2:].any()
    assert {layer.route_from for layer in dexkernels.upcycle_(model, E, K).values()} == {"cls"}
    assert relative_error(model(x).last_hidden_state[:, 0], want) < 2e-6


class AppendsCls(nn.Module):
    """Owns a ``cls_token``, but as its last token: the attribute proves nothing."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.blocks = nn.ModuleList([Block(TimmMlp())])


class QuickGelu(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Grn(TimmMlp):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(H)


class Doubled(TimmMlp):
    def forward(self, x):
        return self.fc2(2 * self.act(self.fc1(x)))


class Outside(TimmMlp):
    """What is done to the MLP's output stays in its module."""

    def forward(self, x):
        return 0.5 * super().forward(x) + x


class FunctionalDropout(TimmMlp):
    def forward(self, x):
        return self.fc2(F.dropout(self.act(self.fc1(x)), 0.5, self.training))


class SwiGlu(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(D, H), nn.Linear(D, H), nn.Linear(H, D)


class GluMlp(TimmMlp):
    def __init__(self):
        super().__init__()
        self.fc2 = nn.Linear(H // 2, D)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, H), nn.Linear(H, D)


def changed(model, change):
    change(model)
    return model


def in_block(mlp):
    return nn.Sequential(Block(mlp))


def shared():
    first, second = TimmMlp(), TimmMlp()
    second.fc1 = first.fc1
    return nn.Sequential(Block(first), Block(second))


def sequence_first():
    model = in_block(TimmMlp())
    model[0].attn.batch_first = False
    return model


REFUSED = {
    "relu": (
        lambda: encoder(activation="relu"),
        r"layers\.0: expected the exact \(erf\) or the tanh GELU as activation, got relu: leave it dense: select=",
    ),
    "tanh gelu that torch fuses as the exact one": (
        lambda: encoder(activation=nn.GELU("tanh")),
        r"layers\.0: expected activation_relu_or_gelu = 0 with the tanh GELU",
    ),
    "quick gelu": (lambda: in_block(TimmMlp(act=QuickGelu)), r"0\.mlp: .*tanh GELU as act, got QuickGelu"),
    "functional activation": (lambda: in_block(Functional()), r"0\.mlp: expected the exact .* GELU as act, got None"),
    "relu in a sequence": (
        lambda: in_block(nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D))), r"0\.mlp: .*GELU as 1, got ReLU"
    ),
    "inner dropout": (
        lambda: nn.TransformerEncoderLayer(D, 2, H, activation="gelu", batch_first=True),
        r"model: expected no dropout in the MLP \(set dropout\.p = 0\), got dropout with p=0\.1",
    ),
    "inner dropout, timm": (lambda: in_block(TimmMlp(drop=0.2)), r"0\.mlp: .*set drop1\.p = 0.*p=0\.2"),
    "inner dropout, sequence": (
        lambda: in_block(nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Dropout(0.2), nn.Linear(H, D))),
        r"0\.mlp: .*set 2\.p = 0",
    ),
    "norm between the maps": (lambda: in_block(Grn()), r"0\.mlp: .*between the maps, got norm: LayerNorm"),
    "another forward": (lambda: in_block(Doubled()), r"0\.mlp: expected a module that computes fc2\(gelu"),
    "functional dropout": (lambda: in_block(FunctionalDropout()), r"0\.mlp: expected a module that computes fc2"),
    "no [B, N, D]": (
        lambda: in_block(nn.Sequential(nn.Flatten(), nn.Linear(D, H), nn.GELU(), nn.Linear(H, D))),
        r"0\.mlp: expected a module that takes \[B, N, 16\], got RuntimeError",
    ),
    "gated": (lambda: in_block(SwiGlu()), r"0\.mlp: expected an MLP fc2\(gelu\(fc1\(x\)\)\), got the gated SwiGlu"),
    "gated by halves": (lambda: in_block(GluMlp()), r"0\.mlp: expected maps D -> H -> D.*gated"),
    "no bias": (lambda: changed(in_block(TimmMlp()), lambda m: setattr(m[0].mlp.fc2, "bias", None)), r"bias in fc2"),
    "half precision": (lambda: in_block(TimmMlp()).bfloat16(), r"0\.mlp: expected float32.*bfloat16"),
    "meta": (lambda: in_block(TimmMlp()).to("meta"), r"0\.mlp: expected loaded weights"),
    "not a plain Linear": (
        lambda: changed(in_block(TimmMlp()), lambda m: nn.utils.parametrizations.spectral_norm(m[0].mlp.fc1)),
        r"0\.mlp: expected torch\.nn\.Linear as fc1, got Parametrized",
    ),
    "convolution": (
        lambda: changed(in_block(TimmMlp()), lambda m: setattr(m[0].mlp, "fc1", nn.Conv2d(D, H, 1))), r"got Conv2d"
    ),
    "hooks": (
        lambda: changed(in_block(TimmMlp()), lambda m: m[0].mlp.fc1.register_forward_hook(print)), r"no hooks on fc1"
    ),
    "shared weights": (shared, r"0\.mlp: expected unshared weights in fc1"),
    "[N, B, D]": (lambda: encoder(batch_first=False), r"layers\.0: expected \[B, N, D\] .* got \[N, B, D\]"),
    "[N, B, D] beside attention": (sequence_first, r"0\.mlp: expected \[B, N, D\]"),
    "nested tensors": (
        lambda: changed(encoder(False), lambda m: setattr(m, "use_nested_tensor", True)),
        r"layers\.0: expected no nested tensors in model",
    ),
    "nothing to replace": (lambda: nn.Linear(D, D), r"model: expected an MLP"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    build, message = REFUSED[case]
    model = build()
    state, text = model.state_dict(), repr(model)
    with pytest.raises(ValueError, match=message):
        dexkernels.upcycle_(model, E, K, route_from="cls")
    assert repr(model) == text
    assert all(
        t is s or t.data_ptr() == s.data_ptr() for t, s in zip(model.state_dict().values(), state.values(), strict=True)
    )


def test_a_late_refusal_undoes_the_earlier_layers():
    dense = nn.Sequential(encoder(), Block(TimmMlp()), Block(Doubled()))
    x = tokens(0)
    text, want = repr(dense), dense.eval()(x)
    with torch.no_grad():
        fused = dense(x)
    with pytest.raises(ValueError, match=r"2\.mlp"):
        dexkernels.upcycle_(dense, E, K, route_from="cls")
    assert repr(dense) == text and dense[0].layers[0].activation is F.gelu
    assert torch.equal(dense(x), want)
    with torch.no_grad():
        assert torch.equal(dense(x), fused)  # with the fused path back


def test_fused_path_is_off_and_back():
    model = encoder()
    dexkernels.upcycle_(model, E, K, route_from="cls")
    assert {layer.activation_relu_or_gelu for layer in model.layers} == {0}
    dexkernels.to_dense_(model)
    assert {layer.activation_relu_or_gelu for layer in model.layers} == {2}
    assert all(p.requires_grad for p in model.parameters())


def test_what_is_around_the_maps_stays():
    dense = look_trained_(in_block(Outside()))
    model = copy.deepcopy(dense)
    dexkernels.upcycle_(model, E, K, route_from="cls")
    assert relative_error(model.eval()(tokens(0)), dense.eval()(tokens(0))) < 2e-6


def test_running_statistics_do_not_move():
    mlp = nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D), nn.BatchNorm1d(3))
    dexkernels.upcycle_(in_block(mlp), E, K, route_from="cls")
    assert mlp[3].num_batches_tracked == 0


def test_padding_mask_keeps_the_function():
    dense = look_trained_(encoder(False)).eval()
    model = copy.deepcopy(dense)
    dexkernels.upcycle_(model, E, K, route_from="mean")
    x, mask = tokens(0), torch.zeros(4, 5, dtype=torch.bool)
    mask[1, 3:] = True
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            want = dense(x, src_key_padding_mask=mask)
            assert relative_error(model(x, src_key_padding_mask=mask), want) < 2e-6


@pytest.mark.parametrize("build", [encoder, AppendsCls, lambda: in_block(TimmMlp())])
def test_an_unknown_host_must_say_where_to_route(build):
    model = build()
    with pytest.raises(ValueError, match="expected route_from='cls' .* or 'mean'"):
        dexkernels.upcycle_(model, E, K)
    assert dexkernels.upcycle_(model, E, K, routing="token")  # routes every token by itself


def test_a_known_host_without_its_cls_token():
    model = need("transformers").ViTModel(vit_config("ViTConfig"))
    model.embeddings.cls_token = None
    for route_from in (None, "cls"):
        with pytest.raises(ValueError, match=r"layers\.0\.mlp: expected route_from='mean', as ViTModel has no CLS"):
            dexkernels.upcycle_(model, E, K, route_from=route_from)
    assert dexkernels.upcycle_(model, E, K, route_from="mean")


def test_a_timm_host_without_cls_token():
    need("timm")
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=D, depth=1, num_heads=2, class_token=False, global_pool="avg"
    )
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp: expected route_from='mean'"):
        dexkernels.upcycle_(model, E, K)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 0}, "num_experts: expected a positive integer"),
        ({"top_k": 5}, "top_k: expected an integer in 1..num_experts"),
        ({"route_from": "patch"}, "route_from: expected 'cls', 'mean' or None, got 'patch'"),
        ({"select": ["layers.0"]}, "select: expected a function"),
        ({"align": "l1"}, "align: expected one of"),
    ],
)
def test_wrong_arguments(arguments, message):
    model = encoder()
    with pytest.raises(ValueError, match=message):
        dexkernels.upcycle_(model, **{"num_experts": E, "top_k": K, "route_from": "cls"} | arguments)
    assert not any(isinstance(m, DEXLayer) for m in model.modules())


def test_not_a_model():
    for function in (dexkernels.upcycle_, dexkernels.to_dense_, dexkernels.collect_aux):
        with pytest.raises(ValueError, match="model: expected a torch.nn.Module, got list"):
            function([])


def test_to_dense_refuses_layers_it_did_not_place():
    model = nn.Sequential(encoder(), Block(DEXLayer(D, H, E, K)))
    dexkernels.upcycle_(model, E, K, route_from="cls")
    text = repr(model)
    with pytest.raises(ValueError, match=r"got '1\.mlp'"):
        dexkernels.to_dense_(model)
    assert repr(model) == text
    by_hand = TimmMlp()
    by_hand.fc1, by_hand.fc2 = DEXLayer(D, H, E, K), nn.Linear(D, D)
    with pytest.raises(ValueError, match=r"got '0\.mlp\.fc1'"):
        dexkernels.to_dense_(in_block(by_hand))
    with pytest.raises(ValueError, match="got none"):
        dexkernels.to_dense_(encoder())


def test_zero_second_map_is_no_obstacle():
    """Residual branches that start at zero have no norm to compare with."""
    model = in_block(TimmMlp())
    nn.init.zeros_(model[0].mlp.fc2.weight), nn.init.zeros_(model[0].mlp.fc2.bias)
    assert dexkernels.upcycle_(model, E, K, route_from="cls")


def test_random_numbers_of_the_caller_are_those_of_the_layers_alone():
    """The probe draws from a generator of its own."""
    model, built = in_block(TimmMlp()), DEXLayer
    torch.manual_seed(0)
    dexkernels.upcycle_(model, E, K, route_from="cls")
    after = torch.rand(1)
    torch.manual_seed(0)
    built(D, H, E, K)
    assert torch.equal(torch.rand(1), after)


def test_every_kind_of_host_is_here():
    assert {"torch-pre-norm", "torch-post-norm", "transformers-vit", "timm-vit", "timm-structure"} <= set(HOSTS)


def test_an_optimizer_that_was_built_before_is_noticed_at_the_first_update(host):
    model, x = look_trained_(host.build()), host.inputs(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    dexkernels.upcycle_(model, E, K, route_from=host.route_from)
    with dexkernels.collect_aux(model) as aux:
        loss = host.output(model(x)).square().mean()
    (loss + aux.losses()).backward()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(ValueError, match="optimizer: expected one that was built after upcycle_, got AdamW with "):
        aux.update_directors(0.9)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    del optimizer


def test_replaced_parameters_that_no_optimizer_holds_are_no_error(host):
    model, x = look_trained_(host.build()), host.inputs(1)
    kept = list(model.parameters())
    dexkernels.upcycle_(model, E, K, route_from=host.route_from)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with dexkernels.collect_aux(model) as aux:
        loss = host.output(model(x)).square().mean()
    (loss + aux.losses()).backward()
    aux.update_directors(0.9)
    optimizer.step()
    assert set(kept) - set(model.parameters())
