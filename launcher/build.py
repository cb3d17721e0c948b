"""Puts the parts of a run together; the one place that sees all of them."""

from __future__ import annotations

import contextlib
import logging
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from longctx.attention.runtime.local_kernel import KernelProblem, select_kernel
from longctx.checkpoint.checkpointer import Checkpointer, TrainState
from longctx.checkpoint.directory import source_of
from longctx.checkpoint.weights import check_weights, load_weights
from longctx.comm import default_store, register_nodes
from longctx.config import Config, simulated_world_size
from longctx.data import Corpus, open_corpus
from longctx.data.checked import check_corpus
from longctx.data.held_out import check_held_out
from longctx.data.loader import Loader
from longctx.data.mixing.build import packing_of_run, require_epochs
from longctx.data.source import Check
from longctx.engines import engine_of
from longctx.errors import LongctxError, StorageError
from longctx.huggingface.load import load_directory
from longctx.launcher import env
from longctx.launcher.preflight import Facts, device_here, look, look_at_rate
from longctx.launcher.progress import progress
from longctx.launcher.ranks.alike import agree_on_data
from longctx.launcher.ranks.meeting import Meeting
from longctx.launcher.ranks.world import device_type, joined, links_of, meet, nodes_of, this_rank
from longctx.launcher.resuming import Resume, goes_on
from longctx.launcher.run_directory import directory_of, read_config
from longctx.launcher.rundir.kept_tokenizer import require_same_tokenizer
from longctx.launcher.rundir.records import CONFIG_FILE
from longctx.launcher.start.opening import Opening
from longctx.launcher.stopping import Requests, listening
from longctx.mesh import Mesh, build_mesh
from longctx.model import Decoder, initialize
from longctx.parallel import parallelize
from longctx.parallel.core import cells_of, prepare_of, require_cores, work_of
from longctx.parallel.data import compute_dtype, master_dtype
from longctx.parallel.pipeline import Pipeline, decoders
from longctx.reporting.memory import StepMemory, is_measured
from longctx.reporting.meter import Meter, peak_flops
from longctx.reporting.metrics import open_sink
from longctx.sim import Cluster, RankFailed
from longctx.train.batch_sharder import BatchSharder
from longctx.train.canary.positions import check_positions
from longctx.train.inside_step import Stopping
from longctx.train.learning_rate import LearningRate
from longctx.train.optimizer import build_optimizer
from longctx.train.prefetcher import Prefetcher
from longctx.train.step import TrainStep
from longctx.train.step_parts import StepParts
from longctx.train.trainer import Trainer
from longctx.train.validation import open_validation

_log = logging.getLogger(__name__)

Result = TypeVar("Result")


def preflight(config: Config, resume: Resume | None) -> int | None:
    """Refuses, before any process starts, all that can be refused without one.

    Returns the step of the checkpoint from which the run goes on; None for a start.
    """
    preflight_attention(config)
    preflight_kernel(config)
    if config.train.offload and device_type(config) == "cpu":
        _log.warning("train.offload=true copies from host memory to host memory on comm=%s", config.comm.backend)
    going_on = resume is not None and goes_on(config, resume)
    if going_on:
        _require_checkpoint(config)
        require_same_tokenizer(config)
    corpus = check_data(config)
    look(Facts(config, corpus, device_here(config), going_on))
    if resume is None or not going_on:
        if config.init.from_ is not None:
            check_weights(source_of(config.init.from_), on_meta(config), config.to_dict())
        return None
    step = _fitting_step(config, resume, corpus)
    if step and (directory_of(config) / CONFIG_FILE).is_file():
        look_at_rate(read_config(directory_of(config) / CONFIG_FILE), config, step)
    return step


def preflight_attention(config: Config) -> None:
    """Refuses layouts and strategies that do not fit.

    It needs no device, so it also works far from the run's machine.
    """
    require_cores(config)


def preflight_kernel(config: Config) -> None:
    """Refuses kernels that do not fit, or that this machine does not have."""
    select_kernel(config.attention.kernel, kernel_problem(config))


def kernel_problem(config: Config) -> KernelProblem:
    """Describes what the run asks of its local kernel."""
    heads, kv_heads = config.local_heads
    dtype = compute_dtype(config.train.dtype)
    return KernelProblem(device_type(config), dtype, heads, kv_heads, config.model.head_dim)


def run_rank(config: Config, resume: Resume | None, store: int | None = None) -> None:
    """Trains as the rank that the environment names. ``store``: from a launcher that has checked the data."""
    with meet(config, {"resume": resume.words if resume else []}, store) as meeting:
        train_with(meeting, config, resume, checked=store is not None)


def train_with(meeting: Meeting, config: Config, resume: Resume | None, checked: bool) -> None:
    """Trains with the ranks of ``meeting``, over Gloo or NCCL. ``checked``: this rank's data have been."""
    with requests() as asked, deterministic(config):
        corpus = _open_data(config, checked)
        agree_on_data(meeting, corpus)
        with joined(config, meeting) as device:
            stop = stopping_by(asked, default_store())
            rank_main(config, resume, corpus, device, peak_memory(device), stop)


def _open_data(config: Config, checked: bool) -> Corpus:
    """The run's documents; the first rank of each machine checks them unless that was done already."""
    return open_checked(config) if checked or this_rank().local_rank else check_data(config)


def run_sim(config: Config, resume: Resume | None) -> None:
    """Trains with all ranks in this process, on the simulated cluster."""
    corpus = open_checked(config)
    with requests() as asked:
        stop = stopping_by(asked, dist.HashStore())
        # The ranks share one process: what memory each of them takes cannot be told apart.
        simulate(config, rank_main, config, resume, corpus, torch.device("cpu"), lambda: None, stop)


def simulate(config: Config, function: Callable[..., Result], *arguments: Any) -> list[Result]:
    """Returns what each rank of a simulated world returned; an error of ours that a rank raised is raised here."""
    cluster = Cluster(simulated_world_size(config), seed=config.comm.shuffle_seed)
    with deterministic(config):
        try:
            return cluster.run(run_with_nodes, config, function, *arguments)
        except RankFailed as failure:
            if isinstance(failure.__cause__, LongctxError):
                raise failure.__cause__ from None
            raise


def run_with_nodes(config: Config, function: Callable[..., Result], *arguments: Any) -> Result:
    """Calls ``function`` on a rank of a world that is all on this machine, after registering its nodes."""
    register_nodes(nodes_of(config, range(dist.get_world_size())), links_of(config))
    return function(*arguments)


def rank_main(
    config: Config,
    resume: Resume | None,
    corpus: Corpus,
    device: torch.device,
    memory: Callable[[], int | None],
    stop: Stopping,
) -> None:
    """Runs one rank of the world that ``torch.distributed`` has been initialised with, whatever carries it."""
    torch.manual_seed(config.train.seed)
    mesh = build_mesh(config.parallel, device.type)
    opening = Opening(config)
    opening.run_canary(mesh, device)
    meter = meter_of(config, mesh, device, memory, stop.asked)
    build_trainer(config, resume, corpus, meter, stop, opening).run()


def meter_of(
    config: Config,
    mesh: Mesh,
    device: torch.device,
    memory: Callable[[], int | None],
    stop: Callable[[], bool] = lambda: False,
) -> Meter:
    """What observes this rank's steps. ``memory``: its peak bytes. ``stop``: whether it was asked to end."""
    peak = peak_flops(device, compute_dtype(config.train.dtype))
    every_stage = config.attention.server_pool == "pipeline"
    return Meter(mesh, device, memory, stop, peak, work_of(config, mesh), every_stage, cells=cells_of(config))


def build_trainer(
    config: Config,
    resume: Resume | None,
    corpus: Corpus,
    meter: Meter,
    stop: Stopping | None = None,
    opening: Opening | None = None,
) -> Trainer:
    """Builds a trainer at the run's first step, or at the checkpoint from which it goes on.

    ``opening``: tells what the run will do.
    """
    directory, stage = directory_of(config), opening.stage if opening else contextlib.nullcontext
    checkpointer = _checkpointer(config)
    going_on = resume is not None and (resume.required or checkpointer.any_committed())
    with stage("building the model"):
        # What goes on needs nothing of the directory that it began with.
        parts = build_step(config, corpus, meter, directory, begins=not going_on and config.init.from_ is None)
    if resume is not None and going_on:
        with stage("reading the checkpoint"):
            checkpointer.load(parts.state, resume.step)
    elif config.init.from_ is not None:
        with stage("reading the weights"):
            load_weights(source_of(config.init.from_), parts.state.model, config.to_dict())
    facts = opening.tell(corpus, parts.state, meter) if opening else {}
    sink = open_sink(config, directory, dist.get_rank(), parts.state.step if going_on else None, facts=facts)
    validation = open_validation(config, corpus, meter.mesh, meter.device, parts.step.engine)
    return Trainer(
        config, parts.state, parts.step, parts.prefetcher, meter, checkpointer, sink, parts.memory, validation, stop
    )


def build_step(config: Config, corpus: Corpus, meter: Meter, directory: Path | None, begins: bool = True) -> StepParts:
    """What takes the run's steps, from the first.

    ``directory``: where ``memory.json`` is written; None: nowhere. ``begins``: False where other weights will be read.
    """
    mesh, device = meter.mesh, meter.device
    model = build_model(config, mesh, device, begins)
    check_positions(config, model, mesh, device)
    optimizer = build_optimizer(model, config.optim)
    loader = build_loader(config, corpus, mesh.data_rank, mesh.data_size)
    state = TrainState(model, optimizer, LearningRate(config.optim, config.train.steps), loader, step=0)
    step = TrainStep(engine_of(model, optimizer, config, mesh), mesh, device, config.optim.grad_clip)
    memory = StepMemory(decoders(model), optimizer, device, directory) if is_measured(config) else None
    prefetcher = Prefetcher(loader, BatchSharder.of(config, mesh, device), prepare_of(config, mesh))
    return StepParts(state, step, prefetcher, memory)


def build_model(config: Config, mesh: Mesh, device: torch.device, begins: bool = True) -> Decoder | Pipeline:
    """Builds the run's decoder with its initial weights, sharded; in a pipeline this rank's stages of it.

    ``begins``: False leaves ``model.path`` unread, for other weights will be.
    """
    if config.model.path is not None:
        # No rank ever holds the whole model: each makes room for what it keeps, and reads that.
        sharded = parallelize(on_meta(config), config, mesh)
        for part in decoders(sharded):
            part.make_room(device)
        if begins:
            load_directory(sharded, config.model)
        return sharded
    model = Decoder(config.model, loss_chunk=config.train.loss_chunk).to(master_dtype(config.train.dtype))
    initialize(model, config.train.seed)
    return parallelize(model.to(device), config, mesh)


def requests() -> contextlib.AbstractContextManager[Requests]:
    """Takes requests to stop; where the command does so already, it goes on."""
    return listening(lambda error: print(f"longctx: {error}", file=sys.stderr))


def stopping_by(asked: Requests, store: dist.Store) -> Stopping:
    """Says how a run is stopped: by requests to this process, which ``store`` carries to all ranks."""
    return Stopping(asked.asked, asked.working, asked.end_with, dist.PrefixStore("longctx/stop", store))


@contextlib.contextmanager
def deterministic(config: Config) -> Iterator[None]:
    """Applies ``train.deterministic``: operators without a deterministic form raise instead of running."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(config.train.deterministic or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def check_data(config: Config) -> Corpus:
    """Checks all that the run's documents hold, and shows how far that is; to be done where no timeout runs."""
    with progress("longctx: data") as report:
        corpus = check_corpus(config.data, config.model.vocab_size, report, env.cache_directory())
        check_held_out(config.data, corpus, config.model.vocab_size, report, env.cache_directory())
        build_loader(config, corpus, 0, 1)  # which refuses what the data cannot give
        return corpus


def open_checked(config: Config) -> Corpus:
    """The run's documents, which ``check_data`` has verified."""
    check = Check(cache=env.cache_directory())
    return open_corpus(config.data, config.model.vocab_size, verify=False, check=check)


def _checkpointer(config: Config) -> Checkpointer:
    return Checkpointer(
        directory_of(config) / "checkpoints",
        config.checkpoint.keep,
        layout=asdict(config.parallel),
        config=config.to_dict(),
    )


def build_loader(config: Config, corpus: Corpus, rank: int, world: int) -> Loader:
    """Builds the loader of the ``rank``-th of ``world`` data-parallel groups."""
    attention = config.attention
    packing = packing_of_run(config.data, corpus, config.train.seed, attention.document_mask, attention.window)
    require_epochs(packing, config.train.steps * config.train.global_batch, config.train.global_batch)
    return Loader(packing, config.train.global_batch, rank, world, config.train.micro_batch)


def _require_checkpoint(config: Config) -> None:
    if not _checkpointer(config).any_committed():
        raise StorageError(
            f"--resume: {directory_of(config)} holds no committed checkpoint; start without --resume, or with "
            "--auto-resume, or name the run.dir that has one"
        )


def on_meta(config: Config) -> Decoder:
    """Makes the run's decoder without storage."""
    with torch.device("meta"):
        return Decoder(config.model, loss_chunk=config.train.loss_chunk).to(master_dtype(config.train.dtype))


def _fitting_step(config: Config, resume: Resume, corpus: Corpus) -> int | None:
    """Returns the step from which the run goes on.

    Refuses, while nothing of the earlier run has been touched, a checkpoint of another model or other data.
    """
    model = on_meta(config)
    optimizer, schedule = build_optimizer(model, config.optim), LearningRate(config.optim, config.train.steps)
    state = TrainState(model, optimizer, schedule, build_loader(config, corpus, 0, 1), step=0)
    return _checkpointer(config).check(state, resume.step)


def peak_memory(device: torch.device) -> Callable[[], int | None]:
    """Returns a function that measures this process's peak memory in bytes."""
    if device.type == "cuda":
        return lambda: torch.cuda.max_memory_allocated(device)
    return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
