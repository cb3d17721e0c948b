"""The idle time of each schedule, counted by replaying the traces of a simulated run, is that of its formula."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from longctx.config import ParallelConfig
from longctx.config.pipeline import RULES
from longctx.parallel.pipeline import ONE_STAGE, SEVERAL_STAGES
from longctx.parallel.stages import stage_numbers
from longctx.sim import Cluster
from longctx.sim.trace import Event

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
ROWS, WIDTH = 2, 4
UNIT = 2 * ROWS * WIDTH * WIDTH  # FLOP of a stage's forward, of its inputs' gradient and of its weights'


class Stage(nn.Module):
    """One product of matrices, behind a gain that makes even the first stage compute its inputs' gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x * self.gain)
        return out


def run_schedule(parallel: ParallelConfig, microbatches: int) -> None:
    rank = dist.get_rank()
    example = torch.empty(ROWS, WIDTH, device="meta", requires_grad=True)
    stages = [
        PipelineStage(Stage(), number, parallel.stages, torch.device("cpu"), example, example)
        for number in stage_numbers(parallel, rank)
    ]
    name, loss = parallel.pp_schedule, lambda out, target: (out * target).sum()
    if name in ONE_STAGE:
        schedule = ONE_STAGE[name](stages[0], microbatches, loss_fn=loss, scale_grads=False)
    else:
        schedule = SEVERAL_STAGES[name](stages, microbatches, loss_fn=loss, scale_grads=False)
    batch = torch.ones(ROWS * microbatches, WIDTH)
    inputs = (batch,) if any(stage.is_first for stage in stages) else ()
    target = batch if any(stage.is_last for stage in stages) else None
    schedule.step(*inputs, target=target, return_outputs=False)


def replay(traces: Sequence[list[Event]]) -> float:
    """When the last rank is done, in units of a stage's forward: messages take no time, a receiver awaits them."""
    clocks, places = [0.0] * len(traces), [0] * len(traces)
    sent: dict[tuple[int, int, int, int], float] = {}
    posted: dict[int, tuple[int, int, int, int]] = {}
    while any(place < len(trace) for place, trace in zip(places, traces)):
        before = list(places)
        for rank, trace in enumerate(traces):
            while places[rank] < len(trace):
                event = trace[places[rank]]
                if event.phase == "compute":
                    clocks[rank] += event.flops / UNIT
                elif event.phase == "post" and event.operation == "send":
                    sent[rank, event.peers[0], event.tag, event.sequence] = clocks[rank]
                elif event.phase == "post" and event.operation == "recv":
                    posted[event.id] = (event.peers[0], rank, event.tag, event.sequence)
                elif event.phase == "wait" and event.id in posted:
                    if posted[event.id] not in sent:
                        break
                    clocks[rank] = max(clocks[rank], sent[posted[event.id]])
                places[rank] += 1
        assert places != before, "every message that is awaited is sent"
    return max(clocks)


def bubble(schedule: str, pp: int, virtual: int) -> int:
    """Units that a rank idles, at a forward of 1 and a backward of 1 + 1 per stage.

    GPipe and 1F1B: (p − 1)(F + B). Interleaved: the same of stages that are v times smaller. ZBV: only until
    the first microbatch has come down the ranks, (p − 1) F. DualPipeV: (p − 1)(F&B + B − 3W), F&B one after the
    other here.
    """
    forward, backward, weights = 1, 2, 1
    if schedule == "zbv":
        return (pp - 1) * forward
    if schedule == "dualpipev":
        return (pp - 1) * (forward + backward + backward - 3 * weights)
    return (pp - 1) * (forward + backward)


CASES = [
    ("gpipe", 2, 1, 3),
    ("gpipe", 4, 1, 6),
    ("1f1b", 2, 1, 5),
    ("1f1b", 4, 1, 8),
    ("interleaved_1f1b", 2, 2, 4),
    ("interleaved_1f1b", 4, 3, 8),
    ("zbv", 2, 2, 4),
    ("zbv", 4, 2, 8),
    ("dualpipev", 2, 2, 6),
    ("dualpipev", 4, 2, 10),
]


@pytest.mark.parametrize(("schedule", "pp", "virtual", "microbatches"), CASES)
def test_the_bubble_is_the_formula_s(schedule: str, pp: int, virtual: int, microbatches: int) -> None:
    parallel = ParallelConfig(pp=pp, pp_schedule=schedule, pp_virtual=virtual)
    assert RULES[schedule].fits(pp, microbatches)
    cluster = Cluster(pp, trace_compute=True)
    cluster.run(run_schedule, parallel, microbatches)
    traces = cluster.trace
    work = [sum(event.flops for event in trace) / UNIT for trace in traces]
    assert work == [3.0 * virtual * microbatches] * pp
    assert replay(traces) - work[0] == bubble(schedule, pp, virtual)
