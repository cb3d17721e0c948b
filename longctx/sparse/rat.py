"""RAT: a gated recurrence inside chunks, softmax attention over the states at their ends.

Wei, Yadav, Pascanu and Gulcehre, "RAT: Bridging RNN Efficiency and Attention Accuracy via Chunk-based Sequence
Modeling" (2025). Chunks of C tokens count from a document's start; with t in chunk c, g in (0, 1) by channel:

    k~[t] = g[t] * k~[t-1] + (1 - g[t]) * k[t]      v~[t] likewise; both start anew, from 0, in every chunk
    o[t]  = softmax over {ends of chunks before c of the document, t itself} of (q[t] . k~ / sqrt(K)), applied to v~

The paper's form, but for its rotary embedding: layers of mixers rotate nothing. The output gate is the block's.

    fetch the earlier tokens of my chunks           the same, then gradients backwards:
    k~, v~ at my tokens                             of the ends, which return to their owners
    gather k~, v~ at the ends of chunks             of k~, v~ through the recurrence
    attend to earlier ends, merge with own state    those of fetched tokens return too
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longctx.attention.runtime.borders import HANDLE, require_gradient, require_plain
from longctx.attention.runtime.local_kernel import kernel_for
from longctx.attention.runtime.operator import QKV, out_and_lse, require_fit
from longctx.attention.runtime.partial import Partial, accumulation_dtype
from longctx.comm import group_named
from longctx.errors import ConfigError
from longctx.linear.mixer import HeadDims, LinearCore, Mixer, no_constants, no_parameters, nothing_to_fill
from longctx.operators import Gradient, define_operator
from longctx.rules import whole
from longctx.sequence import Documents, SequencePlan, TileSet, plan_of, view
from longctx.sequence.tiles import group_rows, tiles_of
from longctx.sparse.document_blocks import Shard, blocks_of, require_alike, shard_of
from longctx.sparse.row_exchange import RowExchange


def attend_chunks(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, plan: Tensor, group: str, chunk: int) -> Tensor:
    """Computes RAT of the local tokens. Padding is 0.

    q, k, v and gate (in (0, 1)) and the result are ``[B, T/SP, H/TP, D]``.
    """
    require_plain((("q", q), ("k", k), ("v", v), ("gate", gate), (HANDLE, plan)))
    out: Tensor = _attend(q, k, v, gate, plan, group, chunk)[0]
    return out


@dataclass(frozen=True, eq=False)
class RatChunks:
    """Holds what one rank needs to know of a plan's chunks.

    ``near``: fetches the earlier tokens of the rank's chunks. ``grid`` ``[chunks * C]``: which of them is the l-th of a
    chunk. Where there is none, it is some other of that chunk: no own token comes after it. ``own`` ``[n]``: cells of
    the grid that hold the rank's own tokens. ``ends``: fetches the last tokens of chunks; ``tiles``: who sees which.
    """

    shard: Shard
    near: RowExchange
    grid: Tensor
    own: Tensor
    ends: RowExchange
    tiles: tuple[TileSet, ...]


@view
def chunks_of(plan: SequencePlan, rank: int, chunk: int, device: torch.device) -> RatChunks:
    """Returns what a rank needs to know of a plan's chunks of ``chunk`` tokens."""
    blocks = blocks_of(plan.documents, plan.length, chunk)
    held = [shard_of(plan, one, torch.device("cpu")).places for one in range(plan.world)]
    near, far = [], []
    all_ends = blocks.stops[blocks.followed] - 1
    for its in held:
        touched, firsts = np.unique(blocks.of(its)[::-1], return_index=True)
        near.append(blocks.places(touched, its[::-1][firsts] + 1))  # up to its last token of each
        seen = np.zeros(len(blocks.starts) + 1, dtype=np.int64)
        np.add.at(seen, blocks.first[touched], 1)
        np.add.at(seen, touched, -1)
        far.append(all_ends[np.cumsum(seen)[blocks.followed] > 0])
    mine = blocks.of(held[rank])
    touched, cell = np.unique(mine, return_inverse=True)
    first = np.searchsorted(near[rank], blocks.starts[touched])
    count = np.diff(np.append(first, len(near[rank])))
    grid = first[:, None] + np.minimum(np.arange(chunk), count[:, None] - 1)
    own = cell * chunk + held[rank] - blocks.starts[mine]
    tiles = tiles_of(blocks.starts[blocks.first[mine]], blocks.starts[mine], far[rank], blocks.first[mine])
    return RatChunks(
        shard_of(plan, rank, device),
        RowExchange(held, near, rank, device),
        torch.from_numpy(grid.reshape(-1)).to(device),
        torch.from_numpy(own).to(device),
        RowExchange(held, far, rank, device),
        group_rows([tiles]),
    )


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, plan: Tensor, group: str, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out, lse, and the rank's own states ``[B, T/SP, H, 2 D]``, the latter two for the backward pass."""
    sequence, ranks = plan_of(plan), group_named(group)
    require_alike(q, k, v, gate)
    require_fit(q, sequence, ranks)
    chunks = chunks_of(sequence, ranks.rank, chunk, q.device)
    x, queries = chunks.shard.pack(torch.cat((k, v, gate), -1)), chunks.shard.pack(q)
    near = chunks.near.arrange(chunks.near.fetch(x, ranks))
    states = _recur(*_on_grid(near, chunks, chunk))[0].flatten(0, 1).index_select(0, chunks.own)[None].to(q.dtype)
    coming = chunks.ends.fetch(states, ranks)
    own_keys, own_values = states.chunk(2, -1)
    partial = Partial(queries)
    scale, dtype = q.shape[-1] ** -0.5, partial.lse.dtype
    own = (queries.to(dtype) * own_keys).sum(-1) * scale
    keys, values = chunks.ends.arrange(coming).chunk(2, -1)
    kernel_for("auto", q, k).forward(queries, keys, values, chunks.tiles, scale, partial)
    partial.merge(slice(0, 1), slice(0, own.shape[1]), own_values, own)
    unpack = chunks.shard.unpack
    return unpack(partial.out, q), unpack(partial.lse, q.to(dtype)), unpack(states, q)


def run_backward(dout: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns dq, dk, dv and the gradient of the gate.

    ``given``: q, k, v, gate, out, lse and states of the forward pass, and its context.
    """
    *saved, plan, group, chunk = given
    sequence, ranks = plan_of(plan), group_named(group)
    q, k, v, gate, out = saved[:5]
    require_gradient(dout, out)
    chunks = chunks_of(sequence, ranks.rank, chunk, q.device)
    pack, wide = chunks.shard.pack, accumulation_dtype(q.dtype)
    dout, queries, out, lse, states = (pack(one) for one in (dout, q, *saved[4:]))
    coming_ends = chunks.ends.fetch(states, ranks)
    coming_near = chunks.near.fetch(pack(torch.cat((k, v, gate), -1)), ranks)
    scale = q.shape[-1] ** -0.5
    dq, dstates = _through_own_state(dout.to(wide), queries.to(wide), out, lse, states, scale)
    ends = chunks.ends.arrange(coming_ends)
    dends = torch.zeros_like(ends, dtype=wide)
    (keys, values), (dkeys, dvalues) = ends.chunk(2, -1), dends.chunk(2, -1)
    kernel_for("auto", q, k).backward(dout, queries, keys, values, out, lse, chunks.tiles, scale, (dq, dkeys, dvalues))
    going = chunks.ends.send_gradients(dends, ranks)
    near = chunks.near.arrange(coming_near)
    inputs, gates = _on_grid(near, chunks, chunk)
    before = _recur(inputs, gates)[1]
    dstates += chunks.ends.total(going)
    on_grid = inputs.new_zeros(inputs.shape).flatten(0, 1).index_copy_(0, chunks.own, dstates[0]).view_as(inputs)
    dgrid = _recur_back(on_grid, inputs, gates, before)
    dnear = torch.zeros_like(near[0], dtype=wide).index_add_(0, chunks.grid, dgrid.flatten(0, 1))
    dx = chunks.near.total(chunks.near.send_gradients(dnear[None], ranks))
    dk, dv, dgate = (chunks.shard.unpack(one, k) for one in dx.chunk(3, -1))
    return chunks.shard.unpack(dq, q), dk, dv, dgate


def _on_grid(near: Tensor, chunks: RatChunks, chunk: int) -> tuple[Tensor, Tensor]:
    """Keys and values beside one another, and their gates, each ``[chunks, C, H, 2 D]`` in the accumulation dtype."""
    wide = near[0].index_select(0, chunks.grid).unflatten(0, (-1, chunk)).to(accumulation_dtype(near.dtype))
    width = near.shape[-1] // 3
    gate = wide[..., 2 * width :]
    return wide[..., : 2 * width], torch.cat((gate, gate), -1)


def _recur(inputs: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """The states at all cells of the grid, and those before each."""
    states = inputs.new_zeros(inputs.shape[0], inputs.shape[1] + 1, *inputs.shape[2:])
    for place in range(inputs.shape[1]):
        gate = gates[:, place]
        states[:, place + 1] = gate * states[:, place] + (1 - gate) * inputs[:, place]
    return states[:, 1:], states[:, :-1]


def _recur_back(dstates: Tensor, inputs: Tensor, gates: Tensor, before: Tensor) -> Tensor:
    """Gradients of keys, values and gates on the grid, ``[chunks, C, H, 3 D]``; ``dstates``: from outside, at each."""
    carried = torch.zeros_like(dstates[:, 0])
    reached = torch.empty_like(dstates)
    for place in reversed(range(dstates.shape[1])):
        carried = carried + dstates[:, place]
        reached[:, place] = carried
        carried = carried * gates[:, place]
    of_keys, of_values = (reached * (before - inputs)).chunk(2, -1)
    return torch.cat((reached * (1 - gates), of_keys + of_values), -1)


def _through_own_state(
    dout: Tensor, q: Tensor, out: Tensor, lse: Tensor, states: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of queries and own states ``[1, n, H, 2 D]`` through each query's attention to its own state."""
    keys, values = states.to(q.dtype).chunk(2, -1)
    weight = torch.exp((q * keys).sum(-1) * scale - lse)[..., None]
    score = weight * (dout * (values - out)).sum(-1, keepdim=True) * scale
    return score * keys, torch.cat((score * q, weight * dout), -1)


def volume(plan: SequencePlan, rank: int, chunk: int, batch_row: tuple[int, int, int]) -> tuple[int, int]:
    """Returns the bytes that ``rank`` sends forward and backward.

    ``batch_row``: heads, head width, bytes of an element. Forward, k, v and the gate of tokens whose chunks go on
    elsewhere, and two states of ends that others see. Backward, those again and, in the accumulation dtype, their
    gradients.
    """
    heads, width, size = batch_row
    chunks = chunks_of(plan, rank, chunk, torch.device("cpu"))
    near, far = chunks.near.rows_sent, chunks.ends.rows_sent
    forward, back = ((3 * one + 2 * other) * heads * width for one, other in zip(near, far, strict=True))
    return forward * size, forward * size + back * max(size, 4)


def _shapes(q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = out_and_lse(q)
    return out, lse, q.new_empty(*q.shape[:3], 2 * q.shape[3])


_attend = define_operator(
    "rat",
    f"({QKV}, Tensor gate, Tensor plan, str group, int chunk) -> (Tensor out, Tensor lse, Tensor states)",
    run_forward,
    _shapes,
    Gradient(run_backward),
)


def definition(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, documents: Sequence[Documents], chunk: int) -> Tensor:
    """Computes RAT of whole sequences ``[B, S, H, D]`` by its definition, token by token."""
    rows = []
    for row, packed in enumerate(documents):
        out = [torch.zeros_like(q[row, 0])] * q.shape[1]
        for start, stop in pairwise(packed.cu_seqlens.tolist()):
            ends: list[tuple[Tensor, Tensor]] = []
            key, value = torch.zeros_like(k[row, 0]), torch.zeros_like(v[row, 0])
            for t in range(start, stop):
                if t > start and (t - start) % chunk == 0:
                    ends.append((key, value))
                    key, value = torch.zeros_like(key), torch.zeros_like(value)
                key = gate[row, t] * key + (1 - gate[row, t]) * k[row, t]
                value = gate[row, t] * value + (1 - gate[row, t]) * v[row, t]
                keys, values = (torch.stack(states) for states in zip(*ends, (key, value), strict=True))
                weights = torch.softmax((q[row, t] * keys).sum(-1) * q.shape[-1] ** -0.5, 0)
                out[t] = (weights[..., None] * values).sum(0)
        rows.append(torch.stack(out))
    return torch.stack(rows)


def rat(chunk: int = 16) -> Mixer:
    """Makes the mixer with chunks of ``chunk`` tokens; the paper's is 16.

    With 1 it is attention to single gated tokens.
    """
    if whole("chunk of rat", chunk) < 1:
        raise ConfigError(f"chunk {chunk} of rat must be at least 1 token; 16 is the paper's")

    def tokens(widths: HeadDims) -> dict[str, int]:
        if widths.key != widths.value:
            raise ConfigError(
                f"rat gates keys and values alike: their widths {widths.key} and {widths.value} must be equal"
            )
        return {"q": widths.key, "k": widths.key, "v": widths.value, "g": widths.key}

    def mix(inputs: Mapping[str, Tensor], core: LinearCore, plan: Tensor) -> Tensor:
        q, k, v, gate = inputs["q"], inputs["k"], inputs["v"], torch.sigmoid(inputs["g"])
        return attend_chunks(q, k, v, gate, plan, core.group_name, chunk)

    def recurrence(inputs: Mapping[str, Tensor], documents: Sequence[Documents]) -> Tensor:
        return definition(inputs["q"], inputs["k"], inputs["v"], torch.sigmoid(inputs["g"]), documents, chunk)

    def flops(widths: HeadDims, _: int) -> float:
        """Without the ends of earlier chunks, of which there are as many as the document has chunks."""
        return 4.0 * (widths.key + widths.value) + 2.0 * (widths.key + widths.value)

    return Mixer(
        "rat",
        tokens,
        no_parameters,
        no_constants,
        nothing_to_fill,
        mix,
        recurrence,
        False,
        flops,
        reads=READS,
        sized=sized,
    )


def sized(**sizes: int) -> Mixer:
    """Makes the mixer of chunks of ``mixer_block`` tokens."""
    return rat(sizes["mixer_block"])


READS = frozenset({"mixer_block"})


MIXER = rat()
