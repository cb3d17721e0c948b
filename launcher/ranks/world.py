"""Joins this process to the world of its run, whoever started it, in two steps: ranks meet, then they connect."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from longctx.comm import Links, leave_world, register_nodes
from longctx.comm.rank_numbers import gather_numbers
from longctx.config import Config
from longctx.errors import ConfigError, LongctxError
from longctx.launcher import env
from longctx.launcher.ranks.alike import agree_on_settings
from longctx.launcher.ranks.meeting import LEAST_PATIENCE, Meeting
from longctx.launcher.ranks.store import open_store

FAREWELL = 5.0  # seconds to look for rank 0, to tell it that this rank does not come


@contextlib.contextmanager
def meet(config: Config, options: Mapping[str, Any], store: int | None = None) -> Iterator[Meeting]:
    """Waits for the other ranks at their store, and refuses those that were not started alike.

    ``options``: of the command that started this rank. ``store``: the open file that a launcher has handed on. The body
    may take any time; only who dies in it is noticed.
    """
    rank = this_rank()
    opened = open_store(rank, store, max(config.comm.timeout_seconds, LEAST_PATIENCE))
    meeting = Meeting(opened, rank.rank, rank.world_size, config.comm.timeout_seconds)
    with meeting.attended():
        agree_on_settings(meeting, config, options)
        yield meeting


def leave_word(error: LongctxError) -> None:
    """Tells the other ranks of a launch that this one refuses to start, as far as one of them listens."""
    with contextlib.suppress(LongctxError):
        rank = this_rank()
        Meeting(open_store(rank, None, FAREWELL), rank.rank, rank.world_size, FAREWELL).leave_word(error)


def this_rank() -> env.RankEnvironment:
    """Returns the rank that the environment names; the only one where it names none."""
    return env.read_rank() or env.RankEnvironment(rank=0, world_size=1, local_rank=0)


@contextlib.contextmanager
def init_distributed(config: Config) -> Iterator[torch.device]:
    """Joins the other ranks as the one that the environment names; yields this rank's device."""
    with meet(config, {}) as meeting, joined(config, meeting) as device:
        yield device


@contextlib.contextmanager
def joined(config: Config, meeting: Meeting) -> Iterator[torch.device]:
    """Makes the process group of those who have met; from here on the timeout of collectives runs."""
    rank = this_rank()
    device = torch.device(device_type(config))
    if device.type == "cuda":
        device = torch.device("cuda", rank.local_rank)
        torch.cuda.set_device(device)
    meeting.leave()
    dist.init_process_group(
        config.comm.backend,
        store=meeting.store,
        rank=rank.rank,
        world_size=rank.world_size,
        timeout=datetime.timedelta(seconds=config.comm.timeout_seconds),
        device_id=device if device.type == "cuda" else None,
    )
    try:
        register_nodes(nodes_of(config, _local_ranks(rank, device)), links_of(config))
        yield device
    finally:
        leave_world()


def device_type(config: Config) -> str:
    """Returns the type of device that the run's backend works on, "cuda" or "cpu"."""
    return "cuda" if config.comm.backend == "nccl" else "cpu"


def nodes_of(config: Config, local_ranks: Sequence[int]) -> list[int]:
    """Returns the node of every rank.

    There are as many ranks on each as the cluster has devices, or as the launcher numbered there.
    """
    devices = config.cluster.devices_per_node
    if devices is not None:
        return [rank // devices for rank in range(len(local_ranks))]
    nodes: list[int] = []
    for rank, local in enumerate(local_ranks):
        before = local_ranks[rank - 1] if rank else None
        if local and local - 1 != before:
            raise ConfigError(
                f"rank {rank} is number {local} of its node and rank {rank - 1} is number {before} of its own; ranks "
                "must follow one another node by node (srun --distribution=block), or set cluster.devices_per_node"
            )
        nodes.append((nodes[-1] if nodes else -1) + (local == 0))
    return nodes


def links_of(config: Config) -> Links:
    """Returns the links that the configuration states for the cluster."""
    return Links(config.cluster.nics, config.cluster.nic_bandwidth, config.cluster.link_bandwidth)


def _local_ranks(rank: env.RankEnvironment, device: torch.device) -> list[int]:
    """Returns the local rank of every rank."""
    world = dist.group.WORLD
    assert world is not None, "inside a world"
    return [int(local) for (local,) in gather_numbers([rank.local_rank], world, device)]
