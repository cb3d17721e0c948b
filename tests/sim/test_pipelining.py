"""All schedules of ``torch.distributed.pipelining``: loss and gradients as in one process."""

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)

from longctx.sim import Cluster

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
WIDTH, MICROBATCHES = 4, 8
SINGLE = (ScheduleGPipe, Schedule1F1B)
LOOPED = (ScheduleInterleaved1F1B, ScheduleLoopedBFS, ScheduleInterleavedZeroBubble)
V_SHAPED = (ScheduleZBVZeroBubble, ScheduleDualPipeV)


def make_layers(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).double() for _ in range(count)]


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2 * MICROBATCHES, WIDTH, generator=generator, dtype=torch.float64)
    return x, torch.randn(2 * MICROBATCHES, WIDTH, generator=generator, dtype=torch.float64)


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().mean()


def stage_numbers(schedule: type, rank: int, world: int) -> list[int]:
    if schedule in SINGLE:
        return [rank]
    return [rank, rank + world] if schedule in LOOPED else [rank, 2 * world - 1 - rank]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("schedule", [*SINGLE, *LOOPED, *V_SHAPED], ids=lambda schedule: schedule.__name__)
def test_schedule_equals_a_single_process(schedule: type, world: int) -> None:
    total = world if schedule in SINGLE else 2 * world

    def body() -> tuple[dict[str, torch.Tensor], list[float]]:
        rank = dist.get_rank()
        numbers = stage_numbers(schedule, rank, world)
        layers = {number: make_layers(total)[number] for number in numbers}
        stages = [PipelineStage(layers[n], n, total, torch.device("cpu")) for n in numbers]
        runner = schedule(stages[0] if schedule in SINGLE else stages, MICROBATCHES, loss_fn=loss_of)
        x, target = data()
        losses: list[torch.Tensor] = []
        arguments = (x,) if 0 in numbers else ()
        if total - 1 in numbers:
            runner.step(*arguments, target=target, losses=losses)
        else:
            runner.step(*arguments)
        gradients = {f"{n}.{name}": p.grad for n in numbers for name, p in layers[n].named_parameters()}
        return gradients, [loss.item() for loss in losses]

    model = nn.Sequential(*make_layers(total))
    x, target = data()
    loss = loss_of(model(x), target)
    loss.backward()

    results = Cluster(world).run(body)
    got = {name: gradient for gradients, _ in results for name, gradient in gradients.items()}
    want = {name: p.grad for name, p in model.named_parameters()}
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-10, atol=1e-12, msg=name)
    (losses,) = [losses for _, losses in results if losses]
    assert sum(losses) / MICROBATCHES == pytest.approx(loss.item(), rel=1e-12)
