"""Holds what the rules of the preflight look at, and what they find."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from longctx.config import Config
from longctx.data.corpus import Corpus
from longctx.launcher.preflight.memory import GIB, Floor, memory_floor, parameters_of

ASSUMED_GIB = 80  # of a device on another machine, when nobody says


@dataclass(frozen=True)
class Device:
    """Says how many bytes one rank may take at most, and how that is known."""

    memory: int
    known_by: str


@dataclass(frozen=True)
class Finding:
    """Says what is wrong with a run in one line: value, rule, nearest choice."""

    words: str
    refused: bool


@dataclass(frozen=True)
class Facts:
    """Holds a resolved configuration and what is known around it.

    ``corpus``: None where the data are not at hand. ``device``: None where its memory is not known. ``resuming``: the
    run goes on, so what it was started with was accepted once.
    """

    config: Config
    corpus: Corpus | None = None
    device: Device | None = None
    resuming: bool = False

    @cached_property
    def parameters(self) -> int:
        """Counts the model's parameters."""
        return parameters_of(self.config.model)

    @cached_property
    def floor(self) -> Floor:
        """Returns the memory that a rank takes at least."""
        return memory_floor(self.config, self.parameters)

    @property
    def ranks(self) -> int:
        """Counts the ranks of the world."""
        parallel = self.config.parallel
        return parallel.dp_replicate * parallel.dp_shard * parallel.sp * parallel.tp * parallel.pp

    @property
    def tokens_per_rank(self) -> int:
        """Counts the tokens of one sequence that a rank holds."""
        return self.config.data.seq_len // self.config.parallel.sp

    @property
    def on_cuda(self) -> bool:
        """Tells whether the run computes on CUDA devices."""
        return self.config.comm.backend == "nccl"


def device_here(config: Config) -> Device | None:
    """Returns what this machine gives a rank: its CUDA device, or its memory where all ranks are in this process."""
    stated = _stated(config)
    if stated is not None:
        return stated
    if config.comm.backend == "nccl":
        if not torch.cuda.is_available():
            return None
        return Device(torch.cuda.get_device_properties(0).total_memory, "as this machine's CUDA device says")
    ranks = Facts(config).ranks
    if config.comm.backend == "gloo" and ranks > 1:
        return None  # how many of them share this machine is the launcher's to know
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + _swap()
    return Device(pages // ranks, f"this machine's memory and swap, for {ranks} rank{'s' if ranks > 1 else ''}")


def device_of_job(config: Config) -> Device | None:
    """Returns what a device has on the machines of a job, as the configuration says or as is assumed."""
    stated = _stated(config)
    if stated is not None or config.comm.backend != "nccl":
        return stated
    return Device(
        ASSUMED_GIB * GIB, "assumed for a job that runs elsewhere: set cluster.device_memory if yours have more"
    )


def _stated(config: Config) -> Device | None:
    memory = config.cluster.device_memory
    return None if memory is None else Device(int(memory * GIB), "as cluster.device_memory says")


def _swap() -> int:
    """Returns the bytes of swap space, 0 where that is not known."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("SwapTotal:"))
    except (OSError, ValueError, IndexError):
        return 0
