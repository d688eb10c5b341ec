"""Changes of kernel lines that neither the interpreter nor the emulator saw, and why they change nothing."""

_WIDTHS = (
    "Widths of the aligned path are multiples of 8 (`plan.why_not_aligned`), as steps are, so no step begins at the "
    "last element: the steps that begin before the width less 1 are all of them."
)

PROOFS: dict[str, str] = {
    (
        "grouped_mlp/triton/gather_kernels multiply: "
        "a_block = tl.load(a, mask=a_valid[:, None] & inside[None, :], other=0.0) -> "
        "a_block = tl.load(a, mask=a_valid[:, None] & inside[None, :], other=1.0)"
    ): (
        "Past the end of the sum the block of B is 0, by the same `inside`, and 1 * 0 adds nothing. Rows that are not "
        "valid are stored by no caller, and in the sums over rows of `gelu_columns` their gate is 0."
    ),
    (
        "grouped_mlp/triton/to_images_kernels sets_of_images: "
        "sets |= tl.where(valid, 1 << e, 0) -> sets |= tl.where(valid, 1 << e, 1)"
    ): "Where an image is not valid its set is 2^31 - 1, in which that bit is set already. The PTX is the same.",
    (
        "grouped_mlp/triton/to_slots_kernels to_slots_blocks_kernel: "
        "for k in range(0, depth, DEPTH): -> for k in range(0, (depth) - 1, DEPTH):"
    ): _WIDTHS,
    (
        "grouped_mlp/triton/aligned_kernels pack_rows_kernel: "
        "for d0 in range(0, dim, COLS): -> for d0 in range(0, (dim) - 1, COLS):"
    ): _WIDTHS,
    (
        "grouped_mlp/triton/aligned_kernels add_products: "
        "for k in range(0, depth, DEPTH): -> for k in range(0, (depth) - 1, DEPTH):"
    ): _WIDTHS,
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
        "grouped_mlp/triton/to_images_kernels choices_by_expert: "
        "experts = tl.load(expert + slots, mask=mine, other=2147483647) -> "
        "experts = tl.load(expert + slots, mask=mine, other=2147483646)"
    ): (
        "It only has to be above every expert, so that choices past top_k raise no place; their own place is replaced "
        "by CHOICES, and no step asks for their row and expert."
    ),
    (
        "grouped_mlp/triton/sum_kernels gate_grad_kernel: "
        "s = tl.load(sums + slot // top_k * dim + d, mask=d < dim, other=0.0) -> "
        "s = tl.load(sums + slot // top_k * dim + d, mask=d < dim, other=1.0)"
    ): "It is multiplied by the bias, which is 0 there by the same mask.",
    (
        "triton_common expert_tiles: "
        "start = tl.load(offsets + e, mask=e < num_experts, other=0) * tokens -> "
        "start = tl.load(offsets + e, mask=e < num_experts, other=1) * tokens"
    ): "Both sums take the tiles of experts up to `expert` alone, all of which are below num_experts.",
}
"""`mutants.Mutant.key` -> proof."""
