"""Checks rules that need the world size: what the mesh's degrees come to, and how a global batch falls on it."""

from __future__ import annotations

from dataclasses import replace

from longctx.config.pipeline import RULES, nearest_microbatches
from longctx.config.schema import Config
from longctx.config.sections import ParallelConfig
from longctx.errors import ConfigError
from longctx.rules import at_least, divisors, nearest_multiples, nearest_of

DEGREES = ("dp_replicate", "dp_shard", "sp", "tp", "pp")


def resolve(config: Config, world_size: int) -> Config:
    """Returns ``config`` after every rule has passed for a world of this size, with what is left open filled in.

    That is ``dp_shard``, the schedule's steps, which are recorded for a run that goes on to more of them, and the
    length that tables of positions are made for.
    """
    config.check()
    parallel = config.parallel
    if parallel.dp_shard == -1:
        parallel = replace(parallel, dp_shard=_what_is_left(parallel, world_size))
    product = _product(parallel)
    if product != world_size:
        raise ConfigError(
            f"{_degrees(parallel)} = {product}, but the world has {_processes(world_size)}; "
            f"nearest valid: {_nearest_degree(parallel, world_size)}"
        )
    optim = config.optim.settled(config.train.steps)
    config = replace(config, parallel=parallel, optim=optim, model=config.model.settled(config.data.seq_len))
    _check_batch(config)
    return config


def simulated_world_size(config: Config) -> int:
    """Counts the ranks of a simulated run: the product of the degrees, with one for what is left."""
    parallel = config.parallel
    return _product(replace(parallel, dp_shard=max(parallel.dp_shard, 1)))


def _what_is_left(parallel: ParallelConfig, world_size: int) -> int:
    others = _product(replace(parallel, dp_shard=1))
    if world_size % others:
        raise ConfigError(
            f"{_degrees(parallel)} = {others} does not divide the world's {_processes(world_size)}; "
            f"nearest valid: {_nearest_degree(parallel, world_size)}"
        )
    return world_size // others


def _nearest_degree(parallel: ParallelConfig, world_size: int) -> str:
    """Says what to set instead: the sequence degree first, since it is the one that users choose."""
    rest = parallel.dp_replicate * parallel.tp * parallel.pp
    if world_size % rest:
        return f"a world of {nearest_multiples(world_size, rest * parallel.sp)}"
    valid = divisors(world_size // rest)
    return f"parallel.sp={nearest_of(parallel.sp, valid)} with parallel.dp_shard=-1"


def _check_batch(config: Config) -> None:
    train, parallel = config.train, config.parallel
    groups = parallel.dp_replicate * parallel.dp_shard
    require_even_batch(train.global_batch, groups, train.micro_batch)
    unit = groups * train.micro_batch
    count, schedule, pp = train.global_batch // unit, parallel.pp_schedule, parallel.pp
    if pp > 1 and not RULES[schedule].fits(pp, count):
        raise ConfigError(
            f"train.global_batch={train.global_batch} is {count} microbatch{'es' if count > 1 else ''} per "
            f"pipeline; parallel.pp_schedule={schedule} on parallel.pp={pp} takes {RULES[schedule].needs}; nearest "
            f"valid value: {unit * nearest_microbatches(schedule, pp, count)}"
        )


def require_even_batch(global_batch: int, groups: int, micro_batch: int) -> None:
    """Refuses a batch that does not fall evenly on data-parallel groups and micro-batches. Raises ``ConfigError``."""
    for name, value in (("train.global_batch", global_batch), ("train.micro_batch", micro_batch)):
        at_least(name, value, 1)
    unit = groups * micro_batch
    if global_batch % unit:
        raise ConfigError(
            f"train.global_batch={global_batch} must be a multiple of {unit} (data-parallel groups {groups} × "
            f"train.micro_batch {micro_batch}); nearest valid values: {nearest_multiples(global_batch, unit)}"
        )


def _product(parallel: ParallelConfig) -> int:
    product = 1
    for name in DEGREES:
        product *= getattr(parallel, name)
    return abs(product)


def _degrees(parallel: ParallelConfig) -> str:
    named = [(name, getattr(parallel, name)) for name in DEGREES]
    return "parallel." + " × ".join(f"{name} {degree}" for name, degree in named if degree != -1)


def _processes(world_size: int) -> str:
    return f"{world_size} process" + ("" if world_size == 1 else "es")
