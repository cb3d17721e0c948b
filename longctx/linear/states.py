"""Holds what ranks send one another about their segments: the common part of the strategies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from longctx.comm import Group
from longctx.linear.affine import Resets
from longctx.linear.segments import Chain, chain_of
from longctx.sequence import Rows, SequencePlan, view


@dataclass(frozen=True)
class Summary:
    """What this rank's n segments do to a state.

    ``transitions`` ``[B, n, H, 1 or K, 1 or K]``, with document starts in them. ``states`` ``[B, n, H, K, V]``:
    additions in the forward pass, gradients of what entered in the backward pass.
    """

    transitions: Tensor
    states: Tensor


@dataclass(frozen=True)
class LinearContext:
    """All that a strategy is given besides its tensors.

    ``decay``: the log decay ``[H]`` of a token where all ranks know it, 0 where nothing decays. Then no rank sends its
    transitions. None where they depend on the tokens.
    """

    plan: SequencePlan
    group: Group
    decay: Tensor | None

    @property
    def chain(self) -> Chain:
        return chain_of(self.plan)

    @property
    def own(self) -> tuple[int, ...]:
        """Places of this rank's segments in the chain, ascending."""
        return self.chain.places_of(self.group.rank)


# Awaits the exchange: states that enter this rank's segments, or gradients of those that leave them, [B, n, H, K, V].
Arriving = Callable[[], Tensor]


@dataclass(frozen=True)
class ChainSubset:
    """Some places of the chain, ascending, and where documents join them; tensors are on one device.

    ``joined``, ``onward``, ``keep`` bool ``[B, n, 1, 1, 1]``: a document reaches each place from the one before,
    reaches from it to the next, reaches through it. ``tokens`` ``[n, 1, 1, 1]``. ``resets``: places that no state
    passes through to the next; ``resets_back``: that no gradient passes through to the one before.
    """

    places: tuple[int, ...]
    joined: Tensor
    onward: Tensor
    keep: Tensor
    tokens: Tensor
    resets: Resets | None
    resets_back: Resets | None

    @classmethod
    def of(cls, chain: Chain, places: Sequence[int]) -> ChainSubset:
        joined = torch.from_numpy(chain.joined(places))
        onward = torch.cat([joined[:, 1:], torch.zeros_like(joined[:, :1])], 1)
        keep = torch.from_numpy(chain.keep[:, list(places)])
        resets, resets_back = Resets.where_not(keep & onward), Resets.where_not(keep & joined)
        joined, onward, keep = (mask[:, :, None, None, None] for mask in (joined, onward, keep))
        tokens = torch.from_numpy(chain.tokens[list(places)])
        return cls(tuple(places), joined, onward, keep, tokens[:, None, None, None], resets, resets_back)

    def to(self, device: torch.device) -> ChainSubset:
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor | Resets)
        }
        return replace(self, **moved)

    def known(self, decay: Tensor) -> Tensor:
        """Returns transitions ``[B, n, H, 1, 1]`` that follow from the log decay ``[H]`` of a token."""
        return (decay[:, None, None] * self.tokens).exp() * self.keep

    def rows(self, places: Sequence[int]) -> Rows:
        """Returns where these ascending places are in tensors of the subset."""
        return rows_of([self.places.index(place) for place in places])


def rows_of(elements: Sequence[int]) -> Rows:
    """Returns ascending elements as intervals.

    A list as an index would be copied to the device while the host waits.
    """
    assert all(one < other for one, other in pairwise(elements)), "elements ascend"
    return Rows.union((element, element + 1) for element in elements)


def chain_subset(plan: SequencePlan, places: Sequence[int], device: torch.device) -> ChainSubset:
    """Returns some places of the plan's chain on ``device``, moved once.

    A copy from ordinary memory makes the host wait.
    """
    return _subset(plan, tuple(places), device)


@view
def _subset(plan: SequencePlan, places: tuple[int, ...], device: torch.device) -> ChainSubset:
    return ChainSubset.of(chain_of(plan), places).to(device)


def pack_segments(summary: Summary, elements: Sequence[int], context: LinearContext) -> Tensor:
    """Packs some of the segments as one message ``[n, B, H, K V + |A|]``, without A where every rank knows it."""
    parts = [summary.states] if context.decay is not None else [summary.states, summary.transitions]
    rows = rows_of(elements)
    return torch.cat([rows.take(part).flatten(3) for part in parts], -1).transpose(0, 1).contiguous()


def segment_width(summary: Summary, context: LinearContext) -> int:
    """Returns how many numbers a message has for one head of one segment."""
    states, transitions = (tensor.shape[-2] * tensor.shape[-1] for tensor in (summary.states, summary.transitions))
    return states + (0 if context.decay is not None else transitions)


def unpack_segments(message: Tensor, summary: Summary, context: LinearContext) -> Summary:
    """Unpacks what another rank packed of segments like those of ``summary``.

    Its transitions are left out where all ranks know them.
    """
    message = message.transpose(0, 1)
    shape, states = summary.states.shape[-2:], summary.states.shape[-2] * summary.states.shape[-1]
    transitions = message[..., states:]
    if context.decay is None:
        transitions = transitions.unflatten(-1, summary.transitions.shape[-2:])
    return Summary(transitions, message[..., :states].unflatten(-1, shape))
