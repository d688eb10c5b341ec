"""What every shipped configuration compiles to for sm_80 and sm_90, without a GPU: see aot.py."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")

SHARED = {80: 166_912, 90: 232_448}
"""Bytes of shared memory that one block may have."""

GATHERED = ("fc1_kernel", "to_slots_kernel", "to_hidden_grad_kernel", "weight_grad_kernel")

BLOCKS = (
    "fc1_blocks_kernel",
    "to_images_kernel",
    "pairs_to_images_kernel",
    "to_slots_blocks_kernel",
    "hidden_grad_blocks_kernel",
    "weight_grad_blocks_kernel",
)
"""Products that load by descriptors: for sm_90 alone, in half precision."""

BESIDE_BLOCKS = ("invert_slots_kernel", "order_images_kernel", "pack_rows_kernel")
"""What they need besides, for sm_90 alone."""

PRODUCTS = GATHERED + BLOCKS

STACK = dict.fromkeys(PRODUCTS, 0) | {"hidden_grad_blocks_kernel": 64}
"""Bytes of local memory a thread, outside the loops; kernels that are no products may have 64."""

KERNELS = {
    *GATHERED,
    *(
        "combine_kernel",
        "image_sum_kernel",
        "gate_grad_kernel",
        "bias1_grad_kernel",
        "bias2_grad_kernel",
        "sum_chunks_kernel",
    ),
    *("forward_kernel", "mean_kernel", "backward_kernel"),
    *("route_kernel", "logits_grad_kernel", "router_grad_kernel", "group_ema_kernel", "adamw_ema_kernel"),
}


@pytest.fixture(scope="module", params=[80, 90], ids=["sm_80", "sm_90"])
def compiled(request, tmp_path_factory):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    program = Path(__file__).with_name("aot.py")
    done = subprocess.run([sys.executable, program, str(request.param)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def names(rows):
    return [f"{r['kernel']} {r['dtype']} {r['flags']}" for r in rows]


def test_every_kernel_was_compiled(compiled):
    arch = compiled[0]["arch"]
    assert {r["kernel"] for r in compiled} == KERNELS | ({*BLOCKS, *BESIDE_BLOCKS} if arch == 90 else set())
    for kernel in GATHERED:
        assert {r["dtype"] for r in compiled if r["kernel"] == kernel} == {"bf16", "fp16", "fp32"}
    for kernel in BLOCKS if arch == 90 else ():
        assert {r["dtype"] for r in compiled if r["kernel"] == kernel} == {"bf16", "fp16"}
    assert all(r["sass_found"] for r in compiled)


def test_shared_memory_fits(compiled):
    assert not names(r for r in compiled if r["shared"] > SHARED[r["arch"]])


def test_products_spill_nothing_and_the_rest_little(compiled):
    # Triton 3.9 spills one register of the tanh GELU's gradient, and reads it back once in the loop over tiles.
    one = "hidden_grad_blocks_kernel" if importlib.metadata.version("triton").startswith("3.9.") else ""
    assert not names(r for r in compiled if r["local_in_loops"] > (r["kernel"] == one))
    assert not names(r for r in compiled if r["stack"] > STACK.get(r["kernel"], 64))


def test_half_precision_uses_tensor_cores(compiled):
    for r in (r for r in compiled if r["kernel"] in PRODUCTS and r["dtype"] != "fp32"):
        wide = r["kernel"] in ("to_images_kernel", "to_slots_blocks_kernel", "weight_grad_blocks_kernel")
        assert r["wgmma"] == ["m64n256k16" if wide else "m64n128k16"] if r["arch"] == 90 else r["mma"] > 0, r


def test_float32_is_float32(compiled):
    for r in (r for r in compiled if r["kernel"] in PRODUCTS and r["dtype"] == "fp32"):
        assert not r["wgmma"] and not r["mma"], r
    for r in (r for r in compiled if r["kernel"].startswith("rout")):
        assert not r["wgmma"] and not r["mma"], r


def test_products_load_asynchronously(compiled):
    for r in compiled:
        assert (r["tma"] > 0) == (r["kernel"] in BLOCKS), r
    for r in (r for r in compiled if r["kernel"] in GATHERED):
        assert r["cp_async"] > 0, r
        # 16 bytes a copy; the transposed float32 loads of the weight gradient are narrower.
        assert r["cp_async_16"] > 0 or r["dtype"] == "fp32", r


def test_memory_bound_kernels_load_16_bytes(compiled):
    bound = ("combine_kernel", "group_ema_kernel", "adamw_ema_kernel", "forward_kernel", "backward_kernel")
    for r in compiled:
        if r["kernel"] in bound:
            assert r["wide_load"], r
