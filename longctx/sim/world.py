"""Gives each thread its own process-group state of torch.distributed.

torch keeps everything that ``torch.distributed`` knows about a process in module-level objects. Ranks as
threads need one such world each. Upstream's own threaded tests use the same trick
(``torch/testing/_internal/distributed/multi_threaded_pg.py``). This is the only file that reaches into these
internals; checked on torch 2.13.0.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

BACKEND_NAME = "sim"
_c10d: Any = torch._C._distributed_c10d  # the stubs lack what is used here


class ThreadLocalWorld(threading.local):
    """Stands in for ``c10d._world``: the same attributes, separately for each thread.

    ``threading.local`` runs ``__init__`` again in every thread that touches the object, so each rank starts
    with an empty world.
    """

    pg_config_info = c10d._World.pg_config_info

    def __init__(self) -> None:
        self.default_pg: dist.ProcessGroup | None = None
        self.pg_map: dict[dist.ProcessGroup, tuple[str, Any]] = {}
        self.pg_names: dict[dist.ProcessGroup, str] = {}
        self.pg_group_ranks: dict[dist.ProcessGroup, dict[int, int]] = {}
        self.pg_backend_config: dict[dist.ProcessGroup, str] = {}
        self.group_count = 0
        self.tags_to_pg: dict[str, list[dist.ProcessGroup]] = {}
        self.pg_to_tag: dict[dist.ProcessGroup, str] = {}
        self.pg_coalesce_state: dict[dist.ProcessGroup, list[Any]] = {}
        self.comms: list[Any] = []


@contextlib.contextmanager
def isolated_world(create_group: Callable[..., dist.ProcessGroup]) -> Iterator[None]:
    """Gives every thread its own ``torch.distributed`` state and registers the backend ``sim``.

    Everything is put back on the way out. The backend is registered for this time only: a plugin that stays
    registered changes how torch picks the default backend of ``"cpu:gloo"`` groups.

    Args:
        create_group: called by torch with (backend options, user's options); returns the process group.
    """
    module_names = ("_world", "_backend", "_default_pg_init_method")
    saved_module = {name: getattr(c10d, name) for name in module_names}
    saved_excepthook = sys.excepthook  # each init_process_group() wraps it once more
    tables = ("_plugins", "backend_list", "default_device_backend_map", "backend_capability", "backend_type_map")
    saved_tables = {name: getattr(dist.Backend, name).copy() for name in tables}
    had_attribute = hasattr(dist.Backend, BACKEND_NAME.upper())

    dist.Backend.register_backend(BACKEND_NAME, create_group, extended_api=True, devices=["cpu"])
    _c10d._set_thread_isolation_mode(True)
    c10d._world = ThreadLocalWorld()  # type: ignore[assignment]
    try:
        yield
    finally:
        for name, value in saved_module.items():
            setattr(c10d, name, value)
        _c10d._set_thread_isolation_mode(False)
        for name, value in saved_tables.items():
            setattr(dist.Backend, name, value)
        if not had_attribute:
            delattr(dist.Backend, BACKEND_NAME.upper())
        sys.excepthook = saved_excepthook
