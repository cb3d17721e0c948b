"""One process of ``python -m benchmarks context`` builds a system, is held to its memory, and takes training steps.

``python -m benchmarks.commands.context_worker JOB``; JOB is a JSON object, see ``Job``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.hosts.memory_group import MemoryGroup


@dataclass(frozen=True)
class Job:
    """Says what one process does: ``steps`` on sequences of ``seq_len`` random tokens.

    ``allowance``: bytes that it may take over its footprint. ``warm``: tokens of a step that is taken before the
    footprint is read, 0 for none. Every system's optimizer has its states by then, whenever it makes them. ``config``:
    a resolved configuration. ``meeting``: folder where ranks meet and answer. ``group``: folder of this process's
    memory group, None for no limit.
    """

    system: str
    seq_len: int
    steps: int
    tile: int
    allowance: int
    warm: int
    config: dict[str, Any]
    meeting: str
    rank: int
    world: int
    group: str | None = None


def main(words: list[str]) -> None:
    job = Job(**json.loads(words[0]))
    group = MemoryGroup(Path(job.group)) if job.group else None
    if group:
        # Before torch is imported: pages stay with the group in which they were first touched.
        group.join()
    answer = _run(job, group)
    (Path(job.meeting) / f"answer-{job.rank}.json").write_text(json.dumps(answer))


def _run(job: Job, group: MemoryGroup | None) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from longctx.comm import leave_world
    from longctx.launcher.processes import join

    torch.set_num_threads(1)
    join(Path(job.meeting), job.rank, job.world, "gloo")
    system = _ours(job) if job.system == "longctx" else _peer(job)
    if job.warm:
        system.step(*_text(job, job.warm, seed=job.steps))
    dist.barrier()
    footprint = group.in_use() if group else 0
    if group:
        group.limit(footprint + job.allowance)
        group.reset_peak()
    dist.barrier()
    losses = [system.step(*_text(job, job.seq_len, seed=number)) for number in range(job.steps)]
    dist.barrier()
    answer = {
        "losses": losses,
        "footprint": footprint,
        "peak": group.peak() if group else 0,
        "bytes": system.bytes() if system.bytes else None,
    }
    leave_world()
    return answer


def _text(job: Job, length: int, seed: int) -> Any:
    """Draws random tokens ``[1, length]``, and their labels."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(job.config["model"]["vocab_size"], (1, length + 1), generator=generator)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


@dataclass(frozen=True)
class _System:
    step: Any
    bytes: Any = None


def _decoder(job: Job) -> Any:
    from longctx.config import Config
    from longctx.model import Decoder, initialize

    config = Config.from_dict(job.config)
    model = Decoder(config.model)
    initialize(model, config.train.seed)
    return model


def _peer(job: Job) -> _System:
    from benchmarks.peers import PEERS

    return _System(PEERS[job.system](_decoder(job), job.config["optim"]["lr"], job.tile))


def _ours(job: Job) -> _System:
    import torch
    from torch.distributed.tensor import DTensor

    from longctx.config import Config
    from longctx.engines.native import NativeEngine
    from longctx.launcher.build import build_model
    from longctx.mesh import build_mesh
    from longctx.sequence import Batch, Documents
    from longctx.train.batch_sharder import BatchSharder
    from longctx.train.optimizer import build_optimizer
    from longctx.train.step import TrainStep

    config, device = Config.from_dict(job.config), torch.device("cpu")
    mesh = build_mesh(config.parallel, "cpu")
    model = build_model(config, mesh, device)
    optimizer = build_optimizer(model, config.optim)
    border = BatchSharder.of(config, mesh, device)
    train = TrainStep(NativeEngine(model, optimizer), mesh, device, config.optim.grad_clip)

    def step(tokens: torch.Tensor, labels: torch.Tensor) -> float:
        batch = Batch(tokens, labels, (Documents.single(tokens.shape[1]),))
        loss = train([border(batch)], config.optim.lr).loss
        assert loss is not None, "random tokens all have labels"
        return loss

    def held(tensors: Any) -> int:
        shards = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
        return sum(t.numel() * t.element_size() for t in shards if isinstance(t, torch.Tensor))

    def count() -> dict[str, int]:
        parameters = held(model.parameters())
        states = [value for state in optimizer.state.values() for value in state.values()]
        # Gradients are gone after the step; each had the shape of its parameter.
        return {"parameters": parameters, "gradients": parameters, "optimizer": held(states)}

    return _System(step, count)


if __name__ == "__main__":
    main(sys.argv[1:])
