"""What a run will need, against what torch counts and what is really written."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from dex.config import Config, ModelConfig
from dex.model.build import build_model
from dex.sizing import estimate
from dex.train import checkpoint
from dexkernels.testing import ExpertLoop

SMALL = ModelConfig(
    img_size=64, embed_dim=64, depth=2, num_heads=2, num_experts=4, decoder_embed_dim=32, decoder_depth=1,
    decoder_num_heads=2,
)  # fmt: skip


def config(batch: int = 4, precision: str = "fp32", **model) -> Config:
    base = Config(model=replace(SMALL, **model))
    return replace(
        base, data=replace(base.data, batch_size=batch), run=replace(base.run, precision=precision, device="cpu")
    )


def counted(step) -> int:
    """Operations of the matrix products of ``step()``, by torch's own counter, which does not know those of oneDNN."""
    torchs_own = torch.backends.mkldnn.flags(enabled=False)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torchs_own:
        step()
    return counter.get_total_flops()


@pytest.mark.parametrize("sizes", [{}, {"embed_dim": 96, "num_heads": 3, "mask_ratio": 0.5, "decoder_depth": 3}])
def test_monolithic_operations_are_what_torch_counts(sizes):
    c = config(num_experts=0, **sizes)
    model, images = build_model(c).train(), torch.randn(3, 3, 64, 64)
    found = counted(lambda: model(images, mask_ratio=c.model.mask_ratio).loss.backward())
    assert found == 3 * sum(estimate.training_flops(c).values())


def test_expert_and_director_operations_are_what_torch_counts():
    c, batch, tokens = config(), 5, 1 + 4
    parts = estimate.training_flops(c)
    loop = ExpertLoop(64, 256, 4, 2)
    x = torch.randn(batch, tokens, 64, requires_grad=True)
    # The loop runs its director in forward, as the layer does, and sends no gradient into it.
    routed = counted(lambda: loop(x)[0].sum().backward())
    assert (
        routed
        == batch * (parts["experts"] + parts["directors"]) // c.model.depth + batch * parts["router"] // c.model.depth
    )


def test_numbers_of_parameters_and_the_checkpoint_are_the_real_ones(tmp_path):
    c = config()
    found = estimate.estimate(c, 10)
    model = build_model(c)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert sum(found.parameters.values()) == sum(p.numel() for p in model.parameters())
    directors = [p for layer in model.encoder.dex_layers for p in layer.director.parameters()]
    assert found.parameters["directors"] == sum(p.numel() for p in directors)
    assert found.trained == sum(p.numel() for _, p in trained)
    assert found.images == 40

    optimizer = torch.optim.AdamW([p for _, p in trained])
    sum(p.sum() for _, p in trained).backward()
    optimizer.step()
    saver = checkpoint.Saver(tmp_path, 1)
    saver.save(1, checkpoint.collect(model, optimizer, trained), {"step": 1})
    saver.wait()
    folder = tmp_path / "step-00000001"
    written = sum(f.stat().st_size for f in folder.iterdir())
    assert found.checkpoint == pytest.approx(written, rel=0.03)
    state = sum(t.numel() * 4 for s in optimizer.state.values() for t in (s["exp_avg"], s["exp_avg_sq"]))
    assert found.memory["moments"] == state
    assert found.memory["gradients"] == sum(p.grad.nbytes for _, p in trained)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_autograd_keeps_on_real_tensors(precision):
    c = config(precision=precision)
    predicted = estimate.estimate(c, 1).activations
    model = build_model(c).train()

    def kept(batch: int) -> int:
        tensors = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            out = model(torch.randn(batch, 3, 64, 64), noise_std=0.1)
        del out
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    assert predicted == pytest.approx((kept(16) - kept(8)) / 8, rel=0.02)


def checkpointed(c: Config) -> Config:
    return replace(c, parallel=replace(c.parallel, checkpointing=True))


def test_recomputation_is_what_torch_counts():
    c = config(num_experts=0, depth=3)

    def step(checkpointing: bool) -> int:
        model, images = build_model(c).train(), torch.randn(3, 3, 64, 64)
        model.encoder.checkpointing = checkpointing
        with set_checkpoint_early_stop(False):
            return counted(lambda: model(images).loss.backward())

    parts = estimate.training_flops(checkpointed(c))
    assert 3 * parts.pop("recomputation") == step(True) - step(False) > 0
    assert estimate.training_flops(c) == parts | {"recomputation": 0}
    assert estimate.mfu(checkpointed(c), 1000.0, "H100", 1) == estimate.mfu(c, 1000.0, "H100", 1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointed_blocks_keep_their_input_only(precision):
    def activations(depth: int, wrap) -> int:
        return estimate.estimate(wrap(config(precision=precision, depth=depth)), 1).activations

    tokens, width = 1 + 4, 64
    kept = [activations(depth, checkpointed) for depth in (2, 8)]
    assert kept[1] - kept[0] == 6 * 4 * tokens * width  # the stream is fp32 under autocast too
    whole = [activations(depth, lambda c: c) for depth in (2, 8)]
    block = (whole[1] - whole[0]) // 6
    # Beside the inputs: what lies outside the blocks, and one block while it is recomputed.
    assert kept[0] == pytest.approx(whole[0] - 2 * block + block + 2 * 4 * tokens * width, rel=0.02)


def test_days_are_operations_over_the_peak():
    found = estimate.estimate(config(), 1)
    gpu = estimate.Gpu("test", 1e15, 1e9)
    assert found.days(gpu, 4, 0.5) == pytest.approx(4 * found.flops_per_image / (1e15 * 0.5 * 4 * 86400))


def test_text_names_everything_and_says_what_is_assumed():
    text = "\n".join(estimate.describe(estimate.estimate(config(), 1)))
    for word in ("experts", "directors", "activations", "moments", "checkpoint", "assumed, not measured", "H100"):
        assert word in text


def test_times_are_written_as_everywhere():
    """A run of 1.5 days of one H100 at the assumed share of its peak."""
    small = estimate.estimate(config(), 1)
    images = 1.5 * 86400 * 0.4 * 989e12 / small.flops_per_image
    text = "\n".join(estimate.describe(replace(small, images=images)))
    assert "H100 SXM: 1d12h on 1, 4h30m on 8, 33m45s on 64" in text


def test_mfu_is_a_share_of_the_known_peak():
    c = config()
    flops = sum(estimate.training_flops(c).values())
    assert estimate.mfu(c, 1000.0, "NVIDIA H100 80GB HBM3", 2) == pytest.approx(1000 * flops / (2 * 989e12))
    assert estimate.mfu(c, 1000.0, "NVIDIA H100 PCIe", 1) == pytest.approx(1000 * flops / 756e12)
    assert estimate.mfu(c, 1000.0, "Some GPU", 1) is None


def test_averages_are_counted_in_memory_and_checkpoint():
    plain = config()
    averaged = replace(plain, optim=replace(plain.optim, ema=0.9))
    a, b = estimate.estimate(plain, 1), estimate.estimate(averaged, 1)
    weights = 4 * sum(p.numel() for p in build_model(plain).parameters())
    assert "averages" not in a.memory and b.memory["averages"] == weights == b.checkpoint - a.checkpoint
