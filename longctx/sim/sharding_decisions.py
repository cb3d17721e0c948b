"""What DTensor decides about an operator's sharding, kept for all ranks and all runs of this process.

torch keeps these decisions per thread, so every rank of every run would find them anew; for a small model that is
most of a first step. A decision names the device mesh of the rank that asked; another rank gets it with its own.
The attributes below are torch's own and not promised: other versions than 2.13 decide for every rank anew.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor._op_schema import OpSchema, OutputSharding

_MOST = 20_000  # decisions; then all are forgotten, so that a long session doesn't grow
_decisions: dict[Any, OutputSharding] = {}


@contextlib.contextmanager
def shared_sharding_decisions() -> Iterator[None]:
    """Looks decisions up among those of all ranks before it makes them."""
    propagator = DTensor._op_dispatcher.sharding_propagator
    if not torch.__version__.startswith("2.13.") or "propagate_op_sharding_non_cached" in vars(propagator):
        yield  # within another cluster's
        return
    decide = propagator.propagate_op_sharding_non_cached
    # Decisions about these hold the sizes of a rank's own shard.
    placed = {*propagator.op_to_shape_and_stride_idx, *propagator.op_to_scalar_shape_adjuster}

    def look_up(schema: OpSchema) -> OutputSharding:
        return _decision(schema, decide, schema.op in placed)

    propagator.propagate_op_sharding_non_cached = look_up  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        del propagator.propagate_op_sharding_non_cached


def _decision(schema: OpSchema, decide: Callable[[OpSchema], OutputSharding], placed: bool) -> OutputSharding:
    meshes: list[DeviceMesh] = []
    key = _without_mesh(schema._comparison_key, meshes)
    if placed:
        key = key, *(mesh.get_coordinate() for mesh in meshes)
    known = _decisions.get(key)
    if known is not None:
        return _with_meshes(known, dict(enumerate(meshes)))
    found = decide(schema)
    if len(_decisions) >= _MOST:
        _decisions.clear()
    # Numbers stand for meshes, which would keep the process groups of this run alive.
    with contextlib.suppress(KeyError):  # of a mesh that no argument is on
        _decisions[key] = _with_meshes(found, {mesh: number for number, mesh in enumerate(meshes)})
    return found


def _without_mesh(what: Any, meshes: list[DeviceMesh]) -> Any:
    """A key in which a mesh is described instead of named; the meshes themselves are added to ``meshes``."""
    if isinstance(what, DTensorSpec):
        mesh, *rest = what._hash_key()
        meshes.append(mesh)
        described = mesh._flatten_rank_map, mesh._layout, mesh.device_type, mesh.mesh_dim_names
        return "spec", described, *rest, what.use_strided_shard_as_shard_order
    if isinstance(what, tuple | list):
        return type(what).__name__, *(_without_mesh(item, meshes) for item in what)
    return type(what), what  # 1, 1.0 and True are not the same argument


def _with_meshes(what: Any, meshes: dict[Any, Any]) -> Any:
    """A copy that names for each mesh what ``meshes`` has for it."""
    if isinstance(what, DTensorSpec):
        moved = copy.copy(what)
        moved.mesh = meshes[what.mesh]
        return moved
    if isinstance(what, OutputSharding):
        return OutputSharding(
            _with_meshes(what.output_spec, meshes),
            _with_meshes(what.redistribute_schema, meshes),
            what.needs_redistribute,
            what.use_val_from_redistribute_schema,
        )
    if isinstance(what, OpSchema):
        args, kwargs = _with_meshes(what.args_schema, meshes), _with_meshes(what.kwargs_schema, meshes)
        return OpSchema(what.op, args, kwargs, what.schema_info)
    if isinstance(what, dict):
        return {name: _with_meshes(item, meshes) for name, item in what.items()}
    if type(what) in (tuple, list):
        return type(what)(_with_meshes(item, meshes) for item in what)
    return what
