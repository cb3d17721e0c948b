"""Measures the loss on documents that are held out: forward alone, the same tokens whatever the mesh."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from longctx.comm.rank_numbers import gather_numbers
from longctx.config import Config
from longctx.data import Corpus
from longctx.data.held_out import HeldOut, open_held_out, packing_of
from longctx.engines import Engine
from longctx.mesh import Mesh
from longctx.parallel.core import prepare_of
from longctx.train.batch_sharder import BatchSharder
from longctx.train.prefetcher import Prefetcher


@dataclass(frozen=True)
class ValidationResult:
    """Tells what a validation came to, equal on all ranks.

    ``loss``: per valid token, as a step's; None when no token had a label.
    """

    loss: float | None
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Validation:
    """Validates every so many steps, and after the last one.

    ``prefetcher``: of the microbatches of ``held_out``. ``every``: steps; 0 for only after the last.
    """

    engine: Engine
    mesh: Mesh
    device: torch.device
    held_out: HeldOut
    prefetcher: Prefetcher
    every: int

    def is_due(self, done: int, steps: int) -> bool:
        """Returns whether a validation follows the step after which ``done`` of ``steps`` are done."""
        return done == steps or (self.every > 0 and done % self.every == 0)

    def __call__(self) -> ValidationResult:
        """Takes one pass over the held-out documents; all ranks call it together."""
        started = time.perf_counter()
        loss, valid = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for left in range(self.held_out.steps, 0, -1):
            batches = self.prefetcher.take(more=left > 1)
            valid += sum(batch.valid_tokens for batch in batches)
            loss += self.engine.evaluate(batches).double()
        # As in a training step: ranks with the same tokens have the same loss, and one of them counts.
        own = loss.item() if self.mesh.leads_tensor else 0.0
        count = int(sum(row[0] for row in gather_numbers([valid], self.mesh.token_group, self.device)))
        total = sum(row[0] for row in gather_numbers([own], self.mesh.world_group, self.device))
        return ValidationResult(total / count if count else None, count, time.perf_counter() - started)

    def close(self) -> None:
        """Waits for what is being read and throws it away."""
        self.prefetcher.close()


def open_validation(
    config: Config, corpus: Corpus, mesh: Mesh, device: torch.device, engine: Engine
) -> Validation | None:
    """Opens what measures the loss on held-out documents; None where the run holds none out.

    ``corpus``: what the run is trained on, of which a part may be held out.
    """
    asked, train = config.data.validation, config.train
    if not asked.wanted:
        return None
    held, chosen = open_held_out(config.data, corpus, config.model.vocab_size)
    packing = packing_of(held, chosen, config.data.seq_len, config.attention.document_mask)
    held_out = HeldOut(packing, train.global_batch, mesh.data_rank, mesh.data_size, train.micro_batch, asked.sequences)
    prefetcher = Prefetcher(held_out, BatchSharder.of(config, mesh, device), prepare_of(config, mesh))
    return Validation(engine, mesh, device, held_out, prefetcher, asked.every)
