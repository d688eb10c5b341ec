"""Results more than 2^31 elements from the first: offsets that a kernel computes in 32 bits would wrap around.

The storages are the size that such shapes need, and hardly a page of them is touched; one block of the launch is run.
"""

import sys

import torch

WIDTH, TOKENS, DEPTH, COLS = 2**24, 64, 16, 256
OFFSET = "out += (image.to(tl.int64) * tokens + n) * width"


def untouched(*shape):
    size = torch.Size(shape).numel()
    return torch.tensor([], dtype=torch.bfloat16).set_(torch.UntypedStorage(2 * size), 0, shape)


def third_image(shipped):
    """The first columns of the third image of three, by `sum_choices`, and what they must be."""
    generator = torch.Generator().manual_seed(0)
    out, weight, bias = untouched(3, TOKENS, WIDTH), untouched(2, WIDTH, DEPTH), untouched(2, WIDTH)
    rows = torch.randn(6, TOKENS, DEPTH, generator=generator).bfloat16()
    weight[:, :COLS] = torch.randn(2, COLS, DEPTH, generator=generator)
    bias[:, :COLS] = torch.randn(2, COLS, generator=generator)
    gates = torch.rand(3, 2, generator=generator)
    # Every image takes expert 0, then expert 1: slots 0, 2, 4, then 1, 3, 5.
    order, offsets = torch.tensor([0, 2, 4, 1, 3, 5]), torch.tensor([0, 3, 6])
    slots = shipped.mlp_records.Slots(gates, order, offsets)
    plan = shipped.plan.Plan(slots, TOKENS, 1, "half", 90, shipped.configurations.TILES)
    product = shipped.plan.Product(rows, weight, True, bias, gates, out, None)
    # Three tiles of rows walk the columns side by side: the third program has the third image.
    with shipped.emulated(90, only={"to_images_kernel": [2]}):
        sys.modules[shipped.grouped_mlp.__name__ + ".aligned"].sum_choices(product, plan)
    w, b = weight[:, :COLS].double(), bias[:, :COLS].double()
    want = sum(rows[place].double() @ w[e].T + gates[2, e].double() * b[e] for e, place in ((0, 2), (1, 5)))
    return out[2, :, :COLS], want


def test_an_image_of_which_the_offset_needs_more_than_32_bits(shipped):
    got, want = third_image(shipped)
    assert shipped.relative_error(got, want) < 4e-3


def test_an_offset_of_32_bits_is_seen(shipped, tmp_path):
    module = sys.modules[shipped.grouped_mlp.__name__ + ".to_images_kernels"]
    with shipped.sabotaged(module, OFFSET, OFFSET.replace(".to(tl.int64)", ".to(tl.int32)"), tmp_path):
        try:
            got, want = third_image(shipped)
        except shipped.PTXError as error:
            assert "outside of every allocation" in str(error)
        else:
            assert not shipped.relative_error(got, want) < 0.1
