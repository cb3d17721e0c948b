"""Stages of a pipeline serve one another's attention: any assignment in any tick gives the same numbers."""

import gc
import random
import weakref
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.attention.runtime.sizes import Sizes
from longctx.attention.strategies.disaggregated.dispatch import Dispatch
from longctx.attention.strategies.disaggregated.lockstep import LockstepPlan, Phase, lockstep_plan_of
from longctx.attention.strategies.disaggregated.pipeline import Empty, StageAttention
from longctx.attention.strategies.disaggregated.prepared import dispatches
from longctx.comm import group_of
from longctx.options import StrategyOptions
from longctx.planner import Topology
from longctx.sequence import SequencePlan
from longctx.sim import Cluster, RankFailed
from longctx.verify import VerifyCase
from longctx.verify.case import RankResult
from longctx.verify.run import cut, judge
from tests.attention.cuts import Homes, random_plan

HEADS, KV_HEADS, HEAD_DIM = 2, 1, 4
EMPTY = Empty(HEADS, KV_HEADS, HEAD_DIM, torch.float64, torch.device("cpu"))
Layer = tuple[int, int, int]  # microbatch, stage, layer of the stage


@dataclass(frozen=True)
class Problem:
    """Attention of every layer of every stage, of microbatches with these documents; all inputs are independent."""

    documents: tuple[tuple[int, ...], ...]
    layers: tuple[int, ...]
    shards: int = 1
    layout: str = "contiguous"
    window: int | None = None
    batch: int = 1
    seed: int = 0
    planner: str = "cad"
    grad_dtype: str = "fp32"

    @property
    def world(self) -> int:
        return len(self.layers) * self.shards

    def case(self, layer: Layer) -> VerifyCase:
        """One layer of one microbatch, on the ranks of its stage."""
        lengths = self.documents[layer[0]]
        return VerifyCase(
            "disaggregated", self.layout, self.shards, seq=sum(lengths), documents=lengths, heads=HEADS,
            kv_heads=KV_HEADS, head_dim=HEAD_DIM, window=self.window, batch=self.batch,
            seed=self.seed + hash(layer) % 2**16,
        )  # fmt: skip

    @cached_property
    def plans(self) -> list[SequencePlan]:
        return [self.case((number, 0, 0)).plan() for number in range(len(self.documents))]

    def ticks(self) -> LockstepPlan:
        return lockstep_plan_of(self.plans, self.layers, self.planner, EMPTY.widths)


def run_rank(problem: Problem) -> tuple[dict[Layer, dict[str, torch.Tensor]], tuple[int, int]]:
    """What a rank finds of each layer of its stage, and the bytes that it sends forward and backward."""
    group = group_of(dist.group.WORLD)
    stage, shard = divmod(dist.get_rank(), problem.shards)
    options = StrategyOptions(grad_dtype=problem.grad_dtype)
    attention = StageAttention(group, problem.layers, stage, EMPTY, problem.planner, "dense", options)
    ticks, traffic, found = attention.open(problem.plans), group.traffic, {}
    for number in range(ticks.count):
        with attention.tick(Phase.FORWARD, number):
            microbatch = ticks.microbatch(Phase.FORWARD, number, stage)
            for layer in range(0 if microbatch is None else problem.layers[stage]):
                case, plan = problem.case((microbatch, stage, layer)), problem.plans[microbatch]
                q, k, v, dout = (cut(whole, plan, shard) for whole in case.inputs())
                inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
                found[microbatch, stage, layer] = attention.start(*inputs, plan.handle).out, inputs, dout
    between, results = traffic.bytes, {}
    for number in range(ticks.count):
        with attention.tick(Phase.BACKWARD, number):
            microbatch = ticks.microbatch(Phase.BACKWARD, number, stage)
            for layer in reversed(range(0 if microbatch is None else problem.layers[stage])):
                out, inputs, dout = found[microbatch, stage, layer]
                grads = torch.autograd.grad(out, inputs, dout)
                results[microbatch, stage, layer] = dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads)))
    return results, (between, traffic.bytes - between)


def check(problem: Problem) -> None:
    ticks = problem.ticks()
    ranks = Cluster(problem.world).run(run_rank, problem)
    every = {
        (microbatch, stage, layer)
        for microbatch in range(len(problem.documents))
        for stage, layers in enumerate(problem.layers)
        for layer in range(layers)
    }
    assert set().union(*(results for results, _ in ranks)) == every
    for key in every:
        own = ranks[key[1] * problem.shards : (key[1] + 1) * problem.shards]
        verdict, _ = judge(problem.case(key), [RankResult(results[key], 0, 0, 0) for results, _ in own])
        assert verdict.passed, (key, verdict.errors)
    sizes = Sizes(
        problem.batch, HEADS, KV_HEADS, HEAD_DIM, 8, 8, options=StrategyOptions(grad_dtype=problem.grad_dtype)
    )
    for rank, (_, sent) in enumerate(ranks):
        volume = ticks.volume(rank, sizes)
        assert sent == (volume.forward, volume.backward)


def assign_at_random(problem: Problem) -> LockstepPlan:
    """Every exchange of every tick is cut at random, forward and backward apart."""
    ticks, seed = problem.ticks(), random.Random(problem.seed)
    for phase in Phase:
        for tick in range(ticks.count):
            for exchange in range(ticks.exchanges(phase, tick)):
                homes = Homes.of(*ticks.batches(ticks.held(phase, tick, exchange)))
                ticks.assign(phase, tick, exchange, Dispatch(random_plan(homes, seed.randrange(2**16))))
    return ticks


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    length, microbatches = draw(st.integers(1, 29)), draw(st.integers(1, 4))
    documents = []
    for _ in range(microbatches):
        edges = sorted(draw(st.sets(st.integers(1, length - 1), max_size=4))) if length > 1 else []
        documents.append(tuple(stop - start for start, stop in zip([0, *edges], [*edges, length])))
    return Problem(
        tuple(documents),
        tuple(draw(st.lists(st.integers(0, 2), min_size=1, max_size=3))),
        shards=draw(st.integers(1, 2)),
        layout=draw(st.sampled_from(["contiguous", "zigzag", "striped"])),
        window=draw(st.sampled_from([None, 5])),
        batch=draw(st.integers(1, 2)),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=40)
@given(problems())
def test_any_partition_of_any_tick_is_exact(problem):
    held = assign_at_random(problem)  # noqa: F841 (as long as it lives, every rank finds these ticks)
    check(problem)


@pytest.mark.parametrize("planner", ["cad", "zeppelin"])
@pytest.mark.parametrize("microbatches", [1, 3, 5])
@pytest.mark.parametrize(("layers", "shards"), [((2, 1, 2), 1), ((1, 1), 2), ((1, 3, 0), 2)], ids=str)
def test_what_planners_assign_is_exact(planner, microbatches, layers, shards):
    documents = ((101, 1, 40), (142,), (3, 70, 69), (142,), (71, 71))[:microbatches]
    check(Problem(documents, layers, shards, "zigzag", planner=planner, grad_dtype="compute"))


@given(st.integers(1, 6), st.integers(1, 6))
def test_backward_ticks_answer_forward_ticks(microbatches, stages):
    plan = VerifyCase("disaggregated", "contiguous", 1, seq=3).plan()
    ticks = LockstepPlan([plan] * microbatches, [1] * stages, "cad", EMPTY.widths, Topology(stages * plan.world))
    when = {phase: {} for phase in Phase}
    for phase in Phase:
        for tick in range(ticks.count):
            for stage in range(stages):
                number = ticks.microbatch(phase, tick, stage)
                if number is not None:
                    assert (number, stage) not in when[phase]
                    when[phase][number, stage] = tick
        assert len(when[phase]) == microbatches * stages
    for (number, stage), tick in when[Phase.FORWARD].items():
        assert when[Phase.BACKWARD][number, stage] == tick + stages - 1 - 2 * stage
        # What a stage hands on is used one tick later, forward by the next one, backward by the one before.
        assert stage == 0 or when[Phase.FORWARD][number, stage - 1] == tick - 1
        assert stage == stages - 1 or (
            when[Phase.BACKWARD][number, stage + 1] == when[Phase.BACKWARD][number, stage] - 1
        )


def busiest(ticks: LockstepPlan, phase: Phase) -> list[tuple[int, int]]:
    """Of each exchange, most cells of a rank: with the stages as servers of one another, and each by itself."""
    found = []
    for tick in range(ticks.count):
        for exchange in range(ticks.exchanges(phase, tick)):
            joint, held = ticks.dispatch(phase, tick, exchange), ticks.held(phase, tick, exchange)
            alone = [dispatches(ticks.plans[n], "cad", EMPTY.widths)[0] for n in held if n is not None]
            most = max(one.cells(rank) for one in alone for rank in range(one.world))
            found.append((max(joint.cells(rank) for rank in range(joint.world)), most))
    return found


@pytest.mark.parametrize("phase", Phase)
def test_idle_stages_take_their_share_in_warm_up_and_drain(phase):
    """Two of three stages idle in the first tick and in the last; in the others stages hold unequal microbatches."""
    documents = ((256,), (128, 128), (64,) * 4, (250, 6))
    problem = Problem(documents, (2, 2, 2), 2)
    found = busiest(problem.ticks(), phase)
    assert len(found) == 2 * 6 and all(joint <= alone for joint, alone in found)
    # Cuts count by eight rows, as a rank of few tokens has them: exactly a third is not to be had.
    for joint, alone in (*found[:2], *found[-2:]):
        assert joint <= 1.1 / 3 * alone
    assert sum(joint for joint, _ in found) <= 0.6 * sum(alone for _, alone in found)


def test_work_of_a_phase_is_all_cells_of_all_layers():
    problem = Problem(((40, 9), (49,)), (1, 2), 2)
    ticks = problem.ticks()
    cells = sum(plan.work(rank) for plan in problem.plans for rank in range(2))
    for phase in Phase:
        assert sum(ticks.work(rank, phase) for rank in range(4)) == cells * 3


def test_plans_are_let_go_after_their_step():
    def plan() -> SequencePlan:
        case = VerifyCase("disaggregated", "contiguous", 1, seq=5)
        return SequencePlan(case.packing, case.mask, case.plan().layout, 5, 1)

    plans = [plan(), plan()]
    ticks = lockstep_plan_of(plans, (1, 1), "cad", EMPTY.widths)
    assert lockstep_plan_of(plans, (1, 1), "cad", EMPTY.widths) is ticks
    ticks.work(0)
    dispatches(plans[0], "cad", EMPTY.widths)
    seen = [weakref.ref(one) for one in (ticks, *plans)]
    del ticks, plans
    gc.collect()
    assert [one() for one in seen] == [None] * 3


def skip_a_layer(problem: Problem) -> None:
    attention = StageAttention(group_of(dist.group.WORLD), problem.layers, dist.get_rank(), EMPTY, "cad")
    attention.open(problem.plans)
    with attention.tick(Phase.FORWARD, 0):
        pass


def attend_outside_of_a_tick(problem: Problem) -> None:
    attention = StageAttention(group_of(dist.group.WORLD), problem.layers, dist.get_rank(), EMPTY, "cad")
    q, k, v, _ = problem.case((0, 0, 0)).inputs()
    attention.start(q, k, v, problem.plans[0].handle)


def attend_once_too_often(problem: Problem) -> None:
    attention = StageAttention(group_of(dist.group.WORLD), problem.layers, dist.get_rank(), EMPTY, "cad")
    attention.open(problem.plans)
    q, k, v, _ = problem.case((0, 0, 0)).inputs()
    with attention.tick(Phase.FORWARD, 0):
        for _ in range(2):
            attention.start(q, k, v, problem.plans[0].handle)


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (skip_a_layer, "0 of 1 layers attended in forward tick 0 on stage 0"),
        (attend_outside_of_a_tick, "inside StageAttention.tick"),
        (attend_once_too_often, "call 1 of attention in forward tick 0 on stage 0"),
    ],
)
def test_what_is_out_of_step_says_so(mistake, words):
    with pytest.raises(RankFailed) as failed:
        Cluster(1).run(mistake, Problem(((7,),), (1,)))
    assert words in str(failed.value.__cause__)
