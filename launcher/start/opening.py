"""Tells how a run begins: what it checks, what it will do. The same facts stand in ``environment.json``."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from longctx.checkpoint.checkpointer import TrainState
from longctx.config import Config, DataConfig, simulated_world_size
from longctx.data import Corpus
from longctx.data.corpus import Int64
from longctx.data.long_documents import count_long
from longctx.data.mixing.mixture import Mixture
from longctx.launcher.run_directory import directory_of
from longctx.mesh import Mesh
from longctx.reporting.meter import Meter
from longctx.reporting.provenance import write_environment
from longctx.reporting.run_facts import RunFacts, Work
from longctx.reporting.teller import Teller
from longctx.train.canary.check import run_canary

_log = logging.getLogger(__name__)


class Opening:
    """Tells how a run begins, on rank 0 of a run that tells anything; every rank calls all of it."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._first = dist.get_rank() == 0
        self._teller = Teller(silent=not (self._first and config.logger.progress))
        self._verdict: dict[str, Any] | None = None

    @contextlib.contextmanager
    def stage(self, what: str) -> Iterator[None]:
        """Says what begins, and how long it took."""
        with self._teller.stage(what):
            yield

    def run_canary(self, mesh: Mesh, device: torch.device) -> None:
        """Runs the canary, unless it is switched off."""
        if not self._config.train.canary:
            self._teller.say("canary: left out, train.canary=false")
            return
        with self.stage("canary: comparing one tiny step with the dense single-device step"):
            self._verdict = run_canary(self._config, mesh, device)

    def tell(self, corpus: Corpus, state: TrainState, meter: Meter) -> dict[str, Any]:
        """Tells what the run will do, writes it into ``environment.json``, and returns it as plain JSON values."""
        config = self._config
        left = max(0, config.train.steps - state.step) * config.train.global_batch
        packing = state.loader.packing
        documents = len(corpus) if packing.chosen is None else len(packing.chosen)
        samples = state.loader.next_sample + left
        work = Work(
            documents=documents,
            held_out=len(corpus) - documents,
            tokens=packing.epoch_tokens,
            done=state.step,
            samples=samples,
            command=command_of(config),
            sources=tuple(one.facts for one in packing.usage(samples)) if isinstance(packing, Mixture) else (),
        )
        facts = RunFacts.of(config, meter.mesh, meter.device, state.model, work)
        if self._first:
            data = _data_summary(config.data, corpus, packing.chosen)
            write_environment(directory_of(config), self._verdict, data, facts.to_dict())
        for line in facts.lines():
            self._teller.say(line)
        return facts.to_dict()


def command_of(config: Config) -> str:
    """Returns the command, with its own options, that starts such a run."""
    ranks = simulated_world_size(config)
    if config.comm.backend == "sim" or ranks == 1:
        return "longctx train"
    return f"longctx launch --nproc {ranks}" if config.cluster.nodes == 1 else "longctx submit"


def _data_summary(config: DataConfig, corpus: Corpus, chosen: Int64 | None) -> dict[str, Any]:
    """Returns what the run is trained on, and warns of what was left out."""
    if corpus.skipped_empty:
        _log.warning("data: %d empty documents are left out, %d remain", corpus.skipped_empty, len(corpus))
    for key, words in (("left_out", "left out"), ("noted", "noted")):
        counted = ", ".join(f"{count} {what}" for what, count in corpus.facts.get(key, {}).items())
        if counted:
            _log.warning("data: %s: %s", words, counted)
    long = count_long(config, corpus, chosen)
    if long["tokens_left_out"]:
        _log.warning(
            "data: %d documents are longer than data.seq_len=%d; data.long_documents=%s leaves out %d tokens of them",
            *(long["documents"], config.seq_len, long["policy"], long["tokens_left_out"]),
        )
    counts = {"documents": len(corpus), "tokens": corpus.total_tokens, "skipped_empty": corpus.skipped_empty}
    return {**counts, "sha256": corpus.fingerprint, "long_documents": long, **corpus.facts}
