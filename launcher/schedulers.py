"""Tells from a scheduler's variables whether a process is a rank of srun's, and where the ranks of its step meet.

Slurm sets most of its variables in every shell of an allocation too, where they count tasks that nobody has started.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from longctx.errors import ConfigError

# Who a task is in its step; the same for all tasks of one job, and for the job after a requeue.
SLURM_PROCID = "SLURM_PROCID"
SLURM_LOCALID = "SLURM_LOCALID"
SLURM_JOB_ID = "SLURM_JOB_ID"
# How many tasks the step has. srun may leave the second as the allocation had it, so the first one counts.
SLURM_STEP_NUM_TASKS = "SLURM_STEP_NUM_TASKS"
SLURM_NTASKS = "SLURM_NTASKS"
# The step. Numbers from 2^32 - 16 on are Slurm's own: the batch script, the shell that salloc opens, what ssh adopts.
SLURM_STEP_ID = "SLURM_STEP_ID"
_OWN_STEPS = 2**32 - 16
# On how many nodes the tasks of this step are.
SLURM_STEP_NUM_NODES = "SLURM_STEP_NUM_NODES"
# Set by srun --pty, which gives one task a terminal.
SLURM_PTY_PORT = "SLURM_PTY_PORT"
SLURM_PTY_WIN_COL = "SLURM_PTY_WIN_COL"
# The nodes of the step and of the job; rank 0 is on the first, unless tasks are distributed in the user's own order.
_NODES = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
SLURM_DISTRIBUTION = "SLURM_DISTRIBUTION"
# Which Slurm it is, inside of a job and outside.
OF_THE_SITE = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS")
# World size, rank and local rank by Open MPI, MVAPICH and jsrun; by Intel MPI and MPICH, and by srun too.
_MPI = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    ("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_LOCAL_RANK"),
)
_PMI = ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID")

# Ports above those of services and below those that systems hand out; jobs and steps that share a node do not meet.
_FIRST_PORT, _PORTS = 20_000, 12_000


def slurm_task(environ: Mapping[str, str]) -> tuple[str, str, str] | None:
    """Names the variables of rank, world size and local rank that srun gave this process; None where it is no rank.

    Raises ``ConfigError`` for a shell that ``srun --pty`` opened as one of several tasks.
    """
    step = _number(environ.get(SLURM_STEP_ID))
    if step is None or step >= _OWN_STEPS:
        return None
    size = SLURM_STEP_NUM_TASKS if SLURM_STEP_NUM_TASKS in environ else SLURM_NTASKS
    tasks = _number(environ.get(size)) or 1
    if tasks > 1 and (SLURM_PTY_PORT in environ or SLURM_PTY_WIN_COL in environ):
        raise ConfigError(
            f"{size}={tasks} and {SLURM_STEP_ID}={step} say that srun --pty started this process as one of {tasks} "
            f"tasks; to train alone: `unset {SLURM_STEP_ID}`, or open the shell with srun --pty --ntasks=1; to train "
            f"on {tasks} ranks: `srun --ntasks={tasks} longctx train ...` from the allocation's first shell"
        )
    return SLURM_PROCID, size, SLURM_LOCALID


def alone_by_mpi(environ: Mapping[str, str]) -> bool:
    """Returns whether an MPI launcher started this process as the only one: what Slurm says is of the launcher then.

    Raises ``ConfigError`` for one of several, each of which would train the whole run.
    """
    # srun sets the variables of PMI as well, beside its own.
    for size, rank, local in _MPI if SLURM_STEP_ID in environ else (*_MPI, _PMI):
        processes = _number(environ.get(size))
        if processes == 1:
            return True
        if processes:
            raise ConfigError(
                f"{size}={processes}: an MPI launcher started this process as one of {processes}, and ranks come from "
                f"torchrun or srun; use `longctx launch --nproc N` or srun, or let each process export RANK=${rank} "
                f"WORLD_SIZE=${size} LOCAL_RANK=${local} and rank 0's MASTER_ADDR and MASTER_PORT"
            )
    return False


def task_number(environ: Mapping[str, str]) -> str | None:
    """Returns the number of the task that srun made of this process, as Slurm writes it; None where it made none."""
    step = _number(environ.get(SLURM_STEP_ID))
    return None if step is None or step >= _OWN_STEPS else environ.get(SLURM_PROCID)


def on_one_node(environ: Mapping[str, str]) -> bool:
    """Tells whether all tasks of this step run on this machine."""
    return environ.get(SLURM_STEP_NUM_NODES) == "1"


def step_name(environ: Mapping[str, str]) -> str | None:
    """Names the job, and its step where that is not the first; None outside a job.

    A job that is requeued has the same name again.
    """
    job, step = environ.get(SLURM_JOB_ID), _number(environ.get(SLURM_STEP_ID))
    return f"{job}-{step}" if job and step and step < _OWN_STEPS else job


def meeting_point(environ: Mapping[str, str]) -> tuple[str, int] | None:
    """Returns host and port where the ranks of this srun step can meet, the same on each; None where none is known."""
    job, step = _number(environ.get(SLURM_JOB_ID)), _number(environ.get(SLURM_STEP_ID))
    if job is None or step is None or environ.get(SLURM_DISTRIBUTION, "").startswith("arbitrary"):
        return None
    host = first_host(next((environ[name] for name in _NODES if environ.get(name)), ""))
    return None if host is None else (host, _FIRST_PORT + (job + 7 * step) % _PORTS)


def first_host(nodes: str) -> str | None:
    """Returns the first host of a list as Slurm writes it, such as gpu[007-010,12],login1; None for another form."""
    first = re.match(r"(?:[\w.-]|\[\d+[\d,-]*\])+(?=,|$)", nodes, re.ASCII)
    return first and re.sub(r"\[(\d+)[^]]*\]", r"\1", first[0])


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() else None
