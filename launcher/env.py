"""Reads and writes environment variables, a reason beside each; nothing else in longctx does.

Configuration never comes through the environment: what a run does stands in its ``config.yaml``. The
environment says only which process this is and how many threads it may use.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from longctx.errors import ConfigError
from longctx.launcher import schedulers

_log = logging.getLogger(__name__)

# torchrun tells each process who it is by these.
RANK = "RANK"
WORLD_SIZE = "WORLD_SIZE"
LOCAL_RANK = "LOCAL_RANK"
# How many processes it has started on this machine.
LOCAL_WORLD_SIZE = "LOCAL_WORLD_SIZE"
# Where rank 0 listens for the others; torch.distributed's env:// rendezvous reads both.
MASTER_ADDR = "MASTER_ADDR"
MASTER_PORT = "MASTER_PORT"
# The same for all processes of one torchrun; "none" when torchrun was given no id.
TORCHELASTIC_RUN_ID = "TORCHELASTIC_RUN_ID"
# "True" when torchrun's agent listens at that address, and no rank; its store outlives a restart of the ranks.
TORCHELASTIC_USE_AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
TORCHELASTIC_RESTART_COUNT = "TORCHELASTIC_RESTART_COUNT"

# Threads per process of torch's CPU kernels; the default, every core for every process, thrashes.
OMP_NUM_THREADS = "OMP_NUM_THREADS"
# Whether those threads spin while they wait. Spinning on cores that other processes use, or under the rank
# threads of sim, made training 30 times slower; sleeping costs microseconds. Read when torch is imported.
OMP_WAIT_POLICY = "OMP_WAIT_POLICY"

# Whether the tokenizers library starts threads of its own. It is run in processes, one to a core; and a process that
# was forked after those threads began would wait for them without end.
TOKENIZERS_PARALLELISM = "TOKENIZERS_PARALLELISM"

# The interface whose address Gloo gives to other ranks; without it Gloo asks what the host's name resolves to.
GLOO_SOCKET_IFNAME = "GLOO_SOCKET_IFNAME"
# The interface on which NCCL's processes first meet; "=" asks for exactly this name instead of a prefix.
NCCL_SOCKET_IFNAME = "NCCL_SOCKET_IFNAME"
LOOPBACK = {GLOO_SOCKET_IFNAME: "lo", NCCL_SOCKET_IFNAME: "=lo"}

# Where a user's caches lie (XDG); without it, .cache in the home folder.
XDG_CACHE_HOME = "XDG_CACHE_HOME"
HOME = "HOME"

# Which device DeepSpeed drives; without it, it looks for one, and for compilers.
DS_ACCELERATOR = "DS_ACCELERATOR"
# glibc: blocks above so many bytes go back to the system when they are freed. By default the bound rises with every
# such block, to 32 MiB, and a process keeps what its largest tensors once took.
MALLOC_MMAP_THRESHOLD = "MALLOC_MMAP_THRESHOLD_"
MALLOC_TRIM_THRESHOLD = "MALLOC_TRIM_THRESHOLD_"
RETURNED_BYTES = 1 << 20


@dataclass(frozen=True)
class RankEnvironment:
    """Which process of a world this one is."""

    rank: int
    world_size: int
    local_rank: int


def read_rank(environ: MutableMapping[str, str] = os.environ) -> RankEnvironment | None:
    """Returns which rank torchrun or srun made of this process, or None when nobody started it as a rank."""
    rank = _rank_environment((RANK, WORLD_SIZE, LOCAL_RANK), environ)
    if rank is None and not schedulers.alone_by_mpi(environ):
        task = schedulers.slurm_task(environ)
        rank = task and _rank_environment(task, environ)
    return rank


def run_id(environ: MutableMapping[str, str] = os.environ) -> str | None:
    """Returns a name that all processes of this launch agree on, if the launcher gave one."""
    elastic = environ.get(TORCHELASTIC_RUN_ID, "none")
    return schedulers.step_name(environ) or (None if elastic in ("", "none") else elastic)


def job_id(environ: MutableMapping[str, str] = os.environ) -> str | None:
    """Returns the Slurm job that this process belongs to, if any; it stays the same after a requeue."""
    return environ.get(schedulers.SLURM_JOB_ID)


@dataclass(frozen=True)
class Address:
    """Says where ranks that share no file meet, and who listens there."""

    host: str
    port: int
    agent: bool  # torchrun's agent listens, instead of rank 0
    attempt: str  # the agent's store outlives the ranks: those of each attempt keep to themselves
    one_machine: bool  # no rank runs elsewhere


def read_address(rank: RankEnvironment, environ: MutableMapping[str, str] = os.environ) -> Address:
    """Returns where the ranks meet; those of one machine keep to its loopback interface unless the user has chosen."""
    host, port = environ[MASTER_ADDR], _integer(MASTER_PORT, environ[MASTER_PORT])
    agent = environ.get(TORCHELASTIC_USE_AGENT_STORE) == "True"
    tasks_of_one_node = _is_task(environ) and schedulers.on_one_node(environ)
    one_machine = (
        environ.get(LOCAL_WORLD_SIZE) == str(rank.world_size)
        or tasks_of_one_node
        or host in ("localhost", "127.0.0.1", "::1")
    )
    if one_machine:
        keep_to_loopback(environ)
    if tasks_of_one_node:
        host = "127.0.0.1"
    return Address(host, port, agent, environ.get(TORCHELASTIC_RESTART_COUNT, "0"), one_machine)


def keep_to_loopback(environ: MutableMapping[str, str] = os.environ) -> None:
    """Makes Gloo and NCCL listen on this machine's loopback interface alone, unless the user has chosen another."""
    for name, interface in LOOPBACK.items():
        environ.setdefault(name, interface)


def has_parent_to_follow(environ: Mapping[str, str] = os.environ) -> bool:
    """Tells whether torchrun or srun started this process, whose end is then the end of the run."""
    return TORCHELASTIC_RUN_ID in environ or _is_task(environ)


def export_rank(rank: RankEnvironment, environ: MutableMapping[str, str] = os.environ) -> None:
    """Makes torch's ``env://`` rendezvous work for ``rank``, however it was started.

    A world of one needs no address from anyone, unless torchrun made it: port 0 lets the system pick a free one. Ranks
    of srun meet on the first node of their step, unless the user has chosen.
    """
    srun = RANK not in environ and rank.world_size > 1
    if RANK not in environ and rank.world_size == 1:
        environ[MASTER_ADDR], environ[MASTER_PORT] = "127.0.0.1", "0"
    environ[RANK] = str(rank.rank)
    environ[WORLD_SIZE] = str(rank.world_size)
    environ[LOCAL_RANK] = str(rank.local_rank)
    chosen = MASTER_ADDR in environ and MASTER_PORT in environ
    if srun and not chosen and (place := schedulers.meeting_point(environ)):
        environ.setdefault(MASTER_ADDR, place[0])
        environ.setdefault(MASTER_PORT, str(place[1]))
        if rank.rank == 0:
            where = f"{environ[MASTER_ADDR]}:{environ[MASTER_PORT]}"
            _log.warning("rank 0 of %d, as Slurm's variables say; the others meet it at %s", rank.world_size, where)
    for name in (MASTER_ADDR, MASTER_PORT) if rank.world_size > 1 else ():
        if name not in environ:
            raise ConfigError(_unknown_place(name, rank, srun))


# What ``share_cores`` has set in this process, which a later call for more processes may set anew.
_shared: dict[str, str] = {}


def outside_of_jobs(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns the environment for a job that is submitted from here, without what tells of this process or its job.

    sbatch hands all of it on: ranks would take this machine's threads, and srun the counts and limits of the other job.
    """
    inside = schedulers.SLURM_JOB_ID in environ
    told = {RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT}
    told |= {name for name, value in _shared.items() if environ.get(name) == value}
    return {
        name: value
        for name, value in environ.items()
        if name not in told and not (inside and name.startswith("SLURM_") and name not in schedulers.OF_THE_SITE)
    }


def share_cores(processes: int, environ: MutableMapping[str, str] = os.environ) -> None:
    """Gives each of ``processes`` on this machine its share of the cores, unless the user has chosen.

    It binds processes started from here; this one too, before torch is imported.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    chosen = {OMP_NUM_THREADS: str(threads), OMP_WAIT_POLICY: "PASSIVE", TOKENIZERS_PARALLELISM: "false"}
    for name, value in chosen.items():
        if environ.get(name) in (None, _shared.get(name)):
            environ[name] = _shared[name] = value


def cache_directory(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Returns the folder of what longctx may forget, or None when this user has no place for it."""
    # The XDG rules: a relative path is to be ignored.
    chosen = Path(environ.get(XDG_CACHE_HOME, ""))
    if chosen.is_absolute():
        return chosen / "longctx"
    home = Path(environ.get(HOME, ""))
    return home / ".cache" / "longctx" if home.is_absolute() else None


def launched_environment(rank: RankEnvironment, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns the environment of a rank that ``longctx launch`` starts: one machine, nobody else is talked to."""
    # A shell on a cluster names the interface between machines; ranks of one machine do not listen there.
    return {
        **environ,
        RANK: str(rank.rank),
        WORLD_SIZE: str(rank.world_size),
        LOCAL_RANK: str(rank.local_rank),
        LOCAL_WORLD_SIZE: str(rank.world_size),
        **LOOPBACK,
    }


def set_deepspeed_device(environ: MutableMapping[str, str] = os.environ) -> None:
    """Makes DeepSpeed use the CPU in processes started from here, unless the user has chosen."""
    environ.setdefault(DS_ACCELERATOR, "cpu")


def benchmark_environment(rank: RankEnvironment, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns the environment of a process whose memory is measured, the same for our system and for its peers."""
    return {
        **environ,
        RANK: str(rank.rank),
        WORLD_SIZE: str(rank.world_size),
        LOCAL_RANK: str(rank.local_rank),
        OMP_NUM_THREADS: "1",
        DS_ACCELERATOR: "cpu",
        MALLOC_MMAP_THRESHOLD: str(RETURNED_BYTES),
        MALLOC_TRIM_THRESHOLD: str(RETURNED_BYTES),
    }


def _unknown_place(missing: str, rank: RankEnvironment, srun: bool) -> str:
    told = f"{missing} is not set, but the world has {rank.world_size} processes; "
    if not srun:
        return told + "set it for all"
    return told + (
        f"Slurm's variables make this rank {rank.rank} of them. For ranks of srun: `export MASTER_ADDR=$(scontrol show "
        'hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=29500` before srun; in a shell that is no rank: '
        f"`unset {schedulers.SLURM_STEP_ID}`"
    )


def _rank_environment(names: tuple[str, str, str], environ: Mapping[str, str]) -> RankEnvironment | None:
    present = [name for name in names[:2] if name in environ]
    if not present:
        return None
    if len(present) == 1:
        missing = next(name for name in names[:2] if name not in environ)
        raise ConfigError(f"{present[0]}={environ[present[0]]} is set but {missing} is not; set both or none")
    rank, world_size = (_integer(name, environ[name]) for name in names[:2])
    if not 0 <= rank < world_size:
        raise ConfigError(f"{names[0]}={rank} must lie in [0, {names[1]}={world_size})")
    return RankEnvironment(rank, world_size, _integer(names[2], environ.get(names[2], str(rank))))


def _is_task(environ: Mapping[str, str]) -> bool:
    """Tells whether srun started this process as the rank that it is, and nobody else made it one."""
    task = schedulers.task_number(environ)
    return task is not None and environ.get(RANK, task) == task


def _integer(name: str, text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ConfigError(f"{name}={text!r} must be a non-negative integer")
    return int(text)
