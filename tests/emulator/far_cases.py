"""Cases whose results, or what they read, lie more than 2^31 elements from the first, as of `shipped_cases`.

Offsets that a kernel computes in 32 bits would wrap around. The storages are the size that such shapes need, and hardly
a page of them is touched; one block of a launch is run.
"""

import sys
from collections.abc import Callable

import torch
from shipped_cases import Case, route_case, untouched

COLS = 256

EXPERTS, LAST = 128, 127
FAR = (2**31 // LAST // 8 + 1) * 8
"""Columns of an expert: the biases of the last expert begin just past element 2^31."""


def far_cases(shipped) -> dict[str, tuple[int, Callable[[], Case]]]:
    """Name -> architecture, and what makes the case."""
    return {
        "an image far apart": (90, lambda: third_image(shipped)),
        "hidden biases far apart": (90, lambda: hidden_biases(shipped)),
        "biases by slot far apart": (90, lambda: biases_by_slot(shipped)),
        "biases of packed rows far apart": (90, lambda: biases_of_packed_rows(shipped)),
        "biases of gathered rows far apart": (80, lambda: biases_of_gathered_rows(shipped)),
        "biases of gates far apart": (80, lambda: biases_of_gates(shipped)),
        "packed rows far apart": (90, lambda: packed_rows(shipped)),
        "probabilities far apart": (80, lambda: probabilities()),
        "rows far apart": (80, lambda: route_case(shipped, 3, 40, 3, 2, torch.bfloat16, strides=(2**30 + 8, 1))),
        "columns far apart": (80, lambda: route_case(shipped, 3, 40, 3, 2, torch.bfloat16, strides=(1, 2**26))),
        "parts of a sum far apart": (80, lambda: parts_of_a_sum()),
        "parts of a gradient far apart": (80, lambda: parts_of_a_gradient()),
    }


def _case(kernel, block, run, exact, dtype=torch.bfloat16) -> Case:
    """run: gives the columns that are looked at; exact: what they must be, in float64."""

    def compute(emulator):
        emulator.only = {kernel: [block]}
        return {"columns": run()}

    return Case(dtype, compute, lambda precision: {"columns": exact.to(precision)})


def third_image(shipped) -> Case:
    """The first columns of the third image of three, by `sum_choices`."""
    tokens, width, depth = 64, 2**24, 16
    generator = torch.Generator().manual_seed(0)
    out, weight, bias = untouched(3, tokens, width), untouched(2, width, depth), untouched(2, width)
    rows = torch.randn(6, tokens, depth, generator=generator).bfloat16()
    weight[:, :COLS] = torch.randn(2, COLS, depth, generator=generator)
    bias[:, :COLS] = torch.randn(2, COLS, generator=generator)
    gates = torch.rand(3, 2, generator=generator)
    # Every image takes expert 0, then expert 1: slots 0, 2, 4, then 1, 3, 5.
    order, offsets = torch.tensor([0, 2, 4, 1, 3, 5]), torch.tensor([0, 3, 6])
    slots = shipped.mlp_records.Slots(gates, order, offsets)
    plan = shipped.plan.Plan(slots, tokens, 1, "half", 90, shipped.configurations.TILES)
    product = shipped.plan.Product(rows, weight, True, bias, gates, out, None)
    w, b = weight[:, :COLS].double(), bias[:, :COLS].double()
    exact = sum(rows[place].double() @ w[e].T + gates[2, e].double() * b[e] for e, place in ((0, 2), (1, 5)))

    def run():
        shipped.aligned.sum_choices(product, plan)
        return out[2, :, :COLS]

    # Three tiles of rows walk the columns side by side: the third program has the third image.
    return _case("to_images_kernel", 2, run, exact)


def far_expert(shipped, tokens, depth):
    """One slot of the last expert: its plan, rows ``[1, tokens, depth]``, weights whose experts overlap, and biases."""
    generator = torch.Generator().manual_seed(0)
    weight = untouched((FAR + LAST) * depth).as_strided((EXPERTS, FAR, depth), (depth, depth, 1))
    weight[LAST, :COLS] = torch.randn(COLS, depth, generator=generator)
    bias = untouched(EXPERTS, FAR)
    bias[LAST, :COLS] = torch.randn(COLS, generator=generator)
    offsets = torch.tensor([0] * EXPERTS + [1])
    slots = shipped.mlp_records.Slots(torch.tensor([[0.75]]), torch.tensor([0]), offsets)
    plan = shipped.plan.Plan(slots, tokens, tokens // 64, "half", 90, shipped.configurations.TILES)
    return plan, torch.randn(1, tokens, depth, generator=generator).bfloat16(), weight, bias


def _exact(rows, weight, bias, gate=1.0):
    return rows[0].double() @ weight[LAST, :COLS].double().T + gate * bias[LAST, :COLS].double()


def hidden_biases(shipped) -> Case:
    plan, x, weight, bias = far_expert(shipped, 64, 8)
    a = untouched(1, 64, FAR)
    weights = shipped.MLPWeights(weight, bias, None, None)

    def run():
        shipped.aligned.fc1(x, weights, None, a, plan)
        return a[0, :, :COLS]

    return _case("fc1_blocks_kernel", 0, run, torch.nn.functional.gelu(_exact(x, weight, bias)))


def biases_by_slot(shipped) -> Case:
    plan, rows, weight, bias = far_expert(shipped, 64, 16)
    out = untouched(1, 64, FAR)
    product = shipped.plan.Product(rows, weight, True, bias, plan.slots.gates, out, None)

    def run():
        shipped.aligned.to_slots(product, out, plan)
        return out[0, :, :COLS]

    return _case("to_slots_blocks_kernel", 0, run, 0.75 * _exact(rows, weight, bias))


def biases_of_packed_rows(shipped) -> Case:
    """The packed rows come behind those of the block, and their tile is the second."""
    plan, rows, weight, bias = far_expert(shipped, 66, 16)
    product = shipped.plan.Product(rows, weight, True, bias, plan.slots.gates, untouched(1, 66, FAR), None)

    def run():
        return shipped.aligned.sum_choices(product, plan)[0, 0, :, :COLS]

    return _case("to_images_kernel", 1, run, _exact(rows, weight, bias, 0.75)[64:])


def biases_of_gathered_rows(shipped) -> Case:
    plan, rows, weight, bias = far_expert(shipped, 64, 16)
    plan, out = plan._replace(blocks=0, arch=80), untouched(1, 1, 64, FAR)
    product = shipped.plan.Product(rows, weight, True, bias, None, out, None)
    gather = sys.modules[shipped.grouped_mlp.__name__ + ".gather"]
    columns = plan.tile("to_slots").cols

    def run():
        gather.to_slots(product, out, plan)
        return out[0, 0, :, :columns]

    return _case("to_slots_kernel", 0, run, _exact(rows, weight, bias)[:, :columns])


def biases_of_gates(shipped) -> Case:
    """The gradient of a gate of the last of many experts: the program walks all of its biases."""
    experts = 2048
    width = 2**31 // (experts - 1) + 1
    generator = torch.Generator().manual_seed(0)
    bias, sums = untouched(experts, width), torch.zeros(1, width)
    bias[-1, -COLS:], sums[0, -COLS:] = torch.randn(2, COLS, generator=generator)
    offsets, dgates = torch.tensor([0] * experts + [1]), torch.empty(1)
    kernels = sys.modules[shipped.grouped_mlp.__name__ + ".sum_kernels"]

    def run():
        kernels.gate_grad_kernel[(1,)](
            gate_parts=torch.tensor([[0.5]]),
            sums=sums,
            slot_order=torch.tensor([0]),
            offsets=offsets,
            bias=bias,
            dgates=dgates,
            num_experts=experts,
            num_parts=1,
            top_k=1,
            dim=width,
            EXPERTS=experts,
            BLOCK=512,
        )
        return dgates

    exact = 0.5 + sums[0, -COLS:].double() @ bias[-1, -COLS:].double()
    return _case("gate_grad_kernel", 0, run, exact[None], torch.float32)


def packed_rows(shipped) -> Case:
    """The row that begins at element 2^31 of the packed ones."""
    row, width = 2**21, 1024
    x = torch.randn(1, 65, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed, slot_order = untouched(row + 1, width), torch.zeros(row + 1, dtype=torch.int64)
    strides = {"stride_b": x.stride(0), "stride_n": x.stride(1)}

    def run():
        shipped.aligned.aligned_kernels.pack_rows_kernel[(row + 1,)](
            x=x, slot_order=slot_order, packed=packed, rest=1, top_k=1, dim=width, COLS=width, **strides
        )
        return packed[row]

    return _case("pack_rows_kernel", row, run, x[0, 0].double())


def probabilities() -> Case:
    """Of three rows, of which the third begins at element 2^31."""
    import probes

    experts, columns = 2**30, 16
    p, out = untouched(3, experts, dtype=torch.float32), torch.empty(columns)
    p[:, :columns] = torch.rand(3, columns, generator=torch.Generator().manual_seed(0))

    def run():
        probes.mean_probability_kernel[(1,)](p, out, 3, experts, columns, 16)
        return out

    exact = p[:, :columns].double().mean(0)
    return _case("mean_probability_kernel", 0, run, exact, torch.float32)


def parts_of_a_sum() -> Case:
    """Rows on both sides of element 2^31, of whole numbers that bfloat16 adds up exactly."""
    import probes

    hidden, columns, first, end = 2**24, 16, 120, 130
    parts, out = untouched(end, hidden), torch.empty(columns)
    parts[first:, :columns] = torch.randint(8, (end - first, columns), generator=torch.Generator().manual_seed(0))

    def run():
        probes.sum_parts_kernel[(1,)](parts, out, first, end, hidden, columns, 16)
        return out

    return _case("sum_parts_kernel", 0, run, parts[first:, :columns].double().sum(0), torch.float32)


def parts_of_a_gradient() -> Case:
    """Of three parts the first rows of the third, which begins at element 2^31."""
    import probes

    side, width = 16, 2**15
    height = 2**30 // width
    parts = untouched(2 * height + side, width)
    values = torch.rand(side, side, generator=torch.Generator().manual_seed(0)).bfloat16().float()

    def run():
        probes.store_chunk_kernel[(1,)](values, parts, torch.empty(1), 2, height, width, side)
        return parts[2 * height :, :side]

    return _case("store_chunk_kernel", 0, run, values.double(), torch.float32)
