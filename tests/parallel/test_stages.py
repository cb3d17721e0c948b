"""How a model is cut into stages: contiguous, complete, and with the smallest largest cost there is."""

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx.config import AttentionConfig, Config, DataConfig, ModelConfig, ParallelConfig
from longctx.config.pipeline import RULES
from longctx.config.pipeline import RULES as SCHEDULES
from longctx.model import Decoder, Part, initialize
from longctx.parallel.pipeline import ONE_STAGE, SEVERAL_STAGES
from longctx.parallel.stages import StageCosts, estimate_costs, parts_of, split_layers, stage_numbers

positive = st.floats(0.01, 100.0)


def stage_costs(costs: StageCosts, cut: list[range]) -> list[float]:
    sums = [sum(costs.layers[layer] for layer in layers) for layers in cut]
    sums[0] += costs.embedding
    sums[-1] += costs.head
    return sums


@given(st.data(), st.lists(positive, min_size=1, max_size=8), positive, positive)
def test_the_largest_cost_is_the_least_of_all_cuts(data, layers, embedding, head):
    stages = data.draw(st.integers(1, len(layers)))
    costs = StageCosts(tuple(layers), embedding, head)
    cut = split_layers(costs, stages)
    assert [layer for layers in cut for layer in layers] == list(range(len(layers)))
    assert len(cut) == stages and all(cut)
    inner = combinations(range(1, len(layers)), stages - 1)
    every = [[range(a, b) for a, b in pairwise([0, *bounds, len(layers)])] for bounds in inner]
    assert max(stage_costs(costs, cut)) <= min(max(stage_costs(costs, other)) for other in every) * (1 + 1e-9)


def test_a_dear_head_takes_layers_off_its_stage_and_leaves_the_others_even():
    costs = StageCosts((1.0,) * 10, 0.0, 4.0)
    assert sorted(stage_costs(costs, split_layers(costs, 3))) == [4.0, 5.0, 5.0]
    assert [len(layers) for layers in split_layers(StageCosts((1.0,) * 7, 0.0, 9.0), 4)] == [2, 2, 2, 1]


def config_of(seq_len: int, window: int | None = None, **parallel) -> Config:
    return Config(
        model=ModelConfig(layers=8),
        data=DataConfig(seq_len=seq_len),
        attention=AttentionConfig(window=window),
        parallel=ParallelConfig(**parallel),
    )


def test_costs_count_visible_pairs_and_the_head():
    model, length = config_of(100).model, 100
    weights = (
        model.layers * model.dim * ((2 * model.heads + 2 * model.kv_heads) * model.head_dim + 3 * model.hidden_dim)
    )
    for window, pairs in ((None, 5050), (100, 5050), (1, 100), (3, 1 + 2 + 98 * 3)):
        costs = estimate_costs(config_of(length, window))
        attention = 4 * pairs * model.heads * model.head_dim
        assert sum(costs.layers) == pytest.approx(2 * length * weights + model.layers * attention)
    assert costs.head == 2 * length * model.dim * model.vocab_size


def test_longer_sequences_move_layers_to_the_stage_of_the_head():
    """The head grows with the length, attention with its square."""
    short = replace(config_of(128, pp=2), model=replace(ModelConfig(layers=8), vocab_size=20_000))
    long = replace(short, data=DataConfig(seq_len=65_536))
    assert len(parts_of(short)[1].layers) < len(parts_of(long)[1].layers) == 4


@pytest.mark.parametrize(
    ("schedule", "pp", "expected"),
    [
        ("1f1b", 3, [[0], [1], [2]]),
        ("interleaved_1f1b", 2, [[0, 2], [1, 3]]),
        ("zbv", 2, [[0, 3], [1, 2]]),
        ("dualpipev", 3, [[0, 5], [1, 4], [2, 3]]),
    ],
)
def test_stages_lie_on_ranks_as_the_schedule_wants(schedule, pp, expected):
    parallel = ParallelConfig(pp=pp, pp_schedule=schedule)
    assert [stage_numbers(parallel, rank) for rank in range(pp)] == expected


@pytest.mark.parametrize("tied", [True, False])
def test_parts_have_the_parameters_of_the_whole_under_their_names(tied):
    whole = Decoder(ModelConfig(layers=3, tie_embeddings=tied))
    initialize(whole, 4)
    expected = dict(whole.named_parameters())
    parts = [Part(range(1), True, False), Part(range(1, 2), False, False), Part(range(2, 3), False, True)]
    seen: dict[str, int] = {}
    for part in parts:
        fresh = Decoder(whole.config, part=part)
        initialize(fresh, 4)
        cut = dict(whole.cut(part).named_parameters())
        assert cut.keys() == dict(fresh.named_parameters()).keys()
        for name, parameter in fresh.named_parameters():
            assert torch.equal(parameter, expected[name]) and torch.equal(cut[name], expected[name])
            seen[name] = seen.get(name, 0) + 1
    assert seen.keys() == expected.keys()
    assert {name for name, count in seen.items() if count > 1} == ({"embedding.weight"} if tied else set())


def test_every_schedule_has_its_rules_and_its_class():
    assert set(RULES) == set(SCHEDULES) == {*ONE_STAGE, *SEVERAL_STAGES}
    assert {name for name in RULES if RULES[name].most == 1} == set(ONE_STAGE)
