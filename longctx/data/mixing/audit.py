"""Counts what a run would be trained on: sources and epochs, usable context, cuts and attention work."""

from __future__ import annotations

from typing import Any

import numpy as np

from longctx.config import Config
from longctx.data.balance import Balance
from longctx.data.corpus import Corpus
from longctx.data.loader import Loader
from longctx.data.long_documents import count_long
from longctx.data.mixing.mixture import Mixture
from longctx.data.source import Report, unreported
from longctx.data.tokenizing.summary import histogram

MOST_STEPS = 512  # that are looked at; of more, so many that lie evenly


def audit(
    config: Config, corpus: Corpus, loader: Loader, report: Report = unreported, most_steps: int = MOST_STEPS
) -> dict[str, Any]:
    """Returns what the run's steps read, as JSON values. ``loader``: of the first data-parallel group.

    Of more than ``most_steps`` steps as many are looked at, and ``sampled`` says so.
    """
    packing, steps = loader.packing, config.train.steps
    sequences = steps * loader.global_batch
    looked = np.unique(np.linspace(0, steps - 1, min(steps, most_steps)).astype(np.int64)).tolist()
    return {
        "source": config.data.source,
        "documents": len(corpus),
        "tokens": corpus.total_tokens,
        "seq_len": packing.seq_len,
        "steps": steps,
        "sequences": sequences,
        "sources": _sources(config, corpus, loader, sequences),
        "sampled": len(looked) < steps,
        "sequences_looked_at": len(looked) * loader.global_batch,
        **_looked_at(loader, looked, config.attention.window, report),
        "lengths": [{key: one[key] for key in ("from", "documents", "tokens")} for one in histogram(corpus.lengths)],
        "long_documents": count_long(config.data, corpus, packing.chosen),
    }


def _looked_at(loader: Loader, looked: list[int], window: int | None, report: Report) -> dict[str, Any]:
    """Counts context, cuts, padding and attention work of the sequences of some steps."""
    packing, batch = loader.packing, loader.global_batch
    levels = [1 << power for power in range(packing.seq_len.bit_length())]
    beyond, pieces, cut, tokens = np.zeros(len(levels), dtype=np.int64), 0, 0, 0
    works, balances, count = list[int](), list[float](), Balance(window=window)
    for number, step in enumerate(looked):
        report(number, len(looked), "steps looked at")
        own = []
        for index in range(step * batch, (step + 1) * batch):
            found = np.array(packing.pieces(index), dtype=np.int64)
            lengths = found[:, 1] - found[:, 0]
            pieces, cut = pieces + len(found), cut + int(np.count_nonzero(found[:, 1] < found[:, 2]))
            tokens += int(lengths.sum())
            lengths = lengths if packing.document_mask else np.array([lengths.sum()])
            own.append(int(count.cells(lengths).sum()))
            beyond += [int(np.maximum(lengths - 1 - level, 0).sum()) for level in levels]
        dealt = np.array(own)[loader.rows(step * batch)].sum(axis=(1, 2))
        works += own
        balances.append(float(dealt.max() / dealt.mean()))
    work = np.array(works, dtype=np.float64)
    return {
        "usable_context": {str(level): int(n) / tokens for level, n in zip(levels, beyond, strict=True)},
        "pieces": pieces,
        "cut_pieces": cut,
        "padding": 1 - tokens / (len(works) * packing.seq_len),
        "work": {
            "mean": float(work.mean()),
            "p50": float(np.percentile(work, 50)),
            "p99": float(np.percentile(work, 99)),
            "max_over_mean": float(work.max() / work.mean()),
            "balance_over_dp": float(np.mean(balances)),
        },
    }


def _sources(config: Config, corpus: Corpus, loader: Loader, sequences: int) -> list[dict[str, Any]]:
    packing = loader.packing
    if isinstance(packing, Mixture):
        return [one.facts for one in packing.usage(sequences)]
    epochs = sequences * packing.seq_len / packing.epoch_tokens
    return [
        {
            "name": config.data.source,
            "documents": packing.documents,
            "tokens": packing.epoch_tokens,
            "share": 1.0,
            "sequences": sequences,
            "epochs": epochs,
        }
    ]
