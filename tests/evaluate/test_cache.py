"""What a sequence leaves behind for its next tokens: where it lies, what reading it sends, how a session goes on."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from longctx.attention import StrategyAttention
from longctx.attention.decoding.cache import KeyValueShard, SequenceCache
from longctx.attention.decoding.tree_decoding import CachedAttention, reduce, volume
from longctx.attention.runtime.sizes import Sizes
from longctx.comm import Group, broadcast, group_of
from longctx.errors import ConfigError
from longctx.evaluate import (
    DecodingSession,
    SequenceSharding,
)
from longctx.sequence import Documents, Mask, SequencePlan, Striped, Zigzag
from longctx.sim import Cluster
from tests.evaluate.decoders import MODEL, TOLERANCE, Dense, model_of, prompt


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("cut", [(1,) * 9, (4, 1, 4), (9,), (2, 7)])
def test_a_few_tokens_at_a_time_from_an_empty_cache(world, cut):
    """Logits after every token, without any prompt: as if a draft of several tokens were checked."""
    tokens, model = prompt(9), model_of()
    model.set_attention(Dense(Mask()))
    with torch.no_grad():
        expected = model(tokens, torch.arange(9).expand(2, 9), torch.tensor(-1))

    def run():
        with DecodingSession(model_of(), SequenceSharding(dist.group.WORLD)) as session:
            logits = [session.decode(part) for part in tokens.split(cut, dim=1)]
            return torch.cat(logits, dim=1), session.cache.counts

    for logits, counts in Cluster(world).run(run):
        assert (logits - expected).abs().max() < TOLERANCE
        assert counts == [9 // world] * world


def test_new_tokens_fill_the_emptiest_ranks_first():
    """Striped by 3, seven tokens on four ranks lie as 3, 3, 1, 0."""

    def run():
        with DecodingSession(model_of(), SequenceSharding(dist.group.WORLD, layout=Striped(3))) as session:
            session.prefill(prompt(7))
            seen = [list(session.cache.counts)]
            for token in prompt(6).split(1, dim=1):
                session.decode(token)
                seen.append(list(session.cache.counts))
            held = [shard.keys.shape[1] for shard in session.cache.shards]
            return seen, held

    for rank, (seen, held) in enumerate(Cluster(4).run(run)):
        assert seen[0] == [3, 3, 1, 0] and seen[3] == [3, 3, 2, 2] and seen[6] == [4, 3, 3, 3]
        assert held == [seen[6][rank]] * MODEL.layers


def sent(world: int, length: int, tokens: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    """Bytes and messages by rank of decoding so many tokens after a prompt, counted and by the ledger."""

    def run() -> tuple[int, int]:
        traffic = group_of(dist.group.WORLD).traffic
        with DecodingSession(model_of(dtype=dtype), SequenceSharding(dist.group.WORLD)) as session:
            session.prefill(prompt(length))
            before, messages = traffic.bytes, traffic.messages
            session.decode(prompt(tokens))
            return traffic.bytes - before, traffic.messages - messages

    def total() -> int:
        run()
        return group_of(dist.group.WORLD).traffic.bytes

    cluster = Cluster(world, trace=False)
    assert cluster.run(total) == [cluster.ledger.sent(rank) for rank in range(world)]
    return cluster.run(run)


@pytest.mark.parametrize(
    ("world", "dtype", "wide"), [(2, torch.bfloat16, 4), (3, torch.float64, 8), (1, torch.float64, 8)]
)
def test_decoding_sends_the_same_however_long_the_sequence_is(world, dtype, wide):
    sizes = Sizes(2, 4, 2, 6, torch.empty((), dtype=dtype).element_size(), wide)
    for tokens in (1, 3):
        found = [sent(world, length, tokens, dtype) for length in (1, 5, 64)]
        assert found[0] == found[1] == found[2]
        closed = MODEL.layers * volume(world, tokens, sizes)
        assert found[0] == [(closed, MODEL.layers * 3 * (world > 1))] * world
        # 2 (P - 1) / P of H (D + 2) numbers for each token: here without a remainder, or rounded down thrice.
        exact = MODEL.layers * 2 * (world - 1) / world * tokens * 2 * 4 * (6 + 2) * wide
        assert exact - 3 * MODEL.layers <= closed <= exact


def decoded(length: int) -> tuple[torch.Tensor, list[tuple[int, int]], torch.Tensor]:
    """One new token over a cache of so many on four ranks: its attention, bytes and messages by rank, and dense's."""
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(1, length + 1, n, 16, generator=generator, dtype=torch.float64) for n in (4, 2, 2))
    plan = SequencePlan((Documents.single(length),), Mask(), Zigzag(), length, 4)

    def run() -> tuple[torch.Tensor, int, int]:
        group = group_of(dist.group.WORLD)
        cache = SequenceCache(group, Mask(), 1)
        cache.expect_prompt(plan)
        mine = torch.from_numpy(plan.positions(group.rank))
        cache.shards[0].append(k[:, mine], v[:, mine])
        cache.expect(1, 1)
        attention = CachedAttention(StrategyAttention("ring", dist.group.WORLD), cache, 0)
        before, messages = group.traffic.bytes, group.traffic.messages
        out = attention.finish(attention.start(q[:, -1:], k[:, -1:], v[:, -1:], plan.handle))
        return out, group.traffic.bytes - before, group.traffic.messages - messages

    found = Cluster(4).run(run)
    scores = torch.einsum("hd,khd->hk", q[0, -1], k[0].repeat_interleave(2, 1)) / 4
    expected = torch.einsum("hk,khd->hd", scores.softmax(-1), v[0].repeat_interleave(2, 1))
    assert all(torch.equal(one[0], found[0][0]) for one in found)
    return found[0][0][0, 0], [(sent, messages) for _, sent, messages in found], expected


def test_a_token_costs_the_same_over_a_thousand_and_a_hundred_thousand():
    (short, little, dense), (long, much, dense_long) = decoded(1_000), decoded(100_000)
    assert little == much and little[0][1] == 3
    assert (short - dense).norm() <= 1e-10 * dense.norm()
    assert (long - dense_long).norm() <= 1e-10 * dense_long.norm()


def test_ranks_without_keys_take_part_with_zeros():
    """Random partials of four ranks, two of which have seen nothing, or not for one query."""
    generator = torch.Generator().manual_seed(0)
    out = torch.randn(4, 1, 2, 3, 5, generator=generator, dtype=torch.float64)
    lse = 300 * torch.randn(4, 1, 2, 3, generator=generator, dtype=torch.float64)
    for rank, query in ((0, 0), (0, 1), (2, 0), (2, 1), (3, 1)):
        out[rank, :, query], lse[rank, :, query] = 0.0, -torch.inf
    weights = torch.softmax(lse, dim=0)
    expected = (weights[..., None] * out).sum(0), torch.logsumexp(lse, dim=0)
    for found in Cluster(4).run(lambda: reduce(out[dist.get_rank()], lse[dist.get_rank()], group_of(dist.group.WORLD))):
        for mine, right in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-13, atol=1e-13)


def test_a_shard_grows_without_losing_a_row():
    shard, rows = KeyValueShard(), torch.randn(2, 23, 1, 3)
    for part in rows.split((3, 0, 1, 1, 9, 9), dim=1):
        shard.append(part, -part)
    assert torch.equal(shard.keys, rows) and torch.equal(shard.values, -rows)


def test_arrivals_are_placed_alike_by_every_rank():
    caches = [SequenceCache(Group(None, rank, 3), Mask(), 1) for rank in range(3)]
    for tokens in (1, 5, 2):
        arrivals = [cache.expect(2, tokens) for cache in caches]
        assert sorted(torch.cat([one.kept for one in arrivals]).tolist()) == list(range(tokens))
        assert len({tuple(cache.counts) for cache in caches}) == len({one.positions for one in arrivals}) == 1
        cells = sum(sets.cells for one in arrivals for sets in one.tiles)
        assert cells == 2 * sum(position + 1 for position in arrivals[0].positions)


def test_a_broadcast_counts_as_the_ledger_does():
    def run(source: int) -> tuple[float, int]:
        group = group_of(dist.group.WORLD)
        found = broadcast(group, torch.full((3,), float(group.rank)), source)
        broadcast(group, torch.empty(0), source)
        return float(found[0]), group.traffic.bytes

    for source in range(3):
        cluster = Cluster(3)
        found = cluster.run(run, source)
        assert found == [(float(source), cluster.ledger.sent(rank)) for rank in range(3)]


@pytest.mark.parametrize("window", [1, 5])
def test_a_window_keeps_no_more_than_itself(window):
    config = replace(MODEL, pattern="SW", window=window)
    with DecodingSession(model_of(config), SequenceSharding()) as session:
        session.prefill(prompt(40))
        assert session.caches["W"].shards[0].keys.shape[1] == window - 1
        for token in prompt(30).split(1, dim=1):
            session.decode(token)
            assert session.caches["W"].shards[0].keys.shape[1] == window
        assert session.cache.shards[0].keys.shape[1] == 70


def test_a_session_takes_one_prompt_and_first():
    for begin in (DecodingSession.prefill, DecodingSession.decode):
        with DecodingSession(model_of(), SequenceSharding()) as session:
            begin(session, prompt(3))
            with pytest.raises(ConfigError, match="a prompt comes first, and this session has 3 tokens"):
                session.prefill(prompt(2))
            assert session.decode(prompt(2)).shape == (2, 2, 40)  # as if nobody had asked


@pytest.mark.parametrize(("held", "given"), [(1, 2), (2, 1), (2, 3)])
def test_a_session_goes_on_with_as_many_sequences_as_it_began_with(held, given):
    with DecodingSession(model_of(), SequenceSharding()) as session:
        session.prefill(prompt(3, held))
        with pytest.raises(ConfigError, match=f"tokens of {given} sequences, and this session has {held}"):
            session.decode(prompt(1, given))
        assert session.decode(prompt(1, held)).shape == (held, 1, 40)
