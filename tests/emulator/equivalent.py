"""Changes of kernel lines that neither the interpreter nor the emulator saw: why that is right, or what is missing."""

PROOFS: dict[str, str] = {
    (
        "triton_common find_expert: "
        "stop = tl.load(offsets + e + 1, mask=e < num_experts, other=9223372036854775807) -> "
        "stop = tl.load(offsets + e + 1, mask=e < num_experts, other=9223372036854775806)"
    ): "It only has to be above every position, and those are below 2^31 (MAX_ROWS).",
    (
        "triton_common locate: "
        "return slots, images.to(tl.int64), tl.where(valid, rows % tokens, 0).to(tl.int64) -> "
        "return slots, images.to(tl.int64), tl.where(valid, rows % tokens, 1).to(tl.int64)"
    ): "The token only enters addresses, and both callers mask their loads by `valid`: what is not valid is not read.",
    (
        "grouped_mlp/triton/to_images_kernels invert_slots_kernel: "
        "slot = tl.load(slot_order + p, mask=valid, other=0) -> slot = tl.load(slot_order + p, mask=valid, other=1)"
    ): "The slot only enters addresses, and both stores to them are masked by `valid`.",
    (
        "group_ema/triton group_ema_kernel: rest = (1.0 - m).to(tl.float32) -> rest = 1.0 - m"
    ): "It is multiplied by float32 numbers, and the compiler rounds it to float32 for that. The PTX is the same.",
    (
        "grouped_mlp/triton/aligned_kernels add_products: "
        'acc0 = tl.dot(rows.load([row0, k]), w, acc0, input_precision="ieee") -> '
        'acc0 = tl.dot(rows.load([row0, k]), w, acc0, input_precision="tf32")'
    ): "The aligned path has no float32 (`plan.why_not_aligned`), of which alone it speaks. The PTX is the same.",
    (
        "grouped_mlp/triton/to_images_kernels store_image: "
        "g = tl.load(gates + slots, mask=place < top_k, other=0.0).to(tl.float32) -> "
        "g = tl.load(gates + slots, mask=place < top_k, other=0.0)"
    ): "Gates are float32. The PTX is the same.",
}
"""`mutants.Mutant.key` -> proof."""

GAPS: dict[str, str] = {
    ("align_loss/triton log_sum_exp: for d0 in range(0, dim, COLS): -> for d0 in range(0, (dim) - 1, COLS):"): (
        "Only widths of 1024 k + 1 would show it. There is no such case: at 1025 columns the float32 gradient of the "
        "KD loss is off by 2.1 times plain torch's error, where 2 is granted."
    ),
    (
        "grouped_mlp/triton/aligned_kernels store_hidden_grad: "
        "to_rows = position.to(tl.int64) * num_parts + of_blocks + col * first_token + rows % of_slot -> "
        "to_rows = position.to(tl.int32) * num_parts + of_blocks + col * first_token + rows % of_slot"
    ): "Only parts of gates of more than 2^31 numbers, 8 GB, would show it.",
    (
        "route/triton router_grad_kernel: "
        "at = rows.to(tl.int64)[None, :] * num_experts + e[:, None] -> "
        "at = rows.to(tl.int32)[None, :] * num_experts + e[:, None]"
    ): "Only more than 2^31 probabilities, as of 2^24 decisions among 128 experts, would show it.",
}
"""`mutants.Mutant.key` -> why no case shows a change that is wrong."""
