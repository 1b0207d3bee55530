"""Charts as inline SVG: no script, no network, colours from the page's style.

Everything is drawn in a box of 400 units width, so that its letters are as large on a phone as elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from markupsafe import Markup

WIDTH, HEIGHT = 400, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 14, 30
_MOST_POINTS = 240  # of a curve


class Frame:
    """A box with two axes, and what is drawn into it.

    Args:
        across, up: smallest and largest value of each axis.
        top: room above it for names.
    """

    def __init__(self, across: tuple[float, float], up: tuple[float, float], top: int = _TOP):
        self.across, self.up, self.top = _wide(across), _wide(up), top
        self.parts: list[Markup] = []

    def x(self, value: float) -> float:
        low, high = self.across
        return _LEFT + (value - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.up
        return HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _BOTTOM - self.top)

    def axes(self, across: str = "", unit: str = "") -> None:
        """Lines with numbers on both sides; ``across`` is what runs to the right, and ``unit`` ends numbers upwards."""
        for value in ticks(*self.up, 5):
            self.draw('<line class="grid" x1="{}" x2="{}" y1="{y}" y2="{y}"/>', _LEFT, WIDTH - _RIGHT, y=self.y(value))
            self.text(_LEFT - 5, self.y(value) + 4, f"{value:.6g}{unit}", "end")
        for value in ticks(*self.across, 5):
            self.text(self.x(value), HEIGHT - _BOTTOM + 15, f"{value:,.6g}", "middle")
        self.text(WIDTH - _RIGHT, HEIGHT - 2, across, "end")

    def draw(self, shape: str, *values: Any, **named: Any) -> None:
        """Add a shape; numbers are rounded, texts are escaped."""
        def plain(value: Any) -> Any:
            return f"{value:.1f}" if isinstance(value, float) else value

        markup = Markup(shape)  # noqa: S704 - shapes are written in this file, and what goes into them is escaped
        self.parts.append(markup.format(*map(plain, values), **{k: plain(v) for k, v in named.items()}))

    def text(self, x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> None:
        if words:
            self.draw('<text x="{}" y="{}" text-anchor="{}" class="{}">{}</text>', float(x), float(y), anchor, kind,
                      words)

    def line(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        path = " ".join(f"{self.x(a):.1f},{self.y(b):.1f}" for a, b in points)
        self.draw('<polyline class="line {}" points="{}"/>', kind, path)

    def dot(self, x: float, y: float, kind: str, title: str) -> None:
        self.draw('<circle class="dot {}" cx="{}" cy="{}" r="3.5"><title>{}</title></circle>', kind, self.x(x),
                  self.y(y), title)

    def svg(self, title: str) -> Markup:
        head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, title)
        return head + Markup("").join(self.parts) + Markup("</svg>")


def _wide(ends: tuple[float, float]) -> tuple[float, float]:
    low, high = ends
    return (low, high) if high > low else (low - (abs(low) or 1) * 0.5, low + (abs(low) or 1) * 0.5)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers between two ends, about so many.

    >>> ticks(0, 68, 5)
    [0.0, 20.0, 40.0, 60.0]
    """
    step = (high - low) / max(1, about)
    magnitude = 10.0 ** math.floor(math.log10(step))
    step = next(magnitude * n for n in (1, 2, 2.5, 5, 10) if magnitude * n >= step)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A curve of at most ``_MOST_POINTS``, each the mean of its neighbours."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    edges = [round(n * len(points) / _MOST_POINTS) for n in range(_MOST_POINTS + 1)]
    groups = [points[a:b] for a, b in pairwise(edges)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def loss_chart(losses: Sequence[tuple[float, float]], evals: Sequence[tuple[float, float]],
               kept: int | None, what: str = "loss") -> Markup | None:
    """Training and validation loss, or reward, by step; None where there is nothing to draw.

    Args:
        losses, evals: (step, loss), finite.
        kept: the step whose adapter stays.
    """
    everything = [*losses, *evals]
    if len(everything) < 2:
        return None
    # A single loss far above all others would press the rest flat.
    heights = sorted(y for _, y in everything)
    high = min(heights[-1], 1.5 * heights[int(0.98 * (len(heights) - 1))]) if what == "loss" else heights[-1]
    low = min(heights[0], high)
    margin = 0.05 * (high - low)
    ends = (low * 0.95, high * 1.03) if what == "loss" else (low - margin, high + margin)
    frame = Frame((0, max(x for x, _ in everything)), ends)
    above = "" if high == heights[-1] else f"; what lies above is drawn at the edge, up to {heights[-1]:.4g}"
    frame.axes(f"step{above}")
    frame.line([(x, min(y, high)) for x, y in _thinned(losses)], "train")
    frame.line([(x, min(y, high)) for x, y in evals], "valid")
    for x, y in evals:
        frame.dot(x, min(y, high), "valid", f"step {x:g}: {y:.4f}")
    if kept:
        frame.draw('<line class="kept" x1="{x}" x2="{x}" y1="{}" y2="{}"/>', frame.top, HEIGHT - _BOTTOM,
                   x=frame.x(kept))
    return frame.svg(f"{what} by step")


def lengths_chart(bars: Sequence[Mapping[str, Any]]) -> Markup | None:
    """How long rows are, in tokens, as bars: ``from``, ``to`` and ``rows`` of each."""
    if len(bars) < 2 or not any(bar["rows"] for bar in bars):
        return None
    frame = Frame((bars[0]["from"], bars[-1]["to"] + 1), (0, max(bar["rows"] for bar in bars) * 1.05))
    frame.axes("tokens")
    for bar in bars:
        left, right, top = frame.x(bar["from"]), frame.x(bar["to"] + 1), frame.y(bar["rows"])
        frame.draw('<rect class="bar" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>', left, top,
                   max(1.0, right - left - 1), max(0.0, HEIGHT - _BOTTOM - top),
                   f"{bar['from']}–{bar['to']}: {bar['rows']}")
    return frame.svg("lengths of rows in tokens")


def formats_chart(formats: Sequence[Mapping[str, Any]]) -> Markup | None:
    """What number formats lose against their size.

    Args:
        formats: of each ``name``, ``bytes``, and where measured ``own`` and ``general``: perplexity against f16, 0.03
            being 3 % worse.
    """
    points = [(f["bytes"] / 1e6, 100 * f[kind], kind, f["name"]) for f in formats for kind in ("own", "general")
              if f.get(kind) is not None]
    if len({name for *_, name in points}) < 2:
        return None
    sizes = sorted({(f["bytes"] / 1e6, f["name"]) for f in formats})
    spread = (sizes[-1][0] - sizes[0][0]) or 1
    low, high = min(y for _, y, *_ in points), max(y for _, y, *_ in points)
    room = (high - low or 1) * 0.1
    frame = Frame((sizes[0][0] - spread * 0.08, sizes[-1][0] + spread * 0.08),
                  (min(0, low) - room, max(0, high) + room), top=40)
    frame.axes("MB", " %")
    frame.draw('<line class="zero" x1="{}" x2="{}" y1="{y}" y2="{y}"/>', _LEFT, WIDTH - _RIGHT, y=frame.y(0))
    for n, (size, name) in enumerate(sizes):  # names above each other in turn, so that near sizes stay readable
        frame.draw('<line class="grid" x1="{x}" x2="{x}" y1="{}" y2="{}"/>', 14 + 12 * (n % 2), HEIGHT - _BOTTOM,
                   x=frame.x(size))
        frame.text(frame.x(size), 11 + 12 * (n % 2), name, "middle", "name")
    for size, y, kind, name in points:
        frame.dot(size, y, kind, f"{name}, {size:,.0f} MB: {y:+.2f} %")
    return frame.svg("perplexity against f16 by size")


def interval_plot(base: Sequence[float | None], tuned: Sequence[float | None]) -> Markup:
    """Two intervals above each other on one scale, for a cell of a table."""
    ends = [v for part in (base, tuned) for v in part if v is not None]
    low, high = min(ends), max(ends)
    spread = (high - low) or 1.0

    def x(value: float) -> float:
        return 6 + (value - low) / spread * 108 if high > low else 60.0

    parts = [Markup('<svg class="interval" viewBox="0 0 120 24" aria-hidden="true">')]
    for y, kind, (value, left, right) in ((7, "base", base), (17, "tuned", tuned)):
        if left is not None and right is not None:
            parts.append(Markup('<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="{y}" y2="{y}"/>').format(
                kind, x(left), x(right), y=y))
        parts.append(Markup('<circle class="{}" cx="{:.1f}" cy="{}" r="4"/>').format(kind, x(value), y))
    return Markup("").join(parts) + Markup("</svg>")
