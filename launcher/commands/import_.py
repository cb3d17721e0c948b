"""``longctx import`` writes a directory's weights as step 0 of a run, which needs the directory no more."""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from longctx.checkpoint.bringing import Brought, write_step_zero
from longctx.checkpoint.manifest import DTYPES
from longctx.checkpoint.shards import Located, read_joined
from longctx.checkpoint.state import describe_together, live_tensors
from longctx.config import Config
from longctx.errors import ConfigError
from longctx.huggingface.config_in import model_fields
from longctx.huggingface.load import locate_parameters
from longctx.launcher import build, env
from longctx.launcher.compose import refuse_overrides
from longctx.launcher.hydra.overrides import quoted
from longctx.launcher.progress import progress
from longctx.launcher.ranks.world import joined, meet
from longctx.launcher.run_directory import claimed, directory_of, open_directory, refuse_occupied, with_directory
from longctx.launcher.rundir.records import CHECKPOINTS, committed_steps
from longctx.launcher.rundir.resumed_config import configuration
from longctx.launcher.start.checking import keep_model_source
from longctx.train.optimizer import build_optimizer

_BYTES = 256
_NO_DATA = ("data=tokens", "data.path=tokens.bin")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``longctx import``."""
    parser.add_argument(
        "--from", required=True, dest="source", metavar="DIR", help="a directory as Hugging Face users have it"
    )


def run(arguments: argparse.Namespace) -> int:
    """Imports alone, or as a rank that torchrun or srun named: the ranks share the tensors."""
    refuse_overrides(arguments.overrides, ("model", "model.path", "model.name"))
    directory = Path(arguments.source)
    _, fields, harmless = model_fields(directory)
    own = ["model=hf", f"model.path={quoted(str(directory.absolute()))}"]
    if fields["vocab_size"] < _BYTES and not any(word.lstrip("+").startswith("data") for word in arguments.overrides):
        own += _NO_DATA  # the default, bytes, is not for so small a vocabulary
    config = configuration([*own, *arguments.overrides], None)
    rank = env.read_rank() or env.RankEnvironment(rank=0, world_size=1, local_rank=0)
    if rank.world_size > 1:
        config = _as_rank(config, rank)
    started = time.monotonic()
    with ExitStack() as held:
        if rank.world_size > 1:
            meeting = held.enter_context(meet(config, {}))
        if rank.rank == 0:
            config = held.enter_context(claimed(config))
            print(f"run directory: {config.run.dir}", flush=True)
            _open(config)
        if rank.world_size > 1:
            held.enter_context(joined(config, meeting))
        written = _write(config)
    if rank.rank == 0:
        size = sum(one.bytes for one in written.values())
        seconds = time.monotonic() - started
        print(f"keys that change no number: {', '.join(harmless) or 'none'}")
        print(
            f"{directory} -> {directory_of(config)}: step 0 with {len(written)} tensors, {size / 1e9:.3f} GB in "
            f"{seconds:.1f} s; go on with `longctx train --resume={directory_of(config)} …`"
        )
    return 0


def _as_rank(config: Config, rank: env.RankEnvironment) -> Config:
    if config.run.dir is None and env.run_id() is None:
        raise ConfigError(f"run.dir=null: {rank.world_size} processes must agree on one directory; set run.dir")
    run_id = env.run_id()
    env.export_rank(rank)
    return config if run_id is None else with_directory(config, run_id)


def _open(config: Config) -> None:
    directory = directory_of(config)
    if committed_steps(directory):
        refuse_occupied(config)
    open_directory(config, None)
    keep_model_source(config, directory)


def _write(config: Config) -> dict[str, Brought]:
    """Writes this rank's share; returns all tensors."""
    model = build.on_meta(config)
    live = live_tensors(model)
    located = locate_parameters(config.model, live)
    tensors = {name: _brought(name, tensor, located[name]) for name, tensor in live.items()}
    optimizer = describe_together(model, build_optimizer(model, config.optim))
    with progress("longctx: import") as report:
        write_step_zero(directory_of(config) / CHECKPOINTS, tensors, optimizer, config.to_dict(), report)
    return tensors


def _brought(name: str, tensor: Tensor, located: list[Located]) -> Brought:
    found = DTYPES[located[0][1].dtype]
    if found.itemsize > tensor.dtype.itemsize:
        raise ConfigError(
            f"{name} is {_word(found)} there, and train.dtype would round it to {_word(tensor.dtype)}; set "
            f"train.dtype={_word(found)}"
        )
    return Brought(tuple(tensor.shape), tensor.dtype, partial(read_joined, located, tensor.dtype))


def _word(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
