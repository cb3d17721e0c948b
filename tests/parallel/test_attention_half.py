"""Recompute that keeps the later half of attention's outputs: exact anywhere, at the bytes and the work it states."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings

from benchmarks.tables.memory import measure
from longctx import catalog
from longctx.attention import AttentionCase, StrategyAttention, get_strategy, refusal
from longctx.attention.runtime.operator import COMPLETIONS, tail_of
from longctx.attention.runtime.sizes import Sizes
from longctx.comm import group_of
from longctx.config import AttentionConfig, Config, ModelConfig, ParallelConfig, TrainConfig
from longctx.errors import ConfigError
from longctx.parallel.core import attention_case
from longctx.sequence import Explicit, Mask, SequencePlan
from longctx.sim import Cluster
from tests.equivalence.pairwise import pairwise
from tests.parallel.small_decoder import MODEL, Outcome, batches, config_of, on_sim, worst
from tests.sequence.brute_force import examples
from tests.train.small_run import small_config, train_on_sim
from tests.volume.measure import DIM, LAYOUTS, MASKS, PACKINGS, costs, plan_of, sizes_of, with_row

HALF = {"recompute": "full", "recompute_keep": ("attention_half",)}
STRATEGIES = tuple(name for name in catalog.STRATEGIES if get_strategy(name).half)


@pytest.fixture(scope="module")
def single() -> Outcome:
    return on_sim(config_of())[0]


def with_strategy(config: Config, strategy: str) -> Config:
    return replace(config, attention=replace(config.attention, strategy=strategy))


def exact(found: Outcome, single: Outcome) -> None:
    assert found.loss == pytest.approx(single.loss, rel=1e-13)
    assert worst(found, single) < 1e-12


# --- the operator alone ---


def completed(strategy: str, plan: SequencePlan, heads: tuple[int, int], inner: int):
    """(out, lse) as computed whole, and as completed from their tails; bytes and messages of the completion."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    q, k, v = (
        torch.randn(len(plan.documents), plan.shard, n, DIM, generator=generator, dtype=torch.float64)
        for n in (heads[0], heads[1], heads[1])
    )
    attention = StrategyAttention(strategy, dist.group.WORLD, options=with_row(strategy, inner))
    context = (plan.handle, attention._group, "auto", 0.5)
    operator = get_strategy(strategy).operator
    out, lse = operator(q, k, v, *context)
    tails = tail_of(out, lse, *context[:2])
    traffic = group_of(dist.group.WORLD).traffic
    before = traffic.bytes, traffic.messages
    again = COMPLETIONS[operator](q, k, v, *tails, *context)
    return (out, lse), again, [traffic.bytes - before[0], traffic.messages - before[1]]


def check(strategy: str, plan: SequencePlan, heads: tuple[int, int], inner: int = 1) -> None:
    sizes = sizes_of(plan, heads, torch.float64, inner)
    ranks = Cluster(plan.world, trace=False).run(completed, strategy, plan, heads, inner)
    for rank, (whole, again, sent) in enumerate(ranks):
        for one, other in zip(whole, again, strict=True):
            valid = len(plan.positions(rank))
            torch.testing.assert_close(other[:, :valid], one[:, :valid], rtol=1e-12, atol=1e-13)
            assert torch.equal(other[:, valid:], one[:, valid:])
        volume = costs(strategy).volume(plan.head, rank, sizes)
        assert sent == [volume.forward, volume.messages_forward]


@pytest.mark.parametrize(
    ("strategy", "layout", "packing", "mask", "grid"),
    pairwise(
        (
            tuple(name for name in STRATEGIES if name != "local"),
            tuple(LAYOUTS),
            tuple(PACKINGS),
            tuple(MASKS),
            ((3, 1), (4, 2), (2, 2), (8, 4), (1, 1)),
        )
    ),
)
def test_what_was_not_kept_is_computed_again_at_the_stated_bytes(strategy, layout, packing, mask, grid):
    plan = plan_of(PACKINGS[packing], MASKS[mask], LAYOUTS[layout], 96, grid[0])
    check(strategy, plan, (4, 2), grid[1] if strategy == "burst" else 1)


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "local"])
def test_ranks_without_tokens_and_with_one(strategy):
    layout = Explicit((((0, 20), (50, 96)), (), ((20, 49),), ((49, 50),)))
    for mask in MASKS.values():
        check(strategy, plan_of(PACKINGS["mixed"], mask, layout, 96, 4), (4, 2), 2 if strategy == "burst" else 1)


@settings(max_examples=60)
@given(examples())
def test_the_two_halves_are_all_of_the_work(example):
    plan = example.plan()
    for rank in range(example.world):
        tiles = [tiles for other in range(example.world) for tiles in plan.head.tiles(rank, other)]
        assert plan.head.work(rank) == sum(one.cells for one in tiles)
        half = len(plan.positions(rank)) // 2
        assert all(tile.q_stop <= half for one in tiles for tile in one.tiles)
        for other in range(example.world):
            assert not plan.head.reads(rank, other) - plan.reads(rank, other)


@pytest.mark.parametrize(("layout", "share"), [("zigzag", 0.25), ("striped", 0.25), ("contiguous", 0.45)])
def test_it_is_a_quarter_of_the_causal_work_under_balanced_layouts(layout, share):
    """BurstEngine's figure; under the contiguous layout each rank's halves see nearly as much as one another."""
    plan = plan_of([(1024,)], Mask(), LAYOUTS[layout], 1024, 8)
    work = [sum(one.work(rank) for rank in range(8)) for one in (plan.head, plan)]
    assert work[0] / work[1] == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize(("layout", "part"), [("striped", 1 / 2), ("zigzag", 1 / 3), ("contiguous", 1)])
def test_what_of_the_forward_pass_s_bytes_it_sends_again(layout, part):
    """Striped: half, as BurstEngine says; zigzag: the early chunks, which go up alone, P(P-1)/2 halves of 3/4 P(P-1)
    whole ones; contiguous: all, for the first query of a rank sees the keys of all ranks before it."""
    plan = plan_of([(1024,)], Mask(), LAYOUTS[layout], 1024, 8)
    sizes = sizes_of(plan, (4, 2), torch.float32)
    volume = costs("ring").volume
    sent = [sum(volume(one, rank, sizes).forward for rank in range(8)) for one in (plan.head, plan)]
    assert sent[0] / sent[1] == pytest.approx(part, abs=0.01)


# --- in a model ---


@pytest.mark.parametrize(
    "options",
    [
        {"sp": 2},
        {"sp": 3, "layout": "striped"},
        {"dp_shard": 2, "sp": 2, "layout": "contiguous"},
        {"sp": 2, "tp": 2},
        {"sp": 2, "tp": 2, "recompute_keep": ("attention_half", "products", "collectives")},
        {"dp_replicate": 2, "sp": 2, "mlp_chunk": 6},
        {"sp": 2, "offload": True},
        {"dp_shard": 2, "tp": 2, "offload": True, "recompute_keep": ("attention_half", "products")},
    ],
    ids=str,
)
def test_gradients_are_those_without_recompute(single, options):
    exact(on_sim(config_of(**{**HALF, **options}))[0], single)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_that_declares_it_trains_by_it(single, strategy):
    config = with_strategy(config_of(sp=1 if strategy == "local" else 2, layout="striped", **HALF), strategy)
    exact(on_sim(config)[0], single)


def test_in_the_stages_of_a_pipeline(tmp_path):
    def run(name, parallel, levers):
        config = small_config(
            tmp_path / name, model={"layers": 4}, data={"seq_len": 37}, parallel=parallel,
            train={"global_batch": 4, "steps": 3, **levers},
        )  # fmt: skip
        return [number for step in train_on_sim(config)[0][:3] for number in step[:2]]

    found = run("tail", {"pp": 2, "sp": 2, "pp_schedule": "interleaved_1f1b"}, HALF)
    assert found == pytest.approx(run("one", {}, {}), rel=1e-9)


def test_bf16_trains_by_it():
    """Halves are rounded as the whole is, in rows and by their merges."""
    found, _ = on_sim(config_of(sp=2, dtype="bfloat16", **HALF))
    kept, _ = on_sim(config_of(sp=2, dtype="bfloat16", recompute="full"))
    assert worst(found, kept) < 2e-2


@pytest.mark.parametrize("offload", [False, True])
def test_the_block_sends_again_what_is_stated_and_no_more(offload):
    sent = {}
    for keep in ("attention", "attention_half"):
        _, cluster = on_sim(config_of(sp=3, recompute="full", recompute_keep=(keep,), offload=offload))
        sent[keep] = [cluster.ledger.by_operation(rank)["send"] for rank in range(3)]
    more = [0] * 3
    for batch in batches():
        plan = SequencePlan(batch.documents, Mask(), LAYOUTS["zigzag"], 31, 3)
        sizes = Sizes(1, MODEL.heads, MODEL.kv_heads, MODEL.head_dim, 8, 8)
        for rank in range(3):
            more[rank] += MODEL.layers * costs("ring").volume(plan.head, rank, sizes).forward
    assert [tail - whole for tail, whole in zip(sent["attention_half"], sent["attention"], strict=True)] == more


def test_it_keeps_half_of_what_attention_keeps():
    """Activations at the peak of a step, in the backward pass of the last block: of each layer before it half of out
    and of lse less; of its own the whole was completed, and what was kept is gone. x, a block's input, stays."""
    tokens, layers, width = 512, 6, 64
    found = {}
    for keep in ("attention", "attention_half"):
        config = Config(
            ModelConfig(vocab_size=64, dim=width, layers=layers, heads=4, kv_heads=4, head_dim=16, hidden_dim=16),
            AttentionConfig(strategy="ring"),
            ParallelConfig(dp_shard=1),
            train=TrainConfig(recompute="full", recompute_keep=(keep,), loss_chunk=64),
        )
        found[keep] = Cluster(1).run(measure, config, tokens)[0]
    half = tokens // 2 * (width + 4) * 4
    saved = found["attention"]["activations"] - found["attention_half"]["activations"]
    assert saved == (layers - 1) * half + 2 * half


# --- what is refused ---


@pytest.mark.parametrize("strategy", [name for name in catalog.STRATEGIES if name not in STRATEGIES])
def test_strategies_without_it_refuse_by_name(strategy):
    case = AttentionCase(2, 8, 8, "contiguous", Mask(), half=True)
    said = refusal(get_strategy(strategy), case)
    assert said is not None
    assert "train.recompute_keep=[attention_half]" in said and "train.recompute_keep=[attention]" in said
    assert attention_case(with_strategy(config_of(sp=2, **HALF), strategy)).half


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"recompute": "full", "recompute_keep": ("attention", "attention_half")}, "leave one out"),
        ({**HALF, "compile": True}, r"train.recompute_keep=\[attention_half\] does not go .* train.compile=false"),
        ({"recompute_keep": ("attention_half",)}, "set train.recompute=full"),
    ],
)
def test_the_configuration_refuses_what_cannot_be(train, words):
    with pytest.raises(ConfigError, match=words):
        TrainConfig(**train).check()
