"""Modes of torch that a caller has set change nothing of what operators compute, forward or backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from longctx.attention import StrategyAttention
from longctx.catalog import LINEAR_STRATEGIES, MIXERS, STRATEGIES
from longctx.linear import HeadDims, LinearAttention, get_mixer
from longctx.sequence import Documents, Mask, SequencePlan, make_layout

WIDTHS = HeadDims(8, 8)


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default dtype": default_dtype,
    "default device": lambda: torch.device("meta"),
    "deterministic": deterministic,
}


def plan_of(name: str) -> SequencePlan:
    """A new one for each call: what is worked out of it is worked out under the mode as well."""
    rows = (Documents.single(40),) if name == "rsa" else (Documents.from_lengths((11, 1, 28)),)
    return SequencePlan(rows, Mask(window=None if name == "rsa" else 30), make_layout("contiguous"), 40, 1)


def inputs(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, generator=draw, dtype=torch.float32, device="cpu")

    if name in STRATEGIES:
        return {key: drawn(1, 40, heads, 8).to(dtype) for key, heads in (("q", 4), ("k", 2), ("v", 2))}
    mixer = get_mixer("gla" if name in LINEAR_STRATEGIES else name)
    by_token = {key: drawn(1, 40, 2, channels).to(dtype) for key, channels in mixer.tokens(WIDTHS).items()}
    return by_token | {key: drawn(2, *shape) for key, shape in mixer.parameters(WIDTHS).items()}


PLANS: list[SequencePlan] = []  # of outputs whose backward pass is to come


def computed(name: str, given: dict[str, Tensor]) -> Tensor:
    plan = plan_of(name)
    PLANS.append(plan)
    if name in STRATEGIES:
        return StrategyAttention(name)(*given.values(), plan.handle)
    mixer = get_mixer("gla" if name in LINEAR_STRATEGIES else name)
    core = LinearAttention(name if name in LINEAR_STRATEGIES else "lasp2", chunk=16)
    return mixer.mix({**given, **mixer.constants(2, 0, 2)}, core, plan.handle)


def run(name: str, dtype: torch.dtype, mode: Callable[[], contextlib.AbstractContextManager[object]]) -> list[Tensor]:
    """out and the gradients, of which the backward pass runs inside the mode too."""
    leaves = {key: value.requires_grad_() for key, value in inputs(name, dtype).items()}
    with mode():
        out = computed(name, leaves)
        upstream = torch.ones(out.shape, dtype=out.dtype, device="cpu")
        grads = torch.autograd.grad(out, list(leaves.values()), upstream)
    PLANS.clear()
    return [out.detach(), *grads]


@pytest.mark.parametrize("name", [*STRATEGIES, *LINEAR_STRATEGIES, *MIXERS])
def test_a_mode_changes_nothing(name):
    for dtype in (torch.float32, torch.bfloat16):
        expected = run(name, dtype, contextlib.nullcontext)
        # What a mixer computes beside its operators is differentiated by torch, and so are factories of its own.
        modes = {mode: how for mode, how in MODES.items() if not (mode in OUTSIDE and name in MIXERS)}
        for mode, how in modes.items():
            for number, (mine, right) in enumerate(zip(run(name, dtype, how), expected, strict=True)):
                assert mine.dtype == right.dtype and torch.equal(mine, right), (mode, dtype, number)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            assert torch.equal(computed(name, inputs(name, dtype)), expected[0]), f"{name} without gradients"


OUTSIDE = ("default device", "autocast")


@pytest.mark.parametrize("name", ["ring", "ulysses", "gla", "gated_deltanet", "moba", "rat"])
def test_what_was_worked_out_in_inference_mode_serves_training(name):
    given = inputs(name, torch.float32)
    expected = run(name, torch.float32, contextlib.nullcontext)
    with torch.inference_mode():
        inside = computed(name, given)
    assert torch.equal(inside, expected[0])
    plan, mixer = PLANS.pop(), None if name in STRATEGIES else get_mixer(name)
    leaves = {key: value.requires_grad_() for key, value in inputs(name, torch.float32).items()}
    if mixer is None:
        out = StrategyAttention(name)(*leaves.values(), plan.handle)
    else:
        out = mixer.mix({**leaves, **mixer.constants(2, 0, 2)}, LinearAttention("lasp2", chunk=16), plan.handle)
    grads = torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))
    for mine, right in zip(grads, expected[1:], strict=True):
        assert torch.equal(mine, right)
