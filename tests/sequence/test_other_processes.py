"""A plan belongs to the process that made it: it is made again where a batch arrives, or its handle is refused."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from longctx.attention import StrategyAttention, dense_attention
from longctx.attention.strategies.disaggregated.assignment import one_node, planned
from longctx.attention.strategies.disaggregated.prepared import assign
from longctx.errors import ConfigError
from longctx.planner import AttentionShape
from longctx.sequence import (
    Batch,
    Documents,
    LocalBatch,
    Mask,
    SequencePlan,
    Striped,
    Zigzag,
    cut,
    make_plan,
    plan_of,
    shard,
)
from longctx.sequence.plan import known_plan

LENGTH = 24
LENGTHS = [[24], [10, 14], [1, 22, 1], [11, 13], [5, 5, 14], [8, 8, 8]]


def batch(lengths: list[int]) -> Batch:
    tokens = torch.arange(LENGTH)[None]
    return Batch(tokens, tokens, (Documents.from_lengths(lengths),))


def cut_by_a_worker(items: list[list[int]]) -> LocalBatch:
    return shard(batch(items[0]), Zigzag(), Mask(), 0, 1)


def attention_of(handle: torch.Tensor) -> torch.Tensor:
    q, k, v = torch.randn(3, 1, LENGTH, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return StrategyAttention("ring")(q, k, v, handle)


def by_definition(lengths: list[int]) -> torch.Tensor:
    q, k, v = torch.randn(3, 1, LENGTH, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return dense_attention(q, k, v, (Documents.from_lengths(lengths),), Mask())


def test_a_batch_that_a_worker_has_cut_keeps_its_own_mask():
    mine = [cut_by_a_worker([[n, LENGTH - n]]) for n in (3, 4, 6, 7, 9, 12)]  # as an evaluation loop has them
    loader = DataLoader(LENGTHS, 1, collate_fn=cut_by_a_worker, num_workers=1, multiprocessing_context="fork")
    for local, lengths in zip(loader, LENGTHS, strict=True):
        torch.testing.assert_close(attention_of(local.plan.handle), by_definition(lengths), atol=1e-12, rtol=0)
    assert len({one.plan.id for one in mine}) == len(mine)


def read_elsewhere(thing: object, how: str) -> object:
    """As a process reads it that knows no plan yet."""
    if how == "copy":
        return copy.deepcopy(thing)
    if how == "pickle":
        written = pickle.dumps(thing)
        known_plan.cache_clear()
        return pickle.loads(written)
    file = io.BytesIO()
    torch.save(thing, file)
    known_plan.cache_clear()
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", ["copy", "pickle", "torch.save"])
def test_a_plan_is_made_again_of_what_it_was_made_of(how):
    local = shard(batch([10, 14]), Striped(3), Mask(window=5), 1, 2, multiple=5)
    for plan in (local.plan, local.plan.half(0) if len(local.plan.documents) > 1 else local.plan.head):
        again = read_elsewhere(plan, how)
        assert type(again) is type(plan) and plan_of(again.handle) is again
        assert (again.shard, again.length, again.world, again.mask) == (plan.shard, plan.length, plan.world, plan.mask)
        for pair in ((0, 0), (0, 1), (1, 0), (1, 1)):
            assert again.tiles(*pair) == plan.tiles(*pair)
    arrived = read_elsewhere(local, how)
    assert torch.equal(arrived.positions, local.positions) and arrived.plan.tiles(1, 0) == local.plan.tiles(1, 0)
    assert not arrived.plan.documents[0].cu_seqlens.flags.writeable


def test_a_handle_alone_is_refused_elsewhere():
    local = cut_by_a_worker([[10, 14]])
    numbers = [torch.tensor(number) for number in range(100)]  # what counting processes would have given
    for number in [*numbers, local.plan.handle + 1, -local.plan.handle]:
        with pytest.raises(ConfigError, match="another process"):
            attention_of(number)
    for wrong in (local.plan, local, 3, None, local.tokens, torch.tensor(1.5)):
        with pytest.raises(ConfigError, match=r"plan\.handle"):
            attention_of(wrong)


def test_a_plan_that_was_changed_by_hand_stays_where_it_is():
    plan = SequencePlan((Documents.single(LENGTH),), Mask(), Zigzag(), LENGTH, 2)
    assign(plan, planned([plan], "cad", AttentionShape(), one_node(2)))
    with pytest.raises(ConfigError, match="assigned by hand stays in its process"):
        pickle.dumps(plan)


def test_documents_are_nobody_elses_memory():
    given = torch.tensor([0, 10, 24]).numpy()
    documents = Documents(given)
    given[1] = 11
    assert documents.lengths.tolist() == [10, 14]


def test_a_batch_is_cut_by_its_own_plan():
    other = make_plan((Documents.from_lengths([11, 13]),), Mask(), Zigzag(), LENGTH, 2)
    with pytest.raises(ValueError, match="plan of other documents"):
        cut(batch([10, 14]), other, 0)
