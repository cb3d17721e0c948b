"""MoBA: each query attends to its own block and to the few earlier ones that its gate chooses.

Lu et al., "MoBA: Mixture of Block Attention for Long-Context LLMs" (2025). Blocks of b tokens count from a document's
start. A query of block c scores each earlier block j of its document by q . mean of the keys of j. Its own block is
always chosen, future ones never. With it go the ``top_k`` - 1 earlier ones of the highest scores (of equal scores the
later block). Softmax goes over all tokens of the chosen blocks, causal in the own one. No gradient passes through the
choice. With ``top_k`` = 1 this is attention inside blocks; with as many blocks as a document has it is dense.

    sum the keys of my part of each block, exchange the sums
    choose blocks for my queries; tell all ranks which of them any query chose
    fetch keys and values of my own blocks and of chosen ones; backward, send their gradients to the owners
    attend to the own block by a kernel, to the others by queries grouped by (block, head); merge

Sums are in fp64, so that the means do not depend on how blocks were cut; scores are in the accumulation dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longctx.attention.runtime.borders import HANDLE, require_gradient, require_plain
from longctx.attention.runtime.local_kernel import kernel_for
from longctx.attention.runtime.operator import QKV, out_and_lse, require_fit
from longctx.attention.runtime.partial import Partial, accumulation_dtype
from longctx.comm import Group, exchange, group_named
from longctx.errors import ConfigError
from longctx.linear.mixer import HeadDims, LinearCore, Mixer, no_constants, no_parameters, nothing_to_fill
from longctx.operators import Gradient, define_operator
from longctx.rules import whole
from longctx.sequence import Documents, Rows, SequencePlan, TileSet, plan_of
from longctx.sequence.documents import Int64
from longctx.sequence.tiles import group_rows, tiles_of
from longctx.sparse.document_blocks import Blocks, Shard, blocks_of, require_alike, shard_of
from longctx.sparse.grouped_queries import MAX_SCORES, NONE, grouped
from longctx.sparse.row_exchange import RowExchange


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, plan: Tensor, group: str, block: int, top_k: int) -> Tensor:
    """Computes MoBA of the local tokens. q, k, v and the result are ``[B, T/SP, H/TP, D]``; padding is 0."""
    require_plain((("q", q), ("k", k), ("v", v), (HANDLE, plan)))
    out: Tensor = _attend(q, k, v, plan, group, block, top_k)[0]
    return out


@dataclass(frozen=True)
class BlockContext:
    """Holds what one rank needs to know of a batch's blocks.

    ``held``: the places of every rank's tokens; ``own``: the block of each of this rank's.
    """

    blocks: Blocks
    held: Sequence[Int64]
    shard: Shard
    own: Int64
    ranks: Group
    block: int
    scale: float


def _block_context(q: Tensor, plan: SequencePlan, ranks: Group, block: int) -> BlockContext:
    blocks = blocks_of(plan.documents, plan.length, block)
    held = [shard_of(plan, rank, torch.device("cpu")).places for rank in range(plan.world)]
    own = blocks.of(held[ranks.rank])
    return BlockContext(blocks, held, shard_of(plan, ranks.rank, q.device), own, ranks, block, q.shape[-1] ** -0.5)


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Tensor, group: str, block: int, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out, lse, and the earlier blocks that each query chose, ``[B, T/SP, H, top_k - 1]``.

    The latter two are for the backward pass.
    """
    sequence, ranks = plan_of(plan), group_named(group)
    require_alike(q, k, v)
    require_fit(q, sequence, ranks)
    context = _block_context(q, sequence, ranks, block)
    queries, keys = context.shard.pack(q), context.shard.pack(k)
    chosen = route(queries[0], keys[0], top_k - 1, context)
    row_exchange = fetch_blocks(chosen, context)
    x = torch.cat((keys, context.shard.pack(v)), -1)
    fetched = row_exchange.arrange(row_exchange.fetch(x, ranks))
    partial = Partial(queries)
    tiles, firsts = own_tiles(row_exchange, context), first_keys(row_exchange, context)
    keys, values = fetched.chunk(2, -1)
    kernel_for("auto", q, k).forward(queries, keys, values, tiles, context.scale, partial)
    all_rows = Rows.union([(0, queries.shape[1])])
    for choice in chosen.unbind(-1):
        out, lse = torch.zeros_like(partial.out), torch.full_like(partial.lse, -torch.inf)
        for groups in grouped(choice, firsts, block):
            scores, _, block_values = groups.scores(queries, fetched, context.scale)
            block_lse = torch.logsumexp(scores, -1)
            groups.put(out, torch.exp(scores - block_lse[..., None]) @ block_values)
            groups.put(lse, block_lse)
        partial.merge_packed(all_rows, out, lse)
    unpack = context.shard.unpack
    local_chosen = unpack(chosen[None], chosen.new_empty(*q.shape[:2]))
    return unpack(partial.out, q), unpack(partial.lse, partial.lse.new_empty(q.shape[:2])), local_chosen


def run_backward(dout: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq, dk, dv.

    ``given``: q, k, v, out, lse and chosen of the forward pass, and its context.
    """
    *saved, plan, group, block, _ = given
    sequence, ranks = plan_of(plan), group_named(group)
    q, k, v, out = saved[:4]
    require_gradient(dout, out)
    context = _block_context(q, sequence, ranks, block)
    dout, queries, out, lse, chosen = (context.shard.pack(one) for one in (dout, q, *saved[3:]))
    row_exchange = fetch_blocks(chosen[0], context)
    fetched = row_exchange.arrange(row_exchange.fetch(context.shard.pack(torch.cat((k, v), -1)), ranks))
    wide = lse.dtype
    dq, dfetched = torch.zeros_like(queries, dtype=wide), torch.zeros_like(fetched, dtype=wide)
    tiles, firsts = own_tiles(row_exchange, context), first_keys(row_exchange, context)
    (keys, values), (dkeys, dvalues) = fetched.chunk(2, -1), dfetched.chunk(2, -1)
    kernel_for("auto", q, k).backward(dout, queries, keys, values, out, lse, tiles, context.scale, (dq, dkeys, dvalues))
    dout = dout.to(wide)
    delta = (dout * out).sum(-1)
    for choice in chosen[0].unbind(-1):
        for groups in grouped(choice, firsts, block):
            scores, block_keys, block_values = groups.scores(queries, fetched, context.scale)
            block_dout, block_q = groups.take(dout), groups.take(queries).to(wide)
            weights = torch.exp(scores - groups.take(lse)[..., None]).masked_fill_(groups.missing[..., None], 0)
            dscores = weights * (block_dout @ block_values.mT - groups.take(delta)[..., None]) * context.scale
            groups.add(dq, dscores @ block_keys)
            groups.add_to_keys(dfetched, torch.cat((dscores.mT @ block_q, weights.mT @ block_dout), -1))
    gradients = row_exchange.total(row_exchange.send_gradients(dfetched, ranks))
    dk, dv = (context.shard.unpack(one, k) for one in gradients.chunk(2, -1))
    return context.shard.unpack(dq, q), dk, dv


def route(q: Tensor, k: Tensor, choices: int, context: BlockContext) -> Tensor:
    """Returns the earlier blocks that each query ``[n, H, D]`` chose.

    int32 ``[n, H, choices]``, ascending after ``NONE``.
    """
    chosen = torch.full((*q.shape[:2], choices), NONE, dtype=torch.int32, device=q.device)
    eligible = context.blocks.followed
    if not choices or not len(eligible):
        return chosen
    wide = accumulation_dtype(q.dtype)
    means = pooled(k, context).to(wide)
    # Eligible blocks [low, high) are those of a query's document before its own block.
    low = np.searchsorted(eligible, context.blocks.first[context.own])
    high = np.searchsorted(eligible, context.own)
    numbers = torch.from_numpy(eligible).to(q.device, torch.int32)
    step = max(1, MAX_SCORES // (q.shape[1] * len(means)))
    for begin in range(0, len(q), step):
        rows = slice(begin, begin + step)
        first, last = int(low[rows].min()), int(high[rows].max())
        if first >= last:
            continue
        scores = torch.einsum("nhd,jhd->nhj", q[rows].to(wide), means[first:last])
        at = torch.arange(first, last, device=q.device)
        start, stop = (torch.from_numpy(one[rows]).to(q.device)[:, None] for one in (low, high))
        hidden = ((at < start) | (at >= stop))[:, None].expand_as(scores)
        # Stable and from the last block on: of equal scores the later block comes first, on any device.
        order = scores.masked_fill(hidden, -torch.inf).flip(-1).argsort(dim=-1, descending=True, stable=True)
        taken = last - first - 1 - order[..., :choices]
        found = numbers[first + taken].masked_fill_(hidden.gather(-1, taken), NONE)
        chosen[rows, :, choices - found.shape[-1] :] = found.sort(-1).values
    return chosen


def pooled(k: Tensor, context: BlockContext) -> Tensor:
    """Returns the mean key of each block that may be chosen, fp64 ``[blocks, H, D]``; k ``[n, H, D]``."""
    eligible, me = context.blocks.followed, context.ranks.rank
    parts = [np.searchsorted(eligible, its) for its in _parts(context.blocks, context.held)]
    inside = np.flatnonzero(np.isin(context.own, eligible))
    rows, at, *by_rank = (
        torch.from_numpy(one).to(k.device) for one in (inside, np.searchsorted(eligible, context.own[inside]), *parts)
    )
    sums = k.new_zeros(len(eligible), *k.shape[1:], dtype=torch.float64)
    sums.index_add_(0, at, k.index_select(0, rows).double())
    total = torch.zeros_like(sums)
    shares = _tell_all(sums.index_select(0, by_rank[me]), [len(part) for part in parts], context.ranks)
    for touched, share in zip(by_rank, shares, strict=True):  # in rank order, so that all ranks have the same bits
        total.index_add_(0, touched, share)
    return total / context.block


def fetch_blocks(chosen: Tensor, context: BlockContext) -> RowExchange:
    """Plans the fetch of what this rank's queries see: their own blocks up to themselves, and chosen ones.

    ``chosen`` ``[n, H, choices]``. All ranks tell each other what they chose, one byte a block: a message's sender must
    know its size.
    """
    count, ranks = len(context.blocks.starts), context.ranks
    flags = torch.zeros(count + 1, dtype=torch.uint8, device=chosen.device)
    flags[chosen.flatten().long()] = 1  # what was not chosen falls on the last
    if chosen.shape[-1] and len(context.blocks.followed):
        picked = torch.stack(_tell_all(flags[:-1], [count] * ranks.size, ranks)).cpu().numpy()
    else:
        picked = np.zeros((ranks.size, count))
    return RowExchange(context.held, wanted_by(context.blocks, context.held, picked), ranks.rank, chosen.device)


def wanted_by(blocks: Blocks, held: Sequence[Int64], picked: NDArray[Any]) -> list[Int64]:
    """Returns the places that each reader's queries see.

    ``picked`` ``[P, blocks]``: what any of its queries chose.
    """
    wanted = []
    for its, flags in zip(held, picked, strict=True):
        stops = np.where(flags, blocks.stops, blocks.starts)
        np.maximum.at(stops, blocks.of(its), its + 1)
        wanted.append(blocks.places(np.arange(len(stops)), stops))
    return wanted


def volume(
    plan: SequencePlan, rank: int, block: int, picked: NDArray[Any] | None, batch_row: tuple[int, int, int]
) -> tuple[int, int]:
    """Returns the bytes that ``rank`` sends forward and backward.

    ``picked`` ``[P, blocks]``: what queries of each rank chose, None with ``top_k`` 1. ``batch_row``: heads, head
    width, bytes of an element.

    Forward, to all others the fp64 sums of its parts of blocks and its choices, and keys and values to who chose
    them. Backward, the choices, keys and values again, and in the accumulation dtype the latter's gradients.
    """
    heads, width, size = batch_row
    blocks = blocks_of(plan.documents, plan.length, block)
    held = [shard_of(plan, one, torch.device("cpu")).places for one in range(plan.world)]
    routed = picked is not None and len(blocks.followed) > 0
    flags = picked if picked is not None else np.zeros((plan.world, len(blocks.starts)))
    row_exchange = RowExchange(held, wanted_by(blocks, held, flags), rank, torch.device("cpu"))
    sent, returned = row_exchange.rows_sent
    choices = (plan.world - 1) * len(blocks.starts) if routed else 0
    sums = (plan.world - 1) * len(_parts(blocks, held)[rank]) * heads * width * 8 if routed else 0
    again = choices + 2 * sent * heads * width * size
    return sums + again, again + 2 * returned * heads * width * max(size, 4)


def _parts(blocks: Blocks, held: Sequence[Int64]) -> list[Int64]:
    """Of the blocks that may be chosen, those of which each rank holds tokens."""
    return [np.intersect1d(blocks.of(its), blocks.followed) for its in held]


def _tell_all(mine: Tensor, lengths: Sequence[int], ranks: Group) -> list[Tensor]:
    """What every rank tells all others, by rank; ``lengths``: of each one's first dim."""
    others = [rank for rank in range(ranks.size) if rank != ranks.rank]
    buffers = [(rank, mine.new_empty(lengths[rank], *mine.shape[1:])) for rank in others]
    told = exchange(ranks, [(rank, mine) for rank in others], buffers).wait()
    told.insert(ranks.rank, mine)
    return told


def own_tiles(row_exchange: RowExchange, context: BlockContext) -> tuple[TileSet, ...]:
    """Returns the tiles of queries against the keys of their own blocks, among those that were fetched."""
    places = context.held[context.ranks.rank]
    starts = context.blocks.starts[context.own]
    return group_rows([tiles_of(starts, places + 1, row_exchange.places, context.blocks.first[context.own])])


def first_keys(row_exchange: RowExchange, context: BlockContext) -> Tensor:
    """Returns where each fetched block begins among what was fetched."""
    return torch.from_numpy(np.searchsorted(row_exchange.places, context.blocks.starts)).to(context.shard.rows.device)


def _shapes(q: Tensor, k: Tensor, v: Tensor, *context: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = out_and_lse(q)
    return out, lse, q.new_empty(*q.shape[:3], context[-1] - 1, dtype=torch.int32)


_attend = define_operator(
    "moba",
    f"({QKV}, Tensor plan, str group, int block, int top_k) -> (Tensor out, Tensor lse, Tensor chosen)",
    run_forward,
    _shapes,
    Gradient(run_backward),
)


def definition(q: Tensor, k: Tensor, v: Tensor, documents: Sequence[Documents], block: int, top_k: int) -> Tensor:
    """Computes MoBA of whole sequences ``[B, S, H, D]`` by its definition, token by token and head by head."""
    out = [[[torch.zeros_like(q[row, t, 0])] * q.shape[2] for t in range(q.shape[1])] for row in range(len(q))]
    for row, packed in enumerate(documents):
        for start, stop in pairwise(packed.cu_seqlens.tolist()):
            for t, head in product(range(start, stop), range(q.shape[2])):
                queries, keys, values = q[row, t, head], k[row, :, head], v[row, :, head]
                own = (t - start) // block
                spans = [range(start + j * block, start + (j + 1) * block) for j in range(own)]
                scores = [float(queries.detach() @ keys[span.start : span.stop].detach().mean(0)) for span in spans]
                best = sorted(range(own), key=lambda j: (-scores[j], -j))[: top_k - 1]
                seen = [place for j in best for place in spans[j]] + list(range(start + own * block, t + 1))
                weights = torch.softmax(keys[seen] @ queries * q.shape[-1] ** -0.5, 0)
                out[row][t][head] = weights @ values[seen]
    return torch.stack([torch.stack([torch.stack(heads) for heads in rows]) for rows in out])


def moba(block: int = 512, top_k: int = 3) -> Mixer:
    """Makes the mixer with ``top_k`` blocks of ``block`` tokens a query, its own among them.

    Defaults are the paper's sizes.
    """
    if whole("block of moba", block) < 1 or whole("top_k of moba", top_k) < 1:
        raise ConfigError(
            f"block {block} and top_k {top_k} of moba must be at least 1: a query sees itself; "
            f"the nearest are block {max(block, 1)} and top_k {max(top_k, 1)}"
        )

    def tokens(widths: HeadDims) -> dict[str, int]:
        if widths.key != widths.value:
            raise ConfigError(
                f"moba runs on attention's kernels: widths {widths.key} of keys and {widths.value} of values "
                "must be equal"
            )
        return {"q": widths.key, "k": widths.key, "v": widths.value}

    def mix(inputs: Mapping[str, Tensor], core: LinearCore, plan: Tensor) -> Tensor:
        return attend_blocks(inputs["q"], inputs["k"], inputs["v"], plan, core.group_name, block, top_k)

    def recurrence(inputs: Mapping[str, Tensor], documents: Sequence[Documents]) -> Tensor:
        return definition(inputs["q"], inputs["k"], inputs["v"], documents, block, top_k)

    def flops(widths: HeadDims, _: int) -> float:
        """With all blocks that may be chosen, without the gate's one product a block of the document."""
        return 2.0 * (widths.key + widths.value) * ((top_k - 1) * block + (block + 1) / 2)

    return Mixer(
        "moba",
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
    """Makes the mixer of blocks of ``mixer_block`` tokens, of which a query reads ``mixer_top_k``; else the paper's."""
    return moba(**{name.removeprefix("mixer_"): value for name, value in sizes.items()})


READS = frozenset({"mixer_block", "mixer_top_k"})


MIXER = moba()
