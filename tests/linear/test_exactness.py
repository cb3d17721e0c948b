"""A sharded linear layer equals its recurrence, token by token: outputs and all gradients, per tensor and rank."""

import pytest

from longctx.linear.chunks import PIECE
from longctx.sim import Cluster
from tests.equivalence.pairwise import pairwise
from tests.linear.cases import (
    LAYOUTS,
    MIXERS,
    PACKINGS,
    STRATEGIES,
    WORLDS,
    Case,
    all_cases,
    assert_exact,
    compute,
)


def check(case: Case) -> None:
    assert_exact(case, Cluster(case.world, trace=False).run(compute, case))


def sampled_cases() -> list[Case]:
    rows = pairwise((MIXERS, STRATEGIES, tuple(LAYOUTS), PACKINGS, WORLDS))
    return [Case(*row) for row in rows]


@pytest.mark.parametrize("case", sampled_cases(), ids=str)
def test_sampled_cases_are_exact(case):
    check(case)


@pytest.mark.matrix
@pytest.mark.parametrize("case", list(all_cases()), ids=str)
def test_every_case_is_exact(case):
    check(case)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("chunk", [1, 2, 17, 64, 200])
def test_the_chunk_changes_nothing(mixer, chunk):
    check(Case(mixer, "lasp2", "zigzag", "edges", 2, chunk))


@pytest.mark.parametrize("tokens", [1, 20, 50])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mixer, strategy", [("retnet", "lasp"), ("gla", "lasp2"), ("gated_deltanet", "headwise")])
def test_pieces_that_are_computed_together_change_nothing(mixer, strategy, layout, tokens, monkeypatch):
    """Less than a chunk, about one, several; a segment of several pieces, and pieces of several segments."""
    monkeypatch.setitem(PIECE, "cpu", tokens)
    check(Case(mixer, strategy, layout, "edges", 2, 7))
    check(Case(mixer, strategy, layout, "few", 4, 7))
