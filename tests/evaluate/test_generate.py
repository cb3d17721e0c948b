"""Generation over ranks against a decoder on one device that forgets everything and starts afresh at each token."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from longctx.attention import StrategyAttention, dense_attention
from longctx.attention.core import Started
from longctx.attention.decoding.cache import KeyValueShard, SequenceCache
from longctx.attention.decoding.tree_decoding import CachedAttention, reduce, volume
from longctx.attention.runtime.sizes import Sizes
from longctx.attention.strategies.disaggregated.ping_pong import PingPongAttention
from longctx.comm import Group, broadcast, group_of
from longctx.config import ModelConfig
from longctx.errors import ConfigError
from longctx.evaluate import (
    DecodingSession,
    Generated,
    Sampling,
    SequenceSharding,
    StagedModel,
    generate,
    require_remembered,
)
from longctx.evaluate.generate import sample_tokens
from longctx.launcher import build
from longctx.linear import LinearAttention
from longctx.mesh import build_mesh
from longctx.model import Decoder, Part, initialize
from longctx.parallel.core import linear_attention
from longctx.parallel.ping_pong import take_turns
from longctx.sequence import Contiguous, Documents, Mask, SequencePlan, Striped, Zigzag, make_plan
from longctx.sim import Cluster
from tests.train.small_run import small_config

MODEL = ModelConfig(vocab_size=40, dim=24, layers=2, heads=4, kv_heads=2, head_dim=6, hidden_dim=20, init_std=0.3)
LAYOUTS = {"contiguous": Contiguous(), "zigzag": Zigzag(), "striped": Striped(), "striped3": Striped(3)}
NEW = 5
TOLERANCE = 1e-10


class Dense:
    """Attention by its definition over one whole sequence."""

    def __init__(self, mask: Mask) -> None:
        self._mask = mask

    def start(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: torch.Tensor) -> Started:
        return Started(dense_attention(q, k, v, [Documents.single(q.shape[1])] * len(q), self._mask))

    def finish(self, started: Started) -> torch.Tensor:
        return started.out


def model_of(config: ModelConfig = MODEL, dtype: torch.dtype = torch.float64) -> Decoder:
    model = Decoder(config).to(dtype)
    initialize(model, 1)
    return model


def prompt(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(40, (batch, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def forgetful(tokens: torch.Tensor, count: int, mask: Mask = Mask(), config: ModelConfig = MODEL) -> Generated:  # noqa: B008
    model, logits = model_of(config), []
    model.set_attention(Dense(mask))
    for _ in range(count):
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        logits.append(model(tokens, positions, torch.tensor(-1))[:, -1])
        tokens = torch.cat([tokens, logits[-1].argmax(-1)[:, None]], dim=1)
    return Generated(tokens, torch.stack(logits, dim=1))


def generated(world: int, length: int, layout: str, strategy: str = "ring", mask: Mask = Mask()) -> list[Generated]:  # noqa: B008
    def run() -> Generated:
        prefill = StrategyAttention(strategy, dist.group.WORLD)
        ranks = SequenceSharding(dist.group.WORLD, prefill, LAYOUTS[layout], mask)
        return generate(model_of(), prompt(length), NEW, ranks, keep_logits=True)

    return Cluster(world, trace=False).run(run)


def check(found: list[Generated], expected: Generated) -> None:
    for one in found:
        assert torch.equal(one.tokens, expected.tokens)
        assert (one.logits - expected.logits).abs().max() < TOLERANCE
        assert torch.equal(one.logits, found[0].logits)


@pytest.mark.parametrize(
    ("world", "length", "layout", "strategy"),
    [
        (1, 1, "contiguous", "ring"),
        (1, 7, "zigzag", "tree"),
        (2, 1, "zigzag", "ring"),
        (2, 13, "striped3", "tree"),
        (3, 1, "striped", "tree"),
        (3, 2, "contiguous", "rsa"),
        (3, 22, "zigzag", "ring"),
        (4, 3, "striped", "ring"),
        (4, 17, "contiguous", "tree"),
        (4, 31, "striped3", "rsa"),
    ],
)
def test_greedy_is_the_dense_decoder_token_by_token(world, length, layout, strategy):
    check(generated(world, length, layout, strategy), forgetful(prompt(length), NEW))


@pytest.mark.matrix
@pytest.mark.parametrize("length", [1, 2, 7, 31])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_greedy_over_every_layout_and_strategy(world, length):
    expected = forgetful(prompt(length), NEW)
    for layout, strategy in itertools.product(LAYOUTS, ("ring", "tree", "rsa")):
        check(generated(world, length, layout, strategy), expected)


def test_a_window_moves_on_with_the_tokens():
    mask = Mask(window=6)
    check(generated(3, 9, "zigzag", mask=mask), forgetful(prompt(9), NEW, mask))


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


def test_no_order_of_hand_overs_changes_a_bit():
    def run() -> Generated:
        return generate(
            model_of(), prompt(11), NEW, SequenceSharding(dist.group.WORLD), Sampling(1.0, seed=3), keep_logits=True
        )

    expected = Cluster(3).run(run)
    for seed in (0, 1):
        for one, right in zip(Cluster(3, seed=seed).run(run), expected, strict=True):
            assert torch.equal(one.tokens, right.tokens) and torch.equal(one.logits, right.logits)


def test_samples_are_those_of_the_seed_on_any_world():
    def run(seed: int) -> torch.Tensor:
        sampling = Sampling(temperature=2.0, top_k=7, seed=seed)
        return generate(model_of(), prompt(5, 3), 8, SequenceSharding(dist.group.WORLD), sampling).tokens

    expected = generate(model_of(), prompt(5, 3), 8, sampling=Sampling(2.0, 7, 4)).tokens
    for world in (1, 3):
        assert all(torch.equal(one, expected) for one in Cluster(world).run(run, 4))
    assert not torch.equal(Cluster(2).run(run, 5)[0], expected)


def test_choices_follow_their_odds_and_never_leave_the_likeliest():
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0]).log_softmax(-1).expand(20_000, 4)
    generator = torch.Generator().manual_seed(0)
    assert sample_tokens(logits[:1], Sampling(), generator).tolist() == [1]
    for top_k, allowed in ((None, [0, 1, 2, 3]), (2, [1, 3]), (99, [0, 1, 2, 3]), (1, [1])):
        drawn = sample_tokens(logits, Sampling(0.5, top_k), generator)
        odds = torch.zeros(4)
        odds[allowed] = torch.softmax(logits[0, allowed] / 0.5, -1)
        assert (drawn.bincount(minlength=4) / 20_000 - odds).abs().max() < 0.015
        assert not odds[~torch.isin(torch.arange(4), torch.tensor(allowed))].any()


def test_eos_ends_a_sequence_and_all_of_them_the_generation():
    free = forgetful(prompt(6), 12).tokens[:, 6:]
    eos = int(free[0, 1])
    first = [next((i for i, token in enumerate(row) if token == eos), None) for row in free.tolist()]

    def run() -> torch.Tensor:
        return generate(
            model_of(), prompt(6), 12, SequenceSharding(dist.group.WORLD), Sampling(stop_ids=(eos,))
        ).tokens[:, 6:]

    for found in Cluster(2).run(run):
        ends = [12 if end is None else end + 1 for end in first]
        assert found.shape[1] == max(ends)
        for row, right, end in zip(found, free, ends, strict=True):
            assert torch.equal(row[:end], right[:end]) and (row[end:] == eos).all()


def test_the_model_gets_its_attention_and_vocabulary_back():
    model, attention = model_of(), Dense(Mask())
    model.set_attention(attention)
    vocabulary = model.vocabulary
    generate(model, prompt(3), 2)
    with pytest.raises(IndexError):
        generate(model, torch.full((1, 3), 999), 2)
    assert model.vocabulary is vocabulary and all(block.attention is attention for block in model.layers)


def test_a_model_with_its_own_head_and_normed_queries():
    config = ModelConfig(
        vocab_size=40, dim=24, layers=1, heads=4, kv_heads=4, head_dim=6, hidden_dim=20, qk_norm=True,
        tie_embeddings=False, init_std=0.3,
    )  # fmt: skip
    expected = forgetful(prompt(4), NEW, config=config)

    def run() -> Generated:
        return generate(model_of(config), prompt(4), NEW, SequenceSharding(dist.group.WORLD), keep_logits=True)

    check(Cluster(2).run(run), expected)


def test_nothing_new_is_nothing():
    found = generate(model_of(), prompt(3), 0, keep_logits=True)
    assert torch.equal(found.tokens, prompt(3)) and found.logits is None


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda: generate(model_of(), prompt(0), 1), "a prompt of 0 tokens has no next token"),
        (lambda: generate(model_of(), prompt(1), -1), "max_new_tokens -1 must be at least 0"),
        (lambda: generate(model_of(), prompt(1), 1, SequenceSharding(mask=Mask(False))), "needs a causal mask"),
        (
            lambda: DecodingSession(model_of().cut(Part(range(1), last=False)), SequenceSharding()),
            "needs all stages",
        ),
        (
            lambda: require_remembered(replace(MODEL, pattern="LS", mixer="moba", kv_heads=4)),
            "model.mixer=moba has none",
        ),
        (lambda: Sampling(temperature=-0.5), "temperature -0.5 must be at least 0"),
        (lambda: Sampling(temperature=float("nan")), "temperature nan must be at least 0"),
        (lambda: Sampling(top_k=0), "top_k 0 must be at least 1"),
        (lambda: Sampling(top_p=0.0), "top_p 0.0 must be above 0"),
        (lambda: Sampling(temperature=float("inf")), "temperature inf must be at least 0 and finite"),
    ],
)
def test_what_makes_no_sense_is_refused(attempt, words):
    with pytest.raises(ConfigError, match=words):
        attempt()


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


@pytest.mark.parametrize("batch", [1, 2])
def test_a_model_whose_halves_take_turns_generates_like_any_other(batch):
    plain, turning = model_of(), model_of()
    for model in (plain, turning):
        model.set_attention(StrategyAttention("disaggregated"))
    take_turns(turning, PingPongAttention(group_of(None)))
    expected, found = (generate(model, prompt(9, batch), NEW, SequenceSharding()) for model in (plain, turning))
    assert torch.equal(found.tokens, expected.tokens)


HYBRID = {"mixer": "gated_deltanet"}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("world", "length", "parallel", "model"),
    [
        (2, 7, {"tp": 2}, {"pattern": "SW", "window": 3, "tie_embeddings": False}),
        (2, 5, {"pp": 2}, {"pattern": "WS", "window": 4}),
        (4, 9, {"tp": 2, "sp": 2}, {"pattern": "LW", "window": 3, **HYBRID}),
        (4, 2, {"pp": 2, "sp": 2}, {"pattern": "LS", **HYBRID}),
        (4, 17, {"sp": 4}, {"pattern": "WL", "window": 20, "mixer": "hedgehog"}),
        (2, 1, {"dp_shard": 2}, {"pattern": "L", "mixer": "gla"}),
        (3, 11, {"sp": 3}, {"pattern": "L", "mixer": "retnet"}),
        (2, 6, {"sp": 2}, {"pattern": "L", "mixer": "based"}),
        (3, 200, {"sp": 3}, {"pattern": "L", **HYBRID}),
    ],
    ids=str,
)
def test_logits_of_decoding_are_those_of_one_forward_over_the_whole(tmp_path, world, length, parallel, model):
    """In fp64, on every kind of mesh, with windows and states: five single tokens, then three at once."""
    heads = {"heads": 4, "kv_heads": 4 if "L" in model["pattern"] else 2, "head_dim": 8}
    sized = {"vocab_size": 256, "dim": 32, "layers": 2, **heads, "init_std": 0.3, **model}
    attention = {"strategy": "lasp2"} if model["pattern"] == "L" else {}
    config = small_config(tmp_path, parallel=parallel, model=sized, train={"dtype": "float64"}, attention=attention)
    tokens = torch.randint(256, (2, length + 8), generator=torch.Generator().manual_seed(length))
    alone = Decoder(config.model).double()
    initialize(alone, config.train.seed)
    alone.set_attention(StrategyAttention("local"), LinearAttention("lasp2"))
    plan = make_plan((Documents.single(length + 8),) * 2, Mask(), Contiguous(), length + 8, 1)
    with torch.no_grad():
        expected = alone(tokens, torch.arange(length + 8).expand(2, -1), plan.handle)[:, length - 1 :]

    def body():
        mesh = build_mesh(config.parallel, "cpu")
        part = build.build_model(config, mesh, torch.device("cpu"))
        runs = StagedModel(part, mesh, torch.float64) if config.parallel.pp > 1 else part
        sharding = SequenceSharding(
            mesh.sequence_group, linear=linear_attention(config, mesh), multiple=config.parallel.tp
        )
        with DecodingSession(runs, sharding) as session:
            found = [session.prefill(tokens[:, :length])[:, None]]
            found += [session.decode(tokens[:, at : at + 1]) for at in range(length, length + 5)]
            found += [session.decode(tokens[:, length + 5 :])]
        return torch.cat(found, dim=1)

    for found in Cluster(world, trace=False).run(body):
        assert (found - expected).norm() <= TOLERANCE * expected.norm()


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


def test_likeliest_tokens_by_top_p_are_those_of_an_independent_count():
    logits = torch.tensor([0.1, 2.0, -1.0, 1.5, 0.7], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for temperature, top_p, top_k in ((1.0, 0.5, None), (0.7, 0.8, None), (2.0, 0.9, 4), (1.0, 1e-9, None)):
        odds = [math.exp(one / temperature) for one in logits.tolist()]
        order = sorted(range(5), key=lambda at: -odds[at])[:top_k]
        total, kept = sum(odds[at] for at in order), []
        for at in order:
            kept.append(at)
            if sum(odds[one] for one in kept) >= top_p * total:
                break
        right = [odds[at] / sum(odds[one] for one in kept) if at in kept else 0.0 for at in range(5)]
        sampling = Sampling(temperature, top_k, top_p=top_p)
        drawn = sample_tokens(logits.expand(20_000, 5), sampling, generator).bincount(minlength=5) / 20_000
        assert (drawn - torch.tensor(right)).abs().max() < 0.015
        assert set(drawn.nonzero()[:, 0].tolist()) <= set(kept)


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
