"""Defines mixers: what a linear layer computes between its projections, and what parallelism gives it.

A mixer is single-device code. It names the inputs that it wants of each token and head, and its parameters and
constants by head. It maps them through a core, which alone knows of other ranks. Each file of ``mixers`` holds one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Protocol

import torch
from torch import Generator, Tensor

from longctx.attention.runtime.borders import require_numbers
from longctx.catalog import MIXERS
from longctx.errors import ConfigError
from longctx.rules import whole
from longctx.sequence import Documents


@dataclass(frozen=True)
class HeadDims:
    """Counts the channels of one head: those of its keys, and of its values."""

    key: int
    value: int

    def __post_init__(self) -> None:
        for name, channels in vars(self).items():
            whole(f"channels of a head's {name}", channels, 1)


class LinearCore(Protocol):
    """Computes what parallelism gives to single-device code."""

    @property
    def group_name(self) -> str:
        """Names the group of the ranks that share the sequence, for mixers that bring operators of their own."""
        ...

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Tensor,
        log_decay: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> Tensor:
        """Maps q, k ``[B, T/SP, H/TP, K]`` and v ``[B, T/SP, H/TP, V]`` to ``[B, T/SP, H/TP, V]``; padding is 0.

        ``log_decay``: at most 0, by head ``[H/TP]``, token and head ``[B, T/SP, H/TP]``, or channel of the key
        ``[B, T/SP, H/TP, K]``. ``beta`` ``[B, T/SP, H/TP]``: the delta rule with a decay by token and head.
        """
        ...

    def convolve(self, xs: Sequence[Tensor], weights: Sequence[Tensor], plan: Tensor) -> list[Tensor]:
        """Convolves each x ``[B, T/SP, H/TP, C]`` causally with its short filter ``[H/TP, C, W]``, documents apart."""
        ...


Inputs = Mapping[str, Tensor]  # of tokens [B, T/SP, H/TP, c], and of heads [H/TP, ...], by name


def unsized(**sizes: int) -> Mixer:
    """Stands for the sizes of a mixer that reads none; nobody calls it."""
    raise AssertionError("this mixer reads no sizes")


@dataclass(frozen=True)
class Mixer:
    """Declares what a mixer reads of each token and head, what it learns, and how it computes.

    ``tokens``: inputs of a token, name to channels a head. ``parameters``: what is learned of each head, name to
    shape. ``constants(heads, layer, layers)``: what is fixed of each head, fp64 ``[H, ...]``. ``initial`` fills a
    parameter ``[H, *shape]`` at the start of training.

    ``mix(inputs, core, plan)`` gives ``[B, T/SP, H/TP, V]``. ``recurrence(inputs, documents)`` is its oracle, token by
    token over whole sequences ``[B, S, H, c]``. ``normed``: its output wants a norm by head. ``flops(widths, chunk)``:
    of a token and head in the core's forward pass. ``transition``: what its state does from token to token: ``none``,
    ``constant``, ``scalar``, ``diagonal``, ``dense``; None for a mixer that has no states and fetches tokens itself.
    ``reads``: fields of the model's section that set its sizes, and ``sized(**fields)`` the mixer of those.
    ``grouped``: inputs and parameters that may come by fewer heads, each of which serves consecutive others.
    """

    name: str
    tokens: Callable[[HeadDims], dict[str, int]]
    parameters: Callable[[HeadDims], dict[str, tuple[int, ...]]]
    constants: Callable[[int, int, int], dict[str, Tensor]]
    initial: Callable[[str, Tensor, Generator], None]
    mix: Callable[[Inputs, LinearCore, Tensor], Tensor]
    recurrence: Callable[[Inputs, Sequence[Documents]], Tensor]
    normed: bool
    flops: Callable[[HeadDims, int], float]
    transition: str | None = None
    reads: frozenset[str] = frozenset()
    sized: Callable[..., Mixer] = unsized
    grouped: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "mix", _bordered(self.mix, self.grouped))

    @property
    def has_states(self) -> bool:
        """Tells whether the mixer carries states, which a strategy moves."""
        return self.transition is not None


def _bordered(mix: Callable[[Inputs, LinearCore, Tensor], Tensor], grouped: frozenset[str]) -> Callable[..., Tensor]:
    """Makes a mixer refuse tokens that are not alike, and compute as it says where autocast is on, as its core does."""

    @wraps(mix)
    def of(x: Inputs, core: LinearCore, plan: Tensor) -> Tensor:
        by_token = {name: value for name, value in x.items() if isinstance(value, Tensor) and value.ndim == 4}
        if len(by_token) > 1:
            require_numbers(by_token)
            _require_alike(by_token, grouped)
        device = next(iter(x.values())).device.type
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return mix(x, core, plan)
        with torch.autocast(device, enabled=False):
            return mix(x, core, plan)

    return of


def _require_alike(by_token: Mapping[str, Tensor], grouped: frozenset[str]) -> None:
    """Refuses inputs of other tokens or heads than the rest; ``grouped`` ones have a part of the heads."""
    full, shared = ({name: x for name, x in by_token.items() if (name in grouped) is own} for own in (False, True))
    heads = [{x.shape[2] for x in some.values()} for some in (full, shared)]
    alike = len({x.shape[:2] for x in by_token.values()}) == 1 and max(map(len, heads)) == 1
    if not alike or (full and shared and min(heads[0]) % max(1, *heads[1])):
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in by_token.items())
        fewer = f"; {', '.join(sorted(shared))} may have a divisor of the heads" if shared else ""
        raise ConfigError(f"{shapes}: inputs of a mixer must have the same tokens and heads, [B, T, H, c]{fewer}")


def get_mixer(name: str, **sizes: int | bool | None) -> Mixer:
    """Returns the mixer of that name; ``sizes``: fields of the model that it reads, None for the paper's.

    Raises ``ConfigError`` for an unknown name, and for a size that the mixer does not read.
    """
    mixer: Mixer = MIXERS.load(name)
    given = {
        size: value if isinstance(value, bool) else whole(f"model.{size}", value)
        for size, value in sizes.items()
        if value is not None
    }
    for size, value in given.items():
        if size not in mixer.reads:
            readers = ", ".join(other for other in MIXERS if size in MIXERS.load(other).reads)
            raise ConfigError(f"model.{size}={value} is not read by mixer={name}; leave it at null, or set {readers}")
    return mixer.sized(**given) if given else mixer


def plain_tokens(widths: HeadDims) -> dict[str, int]:
    """Returns the inputs of most mixers, with their channels a head: queries, keys and values."""
    return {"q": widths.key, "k": widths.key, "v": widths.value}


def no_parameters(widths: HeadDims) -> dict[str, tuple[int, ...]]:
    """Returns no parameters, for mixers that learn nothing."""
    return {}


def no_constants(heads: int, layer: int, layers: int) -> dict[str, Tensor]:
    """Returns no constants, for mixers that fix nothing by head."""
    return {}


def nothing_to_fill(name: str, parameter: Tensor, generator: Generator) -> None:
    """Fills nothing, for mixers without parameters."""
    raise AssertionError(f"{name}: this mixer has no parameters")


def scan_flops(widths: HeadDims, chunk: int) -> float:
    """Counts the FLOP of a token and head in a scan.

    It reads and writes a state, 2 K V each, and sees half a chunk.
    """
    return 4.0 * widths.key * widths.value + chunk * (widths.key + widths.value)


def delta_flops(widths: HeadDims, chunk: int) -> float:
    """Counts the FLOP of a token and head of the delta rule.

    Besides the scan: what it erases, 2 K V, and the triangle of keys with its solution.
    """
    return scan_flops(widths, chunk) + 2.0 * widths.key * widths.value + chunk * (2 * widths.key + widths.value)


def fill_gate(name: str, parameter: Tensor, generator: Generator) -> None:
    """Fills the parameters of Mamba's gate (Gu and Dao, 2023).

    Rates e^A_log are from 1 to 16, steps softplus(dt_bias) from 0.001 to 0.1.
    """
    drawn = torch.rand(parameter.shape, generator=generator)
    if name == "A_log":
        parameter.copy_((1 + 15 * drawn).log())
        return
    assert name == "dt_bias", name
    step = (torch.tensor(1e-3).log() + drawn * torch.tensor(100.0).log()).exp()
    parameter.copy_(step + (-torch.expm1(-step)).log())  # the inverse of softplus
