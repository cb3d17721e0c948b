"""Loads batches for one data-parallel rank, and keeps the one number that says where the run stands in its data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from longctx.config.resolve import require_even_batch
from longctx.data.balance import STREAM, deal_rows
from longctx.data.corpus import Int64
from longctx.data.mixing.mixture import Mixture
from longctx.data.packing import Packing
from longctx.errors import ConfigError, StorageError
from longctx.sequence import Batch

# What must not change between a checkpoint and its resumption, with the name a user knows it by.
IDENTITY = {
    "fingerprint": "corpus SHA-256",
    "documents": "documents in the corpus",
    "tokens": "tokens in the corpus",
    "tokenizer": "data.tokenizer",
    "seed": "train.seed",
    "seq_len": "data.seq_len",
    "packing": "how documents are packed and mixed",
    "chosen": "documents that data.validation.fraction leaves",
}
ALL = "all"
UNKNOWN = "unknown"  # what made the ids of a token file, where nothing beside it says so
BEFORE = {"packing": STREAM, "chosen": ALL}  # what checkpoints without it were taken with


class Loader:
    """Yields the micro-batches of one optimizer step after another, without end.

    A step takes the next ``global_batch`` samples of the packing, the same for every mesh. They are cut into
    ``dp_world`` equal consecutive slices; rank ``dp_rank`` takes its slice and cuts it, in order, into micro-batches.
    Where the packing is to be balanced, it takes those that even out attention work instead (``deal_rows``). Sequences
    are whole: the loader knows nothing of how the sequence is sharded.

    Raises ``ConfigError`` when the batch does not divide evenly.
    """

    def __init__(
        self, packing: Packing | Mixture, global_batch: int, dp_rank: int = 0, dp_world: int = 1, micro_batch: int = 1
    ) -> None:
        assert 0 <= dp_rank < dp_world, f"rank {dp_rank} of {dp_world}"
        require_even_batch(global_batch, dp_world, micro_batch)
        self.packing = packing
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.next_sample = 0  # global index of the first sample of the next step
        self._rank = dp_rank
        self._world = dp_world
        # Taken now rather than at the first checkpoint: it must tell what the run was trained on.
        self._identity: dict[str, str | int] = {
            "fingerprint": packing.corpus.fingerprint,
            "documents": len(packing.corpus),
            "tokens": packing.corpus.total_tokens,
            "tokenizer": packing.corpus.tokenizer or UNKNOWN,
            "seed": packing.seed,
            "seq_len": packing.seq_len,
            "packing": packing.order,
            "chosen": ALL if packing.chosen is None else len(packing.chosen),
        }

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        batches = self.batches(self.next_sample)
        self.advance()
        return batches

    def advance(self) -> None:
        """Notes that the next step's batches have been used, whoever read them."""
        self.next_sample += self.global_batch

    def step(self, number: int) -> list[Batch]:
        """Reads the micro-batches of step ``number`` (from 0) of a run that never changed its global batch."""
        return self.batches(number * self.global_batch)

    def batches(self, first_sample: int) -> list[Batch]:
        """Reads this rank's micro-batches of the step that starts at a global sample: ``[micro_batch, S]`` each."""
        return [self._batch((first_sample + rows).tolist()) for rows in self.rows(first_sample)[self._rank]]

    def rows(self, first_sample: int) -> Int64:
        """Returns who takes which sample of the step, ``[dp_world, micro-batches, micro_batch]``, from its first on."""
        rows = np.arange(self.global_batch)
        if self.packing.balance is None:
            return rows.reshape(self._world, -1, self.micro_batch)
        works = np.array([self.packing.work(first_sample + row) for row in rows.tolist()], dtype=np.int64)
        return deal_rows(works, self._world, self.micro_batch)

    def _batch(self, samples: list[int]) -> Batch:
        tokens, labels, documents = zip(*map(self.packing.sample, samples), strict=True)
        return Batch(torch.from_numpy(np.stack(tokens)), torch.from_numpy(np.stack(labels)), documents)

    def state_dict(self) -> dict[str, str | int]:
        """Returns plain JSON values, equal on all ranks: the next global sample and what identifies the data."""
        return {"next_sample": self.next_sample, **self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Makes the loader go on where ``state`` was taken, on any mesh.

        Raises ``ConfigError`` with the differences when corpus, seed or sequence length have changed, and
        ``StorageError`` when ``state`` is not one of ours.
        """
        # Checkpoints of before say nothing of it, and the ids themselves have to be the same.
        state = {**BEFORE, "tokenizer": self._identity["tokenizer"], **state}
        missing = sorted({"next_sample", *IDENTITY} - set(state))
        position = state.get("next_sample")
        if missing or type(position) is not int or position < 0:
            raise StorageError(
                f"the data position of the checkpoint is damaged: missing {missing}, next_sample {position!r}"
                "; resume from another checkpoint"
            )
        changed = [
            f"{name}: {state[key]!r} in the checkpoint, {self._identity[key]!r} now"
            for key, name in IDENTITY.items()
            if state[key] != self._identity[key]
        ]
        if changed:
            raise ConfigError(
                f"the data are not those of the checkpoint ({'; '.join(changed)}): resuming would repeat or "
                "miss samples; restore these, or start a new run from these weights by init.from=RUN"
            )
        self.next_sample = position
