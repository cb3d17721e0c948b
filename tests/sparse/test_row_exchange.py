"""Deliveries of any wanted tokens: what arrives, what comes home, what it costs."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from longctx.comm import group_of
from longctx.sequence import Documents, unshard
from longctx.sim import Cluster
from longctx.sparse.document_blocks import blocks_of, shard_of
from longctx.sparse.row_exchange import RowExchange
from longctx.verify.run import cut
from tests.sparse.sparse_cases import LAYOUTS, PACKINGS, WORLDS, plan_for

HEADS, CHANNELS = 2, 3
CPU = torch.device("cpu")


def exchange_rows(plan, wanted, x, shares):
    """By rank: what was fetched and the gradients that returned, each unpacked."""
    held = [shard_of(plan, rank, CPU).places for rank in range(plan.world)]

    def rank_main():
        ranks = group_of(dist.group.WORLD)
        shard = shard_of(plan, ranks.rank, CPU)
        rows = RowExchange(held, wanted, ranks.rank, CPU)
        before = ranks.traffic.bytes
        local = cut(x, plan, ranks.rank)
        fetched = rows.arrange(rows.fetch(shard.pack(local), ranks))
        between = ranks.traffic.bytes
        gradients = rows.total(rows.send_gradients(shares[ranks.rank], ranks))
        row = HEADS * CHANNELS * 8
        forward, backward = rows.rows_sent
        assert (between - before, ranks.traffic.bytes - between) == (forward * row, backward * row)
        return fetched, shard.unpack(gradients, local), (forward + backward) * row

    cluster = Cluster(plan.world, trace=False)
    found = cluster.run(rank_main)
    assert [sent for *_, sent in found] == [cluster.ledger.sent(rank) for rank in range(plan.world)]
    return [one[0] for one in found], unshard([one[1] for one in found], plan)


def check(plan, wanted, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(plan.documents), plan.length, HEADS, CHANNELS, dtype=torch.float64, generator=generator)
    shares = [torch.randn(1, len(its), HEADS, CHANNELS, dtype=torch.float64, generator=generator) for its in wanted]
    fetched, gradients = exchange_rows(plan, wanted, x, shares)
    expected = torch.zeros_like(x).flatten(0, 1)
    for rank, its in enumerate(wanted):
        assert torch.equal(fetched[rank][0], x.flatten(0, 1)[its])
        expected.index_add_(0, torch.from_numpy(its), shares[rank][0])
    assert torch.equal(gradients, expected.view_as(x))  # in rank order, to the bit


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("packing", ["packed", "lopsided"])
def test_all_tokens_for_all_ranks(world, layout, packing):
    rows, length = PACKINGS[packing]
    plan = plan_for(rows, world, *layout, length)
    everything = np.sort(np.concatenate([shard_of(plan, rank, CPU).places for rank in range(world)]))
    assert len(everything) == sum(map(sum, rows))  # no padding among them
    check(plan, [everything] * world)


@given(st.integers(1, 6), st.sampled_from(["contiguous", "zigzag", "striped"]), st.integers(0, 1 << 16))
def test_any_wants(world, layout, seed):
    draw = np.random.default_rng(seed)
    plan = plan_for([[7, 1, 9], [17]], world, layout)
    check(plan, [np.flatnonzero(draw.random(34) < chance) for chance in draw.random(world)], seed)


@given(st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=1, max_size=3), st.integers(1, 5))
def test_blocks_are_those_of_a_loop(rows, size):
    documents = tuple(Documents.from_lengths(lengths) for lengths in rows)
    length = max(1, *(packed.length for packed in documents)) + 2
    spans, first, followed = [], [], []
    for row, lengths in enumerate(rows):
        begin = row * length
        for tokens in lengths:
            head = len(spans)
            for start in range(0, tokens, size):
                followed += [len(spans)] if start + size < tokens else []
                spans.append((begin + start, begin + min(start + size, tokens)))
                first.append(head)
            begin += tokens
    blocks = blocks_of(documents, length, size)
    assert list(zip(blocks.starts.tolist(), blocks.stops.tolist(), strict=True)) == spans
    assert blocks.first.tolist() == first
    assert blocks.followed.tolist() == followed
    for number, (start, stop) in enumerate(spans):
        assert blocks.of(np.arange(start, stop)).tolist() == [number] * (stop - start)
    stops = np.array([(start + stop + 1) // 2 for start, stop in spans], dtype=np.int64)
    halves = [place for (start, _), stop in zip(spans, stops.tolist(), strict=True) for place in range(start, stop)]
    assert blocks.places(np.arange(len(spans)), stops).tolist() == halves
