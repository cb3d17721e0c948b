"""What this machine must have for a configuration to run on it."""

from __future__ import annotations

from longctx.config import Config
from longctx.errors import NotAvailableError


def require(config: Config, processes: int) -> None:
    """Refuse a run whose devices or packages are not here; ``processes`` run on this machine."""
    if config.comm.backend == "nccl":
        import torch

        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if devices < processes:
            raise NotAvailableError(
                f"comm=nccl needs a CUDA device for each of {processes} processes, this machine has "
                f"{devices}; available here: comm=gloo, comm=sim"
            )
    from longctx.train.tracker import require_tracker

    require_tracker(config.logger.wandb)
