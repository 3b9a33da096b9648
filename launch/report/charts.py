"""Line charts as inline SVG, drawn by hand: no library, no network; readable in light and dark by CSS variables.

    line_chart("loss", [Series("loss", steps, values)], reference=(4.85, "blind guess"))

A chart is a string of SVG for a page that defines the classes used here (page.html.j2). Its numbers travel along in a
data attribute, so that the page's script can show the nearest one under the pointer; without script it reads as well.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

POINTS = 360  # per series in the page: more than the pixels a chart gets
WIDTH, HEIGHT = 400, 216
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 26


@dataclass
class Series:
    """One line: `y` may hold None (not measured, not finite), which leaves a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    smooth: bool = False
    """Draw the running mean on top and the values themselves faintly."""


def line_chart(
    series: Sequence[Series],
    unit: str = "",
    zero: bool = False,
    reference: tuple[float, str] | None = None,
    x_name: str = "step",
    label: str = "",
) -> str:
    """The SVG of a chart, or nothing where no series has a finite value.

    Args:
        unit: "%" shows fractions in percent; another unit stands behind the number under the pointer.
        zero: let the scale begin at 0.
        reference: a dashed level with its name, for example what a blind guess scores.
        label: what the chart shows, for screen readers.
    """
    series = [clean for each in series if (clean := _finite(each)).x]
    if not series:
        return ""
    lines = [(each, downsample(each)) for each in series]
    xs = [x for each in series for x in (each.x[0], each.x[-1])]
    ys = [y for _, points in lines for _, y in points if y is not None]
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = min(ys), max(ys)
    if reference is not None and _worth_showing(reference[0], y_low, y_high):
        y_low, y_high = min(y_low, reference[0]), max(y_high, reference[0])
    else:
        reference = None
    if zero:
        y_low = min(0.0, y_low)
    y_ticks = ticks(y_low, y_high, 5, unit)
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])
    x_ticks = [t for t in ticks(x_low, x_high, 4) if x_low <= t <= x_high]

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
            {"name": each.name, "points": [[_short(x), _short(y)] for x, y in points if y is not None]}
            for each, points in lines
        ],
    }
    out.append(f' data-chart="{html.escape(json.dumps(payload, separators=(",", ":")), quote=True)}">')
    for tick in y_ticks:
        y = py(tick)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="tick end" x="{LEFT - 7}" y="{y + 4:.1f}">{_tick(tick, y_ticks, unit)}</text>')
    for tick in x_ticks:
        out.append(f'<text class="tick mid" x="{px(tick):.1f}" y="{HEIGHT - 8}">{_tick(tick, x_ticks)}</text>')
    if reference is not None:
        y, name = py(reference[0]), html.escape(reference[1])
        out.append(f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        above = y - 5 if y > TOP + 14 else y + 13
        out.append(f'<text class="tick end" x="{WIDTH - RIGHT - 2}" y="{above:.1f}">{name}</text>')
    for number, (each, points) in enumerate(lines, start=1):
        if each.smooth and len(each.x) > 20:
            out.append(f'<path class="line faint c{number}" d="{_path(points, px, py)}"/>')
            points = downsample(Series(each.name, each.x, running_mean(each.y)))
        out.append(f'<path class="line c{number}" d="{_path(points, px, py)}"/>')
        if len(each.x) <= 24:
            dots = [(px(x), py(y)) for x, y in points if y is not None]
            out += [f'<circle class="dot c{number}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in dots]
    out.append('<line class="cursor" y1="0" y2="0"/></svg>')
    return "".join(out)


def downsample(series: Series, points: int = POINTS) -> list[tuple[float, float | None]]:
    """At most about `points` points that keep each stretch's lowest and highest value, so that no spike is lost."""
    n = len(series.x)
    if n <= points:
        return list(zip(series.x, series.y, strict=True))
    kept: list[tuple[float, float | None]] = []
    buckets = points // 2
    for b in range(buckets):
        some = range(b * n // buckets, (b + 1) * n // buckets)
        known = [(y, i) for i in some if (y := series.y[i]) is not None]
        if not known:
            kept.append((series.x[some[0]], None))
            continue
        ends = {min(known)[1], max(known)[1]} | ({0} if b == 0 else set()) | ({n - 1} if b == buckets - 1 else set())
        kept += [(series.x[i], series.y[i]) for i in sorted(ends)]
    return kept


def running_mean(values: Sequence[float | None]) -> list[float | None]:
    """The mean over a fortieth of the run around each point, less at its ends; gaps stay gaps."""
    half = max(2, len(values) // 80)
    sums, known = [0.0], [0]
    for value in values:
        sums.append(sums[-1] + (value or 0.0))
        known.append(known[-1] + (value is not None))
    out: list[float | None] = []
    for i, value in enumerate(values):
        reach = min(half, i, len(values) - 1 - i)  # the same on both sides, so that a slope is not bent
        low, high = i - reach, i + reach + 1
        out.append((sums[high] - sums[low]) / (known[high] - known[low]) if value is not None else None)
    return out


def ticks(low: float, high: float, count: int, unit: str = "") -> list[float]:
    """Round numbers (1, 2, 2.5, 5 times a power of ten) that enclose [low, high], about `count` steps apart."""
    if high <= low:
        spread = abs(low) * 0.1 or (0.01 if unit == "%" else 1.0)
        low, high = low - spread, high + spread
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float, digits: int = 3) -> str:
    """1234567 -> 1.23M, 0.000512 -> 5.12e-4."""
    size = abs(value)
    if size == 0:
        return "0"
    if size < 0.01:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{_trim(mantissa)}e{int(exponent)}"
    for limit, unit, suffix in ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"), (0, 1, "")):
        if size >= limit:
            shown = value / unit
            decimals = max(0, digits - 1 - math.floor(math.log10(abs(shown))))
            return _trim(f"{shown:,.{decimals}f}") + suffix
    raise AssertionError(value)


def _tick(value: float, all_ticks: Sequence[float], unit: str = "") -> str:
    """A tick's label: percent where fractions are shown, else with the fewest digits that are exact for all of them."""
    if unit == "%":
        return f"{_trim(f'{100 * value:.2f}')}%"
    digits = next((d for d in (1, 2, 3, 4, 5) if all(number(t, d) == number(t, d + 3) for t in all_ticks)), 6)
    return number(value, digits)


def _trim(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def _finite(series: Series) -> Series:
    """Without points at either end that have no value; infinite ones count as none."""
    points = [
        (float(x), float(y) if y is not None and math.isfinite(y) else None) for x, y in zip(series.x, series.y, strict=True)
    ]
    known = [i for i, (_, y) in enumerate(points) if y is not None]
    points = points[known[0] : known[-1] + 1] if known else []
    return Series(series.name, [x for x, _ in points], [y for _, y in points], series.smooth)


def _worth_showing(level: float, low: float, high: float) -> bool:
    """Whether a reference may stretch the scale: not beyond three times the data's own range."""
    return low - 2 * (high - low) <= level <= high + 2 * (high - low)


def _path(points: Sequence[tuple[float, float | None]], px: object, py: object) -> str:
    assert callable(px)
    assert callable(py)
    parts, pen = [], "M"
    for x, y in points:
        if y is None:
            pen = "M"
            continue
        parts.append(f"{pen}{px(x):.1f} {py(y):.1f}")
        pen = "L"
    return "".join(parts)


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}") if abs(value) < 1e5 else round(value, 1)
