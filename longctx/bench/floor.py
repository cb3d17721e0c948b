"""Times what a strategy computes on its rank and nothing else: the floor of its time.

A recording kernel runs a pass of the strategy. It computes by another kernel and keeps what it was asked: tiles, and
tensors as they lay, blocks that came from other ranks included. The floor asks all of it again.

It counts every tile, on inputs with the same shapes and strides. It counts the merging of partials that the kernel
itself does, and making the accumulators that the kernel adds to. It does not count exchanges, packing for them and
unpacking, adding up what other ranks have computed, plans, operators and autograd. So it never computes less than the
strategy does, and what a strategy takes over it is what sharing the sequence costs.

``rsa`` asks no kernel; its floor is the products and sums of its own definition, on keys that are here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from longctx.attention.runtime.local_kernel import KernelProblem, LocalKernel, kernel_for, load_kernel
from longctx.attention.runtime.partial import Partial
from longctx.attention.strategies.rsa import hidden
from longctx.catalog import KERNELS
from longctx.comm import group_of
from longctx.sequence import SequencePlan, TileSet
from longctx.verify import VerifyCase
from longctx.verify.run import attention_of, cut

NAME = "recorder"


class Accumulators:
    """Makes fresh accumulators for one pass: as many as the strategy had, laid out like them."""

    def __init__(self) -> None:
        self._partials: dict[int, Partial] = {}
        self._storages: dict[int, Tensor] = {}

    def partial(self, theirs: Partial, q: Tensor) -> Partial:
        """Returns the fresh (out, lse) partial that stands for the strategy's ``theirs``."""
        if id(theirs) not in self._partials:
            self._partials[id(theirs)] = Partial(q)
        return self._partials[id(theirs)]

    def gradient(self, theirs: Tensor) -> Tensor:
        """Returns the fresh gradient that stands for the strategy's ``theirs``."""
        storage = theirs.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = theirs.new_zeros(storage.nbytes() // theirs.element_size())
        return self._storages[storage._cdata].as_strided(theirs.shape, theirs.stride(), theirs.storage_offset())


@dataclass(frozen=True)
class ForwardCall:
    """Holds one forward call of the kernel; ``into`` is kept so that its id stays its own."""

    q: Tensor
    k: Tensor
    v: Tensor
    tiles: tuple[TileSet, ...]
    scale: float
    into: Partial

    def replay(self, kernel: LocalKernel, accumulators: Accumulators) -> None:
        """Asks the kernel the same again, into fresh accumulators."""
        kernel.forward(self.q, self.k, self.v, self.tiles, self.scale, accumulators.partial(self.into, self.q))


@dataclass(frozen=True)
class BackwardCall:
    """Holds one backward call of the kernel; ``given``: dout, q, k, v, out and lse."""

    given: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
    tiles: tuple[TileSet, ...]
    scale: float
    grads: tuple[Tensor, Tensor, Tensor]

    @property
    def q(self) -> Tensor:
        """Returns the queries among ``given``."""
        return self.given[1]

    def replay(self, kernel: LocalKernel, accumulators: Accumulators) -> None:
        """Asks the kernel the same again, into fresh accumulators."""
        dq, dk, dv = (accumulators.gradient(grad) for grad in self.grads)
        kernel.backward(*self.given, self.tiles, self.scale, (dq, dk, dv))


KernelCall = ForwardCall | BackwardCall
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Recorder(threading.local):
    """Computes by another local kernel and keeps every call; by thread, for ranks of sim are threads."""

    name = NAME

    def __init__(self) -> None:
        self.by: LocalKernel | None = None
        self.calls: list[KernelCall] = []

    def refuses(self, problem: KernelProblem) -> str | None:
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[TileSet], scale: float, into: Partial) -> None:
        self.calls.append(ForwardCall(q, k, v, tuple(tiles), scale, into))
        assert self.by is not None, "recorded() names the kernel that computes"
        self.by.forward(q, k, v, tiles, scale, into)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        tiles: Sequence[TileSet],
        scale: float,
        grads: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        given = (dout, q, k, v, out, lse)
        self.calls.append(BackwardCall(given, tuple(tiles), scale, grads))
        assert self.by is not None, "recorded() names the kernel that computes"
        self.by.backward(*given, tiles, scale, grads)


def _recorder() -> Recorder:
    """Returns the recording kernel.

    Strategies name their kernel. Once loaded, this one is known by its name, and users need not see it in the table.
    """
    KERNELS[NAME] = f"{__name__}:Recorder"
    try:
        recorder = load_kernel(NAME)
    finally:
        del KERNELS[NAME]
    assert isinstance(recorder, Recorder)
    return recorder


def recorded(case: VerifyCase, group: dist.ProcessGroup | None) -> tuple[LocalKernel, list[KernelCall]]:
    """Runs this rank's share forward and backward, all ranks at once; returns the kernel, and what it was asked."""
    plan = case.plan()
    local = [cut(whole, plan, group_of(group).rank) for whole in case.inputs()]
    kernel = kernel_for(case.kernel, local[0], local[1])
    return kernel, recorded_pass(lambda: attention_of(replace(case, kernel=NAME), group), plan, local, kernel)


def recorded_pass(
    attention: Callable[[], Attention], plan: SequencePlan, local: Sequence[Tensor], kernel: LocalKernel
) -> list[KernelCall]:
    """Records what one pass asks of ``kernel``.

    ``local``: q, k, v, dout. ``attention`` makes an attention whose kernel is ``NAME``.
    """
    recorder = _recorder()
    recorder.by, recorder.calls = kernel, []
    q, k, v = (tensor.detach().requires_grad_() for tensor in local[:3])
    torch.autograd.grad(attention()(q, k, v, plan.handle), (q, k, v), local[3])
    calls, recorder.calls = recorder.calls, []
    return calls


def floor_of(case: VerifyCase, group: dist.ProcessGroup | None) -> Callable[[], object]:
    """Returns the floor of a case on this rank; all ranks of the group call it at one point."""
    if case.strategy == "rsa":
        return rows_of_scores(case, group_of(group).rank)
    kernel, calls = recorded(case, group)
    assert calls, f"{case.strategy} asks no kernel: it needs a floor of its own"
    return replay(kernel, calls)


def replay(kernel: LocalKernel, calls: Sequence[KernelCall]) -> Callable[[], object]:
    """Returns what asks the kernel all of it again."""

    @torch.no_grad()
    def run() -> None:
        accumulators = Accumulators()
        for call in calls:
            call.replay(kernel, accumulators)

    return run


def rows_of_scores(case: VerifyCase, rank: int, device: torch.device | None = None) -> Callable[[], tuple[Tensor, ...]]:
    """Returns what computes the products of ``strategies.rsa``, a block of keys at a time.

    Those are two products forward; backward computes the scores once more and four others.
    """
    plan, scale = case.plan(), case.head_dim**-0.5
    whole_q, whole_k, whole_v, whole_dout = (whole.to(device or "cpu") for whole in case.inputs())
    kv_heads, mine = whole_k.shape[2], len(plan.positions(rank))
    q, dout = (cut(whole, plan, rank)[:, :mine].unflatten(2, (kv_heads, -1)) for whole in (whole_q, whole_dout))
    blocks = _blocks(plan, rank, whole_k, whole_v)
    masked = hidden(plan, rank).to(q.device)

    def score_rows() -> Tensor:
        scores = q.new_empty(q.shape[0], kv_heads, q.shape[3], mine, plan.length)
        for columns, keys, _ in blocks:
            scores[..., columns] = torch.einsum("bqhgd,bkhd->bhgqk", q, keys).mul_(scale)
        return scores.masked_fill_(masked, -torch.inf)

    def run() -> tuple[Tensor, ...]:
        scores = score_rows()
        lse = torch.logsumexp(scores, dim=-1)
        weights, out = scores.sub_(lse.unsqueeze(-1)).exp_(), torch.zeros_like(q)
        for columns, _, values in blocks:
            out += torch.einsum("bhgqk,bkhd->bqhgd", weights[..., columns], values)
        del scores, weights  # as between the strategy's two passes
        weights = score_rows().sub_(lse.unsqueeze(-1)).exp_()
        d_weights, dv = torch.empty_like(weights), []
        for columns, _, values in blocks:
            d_weights[..., columns] = torch.einsum("bqhgd,bkhd->bhgqk", dout, values)
            dv.append(torch.einsum("bhgqk,bqhgd->bkhd", weights[..., columns], dout))
        row_sums = (weights * d_weights).sum(dim=-1, keepdim=True)
        d_scores = weights.mul_(d_weights.sub_(row_sums)).mul_(scale)
        dq, dk = torch.zeros_like(q), []
        for columns, keys, _ in blocks:
            dq += torch.einsum("bhgqk,bkhd->bqhgd", d_scores[..., columns], keys)
            dk.append(torch.einsum("bhgqk,bqhgd->bkhd", d_scores[..., columns], q))
        return (out, dq, *dk, *dv)

    return run


def _blocks(plan: SequencePlan, rank: int, k: Tensor, v: Tensor) -> list[tuple[slice, Tensor, Tensor]]:
    """Lists (columns, keys, values) of every rank, by owner, in the order in which they come to this one."""
    counts = [len(plan.positions(owner)) for owner in range(plan.world)]
    found = []
    for owner in ((rank - hop) % plan.world for hop in range(plan.world)):
        columns = slice(sum(counts[:owner]), sum(counts[: owner + 1]))
        keys, values = (cut(whole, plan, owner)[:, : counts[owner]] for whole in (k, v))
        found.append((columns, keys, values))
    return found
