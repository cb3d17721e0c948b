"""Line charts as inline SVG: no script, no fonts, no files; colours come from the page's style."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Callable, Sequence

Points = list[tuple[float, float]]  # (x, y)

_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 14, 34
_MOST_POINTS = 600  # more than a screen shows are averaged
_MOST_HINTS = 200  # values that the pointer can ask for


def line_chart(
    label: str,
    steps: Sequence[int],
    values: Sequence[float | None],
    form: Callable[[float], str],
    smooth: bool,
) -> str:
    """A chart of one value per step; None leaves a gap. ``smooth`` adds a moving average over the raw line.

    ``form`` writes a value for axis and pointer.
    """
    known = [(float(step), value) for step, value in zip(steps, values, strict=True) if value is not None]
    if not known:
        return '<p class="empty">no values</p>'
    x_low, x_high = float(steps[0]), float(max(steps[-1], steps[0] + 1))
    y_low, y_high, y_ticks = _scale(min(y for _, y in known), max(y for _, y in known))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return (
            _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM),
        )

    raw = [_thinned(piece) for piece in _pieces(steps, values)]
    parts = [_grid(y_ticks, place, form, x_low), _steps_axis(x_low, x_high, place, y_low)]
    parts += [_path(piece, place, "raw" if smooth else "line") for piece in raw]
    if smooth:
        averaged = iter(_averaged([y for _, y in known]))
        trend = [None if value is None else next(averaged) for value in values]
        parts += [_path(_thinned(piece), place, "line") for piece in _pieces(steps, trend)]
    parts.append(_hints([point for piece in raw for point in piece], place, form))
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(label, quote=True)}">'
        + "".join(parts)
        + "</svg>"
    )


def _averaged(values: Sequence[float]) -> list[float]:
    """The mean of about a twentieth of the run around each value, fewer towards both ends: it never lags."""
    sums = [0.0, *itertools.accumulate(values)]
    averages = []
    for place in range(len(values)):
        reach = min(len(values) // 40 + 1, place, len(values) - 1 - place)
        averages.append((sums[place + reach + 1] - sums[place - reach]) / (2 * reach + 1))
    return averages


def _pieces(steps: Sequence[int], values: Sequence[float | None]) -> list[Points]:
    """The stretches without gaps."""
    pieces: list[Points] = [[]]
    for step, value in zip(steps, values, strict=True):
        if value is not None:
            pieces[-1].append((float(step), value))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _thinned(points: Points) -> Points:
    stride = math.ceil(len(points) / _MOST_POINTS)
    if stride == 1:
        return points
    groups = [points[i : i + stride] for i in range(0, len(points), stride)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _scale(low: float, high: float) -> tuple[float, float, list[float]]:
    """Round limits around the values, and the round numbers between them."""
    spread = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(spread / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if spread / (power * factor) <= 4)
    first, last = math.floor(low / step), math.ceil(high / step)
    if first == last:
        first, last = first - 1, last + 1
    return first * step, last * step, [number * step for number in range(first, last + 1)]


Place = Callable[[float, float], tuple[float, float]]


def _grid(ticks: Sequence[float], place: Place, form: Callable[[float], str], x: float) -> str:
    lines = []
    for tick in ticks:
        _, y = place(x, tick)
        lines.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{html.escape(form(tick))}</text>'
        )
    return "".join(lines)


def _steps_axis(low: float, high: float, place: Place, y: float) -> str:
    _, _, ticks = _scale(low, high)
    shown = [tick for tick in ticks if low <= tick <= high and tick == int(tick)]
    below = _HEIGHT - _BOTTOM + 18
    labels = [
        f'<text x="{place(tick, y)[0]:.1f}" y="{below}" text-anchor="middle">{int(tick)}</text>' for tick in shown
    ]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    return "".join(labels) + f'<text x="{middle}" y="{_HEIGHT - 2}" text-anchor="middle">step</text>'


def _path(points: Points, place: Place, kind: str) -> str:
    if len(points) == 1:
        x, y = place(*points[0])
        return f'<circle class="{kind} dot" cx="{x:.1f}" cy="{y:.1f}" r="2"/>'
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    return f'<polyline class="{kind}" points="{corners}"/>'


def _hints(points: Points, place: Place, form: Callable[[float], str]) -> str:
    """Invisible targets that tell step and value to the pointer."""
    stride = math.ceil(len(points) / _MOST_HINTS)
    return "".join(
        f'<circle class="hint" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>step {step:.0f}: '
        f"{html.escape(form(value))}</title></circle>"
        for step, value in points[::stride]
        for x, y in [place(step, value)]
    )
