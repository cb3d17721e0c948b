"""Checks before the first step that every rank turns queries and keys as the configured RoPE says.

A rank that counted positions from its own first token, or took another table, would train on wrong distances in
silence. So each rank cuts a sequence whose tokens are their own global positions, and applies what its layers apply.
It compares that with cosine and sine in Python's own fp64, at the positions that the tokens name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.comm.rank_numbers import gather_numbers
from longctx.config import Config
from longctx.config.sections.model import SOFTMAX_KINDS
from longctx.errors import NumericsError
from longctx.mesh import Mesh
from longctx.model import Decoder
from longctx.model.rotary import Rotation, apply_rotary
from longctx.parallel.data import compute_dtype
from longctx.parallel.pipeline import Pipeline, decoders
from longctx.rope import Table
from longctx.sequence import IGNORE, Batch, Documents
from longctx.train.batch_sharder import BatchSharder

SAMPLES = 64  # positions of each document that a rank compares; more would show nothing more
# Of a cosine or sine, which a rank rounds once and multiplies by the attention factor.
TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-9}


@dataclass(frozen=True)
class Wrong:
    """One value that a rank applies otherwise than the configuration says."""

    layer: int
    position: int
    channel: int
    applied: float
    expected: float


def check_positions(config: Config, model: Decoder | Pipeline, mesh: Mesh, device: torch.device) -> None:
    """Raises ``NumericsError`` on all ranks, naming layer, rank and position, where any of them is wrong."""
    wrong = next(_wrong(config, model, mesh, device), None)
    numbers = [0.0] * 6
    if wrong is not None:
        numbers = [1.0, wrong.layer, wrong.position, wrong.channel, wrong.applied, wrong.expected]
    for rank, (found, layer, position, channel, applied, expected) in enumerate(
        gather_numbers(numbers, mesh.world_group, device)
    ):
        if found:
            kind = config.model.kinds[int(layer)]
            raise NumericsError(
                f"positions: layer {int(layer)} of rank {rank} turns channel {int(channel)} at position "
                f"{int(position)} of its document to {applied:.9g}, and model.rope of its kind ({kind}: "
                f"{config.model.rope_of(kind).type}) says {expected:.9g}. This run would train on wrong distances; "
                "report it"
            )


def _wrong(config: Config, model: Decoder | Pipeline, mesh: Mesh, device: torch.device) -> Iterator[Wrong]:
    """Yields what this rank applies wrongly, in all layers of softmax attention that it holds."""
    places, positions = _held(config, mesh, device)
    dtype = torch.promote_types(compute_dtype(config.train.dtype), torch.float32)
    for decoder in decoders(model):
        turns = decoder.rotations(positions, compute_dtype(config.train.dtype))
        seen: dict[tuple[str, str], Wrong | None] = {}
        for name, block in decoder.blocks.named_children():
            own, wanted = str(block.kind), config.model.kinds[int(name)]
            if wanted not in SOFTMAX_KINDS:
                continue
            if (own, wanted) not in seen:
                section = config.model.rope_of(wanted)
                table = section.table(config.model.rope_theta, config.model.head_dim)
                seen[own, wanted] = _compared(turns[own], table, places, config.model.head_dim, dtype, device)
            wrong = seen[own, wanted]
            if wrong is not None:
                yield Wrong(int(name), wrong.position, wrong.channel, wrong.applied, wrong.expected)


def _held(config: Config, mesh: Mesh, device: torch.device) -> tuple[list[int], Tensor]:
    """Returns places in their documents that this rank holds, and the positions ``[1, n]`` that it gives them.

    The sequence is one document, and where the run packs documents two, of which the second begins anew.
    """
    length = config.data.seq_len
    cut = length // 3 if config.attention.document_mask else 0
    documents = Documents.from_lengths([one for one in (cut, length - cut) if one])
    names = torch.arange(length)[None]
    local = BatchSharder.of(config, mesh, device)(Batch(names, names, (documents,)))
    labels = local.labels[0].cpu()
    rows = [
        held[torch.linspace(0, len(held) - 1, min(SAMPLES, len(held))).round().long()]
        for held in ((part & (labels != IGNORE)).nonzero()[:, 0] for part in (labels < cut, labels >= cut))
        if len(held)
    ]
    chosen = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)
    places = [place - cut if place >= cut else place for place in labels[chosen].tolist()]
    return places, local.positions[:, chosen.to(device)]


def _compared(
    turn: Rotation, table: Table, places: list[int], head_dim: int, dtype: torch.dtype, device: torch.device
) -> Wrong | None:
    """Returns the first value that is wrong: the first of each pair of channels is 1 before it turns, the second 0."""
    pairs = len(table.frequencies)
    probe = torch.ones(1, len(places), 1, head_dim, dtype=dtype, device=device)
    probe[..., pairs : 2 * pairs] = 0.0
    applied = apply_rotary(probe, turn)[0, :, 0].tolist()
    tolerance = TOLERANCES[dtype] * max(1.0, table.factor)
    for place, values in zip(places, applied, strict=True):
        angles = [place * frequency for frequency in table.frequencies]
        expected = [math.cos(angle) * table.factor for angle in angles]
        expected += [math.sin(angle) * table.factor for angle in angles] + [1.0] * (head_dim - 2 * pairs)
        for channel, (value, wanted) in enumerate(zip(values, expected, strict=True)):
            if not abs(value - wanted) <= tolerance:
                return Wrong(0, place, channel, value, wanted)
    return None
