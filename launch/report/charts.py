"""Line charts as inline SVG, without a plotting library.

    draw_line_chart([Series("loss", steps, values)], reference=(4.85, "blind guess"))

A chart is a string of SVG for a page that defines the CSS classes used here (page.html.j2). A data attribute holds its
numbers, so that the page's script can show the one nearest to the pointer. The chart is complete without the script. CSS
variables make it readable in light and dark mode.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

POINTS = 360
"""Points of a series in the page: more than the pixels of a chart."""
WIDTH, HEIGHT = 400, 216
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 26
"""Margins around the plot, in the units of WIDTH and HEIGHT."""


@dataclass
class Series:
    """One line: `y` may hold None (not measured, not finite), which leaves a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    smooth: bool = False
    """Draw the running mean, and the values themselves faintly behind it."""


def draw_line_chart(
    series: Sequence[Series],
    unit: str = "",
    zero: bool = False,
    reference: tuple[float, str] | None = None,
    x_name: str = "step",
    label: str = "",
) -> str:
    """Return the SVG of a chart, or an empty string where no series has a finite value.

    Args:
        unit: "%" shows fractions in percent; another unit follows the number under the pointer.
        zero: let the scale begin at 0.
        reference: a level, drawn as a dashed line, and its name, for example what a blind guess scores.
        label: what the chart shows, for screen readers.
    """
    series = [finite for item in series if (finite := _drop_unmeasured_ends(item)).x]
    if not series:
        return ""
    lines = [(item, downsample(item)) for item in series]
    xs = [x for item in series for x in (item.x[0], item.x[-1])]
    ys = [y for _, points in lines for _, y in points if y is not None]
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = min(ys), max(ys)
    if reference is not None and _is_near(reference[0], y_low, y_high):
        y_low, y_high = min(y_low, reference[0]), max(y_high, reference[0])
    else:
        reference = None
    if zero:
        y_low = min(0.0, y_low)
    y_ticks = choose_ticks(y_low, y_high, 5, unit)
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])
    x_ticks = [t for t in choose_ticks(x_low, x_high, 4) if x_low <= t <= x_high]

    def px(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((x - x_low) / (x_high - x_low) if x_high > x_low else 0.5)

    def py(y: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (y - y_low) / (y_high - y_low))

    out = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label, quote=True)}"']
    payload = {
        "box": [LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM],
        "x": [x_low, x_high],
        "y": [y_low, y_high],
        "unit": unit,
        "xName": x_name,
        "series": [
            {"name": item.name, "points": [[_round(x), _round(y)] for x, y in points if y is not None]}
            for item, points in lines
        ],
    }
    out.append(f' data-chart="{html.escape(json.dumps(payload, separators=(",", ":")), quote=True)}">')
    for tick in y_ticks:
        y = py(tick)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="tick end" x="{LEFT - 7}" y="{y + 4:.1f}">{_format_tick(tick, y_ticks, unit)}</text>')
    for tick in x_ticks:
        out.append(f'<text class="tick mid" x="{px(tick):.1f}" y="{HEIGHT - 8}">{_format_tick(tick, x_ticks)}</text>')
    if reference is not None:
        y, name = py(reference[0]), html.escape(reference[1])
        out.append(f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        above = y - 5 if y > TOP + 14 else y + 13
        out.append(f'<text class="tick end" x="{WIDTH - RIGHT - 2}" y="{above:.1f}">{name}</text>')
    for number, (item, points) in enumerate(lines, start=1):
        if item.smooth and len(item.x) > 20:
            out.append(f'<path class="line faint c{number}" d="{_path(points, px, py)}"/>')
            points = downsample(Series(item.name, item.x, running_mean(item.y)))
        out.append(f'<path class="line c{number}" d="{_path(points, px, py)}"/>')
        if len(item.x) <= 24:
            dots = [(px(x), py(y)) for x, y in points if y is not None]
            out += [f'<circle class="dot c{number}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in dots]
    out.append('<line class="cursor" y1="0" y2="0"/></svg>')
    return "".join(out)


def downsample(series: Series, points: int = POINTS) -> list[tuple[float, float | None]]:
    """Reduce a series to about `points` points that keep the extremes of each interval: no spike is lost."""
    n = len(series.x)
    if n <= points:
        return list(zip(series.x, series.y, strict=True))
    chosen: list[tuple[float, float | None]] = []
    buckets = points // 2
    for b in range(buckets):
        bucket = range(b * n // buckets, (b + 1) * n // buckets)
        known = [(y, i) for i in bucket if (y := series.y[i]) is not None]
        if not known:
            chosen.append((series.x[bucket[0]], None))
            continue
        ends = {min(known)[1], max(known)[1]} | ({0} if b == 0 else set()) | ({n - 1} if b == buckets - 1 else set())
        chosen += [(series.x[i], series.y[i]) for i in sorted(ends)]
    return chosen


def running_mean(values: Sequence[float | None]) -> list[float | None]:
    """Return the mean of a fortieth of the values around each value, of fewer at the ends; keep gaps."""
    half = max(2, len(values) // 80)
    sums, known = [0.0], [0]
    for value in values:
        sums.append(sums[-1] + (value or 0.0))
        known.append(known[-1] + (value is not None))
    out: list[float | None] = []
    for i, value in enumerate(values):
        radius = min(half, i, len(values) - 1 - i)  # the same on both sides, so that a slope is not changed
        low, high = i - radius, i + radius + 1
        out.append((sums[high] - sums[low]) / (known[high] - known[low]) if value is not None else None)
    return out


def choose_ticks(low: float, high: float, count: int, unit: str = "") -> list[float]:
    """Choose round numbers that enclose [low, high], with about `count` intervals.

    Their distance is 1, 2, 2.5 or 5 times a power of ten.
    """
    if high <= low:
        spread = abs(low) * 0.1 or (0.01 if unit == "%" else 1.0)
        low, high = low - spread, high + spread
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def format_number(value: float, digits: int = 3) -> str:
    """Format a number with `digits` digits: 1234567 -> 1.23M, 0.000512 -> 5.12e-4."""
    size = abs(value)
    if size == 0:
        return "0"
    if size < 0.01:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{_trim(mantissa)}e{int(exponent)}"
    for limit, unit, suffix in ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"), (0, 1, "")):
        if size >= limit:
            scaled = value / unit
            decimals = max(0, digits - 1 - math.floor(math.log10(abs(scaled))))
            return _trim(f"{scaled:,.{decimals}f}") + suffix
    raise AssertionError(value)


def _format_tick(value: float, all_ticks: Sequence[float], unit: str = "") -> str:
    """Format a tick's label: in percent, or with the fewest digits that are exact for all ticks."""
    if unit == "%":
        return f"{_trim(f'{100 * value:.2f}')}%"
    digits = next((d for d in (1, 2, 3, 4, 5) if all(format_number(t, d) == format_number(t, d + 3) for t in all_ticks)), 6)
    return format_number(value, digits)


def _trim(text: str) -> str:
    """Drop zeros at the end of a decimal fraction."""
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def _drop_unmeasured_ends(series: Series) -> Series:
    """Drop points without a value at both ends of a series; values that are not finite become None."""
    points = [
        (float(x), float(y) if y is not None and math.isfinite(y) else None) for x, y in zip(series.x, series.y, strict=True)
    ]
    known = [i for i, (_, y) in enumerate(points) if y is not None]
    points = points[known[0] : known[-1] + 1] if known else []
    return Series(series.name, [x for x, _ in points], [y for _, y in points], series.smooth)


def _is_near(level: float, low: float, high: float) -> bool:
    """Return whether a reference is at most twice the data's range away from the data, to be shown."""
    return low - 2 * (high - low) <= level <= high + 2 * (high - low)


def _path(points: Sequence[tuple[float, float | None]], px: object, py: object) -> str:
    """Build the `d` attribute of an SVG path; None starts a new subpath."""
    assert callable(px)
    assert callable(py)
    commands, letter = [], "M"
    for x, y in points:
        if y is None:
            letter = "M"
            continue
        commands.append(f"{letter}{px(x):.1f} {py(y):.1f}")
        letter = "L"
    return "".join(commands)


def _round(value: float | None) -> float | None:
    """Round to the five digits that a chart can show."""
    return None if value is None else float(f"{value:.5g}") if abs(value) < 1e5 else round(value, 1)
