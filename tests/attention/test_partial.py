"""The merge of partial results is the softmax over the union of their keys, in any order."""

import itertools

import pytest
import torch

from longctx.attention.runtime.partial import Partial, accumulation_dtype

WHOLE = slice(0, 2), slice(0, 5)


def parts(count: int, dtype: torch.dtype = torch.float64):
    """(out, lse) over disjoint sets of keys, and over all of them."""
    generator = torch.Generator().manual_seed(count)
    scores = 4 * torch.randn(2, 5, 3, count, 6, generator=generator, dtype=torch.float64)
    values = torch.randn(2, 5, 3, count, 6, 4, generator=generator, dtype=torch.float64)

    def softmax(s, v):
        return (torch.softmax(s, -1).unsqueeze(-1) * v).sum(-2).to(dtype), torch.logsumexp(s, -1).to(dtype)

    each = [softmax(scores[..., i, :], values[..., i, :, :]) for i in range(count)]
    return each, softmax(scores.flatten(-2), values.flatten(-3, -2))


def merged(pieces, dtype: torch.dtype = torch.float64) -> Partial:
    partial = Partial(torch.empty(2, 5, 3, 4, dtype=dtype))
    for out, lse in pieces:
        partial.merge(*WHOLE, out, lse)
    return partial


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_any_order_of_any_count_is_the_whole(dtype, tolerance):
    for count in (1, 2, 3, 4):
        each, (out, lse) = parts(count, dtype)
        for order in itertools.permutations(each):
            partial = merged(order, dtype)
            torch.testing.assert_close(partial.out, out, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(partial.lse, lse, rtol=tolerance, atol=tolerance)


def test_merging_is_associative():
    (a, b, c), _ = parts(3)
    left = merged([a, b])
    right = merged([b, c])
    one, other = merged([(left.out, left.lse), c]), merged([a, (right.out, right.lse)])
    torch.testing.assert_close(one.out, other.out, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(one.lse, other.lse, rtol=1e-14, atol=1e-14)


def test_the_first_partial_is_assigned_bit_by_bit():
    for scale in (1.0, 1e-300, 1e300):
        [(out, lse)], _ = parts(1)
        partial = merged([(out * scale, lse * 200)])
        assert torch.equal(partial.out, out * scale) and torch.equal(partial.lse, lse * 200)


def test_rows_that_saw_nothing_are_zero_and_minus_infinity():
    partial = Partial(torch.empty(2, 5, 3, 4, dtype=torch.bfloat16))
    assert partial.out.dtype == partial.lse.dtype == torch.float32
    assert not partial.out.any() and (partial.lse == -torch.inf).all()
    each, _ = parts(1)
    out, lse = each[0]
    partial.merge(slice(1, 2), slice(2, 4), out[1:2, 2:4], lse[1:2, 2:4])
    untouched = torch.ones(2, 5, dtype=torch.bool)
    untouched[1, 2:4] = False
    assert not partial.out[untouched].any() and (partial.lse[untouched] == -torch.inf).all()
    assert torch.equal(partial.out[1, 2:4], out[1, 2:4].float())


def test_a_merge_over_seen_and_unseen_rows_is_exact_on_both():
    (first, second), (out, lse) = parts(2)
    partial = Partial(torch.empty(2, 5, 3, 4, dtype=torch.float64))
    partial.merge(slice(0, 1), slice(1, 3), first[0][:1, 1:3], first[1][:1, 1:3])
    partial.merge(*WHOLE, *second)
    torch.testing.assert_close(partial.out[0, 1:3], out[0, 1:3], rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(partial.lse[0, 1:3], lse[0, 1:3], rtol=1e-14, atol=1e-14)
    for row, rows in ((0, [0, 3, 4]), (1, [0, 1, 2, 3, 4])):
        assert torch.equal(partial.out[row, rows], second[0][row, rows])
        assert torch.equal(partial.lse[row, rows], second[1][row, rows])


def test_scores_that_overflow_an_exponential_merge():
    (first, second), _ = parts(2)
    partial = merged([(first[0], first[1] + 5000), (second[0], second[1] - 5000)])
    assert torch.equal(partial.out, first[0]) and torch.equal(partial.lse, first[1] + 5000)
    partial = merged([(second[0], second[1] - 5000), (first[0], first[1] + 5000)])
    assert torch.equal(partial.out, first[0]) and torch.equal(partial.lse, first[1] + 5000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_accumulates_in_fp32(dtype):
    assert accumulation_dtype(dtype) == torch.float32
    assert accumulation_dtype(torch.float64) == torch.float64
