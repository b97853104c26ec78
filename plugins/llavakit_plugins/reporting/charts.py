"""Line charts as inline SVG that keeps its text size at any width and takes its colours from CSS.

The SVG has no viewBox: its box is the plot area, positions are percentages of it, and the labels
stand outside, in the margin that the style sheet leaves. Only the curves are stretched, in a nested
SVG of 1000 by 1000 units. So a chart is as readable on a phone as on a desk.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import itemgetter
from statistics import median

from markupsafe import Markup

Point = tuple[float, float]

COLOURS = 8
"""The style sheet has the classes `s0` to `s7`; the next series takes the first again, dashed."""

_MANY = 60  # from here on, a running mean over a faint raw line reads better than dots
_BINS = 300  # about one a pixel of a small chart; each keeps its lowest and highest point
_TINY = 1e-300  # and its inverse: beyond, sums and quotients leave the range of a float
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Key:
    """One entry of the legend."""

    name: str
    style: str
    """Classes of the style sheet."""
    last: float | None
    """The last finite value, smoothed where the line is."""


@dataclass(frozen=True)
class Chart:
    """A drawn chart. `svg` is None where there is nothing to draw."""

    svg: Markup | None
    legend: tuple[Key, ...]
    notes: tuple[str, ...]


def draw_lines(
    series: Mapping[str, Sequence[Point]], *, title: str, x: str, y: str, log: bool | None = None
) -> Chart:
    """Draw every series over a common x axis.

    `x` and `y` say what the axes are. `log` asks for a logarithmic y axis; None takes one where a
    linear axis would squeeze most values to its foot. Points that are not finite leave a gap.
    """
    lines = {
        name: sorted((p for p in points if abs(p[0]) < 1 / _TINY), key=itemgetter(0))
        for name, points in series.items()
    }
    finite = [p for points in lines.values() for p in points if _finite(p)]
    skipped = sum(len(points) for points in series.values()) - len(finite)
    notes = (
        [f"{skipped} of {skipped + len(finite)} values are not finite and not drawn"]
        if skipped
        else []
    )
    if not finite:
        return Chart(None, (), tuple(notes or ["no values"]))

    values = sorted(value for _, value in finite)
    if log is None:
        log = _reads_better_as_log(values)
    elif log and values[0] < _TINY:
        log = False
        notes.append("linear axis: not every value is above zero")
    xs = [x for x, _ in finite]
    least = 1.0 if all(x == int(x) for x in xs) else 0.0
    across = _linear(min(xs), max(xs), tight=True, least=least)
    up = _logarithmic(values[0], values[-1]) if log else _linear(values[0], values[-1])

    body, legend, smoothed = [], [], False
    for index, (name, points) in enumerate(lines.items()):
        style = f"s{index % COLOURS}" + (" dashed" if index >= COLOURS else "")
        whole = [p for p in points if _finite(p)]
        if len(whole) < _MANY:
            body.append(_dots(whole, across, up, style))
        elif _is_noisy(whole):
            smoothed = True
            body.append(_path(_thin(points), across, up, f"raw {style}"))
            whole = _smooth(whole)
            mean = iter(whole)
            points = [next(mean) if _finite(p) else p for p in points]
        body.append(_path(_thin(points), across, up, f"line {style}"))
        legend.append(Key(name, style, whole[-1][1] if whole else None))
    if smoothed:
        notes.append("faint: every value; strong: running mean")
    label = f"{title}: {y} over {x}" + (", logarithmic" if log else "")
    svg = Markup(
        '<svg class="chart" role="img" aria-label="{}">{}{}{}'
        '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" width="100%" height="100%">{}'
        "</svg></svg>"
    ).format(label, _x_axis(across), _y_axis(up), _names(x, y), Markup("").join(body))
    return Chart(svg, tuple(legend), tuple(notes))


# -- axes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def position(self, value: float) -> float:
        """Return where a value lies: 0 at the low end, 1 at the high end."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(value)
        return (at - low) / (high - low)


def _linear(low: float, high: float, *, tight: bool = False, least: float = 0.0) -> _Axis:
    """Return an axis with ticks at round values, at least `least` apart.

    It ends at the data if `tight`, else at a tick.
    """
    if 0 <= low < high / (20 if tight else 2):
        low = 0.0  # a distance from zero should be seen as one
    if high - low <= max(1e-12 * max(abs(low), abs(high)), 1e-280):
        pad = abs(high) / 10 if abs(high) > 1e-270 else 1.0
        low, high = low - pad, high + pad
    # about six ticks; each side is divided first, as the difference of huge values may overflow
    rough = max(high / 6 - low / 6, least)
    power = 10.0 ** math.floor(math.log10(rough))
    # 0.999: a step that is just below a round value by rounding is taken as that value
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough * 0.999)
    ticks = [index * step for index in range(math.floor(low / step), math.ceil(high / step) + 1)]
    if tight:
        ticks = [tick for tick in ticks if low <= tick <= high]
    else:
        low, high = ticks[0], ticks[-1]
    return _Axis(low, high, tuple(zip(ticks, _texts(ticks, step), strict=True)))


def _logarithmic(low: float, high: float) -> _Axis:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if last - first > 3:
        powers = range(first, last + 1, math.ceil((last - first) / 6))
        marks = [(10.0**power, f"10{str(power).translate(_SUPERSCRIPTS)}") for power in powers]
    else:
        sizes = (1, 2, 5) if high / low > 8 else range(1, 10)
        fine = [size * 10.0**power for power in range(first, last + 1) for size in sizes]
        marks = [(mark, f"{mark:.3g}") for mark in fine]
    low, high = low / 1.1, high * 1.1
    return _Axis(low, high, tuple(mark for mark in marks if low <= mark[0] <= high), log=True)


def _reads_better_as_log(values: Sequence[float]) -> bool:
    low, high = values[0], values[-1]
    # half of the values would lie in the lowest eighth of a linear axis,
    # and differ by a factor of 20
    return low >= _TINY and high / low > 20 and median(values) - low < (high - low) / 8


def _texts(ticks: Sequence[float], step: float) -> list[str]:
    """Return the ticks' labels, alike in digits: 0.25, 1,500, 20k, 3M."""
    if not 1e-4 <= step < 1e12:
        return [f"{tick:.3g}" for tick in ticks]
    peak = max(abs(tick) for tick in ticks)
    units = ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))
    fitting = ((size, unit) for least, size, unit in units if peak >= least and step >= size / 10)
    size, suffix = next(fitting, (1.0, ""))
    digits = max(0, -math.floor(math.log10(step / size) + 1e-9))
    return [
        f"{tick / size:,.{digits}f}{suffix}".replace("-", "−") if tick else "0" for tick in ticks
    ]


def _x_axis(axis: _Axis) -> Markup:
    item = Markup('<text class="x{}" x="{:.2f}%" y="100%" dy="1.5em">{}</text>')
    crowded = len(axis.ticks) > 5  # a narrow screen then hides every second label
    return Markup("").join(
        item.format(" odd" if crowded and index % 2 else "", 100 * axis.position(tick), text)
        for index, (tick, text) in enumerate(axis.ticks)
    )


def _y_axis(axis: _Axis) -> Markup:
    item = Markup(
        '<line x1="0" x2="100%" y1="{0:.2f}%" y2="{0:.2f}%"/>'
        '<text class="y" x="0" dx="-0.6em" y="{0:.2f}%" dy="0.35em">{1}</text>'
    )
    return Markup("").join(
        item.format(100 - 100 * axis.position(tick), text) for tick, text in axis.ticks
    )


def _names(x: str, y: str) -> Markup:
    return Markup(
        '<text class="name y" x="0" y="0" dy="-1.2em">{1}</text>'
        '<text class="name x" x="50%" y="100%" dy="2.9em">{0}</text>'
    ).format(x, y)


# -- curves ----------------------------------------------------------------------------------------


def _path(points: Sequence[Point], across: _Axis, up: _Axis, style: str) -> Markup:
    parts, pen = [], "M"
    for point in points:
        if _finite(point):
            parts.append(f"{pen}{_at(point, across, up)}")
            pen = "L"
        else:
            pen = "M"
    return Markup('<path class="{}" d="{}"/>').format(style, "".join(parts))


def _dots(points: Sequence[Point], across: _Axis, up: _Axis, style: str) -> Markup:
    """Return strokes of no length: their round caps stay circles where the drawing is stretched."""
    marks = "".join(f"M{_at(point, across, up)}h0" for point in points)
    return Markup('<path class="dots {}" d="{}"/>').format(style, marks)


def _at(point: Point, across: _Axis, up: _Axis) -> str:
    return f"{1000 * across.position(point[0]):.1f} {1000 - 1000 * up.position(point[1]):.1f}"


def _is_noisy(points: Sequence[Point]) -> bool:
    """Say whether the line turns as much as it moves, as a loss does and a schedule doesn't."""
    moves = [after[1] - before[1] for before, after in pairwise(points)]
    if min(moves) >= 0 or max(moves) <= 0:  # a staircase turns, too, and has nothing to smooth
        return False
    turns = sum(abs(after - before) for before, after in pairwise(moves))
    return turns > sum(map(abs, moves)) / 2


def _smooth(points: Sequence[Point]) -> list[Point]:
    """Return the running mean over about a twenty-fifth of the points, centred where it can be."""
    reach = max(2, len(points) // 50)
    sums = list(accumulate((value for _, value in points), initial=0.0))
    smooth = []
    for index, (x, _) in enumerate(points):
        # narrow at the start, where a loss falls steeply; one-sided at the end, to be steady there
        first, last = index - min(reach, index), min(index + min(reach, index), len(points) - 1) + 1
        smooth.append((x, (sums[last] - sums[first]) / (last - first)))
    return smooth


def _thin(points: Sequence[Point]) -> Sequence[Point]:
    """Return at most a few points a pixel: the lowest and the highest of each bin, and the gaps."""
    if len(points) <= 2 * _BINS:
        return points
    xs = [x for x, _ in points]
    bins = [xs[0] + (xs[-1] - xs[0]) * number / _BINS for number in range(1, _BINS)]
    edges = [0, *(bisect_left(xs, edge) for edge in bins), len(xs)]
    thin: list[Point] = []
    for first, last in pairwise(edges):
        chunk = points[first:last]
        good = [p for p in chunk if _finite(p)]
        thin += [p for p in chunk if not _finite(p)][:1]
        if good:
            thin += sorted({min(good, key=itemgetter(1)), max(good, key=itemgetter(1))})
    return thin


def _finite(point: Point) -> bool:
    return abs(point[0]) < 1 / _TINY and abs(point[1]) < 1 / _TINY  # false for NaN, too
