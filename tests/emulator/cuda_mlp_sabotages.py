"""Faults that somebody could make in csrc/grouped_mlp: for `test_cuda_grouped_mlp.py`."""

from cuda_sabotages import Change

WRONG = "^(out|dx|dgates|dfc1|dfc2|director)"

GROUPED_MLP = [
    Change(
        "a step is multiplied before everyone's part has landed",
        "grouped_mlp/multiply.h",
        r"__syncthreads\(\);",
        "",
        "race on shared memory|in flight|uninitialised",
    ),
    Change(
        "the last group but one may still be on its way",
        "grouped_mlp/multiply.h",
        r"wait_for_copies<MLP_STAGES - 2>",
        "wait_for_copies<MLP_STAGES - 1>",
        "in flight",
    ),
    Change(
        "a copy overwrites the step that is read",
        "grouped_mlp/multiply.h",
        r"fetch\(step \+ MLP_STAGES - 1\);",
        "fetch(step + MLP_STAGES);",
        "race on shared memory|uninitialised|in flight|" + WRONG,
    ),
    Change(
        "a row past the last one is read",
        "grouped_mlp/multiply.h",
        r"row < stop \?",
        "row <= stop ?",
        "outside of every|" + WRONG,
    ),
    Change(
        "rows are looked up for the step that is copied",
        "grouped_mlp/multiply.h",
        r"look_up\(step \+ 1\)",
        "look_up(step)",
        WRONG,
    ),
    Change(
        "columns past the width are copied", "grouped_mlp/multiply.h", r"column_ < width", "true", "outside of every"
    ),
    Change("depth past the last element is copied", "grouped_mlp/multiply.h", r" && k < depth_", "", WRONG),
    Change(
        "rows of another expert are written",
        "grouped_mlp/forward.cu",
        r"row < piece\.stop && own\.inside",
        "own.inside",
        "race on global|outside of every",
    ),
    Change("the director is saved", "grouped_mlp/forward.cu", r"p\.z != nullptr && .*;", "true;", "outside of every"),
    Change(
        "a row's gate is that of another",
        "grouped_mlp/hidden_grad.cu",
        r"locate_row\(p\.slots, row\)\.slot",
        "locate_row(p.slots, piece.first).slot",
        WRONG,
    ),
    Change(
        "lanes exchange with the wrong neighbour",
        "grouped_mlp/strips.h",
        r"words\[i \+ bit\], bit\)",
        "words[i + bit], 3 - bit)",
        WRONG,
    ),
    Change(
        "half of the gate's parts",
        "grouped_mlp/hidden_grad.cu",
        r"part < p\.num_parts",
        "2 * part < p.num_parts",
        WRONG,
    ),
    Change(
        "parts of the lower half of a tile are left out",
        "grouped_mlp/hidden_grad.cu",
        r"2 \* ceil_div\(rows, MLP_TILE\)",
        "ceil_div(rows, MLP_TILE)",
        WRONG,
    ),
    Change(
        "parts of one expert lie on those of another",
        "grouped_mlp/tiles.h",
        r"offsets\[expert\] / most \+ rank",
        "rank",
        "race on global|" + WRONG,
    ),
    Change(
        "the last piece of an expert is left out of the sum",
        "grouped_mlp/weight_grad.cu",
        r"ceil_div\(count, p\.most\)\);",
        "count / p.most);",
        WRONG,
    ),
    Change(
        "an expert without slots has no gradient",
        "grouped_mlp/weight_grad.cu",
        r"piece\.first >= piece\.stop && piece\.number > 0",
        "piece.first >= piece.stop",
        WRONG,
    ),
    Change(
        "a tile begins where the one before does",
        "grouped_mlp/tiles.h",
        r"size\) <= piece",
        "size) < piece",
        "outside of every|race on global|" + WRONG,
    ),
    Change(
        "a quotient is half of what it should be",
        "grouped_mlp/tiles.h",
        r"by\.multiplier >> by\.shift",
        "by.multiplier >> (by.shift + 1)",
        "outside of every|race on global|" + WRONG,
    ),
]
