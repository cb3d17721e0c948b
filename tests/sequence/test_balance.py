"""Attention work by rank equals what theory says of each layout, for one causal document of S tokens.

Query p sees p + 1 keys, so all work is S(S + 1)/2, its mean W = n(S + 1)/2 with n = S/P tokens a rank.
Let a rank's tokens be m blocks of b consecutive ones, block j of rank r beginning at jPb + rb. Its work is
    sum over j < m, t < b of (jPb + rb + t + 1) = b·Pb·m(m - 1)/2 + n·rb + m·b(b + 1)/2,
which grows by n·b from rank to rank, so rank P - 1 is the busiest, n·b(P - 1)/2 above the mean:
    balance = 1 + b(P - 1)/(S + 1).
Striped is b = 1 (or its block); contiguous is m = 1, b = n. Zigzag mirrors each chunk: tokens p and S - 1 - p
of a rank see S + 1 keys together, so every rank has the mean and the balance is 1.
"""

from fractions import Fraction

import pytest

from longctx.sequence import Contiguous, Mask, Striped, Zigzag
from tests.sequence.brute_force import Example

SIZES = [(world, n) for world in (1, 2, 3, 4, 8, 16) for n in (4, 12, 60)]


def ranks_work(layout, world: int, n: int) -> list[int]:
    plan = Example(((world * n,),), Mask(), layout, world * n, world).plan()
    work = [plan.work(rank) for rank in range(world)]
    assert sum(work) == world * n * (world * n + 1) // 2
    assert plan.balance() == max(work) * world / sum(work)
    return work


def balance_of(work: list[int]) -> Fraction:
    return Fraction(max(work) * len(work), sum(work))


@pytest.mark.parametrize(("world", "n"), SIZES)
@pytest.mark.parametrize("block", [1, 2, 4])
def test_striped(world, n, block):
    work = ranks_work(Striped(block), world, n)
    m, b, p = n // block, block, world
    assert work == [b * p * b * m * (m - 1) // 2 + n * r * b + m * b * (b + 1) // 2 for r in range(world)]
    assert balance_of(work) == 1 + Fraction(block * (world - 1), world * n + 1)


@pytest.mark.parametrize(("world", "n"), SIZES)
def test_contiguous(world, n):
    work = ranks_work(Contiguous(), world, n)
    assert work == [n * n * r + n * (n + 1) // 2 for r in range(world)]
    assert balance_of(work) == 1 + Fraction(n * (world - 1), world * n + 1)


@pytest.mark.parametrize(("world", "n"), SIZES)
def test_zigzag(world, n):
    work = ranks_work(Zigzag(), world, n)
    assert work == [n * (world * n + 1) // 2] * world


@pytest.mark.parametrize("layout", [Contiguous(), Zigzag(), Striped(), Striped(4)])
def test_full_attention_is_balanced_by_any_equal_shards(layout):
    plan = Example(((48,),), Mask(causal=False), layout, 48, 4).plan()
    assert [plan.work(rank) for rank in range(4)] == [48 * 12] * 4
    assert plan.balance() == 1.0


def test_work_counts_every_row_of_the_batch_and_nothing_of_padding():
    plan = Example(((3, 2), (), (1,)), Mask(), Contiguous(), 8, 2).plan()
    assert [plan.work(0), plan.work(1)] == [6 + 1 + 1, 2]
    assert plan.balance() == 8 * 2 / 10
    assert Example(((), ()), Mask(), Zigzag(), 8, 2).plan().balance() == 1.0
