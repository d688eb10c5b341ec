"""`dex.model.mae`: masks, losses, layer weighting, the monolithic control, and an encoder written out anew."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from dex.model import MaskedAutoencoder, VisionTransformer, patchify, sincos_pos_embed, unpatchify
from dex.model import mae as dex_model
from dexkernels import align_loss

RECORDED = Path(__file__).parents[2] / "recorded" / "mae_tiny_8_steps.safetensors"


def build(**options):
    """A tiny model in float64 whose experts, directors, biases and norms all differ; seeded."""
    seed = options.pop("seed", 0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_experts": 4, "top_k": 2}
    sizes |= {"decoder_embed_dim": 12, "decoder_depth": 2, "decoder_num_heads": 3}
    torch.manual_seed(seed)
    model = MaskedAutoencoder(**(sizes | options)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def images(B=3, S=16, C=3, seed=1):
    return torch.randn(B, C, S, S, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def snapshot(module):
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def same_states(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def patches_by_hand(image, P):
    """``[C, S, S] -> [L, P*P*C]``: row-major patches; in each, row, column, then channel (the original MAE's order)."""
    C, S, _ = image.shape
    rows = []
    for i in range(0, S, P):
        for j in range(0, S, P):
            rows.append([image[c, i + y, j + x].item() for y in range(P) for x in range(P) for c in range(C)])
    return torch.tensor(rows, dtype=image.dtype)


# Encoder


def plain_encoder(model, x, kept=None):
    """The encoder from its weights in plain torch: a convolution, softmax attention, a loop over images and experts."""
    state, encoder = model.reference_state_dict(), model.encoder
    D, heads = state["cls_token"].shape[2], encoder.blocks[0].attn.num_heads
    t = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=encoder.patch_size)
    t = t.flatten(2).transpose(1, 2) + state["pos_embed"][:, 1:]
    if kept is not None:
        t = torch.stack([row[ids] for row, ids in zip(t, kept, strict=True)])
    t = torch.cat([(state["cls_token"] + state["pos_embed"][:, :1]).expand(len(x), -1, -1), t], 1)

    def norm(name, h):
        h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return h * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(name, h):
        return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def mlp(name, h):
        z = linear(f"{name}.fc1", h)
        return linear(f"{name}.fc2", z * 0.5 * (1 + torch.erf(z / math.sqrt(2))))

    for i in range(len(encoder.blocks)):
        block = f"blocks.{i}"
        q, k, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", t)).chunk(3, -1)
        q, k, v = (h.unflatten(-1, (heads, D // heads)).transpose(1, 2) for h in (q, k, v))
        attention = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(D // heads), -1) @ v
        t = t + linear(f"{block}.attn.proj", attention.transpose(1, 2).flatten(2))
        h = norm(f"{block}.norm2", t)
        if not encoder.dex_layers:
            t = t + mlp(f"{block}.mlp", h)
            continue
        outs = []
        for image in h:
            p = torch.softmax(state[f"{block}.DEX.router.linear.weight"] @ image[0] / 0.5, 0)
            top, chosen = p.topk(encoder.dex_layers[i].top_k)
            gates = top / top.sum()
            outs.append(
                sum(g * mlp(f"{block}.DEX.experts.{e}", image) for g, e in zip(gates, chosen.tolist(), strict=True))
            )
        t = t + torch.stack(outs)
    return norm("norm", t)


@pytest.mark.parametrize(
    "options", [{}, {"num_experts": 0}, {"num_experts": [2, 5, 3], "top_k": [1, 3, 3]}, {"in_chans": 1}]
)
def test_encoder_against_plain_torch(options):
    model = build(**options)
    x = images(C=options.get("in_chans", 3))
    with torch.no_grad():
        got = model.encoder(x)
        assert got.shape == (3, 17, 16)
        torch.testing.assert_close(got, plain_encoder(model, x), rtol=1e-10, atol=1e-11)
        kept = torch.tensor([[5, 0, 9], [1, 2, 3], [15, 8, 4]])
        some, auxes = model.encoder.forward_aux(x, kept)
        torch.testing.assert_close(some, plain_encoder(model, x, kept), rtol=1e-10, atol=1e-11)
        assert auxes == []


def test_attention_heads_are_separate():
    """A change of one head's values reaches only what its output projection reads."""
    model = build(depth=1)
    attention = model.encoder.blocks[0].attn
    with torch.no_grad():
        attention.proj.weight.copy_(torch.eye(16))
        x = torch.randn(2, 5, 16, dtype=torch.float64)
        before = attention(x)
        attention.qkv.weight[32:40] += 1
        moved = (attention(x) - before).abs().amax((0, 1)) > 0
    assert moved.tolist() == [True] * 8 + [False] * 8


# Masking and losses


def test_shapes():
    model, x = build(num_experts=[2, 5, 3], top_k=[1, 3, 3]), images()
    out = model(x)
    assert out.loss.shape == out.align_loss.shape == out.balance_loss.shape == ()
    assert out.pred.shape == x.shape and out.mask.shape == (3, 16) and out.image_loss.shape == (3,)
    assert [m.shape for m in out.gate_mass] == [(2,), (5,), (3,)]
    assert [g.shape for g in out.gates] == [i.shape for i in out.expert_indices] == [(3, 1), (3, 3), (3, 3)]
    assert all(i.dtype == torch.int32 for i in out.expert_indices)
    assert not any(t.requires_grad for t in [*out.gate_mass, *out.gates, out.image_loss, out.mask])
    assert all(m.sum().item() == pytest.approx(3) for m in out.gate_mass)


@pytest.mark.parametrize(("ratio", "kept"), [(0.75, 4), (0.0, 16), (0.5, 8), (0.9, 1), (0.93, 1), (0.6, 6), (0.3, 11)])
def test_mask_keeps_the_first_of_the_ascending_noise(ratio, kept):
    model, x = build(), images()
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(3))
    mask = model(x, mask_ratio=ratio, mask_noise=noise).mask
    for row, order in zip(mask, noise, strict=True):
        first = sorted(range(16), key=lambda i, o=order: o[i].item())[:kept]
        assert row.tolist() == [0.0 if i in first else 1.0 for i in range(16)]


def test_mask_ties_keep_the_lower_patch():
    """256 patches: a sort that is not stable keeps the order of a few by chance."""
    mask = build(patch_size=1, depth=1)(images(B=2), mask_noise=torch.zeros(2, 256)).mask
    assert mask.tolist() == [[0.0] * 64 + [1.0] * 192] * 2


def test_only_kept_patches_are_seen():
    model, x = build(), images()
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(3))
    out = model(x, mask_noise=noise)
    removed = out.mask.view(3, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3).bool()
    again = model(torch.where(removed, x**2, x), mask_noise=noise)
    assert torch.equal(again.pred, out.pred) and not torch.equal(again.loss, out.loss)
    seen = model(torch.where(removed, x, x**2), mask_noise=noise)
    assert not torch.equal(seen.pred, out.pred)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("ratio", [0.75, 0.3])
def test_loss_by_hand(norm_pix_loss, ratio):
    model, x = build(norm_pix_loss=norm_pix_loss), images()
    out = model(x, mask_ratio=ratio)
    total, of_images = [], []
    for image, pred, mask in zip(x, out.pred.detach(), out.mask, strict=True):
        target, got = patches_by_hand(image, 4).numpy(), patches_by_hand(pred, 4).numpy()
        if norm_pix_loss:
            target = (target - target.mean(1, keepdims=True)) / np.sqrt(target.var(1, ddof=1, keepdims=True) + 1e-6)
        errors = [((g - t) ** 2).mean() for g, t, m in zip(got, target, mask, strict=True) if m == 1]
        total += errors
        of_images.append(np.mean(errors))
    assert out.loss.item() == pytest.approx(np.mean(total), rel=1e-12)
    assert out.image_loss.tolist() == pytest.approx(of_images, rel=1e-12)
    assert out.image_loss.mean().item() == pytest.approx(out.loss.item(), rel=1e-12)


def test_norm_pix_loss_is_the_default():
    assert MaskedAutoencoder(8, 4, 8, 1, 1, 2, 1, 8, 1, 1).norm_pix_loss


def test_nothing_removed_gives_zero_loss():
    out = build()(images(), mask_ratio=0)
    assert out.loss == 0 and out.image_loss.tolist() == [0.0] * 3
    out.loss.backward()


def test_decoder_puts_every_token_in_its_place():
    """With an identity for a decoder body the prediction of a patch depends on that patch's token and place alone."""
    model, x = build(decoder_depth=1), images(B=2)
    model.decoder_blocks = torch.nn.ModuleList()
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(3))
    out = model(x, mask_noise=noise)
    with torch.no_grad():
        order = noise.argsort(1)
        latent = model.decoder_embed(plain_encoder(model, x, order[:, :4]))
        for b in range(2):
            tokens = model.mask_token[0].expand(16, -1).clone()
            for rank, patch in enumerate(order[b, :4].tolist()):
                tokens[patch] = latent[b, 1 + rank]
            want = model.decoder_pred(model.decoder_norm(tokens + model.decoder_pos_embed[0, 1:]))
            torch.testing.assert_close(patches_by_hand(out.pred[b], 4), want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_of_half_precision_images_counts_patches_exactly(dtype):
    """273 removed patches: not a number in bfloat16, whose neighbours are 272 and 274."""
    model = build(img_size=11, patch_size=1, in_chans=2, depth=1).to(dtype).eval()
    out = model(images(S=11, C=2).to(dtype))
    assert out.mask.sum(dtype=torch.float64) == 273 and out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(out.image_loss.double().mean().item(), rel=1e-5)


def test_seeds():
    x = images()

    def run(seed, **options):
        model = build(seed=0)
        torch.manual_seed(seed)
        return model(x, noise_std=1.0, **options)

    a, b, c = run(1), run(1), run(2)
    assert torch.equal(a.mask, b.mask) and torch.equal(a.loss, b.loss)
    assert all(torch.equal(u, v) for u, v in zip(a.gates, b.gates, strict=True))
    assert not torch.equal(a.mask, c.mask)
    assert len({tuple(row) for row in a.mask.tolist()}) == 3
    fixed = torch.rand(3, 16)
    d, e = run(1, mask_noise=fixed), run(2, mask_noise=fixed)
    assert torch.equal(d.mask, e.mask) and not torch.equal(d.gates[0], e.gates[0])


def test_initial_weights_follow_the_seed():
    assert same_states(build(seed=3).state_dict(), build(seed=3).state_dict())
    assert not same_states(build(seed=3).state_dict(), build(seed=4).state_dict())


def test_initialisation():
    torch.manual_seed(0)
    model = MaskedAutoencoder(16, 4, 64, 2, 2, 4, 2, 32, 1, 2)
    layer = model.encoder.dex_layers[0]
    stacks = [layer.director.fc1.weight.detach(), *layer.experts.fc1_weight.detach()]
    assert len({t.flatten()[0].item() for t in stacks}) == 5
    for t in [*stacks, layer.router_weight.detach(), model.encoder.patch_embed.weight, model.decoder_pred.weight]:
        bound = math.sqrt(6 / sum(t.shape))
        assert 0.9 * bound < t.abs().max() <= bound
        assert t.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)
    for name, t in model.named_parameters():
        if name.endswith("bias"):
            assert t.count_nonzero() == 0, name
    assert 0.01 < model.encoder.cls_token.std() < 0.03 and 0.01 < model.mask_token.std() < 0.03


# Auxiliary losses and the update


@pytest.mark.parametrize("depth", [1, 3])
def test_layer_weighting(depth):
    model, x = build(depth=depth), images()
    auxes = []
    for layer in model.encoder.dex_layers:
        layer.register_forward_hook(lambda module, inputs, out: auxes.append(out[1]))
    out = model(x)
    assert len(auxes) == depth
    align = [a.align_loss.item() for a in auxes]
    assert out.align_loss.item() == pytest.approx(sum(a / (depth - i) for i, a in enumerate(align)) / depth, rel=1e-12)
    assert out.balance_loss.item() == pytest.approx(np.mean([a.balance_loss.item() for a in auxes]), rel=1e-12)
    assert all(torch.equal(a.gate_mass, m) for a, m in zip(auxes, out.gate_mass, strict=True))
    assert depth == 1 or max(align) - min(align) > 1e-6


def test_align_loss_of_a_layer_compares_its_output_with_its_director():
    model, x = build(depth=1), images()
    layer, seen = model.encoder.dex_layers[0], []
    layer.register_forward_hook(lambda _, args, out: seen.append((args[0], out[0])))
    out = model(x)
    ((h, y),) = seen
    assert h.shape == (3, 5, 16)
    assert out.align_loss.item() == pytest.approx(align_loss(y, layer.director(h), "kd").item(), rel=1e-12)


def test_router_noise_reaches_its_layer():
    model, x = build(num_experts=[2, 4, 3], top_k=1), images()
    zero = [torch.zeros(3, 1, e) for e in (2, 4, 3)]
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(3))

    def gates(router_noise, std=1.0):
        return model(x, noise_std=std, mask_noise=noise, router_noise=router_noise).expert_indices

    want = gates(zero)
    for i, e in enumerate((2, 4, 3)):
        bent = [z.clone() for z in zero]
        bent[i][:, 0, e - 1] = 1e3
        got = gates(bent)
        assert got[i].flatten().tolist() == [e - 1] * 3
        assert all(torch.equal(got[j], want[j]) for j in range(i))
    model.eval()
    assert all(torch.equal(a, b) for a, b in zip(gates(bent), gates(None, 0.0), strict=True))


def test_update_directors_is_that_of_every_layer():
    model, x = build(num_experts=[2, 5, 3], top_k=[1, 3, 3]), images()
    out = model(x)
    twin = copy.deepcopy(model)
    model.update_directors(out.gate_mass, 0.7)
    for layer, mass in zip(twin.encoder.dex_layers, out.gate_mass, strict=True):
        layer.update_director(mass, 0.7)
    assert same_states(model.state_dict(), twin.state_dict())
    before = snapshot(model)
    model.update_directors(out.gate_mass, 0.7, skip=torch.tensor(True))
    assert same_states(model.state_dict(), before)
    model.update_directors(out.gate_mass, torch.tensor(0.7), skip=torch.tensor(False), process_group=False)
    assert not same_states(model.state_dict(), before)


def test_a_nan_pixel_changes_no_state_and_shows_in_the_masses():
    model, x = build(), images()
    x[1, 0, 0, 0] = float("nan")
    before = snapshot(model)
    out = model(x, mask_noise=torch.arange(16.0).expand(3, 16), noise_std=1.0)
    (out.loss + out.align_loss + out.balance_loss).backward()
    assert out.loss.isnan() and all(m.isnan().any() for m in out.gate_mass)
    assert out.image_loss.isnan().tolist() == [False, True, False]
    model.update_directors(out.gate_mass, 0.5)
    assert same_states(model.state_dict(), before)


def test_every_trainable_parameter_has_a_gradient_and_no_director_has():
    model, x = build(top_k=4), images()
    out = model(x)
    (out.loss + out.align_loss + out.balance_loss).backward()
    for name, p in model.named_parameters():
        if ".director." in name:
            assert p.grad is None and not p.requires_grad
        else:
            assert p.grad.count_nonzero(), name


def test_empty_batch():
    out = build()(images(B=0))
    assert out.pred.shape == (0, 3, 16, 16) and out.loss == out.align_loss == out.balance_loss == 0
    assert [m.tolist() for m in out.gate_mass] == [[0.0] * 4] * 3


def test_autocast():
    model = build().float()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images().float())
    assert {t.dtype for t in (out.loss, out.align_loss, out.balance_loss, *out.gate_mass)} == {torch.float32}
    (out.loss + out.align_loss + out.balance_loss).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


# The monolithic control


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_monolithic_control():
    model, x = build(num_experts=0, top_k=[2, 1, 3]), images()
    assert [b.mlp.fc1.out_features for b in model.encoder.blocks] == [2 * 64, 64, 3 * 64]
    out = model(x, noise_std=1.0)
    assert out.align_loss == 0 and out.balance_loss == 0
    assert out.gate_mass == out.gates == out.expert_indices == [] and model.encoder.dex_layers == []
    before = snapshot(model)
    model.update_directors(out.gate_mass, 0.5)
    model.update_directors([], 0.5, skip=torch.tensor(False))
    assert same_states(model.state_dict(), before)
    (out.loss + out.align_loss + out.balance_loss).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(("E", "K"), [(0, 1), (0, 2), (4, 2), (1, 1)])
def test_parameter_count(E, K):
    D, H, dD, L, P = 16, 64, 12, 3, 48
    mlp = D * H + H + H * D + D
    expert_part = (K * D * H + K * H + K * H * D + D) if E == 0 else (E + 1) * mlp + E * D
    attention = D * 3 * D + 3 * D + D * D + D
    encoder = (P * D + D) + D + L * (4 * D + attention + expert_part) + 2 * D
    decoder_block = 4 * dD + dD * 3 * dD + 3 * dD + dD * dD + dD + dD * 48 + 48 + 48 * dD + dD
    decoder = (D * dD + dD) + dD + 2 * decoder_block + 2 * dD + dD * P + P
    assert parameters(build(num_experts=E, top_k=K)) == encoder + decoder


@pytest.mark.parametrize(
    ("factory", "sizes"),
    [("vit_base", (768, 12, 12)), ("vit_large", (1024, 24, 16)), ("vit_huge", (1280, 32, 16))],
)
def test_factories(factory, sizes):
    with torch.device("meta"):
        model = getattr(dex_model, factory)()
        small = getattr(dex_model, factory)(depth=2, num_experts=[3, 4], img_size=64)
    encoder, (D, depth, heads) = model.encoder, sizes
    assert (encoder.cls_token.shape[2], len(encoder.blocks), encoder.blocks[0].attn.num_heads) == (D, depth, heads)
    assert {(b.dex.num_experts, b.dex.top_k, b.dex.hidden_dim) for b in encoder.blocks} == {(8, 2, 4 * D)}
    assert (encoder.img_size, encoder.patch_size, encoder.grid_size, encoder.in_chans) == (256, 16, 16, 3)
    assert model.mask_token.shape == (1, 1, 512) and len(model.decoder_blocks) == 8
    assert model.decoder_blocks[0].attn.num_heads == 16 and model.decoder_pred.out_features == 768
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}
    assert [b.dex.num_experts for b in small.encoder.blocks] == [3, 4] and small.encoder.grid_size == 4


# Patches, positions, pictures


@pytest.mark.parametrize(("S", "P", "C"), [(16, 4, 3), (12, 3, 1), (8, 8, 2), (6, 1, 4)])
def test_patches_in_the_original_order(S, P, C):
    x = images(2, S, C)
    channels_last = patchify(x, P, channels_last=True)
    for b in range(2):
        assert torch.equal(channels_last[b], patches_by_hand(x[b], P))
    assert torch.equal(unpatchify(channels_last, P, C), x)
    # Channels first: the order of a convolution's weight.
    weight = torch.randn(5, C, P, P, dtype=torch.float64)
    conv = F.conv2d(x, weight, stride=P).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patchify(x, P) @ weight.flatten(1).T, conv, rtol=1e-11, atol=1e-12)


def test_positions_by_hand_and_as_recorded():
    got = sincos_pos_embed(8, 3)
    assert got.shape == (1, 10, 8) and got.dtype == torch.float32 and got[0, 0].tolist() == [0.0] * 8
    for row in range(3):
        for column in range(3):
            want = []
            for position in (column, row):
                angles = [position / 10000 ** (i / 2) for i in range(2)]
                want += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert got[0, 1 + 3 * row + column].tolist() == pytest.approx(want, abs=1e-7)
    with safe_open(RECORDED, "pt") as f:
        for name, dim in (("param.pos_embed", 48), ("param.decoder_pos_embed", 32)):
            torch.testing.assert_close(
                sincos_pos_embed(dim, 8).double(), f.get_tensor(name).double(), rtol=0, atol=1e-7
            )


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_reconstruct(norm_pix_loss):
    model, x = build(norm_pix_loss=norm_pix_loss), images()
    out = model(x)
    picture = model.reconstruct(x, out)
    assert picture.shape == x.shape and not picture.requires_grad
    for b in range(3):
        true, got, pred = (patches_by_hand(t[b].detach(), 4) for t in (x, picture, out.pred))
        for i, removed in enumerate(out.mask[b]):
            if removed == 0:
                assert torch.equal(got[i], true[i])
                continue
            want = pred[i] * (true[i].var() + 1e-6).sqrt() + true[i].mean() if norm_pix_loss else pred[i]
            torch.testing.assert_close(got[i], want, rtol=1e-12, atol=1e-13)


# Published names, copies


@pytest.mark.parametrize("options", [{}, {"num_experts": 0}, {"num_experts": [2, 5, 3], "in_chans": 1}])
def test_reference_round_trip(options):
    model, other = build(seed=1, **options), build(seed=2, **options)
    for i, layer in enumerate(model.encoder.dex_layers):
        layer.usage_ema.fill_(i + 1)
    state = model.reference_state_dict()
    assert state["patch_embed.proj.weight"].shape == (16, options.get("in_chans", 3), 4, 4)
    other.load_reference_state_dict(state)
    assert same_states(model.state_dict(), other.state_dict())
    state["pos_embed"].zero_(), state["blocks.0.norm1.weight"].zero_()
    assert same_states(model.state_dict(), other.state_dict())


def test_reference_names_are_those_recorded():
    with safe_open(RECORDED, "pt") as f:
        recorded = {
            k.removeprefix("param."): list(f.get_slice(k).get_shape()) for k in f.keys() if k.startswith("param.")
        }
    model = MaskedAutoencoder(64, 8, 48, 3, 4, 4, 2, 32, 2, 4)
    assert {k: list(t.shape) for k, t in model.reference_state_dict().items()} == recorded


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda s: s.pop("blocks.1.DEX.experts.3.fc1.bias"), "missing blocks.1.DEX.experts.3.fc1.bias"),
        (lambda s: s.update({"blocks.3.norm1.bias": torch.ones(16)}), "unknown blocks.3.norm1.bias"),
        (lambda s: s.update({"cls_token": torch.ones(16)}), "cls_token: expected shape"),
        (
            lambda s: s.update({"patch_embed.proj.weight": torch.ones(16, 48)}),
            "patch_embed.proj.weight: expected shape",
        ),
    ],
)
def test_a_wrong_state_is_named_and_changes_nothing(damage, named):
    model, state = build(seed=1), build(seed=2).reference_state_dict()
    before = snapshot(model)
    damage(state)
    with pytest.raises(ValueError, match=named):
        model.load_reference_state_dict(state)
    assert same_states(model.state_dict(), before)


def test_state_dict_round_trip_and_deepcopy():
    model, other, x = build(seed=1), build(seed=2), images()
    other.load_state_dict(model.state_dict())
    assert same_states(model.state_dict(), other.state_dict())
    noise = torch.rand(3, 16)
    assert torch.equal(copy.deepcopy(model)(x, mask_noise=noise).loss, other(x, mask_noise=noise).loss)


# Refusals

NAN = float("nan")


def make(**options):
    return lambda: build(**options)


def call(*args, **options):
    return lambda: build()(*(args or (images(),)), **options)


TABLE = [
    *(("img_size", make(img_size=v)) for v in (0, 18, -16, 16.0, True, None)),
    *(("patch_size", make(patch_size=v)) for v in (0, -4, 4.0, None)),
    *(("in_chans", make(in_chans=v)) for v in (0, 3.0)),
    *(("embed_dim", make(embed_dim=v)) for v in (0, 18, 17, 16.0, None)),
    *(("depth", make(depth=v)) for v in (0, -1, 2.0)),
    *(("num_heads", make(num_heads=v)) for v in (0, 2.0)),
    ("embed_dim: expected a multiple of num_heads .3., got 16", make(num_heads=3)),
    *(("num_experts", make(num_experts=v)) for v in (-1, True, [4, 4], [4, 0, 4], [4, 4, 4, 4], [4.0] * 3, 4.0, None)),
    *(("top_k", make(top_k=v)) for v in (0, 5, [2, 2], [2, 0, 2], [2, 5, 2], True, 2.0, None)),
    *(("decoder_embed_dim", make(decoder_embed_dim=v)) for v in (0, 10, 12.0)),
    *(("decoder_depth", make(decoder_depth=v)) for v in (0, None)),
    ("decoder_num_heads", make(decoder_num_heads=0)),
    ("decoder_embed_dim: expected a multiple of decoder_num_heads .5., got 12", make(decoder_num_heads=5)),
    *(("mlp_ratio", make(mlp_ratio=v)) for v in (0, -1.0, NAN, float("inf"), None)),
    *(("backend", make(backend=v)) for v in ("triton", "cuda", "nonsense")),
    *(("images", call(v)) for v in (images()[0], images(S=12), images(C=1), images().to(torch.uint8), None)),
    *(("mask_ratio", call(mask_ratio=v)) for v in (-0.1, 1.0, 0.95, 2, NAN, None, "0.5")),
    *(
        ("mask_noise", call(mask_noise=v))
        for v in (torch.rand(3, 15), torch.rand(2, 16), torch.rand(16), [[0.5] * 16] * 3)
    ),
    *(("noise_std", call(noise_std=v)) for v in (-1.0, NAN, None, True)),
    ("router_noise", call(noise_std=1.0, router_noise=[torch.zeros(3, 1, 4)] * 2)),
    ("router_noise", call(noise_std=1.0, router_noise=[torch.zeros(3, 1, 5)] * 3)),
    *(
        ("gate_mass", lambda v=v: build().update_directors(v, 0.9))
        for v in ([], [torch.ones(4)] * 2, [torch.ones(3)] * 3)
    ),
    ("gate_mass", lambda: build(num_experts=0).update_directors([torch.ones(4)], 0.9)),
    ("momentum", lambda: build().update_directors([torch.ones(4)] * 3, 1.5)),
    ("skip", lambda: build().update_directors([torch.ones(4)] * 3, 0.5, skip=True)),
]


@pytest.mark.parametrize(("name", "run"), TABLE, ids=[f"{name}-{i}" for i, (name, _) in enumerate(TABLE)])
def test_refused_by_name(name, run):
    with pytest.raises(ValueError, match=f"^{name}(\\[\\d\\])?(: |$)"):
        run()


def test_the_encoder_alone():
    encoder = VisionTransformer(16, 4, 16, 2, 2, 3, 1, in_chans=1).double()
    assert encoder(images(C=1)).shape == (3, 17, 16)
    with pytest.raises(ValueError, match="^images: "):
        encoder(images(C=3))
