"""Turns model and optimizer into named tensors plus plain values, and back.

Names are those of the single-device model, whatever wraps it, so a checkpoint knows nothing of the layout
that wrote it. ``model.<parameter>`` holds weights, ``optimizer.<parameter>.<key>`` what the optimizer keeps.
A rank of a pipeline has only some of them; what it writes of the whole is joined from all ranks' descriptions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from longctx.checkpoint.agreement import run_on_all_ranks, this_rank
from longctx.checkpoint.manifest import DTYPE_CODES, DTYPES, Chunk, plain
from longctx.errors import ConfigError, StorageError

# Prefixes that torch.compile and activation checkpointing put around a module's own name.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")

# A pipeline's prefix for one of its stages. The last stage's embedding is a copy of the first one's, tied to it.
_STAGE = re.compile(r"stage_(\d+)\.")
_TIED = "embedding.weight"
COPY = " (copy)"  # ends the name of such a copy here; it is read like the original and never written

# How the optimizer computes, not what: follows the device of the run that resumes.
_IMPLEMENTATION = ("params", "foreach", "fused", "capturable", "differentiable")

# What a schedule sets from step to step is state; all other options are the configuration's, which may change.
_SCHEDULED = ("lr", "initial_lr")


def live_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Lists parameters and persistent buffers themselves, each once: tied weights under their first name."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        stage = _STAGE.match(name)
        if stage:
            name = name[stage.end() :]
            name += COPY if name == _TIED and int(stage[1]) else ""
        assert isinstance(tensor, Tensor), f"{name}: {type(tensor).__name__} in the state of the model"
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def model_tensors(live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names what a checkpoint stores of ``live_tensors``; shares their storage."""
    return {f"model.{name}": tensor.detach() for name, tensor in live.items()}


def originals(names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors without those that are copies of another stage's."""
    return {name: tensor for name, tensor in names.items() if COPY not in name}


def is_first_holder(tensor: Tensor) -> bool:
    """Tells whether this rank is the first of those that hold the tensor."""
    if not isinstance(tensor, DTensor):
        return this_rank() == 0
    coordinate = tensor.device_mesh.get_coordinate()
    return coordinate is not None and not any(coordinate)


def optimizer_tensors(optimizer: Optimizer, live: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Splits the optimizer's tensors into those sharded like their parameters and whole ones that this rank writes."""
    names = {id(tensor): name for name, tensor in live.items()}
    sharded: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            full = f"optimizer.{names[id(parameter)]}.{key}"
            if isinstance(value, DTensor):
                assert value.shape == parameter.shape, full
                sharded[full] = value.detach()
            elif isinstance(value, Tensor) and is_first_holder(parameter):
                whole[full] = value.detach()
    return originals(sharded), originals(whole)


def describe_together(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Names the whole model, and the optimizer without its tensors, from the ranks that hold them."""
    return join(run_on_all_ranks(lambda: describe(optimizer, live_tensors(model))))


def describe(optimizer: Optimizer, live: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Describes this rank's part of the model by name, and the rest of its optimizer, as a plain value.

    None where other ranks hold the same and one of them describes it.
    """
    names = {id(tensor): name for name, tensor in live.items()}
    state: dict[str, dict[str, Any]] = {}
    for parameter, entries in optimizer.state.items():
        plain_entries = {key: None if isinstance(value, Tensor) else value for key, value in entries.items()}
        state[names[id(parameter)].removesuffix(COPY)] = plain_entries
    groups = [
        {
            "parameters": [names[id(parameter)].removesuffix(COPY) for parameter in group["params"]],
            "options": {
                key: value.item() if isinstance(value, Tensor) else value
                for key, value in group.items()
                if key not in _IMPLEMENTATION
            },
        }
        for group in optimizer.param_groups
    ]
    if not any(is_first_holder(tensor) for tensor in live.values()):
        return None
    described = {"model": list(originals(live)), "state": state, "groups": groups}
    result: dict[str, Any] = plain(described, "optimizer")
    return result


def join(descriptions: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """Joins the descriptions of all ranks; a parameter that several describe counts once."""
    parts = [part for part in descriptions if part is not None]
    groups = [
        {
            "parameters": list(dict.fromkeys(name for group in column for name in group["parameters"])),
            "options": column[0]["options"],
        }
        for column in zip(*(part["groups"] for part in parts), strict=True)
    ]
    state = {name: entries for part in parts for name, entries in part["state"].items()}
    model = list(dict.fromkeys(name for part in parts for name in part["model"]))
    return {"model": model, "state": state, "groups": groups}


def optimizer_targets(
    optimizer: Optimizer,
    live: Mapping[str, Tensor],
    saved: Any,
    present: Mapping[str, Any],
    first: Mapping[str, Chunk],
    where: str,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Makes empty tensors to read this rank's optimizer into, and the state dict that holds them.

    ``saved`` is the description in the checkpoint, ``present`` that of the run now; ``first`` has one shard of
    each saved tensor, which tells its dtype and shape.
    """
    _check_groups(saved, present, where)
    names = {id(tensor): name for name, tensor in live.items()}
    current = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    order = {name: number for number, name in enumerate(name for group in current for name in group)}
    targets: dict[str, Tensor] = {}
    state: dict[int, dict[str, Any]] = {}
    for name, number in order.items():
        if name.removesuffix(COPY) not in saved["state"]:
            continue
        state[number] = dict(saved["state"][name.removesuffix(COPY)])
        for key in [key for key, value in state[number].items() if value is None]:
            full = f"optimizer.{name}.{key}"
            if full not in first:
                raise StorageError(f"{where} is damaged: {full} is missing")
            targets[full] = state[number][key] = _target(live[name], key, first[full])
    groups = []
    for group, old, held in zip(optimizer.param_groups, saved["groups"], current, strict=True):
        scheduled = {key: _like(group.get(key), value) for key, value in old["options"].items() if key in _SCHEDULED}
        groups.append({**group, **scheduled, "params": [order[name] for name in held]})
    return targets, {"state": state, "param_groups": groups}


def saved_tensors(saved: Mapping[str, Any]) -> set[str]:
    """Lists the full names of the optimizer's tensors in a description."""
    return {
        f"optimizer.{name}.{key}"
        for name, entries in saved["state"].items()
        for key, value in entries.items()
        if value is None
    }


def check_tensors(
    prefix: str, wanted: Mapping[str, Tensor], known: set[str], first: Mapping[str, Chunk], where: str
) -> None:
    """Refuses a checkpoint whose tensors below ``prefix`` are not those of this model or optimizer.

    ``wanted``: this rank's; ``known``: names of all ranks'.
    """
    missing = sorted(set(wanted) - set(first))
    extra = sorted({name for name in first if name.startswith(prefix) and COPY not in name} - known)
    if missing or extra:
        raise ConfigError(
            f"{where} holds another model: missing {_some(missing)}, unknown here {_some(extra)}; "
            "resume with the model and optimizer of the run that wrote it"
        )
    for name, tensor in wanted.items():
        saved, now = first[name], (DTYPE_CODES.get(tensor.dtype), tuple(tensor.shape))
        if (saved.dtype, saved.shape) != now:
            raise ConfigError(
                f"{where}: {name} is {saved.dtype} {list(saved.shape)}, the configuration makes it "
                f"{now[0]} {list(now[1])}; resume with the model and train.dtype of the run that wrote it"
            )


def _check_groups(saved: Any, present: Mapping[str, Any], where: str) -> None:
    """Refuses optimizer groups that are not those that were saved."""
    try:
        before = [group["parameters"] for group in saved["groups"]]
        known = {name for group in before for name in group}
        sound = all(type(group["options"]) is dict for group in saved["groups"]) and all(
            name in known and type(entries) is dict for name, entries in saved["state"].items()
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{where} is damaged: no state of an optimizer") from error
    if not sound:
        raise StorageError(f"{where} is damaged: no state of an optimizer")
    current = [group["parameters"] for group in present["groups"]]
    if [sorted(group) for group in before] != [sorted(group) for group in current]:
        raise ConfigError(
            f"{where}: the optimizer had groups of {[len(group) for group in before]} parameters, now of "
            f"{[len(group) for group in current]}, or of other ones; resume with the optimizer of that run"
        )


def _target(parameter: Tensor, key: str, saved: Chunk) -> Tensor:
    dtype = DTYPES[saved.dtype]
    # torch keeps the step count on the CPU, and moves it where the implementation wants it.
    if key != "step" and saved.shape == tuple(parameter.shape):
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    return torch.zeros(saved.shape, dtype=dtype)


def _like(current: Any, saved: Any) -> Any:
    """Converts a saved option to the type that the optimizer uses for it."""
    if isinstance(current, tuple) and isinstance(saved, list):
        return tuple(saved)
    if isinstance(current, Tensor):
        return torch.full_like(current, saved)
    return saved


def _some(names: list[str]) -> str:
    return (", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")) or "nothing"
