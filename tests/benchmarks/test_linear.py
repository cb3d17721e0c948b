"""What ``benchmarks linear`` times: the strategy's pass, and the floor of the same work on one's own tokens."""

import itertools

import pytest
import torch.distributed as dist

from benchmarks.linear import LinearCell, _Entrant, _sides, floor_of, largest_deviation, lengths_of, pass_of
from longctx.bench.timing import Timing
from longctx.linear import delta_rule as delta
from longctx.linear import diagonal
from longctx.sim import Cluster
from longctx.verify import VerifyCase
from longctx.verify.run import core_of, local_inputs

MIXERS = ("retnet", "simple_gla", "gla", "gated_deltanet", "basic")


def case_of(strategy="lasp2", mixer="retnet", world=2, seq=96):
    return VerifyCase(
        strategy, "contiguous", world, seq=seq, heads=2, kv_heads=2, head_dim=8, mixer=mixer, chunk=16
    )  # fmt: skip


@pytest.mark.parametrize("strategy", ["lasp2", "lasp", "headwise"])
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("seq", [96, 70, 6])
def test_the_floor_computes_the_chunks_of_the_strategy(strategy, mixer, seq, monkeypatch):
    """In order, of the same shapes: what each rank's passes ask of the core, forward and backward."""
    case, asked = case_of(strategy, mixer, seq=seq), {}

    def kept(name, original):
        def run(first, *rest):
            tensor = first if name == "write" else first.addition
            asked.setdefault(dist.get_rank(), []).append((name, tensor.shape))
            return original(first, *rest)

        return run

    for core, name in itertools.product((diagonal, delta), ("write", "reads", "intra")):
        monkeypatch.setattr(core, name, kept(name, getattr(core, name)))

    def counted():
        rank, found = dist.get_rank(), []
        for run in (pass_of(case, rank, dist.group.WORLD), floor_of(case, rank)):
            asked.pop(rank, None)
            run()
            found.append(asked[rank])
        return found

    for own, floor in Cluster(2, trace=False).run(counted):
        assert own == floor and {name for name, _ in own} == {"write", "reads", "intra"}


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_floor_sends_nothing_and_the_first_rank_computes_the_same_numbers(mixer):
    """Nothing enters the first rank's tokens; the floor's output there is the strategy's own."""
    case = case_of(mixer=mixer)
    alone = VerifyCase(**{**vars(case), "seq": 48, "world": 1})

    def run():
        plan, local, _ = local_inputs(case, dist.get_rank())
        out = core_of(case, dist.group.WORLD)(local, plan.handle)
        return local, out.detach()

    cluster = Cluster(2)
    (local, out), _ = cluster.run(run)
    assert cluster.ledger.sent(0)
    assert (core_of(alone, None)(local, alone.plan().handle) - out).norm() <= 1e-12 * out.norm()
    silent = Cluster(2)
    silent.run(lambda: floor_of(case, dist.get_rank())())
    assert not silent.ledger.sent(0) and not silent.ledger.sent(1)


def test_constants_have_no_gradient_and_all_else_has(monkeypatch):
    wanted = []
    monkeypatch.setattr("torch.autograd.grad", lambda out, inputs, dout: wanted.append(len(inputs)))
    pass_of(case_of(mixer="retnet", world=1), 0, None)()  # q, k, v
    pass_of(case_of(mixer="gated_deltanet", world=1), 0, None)()  # with a, b, A_log, dt_bias, three convolutions
    assert wanted == [3, 10]


@pytest.mark.parametrize("seq, pairs", [(2048, 4), (64, 4), (4096, 2), (8192, 1), (32768, 1)])
def test_turns_of_strategy_and_floor_alternate(seq, pairs):
    entrant = _Entrant(case_of(seq=seq), lambda: "own", lambda: "floor")
    first, second = ([side() for side in _sides(entrant, repeat)] for repeat in (0, 1))
    assert first[:2] == ["own", "floor"] and second[:2] == ["floor", "own"]
    assert len(first) == len(second) == 2 * pairs and first.count("own") == pairs
    if pairs > 1:
        assert first[:4] == ["own", "floor", "floor", "own"]


def cell(seq, seconds, strategy="lasp2"):
    timing = Timing.of([seconds])
    return LinearCell(strategy, "retnet", seq, timing, timing, Timing.of([1.0]))


def test_time_of_a_token_is_uneven_by_its_worst_length():
    assert largest_deviation([cell(100, 1.0), cell(200, 2.0)]) == 0
    # 8, 10 and 12 ms: 10 in the mean, 20 % off.
    assert largest_deviation([cell(100, 0.8), cell(200, 2.0), cell(400, 4.8)]) == pytest.approx(0.2)
    cells = [cell(200, 1.0, "lasp"), cell(100, 1.0), cell(100, 1.0, "lasp")]
    assert [(name, [one.seq for one in row]) for _, name, row in lengths_of(cells)] == [
        ("lasp", [100, 200]),
        ("lasp2", [100]),
    ]
