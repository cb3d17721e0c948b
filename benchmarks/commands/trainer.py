"""``python -m benchmarks trainer`` measures what the trainer costs over a bare loop that takes the same steps."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.options import add_overrides
from longctx.bench.timing import Report, silent
from longctx.comm import leave_world
from longctx.config import Config, resolve
from longctx.errors import ConfigError, NumericsError
from longctx.launcher import build
from longctx.launcher.compose import compose, refuse_overrides
from longctx.launcher.machine import described, load
from longctx.launcher.progress import progress

ALLOWED = 1.05
WARM_UP = 6  # pairs: torch's caches, the allocator, wandb's start
TOLERANCE = 1e-5  # relative, of every step's loss

# What a run tells stays on, as by default, but for the line that would tear the table.
FIXED = ("train.canary=false", "checkpoint.at_end=false", "logger.progress=false", "logger.report=false")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=int, default=40, help="timed pairs of steps")
    add_overrides(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.pairs < 2:
        raise ConfigError(f"--pairs {arguments.pairs} must be at least 2; 40 is the default")
    steps = WARM_UP + arguments.pairs
    fixed = [word.split("=")[0] for word in FIXED]
    refuse_overrides(arguments.overrides, (*fixed, "train.steps", "run.dir", "comm"))
    config = resolve(compose([*arguments.overrides, *FIXED, f"train.steps={steps}"]), 1)
    with tempfile.TemporaryDirectory(prefix="longctx-bench-") as folder:
        config = replace(config, run=replace(config.run, dir=folder))
        build.preflight_attention(config)
        _require_bare(config)
        before = load()
        with progress("benchmarks trainer") as report:
            measured = measure(config, report)
    if arguments.json:
        print(json.dumps({"machine": described(), "load_before": before, "allowed": ALLOWED, **measured}))
    else:
        print(table(config, before, measured))
    return 0


def _require_bare(config: Config) -> None:
    """Refuses what the bare loop does not do."""
    given = {
        "train.dtype": (config.train.dtype, "float32"),
        "attention.window": (config.attention.window, None),
        "train.compile": (config.train.compile, False),
    }
    for name, (value, valid) in given.items():
        if value != valid:
            shown = "null" if valid is None else str(valid).lower()
            raise ConfigError(f"{name}={value}: the bare loop has none of that; nearest valid: {name}={shown}")


def measure(config: Config, report: Report = silent) -> dict[str, Any]:
    """Times both loops' steps in alternation, in this process on one thread; their losses must be the same."""
    import torch

    from benchmarks.paired import Alternation, Ratio

    torch.set_num_threads(1)
    with _quiet(), _world_of_one(Path(config.run.dir or "")):
        trainer, bare = _trainer(config), _bare(config)
        losses: list[float] = []
        alternation = Alternation(lambda number: losses.append(bare(number)))
        trainer.sink = recorder = _After(trainer.sink, alternation.after_step, report, config.train.steps)
        trainer.run()
    _require_equal(recorder.losses, losses)
    own, others = alternation.own[WARM_UP:], alternation.others[WARM_UP:]
    clocks = {
        clock: ([getattr(spent, clock) for spent in own], [getattr(spent, clock) for spent in others])
        for clock in ("wall", "cpu")
    }
    return {
        "pairs": len(own),
        "largest_loss_difference": max(abs(a - b) for a, b in zip(recorder.losses, losses, strict=True)),
        "rows": {
            clock: {
                "trainer_seconds": statistics.median(over),
                "bare_seconds": statistics.median(under),
                "ratio": asdict(Ratio.of(over, under)),
            }
            for clock, (over, under) in clocks.items()
        },
    }


def table(config: Config, before: str, measured: dict[str, Any]) -> str:
    train = config.train
    lines = [
        f"one process, one thread, model {config.model.name}, {train.global_batch} sequences of "
        f"{config.data.seq_len} tokens per step, {train.dtype}; {measured['pairs']} alternating pairs; "
        f"load before: {before}",
        f"losses of all steps agree to {measured['largest_loss_difference']:.1e}",
        "",
        f"| clock | trainer, ms | bare loop, ms | ratio | upper 95 % bound | allowed {ALLOWED} |",
        "|---|---|---|---|---|---|",
    ]
    for clock, row in measured["rows"].items():
        ratio = row["ratio"]
        verdict = "kept" if ratio["upper"] <= ALLOWED else "broken"
        lines.append(
            f"| {clock} | {row['trainer_seconds'] * 1e3:.1f} | {row['bare_seconds'] * 1e3:.1f} "
            f"| {ratio['median']:.4f} | {ratio['upper']:.4f} | {verdict} |"
        )
    return "\n".join(lines)


class _After:
    """Calls the run's own sink, and then a function: the place where the loop lets others in."""

    def __init__(self, sink: Any, call: Callable[[], None], report: Report, steps: int) -> None:
        self._sink = sink
        self._call = call
        self._report = report
        self._steps = steps
        self.losses: list[float] = []

    def step(self, record: dict[str, Any]) -> None:
        self._sink.step(record)
        self.losses.append(record["loss"])
        self._report(len(self.losses), self._steps, "a step of the trainer and one of the bare loop")
        self._call()

    def close(self, summary: dict[str, Any]) -> None:
        self._sink.close(summary)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Lets only errors of the run be told meanwhile: warnings would tear the table."""
    logger = logging.getLogger("longctx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _world_of_one(folder: Path) -> Iterator[None]:
    import torch.distributed as dist

    store = dist.FileStore(str(folder / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        leave_world()


def _trainer(config: Config) -> Any:
    import torch

    from longctx.data import open_corpus
    from longctx.mesh import build_mesh
    from longctx.reporting.meter import Meter

    device = torch.device("cpu")
    corpus = open_corpus(config.data, config.model.vocab_size)
    meter = Meter(build_mesh(config.parallel, "cpu"), device, build.peak_memory(device))
    return build.build_trainer(config, None, corpus, meter)


def _bare(config: Config) -> Callable[[int], float]:
    """Returns the function from a step's number to its loss. Batches are made here, before any clock runs."""
    from benchmarks.bare_loop import BareBatch, BareLoop, PlainAttention
    from longctx.data import open_corpus
    from longctx.model import Decoder, initialize
    from longctx.train.learning_rate import LearningRate
    from longctx.train.optimizer import build_optimizer

    model = Decoder(config.model, PlainAttention(), config.train.loss_chunk)
    initialize(model, config.train.seed)
    loop = BareLoop(model, build_optimizer(model, config.optim), config.optim.grad_clip)
    schedule = LearningRate(config.optim, config.train.steps)
    loader = build.build_loader(config, open_corpus(config.data, config.model.vocab_size), 0, 1)
    ready = [[BareBatch.of(batch) for batch in loader.step(number)] for number in range(config.train.steps)]
    return lambda number: loop.step(ready[number - 1], schedule.rate(number))


def _require_equal(ours: Sequence[float], bare: Sequence[float]) -> None:
    for step, (one, other) in enumerate(zip(ours, bare, strict=True), start=1):
        if abs(one - other) > TOLERANCE * abs(other):
            raise NumericsError(
                f"step {step}: the trainer's loss {one} and the bare loop's {other} differ by more than "
                f"{TOLERANCE} of it; their times are not comparable"
            )
