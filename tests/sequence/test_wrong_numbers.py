"""Ranks, worlds, lengths and counts of the wrong kind are refused as a ValueError, wherever the library takes one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from longctx.attention import AttentionCase, StrategyAttention, StrategyOptions, get_strategy, refusal
from longctx.data.balance import Balance
from longctx.linear import HeadDims, LinearAttention, LinearCase, get_linear, get_mixer
from longctx.linear import refusal as linear_refusal
from longctx.sequence import (
    Batch,
    Contiguous,
    Documents,
    Explicit,
    Mask,
    SequencePlan,
    Striped,
    Zigzag,
    cut,
    make_layout,
    make_plan,
    shard,
    unshard,
)  # fmt: skip
from longctx.sim import Cluster, Fault
from longctx.sparse.moba import moba
from longctx.sparse.rat import rat

TOKENS, ROW = torch.zeros(1, 8, dtype=torch.int64), (Documents.single(8),)
BATCH = Batch(TOKENS, TOKENS, ROW)
PLAN = SequencePlan(ROW, Mask(), Contiguous(), 8, 2)
CASE = {"world": 2, "heads": 4, "kv_heads": 2, "layout": "zigzag", "mask": Mask()}

TAKERS: dict[str, Callable[[object], object]] = {
    "Documents.from_lengths": lambda n: Documents.from_lengths([3, n]),
    "Mask": lambda n: Mask(window=n),
    "Striped": lambda n: Striped(n),
    "make_layout": lambda n: make_layout("striped", n),
    "Explicit": lambda n: Explicit((((0, n),),)),
    "make_plan, world": lambda n: make_plan(ROW, Mask(), Contiguous(), 8, n),
    "SequencePlan, world": lambda n: SequencePlan(ROW, Mask(), Contiguous(), 8, n),
    "make_plan, length": lambda n: make_plan((), Mask(), Contiguous(), n, 2),
    "make_plan, multiple": lambda n: make_plan(ROW, Mask(), Contiguous(), 8, 2, n),
    "shard, rank": lambda n: shard(BATCH, Zigzag(), Mask(), n, 2),
    "shard, world": lambda n: shard(BATCH, Zigzag(), Mask(), 0, n),
    "cut": lambda n: cut(BATCH, PLAN, n),
    "positions": lambda n: PLAN.positions(n),
    "tiles": lambda n: PLAN.tiles(n, n),
    "joined": lambda n: PLAN.joined(n),
    "ulysses_degree": lambda n: StrategyAttention("usp", options=StrategyOptions(ulysses_degree=n)),
    "inner_ring": lambda n: StrategyAttention("burst", options=StrategyOptions(inner_ring=n)),
    "AttentionCase": lambda n: refusal(get_strategy("ring"), AttentionCase(**{**CASE, "world": n})),
    "LinearAttention": lambda n: LinearAttention("lasp2", chunk=n),
    "LinearCase": lambda n: linear_refusal(get_linear("lasp2"), LinearCase(n, 2, "gla", "zigzag")),
    "HeadDims": lambda n: HeadDims(n, 4),
    "get_mixer": lambda n: get_mixer("moba", mixer_block=n),
    "moba": lambda n: moba(4, n),
    "rat": rat,
    "Balance": lambda n: Balance(window=n),
    "Cluster": Cluster,
    "Fault": lambda n: Fault("hang", n),
}


@pytest.mark.parametrize("name", TAKERS)
@pytest.mark.parametrize("wrong", [-1, 2.7, True, "2", 2.0, np.float64(1), torch.tensor(1.0), 1j], ids=repr)
def test_a_number_of_the_wrong_kind_is_refused(name, wrong):
    if name == "make_plan, length":
        wrong = wrong if wrong != -1 else -8
    with pytest.raises(ValueError, match="must"):
        TAKERS[name](wrong)


@pytest.mark.parametrize(
    "name", sorted(set(TAKERS) - {"Cluster", "Fault", "joined", "cut", "positions", "tiles", "Explicit"})
)
def test_a_number_of_numpy_is_a_number(name):
    TAKERS[name](np.int32(1))


def test_what_is_no_group_no_option_and_no_mask_is_refused():
    for group in (3, "world", torch.zeros(1), -100, object()):
        for kind in (StrategyAttention, LinearAttention):
            with pytest.raises(ValueError, match=r"must be a torch\.distributed\.ProcessGroup"):
                kind("ring" if kind is StrategyAttention else "lasp2", group)
    for refused in (
        lambda: StrategyAttention("ring", scale=float("nan")),
        lambda: StrategyAttention("ring", scale="1"),
        lambda: StrategyAttention("ring", kernel="flsh_cpu"),
        lambda: StrategyAttention(7),
        lambda: StrategyAttention("ring", options={"grad_dtype": "compute"}),
        lambda: Mask(causal="no"),
        lambda: Documents.from_lengths(8),
        lambda: Documents.from_lengths("8"),
        lambda: Documents(np.array([0, 2.5, 8])),
        lambda: make_plan(ROW, None, Contiguous(), 8, 2),
        lambda: make_plan(ROW, Mask(), "zigzag", 8, 2),
        lambda: make_plan(ROW[0], Mask(), Contiguous(), 8, 2),
        lambda: make_plan([[8]], Mask(), Contiguous(), 8, 2),
        lambda: Batch(TOKENS, TOKENS[:, :4], ROW),
        lambda: Batch(TOKENS, TOKENS, ()),
        lambda: Batch(TOKENS, TOKENS, ROW[0]),
        lambda: Batch(TOKENS.float(), TOKENS, ROW),
        lambda: Batch(TOKENS[0], TOKENS[0], ROW),
        lambda: Batch(TOKENS.tolist(), TOKENS, ROW),
        lambda: unshard([torch.zeros(1, 4)], PLAN),
        lambda: unshard([torch.zeros(1, 4), torch.zeros(1, 3)], PLAN),
        lambda: unshard([torch.zeros(1, 5)] * 2, PLAN),
        lambda: unshard([torch.zeros(1, 4)] * 3, PLAN),
    ):
        with pytest.raises(ValueError):
            refused()
