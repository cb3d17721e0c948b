"""Runs the training loop: batches, steps, metrics, checkpoints, and an orderly stop. Who does each is given to it."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from longctx.checkpoint.agreement import this_rank
from longctx.checkpoint.checkpointer import Checkpointer
from longctx.checkpoint.state import live_tensors
from longctx.checkpoint.train_state import StateAtRest, TrainState
from longctx.comm.rank_numbers import gather_numbers
from longctx.config import Config
from longctx.errors import LongctxError, NumericsError, RequeueError
from longctx.reporting.memory import StepMemory
from longctx.reporting.meter import Meter
from longctx.reporting.metrics import MetricsSink
from longctx.reporting.observation import Observation
from longctx.sequence import LocalBatch
from longctx.train.inside_step import InsideStep, Stopping
from longctx.train.prefetcher import Prefetcher
from longctx.train.step import StepResult, TrainStep
from longctx.train.validation import Validation

_log = logging.getLogger(__name__)


@dataclass
class Trainer:
    """Trains a run to its end.

    ``state.step`` counts the optimizer steps that are done; the loop goes on from there. ``stop``: how the run is
    stopped inside a step; None: only between two.
    """

    config: Config
    state: TrainState
    train_step: TrainStep
    prefetcher: Prefetcher
    meter: Meter
    checkpointer: Checkpointer
    sink: MetricsSink
    memory: StepMemory | None = None
    validation: Validation | None = None
    stop: Stopping | None = None

    def __post_init__(self) -> None:
        # The second step of this process: the optimizer has its state by then, and FSDP2 has set itself up.
        self._measured_step = self.state.step + 2
        self._started = time.perf_counter()
        self._pending: dict[str, Any] = {}
        self._last: dict[str, Any] = {}
        self._closing = threading.Lock()
        self._closed = False
        self._save_due = False

    def run(self) -> None:
        """Takes all steps that are left.

        Raises ``RequeueError`` after a checkpoint when any rank was asked to stop, ``NumericsError`` when the
        run has diverged. The sink is closed in every case.
        """
        if self.state.step >= self.config.train.steps and this_rank() == 0:
            done, steps = self.state.step, self.config.train.steps
            _log.warning("step %d of %d is done already; raise train.steps to go on", done, steps)
        self._started = time.perf_counter()
        outcome = "failed"
        try:
            with self._stoppable() as inside:
                outcome = self._loop(inside)
        except NumericsError as error:
            advice = self.checkpointer.distrust()
            raise NumericsError(f"{error}; {advice}" if advice else str(error)) from error
        finally:
            self.prefetcher.close()
            if self.validation is not None:
                self.validation.close()
            self._close(outcome, self.state.step)
        if outcome == "stopped":
            raise self._requeue(self.state.step)

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[InsideStep | None]:
        """Takes requests to stop while the loop runs, in the middle of a step as well."""
        if self.stop is None:
            yield None
            return
        rest = StateAtRest.of(self.state)
        settle = partial(gather_numbers, [0.0], self.meter.mesh.world_group, self.meter.device)
        inside = InsideStep(self.stop, rest, self.meter.device, self._save_inside, settle)
        self.train_step.before_update = inside.change
        try:
            with self.stop.working(self._doing if this_rank() == 0 else None):
                yield inside
        except Exception:
            # Where the run was stopped meanwhile, a rank that has ended is what this one stumbled over.
            if inside.error is not None:
                raise inside.error from None
            raise
        finally:
            inside.close()

    def _loop(self, inside: InsideStep | None) -> str:
        steps, every = self.config.train.steps, self.config.checkpoint.every
        live = live_tensors(self.state.model)
        self._restart_clock()
        while self.state.step < steps:
            self._pending, observed = self._step()
            done = self.state.step
            last, stop = done == steps, observed.stop and done < steps
            rest = StateAtRest.of(self.state, live)
            measured = {} if stop else self._validated(inside, rest)
            self._record(measured)
            self._save_due |= observed.save or bool(every and done % every == 0)
            # A step that was not finite leaves the weights that made it so: they are not worth a checkpoint.
            sound = not self.train_step.skipped_in_a_row
            if (last and self.config.checkpoint.at_end) or stop or (self._save_due and sound):
                self.checkpointer.save(done, rest, doubtful=not sound)
                self._restart_clock()
            if stop:
                return "stopped"
            if inside is not None:
                inside.rest(rest, last)
        return "finished"

    def _validated(self, inside: InsideStep | None, rest: StateAtRest) -> dict[str, Any]:
        """Measures the loss on held-out documents where it is due; what a step's record holds of it.

        That may take long and changes nothing, so it can be stopped as a step can.
        """
        if self.validation is None or not self.validation.is_due(self.state.step, self.config.train.steps):
            return {}
        if inside is not None:
            inside.rest(rest, last=False)
        found = self.validation()
        if inside is not None:
            inside.change()
        return {"validation_loss": found.loss, "validation_seconds": found.seconds}

    def _record(self, measured: Mapping[str, Any]) -> None:
        """Records the latest step, once; ``measured``: what of it is not known of every step."""
        if self._pending:
            self._last, self._pending = self._pending, {}
            self.sink.step({**self._last, "validation_loss": None, "validation_seconds": None, **measured})

    def _restart_clock(self) -> None:
        """Begins to count the minutes until the next checkpoint anew."""
        self._save_due = False
        minutes = self.config.checkpoint.every_minutes
        until = time.monotonic() + 60 * minutes if minutes else math.inf
        self.meter.save = lambda: time.monotonic() >= until

    def _save_inside(self, rest: StateAtRest) -> LongctxError:
        """Saves, from another thread, a state that a running step will not change; returns why the run ends."""
        if self.checkpointer.latest != rest.step:
            self.checkpointer.save(rest.step, rest, doubtful=self.train_step.skipped_in_a_row > 0)
        self._record({})
        self._close("stopped", rest.step)
        return self._requeue(rest.step, "; what was running after it is dropped")

    def _requeue(self, step: int, more: str = "") -> RequeueError:
        run_dir = self.config.run.dir
        return RequeueError(
            f"asked to stop: saved step {step} of {self.config.train.steps} in {run_dir}{more}; "
            f"go on with --resume run.dir={run_dir}"
        )

    def _doing(self) -> str:
        assert self.stop is not None
        step = self.state.step + 1
        return f"stopping: saving step {step}, or what is before it if it takes over {self.stop.patience:.0f} s more"

    def _close(self, outcome: str, step: int) -> None:
        """Closes the sink once: the thread that saves inside a step does it where the step does not end."""
        with self._closing:
            closed, self._closed = self._closed, True
        if not closed:
            self.sink.close(
                {
                    "outcome": outcome,
                    "steps": step,
                    "loss": self._last.get("loss"),
                    "skipped_updates": self.train_step.skipped,
                    "seconds": time.perf_counter() - self._started,
                }
            )

    def _step(self) -> tuple[dict[str, Any], Observation]:
        started = time.perf_counter()
        batches = self.prefetcher.take(more=self.state.step + 1 < self.config.train.steps)
        rate = self.state.scheduler.advance()
        result = self._train(batches, rate, self.state.step + 1)
        self.state.step += 1
        if not result.skipped:
            self.checkpointer.confirm()
        observed = self.meter.observe(batches)
        seconds = time.perf_counter() - started
        record = {
            "step": self.state.step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": rate,
            "tokens": observed.tokens,
            "tokens_per_second": observed.tokens / seconds,
            "step_seconds": seconds,
            "flops": self.meter.flops(self.config, observed.tokens, observed.cells),
            "mfu_causal": self.meter.utilization(self.config, observed.tokens, observed.cells, seconds),
            "mfu_full": self.meter.utilization(self.config, observed.tokens, observed.full_cells, seconds),
            "memory_peak_bytes": observed.memory_peak_bytes,
            "comm_bytes": observed.comm_bytes,
            "comm_bytes_between_nodes": observed.comm_bytes_between_nodes,
            "balance": observed.balance,
            "work_by_rank": observed.work,
            "bytes_by_rank": observed.bytes,
            "bytes_between_nodes_by_rank": observed.bytes_between_nodes,
            "straggler_tokens": observed.straggler,
            "padding": observed.padding,
        }
        return record, observed

    def _train(self, batches: list[LocalBatch], rate: float, step: int) -> StepResult:
        if self.memory is None or step != self._measured_step:
            return self.train_step(batches, rate, step)
        with self.memory.measured(self.train_step) as found:
            result = self.train_step(batches, rate, step)
        self.memory.write(found, step, self.meter.mesh)
        return result
