"""`dex.model.weights`: dense checkpoints become DEX models of the same function; unsafe or unfit files are refused."""

import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from dex.model import MaskedAutoencoder
from dex.model.weights import load_pretrained, read_state_dict, resize_patch_embed, resize_pos_embed

D, DEPTH, HEADS = 16, 2, 2


def build(seed=0, **options):
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": D, "depth": DEPTH, "num_heads": HEADS, "num_experts": 4}
    sizes |= {"top_k": 2, "decoder_embed_dim": 12, "decoder_depth": 1, "decoder_num_heads": 3}
    torch.manual_seed(seed)
    return MaskedAutoencoder(**(sizes | options)).double()


class Dense(nn.Module):
    """A vision transformer as timm and the original MAE name and run it (convolution, nn modules, no DEX code)."""

    def __init__(self, grid=4, patch=4, in_chans=3, cls_position=True):
        super().__init__()
        self.cls_position = cls_position
        self.cls_token = nn.Parameter(torch.randn(1, 1, D))
        self.pos_embed = nn.Parameter(torch.randn(1, grid * grid + cls_position, D))
        self.patch_embed = nn.Sequential()
        self.patch_embed.add_module("proj", nn.Conv2d(in_chans, D, patch, patch))
        self.blocks = nn.ModuleList(self.block(D, 4 * D) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        for p in self.parameters():
            nn.init.normal_(p, std=0.3)
        self.double()

    @staticmethod
    def block(dim, hidden):
        return nn.ModuleDict(
            {
                "norm1": nn.LayerNorm(dim, eps=1e-6),
                "attn": nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)}),
                "norm2": nn.LayerNorm(dim, eps=1e-6),
                "mlp": nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)}),
            }
        )

    def forward(self, images):
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        cls = self.cls_token.expand(len(x), -1, -1)
        if self.cls_position:
            x = torch.cat([cls, x], 1) + self.pos_embed
        else:
            x = torch.cat([cls, x + self.pos_embed], 1)
        for block in self.blocks:
            h = block["attn"]["qkv"](block["norm1"](x)).chunk(3, -1)
            q, k, v = (t.unflatten(-1, (HEADS, D // HEADS)).transpose(1, 2) for t in h)
            a = torch.softmax(q @ k.transpose(-1, -2) / (D // HEADS) ** 0.5, -1) @ v
            x = x + block["attn"]["proj"](a.transpose(1, 2).flatten(2))
            x = x + block["mlp"]["fc2"](F.gelu(block["mlp"]["fc1"](block["norm2"](x))))
        return self.norm(x)


def timm_like(seed=5, **options):
    torch.manual_seed(seed)
    dense = Dense(**options)
    return dense, dense.state_dict() | {"head.weight": torch.randn(10, D), "head.bias": torch.randn(10)}


def mae_like(seed=5):
    """The original MAE with its decoder; position embeddings are in the file as they are in the published ones."""
    dense, state = timm_like(seed)
    del state["head.weight"], state["head.bias"]
    decoder = nn.ModuleDict(
        {
            "decoder_embed": nn.Linear(D, 12),
            "decoder_blocks": nn.ModuleList([Dense.block(12, 48)]),
            "decoder_norm": nn.LayerNorm(12),
            "decoder_pred": nn.Linear(12, 48),
        }
    ).double()
    state |= decoder.state_dict() | {"mask_token": torch.randn(1, 1, 12), "decoder_pos_embed": torch.randn(1, 17, 12)}
    return dense, state


def pictures(S=16, C=3):
    return torch.randn(3, C, S, S, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def snapshot(module):
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def same_states(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# Upcycling


@pytest.mark.parametrize("source", [timm_like, mae_like])
@pytest.mark.parametrize(("E", "K"), [(4, 1), (4, 2), (4, 4), (1, 1), ([2, 5], [2, 3])])
def test_a_dense_checkpoint_keeps_its_function(source, E, K):
    dense, state = source()
    model = build(num_experts=E, top_k=K)
    usage = [layer.usage_ema.fill_(0.5).clone() for layer in model.encoder.dex_layers]
    routers = [layer.router_weight.detach().clone() for layer in model.encoder.dex_layers]
    report = load_pretrained(model, state)
    assert (report.naming, report.upcycled, report.resized) == ("dense ViT", True, ())
    for i, layer in enumerate(model.encoder.dex_layers):
        for d, e in layer.director_pairs():
            assert all(torch.equal(expert, d) for expert in e)
        assert torch.equal(layer.director.fc1.weight, state[f"blocks.{i}.mlp.fc1.weight"])
        assert torch.equal(layer.director.fc2.bias, state[f"blocks.{i}.mlp.fc2.bias"])
        assert torch.equal(layer.usage_ema, usage[i]) and torch.equal(layer.router_weight, routers[i])
        assert {f"blocks.{i}.DEX.router.linear.weight", f"blocks.{i}.DEX.expert_activation_count"} <= set(report.kept)
    with torch.no_grad():
        torch.testing.assert_close(model.encoder(pictures()), dense(pictures()), rtol=1e-10, atol=1e-11)
        for layer in model.encoder.dex_layers:
            layer.path = "director"
        torch.testing.assert_close(model.encoder(pictures()), dense(pictures()), rtol=1e-10, atol=1e-11)


def test_decoder_from_mae():
    _, state = mae_like()
    model = build()
    report = load_pretrained(model, state)
    assert report.ignored == () and not any(k.startswith(("decoder", "mask")) for k in report.kept)
    ours = model.reference_state_dict()
    names = [k for k in state if k.startswith(("decoder_", "mask_token"))]
    assert len(names) == 20 and all(torch.equal(ours[k], state[k].double()) for k in names)


def test_no_decoder_and_a_head_from_timm():
    _, state = timm_like()
    state["fc_norm.weight"] = torch.ones(D)
    given = dict(state)
    model = build()
    before = model.reference_state_dict()
    report = load_pretrained(model, state)
    assert set(report.ignored) == {"head.weight", "head.bias", "fc_norm.weight"}
    decoder = {k for k in before if k.startswith(("decoder_", "mask_token"))}
    assert decoder <= set(report.kept) and len(decoder) == 20
    after = model.reference_state_dict()
    assert all(torch.equal(after[k], before[k]) for k in decoder)
    assert state.keys() == given.keys() and all(state[k] is given[k] for k in given)


def test_monolithic_model_takes_a_dense_checkpoint():
    dense, state = timm_like()
    model = build(num_experts=0, top_k=1)
    report = load_pretrained(model, state)
    assert not report.upcycled
    torch.testing.assert_close(model.encoder(pictures()), dense(pictures()), rtol=1e-10, atol=1e-11)
    with pytest.raises(ValueError, match="blocks.0.mlp.fc1.weight: expected shape"):
        load_pretrained(build(num_experts=0, top_k=2), state)


def test_published_weights():
    source, model = build(seed=1), build(seed=2)
    source.encoder.dex_layers[0].usage_ema.fill_(0.25)
    report = load_pretrained(model, source.reference_state_dict())
    assert report == ("published DEX", False, (), (), ())
    assert same_states(model.state_dict(), source.state_dict())
    with pytest.raises(ValueError, match="missing blocks.0.DEX.experts.4.fc1.weight"):
        load_pretrained(build(num_experts=5), source.reference_state_dict())
    with pytest.raises(ValueError, match="unknown blocks.0.DEX"):
        load_pretrained(build(num_experts=0), source.reference_state_dict())


# Other sizes


def test_position_embedding_without_a_class_row():
    dense, state = timm_like(cls_position=False)
    model = build()
    report = load_pretrained(model, state)
    assert report.resized == ("pos_embed",)
    assert model.encoder.pos_embed[0, 0].count_nonzero() == 0
    with torch.no_grad():
        torch.testing.assert_close(model.encoder(pictures()), dense(pictures()), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("side", [2, 3, 5, 8])
def test_resizing_positions(cls, side):
    """Constant and linear-in-the-middle maps stay what they are; row and column are not swapped; CLS is not touched."""
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    grid = torch.stack([torch.full((4, 4), 7.0), rows, columns], -1).view(1, 16, 3)
    row = torch.tensor([[[1.0, 2.0, 3.0]]])
    new = resize_pos_embed(torch.cat([row, grid], 1) if cls else grid, side)
    assert new.shape == (1, 1 + side * side, 3)
    assert new[0, 0].tolist() == ([1.0, 2.0, 3.0] if cls else [0.0] * 3)
    constant, rows, columns = new[0, 1:].view(side, side, 3).unbind(-1)
    torch.testing.assert_close(constant, torch.full((side, side), 7.0))
    torch.testing.assert_close(rows, columns.T)
    assert (rows.diff(dim=0) > 0).all() and (rows - rows[:, :1]).abs().max() < 1e-5
    # Centres of pixels: antisymmetric about the middle, whose value is 1.5.
    torch.testing.assert_close(rows + rows.flip(0), torch.full((side, side), 3.0), rtol=0, atol=1e-5)


def test_same_grid_is_not_touched():
    pos = torch.randn(1, 17, 5, dtype=torch.float64)
    assert torch.equal(resize_pos_embed(pos, 4), pos)


@pytest.mark.parametrize("rows", [3, 6, 12, 18])
def test_positions_that_are_no_square_are_refused(rows):
    with pytest.raises(ValueError, match="pos_embed: expected a square grid"):
        resize_pos_embed(torch.zeros(1, rows, 3), 4)


def test_a_single_patch_without_a_class_row():
    pos = torch.ones(1, 1, 3)
    got = resize_pos_embed(pos, 1)
    assert got.shape == (1, 2, 3) and got[0, 1].tolist() == [1.0] * 3


def test_loading_onto_another_grid():
    _, state = mae_like()
    model = build(img_size=24)
    report = load_pretrained(model, state)
    assert set(report.resized) == {"pos_embed", "decoder_pos_embed"}
    torch.testing.assert_close(model.encoder.pos_embed, resize_pos_embed(state["pos_embed"], 6))
    assert model.encoder.pos_embed.shape == (1, 37, D)


@pytest.mark.parametrize(("old", "new"), [(4, 8), (4, 6), (2, 7), (3, 3)])
def test_an_enlarged_patch_embeds_as_before(old, new):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 3, old, old, generator=g, dtype=torch.float64)
    patch = torch.randn(6, 3, old, old, generator=g, dtype=torch.float64)
    larger = F.interpolate(patch, (new, new), mode="bilinear", align_corners=False)
    got = larger.flatten(1) @ resize_patch_embed(weight, new).flatten(1).T
    torch.testing.assert_close(got, patch.flatten(1) @ weight.flatten(1).T, rtol=1e-9, atol=1e-9)


def test_a_reduced_patch_embeds_as_near_as_can_be():
    """For patches that are enlargements of small ones, the embedding is the least-squares fit over small weights."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 1, 8, 8, generator=g, dtype=torch.float64)
    basis = torch.eye(64, dtype=torch.float64).view(64, 1, 8, 8)
    small = F.interpolate(basis, (4, 4), mode="bilinear", antialias=True, align_corners=False).view(64, 16)
    best = torch.linalg.lstsq(small, weight.view(64, 1)).solution
    torch.testing.assert_close(resize_patch_embed(weight, 4).view(16, 1), best, rtol=1e-9, atol=1e-9)


def test_loading_onto_another_patch_side():
    dense, state = mae_like()
    model = build(img_size=32, patch_size=8)
    before = model.reference_state_dict()
    report = load_pretrained(model, state)
    decoder = {k for k in state if k.startswith(("decoder_", "mask_token"))}
    assert set(report.ignored) == decoder <= set(report.kept) and report.resized == ("patch_embed.proj.weight",)
    after = model.reference_state_dict()
    assert all(torch.equal(after[k], before[k]) for k in decoder)
    small = pictures()
    patches = small.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 4, 4)
    larger = F.interpolate(patches, (8, 8), mode="bilinear", align_corners=False)
    image = larger.view(3, 4, 4, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.encoder(image), dense(small), rtol=1e-8, atol=1e-8)


def test_what_is_left_out_is_not_reported_as_resized():
    report = load_pretrained(build(img_size=24, patch_size=8), mae_like()[1])
    assert set(report.resized) == {"pos_embed", "patch_embed.proj.weight"}
    assert "decoder_pos_embed" in report.ignored and "decoder_pos_embed" in report.kept


# Refusals


def damaged(**changes):
    _, state = timm_like()
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del state[name]
        else:
            state[name] = value
    return state


@pytest.mark.parametrize(
    ("state", "named"),
    [
        (damaged(blocks__1__ls1__gamma=torch.ones(D + 1)), r"blocks.1.ls1.gamma: expected \[16\], got \[17\]"),
        (damaged(blocks__2__ls2__gamma=torch.ones(D)), "unknown blocks.2.ls2.gamma"),
        (damaged(blocks__0__attn__q_norm__weight=torch.ones(D)), "unknown blocks.0.attn.q_norm.weight"),
        (damaged(reg_token=torch.ones(1, 4, D)), "unknown reg_token"),
        (damaged(blocks__2__norm1__weight=torch.ones(D)), "unknown blocks.2.norm1.weight"),
        (damaged(blocks__1__mlp__fc1__bias=None), "missing blocks.1.DEX.director.fc1.bias"),
        (damaged(blocks__1__attn__qkv__bias=None), "missing blocks.1.attn.qkv.bias"),
        (damaged(cls_token=None), "missing cls_token"),
        (damaged(norm__weight=torch.ones(D + 1)), "norm.weight: expected shape"),
        (damaged(blocks__0__mlp__fc1__weight=torch.ones(32, D)), "fc1.weight: expected shape"),
        (
            damaged(patch_embed__proj__weight=torch.ones(D, 1, 4, 4)),
            r"patch_embed.proj.weight: expected \[16, 3, P, P\]",
        ),
        (damaged(patch_embed__proj__weight=torch.ones(D, 48)), r"patch_embed.proj.weight: expected \[16, 3, P, P\]"),
        (damaged(patch_embed__proj__weight=torch.ones(D, 3, 4, 5)), r"patch_embed.proj.weight: expected"),
        (damaged(pos_embed=torch.ones(1, 12, D)), "pos_embed: expected a square grid"),
        (damaged(pos_embed=torch.ones(17, D)), "pos_embed: expected"),
        ({"layer.weight": torch.ones(1)}, "weights: expected keys"),
        ({}, "weights: expected keys"),
    ],
)
def test_an_unfit_checkpoint_is_refused_by_name_and_changes_nothing(state, named):
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=named):
        load_pretrained(model, state)
    assert same_states(model.state_dict(), before)


def test_in_chans_mismatch_of_a_grey_model():
    _, state = timm_like(in_chans=2)
    message = (
        r"patch_embed.proj.weight: expected \[16, 1, P, P\], or 3 channels, which are then summed, got \[16, 2, 4, 4\]"
    )
    with pytest.raises(ValueError, match=message):
        load_pretrained(build(in_chans=1), state)


# Files


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_files(tmp_path, suffix, wrapper):
    dense, state = timm_like()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({wrapper: state, "epoch": 3} if wrapper else state, path)
    assert same_states(read_state_dict(path), state)
    model = build()
    load_pretrained(model, str(path))
    torch.testing.assert_close(model.encoder(pictures()), dense(pictures()), rtol=1e-10, atol=1e-11)


def test_names_of_a_distributed_run(tmp_path):
    _, state = timm_like()
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "ddp.pth")
    assert same_states(read_state_dict(tmp_path / "ddp.pth"), state)


class Payload:
    """Unpickling this writes a file."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return Path.write_text, (Path(self.canary), "executed")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ""])
@pytest.mark.parametrize("place", ["beside", "inside", "alone", "plain pickle"])
def test_a_pickle_is_not_executed(tmp_path, suffix, place):
    _, state = timm_like()
    canary, path = tmp_path / "canary", tmp_path / f"weights{suffix}"
    payload = Payload(canary)
    content = {"beside": {"model": state, "args": payload}, "inside": state | {"norm.bias": payload}}.get(
        place, payload
    )
    if place == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match="^path: expected safetensors, or a torch file of plain tensors"):
        load_pretrained(build(), path)
    assert not canary.exists()
    # The payload would have worked.
    if place == "plain pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert canary.read_text() == "executed"


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x02."])
def test_an_unreadable_file(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"path: .*{name}"):
        read_state_dict(path)


@pytest.mark.parametrize(
    "content", [torch.ones(2), {}, [torch.ones(2)], {"a": 1}, {"model": {"a": "b"}}, {"model": {}}]
)
def test_a_file_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="path: expected a state dict of tensors"):
        read_state_dict(tmp_path / "weights.pt")


@pytest.mark.parametrize("name", ["missing.pth", "missing.safetensors", "."])
def test_a_missing_file(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="path: no such file"):
        load_pretrained(build(), tmp_path / name)
