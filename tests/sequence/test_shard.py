"""The border: what shard cuts, unshard puts together, and nothing of another rank gets in."""

import numpy as np
import pytest
import torch
from hypothesis import given

from longctx.errors import ConfigError, DataError
from longctx.sequence import (
    IGNORE,
    Batch,
    Contiguous,
    Documents,
    Mask,
    Striped,
    Zigzag,
    make_plan,
    plan_of,
    shard,
    unshard,
)
from tests.sequence.brute_force import Example, document_of, examples


def batch_of(example: Example) -> Batch:
    """Every token has a number of its own, so that a misplaced one shows."""
    shape = (len(example.packing), example.length)
    tokens = 1 + torch.arange(shape[0] * shape[1]).reshape(shape)
    labels = tokens + 10_000
    for row, lengths in enumerate(example.packing):
        labels[row, sum(lengths) :] = IGNORE
        labels[row, (np.cumsum(lengths) - 1).astype(int).tolist()] = IGNORE
    return Batch(tokens, labels, example.documents)


def shards_of(example: Example, batch: Batch):
    return [
        shard(batch, example.layout, example.mask, rank, example.world, example.multiple)
        for rank in range(example.world)
    ]


@given(examples())
def test_shard_then_unshard_is_the_identity(example):
    batch = batch_of(example)
    locals_ = shards_of(example, batch)
    plan = locals_[0].plan
    assert torch.equal(unshard([one.tokens for one in locals_], plan), batch.tokens)
    assert torch.equal(unshard([one.labels for one in locals_], plan), batch.labels)
    positions = unshard([one.positions for one in locals_], plan)
    for row, lengths in enumerate(example.packing):
        starts = [0, *np.cumsum(lengths).tolist()]
        for position in range(example.length):
            document = document_of(list(lengths), position)
            expected = 0 if document is None else position - starts[document]
            assert positions[row, position] == expected


@given(examples())
def test_unshard_keeps_trailing_dimensions_and_shard_is_its_inverse(example):
    plan = example.plan()
    whole = torch.randn(2, example.length, 3, 2)
    cut = []
    for rank in range(example.world):
        where = torch.from_numpy(plan.positions(rank))
        local = torch.full((2, plan.shard, 3, 2), torch.nan)
        local[:, : len(where)] = whole[:, where]
        cut.append(local)
    assert torch.equal(unshard(cut, plan), whole)


@given(examples())
def test_every_rank_has_the_physical_length_and_its_padding_predicts_nothing(example):
    batch = batch_of(example)
    locals_ = shards_of(example, batch)
    plan = locals_[0].plan
    longest = max(len(plan.positions(rank)) for rank in range(example.world))
    assert plan.shard % example.multiple == 0
    assert max(longest, 1) <= plan.shard < max(longest, 1) + example.multiple
    for rank, local in enumerate(locals_):
        valid = len(plan.positions(rank))
        assert local.tokens.shape == local.labels.shape == local.positions.shape
        assert local.tokens.shape == (len(example.packing), plan.shard)
        assert (local.labels[:, valid:] == IGNORE).all()
        assert not local.tokens[:, valid:].any() and not local.positions[:, valid:].any()
    assert sum(local.valid_tokens for local in locals_) == batch.valid_tokens


def test_the_plan_of_a_batch_is_shared_by_its_shards():
    example = Example(((5, 3),), Mask(), Zigzag(), 8, 2)
    first, second = shards_of(example, batch_of(example))
    assert first.plan is second.plan and plan_of(first.plan.handle) is first.plan


def test_a_handle_outlives_its_plan_with_a_message():
    plan = Example(((5, 3),), Mask(window=3), Contiguous(), 8, 2).plan()
    handle = plan.handle
    assert handle.device.type == "cpu" and handle.dtype == torch.int64 and handle.ndim == 0
    assert plan_of(handle) is plan
    del plan
    with pytest.raises(ConfigError, match=rf"sequence plan {int(handle)} is gone; hold the LocalBatch"):
        plan_of(handle)


def test_equal_arguments_give_one_plan_and_others_another():
    arguments = ((Documents.from_lengths((3, 4)),), Mask(), Striped(), 7, 2)
    again = ((Documents.from_lengths((3, 4)),), Mask(), Striped(), 7, 2)
    assert make_plan(*arguments) is make_plan(*again)
    assert make_plan(*arguments) is not make_plan(*arguments[:2], Striped(2), *arguments[3:])
    assert make_plan(*arguments) is not make_plan(*arguments, 2)


def test_documents_longer_than_the_sequence_are_refused():
    with pytest.raises(DataError, match="row 0 have 9 tokens and must fit in its 8"):
        make_plan((Documents.single(9),), Mask(), Contiguous(), 8, 2)
