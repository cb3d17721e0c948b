"""Draws line charts as inline SVG: no script, no fonts, no files; colours come from the page's style.

This module places lines, ticks and hints in the frame; ``templates/chart.svg.jinja`` writes them down.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longctx.reporting.report.templating import fill

if TYPE_CHECKING:
    from markupsafe import Markup

Point = tuple[float, float]
Points = list[Point]
Form = Callable[[float], str]

WIDTH, HEIGHT = 560, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 14, 24, 40
_MOST_BUCKETS = 400  # more than a screen shows are thinned
_MOST_HINTS = 100  # values that the pointer can ask for
_MOST_GAPS = 100  # marks of steps without a value
SMOOTH_FROM = 8  # values; fewer are shown as they are


@dataclass(frozen=True)
class ChartFrame:
    """Holds the range of values that a chart shows, and places each of them in the picture."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    left: float = _LEFT
    right: float = WIDTH - _RIGHT
    top: float = _TOP
    bottom: float = HEIGHT - _BOTTOM

    def x(self, value: float) -> float:
        """Returns the horizontal place of a step, from the left."""
        return self.left + (value - self.x_low) / (self.x_high - self.x_low) * (self.right - self.left)

    def y(self, value: float) -> float:
        """Returns the vertical place of a value, from the top."""
        return self.bottom - (value - self.y_low) / (self.y_high - self.y_low) * (self.bottom - self.top)


@dataclass(frozen=True)
class Tick:
    """Holds a number on an axis, and where it lies."""

    at: float
    label: str


@dataclass(frozen=True)
class Hint:
    """Holds a stretch of the chart that tells a step and its value to the pointer."""

    left: float
    width: float
    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Line:
    """Holds a stretch of a curve without gaps; ``kind`` is its class in the page's style."""

    kind: str
    points: Points

    @property
    def corners(self) -> str:
        """Lists the curve's points as a ``polyline`` of SVG does."""
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in self.points)


def line_chart(
    label: str, steps: Sequence[int], values: Sequence[float | None], form: Form, smooth: bool
) -> Markup | str:
    """Draws one value per step; None leaves a gap, marked below. ``smooth`` adds a moving average.

    ``form`` writes a value for axis and pointer. Of long runs the curve keeps the extremes of each stretch.
    """
    known = [(float(step), value) for step, value in zip(steps, values, strict=True) if value is not None]
    if not known:
        return fill("empty.html.jinja")
    y_low, y_high, y_ticks = round_scale(min(y for _, y in known), max(y for _, y in known))
    frame = ChartFrame(float(steps[0]), float(max(steps[-1], steps[0] + 1)), y_low, y_high)
    smooth = smooth and len(known) >= SMOOTH_FROM
    raw = [_extremes(piece) for piece in _pieces(steps, values)]
    lines = [_placed("raw" if smooth else "line", piece, frame) for piece in raw]
    if smooth:
        averaged = iter(_averaged([y for _, y in known]))
        trend = [None if value is None else next(averaged) for value in values]
        lines += [_placed("line", _means(piece), frame) for piece in _pieces(steps, trend)]
    return fill(
        "chart.svg.jinja",
        label=label,
        width=WIDTH,
        height=HEIGHT,
        frame=frame,
        y_ticks=[Tick(frame.y(tick), form(tick)) for tick in y_ticks],
        x_ticks=_step_ticks(frame),
        lines=lines,
        gaps=_gaps(steps, values, frame),
        hints=list(_hints(known, frame, form)),
    )


def round_scale(low: float, high: float) -> tuple[float, float, list[float]]:
    """Finds round limits around the values, and the round numbers between them."""
    spread = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(spread / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if spread / (power * factor) <= 4)
    first, last = math.floor(low / step), math.ceil(high / step)
    if first == last:
        first, last = first - 1, last + 1
    return first * step, last * step, [number * step for number in range(first, last + 1)]


def _placed(kind: str, points: Points, frame: ChartFrame) -> Line:
    return Line(kind, [(frame.x(x), frame.y(y)) for x, y in points])


def _averaged(values: Sequence[float]) -> list[float]:
    """Averages about a twentieth of the run around each value, fewer towards both ends, where it would lag."""
    sums = [0.0, *itertools.accumulate(values)]
    widest, count = len(values) // 40 + 1, len(values)
    averages = []
    for place in range(count):
        # Never so few that the ends of the curve show nothing but noise.
        reach = max(min(widest, place, count - 1 - place), widest // 4)
        start, stop = max(place - reach, 0), min(place + reach + 1, count)
        averages.append((sums[stop] - sums[start]) / (stop - start))
    return averages


def _pieces(steps: Sequence[int], values: Sequence[float | None]) -> list[Points]:
    """Lists the stretches without gaps."""
    pieces: list[Points] = [[]]
    for step, value in zip(steps, values, strict=True):
        if value is not None:
            pieces[-1].append((float(step), value))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _buckets(points: Points, most: int) -> list[Points]:
    stride = math.ceil(len(points) / most)
    return [points[i : i + stride] for i in range(0, len(points), stride)]


def _extremes(points: Points) -> Points:
    """Keeps the lowest and the highest point of each bucket, so that no spike of a long run is lost."""
    kept: Points = []
    for bucket in _buckets(points, _MOST_BUCKETS):
        ends = {min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def _means(points: Points) -> Points:
    buckets = _buckets(points, _MOST_BUCKETS)
    return [(sum(x for x, _ in bucket) / len(bucket), sum(y for _, y in bucket) / len(bucket)) for bucket in buckets]


def _step_ticks(frame: ChartFrame) -> list[Tick]:
    _, _, ticks = round_scale(frame.x_low, frame.x_high)
    shown = [tick for tick in ticks if frame.x_low <= tick <= frame.x_high and tick == int(tick)]
    return [Tick(frame.x(tick), f"{int(tick)}") for tick in shown]


def _gaps(steps: Sequence[int], values: Sequence[float | None], frame: ChartFrame) -> list[Tick]:
    missing = [step for step, value in zip(steps, values, strict=True) if value is None]
    return [Tick(frame.x(step), f"step {step}: no finite value") for step in missing[:_MOST_GAPS]]


def _hints(known: Points, frame: ChartFrame, form: Form) -> Iterator[Hint]:
    """Yields targets side by side over the whole width, each around the value that it tells."""
    told = known[:: math.ceil(len(known) / _MOST_HINTS)]
    at = [frame.x(step) for step, _ in told]
    borders = [frame.left, *((one + other) / 2 for one, other in itertools.pairwise(at)), frame.right]
    for (step, value), x, left, right in zip(told, at, borders[:-1], borders[1:], strict=True):
        yield Hint(left, right - left, x, frame.y(value), f"step {step:.0f}: {form(value)}")
