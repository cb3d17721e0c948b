"""Rotary position embeddings by type: which settings each takes, and the frequencies and factor that follow from them.

Formulas are those of ``transformers`` 5 (``modeling_rope_utils.py``), taken in fp64. Frequencies never depend on the
tokens at hand: types whose table depends on a length take a declared one, the same for every rank and document.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Frequencies = tuple[float, ...]


@dataclass(frozen=True)
class RopeSettings:
    """Holds what a table of positions is computed from, in the words of Hugging Face's ``rope_parameters``."""

    rope_type: str | None = None  # null: default; none: no positions
    rope_theta: float | None = None  # null: model.rope_theta
    partial_rotary_factor: float = 1.0  # share of a head's channels that turn
    factor: float | None = None  # how much longer than the original
    original_max_position_embeddings: int | None = None  # tokens that the model was made for
    max_position_embeddings: int | None = None  # of dynamic and longrope
    attention_factor: float | None = None  # multiplies cosine and sine; null: what the type says
    beta_fast: float | None = None  # yarn; null: 32
    beta_slow: float | None = None  # yarn; null: 1
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None  # yarn's ramp in whole channels; null: true
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None  # llama3
    short_factor: tuple[float, ...] | None = None  # longrope, a number a channel pair
    long_factor: tuple[float, ...] | None = None
    length: int | None = None  # what dynamic and longrope are computed for; null: data.seq_len


@dataclass(frozen=True)
class Table:
    """Holds what turns a position into angles.

    ``frequencies``: of the channel pairs that turn, radians per token. ``factor`` multiplies cosine and
    sine, and so logits by its square.
    """

    frequencies: Frequencies
    factor: float = 1.0

    @property
    def rotated(self) -> int:
        """Counts the channels of a head that are rotated; the others pass."""
        return 2 * len(self.frequencies)


@dataclass(frozen=True)
class RopeType:
    """Declares a type: fields it ``needs`` and others that it ``reads``, and how its table follows from them.

    ``table(settings, theta, head_dim)``. ``by_length``: the table depends on the declared length.
    """

    table: Callable[[RopeSettings, float, int], Table]
    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    by_length: bool = False


def table_of(name: str, settings: RopeSettings, theta: float, head_dim: int) -> Table:
    """Computes the table of a type for heads of ``head_dim`` channels. ``settings`` have passed their checks."""
    return TYPES[name].table(settings, theta, head_dim)


def _rotated(settings: RopeSettings, head_dim: int) -> int:
    return int(head_dim * settings.partial_rotary_factor)


def _powers(theta: float, rotated: int) -> Frequencies:
    """Computes ``theta ** (-2i / d)``, the frequencies of an unscaled table."""
    return tuple(theta ** (-channel / rotated) for channel in range(0, rotated, 2))


def _none(settings: RopeSettings, theta: float, head_dim: int) -> Table:
    return Table(())


def _default(settings: RopeSettings, theta: float, head_dim: int) -> Table:
    return Table(_powers(theta, _rotated(settings, head_dim)))


def _linear(settings: RopeSettings, theta: float, head_dim: int) -> Table:
    assert settings.factor is not None, "checked"
    return Table(tuple(f / settings.factor for f in _powers(theta, _rotated(settings, head_dim))))


def _ntk(settings: RopeSettings, theta: float, head_dim: int) -> Table:
    assert settings.factor is not None, "checked"
    rotated = _rotated(settings, head_dim)
    return Table(_powers(theta * settings.factor ** (rotated / (rotated - 2)), rotated))


def _dynamic(settings: RopeSettings, theta: float, head_dim: int) -> Table:
    assert settings.factor is not None and settings.max_position_embeddings is not None and settings.length is not None
    rotated, original = _rotated(settings, head_dim), settings.max_position_embeddings
    stretched = settings.factor * max(settings.length, original) / original - (settings.factor - 1.0)
    return Table(_powers(theta * stretched ** (rotated / (rotated - 2)), rotated))


def _yarn(settings: RopeSettings, theta: float, head_dim: int) -> Table:
    factor, original = settings.factor, settings.original_max_position_embeddings
    assert factor is not None and original is not None, "checked"
    rotated = _rotated(settings, head_dim)
    extrapolated = _powers(theta, rotated)
    fast = 32.0 if settings.beta_fast is None else settings.beta_fast
    slow = 1.0 if settings.beta_slow is None else settings.beta_slow

    def channel(rotations: float) -> float:
        """The channel that turns so many times over the original length."""
        return rotated * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(fast), channel(slow)
    if settings.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    if low == high:
        high += 0.001
    ramp = (min(max((pair - low) / (high - low), 0.0), 1.0) for pair in range(rotated // 2))
    frequencies = tuple(f * (1.0 - share) + f / factor * share for f, share in zip(extrapolated, ramp, strict=True))
    return Table(frequencies, _yarn_factor(settings, factor))


def _yarn_factor(settings: RopeSettings, factor: float) -> float:
    if settings.attention_factor is not None:
        return settings.attention_factor

    def scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if settings.mscale and settings.mscale_all_dim:
        return scale(settings.mscale) / scale(settings.mscale_all_dim)
    return scale(1.0)


def _longrope(settings: RopeSettings, theta: float, head_dim: int) -> Table:
    original, length = settings.original_max_position_embeddings, settings.length
    assert original is not None and length is not None, "checked"
    rotated = _rotated(settings, head_dim)
    chosen = settings.long_factor if length > original else settings.short_factor
    assert chosen is not None, "checked"
    frequencies = tuple(f / own for f, own in zip(_powers(theta, rotated), chosen, strict=True))
    if settings.attention_factor is not None:
        return Table(frequencies, settings.attention_factor)
    factor = settings.factor
    if factor is None:
        assert settings.max_position_embeddings is not None, "checked"
        factor = settings.max_position_embeddings / original
    return Table(frequencies, 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original)))


def _llama3(settings: RopeSettings, theta: float, head_dim: int) -> Table:
    factor, original = settings.factor, settings.original_max_position_embeddings
    low, high = settings.low_freq_factor, settings.high_freq_factor
    assert factor is not None and original is not None and low is not None and high is not None, "checked"

    def scaled(frequency: float) -> float:
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            return frequency
        if wavelength > original / low:
            return frequency / factor
        smooth = (original / wavelength - low) / (high - low)
        return (1 - smooth) * frequency / factor + smooth * frequency

    return Table(tuple(map(scaled, _powers(theta, _rotated(settings, head_dim)))))


def _proportional(settings: RopeSettings, theta: float, head_dim: int) -> Table:
    turned, factor = int(settings.partial_rotary_factor * head_dim // 2), settings.factor or 1.0
    powers = _powers(theta, head_dim)
    return Table(tuple(f / factor if pair < turned else 0.0 for pair, f in enumerate(powers)))


_SCALED = ("factor", "original_max_position_embeddings")

TYPES: dict[str, RopeType] = {
    "default": RopeType(_default),
    "none": RopeType(_none),  # no positions at all (NoPE)
    "linear": RopeType(_linear, ("factor",)),
    "ntk": RopeType(_ntk, ("factor",)),
    "dynamic": RopeType(_dynamic, ("factor", "max_position_embeddings"), by_length=True),
    "yarn": RopeType(
        _yarn, _SCALED, ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
    ),
    "longrope": RopeType(
        _longrope,
        ("short_factor", "long_factor", "original_max_position_embeddings"),
        ("factor", "attention_factor", "max_position_embeddings"),
        by_length=True,
    ),
    "llama3": RopeType(_llama3, (*_SCALED, "low_freq_factor", "high_freq_factor")),
    "proportional": RopeType(_proportional, (), ("factor",)),
}
