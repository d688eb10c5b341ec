"""The director as one more expert of the forward's launches, and float32 weight gradients of half precision."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")

from dexkernels.ops.grouped_mlp import triton as grouped_mlp  # noqa: E402
from dexkernels.ops.grouped_mlp.triton import (  # noqa: E402
    aligned,
    aligned_kernels,
    gather,
    gather_kernels,
    plan,
    to_images_kernels,
    to_slots_kernels,
)
from dexkernels.records import MLPWeights  # noqa: E402
from dexkernels.testing import relative_error  # noqa: E402

from .conftest import embed, embed_rows  # noqa: E402
from .mlp_cases import check, make, run, slots_of, tiles  # noqa: E402


def with_director(*args, **kwargs):
    x, grad_out, gates, indices, weights = make(*args, **kwargs)
    g = torch.Generator().manual_seed(99)
    (_, H, D), dtype = weights[0].shape, x.dtype
    shapes = ((H, D), D**-0.5), ((H,), 1), ((D, H), H**-0.5), ((D,), 1)
    return (x, grad_out, gates, indices, weights), [
        (scale * torch.randn(s, generator=g)).to(dtype) for s, scale in shapes
    ]


# path, B, N, D, H, E, K, dtype: a tile of several images, of one, odd widths, empty experts, one expert, by slot.
CASES = [
    ("gather", 3, 5, 8, 12, 4, 2, torch.float32),
    ("gather", 2, 17, 7, 13, 3, 1, torch.float16),
    ("gather", 1, 65, 16, 24, 2, 2, torch.float16),
    ("gather", 9, 1, 16, 24, 40, 3, torch.float32),
    ("aligned", 3, 64, 16, 24, 2, 1, torch.float16),
    ("aligned", 3, 65, 24, 40, 6, 2, torch.float16),
    ("aligned", 8, 65, 16, 24, 2, 1, torch.float16),  # in pairs
    ("aligned", 5, 66, 16, 24, 2, 2, torch.float16),
    ("aligned", 2, 130, 16, 40, 3, 3, torch.float16),  # an even number of blocks
    ("aligned", 2, 70, 16, 24, 20, 2, torch.float16),  # results by slot
    ("aligned", 3, 64, 16, 24, 20, 1, torch.float16),  # of which one is the image's
    ("aligned", 1, 67, 8, 8, 1, 1, torch.float16),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(v).removeprefix("torch.") for v in c))
def test_results_are_those_of_the_spec_and_the_rest_does_not_change(case):
    path, *sizes = case
    inputs, director = with_director(*sizes)
    options = {"path": path, "tiling": tiles(halves=path == "aligned")}
    got = check(*inputs, director=director, **options)
    without = run(*inputs, **options)
    assert len(got) == len(without) + 1
    for a, b in zip(got, without, strict=False):
        assert torch.equal(a, b)


@pytest.mark.parametrize("path", ["gather", "aligned"])
def test_strided_inputs(path):
    inputs, director = with_director(3, 66, 16, 24, 4, 2, torch.float16)
    assert torch.equal(run(*inputs, path=path, director=director, layout=embed)[-1],
                       run(*inputs, path=path, director=director)[-1])  # fmt: skip
    check(*inputs, path=path, director=director, layout=embed)


@pytest.mark.parametrize("path, E, K", [("gather", 3, 2), ("aligned", 3, 2), ("aligned", 20, 2), ("aligned", 20, 1)])
@pytest.mark.parametrize("N", [64, 67])
def test_a_nan_of_the_one_does_not_reach_the_other(path, E, K, N):
    inputs, director = with_director(3, N, 16, 24, E, K, torch.float16)
    clean = run(*inputs, path=path, director=director)
    poisoned = [torch.full_like(d, torch.nan) for d in director]
    got = run(*inputs, path=path, director=poisoned)
    assert got[-1].isnan().all() and all(torch.equal(a, b) for a, b in zip(got[:-1], clean[:-1], strict=True))
    x, grad_out, gates, indices, weights = inputs
    weights = [torch.full_like(w, torch.nan) for w in weights]
    got = run(x, grad_out, gates, indices, weights, path=path, director=director)
    assert got[0].isnan().all() and torch.equal(got[-1], clean[-1])
    # A gate that is NaN has no part in it either.
    got = run(x, grad_out, torch.full_like(gates, torch.nan), indices, inputs[4], path=path, director=director)
    assert got[0].isnan().all() and torch.equal(got[-1], clean[-1])


@pytest.mark.parametrize("path", ["gather", "aligned"])
def test_nothing_is_saved_of_it(path):
    (x, _, gates, indices, weights), director = with_director(3, 65, 16, 24, 4, 2, torch.float16)
    stacked = MLPWeights(*(torch.cat((w, d[None])) for w, d in zip(weights, director, strict=True)))
    slots = slots_of(gates, indices, 4)
    for save in (True, False):
        out, z, director_out = grouped_mlp.forward(x, slots, stacked, save, path=path, tiles=tiles())
        assert z.shape == (6 if save else 0, 65, 24)
        for t in (out, director_out):
            # The poisoned margin has 8192 bytes.
            assert t.untyped_storage().nbytes() < t.nbytes + 9000, "a view would keep what it was cut from"


@pytest.mark.parametrize("path, E", [("gather", 4), ("aligned", 4), ("aligned", 20)])
def test_it_comes_in_the_same_launches(path, E, monkeypatch):
    launched = []
    kind = type(gather.fc1_kernel)
    real = kind.run
    monkeypatch.setattr(kind, "run", lambda self, *a, **k: launched.append(self.__name__) or real(self, *a, **k))
    inputs, director = with_director(3, 65, 16, 24, E, 2, torch.float16)
    run(*inputs, path=path)
    without, launched[:] = list(launched), []
    run(*inputs, path=path, director=director)
    assert launched == without != []


# Tiles that are full and that are not, of pairs and of none; experts without rows leave tiles that have none.
@pytest.mark.parametrize("layout", [lambda t: t, embed_rows], ids=["contiguous", "rows"])
@pytest.mark.parametrize(
    "path, B, N, E, K",
    [
        ("gather", 3, 5, 4, 2),
        ("gather", 4, 16, 2, 1),
        ("aligned", 3, 67, 3, 2),
        ("aligned", 8, 65, 2, 1),
        ("aligned", 5, 66, 2, 2),
        ("aligned", 3, 64, 3, 1),
        ("aligned", 3, 67, 20, 2),
        ("aligned", 1, 128, 20, 1),
    ],
)
def test_no_address_is_outside_of_the_arguments(path, B, N, E, K, layout, within_arguments):
    inputs, director = with_director(B, N, 16, 40, E, K, torch.float16, indices=torch.arange(K).repeat(B, 1))
    run(*inputs, path=path, director=director, layout=layout)


FAR, TALL = 2**25, 48
"""Images of one token each, and as many rows of one expert before them: 48 columns of both pass 2^31 elements."""


def far(rows, width):
    """``[rows, width]`` of which no page is touched."""
    storage = torch.UntypedStorage(2 * rows * width)
    return torch.tensor([], dtype=torch.float16).set_(storage, 0, (rows, width), (width, 1))


def last_tile(monkeypatch, module, tile):
    """Of launches of one program: it gets this tile, and the first column."""
    monkeypatch.setattr(module, "cut_in_groups", lambda pid, num_cols, group: (pid + tile, pid))


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


class Far(NamedTuple):
    """Rows of the director, of which the last alone are there, and what a launch of one program takes."""

    rows_in: torch.Tensor
    out: torch.Tensor
    weight: torch.Tensor
    shared: dict
    of_blocks: dict
    """What the kernels of the aligned path take besides."""

    @property
    def sizes(self):
        return {"depth": self.rows_in.shape[1], "width": self.out.shape[1], "director_out": self.out}


ROWS, COLS, DEPTH, NOTHING = 128, 128, 16, torch.zeros(1, dtype=torch.float16)


def launch_fc1(case):
    gather_kernels.fc1_kernel[(1,)](
        x=case.rows_in,
        weight=case.weight,
        z=None,
        a=case.out,
        tokens=1,
        top_k=1,
        dim=case.rows_in.shape[1],
        hidden=case.out.shape[1],
        stride_xb=case.rows_in.stride(0),
        stride_xn=case.rows_in.stride(1),
        stride_we=case.weight.stride(0),
        stride_wh=case.weight.stride(1),
        TANH=False,
        ROWS=ROWS,
        **case.shared,
    )


def launch_to_slots(case):
    gather_kernels.to_slots_kernel[(1,)](
        rows_in=case.rows_in,
        weight=case.weight,
        out=NOTHING,
        tokens=1,
        stride_we=case.weight.stride(0),
        stride_wk=case.weight.stride(2),
        stride_wj=case.weight.stride(1),
        HAS_BIAS=True,
        ROWS=ROWS,
        **case.shared,
        **case.sizes,
    )


def launch_fc1_blocks(case):
    aligned_kernels.fc1_blocks_kernel[(1,)](
        x=aligned.box(case.rows_in, 64, DEPTH),
        packed_x=None,
        z=None,
        a=case.out,
        top_k=1,
        dim=case.rows_in.shape[1],
        hidden=case.out.shape[1],
        TANH=False,
        HALVES=False,
        **case.shared,
        **case.of_blocks,
    )


def launch_to_slots_blocks(case):
    to_slots_kernels.to_slots_blocks_kernel[(1,)](
        rows_in=aligned.box(case.rows_in, ROWS, DEPTH),
        out=NOTHING,
        TRANSPOSED=True,
        **case.shared,
        **case.of_blocks,
        **case.sizes,
    )


def of_images(case):
    places = torch.zeros(2, dtype=torch.int32)
    places = {"position": places, "expert": places, "out": NOTHING, "by_slot": None, "top_k": 1}
    return case.shared | case.of_blocks | case.sizes | places | {"TRANSPOSED": True, "CHOICES": 1}


def launch_to_images(case):
    images = case.shared["director_images"]
    to_images_kernels.to_images_kernel[(1,)](
        rows_in=aligned.box(case.rows_in, 64, DEPTH), image_tiles=images, ROWS=64, **of_images(case)
    )


def launch_pairs_to_images(case):
    places, images = torch.zeros(2, dtype=torch.int32), case.shared["director_images"]
    to_images_kernels.pairs_to_images_kernel[(1,)](
        rows_in=aligned.box(case.rows_in, 64, DEPTH), order=places, index=places, num_images=images, **of_images(case)
    )


LAUNCHES = {
    launch_fc1: gather_kernels,
    launch_to_slots: gather_kernels,
    launch_fc1_blocks: aligned_kernels,
    launch_to_images: to_images_kernels,
    launch_pairs_to_images: to_images_kernels,
    launch_to_slots_blocks: to_slots_kernels,
}
"""Launch -> the module of its kernel."""


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda f: f.__name__.removeprefix("launch_"))
def test_rows_far_apart(launch, monkeypatch, within_arguments):
    # The last of the director's tiles, whose offsets pass 2^31. The pages before are never touched.
    E, D, rows, gathers = 3, 80, 64 if launch is launch_to_images else ROWS, LAUNCHES[launch] is gather_kernels
    tile, images = FAR // rows - 1, FAR // (1 if gathers else 64)
    into_hidden = launch in (launch_fc1, launch_fc1_blocks)
    rows_in, out = (far(FAR, 16), far(2 * FAR, TALL)) if into_hidden else (far(2 * FAR, TALL), far(FAR, D))
    last = rows_in[-rows:].copy_(drawn(rows, rows_in.shape[1]))
    depth, width = rows_in.shape[1], out.shape[1]
    weight, bias = drawn(E + 1, width, depth, seed=1), drawn(E + 1, width, seed=2)
    # Before them come the tiles of images: one of each here.
    in_images = LAUNCHES[launch] is to_images_kernels
    last_tile(monkeypatch, LAUNCHES[launch], images + tile if in_images else tile)
    if gathers:
        # The experts lie far apart too.
        storage = torch.UntypedStorage(2 * (E * 2**30 + width * depth))
        weight = torch.tensor([], dtype=torch.float16).set_(storage, 0, weight.shape, (2**30, depth, 1)).copy_(weight)
    shared = {
        "slot_order": torch.zeros(2, dtype=torch.int64),
        "offsets": torch.zeros(E + 1, dtype=torch.int64),
        "bias": bias,
        "num_experts": E,
        "num_slots": images,
        "director_images": images,
        "EXPERTS": 16,
        "COLS": COLS,
        "DEPTH": DEPTH,
        "GROUP": 8,
    }
    of_blocks = {}
    if not gathers:
        of_blocks = {"gates": NOTHING, "blocks": 1, "first_token": 0, "weight": aligned.box(weight, 1, COLS, DEPTH)}
    launch(Far(rows_in, out, weight, shared, of_blocks))
    wanted = F.linear(last.double(), weight[-1].double(), bias[-1].double())
    if into_hidden:
        wanted = F.gelu(wanted)
    assert relative_error(out[-rows:], wanted) < 1e-3


@pytest.mark.parametrize("images", [0, 1])
def test_no_rows(images):
    indices = torch.zeros(images, 2, dtype=torch.int64)
    inputs, director = with_director(images, 0, 16, 24, 4, 2, torch.float16, indices=indices)
    assert run(*inputs, director=director)[-1].shape == (images, 0, 16)


def test_too_many_rows_with_a_director(monkeypatch):
    inputs, director = with_director(3, 5, 8, 12, 4, 2, torch.float32)
    monkeypatch.setattr(plan, "MAX_ROWS", 3 * 5 * 2)
    run(*inputs)
    with pytest.raises(ValueError, match=r"x: expected at most 30 rows .* got 45"):
        run(*inputs, director=director)


@pytest.mark.parametrize("path", ["gather", "aligned"])
def test_weight_gradients_in_float32(path):
    """Half precision is left before the sums are rounded: they are nearer to the exact ones than half can be."""
    inputs, _ = with_director(4, 65, 16, 24, 3, 2, torch.float16)
    half = run(*inputs, path=path)
    full = check(*inputs, path=path, grad_dtype=torch.float32)
    for a, b in zip(half[3:], full[3:], strict=True):
        assert b.dtype == torch.float32 and torch.equal(a, b.half()) and not torch.equal(a.float(), b)
    assert all(torch.equal(a, b) for a, b in zip(half[:3], full[:3], strict=True))


def test_cut_weight_gradients_in_float32(monkeypatch):
    """Of experts whose sums are cut into chunks, too."""
    inputs, _ = with_director(8, 64, 16, 24, 4, 1, torch.float16, indices=torch.zeros(8, 1, dtype=torch.int64))
    for path in ("gather", "aligned"):
        half, full = run(*inputs, path=path), check(*inputs, path=path, grad_dtype=torch.float32)
        for a, b in zip(half[3:], full[3:], strict=True):
            assert b.dtype == torch.float32 and torch.equal(a, b.half())
    assert aligned.Cut(8, torch.empty(4, 24, 16), tiles()["weight_grad", "half", 90]).parts is not None
