"""Linear layers as a pair of torch operators, for the reasons of ``longctx.operators``.

The forward operator returns, beside the output, the states that entered this rank's segments. Selective recompute
keeps both, so that neither local computing nor the exchange runs twice. The backward operator computes everything else
again, in the order in which the exchange hides best, with autograd on the local parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from longctx.attention.runtime.borders import require_gradient
from longctx.attention.runtime.partial import accumulation_dtype
from longctx.comm import group_named
from longctx.errors import ConfigError
from longctx.linear import bidirectional, diagonal
from longctx.linear import delta_rule as delta
from longctx.linear.autograd import autograd
from longctx.linear.chunks import Chunks, Piece, Pieces, chunks_of, pieces_of
from longctx.linear.local_scan import LocalScan, SpanScan, scan_chunks
from longctx.linear.registry import LinearStrategy, get_linear
from longctx.linear.states import LinearContext, Summary
from longctx.operators import Gradient, define_operator
from longctx.sequence import plan_of


class Core(Protocol):
    """Computes the chunks of one family of mixers; ``diagonal`` and ``delta`` are such modules."""

    def write(self, q: Tensor, k: Tensor, v: Tensor, gates: Sequence[Tensor], chunks: Chunks) -> Any: ...

    def reads(self, written: Any, chunks: Chunks) -> Tensor: ...

    def intra(self, written: Any, chunks: Chunks) -> Tensor: ...


# What a piece's tensors are without numbers that are none: they, and tokens of which some was none, [B, T, H].
Cleaned = tuple[Sequence[Tensor], Tensor | None]


def clean(piece: Piece, tensors: Sequence[Tensor]) -> Cleaned:
    """Returns the piece's own rows of the tensors, where documents share chunks without tokens that are no numbers.

    Inside a chunk products go over all its tokens, with 0 for those of other documents; 0 times infinity is none.
    """
    own = [piece.of(tensor) for tensor in tensors]
    if not piece.chunks.mixed:
        return own, None
    by_token = [one.detach() for one in own if one.ndim > 1]
    sums = [one if one.ndim == 3 else one.sum(-1, dtype=accumulation_dtype(one.dtype)) for one in by_token]
    bad = ~torch.stack([one.isfinite() for one in sums]).all(0)
    return [one if one.ndim == 1 else one.masked_fill(bad if one.ndim == 3 else bad[..., None], 0) for one in own], bad


def _spoiled(addition: Tensor, bad: Tensor | None, chunks: Chunks) -> Tensor:
    """What chunks write ``[B, N, H, K, V]``, no number where a token of the document that leaves them was none."""
    if bad is None:
        return addition
    gone = chunks.cut(bad[..., None].to(addition.dtype)).masked_fill(~diagonal.by_token(chunks.tail), 0).amax(-2)
    return addition.masked_fill(gone[..., None] > 0, torch.nan)


def _spoiled_rows(out: Tensor, bad: Tensor | None, chunks: Chunks) -> Tensor:
    """What tokens read of their chunk ``[B, N, H, C, V]``, no number for those that see a token that was none."""
    if bad is None:
        return out
    seen = chunks.same.unsqueeze(2).to(out.dtype) @ chunks.cut(bad[..., None].to(out.dtype))
    return out.masked_fill(seen > 0, torch.nan)


def _headed(rows: Tensor, chunks: Chunks) -> Tensor:
    """Rows of chunks ``[B, N, H, C, any]``, 0 for tokens that read nothing of the state that enters."""
    return rows.masked_fill(~diagonal.by_token(chunks.head), 0) if chunks.starts else rows


def forward(
    core: Core, tensors: Sequence[Tensor], pieces: Pieces, context: LinearContext, strategy: LinearStrategy
) -> tuple[Tensor, Tensor]:
    """Returns the output and the states that entered this rank's segments.

    out ``[B, T/SP, H/TP, V]``, states ``[B, n, H/TP, K, V]``.
    """
    cleaned = [clean(piece, tensors) for piece in pieces.parts]
    written = [_write(core, piece, one) for piece, one in zip(pieces.parts, cleaned, strict=True)]
    scans = [_scan(one, piece) for one, piece in zip(written, pieces.parts, strict=True)]
    spans = SpanScan(scans, pieces)
    arriving = strategy.enter(spans.summary, context)
    parts = [
        (core.reads(one, piece.chunks), _spoiled_rows(core.intra(one, piece.chunks), bad, piece.chunks))
        for one, piece, (_, bad) in zip(written, pieces.parts, cleaned, strict=True)
    ]
    entered = arriving()
    whole = parts[0][1].new_zeros(tensors[2].shape)
    for piece, scan, (reads, out), entering in zip(pieces.parts, scans, parts, spans.entering(entered), strict=True):
        out += _headed(reads @ scan.states(entering, piece.chunks), piece.chunks)
        whole[:, piece.rows] = piece.chunks.join(out)
    return whole, entered


@dataclass
class _Again:
    """A piece computed once more, with autograd. ``gradients``: of its own rows of the tensors, so far.

    ``bad``: tokens of which an input or a gradient is no number, ``[B, T, H]``; None where that stays by itself anyway.
    """

    piece: Piece
    leaves: list[Tensor]
    written: Any
    scan: LocalScan
    reads: Tensor
    dout: Tensor
    gradients: list[Tensor | None]
    bad: Tensor | None

    @classmethod
    def of(cls, core: Core, piece: Piece, tensors: Sequence[Tensor], dout: Tensor) -> _Again:
        with autograd():
            own, bad = clean(piece, tensors)
            (clean_dout,), bad_dout = clean(piece, [dout])
            leaves = [tensor.detach().requires_grad_() for tensor in own]
            written = _write(core, piece, (leaves, bad))
            if bad is not None:
                _keep_finite(written.addition, written.transition)
            scan, reads = _scan(written, piece), _headed(core.reads(written, piece.chunks), piece.chunks)
        wide = piece.chunks.cut(clean_dout.to(reads.dtype))
        either = None if bad is None or bad_dout is None else bad | bad_dout
        return cls(piece, leaves, written, scan, reads, wide, [None] * len(leaves), either)

    def dstates(self) -> Tensor:
        return self.reads.detach().mT @ _headed(self.dout, self.piece.chunks)

    def dreads(self, states: Tensor) -> Tensor:
        found = self.dout @ states.mT
        return found if self.bad is None else found.nan_to_num_(0.0, 0.0, 0.0)

    def add(self, outputs: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor], more: bool) -> None:
        found = torch.autograd.grad(outputs, self.leaves, gradients, retain_graph=more, allow_unused=True)
        self.gradients = [_sum(both) for both in zip(self.gradients, found, strict=True)]


def backward(
    core: Core,
    dout: Tensor,
    tensors: Sequence[Tensor],
    entered: Tensor,
    pieces: Pieces,
    context: LinearContext,
    strategy: LinearStrategy,
) -> list[Tensor]:
    """Returns the gradients of the tensors."""
    again = [_Again.of(core, piece, tensors, dout) for piece in pieces.parts]
    fixed = [one.scan.detach() for one in again]
    dstates = [one.dstates() for one in again]
    dentering = torch.cat(
        [scan.entered_gradient(grad, one.piece.chunks) for scan, grad, one in zip(fixed, dstates, again, strict=True)],
        1,
    )
    spans = SpanScan(fixed, pieces)
    arriving = strategy.leave(Summary(spans.summary.transitions, spans.entered_gradient(dentering)), context)
    entering = spans.entering(entered)
    for one, scan, states in zip(again, fixed, entering, strict=True):
        with autograd():
            out = core.intra(one.written, one.piece.chunks)
            dreads = one.dreads(scan.states(states, one.piece.chunks))
            one.add((one.reads, out), (dreads, one.dout), more=True)
    leaving = spans.leaving_gradients(dentering, arriving())
    for one, scan, dstate, states, left in zip(again, fixed, dstates, entering, leaving, strict=True):
        ends = scan.gradients(dstate, states, left, one.piece.chunks)
        with autograd():
            one.add((one.scan.entering, one.scan.leaving), ends, more=False)
    return [_joined(tensor, again, number) for number, tensor in enumerate(tensors)]


def _keep_finite(*tensors: Tensor) -> None:
    """Lets only numbers through in the gradients of what chunks write, for chunks of several documents."""
    for tensor in tensors:
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: gradient.nan_to_num(0.0, 0.0, 0.0))


def _write(core: Core, piece: Piece, cleaned: Cleaned) -> Any:
    (q, k, v, *gates), bad = cleaned
    written = core.write(q, k, v, gates, piece.chunks)
    return replace(written, addition=_spoiled(written.addition, bad, piece.chunks))


def _scan(written: Any, piece: Piece) -> LocalScan:
    return scan_chunks(written.transition, written.addition, piece.chunks.runs, piece.chunks.resets)


def _sum(parts: Sequence[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return sum(found[1:], found[0]) if found else None


def _joined(tensor: Tensor, again: Sequence[_Again], number: int) -> Tensor:
    """The gradient of a tensor, from those of the pieces: of their rows, or shares of a tensor of heads."""
    whole = torch.zeros_like(tensor, dtype=accumulation_dtype(tensor.dtype) if tensor.ndim == 1 else tensor.dtype)
    for one in again:
        gradient = one.gradients[number]
        if gradient is not None and one.bad is not None:
            at = one.bad.any(0).any(0) if tensor.ndim == 1 else one.bad
            gradient = gradient.masked_fill(at if at.ndim == gradient.ndim else at[..., None], torch.nan)
        if gradient is not None:
            one.piece.of(whole).add_(gradient)
    return whole


_CONTEXT = "Tensor plan, str group, str strategy, int chunk"


def define_core(name: str, core: Core) -> Any:
    """Registers the two passes of a core, ``longctx::<name>`` and ``longctx::<name>_backward``."""

    def run_forward(q: Tensor, k: Tensor, v: Tensor, gates: list[Tensor], *names: Any) -> tuple[Tensor, Tensor]:
        tensors, (context, strategy), chunk = (q, k, v, *gates), _resolve(q, gates, *names), names[-1]
        if context.plan.mask.causal:
            pieces = pieces_of(context.plan, context.group.rank, chunk, q.device)
            out, entered = forward(core, tensors, pieces, context, strategy)
        else:
            out, entered = bidirectional.forward(tensors, *_whole(context, chunk, q), context)
        return out.to(q.dtype), entered

    def run_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, gates: list[Tensor], entered: Tensor, *names: Any
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        require_gradient(dout, v)
        tensors, (context, strategy), chunk = (q, k, v, *gates), _resolve(q, gates, *names), names[-1]
        if context.plan.mask.causal:
            pieces = pieces_of(context.plan, context.group.rank, chunk, q.device)
            found = backward(core, dout, tensors, entered, pieces, context, strategy)
        else:
            found = bidirectional.backward(dout, tensors, entered, *_whole(context, chunk, q), context)
        dq, dk, dv, *dgates = (grad.to(tensor.dtype) for grad, tensor in zip(found, tensors, strict=True))
        return dq, dk, dv, dgates

    schema = f"(Tensor q, Tensor k, Tensor v, Tensor[] gates, {_CONTEXT}) -> (Tensor out, Tensor entered)"
    gradient = Gradient(run_backward, saves=("q", "k", "v", "gates", "entered"))
    return define_operator(name, schema, run_forward, _shapes, gradient)


def _shapes(q: Tensor, k: Tensor, v: Tensor, gates: list[Tensor], *names: Any) -> tuple[Tensor, Tensor]:
    segments = torch.library.get_ctx().new_dynamic_size()
    shape = (q.shape[0], segments, q.shape[2], q.shape[3], v.shape[3])
    return q.new_empty(v.shape), q.new_empty(shape, dtype=accumulation_dtype(q.dtype))


def _resolve(
    q: Tensor, gates: Sequence[Tensor], plan: Tensor, group: str, strategy: str, chunk: int
) -> tuple[LinearContext, LinearStrategy]:
    sequence, ranks = plan_of(plan), group_named(group)
    if (sequence.world, sequence.shard, len(sequence.documents)) != (ranks.size, q.shape[1], q.shape[0]):
        raise ConfigError(
            f"q {tuple(q.shape)} on {ranks.size} ranks does not fit its sequence plan, which is for "
            f"[{len(sequence.documents)}, {sequence.shard}, H, K] on {sequence.world} ranks"
        )
    if not sequence.mask.causal and (gates or strategy != "lasp2"):
        raise ConfigError(
            f"attention.linear={strategy} with {len(gates)} gates can't let queries see later tokens; lasp2 can, for "
            "mixers without gates"
        )
    decay = None
    if not gates:
        decay = q.new_zeros(q.shape[2], dtype=accumulation_dtype(q.dtype))
    elif len(gates) == 1 and gates[0].ndim == 1:
        decay = gates[0].to(accumulation_dtype(q.dtype))
    return LinearContext(sequence, ranks, decay), get_linear(strategy)


def _whole(context: LinearContext, chunk: int, q: Tensor) -> tuple[Chunks, bidirectional.Parts]:
    """What the form without a causal mask reads of the plan."""
    where = context.plan, context.group.rank, chunk, q.device
    return chunks_of(*where), bidirectional.parts_of(*where)


diagonal_attention = define_core("linear_diagonal", diagonal)
delta_attention = define_core("linear_delta", delta)
