"""Runs the training loop: batches, steps, metrics, checkpoints, and an orderly stop. Who does each is given to it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

from longctx.checkpoint.agreement import this_rank
from longctx.checkpoint.checkpointer import Checkpointer, TrainState
from longctx.config import Config
from longctx.errors import RequeueError
from longctx.reporting.memory import StepMemory
from longctx.reporting.meter import Meter
from longctx.reporting.metrics import MetricsSink
from longctx.sequence import LocalBatch
from longctx.train.prefetcher import Prefetcher
from longctx.train.step import StepResult, TrainStep
from longctx.train.validation import Validation

_log = logging.getLogger(__name__)


@dataclass
class Trainer:
    """Trains a run to its end.

    ``state.step`` counts the optimizer steps that are done; the loop goes on from there.
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

    def __post_init__(self) -> None:
        # The second step of this process: the optimizer has its state by then, and FSDP2 has set itself up.
        self._measured_step = self.state.step + 2

    def run(self) -> None:
        """Takes all steps that are left.

        Raises ``RequeueError`` after a checkpoint when any rank was asked to stop, ``NumericsError`` when the
        run has diverged. The sink is closed in every case.
        """
        if self.state.step >= self.config.train.steps and this_rank() == 0:
            done, steps = self.state.step, self.config.train.steps
            _log.warning("step %d of %d is done already; raise train.steps to go on", done, steps)
        started = time.perf_counter()
        outcome = "failed"
        last: dict[str, Any] = {}
        try:
            outcome, last = self._loop()
        finally:
            self.prefetcher.close()
            if self.validation is not None:
                self.validation.close()
            self.sink.close(
                {
                    "outcome": outcome,
                    "steps": self.state.step,
                    "loss": last.get("loss"),
                    "skipped_updates": self.train_step.skipped,
                    "seconds": time.perf_counter() - started,
                }
            )
        if outcome == "stopped":
            raise RequeueError(
                f"asked to stop: saved step {self.state.step} of {self.config.train.steps} in "
                f"{self.config.run.dir}; go on with --resume run.dir={self.config.run.dir}"
            )

    def _loop(self) -> tuple[str, dict[str, Any]]:
        record: dict[str, Any] = {}
        steps, every = self.config.train.steps, self.config.checkpoint.every
        while self.state.step < steps:
            record, stop = self._step()
            self.sink.step(record | self._validated())
            done = self.state.step
            at_end = done == steps and self.config.checkpoint.at_end
            stop = stop and done < steps
            if at_end or stop or (every and done % every == 0):
                self.checkpointer.save(done, self.state)
            if stop:
                return "stopped", record
        return "finished", record

    def _validated(self) -> dict[str, Any]:
        """Measures the loss on held-out documents where it is due; what a step's record holds of it."""
        due = self.validation is not None and self.validation.is_due(self.state.step, self.config.train.steps)
        found = self.validation() if self.validation is not None and due else None
        return {
            "validation_loss": found and found.loss,
            "validation_seconds": found and found.seconds,
        }

    def _step(self) -> tuple[dict[str, Any], bool]:
        started = time.perf_counter()
        batches = self.prefetcher.take(more=self.state.step + 1 < self.config.train.steps)
        rate = self.state.scheduler.advance()
        result = self._train(batches, rate, self.state.step + 1)
        self.state.step += 1
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
        return record, observed.stop

    def _train(self, batches: list[LocalBatch], rate: float, step: int) -> StepResult:
        if self.memory is None or step != self._measured_step:
            return self.train_step(batches, rate, step)
        with self.memory.measured(self.train_step) as found:
            result = self.train_step(batches, rate, step)
        self.memory.write(found, step, self.meter.mesh)
        return result
