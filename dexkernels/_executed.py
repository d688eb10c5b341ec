"""Where the kernels of every operator have been executed. Made by scripts/pages.py; not edited."""

# fmt: off
EXECUTED: dict[tuple[str, str], str] = {
    ("adamw_ema_", "cuda"): (
        "1 kernel, executed on the emulator for sm_80, sm_90 in fp32, 2026-11-30; on a GPU: not yet"
    ),
    ("adamw_ema_", "triton"): (
        "1 kernel, executed on the emulator for sm_80, sm_90 in fp32, 2026-11-30; on a GPU: not yet"
    ),
    ("align_loss", "triton"): (
        "3 kernels, executed on the emulator for sm_80, sm_90 in bf16, fp16, fp32, 2026-11-30; on a GPU: "
        "not yet"
    ),
    ("group_ema_", "cuda"): (
        "1 kernel, executed on the emulator for sm_80, sm_90 in fp32, 2026-11-30; on a GPU: not yet"
    ),
    ("group_ema_", "triton"): (
        "1 kernel, executed on the emulator for sm_80, sm_90 in fp32, 2026-11-30; on a GPU: not yet"
    ),
    ("grouped_mlp", "triton"): (
        "19 kernels, executed on the emulator for sm_80, sm_90 in bf16, fp16, fp32, 2026-11-30; on a GPU: "
        "not yet"
    ),
    ("route", "triton"): (
        "3 kernels, executed on the emulator for sm_80, sm_90 in bf16, fp16, fp32, 2026-11-30; on a GPU: "
        "not yet"
    ),
}
"""(operator, backend) -> its kernels: on the emulator (docs/emulator.md), on a GPU, or never."""
