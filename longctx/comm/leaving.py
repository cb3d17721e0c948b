"""Leaves a world of ranks so that the process can end."""

from __future__ import annotations

import gc
import time

import torch.distributed as dist

SETTLING_SECONDS = 0.1


def leave_world() -> None:
    """Destroys all process groups and lets their threads come to rest.

    Gloo's threads outlive their groups (torch 2.13). One that still lets go of a tensor while the interpreter ends
    aborts the process ("terminate called without an active exception"), after all work was done.
    """
    dist.destroy_process_group()
    gc.collect()
    time.sleep(SETTLING_SECONDS)
