"""Generation over ranks against a decoder on one device that forgets everything and starts afresh at each token."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from longctx.attention import StrategyAttention
from longctx.attention.strategies.disaggregated.ping_pong import PingPongAttention
from longctx.comm import group_of
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
from longctx.sequence import Contiguous, Documents, Mask, Striped, Zigzag, make_plan
from longctx.sim import Cluster
from tests.evaluate.decoders import MODEL, NEW, TOLERANCE, Dense, forgetful, model_of, prompt
from tests.train.small_run import small_config

LAYOUTS = {"contiguous": Contiguous(), "zigzag": Zigzag(), "striped": Striped(), "striped3": Striped(3)}


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
