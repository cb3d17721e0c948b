"""``longctx bench step`` times the step of the user's own configuration on their mesh, by what its time is spent on."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from functools import partial

import torch
import torch.distributed as dist

from longctx.bench.step import measure
from longctx.bench.timing import Report, spread
from longctx.config import Config, resolve, simulated_world_size
from longctx.launcher import build, env, machine
from longctx.launcher.commands.bench.ranks import (
    JsonObject,
    at_least_one,
    oversubscription,
    refuse_sim,
    run_as_rank,
    run_on_processes,
    worker,
)
from longctx.launcher.compose import compose
from longctx.launcher.processes import as_rank
from longctx.launcher.tables import mebibytes, print_table
from longctx.mesh import build_mesh
from longctx.reporting.memory import CATEGORIES
from longctx.train.canary.check import run_canary

COMMAND = "bench step"
STEPS, WARM_UP = 5, 3
PARTS = {
    "data": "waiting for data",
    "forward_backward": "forward and backward",
    "optimizer": "optimizer",
    "agreement": "gradient norm, waiting for other ranks",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``longctx bench step``."""
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"timed steps; default: {STEPS}")
    parser.add_argument(
        "--warm-up", type=int, default=WARM_UP, metavar="N", help=f"steps before them; default: {WARM_UP}"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Refuses what can be refused, measures on the ranks, and prints the result on the first of them.

    No file is written.
    """
    config = compose(arguments.overrides)
    refuse_sim(config, COMMAND)
    at_least_one("--steps", arguments.steps, STEPS)
    at_least_one("--warm-up", arguments.warm_up, WARM_UP)
    rank = env.read_rank()
    job = {"steps": arguments.steps, "warm_up": arguments.warm_up}
    if rank is None:
        machine.require_nodes(config)
        world = simulated_world_size(config)
        found: JsonObject | int = run_on_processes(__spec__.name, _prepared(config, world, world), COMMAND, world, job)
    else:
        world, local, first = rank.world_size, rank.local_rank + 1, rank.rank == 0
        found = run_as_rank(rank, COMMAND, lambda: (_prepared(config, world, local, data=first), job), measured)
    if isinstance(found, int):
        return found
    found |= {**job, "load": machine.load()}
    print(json.dumps(found, allow_nan=False)) if arguments.json else _show(found)
    return 0


def _prepared(config: Config, world: int, local: int, data: bool = True) -> Config:
    """Returns the resolved run, after all that ``longctx train`` would refuse; ``local``: ranks here.

    ``data``: whether this rank looks at the data for all. Nobody writes: there is no ``run.dir``.
    """
    machine.require_nodes(config, world)
    config = resolve(replace(config, run=replace(config.run, dir=None)), world)
    machine.require_devices(config, local)
    if data:
        build.preflight(config, resume=None)
    return config


def measured(config: Config, job: JsonObject, device: torch.device, report: Report) -> JsonObject:
    """Measures on each rank; returns plain values, of which the first rank's are printed."""
    torch.manual_seed(config.train.seed)
    mesh = build_mesh(config.parallel, device.type)
    report(0, 0, "checking one tiny step against dense attention")
    verdict = run_canary(config, mesh, device) if config.train.canary else None
    report(0, 0, "building the model")
    meter = build.meter_of(config, mesh, device, build.peak_memory(device))
    parts = build.build_step(config, build.open_checked(config), meter, None)
    try:
        cost = measure(config, parts, meter, job["warm_up"], job["steps"], report)
    finally:
        parts.prefetcher.close()
    return {
        "machine": machine.described(),
        "backend": config.comm.backend,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "world": dist.get_world_size(),
        "crowded": oversubscription(config, dist.get_world_size()),
        "mesh": {name: getattr(config.parallel, name) for name in ("dp_replicate", "dp_shard", "sp", "tp", "pp")},
        "model": config.model.name,
        "strategy": config.attention.strategy,
        "seq_len": config.data.seq_len,
        "global_batch": config.train.global_batch,
        "dtype": config.train.dtype,
        "canary": verdict and {name: verdict[name] for name in ("worst", "error", "tolerance")},
        **asdict(cost),
    }


def _show(found: JsonObject) -> None:
    degrees = " × ".join(f"{name} {size}" for name, size in found["mesh"].items() if size > 1) or "one rank"
    title = (
        f"{degrees} on {found['backend']} ({found['device']}): model {found['model']}, {found['strategy']}, "
        f"{found['global_batch']} × {found['seq_len']:,} tokens a step, {found['dtype']}"
    )
    whole = found["seconds"]["median"]
    rows = [("a step", f"{spread(found['seconds'], 1e3, '.1f')} ms", "")]
    for part, spent in found["parts"].items():
        rows.append(_share(f"  {PARTS[part]}", spent, whole))
        if part == "forward_backward" and found["exchange_wait"] is not None:
            rows.append(_share("    of it waiting for attention's messages", found["exchange_wait"], whole))
    rows.append(("tokens/s", f"{found['tokens_per_second']:,.0f}", ""))
    rows.append(("tokens/s of a device", f"{found['tokens_per_second_per_device']:,.0f}", ""))
    if found["mfu_causal"] is not None:
        rows.append(("MFU, causal / full", f"{found['mfu_causal']:.1%} / {found['mfu_full']:.1%}", ""))
    rows.append(("attention work, most over mean", f"{found['balance']:.3f}", ""))
    rows += _memory(found)
    print_table(title, ("", "", ""), rows, _notes(found))


def _share(name: str, seconds: float, whole: float) -> tuple[str, str, str]:
    return name, f"{seconds * 1e3:.1f} ms", f"{seconds / whole:.0%}"


def _memory(found: JsonObject) -> list[tuple[str, str, str]]:
    """Lists peak bytes by category, of the rank that has most; categories without any are left out."""
    rows = []
    memory = found["memory_bytes"]
    if memory is not None:
        peak = memory["peak"]
        rows.append(("peak of a step's tensors", f"{mebibytes(peak)} MiB", ""))
        rows += [
            (f"  {title}", f"{mebibytes(memory[name])} MiB", f"{memory[name] / peak:.0%}")
            for name, title in CATEGORIES.items()
            if memory[name]
        ]
    if found["memory_peak_bytes"] is not None:
        rows.append(("peak of a process or device", f"{mebibytes(found['memory_peak_bytes'])} MiB", ""))
    return rows


def _notes(found: JsonObject) -> list[str]:
    notes = [found["crowded"]] if found["crowded"] else []
    notes.append(
        f"{found['steps']} steps after {found['warm_up']}, median (min-max) of the slowest rank; parts are means over "
        f"ranks; load {found['load']}; nothing was written"
    )
    return notes


if __name__ == "__main__":
    sys.exit(as_rank(partial(worker, measure=measured)))
