"""``longctx bench attention``: what it takes from the configuration, its gate, its figures. Times mean nothing here."""

import json

import pytest
import torch
import torch.distributed as dist

from longctx.bench import gate
from longctx.bench.attention import measure
from longctx.bench.gate import require_exact, shrunk
from longctx.bench.timing import Entrant, Timing, spread, time_in_turn
from longctx.config import resolve
from longctx.errors import ConfigError, NumericsError
from longctx.launcher.cli import main
from longctx.launcher.commands.bench import attention as bench_attention
from longctx.launcher.commands.bench.attention import cases_of
from longctx.launcher.compose import compose
from longctx.sim import Cluster, RankFailed
from longctx.verify import VerifyCase
from longctx.verify.run import core_of, run_rank

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "words, code, said",
    [
        (["comm=sim", "parallel.sp=2"], 78, "comm=sim: its ranks take turns in one process, so that their times mean"),
        (["--repeats", "0"], 78, "--repeats 0 must be at least 1; 5 is the default"),
        (["--strategies", "ring,rign"], 78, "--strategies 'rign' is unknown; valid: local, ring"),
        (["--strategies", "ring,ring"], 78, "name each once"),
        (["--strategies", "lasp2"], 78, "--strategies 'lasp2' is unknown"),
        (["--strategies", "ulysses", "parallel.sp=3"], 78, "every strategy refuses: ulysses on contiguous: "),
        (["--documents", "300,x"], 78, "--documents '300,x' must be whole numbers"),
        (["--documents", "300,700", "data.seq_len=1024"], 78, "add up to 1000"),
        (
            ["attention.ping_pong=true", "attention=disaggregated", "train.micro_batch=2"],
            78,
            "time it with `longctx bench step`",
        ),
        (["cluster.nodes=2"], 78, "cluster.nodes=2, but this command runs on this machine alone"),
        (["data.seqlen=5"], 78, "data.seq_len"),
    ],
)
def test_refusals(words, code, said, capsys):
    assert main(["bench", "attention", *words]) == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        (["bench"], "bench takes one of its benchmarks first; valid: attention, step"),
        (["bench", "atention"], "did you mean attention?"),
        (["bench attention"], "bench attention is not a command; "),
        (["bench", "--json"], "bench takes one of its benchmarks first"),
    ],
)
def test_bench_wants_to_know_which(words, said, capsys):
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_bench_help_lists_both(capsys):
    assert main(["bench", "--help"]) == 0
    out = capsys.readouterr().out
    assert "bench attention" in out and "bench step" in out


def configured(*words):
    config = compose(words)
    return resolve(config, config.parallel.sp * config.parallel.tp)


def test_shapes_are_the_runs():
    config = configured(
        "model.heads=8", "parallel.sp=2", "parallel.tp=2", "data.seq_len=4096", "train.micro_batch=2",
        "train.dtype=float64", "attention.window=100", "attention.kernel=dense",
    )  # fmt: skip
    ring, usp = cases_of(config, "ring,usp", None)
    assert (ring.strategy, ring.layout, ring.world, ring.seq, ring.batch) == ("ring", "zigzag", 2, 4096, 2)
    assert (ring.heads, ring.kv_heads) == config.local_heads == (config.model.heads // 2, config.model.kv_heads // 2)
    assert (ring.head_dim, ring.dtype, ring.window, ring.kernel) == (config.model.head_dim, "float64", 100, "dense")
    assert usp.layout == "zigzag" and usp.documents == ()
    (contiguous,) = cases_of(configured("attention.layout=contiguous"), "ring", "1000,24")
    assert (contiguous.layout, contiguous.documents) == ("contiguous", (1000, 24))


def test_all_strategies_of_the_models_layers_by_default():
    assert [case.strategy for case in cases_of(configured("parallel.sp=2"), None, None)] == [
        "ring", "burst", "token_ring", "ulysses", "usp", "gather", "tree", "rsa", "disaggregated", "zeppelin",
    ]  # fmt: skip
    assert "local" in [case.strategy for case in cases_of(configured(), None, None)]
    linear = cases_of(configured("model=linear_retnet", "attention=lasp2", "parallel.sp=2"), None, None)
    assert [case.strategy for case in linear] == ["lasp2", "lasp", "headwise"]
    assert {(case.mixer, case.kv_heads == case.heads) for case in linear} == {("retnet", True)}


def case_of(strategy="ring", layout="zigzag", **changes):
    shape = {"seq": 96, "heads": 4, "kv_heads": 2, "head_dim": 8, "dtype": "float32"}
    return VerifyCase(strategy, layout, 2, **{**shape, **changes})


CASES = [
    case_of(),
    case_of("ulysses", "contiguous", documents=(60, 36)),
    case_of("rsa", "contiguous"),
    case_of("gather", "contiguous", window=17),
    case_of("lasp2", "contiguous", mixer="gated_deltanet", kv_heads=4, chunk=16),
]


def test_figures_are_those_of_verify():
    """Bytes, peak memory and balance of what is timed, from another path through the same strategies."""
    rows = Cluster(2, trace=False).run(lambda: measure(CASES, dist.group.WORLD, CPU, 2))[0]
    for case, row in zip(CASES, rows, strict=True):
        ranks = Cluster(2, trace=False).run(lambda case=case: run_rank(case, dist.group.WORLD))
        assert row.bytes_forward == [rank.bytes_forward for rank in ranks]
        assert row.bytes_backward == [rank.bytes_backward for rank in ranks]
        assert row.time.repeats == 2 and row.time.low > 0
        assert all(error < 1e-10 for error in row.errors.values())
        if case.mixer is None:
            assert row.peak_extra_bytes == max(rank.peak_extra_bytes for rank in ranks)
            assert row.floor.low > 0 and row.share_of_floor.repeats == 2
        else:
            assert row.floor is None
    ring, _, _, gather, _ = rows
    assert ring.balance == 1.0
    assert gather.balance == max(gather.work) * 2 / sum(gather.work) > 1


def test_a_wrong_strategy_is_not_timed(monkeypatch):
    def off(case, group):
        compute = core_of(case, group)
        return lambda local, plan: compute(local, plan) * (1 + 1e-9)

    monkeypatch.setattr(gate, "core_of", off)
    monkeypatch.setattr("longctx.bench.attention.time_in_turn", lambda *given: pytest.fail("it was timed"))
    with pytest.raises(RankFailed) as failure:
        Cluster(2, trace=False).run(lambda: measure(CASES[:1], dist.group.WORLD, CPU, 1))
    cause = failure.value.__cause__
    assert isinstance(cause, NumericsError)
    assert "ring on zigzag is not exact on 96 tokens in float64: " in str(cause) and "nothing is timed" in str(cause)


def test_the_gate_also_judges_the_runs_own_dtype(monkeypatch):
    """What is right in float64 and wrong by far in the run's arithmetic is caught."""

    def rounded(case, group):
        compute = core_of(case, group)
        off = 1e-2 if case.dtype == "float32" and case.world > 1 else 0.0
        return lambda local, plan: compute(local, plan) * (1 + off)

    monkeypatch.setattr(gate, "core_of", rounded)
    with pytest.raises(RankFailed) as failure:
        Cluster(2, trace=False).run(lambda: require_exact(case_of(), dist.group.WORLD, CPU))
    assert "tokens in float32: " in str(failure.value.__cause__)


def test_the_gate_is_small_and_keeps_the_kind():
    large = case_of(seq=10_000, documents=(4_000, 1, 5_999), window=1_000, batch=4)
    small = shrunk(large)
    assert (small.seq, sum(small.documents), len(small.documents), small.window, small.batch) == (509, 509, 2, 50, 2)
    assert shrunk(case_of()) == case_of()


def test_a_refused_strategy_is_listed_and_not_run(monkeypatch, capsys):
    def found(module, config, command, world, job):
        assert [case["strategy"] for case in job["cases"]] == ["ring"]
        return bench_attention.measured(config, job, CPU, lambda *told: None)

    def alone(module, config, command, world, job):
        return Cluster(world, trace=False).run(lambda: found(module, config, command, world, job))[0]

    monkeypatch.setattr(bench_attention, "run_on_processes", alone)
    words = ["--strategies", "ring,ulysses", "--repeats", "1", "parallel.sp=3", "data.seq_len=96"]
    assert main(["bench", "attention", *words]) == 0
    out = capsys.readouterr().out
    assert "1 × 96 tokens, 4/2 heads of 32 on a rank, float32; 3 ranks share a sequence" in out
    assert "ulysses on contiguous refuses: " in out and "ring" in out and "(once)" in out
    assert main(["bench", "attention", "--json", *words]) == 0
    told = json.loads(capsys.readouterr().out)
    ring, ulysses = told["rows"]
    assert ring["refused"] is None and len(ring["bytes_forward"]) == 3
    assert ulysses["time"] is None and "ulysses" not in str(told["rows"][0])


def test_slow_ones_are_timed_once_and_turns_alternate(monkeypatch):
    order = []

    def entrant(name, first):
        return Entrant(
            name=name, run=lambda: order.append(name), floor=lambda: order.append(f"{name}'s floor"), first=first
        )

    def run():
        entrants = [entrant("quick", 0.1), entrant("slow", 9.0)]
        time_in_turn(entrants, 2, CPU)
        return [len(one.seconds) for one in entrants]

    assert Cluster(1).run(run) == [[2, 1]]
    assert order == ["quick's floor", "slow's floor", "slow", "quick's floor", "quick", "quick", "quick's floor"]


def test_a_spread_says_when_it_is_of_one():
    assert spread(vars(Timing.of([1.0, 3.0, 2.0])), 10, ".0f") == "20 (10-30)"
    assert spread(vars(Timing.of([1.0])), 1, ".1f") == "1.0 (once)"


def test_options_that_a_strategy_lacks_are_left_to_those_that_have_them():
    config = configured("attention=usp", "parallel.sp=2", "attention.ulysses_degree=2")
    ring, usp = cases_of(config, "ring,usp", None)
    assert (ring.options.ulysses_degree, usp.options.ulysses_degree) == (None, 2)
    with pytest.raises(ConfigError, match="--seq 1024"):
        cases_of(config, None, "1,2")
