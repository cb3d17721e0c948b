"""Checks linear mixers for ``longctx verify``: their inputs, what a rank computes, and their recurrence."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from longctx.attention.runtime.partial import accumulation_dtype
from longctx.errors import ConfigError
from longctx.linear import HeadDims, LinearAttention, LinearCase, Mixer, get_linear, get_mixer, refusal
from longctx.linear.reference import RecurrentCore
from longctx.verify.case import DTYPES, VerifyCase


def refused(case: VerifyCase) -> str | None:
    """Returns why a linear mixer is not executed exactly, None if it is.

    The reason comes from the rules of the strategy or the layout, or from options that linear layers do not have.
    """
    given = {"window": case.window, "kernel": None if case.kernel == "auto" else case.kernel, **case.options.chosen()}
    for name, value in given.items():
        if value is not None:
            return f"--{name.replace('_', '-')} {value}: linear layers have no such choice; leave it out"
    if case.kv_heads != case.heads:
        return (
            f"linear layers have as many key/value heads as query heads; nearest valid: --kv-heads {case.heads} for "
            f"--heads {case.heads}"
        )
    try:
        linear_case = LinearCase(
            case.world, case.heads, mixer_of(case).name, case.layout, case.layout_block, case.chunk, case.causal
        )
        reason = refusal(get_linear(case.strategy), linear_case)
        if reason is None:
            case.make_layout()
    except ConfigError as error:
        reason = str(error)
    return reason


def mixer_of(case: VerifyCase) -> Mixer:
    """Returns the mixer that the case names."""
    assert case.mixer is not None, "the command names one"
    return get_mixer(case.mixer, mixer_block=case.mixer_block, mixer_top_k=case.mixer_top_k)


def inputs(case: VerifyCase) -> dict[str, Tensor]:
    """Draws whole tensors by name, the same on every rank.

    Tensors of tokens and ``dout`` are ``[B, S, H, c]`` in the case's dtype. Tensors of heads are ``[H, ...]`` in the
    accumulation dtype, as shares of gradients that add up over ranks should be.
    """
    mixer, widths = mixer_of(case), HeadDims(case.head_dim, case.head_dim)
    generator, dtype = torch.Generator().manual_seed(case.seed), DTYPES[case.dtype]
    acc_dtype = accumulation_dtype(dtype)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tokens = {**mixer.tokens(widths), "dout": widths.value}
    by_token = {name: draw(case.batch, case.seq, case.heads, channels).to(dtype) for name, channels in tokens.items()}
    learned = {name: draw(case.heads, *shape).to(acc_dtype) for name, shape in mixer.parameters(widths).items()}
    fixed = {name: value.to(acc_dtype) for name, value in mixer.constants(case.heads, 0, 2).items()}
    return {**by_token, **learned, **fixed}


def head_tensors(case: VerifyCase) -> frozenset[str]:
    """Returns the names of inputs that every rank holds whole; their gradients are shares that add up over ranks."""
    widths = HeadDims(case.head_dim, case.head_dim)
    mixer = mixer_of(case)
    return frozenset(mixer.parameters(widths)) | frozenset(mixer.constants(case.heads, 0, 2))


def local_output(
    case: VerifyCase, group: dist.ProcessGroup | None, local: Mapping[str, Tensor], plan: Tensor
) -> Tensor:
    """Computes the output of this rank's tokens ``[B, T/SP, H, D]``."""
    return mixer_of(case).mix(local, LinearAttention(case.strategy, group, case.chunk), plan)


def reference(case: VerifyCase, whole: Mapping[str, Tensor]) -> Tensor:
    """Computes the output of all tokens ``[B, S, H, D]``, token by token.

    Where queries see later tokens it is computed from the sums of whole documents.
    """
    mixer = mixer_of(case)
    if case.causal:
        return mixer.recurrence(whole, case.packing)
    return mixer.mix(whole, RecurrentCore(case.packing, causal=False), torch.zeros(()))
