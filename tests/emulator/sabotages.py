"""Faults that somebody could make, in the source of a kernel or as a compiler: for `test_sabotages.py`."""

from typing import NamedTuple

WRONG = r"^\w+( \d+)?: (\S+ > \S+)?$"
"""What `check` says of a result that is too far from float64, or is not the specification's number."""

ROUTE, ALIGN, EMA = "route.triton", "align_loss.triton", "group_ema.triton"
GATHER, ALIGNED, IMAGES, SUMS, WGRAD, COMMON = (
    "grouped_mlp.triton.gather_kernels",
    "grouped_mlp.triton.aligned_kernels",
    "grouped_mlp.triton.to_images_kernels",
    "grouped_mlp.triton.sum_kernels",
    "grouped_mlp.triton.weight_grad_kernels",
    "triton_common",
)


EVERY = None


class Sabotage(NamedTuple):
    """A change of the ``which``-th match of ``before``, or of EVERY: in a kernel's PTX, or in a module's source."""

    name: str
    case: str
    where: str
    before: str
    after: str
    caught: str
    """What the message matches."""
    which: int | None = 0
    fast: bool = False


TRY_WAIT = r"mbarrier\.try_wait\.parity\.shared\.b64 complete, \[(%r\d+)\], (%r\d+);"
EXPECT = r"(mbarrier\.arrive\.expect_tx\.shared\.b64 _, \[%r\d+\]), (\d+);"
BOX_2D = r"\[(%r\d+)\], \[(%rd\d+), \{(%r\d+), (%r\d+)\}\], \[(%r\d+)\];"
LOOP = r"(setp\.lt\.s32\s+%p\d+, )(%r\d+), (%r\d+)(;\s+@%p\d+ bra\s)"
BOX_3D = r"\{(%r\d+), (%r\d+), (%r\d+)\}\], \[(%r\d+)\];"
SWIZZLE_128, SWIZZLE_64 = 4611686293305294848, 9223372311732682752
ANY = r"race on|in flight|uninitialised|deadlock|outside of|misaligned|still reads|too early|missing|" + WRONG
RACE = r"race on shared memory|in flight|uninitialised"

FC1, PAIRS, TO_IMAGES, WGRAD_BLOCKS = (
    "fc1_blocks_kernel",
    "pairs_to_images_kernel",
    "to_images_kernel",
    "weight_grad_blocks_kernel",
)

HOPPER = [
    Sabotage(
        "the wait for products is one higher",
        "aligned",
        FC1,
        r"wait_group\.sync\.aligned 2;",
        "wait_group.sync.aligned 3;",
        "race|in flight",
        1,
        True,
    ),
    Sabotage(
        "the wait after the loop is missing", "aligned", FC1, r"wgmma\.wait_group\.sync\.aligned 0;", "", "too early", 1
    ),
    Sabotage(
        "sums are read one product early",
        "aligned",
        FC1,
        r"wgmma\.wait_group\.sync\.aligned 0;",
        "wgmma.wait_group.sync.aligned 1;",
        "too early|ends while its wgmma",
        1,
    ),
    Sabotage(
        "the parity never turns",
        "aligned",
        FC1,
        TRY_WAIT,
        r"mbarrier.try_wait.parity.shared.b64 complete, [\1], 0;",
        ANY,
        fast=True,
    ),
    Sabotage(
        "the parity is flipped",
        "aligned",
        FC1,
        TRY_WAIT,
        r"mbarrier.try_wait.parity.shared.b64 complete, [\1], 1;",
        ANY,
    ),
    Sabotage("nobody tries the mbarrier again", "aligned", FC1, r"@!complete bra\.uni waitLoop;", "", RACE),
    Sabotage(
        "a wait for the mbarrier of another stage",
        "aligned",
        FC1,
        TRY_WAIT,
        r"mbarrier.try_wait.parity.shared.b64 complete, [\1+8], \2;",
        ANY,
        1,
    ),
    Sabotage("half of the bytes are expected", "aligned", FC1, EXPECT, r"\1, 4096;", ANY, -1),
    Sabotage("16 bytes too many are expected", "aligned", FC1, EXPECT, r"\1, 8208;", "deadlock.*16 bytes to come", -1),
    Sabotage(
        "coordinates of a box are swapped", "aligned", FC1, BOX_2D, r"[\1], [\2, {\4, \3}], [\5];", WRONG, -1, True
    ),
    Sabotage(
        "two coordinates of a box of weights are swapped", "aligned", FC1, BOX_3D, r"{\2, \1, \3}], [\4];", WRONG, -1
    ),
    Sabotage(
        "a box lies where another one lies", "aligned", FC1, BOX_2D, r"[\1+-32768], [\2, {\3, \4}], [\5];", ANY, 1
    ),
    Sabotage(
        "a copy reports to the mbarrier of another", "aligned", FC1, BOX_2D, r"[\1], [\2, {\3, \4}], [\5+8];", ANY
    ),
    Sabotage("every lane issues the copy", "aligned", FC1, r"@%p\d+ (cp\.async\.bulk\.tensor\.2d)", r"\1", ANY),
    Sabotage(
        "the mbarrier expects two arrivals",
        "aligned",
        FC1,
        r"(mbarrier\.init\.shared::cta\.b64 \[%r\d+\]), 1;",
        r"\1, 2;",
        "deadlock",
    ),
    Sabotage(
        "no barrier after the mbarriers",
        "aligned",
        FC1,
        r"bar\.sync\s+0;",
        "",
        "used without order after its mbarrier.init|no mbarrier",
        EVERY,
    ),
    Sabotage(
        "no barrier before a stage is filled again", "aligned", FC1, r"bar\.sync\s+0;(?=\s+elect\.sync)", "", ANY, -3
    ),
    Sabotage(
        "no wgmma.fence before the loop's products",
        "aligned",
        FC1,
        r"wgmma\.fence\.sync\.aligned;",
        "",
        "missing wgmma.fence",
    ),
    Sabotage(
        "a group of products is not committed",
        "aligned",
        FC1,
        r"wgmma\.commit_group\.sync\.aligned;",
        "",
        "race|in flight|too early",
    ),
    Sabotage(
        "the swizzle of a descriptor is narrower",
        "aligned",
        FC1,
        rf"or\.b64(\s+%rd\d+, %rd\d+), {SWIZZLE_128};",
        rf"or.b64\1, {SWIZZLE_64};",
        ANY,
        -1,
        True,
    ),
    Sabotage(
        "the stride of a descriptor is half",
        "aligned",
        FC1,
        rf"or\.b64(\s+%rd\d+, %rd\d+), {SWIZZLE_128};",
        r"or.b64\1, 4611686155866341376;",
        ANY,
        -1,
    ),
    Sabotage(
        "a descriptor steps twice as far along the sum",
        "aligned",
        FC1,
        rf", {SWIZZLE_128 + 2};",
        rf", {SWIZZLE_128 + 4};",
        WRONG,
    ),
    Sabotage(
        "a warp group reads the columns of another",
        "aligned",
        FC1,
        r"and\.b32(\s+%r\d+, %r\d+), 1024;",
        r"and.b32\1, 512;",
        ANY,
        -1,
    ),
    Sabotage("a product forgets the sum so far", "aligned", FC1, r"mov\.pred(\s+%p\d+), -1;", r"mov.pred\1, 0;", WRONG),
    Sabotage("a product reads B transposed", "aligned", FC1, r"1, 1, 0, 0;", "1, 1, 0, 1;", ANY),
    Sabotage(
        "two sums are exchanged",
        "aligned",
        FC1,
        r"(f32\.bf16\.bf16 \{)(%r\d+),(%r\d+),",
        r"\1\3,\2,",
        "too early|" + WRONG,
    ),
    Sabotage("the loop ends one step early", "aligned", FC1, LOOP, r"sub.s32 \3, \3, 64; \1\2, \3\4", ANY, -1),
    Sabotage("no barrier in the epilogue of wgmma", "aligned", FC1, r"bar\.sync\s+0;", "", RACE, -1),
    Sabotage(
        "the epilogue's buffer is written 16 bytes too far",
        "aligned",
        FC1,
        r"(st\.shared\.v2\.b32\s+\[%r\d+)\]",
        r"\1+16]",
        ANY,
        EVERY,
    ),
    Sabotage(
        "the wait for products is one higher in pairs",
        "aligned, images",
        TO_IMAGES,
        r"wait_group\.sync\.aligned 1;",
        "wait_group.sync.aligned 2;",
        "race|in flight",
    ),
    Sabotage(
        "slot numbers are read before they land",
        "aligned, long",
        WGRAD_BLOCKS,
        r"cp\.async\.wait_group\s+1;",
        "cp.async.wait_group 2;",
        "in flight",
    ),
    Sabotage(
        "a copy of slot numbers is not committed",
        "aligned, long",
        WGRAD_BLOCKS,
        r"cp\.async\.commit_group;",
        "",
        "in flight|race|ends while",
    ),
    Sabotage(
        "no proxy fence before TMA",
        "aligned, long",
        WGRAD_BLOCKS,
        r"fence\.proxy\.async\.shared::cta;",
        "",
        "missing fence.proxy.async",
    ),
]

TO_SLOTS, WEIGHT_GRAD = "to_slots_kernel", "weight_grad_kernel"

AMPERE = [
    Sabotage(
        "the wait for copies is one higher",
        "gather",
        TO_SLOTS,
        r"cp\.async\.wait_group\s+4;",
        "cp.async.wait_group 5;",
        "in flight",
        fast=True,
    ),
    Sabotage("the wait for copies is missing", "gather", TO_SLOTS, r"cp\.async\.wait_group\s+4;", "", "in flight"),
    Sabotage(
        "a commit comes after the next copies", "gather", TO_SLOTS, r"cp\.async\.commit_group;", "", "in flight", -3
    ),
    Sabotage("a commit of the loop is missing", "gather", TO_SLOTS, r"cp\.async\.commit_group;", "", "in flight", -1),
    Sabotage(
        "no barrier after the wait", "gather", TO_SLOTS, r"(cp\.async\.wait_group\s+4;[^b]*)bar\.sync\s+0;", r"\1", RACE
    ),
    Sabotage(
        "no barrier before a buffer is filled again",
        "gather",
        TO_SLOTS,
        r"bar\.sync\s+0;(?=(?:(?!bar\.sync)[\s\S])*cp\.async\.cg(?:(?!bar\.sync)[\s\S])*bra\s)",
        "",
        RACE,
        -1,
    ),
    Sabotage("a matrix is loaded without .trans", "gather", TO_SLOTS, r"(ldmatrix\S+x4)\.trans", r"\1", WRONG, 0, True),
    Sabotage("a matrix is loaded with .trans", "gather", TO_SLOTS, r"(ldmatrix\S+x4)(\.shared)", r"\1.trans\2", WRONG),
    Sabotage("the registers of B are exchanged", "gather", TO_SLOTS, r"\{ (%r\d+), (%r\d+) \}", r"{ \2, \1 }", WRONG),
    Sabotage(
        "registers of A are exchanged",
        "gather",
        TO_SLOTS,
        r"(f32 \{[^}]+\}), \{ (%r\d+), (%r\d+),",
        r"\1, { \3, \2,",
        WRONG,
    ),
    Sabotage(
        "the swizzle of a lane is another one",
        "gather",
        TO_SLOTS,
        r"xor\.b32(\s+%r\d+, %r\d+), 32;",
        r"xor.b32\1, 16;",
        ANY,
    ),
    Sabotage(
        "the pipeline has a stage too many",
        "gather",
        TO_SLOTS,
        r"setp\.gt\.s32(\s+%p\d+, %r\d+), 2;(?=\s+selp)",
        r"setp.gt.s32\1, 3;",
        ANY,
    ),
    Sabotage(
        "rows past the end are copied",
        "gather",
        TO_SLOTS,
        r"selp\.b32(\s+%r\d+), 16, 0, (%p\d+);",
        r"selp.b32\1, 16, 16, \2;",
        ANY,
        1,
    ),
    Sabotage(
        "a copy goes to the buffer of the next",
        "gather",
        TO_SLOTS,
        r"(cp\.async\.cg\.shared\.global \[ %r\d+ \+ )0( \])",
        r"\g<1>4096\2",
        ANY,
    ),
    Sabotage(
        "a copy reads 16 bytes too far",
        "gather",
        TO_SLOTS,
        r"(cp\.async\.cg\.shared\.global \[ %r\d+ \+ 0 \], \[ %rd\d+ \+ )0( \])",
        r"\g<1>16\2",
        ANY,
    ),
    Sabotage(
        "an address is cut to 32 bits",
        "gather",
        TO_SLOTS,
        r"mad\.wide\.s32(\s+)(%rd\d+), (%r\d+), 2, (%rd\d+);",
        r"mad.wide.s32\1\2, \3, 2, \4; and.b64 \2, \2, 4294967295;",
        "outside of every allocation",
    ),
    Sabotage(
        "lanes are shuffled with others",
        "gather, small",
        TO_SLOTS,
        r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+), 1,",
        r"\1, 2,",
        ANY,
    ),
    Sabotage(
        "a scan adds one lane too many",
        "gather, small",
        TO_SLOTS,
        r"setp\.eq\.b32(\s+%p\d+, %r\d+), 0;(?=[^;]*;\s+shfl|[^;]*;[^;]*;\s+shfl)",
        r"setp.ne.b32\1, 0;",
        ANY,
    ),
    Sabotage(
        "two halves of a word are exchanged",
        "gather",
        TO_SLOTS,
        r"cvt\.rn\.bf16x2\.f32(\s+%r\d+), (%r\d+), (%r\d+);",
        r"cvt.rn.bf16x2.f32\1, \3, \2;",
        WRONG,
    ),
    Sabotage(
        "the epilogue stores without its predicate",
        "gather",
        TO_SLOTS,
        r"@%p\d+ (st\.global)",
        r"\1",
        "outside of every allocation|race on global",
        -1,
    ),
    Sabotage("no barrier in the epilogue", "gather", TO_SLOTS, r"bar\.sync\s+0;", "", RACE, -1),
    Sabotage("one step too few", "gather", TO_SLOTS, LOOP, r"sub.s32 \3, \3, 32; \1\2, \3\4", WRONG),
    Sabotage(
        "slot numbers of the gathered rows are not waited for",
        "gather",
        WEIGHT_GRAD,
        r"cp\.async\.wait_group\s+(?!0)\d+;",
        "cp.async.wait_group 7;",
        "in flight",
    ),
    Sabotage(
        "no barrier in the reduction over warps",
        "align_loss",
        "forward_kernel",
        r"bar\.sync\s+0;",
        "",
        "race on shared memory|uninit",
        1,
    ),
    Sabotage("a row's sum is stored by every lane", "align_loss", "forward_kernel", r"@%p\d+ (st\.global)", r"\1", ANY),
]

SOURCES = [
    Sabotage(
        "rows of the next expert are written",
        "gather, small",
        GATHER,
        "inside = valid[:, None] & h_valid[None, :]\n    if z is not None",
        "inside = h_valid[None, :]\n    if z is not None",
        "race on global|outside|" + WRONG,
        fast=True,
    ),
    Sabotage(
        "the stride of the rows is one more",
        "gather, small",
        GATHER,
        "rows_in + rows.to(tl.int64) * depth",
        "rows_in + rows.to(tl.int64) * (depth + 1)",
        ANY,
    ),
    Sabotage(
        "the tail of the sum is not masked",
        "gather, small",
        GATHER,
        "mask=a_valid[:, None] & inside[None, :], other=0.0",
        "mask=a_valid[:, None], other=0.0",
        ANY,
    ),
    Sabotage(
        "the last step of a sum is left out",
        "gather, small",
        GATHER,
        "for k0 in range(0, depth, DEPTH)",
        "for k0 in range(0, depth - DEPTH, DEPTH)",
        WRONG,
    ),
    Sabotage(
        "an expert's tiles begin one row late",
        "gather, small",
        COMMON,
        "start + (tile - ends + tiles) * ROWS",
        "start + 1 + (tile - ends + tiles) * ROWS",
        ANY,
    ),
    Sabotage(
        "programs of a group share a tile",
        "gather, small",
        COMMON,
        "return first + within % size, within // size",
        "return first, within // size",
        "race on global|" + ANY,
    ),
    Sabotage(
        "one side of a weight gradient is not masked",
        "gather, small",
        WGRAD,
        "left + left_at[:, None] + i[None, :], mask=valid[:, None] & i_valid[None, :]",
        "left + left_at[:, None] + i[None, :], mask=i_valid[None, :]",
        ANY,
    ),
    Sabotage(
        "parts of an expert are all one part",
        "gather, cut",
        WGRAD,
        "tl.where(count > 1, before + within, -1)",
        "tl.where(count > 1, before, -1)",
        "race on global",
    ),
    Sabotage(
        "gates' parts of two columns are one",
        "aligned, wide",
        ALIGNED,
        "at = (row // of_slot).to(tl.int64) * num_parts + col * blocks + row // BLOCK % blocks",
        "at = (row // of_slot).to(tl.int64) * num_parts + row // BLOCK % blocks",
        "race on global",
    ),
    Sabotage(
        "the second image of a pair has the rows of the first",
        "aligned, pairs",
        IMAGES,
        "rows_in.load([row1, k])",
        "rows_in.load([row0, k])",
        WRONG,
    ),
    Sabotage(
        "an image has the partner of another set",
        "aligned, pairs",
        IMAGES,
        "num_images - 1)) == number + 1",
        "num_images - 1)) != number",
        ANY,
    ),
    Sabotage(
        "one block too many",
        "aligned, long",
        WGRAD,
        "for block in range(first * blocks, end * blocks):",
        "for block in range(first * blocks, end * blocks + 1):",
        ANY,
    ),
    Sabotage(
        "an odd image of a pair is done again",
        "aligned, pairs",
        IMAGES,
        "tl.where(single, first >= end, number % 2 == 1)",
        "tl.where(single, first >= end, number < 0)",
        "race on global",
    ),
    Sabotage(
        "slots of an expert are counted with themselves",
        "route",
        ROUTE,
        "earlier = tl.cumsum(chosen, 0) - chosen",
        "earlier = tl.cumsum(chosen, 0)",
        ANY,
    ),
    Sabotage(
        "rows past the end are stored",
        "route",
        ROUTE,
        "tl.store(p + at, prob, mask=inside)",
        "tl.store(p + at, prob, mask=e_valid[None, :])",
        "outside of every allocation",
    ),
    Sabotage(
        "a row's saved sum lies on another's",
        "align_loss",
        ALIGN,
        "tl.store(saved + rows, lse_q, mask=valid)",
        "tl.store(saved + rows + num_rows, lse_q, mask=valid)",
        "race on|" + ANY,
    ),
    Sabotage(
        "an alignment is promised that is not there",
        "group_ema",
        EMA,
        "(size * 4)) % 16 == 0",
        "(size * 4)) % 4 == 0",
        ANY,
    ),
    Sabotage(
        "programs' blocks overlap",
        "group_ema",
        EMA,
        "(pid - tl.load(row + 4)) * BLOCK",
        "(pid - tl.load(row + 4)) * (BLOCK // 2)",
        "race on global|" + WRONG,
    ),
    Sabotage("an expert of weight 0 is read", "group_ema", EMA, "if scale != 0.0:", "if scale >= 0.0:", WRONG),
]
