"""Checks what this machine must have for a configuration to run on it."""

from __future__ import annotations

import os
import platform

from longctx.config import Config
from longctx.errors import ConfigError, NotAvailableError


def require(config: Config, processes: int) -> None:
    """Refuses a run whose devices or packages are not here; ``processes`` run on this machine."""
    require_devices(config, processes)
    from longctx.reporting.tracker import require_tracker

    require_tracker(config.logger.wandb)


def require_devices(config: Config, processes: int) -> None:
    """Refuses NCCL without a CUDA device for each of ``processes``."""
    if config.comm.backend == "nccl":
        import torch

        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if devices < processes:
            raise NotAvailableError(
                f"comm=nccl needs a CUDA device for each of {processes} processes, this machine has "
                f"{devices}; available here: comm=gloo, comm=sim"
            )


def require_nodes(config: Config, processes: int = 1) -> None:
    """Refuses more nodes than there are ``processes``: each node needs at least one.

    Without a job the run is on one node.
    """
    nodes = config.cluster.nodes
    if nodes > processes:
        here = "this command runs on this machine alone" if processes == 1 else f"the world has {processes} processes"
        raise ConfigError(
            f"cluster.nodes={nodes}, but {here}; start a run on several nodes with `longctx submit`, "
            f"or set cluster.nodes={processes}"
        )


def described() -> dict[str, object]:
    """Returns what is noted beside a measurement: cores, processor, Python."""
    return {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()}


def load() -> str:
    """Returns how busy others keep the machine: processes that wanted to run, means of 1, 5 and 15 minutes."""
    return " ".join(f"{mean:.2f}" for mean in os.getloadavg())
