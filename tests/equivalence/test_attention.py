"""Sharded attention equals attention by its definition, per tensor and rank, on sim and through Gloo."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longctx.attention import dense_attention
from longctx.sequence import Documents
from longctx.sim import Cluster
from tests.equivalence import attention_rank
from tests.equivalence.attention_cases import (
    HEADS,
    LAYOUTS,
    LENGTHS,
    MASKS,
    WORLDS,
    Case,
    Problem,
    all_cases,
    inputs,
    sampled_cases,
)
from tests.equivalence.attention_definition import reference
from tests.equivalence.attention_rank import assert_exact, compute, gloo_cases
from tests.equivalence.pairwise import pairwise

ROOT = Path(__file__).parents[2]


def check(case: Case, strategy: str = "ring", kernel: str = "auto") -> None:
    for rank, computed in enumerate(Cluster(case.world, trace=False).run(compute, case, strategy, kernel)):
        assert_exact(case, rank, computed)


@pytest.mark.parametrize("case", sampled_cases(), ids=str)
def test_sampled_cases_are_exact(case):
    check(case)


@pytest.mark.matrix
@pytest.mark.parametrize("case", list(all_cases()), ids=str)
def test_every_case_is_exact(case):
    check(case)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_dense_kernel_is_exact_behind_the_same_ring(layout, mask):
    check(Case(layout, mask, "gqa4", 31, 4), kernel="dense")


@pytest.mark.parametrize("mask", MASKS)
def test_the_strategies_that_need_one_layout_are_exact_on_it(mask):
    check(Case("striped", mask, "mqa", 31, 3), "striped")
    check(Case("striped4", mask, "mha", 31, 3), "striped")
    check(Case("contiguous", mask, "gqa4", 31, 1), "local")


@pytest.mark.parametrize(("mask", "heads"), list(itertools.product(MASKS, HEADS)))
def test_the_package_s_reference_agrees_with_the_definition(mask, heads):
    for length in (1, 3, 31, 205):
        problem = Problem(mask, heads, length)
        whole = inputs(problem)
        q, k, v = (whole[name].clone().requires_grad_() for name in "qkv")
        documents = [Documents.from_lengths(row) for row in problem.packing]
        out = dense_attention(q, k, v, documents, problem.mask)
        grads = torch.autograd.grad(out, (q, k, v), whole["dout"])
        for name, tensor in zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True):
            torch.testing.assert_close(tensor, reference(problem)[name], rtol=1e-12, atol=1e-12)


@pytest.mark.gloo
def test_a_selection_is_exact_through_real_processes(tmp_path):
    command = [sys.executable, "-m", attention_rank.__name__, str(tmp_path / "store")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [*command, str(rank)],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(attention_rank.GLOO_WORLD)
    ]
    try:
        spoken = [rank.communicate(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (out, err) in zip(ranks, spoken, strict=True):
        assert (rank.returncode, out) == (0, f"exact: {len(gloo_cases())}\n"), err


def test_the_sample_holds_every_pair_and_little_else():
    axes = (tuple(LAYOUTS), MASKS, tuple(HEADS), LENGTHS, WORLDS)
    rows = [tuple(vars(case).values()) for case in sampled_cases()]
    for (i, first), (j, second) in itertools.combinations(enumerate(axes), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(first, second))
    assert len(rows) == len(set(rows)) <= 50
    assert sampled_cases() == sampled_cases()


def test_pairwise_of_few_axes():
    assert sorted(pairwise([(1, 2), "ab"])) == [(1, "a"), (1, "b"), (2, "a"), (2, "b")]
    assert len(pairwise([(0, 1)] * 4)) <= 6


def test_cases_hold_single_tokens_empty_ranks_shard_edges_and_padding():
    packing = Problem("documents causal", "mha", 997).packing
    assert 1 in packing[0] and sum(packing[0]) == 997 and sum(packing[1]) < 997
    assert packing[0][0] + packing[0][1] == 997 // 2
    empty = Case("striped", "causal", "mha", 3, 8).plan()
    assert [len(empty.positions(rank)) for rank in range(8)] == [1, 1, 1, 0, 0, 0, 0, 0]
