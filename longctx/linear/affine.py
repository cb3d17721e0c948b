"""Computes the one algebra of linear attention: a run of tokens maps the state affinely, and runs compose.

    S_out = A S_in + B          (A2, B2) after (A1, B1) = (A2 A1, A2 B1 + B2)

States S and additions B are ``[B, n, H, K, V]``, n elements in order. A transition A is kept as what multiplies a
state: ``[B, n, H, 1, 1]`` a number, ``[B, n, H, K, 1]`` a diagonal, ``[B, n, H, K, K]`` a matrix; dimensions of size
1 are shared. Decays are numbers of [0, 1], so products of them can only underflow to the 0 that they mean. A document
start is A = 0. Everything is in the accumulation dtype.

0 times a state that has gone to infinity is no number. So where a document starts, the state is dropped rather than
multiplied away (``Resets``), and so are gradients on their way back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Runs = tuple[tuple[int, int], ...]  # half-open ranges of elements; each run starts from a state of its own


@dataclass(frozen=True)
class Resets:
    """Says through which elements no state passes: a document starts in them.

    ``mask`` bool ``[B', n, 1, 1, 1]``. ``at``: by element, whether it is so in any batch row, known on the host.
    """

    mask: Tensor
    at: tuple[bool, ...]

    @classmethod
    def where_not(cls, passes: Tensor) -> Resets | None:
        """Returns the resets of bool ``[B', n]`` on the host; None where a state passes through everything."""
        at = tuple((~passes).any(0).tolist())
        return cls(~passes[:, :, None, None, None], at) if any(at) else None

    def to(self, device: torch.device) -> Resets:
        return Resets(self.mask.to(device), self.at)


def dropped(states: Tensor, resets: Resets | None) -> Tensor:
    """Returns states ``[B, n, H, K, V]``, 0 where none passes through the element."""
    return states if resets is None else states.masked_fill(resets.mask, 0)


def affine_exscan(
    transitions: Tensor,
    additions: Tensor,
    initial: Tensor | None = None,
    runs: Runs | None = None,
    resets: Resets | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the state that enters each element and the state that leaves each run.

    They are ``[B, n, H, K, V]`` and ``[B, r, H, K, V]``. ``initial`` ``[B, r, H, K, V]``: what enters each run, 0 if
    left out. Differentiable: the backward pass is the same scan in reverse with the transitions transposed.
    """
    runs = ((0, additions.shape[1]),) if runs is None else runs
    initial = _nothing(additions, runs) if initial is None else initial
    entering, leaving = _Exscan.apply(transitions, additions, initial, runs, resets)
    return entering, leaving


def affine_exscan_adjoint(
    transitions: Tensor,
    entering: Tensor,
    leaving: Tensor | None = None,
    runs: Runs | None = None,
    resets: Resets | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of additions and initial states, which the scan's backward pass computes.

    ``entering``, ``leaving``: gradients of the states that enter elements and that leave runs; the latter are 0 if left
    out.
    """
    runs = ((0, entering.shape[1]),) if runs is None else runs
    leaving = _nothing(entering, runs) if leaving is None else leaving
    additions, initial = torch.empty_like(entering), torch.empty_like(leaving)
    for run, (start, stop) in enumerate(runs):
        gradient = leaving[:, run]
        for element in range(stop - 1, start - 1, -1):
            additions[:, element] = gradient
            passed = _dropped_at(element, _multiplied(_element(transitions, element).mT, gradient), resets)
            gradient = passed + entering[:, element]
        initial[:, run] = gradient
    return additions, initial


def apply_transitions(transitions: Tensor, states: Tensor) -> Tensor:
    """Returns A S, element by element."""
    return _multiplied(transitions, states)


def transition_gradient(leaving: Tensor, entering: Tensor, shape: torch.Size, resets: Resets | None = None) -> Tensor:
    """Returns the gradient of every transition, dA = D_out S_in^T, summed to what ``shape`` keeps of it."""
    whole = leaving @ entering.mT if shape[-1] > 1 else leaving * entering
    return dropped(whole, resets).sum_to_size(shape)


def _nothing(elements: Tensor, runs: Runs) -> Tensor:
    return elements.new_zeros(elements.shape[0], len(runs), *elements.shape[2:])


def _dropped_at(element: int, state: Tensor, resets: Resets | None) -> Tensor:
    return state if resets is None or not resets.at[element] else state.masked_fill(resets.mask[:, element], 0)


def _element(transitions: Tensor, element: int) -> Tensor:
    return transitions[:, element if transitions.shape[1] > 1 else 0]


def _multiplied(transition: Tensor, state: Tensor) -> Tensor:
    """Multiplies by a matrix, or scales by a number or a diagonal, whichever way it lies."""
    if transition.shape[-1] == 1:
        return transition * state
    if transition.shape[-2] == 1:
        return transition.mT * state
    return transition @ state


class _Exscan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, transitions: Tensor, additions: Tensor, initial: Tensor, runs: Runs, resets: Resets | None
    ) -> tuple[Tensor, Tensor]:
        entering, leaving = torch.empty_like(additions), torch.empty_like(initial)
        for run, (start, stop) in enumerate(runs):
            state = initial[:, run]
            for element in range(start, stop):
                entering[:, element] = state
                state = _dropped_at(element, state, resets)
                state = _multiplied(_element(transitions, element), state) + additions[:, element]
            leaving[:, run] = state
        ctx.save_for_backward(transitions, entering)
        ctx.runs, ctx.resets = runs, resets
        return entering, leaving

    @staticmethod
    def backward(ctx: Any, dentering: Tensor, dleaving: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        transitions, states = ctx.saved_tensors
        additions, initial = affine_exscan_adjoint(transitions, dentering, dleaving, ctx.runs, ctx.resets)
        dtransitions = None
        if ctx.needs_input_grad[0]:
            dtransitions = transition_gradient(additions, states, transitions.shape, ctx.resets)
        return dtransitions, additions, initial, None, None
