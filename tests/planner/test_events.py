"""The clock, plans replayed on it, and the reference table of three systems."""

from itertools import pairwise

import numpy as np
import pytest

from longctx.planner import (
    AttentionShape,
    DocumentPlacement,
    Plan,
    PlannerOptions,
    Span,
    TaskRuns,
    Tasks,
    Topology,
    causal,
    make_plan,
    streamed,
)
from longctx.planner.events import Hardware, Operation, attention_seconds, replay, replay_plan
from longctx.planner.lengths import draw_rows, long_mixture, read_lengths, stream_rows, synthetic
from longctx.planner.pipelines import ClusterRun, disaggregated, fixed_packing, one_forward_one_backward, wlb


def test_a_resource_keeps_its_order_and_waits_for_others():
    ends = replay([Operation("a", 2.0), Operation("b", 1.0, (0,)), Operation("a", 3.0), Operation("b", 1.0, (2,))])
    assert ends.tolist() == [2.0, 3.0, 5.0, 6.0]


def test_a_later_operation_may_be_waited_for():
    ends = replay([Operation("a", 1.0, (1,)), Operation("b", 2.0), Operation("a", 1.0)])
    assert ends.tolist() == [3.0, 2.0, 4.0]


def test_operations_that_wait_for_each_other_are_found():
    with pytest.raises(AssertionError, match="wait for each other"):
        replay([Operation("a", 1.0, (1,)), Operation("b", 1.0, (0,))])


def test_equal_micro_batches_have_the_textbook_bubble():
    seconds = one_forward_one_backward([1.0] * 8, [2.0] * 8, 4)
    assert seconds == (8 + 4 - 1) * 3.0
    assert one_forward_one_backward([1.0, 5.0], [2.0, 7.0], 1) == 15.0
    assert one_forward_one_backward([1.0], [2.0], 4) == 12.0


def test_short_tasks_pay_whole_tiles():
    home = DocumentPlacement.of([128], [[Span(0, 0, 128)]])
    mask, hardware = causal([128]), Hardware(flops=1.0, tile=64)

    def seconds(edges):
        rows = [(0, low, high, 0, 0) for low, high in pairwise(edges)]
        runs = TaskRuns.of_rows(*np.array(rows).T)
        return attention_seconds(Plan("", home, mask, Tasks.of_runs(mask, runs), AttentionShape()), hardware)[0]

    whole = 4 * 32 * 128 * 128 * 129 // 2
    assert seconds([0, 128]) == seconds([0, 64, 128]) == whole
    assert seconds([0, 32, 64, 96, 128]) == 2 * whole


def test_replay_of_a_plan():
    home = DocumentPlacement.of([64], [[Span(0, 0, 64)], []])
    mask, widths = causal([64]), AttentionShape(1, 1, 1, 1)
    rows = [(0, 0, 48, 0, 0), (0, 48, 64, 0, 1)]
    made = Plan("", home, mask, Tasks.of_runs(mask, TaskRuns.of_rows(*np.array(rows).T)), widths)
    found = replay_plan(made, Hardware(flops=4.0, bandwidth=1.0, tile=1))
    there, back = 16 + 2 * 64, 16 * (1 + 4)
    served = 16 * (49 + 64) / 2
    assert found.compute.tolist() == [48 * 49 / 2, served]
    assert found.seconds == max(48 * 49 / 2, there + served + back)
    assert found.received.tolist() == [0, there]
    assert found.hidden(there + back) and not found.hidden(there - 1)


def test_balance_shows_on_the_clock():
    lengths = np.array([8192, *[256] * 96])
    hardware = Hardware(flops=1e12, tile=1)
    times = {
        name: replay_plan(
            make_plan(name, causal(lengths), Topology(4), PlannerOptions(block=8), streamed(lengths, 4)), hardware
        )
        for name in ("local", "cad")
    }
    assert times["cad"].compute.max() <= 1.02 * times["cad"].compute.mean()
    assert times["cad"].seconds < times["local"].seconds


def test_rows_are_full_and_keep_all_tokens():
    rng = np.random.default_rng(0)
    lengths = synthetic(1, 4000)
    for rows in (draw_rows(lengths, 5000, 3, rng), stream_rows(lengths, 5000, 3)):
        assert [int(row.sum()) for row in rows] == [5000] * 3 and min(row.min() for row in rows) > 0
    mixed = long_mixture(lengths, 131072, rng)
    assert (mixed == 131072).any() and len(mixed) < len(lengths)


def test_synthetic_lengths_are_seeded_and_long_tailed():
    lengths = synthetic(0)
    assert np.array_equal(lengths, synthetic(0)) and not np.array_equal(lengths, synthetic(1))
    assert 1500 < np.median(lengths) < 2300 and lengths.max() > 100_000
    squares = lengths.astype(float) ** 2
    assert 0.3 < squares[lengths >= 65536].sum() / squares.sum() < 0.7


def test_lengths_must_be_a_list_of_numbers(tmp_path):
    for text in ("{}", "[]", "[0]", "nonsense", '["a"]'):
        (tmp_path / "lengths.json").write_text(text)
        with pytest.raises(ValueError, match="JSON list"):
            read_lengths(str(tmp_path / "lengths.json"))


def test_order_and_ablations_of_the_three_systems():
    """On synthetic documents: balance and hidden exchanges pay, each ablation takes some of it away."""
    run = ClusterRun()
    previous = 0.0
    for context in (131072, 524288):
        mixture = long_mixture(synthetic(0), context, np.random.default_rng(0))
        rows = stream_rows(mixture, context, run.replicas * run.microbatches)
        cad, lazy = disaggregated(run, rows), disaggregated(run, rows, idle_serve=False)
        fixed, packed, hidden = fixed_packing(run, rows), wlb(run, rows), wlb(run, rows, hidden=True)
        assert cad.seconds < hidden < packed < fixed
        assert cad.seconds < lazy.seconds
        assert fixed / cad.seconds > previous
        previous = fixed / cad.seconds
