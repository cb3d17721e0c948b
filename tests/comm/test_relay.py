"""Messages in parts that others carry: the same bytes, in the same order, and nobody waits for ever."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.comm import Relay, exchange, group_of
from longctx.planner import Topology
from longctx.sim import Cluster
from tests.planner.test_routing import forced

DTYPES = (torch.float64, torch.bfloat16, torch.int8)


def message(source, dest, number, rows):
    """Random numbers of a dtype by number, NaN among them; odd widths."""
    seed = torch.Generator().manual_seed(1000 * source + 10 * dest + number)
    whole = torch.randn(rows, 3, 1 + number, generator=seed) * 50
    whole[..., 0] = torch.where(whole[..., 0] > 60, torch.nan if number < 2 else 1.0, whole[..., 0])
    return whole.to(DTYPES[number])


def sent_by(rank, rows):
    pairs = [(dest, number) for dest in range(rows.shape[1]) if dest != rank for number in range(len(rows))]
    return [(dest, message(rank, dest, number, rows[number, rank, dest])) for dest, number in pairs]


def room_of(rank, rows):
    pairs = [(source, number) for source in range(rows.shape[1]) if source != rank for number in range(len(rows))]
    return [
        (source, torch.empty_like(message(source, rank, number, rows[number, source, rank])))
        for source, number in pairs
    ]


@settings(max_examples=25)
@given(
    st.integers(1, 7), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**16), st.integers(0, 99)
)  # fmt: skip
def test_parts_become_the_messages_again(world, per_node, nics, seed, turns):
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, 5, (3, world, world)) * generator.integers(0, 2, (3, world, world))
    width = np.array([3 * (1 + number) * dtype.itemsize for number, dtype in enumerate(DTYPES)])
    found = forced(rows * width[:, None, None], Topology(world, per_node=per_node, nics=nics))

    def body():
        group = group_of(dist.group.WORLD)
        rank, ways = group.rank, found.of(group.rank)
        # Two under way at once, awaited in turned order, and a plain one between them on the same channel.
        first = Relay(group, sent_by(rank, rows), room_of(rank, rows), ways)
        plain = exchange(group, sent_by(rank, rows), room_of(rank, rows))
        second = Relay(group, sent_by(rank, rows), room_of(rank, rows), ways)
        relayed = [second.wait(), first.wait()]
        for arrived in relayed:
            for got, expected in zip(arrived, plain_of(rank, rows), strict=True):
                assert got.dtype == expected.dtype and got.shape == expected.shape
                assert got.view(-1).view(torch.uint8).tolist() == expected.view(-1).view(torch.uint8).tolist()
        plain.wait()
        return group.traffic.bytes, group.traffic.messages

    counted = Cluster(world, seed=turns).run(body)
    for rank, (size, messages) in enumerate(counted):
        own = [tensor for _, tensor in sent_by(rank, rows) if tensor.numel()]
        straight = sum(tensor.numel() * tensor.element_size() for tensor in own)
        assert (size - straight, messages - len(own)) == tuple(2 * number for number in found.sent(rank))


def plain_of(rank, rows):
    pairs = [(source, number) for source in range(rows.shape[1]) if source != rank for number in range(len(rows))]
    return [message(source, rank, number, rows[number, source, rank]) for source, number in pairs]


def test_a_relay_is_awaited_once():
    relay = Relay(group_of(None), [], [], [])
    assert relay.wait() == []
    with pytest.raises(AssertionError, match="awaited exactly once"):
        relay.wait()
