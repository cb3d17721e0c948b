"""A document without numbers stays by itself in linear layers: states and halos of others are as before."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longctx.catalog import LINEAR_STRATEGIES, MIXERS
from longctx.linear import HeadDims, LinearAttention, get_mixer
from longctx.sequence import Documents, Mask, SequencePlan, make_layout, unshard
from longctx.sim import Cluster
from longctx.verify.run import cut

WIDTHS, LENGTH = HeadDims(6, 6), 48
# Single tokens, edges in chunks and on them, padding; and, for states that overflow, documents of whole chunks.
PACKED = (((9, 1, 1, 1, 6, 1, 26), (1, 1, 20, 10, 1, 1)), (3, 2))
WHOLE = (((16, 16, 16), (16, 32)), (1, 0))
LAYOUTS = {"contiguous": 8, "zigzag": 16, "striped": 4}
CASES = [
    (mixer, strategy, layout)
    for mixer, strategy, layout in itertools.product(MIXERS, LINEAR_STRATEGIES, LAYOUTS)
    if get_mixer(mixer).has_states or strategy == "lasp2"
]
SAMPLED = [case for number, case in enumerate(CASES) if number % 5 == 0 or case[0] == "gated_deltanet"]


def rows_of_bad(lengths: tuple[tuple[int, ...], ...], bad: tuple[int, ...]) -> Tensor:
    """The rows of one document in each sequence, and of padding, bool ``[B, S]``."""
    found = torch.zeros(len(lengths), LENGTH, dtype=torch.bool)
    for row, (its, document) in enumerate(zip(lengths, bad, strict=True)):
        found[row, sum(its[:document]) : sum(its[: document + 1])] = True
        found[row, sum(its) :] = True
    return found


def computed(case: tuple[str, str, str], plan: SequencePlan, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """out, and the gradients of what is by token."""
    name, strategy, layout = case
    sizes = {"moba": {"mixer_block": 4, "mixer_top_k": 2}, "rat": {"mixer_block": 4}}.get(name, {})
    mixer, draw = get_mixer(name, **sizes), torch.Generator().manual_seed(5)
    parameters = {
        key: torch.rand((2, *shape), generator=draw, dtype=torch.float64)
        for key, shape in mixer.parameters(WIDTHS).items()
    }

    def rank_main() -> dict[str, Tensor]:
        local = {key: cut(whole, plan, dist.get_rank()) for key, whole in given.items()}
        dout = local.pop("dout")
        leaves = {key: value.requires_grad_() for key, value in local.items()}
        core = LinearAttention(strategy, dist.group.WORLD, chunk=LAYOUTS[layout])
        out = mixer.mix({**leaves, **parameters, **mixer.constants(2, 0, 2)}, core, plan.handle)
        return {"out": out.detach(), **dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), dout)))}

    ranks = Cluster(plan.world, trace=False).run(rank_main)
    return {key: unshard([found[key] for found in ranks], plan) for key in ranks[0]}


def check(case: tuple[str, str, str], lengths, bad, world: int, value: float, causal: bool = True) -> None:
    name, _, layout = case
    documents = tuple(Documents.from_lengths(row) for row in lengths)
    block = {"block": LAYOUTS[layout]} if layout == "striped" else {}
    plan = SequencePlan(documents, Mask(causal), make_layout(layout, **block), LENGTH, world)
    channels = {**get_mixer(name).tokens(WIDTHS), "dout": WIDTHS.value}
    draw = torch.Generator().manual_seed(len(name))
    clean = {key: torch.randn(2, LENGTH, 2, c, generator=draw, dtype=torch.float64) for key, c in channels.items()}
    rows = rows_of_bad(lengths, bad)
    spoiled = {key: whole.masked_fill(rows[..., None, None], value) for key, whole in clean.items()}
    if math.isfinite(value):
        spoiled["dout"] = clean["dout"]
    expected, found = computed(case, plan, clean), computed(case, plan, spoiled)
    for key, right in expected.items():
        torch.testing.assert_close(found[key][~rows], right[~rows], atol=1e-11, rtol=1e-11)
    if not math.isfinite(value):
        assert not found["out"][rows].isfinite().all(), "and it is to be seen where it is"


@pytest.mark.parametrize("case", SAMPLED, ids="-".join)
def test_a_document_without_numbers_stays_by_itself(case):
    check(case, *PACKED, world=3, value=math.nan if SAMPLED.index(case) % 2 else math.inf)


@pytest.mark.matrix
@pytest.mark.parametrize("case", CASES, ids="-".join)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_document_without_numbers_stays_by_itself_everywhere(case, world):
    for value in (math.nan, math.inf, -math.inf):
        check(case, *PACKED, world=world, value=value)


@pytest.mark.parametrize("mixer", ["basic", "retnet", "gated_deltanet"])
@pytest.mark.parametrize("strategy", LINEAR_STRATEGIES)
def test_a_state_that_overflows_ends_with_its_document(mixer, strategy):
    check((mixer, strategy, "zigzag"), *WHOLE, world=3, value=1e200)


def test_queries_that_see_later_tokens_do_not_see_other_documents():
    check(("basic", "lasp2", "zigzag"), *PACKED, world=3, value=math.nan, causal=False)
