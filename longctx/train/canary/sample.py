"""Shrinks a run to one layer per stage and to short sequences that are hard to get right.

The canary and ``longctx verify --mesh`` train on it.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from longctx.config import Config
from longctx.config.pipeline import nearest_microbatches
from longctx.linear import get_mixer
from longctx.sequence import IGNORE, Batch, Documents

SEED = 20_231_003
DIM = 32
VOCABULARY = 64
MICRO_BATCHES = 2  # the first spans all ranks with one document, the second has edges on theirs
DISTINCT = 4  # sequences; more data-parallel groups take them in turn
SHORTEST = 19  # tokens of a sequence
LARGEST_BLOCK = 4  # of the striped layout, and chunk: the run's own would put a short sequence on one rank, or in one


def seed_of(config: Config) -> int:
    """Returns the seed of weights and sequences."""
    return SEED + config.train.seed


def shrink(config: Config) -> Config:
    """Returns the same run with one layer per pipeline stage (and of each kind) and a few tokens per rank.

    A window shrinks in the same proportion. Head counts, head dimension and whatever else attention depends on stay.
    Wider initial weights make attention far from uniform, so that a wrong scale or mask shows.
    """
    attention = config.attention
    block = min(attention.layout_block, LARGEST_BLOCK)
    length = max(SHORTEST, 4 * config.parallel.sp * block + 3)
    # Tensor parallelism wants equal parts of both.
    vocabulary, hidden = (-(-size // config.parallel.tp) * config.parallel.tp for size in (VOCABULARY, 2 * DIM))
    mixer = None if config.model.mixer is None else get_mixer(config.model.mixer)
    by_blocks = mixer is not None and "mixer_block" in mixer.reads
    pattern = "".join(dict.fromkeys(config.model.pattern))  # each kind once
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary,
        "dim": DIM,
        "layers": max(config.parallel.stages, len(pattern)),
        "hidden_dim": hidden,
        "init_std": DIM**-0.5,
        "pattern": pattern,
        # Several blocks of those mixers that compute by blocks.
        "mixer_block": LARGEST_BLOCK if by_blocks else None,
    }
    # A window of one token would leave nothing to attend to.
    window, of_layers = (
        window and min(window, max(2, round(window * length / config.data.seq_len)))
        for window in (attention.window, config.model.window)
    )
    sizes["window"] = of_layers
    scans = mixer is not None and mixer.has_states
    chunk = min(attention.chunk, LARGEST_BLOCK) if scans else attention.chunk
    # More tiles than one on every rank, and a last one that is shorter.
    tile = None if config.train.mlp_chunk is None else 3
    return replace(
        config,
        model=replace(config.model, **sizes),
        attention=replace(attention, layout_block=block, window=window, chunk=chunk),
        data=replace(config.data, seq_len=length),
        train=replace(
            config.train, compile=False, loss_chunk=5, mlp_chunk=tile, micro_batch=min(2, config.train.micro_batch)
        ),
    )


def make_batches(config: Config, groups: int, count: int | None = None, step: int = 0) -> list[list[Batch]]:
    """Makes ``count`` micro-batches ``[micro_batch, S]`` of each data-parallel group of a shrunken configuration.

    None: as many as the pipeline's schedule takes. Each ``step`` has tokens of its own, and the next kind of sequence
    in each place.
    """
    rows, parallel = config.train.micro_batch, config.parallel
    if count is None:
        count = nearest_microbatches(parallel.pp_schedule, parallel.pp, MICRO_BATCHES)
    numbers = iter(range(groups * count * rows))
    return [
        [_stack([_sequence(config, next(numbers) + step, step) for _ in range(rows)]) for _ in range(count)]
        for _ in range(groups)
    ]


def _stack(sequences: list[Batch]) -> Batch:
    return Batch(
        torch.cat([sequence.tokens for sequence in sequences]),
        torch.cat([sequence.labels for sequence in sequences]),
        tuple(sequence.documents[0] for sequence in sequences),
    )


def _sequence(config: Config, number: int, step: int) -> Batch:
    """Makes sequence ``number`` modulo ``DISTINCT``: unequal valid tokens, on some rank perhaps none."""
    kind = number % DISTINCT
    length, world = config.data.seq_len, config.parallel.sp
    seed = seed_of(config) + DISTINCT * step + kind
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (1, length + 1), generator=generator)
    documents = _documents(kind, length, world) if config.attention.document_mask else Documents.single(length)
    labels = tokens[:, 1:].clone()
    labels[0, torch.from_numpy(documents.cu_seqlens[1:] - 1)] = IGNORE
    if kind % 2:
        labels[0, : max(1, length // max(2, world))] = IGNORE  # the first rank's under a contiguous cut
    return Batch(tokens[:, :-1].contiguous(), labels, (documents,))


def _documents(kind: int, length: int, world: int) -> Documents:
    """Makes one-token documents, long ones, and ones that end where a rank's contiguous chunk ends."""
    edges = [rank * length // world for rank in range(1, world)] or [length // 2]
    cuts = {
        0: [1],
        1: [*edges[::2], edges[0] + 1],
        2: [edges[-1], edges[-1] + 1],
        3: [*edges, length - 1],
    }[kind]
    bounds = sorted({0, length, *cuts})
    return Documents.from_lengths(stop - start for start, stop in pairwise(bounds))
