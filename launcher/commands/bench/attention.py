"""``longctx bench attention`` times the user's strategies on their own mesh and shapes, each beside its own floor."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from longctx.attention import get_strategy
from longctx.bench.attention import StrategyRow, measure, refusal_on
from longctx.bench.timing import Report, spread
from longctx.catalog import LINEAR_STRATEGIES, STRATEGIES
from longctx.config import Config, resolve, simulated_world_size
from longctx.errors import ConfigError
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
from longctx.launcher.options import numbers, words
from longctx.launcher.processes import as_rank
from longctx.launcher.tables import mebibytes, print_table
from longctx.linear import get_linear
from longctx.mesh import build_mesh
from longctx.options import StrategyOptions
from longctx.verify import VerifyCase

COMMAND = "bench attention"
REPEATS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``longctx bench attention``."""
    parser.add_argument("--strategies", help="which, comma-separated; default: all that the model's layers can have")
    parser.add_argument("--documents", help="lengths that add up to data.seq_len; default: one document")
    parser.add_argument(
        "--repeats", type=int, default=REPEATS, help=f"how often each is timed; default: {REPEATS}; slow ones only once"
    )
    parser.add_argument(
        "--no-floor", action="store_true", help="leave out each strategy's own tiles, which are kept in memory"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Refuses what can be refused, measures on the ranks, and prints the result on the first of them."""
    config = compose(arguments.overrides)
    refuse_sim(config, COMMAND)
    at_least_one("--repeats", arguments.repeats, REPEATS)
    rank, started = env.read_rank(), time.monotonic()
    if rank is None:
        machine.require_nodes(config)
        world = config.parallel.sp
        config, job = _prepared(arguments, config, simulated_world_size(config), local=world)
        found: JsonObject | int = run_on_processes(__spec__.name, config, COMMAND, world, job)
    else:
        world, local = rank.world_size, rank.local_rank + 1
        found = run_as_rank(rank, COMMAND, partial(_prepared, arguments, config, world, local), measured)
    if isinstance(found, int):
        return found
    found |= {"repeats": arguments.repeats, "load": machine.load(), "seconds": time.monotonic() - started}
    print(json.dumps(found, allow_nan=False)) if arguments.json else _show(found)
    return 0


def _prepared(arguments: argparse.Namespace, config: Config, world: int, local: int) -> tuple[Config, JsonObject]:
    """Returns the resolved configuration of ``world`` ranks, ``local`` of them here, and what they measure."""
    machine.require_nodes(config, world)
    config = resolve(config, world)
    machine.require_devices(config, local)
    _refuse_beyond_strategies(config)
    cases, refused = [], []
    for case in cases_of(config, arguments.strategies, arguments.documents):
        reason = refusal_on(case, build.device_type(config))
        if reason:
            refused.append(asdict(StrategyRow(case.strategy, case.layout, case.mixer, refused=reason)))
        else:
            cases.append(asdict(case))
    if not cases:
        told = "; ".join(f"{row['strategy']} on {row['layout']}: {row['refused']}" for row in refused)
        raise ConfigError(f"every strategy refuses: {told}")
    return config, {
        "cases": cases, "refused": refused, "repeats": arguments.repeats, "floors": not arguments.no_floor,
    }  # fmt: skip


def _refuse_beyond_strategies(config: Config) -> None:
    """Refuses what belongs to blocks and stages: it is not in the time of one layer's attention."""
    for name, default in (("ping_pong", False), ("server_pool", "sequence")):
        value = getattr(config.attention, name)
        if value != default:
            shown, nearest = (str(one).lower() for one in (value, default))
            raise ConfigError(
                f"attention.{name}={shown} goes beyond one layer's attention; set attention.{name}={nearest}, or time "
                "it with `longctx bench step`"
            )


def cases_of(config: Config, strategies: str | None, documents: str | None) -> list[VerifyCase]:
    """Returns what each strategy computes in a layer of the resolved configuration, with the options that it takes."""
    attention, (heads, kv_heads) = config.attention, config.local_heads
    lengths = tuple(numbers("documents", documents)) if documents is not None else ()
    shape: dict[str, Any] = {
        "world": config.parallel.sp, "backend": config.comm.backend, "seq": config.data.seq_len, "documents": lengths,
        "heads": heads, "head_dim": config.model.head_dim, "dtype": config.train.dtype,
        "batch": config.train.micro_batch, "layout_block": attention.layout_block,
    }  # fmt: skip
    cases = []
    for name in words("strategies", strategies, _valid(config)) if strategies is not None else _default(config):
        if name in LINEAR_STRATEGIES:
            sizes: dict[str, Any] = {"mixer_block": config.model.mixer_block, "mixer_top_k": config.model.mixer_top_k}
            mixing: dict[str, Any] = {"mixer": config.model.mixer, "chunk": attention.chunk, "kv_heads": heads, **sizes}
            cases.append(VerifyCase(name, attention.layout or get_linear(name).layout, **shape, **mixing))
            continue
        strategy = get_strategy(name)
        taken = StrategyOptions(**{option: getattr(attention, option) for option in strategy.options})
        mask: dict[str, Any] = {"kv_heads": kv_heads, "window": attention.window, "kernel": attention.kernel}
        cases.append(VerifyCase(name, attention.layout or strategy.layout, **shape, **mask, options=taken))
    return cases


def _valid(config: Config) -> list[str]:
    """Lists the strategies of the kinds of layers that the model has."""
    softmax = list(STRATEGIES) if config.model.has_softmax else []
    return softmax + (list(LINEAR_STRATEGIES) if "L" in config.model.pattern else [])


def _default(config: Config) -> list[str]:
    """Lists all of them but the ring under its second name, and the one for whole sequences where they are shared."""

    def left_out(name: str) -> bool:
        whole = name in STRATEGIES and get_strategy(name).one_rank
        return name == "striped" or (whole and config.parallel.sp > 1)

    return [name for name in _valid(config) if not left_out(name)]


def measured(config: Config, job: JsonObject, device: torch.device, report: Report) -> JsonObject:
    """Measures on each rank; returns plain values, of which the first rank's are printed."""
    world = dist.get_world_size()
    # Processes that were started for the sequence group alone are all of it.
    group = dist.group.WORLD if world == config.parallel.sp else build_mesh(config.parallel, device.type).sequence_group
    cases = [VerifyCase.of(case) for case in job["cases"]]
    rows = measure(cases, group, device, job["repeats"], job["floors"], report)
    (heads, kv_heads), attention = config.local_heads, config.attention
    return {
        "machine": machine.described(),
        "backend": config.comm.backend,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "world": world,
        "sequence_ranks": config.parallel.sp,
        "crowded": oversubscription(config, world),
        "problem": {
            "seq_len": config.data.seq_len, "batch": config.train.micro_batch, "heads": heads, "kv_heads": kv_heads,
            "head_dim": config.model.head_dim, "dtype": config.train.dtype, "window": attention.window,
            "kernel": attention.kernel, "documents": list(cases[0].documents),
        },
        "rows": [*map(asdict, rows), *job["refused"]],
    }  # fmt: skip


COLUMNS = (
    "strategy", "layout", "time, ms", "share of floor", "sent by a rank, MiB", "balance", "peak extra, MiB", "error",
)  # fmt: skip


def _show(found: JsonObject) -> None:
    problem, rows = found["problem"], found["rows"]
    documents = f" in {len(problem['documents'])} documents" if problem["documents"] else ""
    window = f", window {problem['window']}" if problem["window"] else ""
    title = (
        f"forward + backward of one layer: {problem['batch']} × {problem['seq_len']:,} tokens{documents}{window}, "
        f"{problem['heads']}/{problem['kv_heads']} heads of {problem['head_dim']} on a rank, {problem['dtype']}; "
        f"{found['sequence_ranks']} ranks share a sequence, {found['world']} on {found['backend']} ({found['device']})"
    )
    timed = sorted((row for row in rows if not row["refused"]), key=lambda row: row["time"]["median"])
    notes = [f"{row['strategy']} on {row['layout']} refuses: {row['refused']}" for row in rows if row["refused"]]
    notes += [found["crowded"]] if found["crowded"] else []
    notes.append(
        f"{found['repeats']} interleaved repeats, median (min-max) of the slowest rank; floor: its own tiles "
        f"without messages; sent: forward + backward, worst rank; balance: most work over the mean; "
        f"load {found['load']}, {found['seconds']:.0f} s"
    )
    print_table(title, COLUMNS, map(_line, timed), notes)


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    sent = max(map(sum, zip(row["bytes_forward"], row["bytes_backward"], strict=True)))
    worst = max(row["errors"], key=lambda name: row["errors"][name])
    return (
        " ".join(filter(None, (row["strategy"], row["mixer"]))),
        row["layout"],
        spread(row["time"], 1e3, ".1f"),
        spread(row["share_of_floor"], 1.0, ".3f") if row["share_of_floor"] else "",
        mebibytes(sent),
        f"{row['balance']:.3f}",
        mebibytes(row["peak_extra_bytes"]),
        f"{row['errors'][worst]:.0e} ({worst})",
    )


if __name__ == "__main__":
    sys.exit(as_rank(partial(worker, measure=measured)))
