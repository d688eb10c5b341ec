"""Predicted times follow from instruction counts, and the counts from machine code."""

import predict_products
import pytest
from predict_products import GPUS, Code, Product, milliseconds, products

LINES = [
    "MOV R1, c[0x0][0x28] ;",
    "@P0 BRA 0x60 ;",
    "LDSM.16.M88.4 R4, [R2] ;",  # 0x20: the loop
    "HMMA.16816.F32.BF16 R8, R4, R6, R8 ;",
    "IADD3 R2, R2, 0x1, RZ ;",
    "@!P0 BRA 0x20 ;",
    "STG.E.128 [R2.64], R8 ;",
    "EXIT ;",
    "BRA 0x80;",
    "NOP;",
]


def test_the_loop_is_the_one_with_products():
    assert predict_products._count(LINES) == Code(step=4, rest=5)
    nested = ["NOP;", *LINES[:8], "@P1 BRA 0x0 ;"]
    assert predict_products._count(nested[1:]).step == 4


def test_the_longer_of_products_and_issue_counts_in_whole_waves():
    gpu = GPUS[0]._replace(multiprocessors=10, ghz=1.0, operations=1024)
    slow = Product("slow", "", tiles=20, depth=64)  # 2 steps of 2 * 128 * 128 * 32 operations: 2048 clocks a tile
    assert milliseconds(slow, Code(100, 600), gpu) == pytest.approx((0.004096, 0.0032, 0.004096))
    assert milliseconds(slow, Code(100, 1800), gpu)[2] == pytest.approx(0.008)
    assert milliseconds(slow._replace(tiles=21), Code(100, 600), gpu)[2] == pytest.approx(0.008192)


def test_all_products_do_as_much():
    """Up to the rows that fill the last tile of each expert, and the last step of a weight gradient."""
    work = [p.tiles * 128**2 * p.depth for p in products()]
    exact = 224 * 2 * 65 * 768 * 3072
    assert len(work) == 6 and all(exact <= w < 1.03 * exact for w in work)
