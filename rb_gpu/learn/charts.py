"""Charts as inline SVG, without scripts, network access or built-in colours.

Each mark has a class that says what it represents, and the page's style sheet colours it, so that the same drawing
serves light mode, dark mode and paper. Wherever colours differ, shapes and dashes differ too. A framed chart is WIDTH
units wide: a phone shows it at four fifths, where text of 13 units is still readable. Every string is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

WIDTH = 440.0
MARGIN = 12.0
# width of one character of tick text, rounded up: fonts differ, and labels must not touch
CHARACTER = 8.2
SHAPES = ("circle", "square", "triangle", "diamond", "wedge", "cross")


@dataclass(frozen=True)
class Axis:
    """label: the quantity and its unit. low, high: the values at the two ends. ticks: values and their texts.

    log: whether the scale is logarithmic.
    """

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def share(self, value: float) -> float:
        """The position of a value between the ends, 0 to 1, clipped to the ends."""
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return min(1.0, max(0.0, (at - low) / (high - low)))


def linear_axis(label: str, values: Sequence[float], text: Callable[[float], str] | None = None) -> Axis:
    """An axis that covers the values, with at most seven ticks at 1, 2 or 5 times a power of ten. text: of a tick."""
    low, high = min(values), max(values)
    # a range that is only rounding noise gives no usable tick step
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        pad = 0.05 * abs(low) or 0.5
        low, high = low - pad, high + pad
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    # adding 0.0 turns -0.0, which negative n would give, into 0.0
    ticks = [(n * step, (text or f"{{:,.{decimals}f}}".format)(n * step + 0.0)) for n in range(first, last + 1)]
    return Axis(label, first * step, last * step, tuple(ticks))


def log_axis(label: str, low: float, high: float, text: Callable[[float], str]) -> Axis:
    """A logarithmic axis between positive ends, with ticks at powers of ten, or at 1, 2 and 5 times them if few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        values = [factor * 10.0**decade for decade in decades for factor in factors]
        ticks = tuple((value, text(value)) for value in values if low <= value <= high)
        if len(ticks) >= 3:
            break
    return Axis(label, low, high, ticks, log=True)


@dataclass
class Frame:
    """A framed chart: add marks, then `render`. Values are in the axes' units; the caller must leave out values that
    are not finite. height: in the units of WIDTH. Axes without ticks are not drawn.
    """

    x: Axis
    y: Axis
    height: float = 300.0
    marks: list[Markup] = field(default_factory=list)

    @property
    def _box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the plotting area."""
        if not (self.x.ticks and self.y.ticks):
            return MARGIN, MARGIN, WIDTH - MARGIN, self.height - MARGIN
        left = 14.0 + CHARACTER * max(len(text) for _, text in self.y.ticks)
        right = WIDTH - max(18.0, CHARACTER / 2 * len(self.x.ticks[-1][1]))
        return left, 34.0, right, self.height - 50.0

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Drawing coordinates of a point in the axes' units."""
        left, top, right, bottom = self._box
        return left + self.x.share(x) * (right - left), bottom - self.y.share(y) * (bottom - top)

    def line(self, xs: Sequence[float], ys: Sequence[float], style: str) -> None:
        """Adds straight lines from point to point."""
        corners = " ".join(f"{px:.1f},{py:.1f}" for px, py in map(self.at, xs, ys))
        self.marks.append(Markup("<polyline class='line {}' points='{}'/>").format(style, corners))

    def steps(self, edges: Sequence[float], heights: Sequence[float], style: str, filled: bool = False) -> None:
        """Adds a histogram's outline over edges (one more than heights), optionally filled down to the axis."""
        corners = [self.at(edges[0], self.y.low)]
        for i, height in enumerate(heights):
            corners += [self.at(edges[i], height), self.at(edges[i + 1], height)]
        corners.append(self.at(edges[-1], self.y.low))
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in corners)
        kind = "area" if filled else "line"
        self.marks.append(Markup("<polyline class='{} {}' points='{}'/>").format(kind, style, path))

    def whiskers(self, xs: Sequence[float], lows: Sequence[float], highs: Sequence[float], style: str) -> None:
        """Adds a vertical interval at each x."""
        ends = [(self.at(x, low), self.at(x, high)) for x, low, high in zip(xs, lows, highs, strict=True)]
        path = "".join(f"M{px:.1f} {bottom:.1f}V{top:.1f}" for (px, bottom), (_, top) in ends)
        self.marks.append(Markup("<path class='whisker {}' d='{}'/>").format(style, path))

    def dots(
        self,
        xs: Sequence[float],
        ys: Sequence[float],
        style: str,
        titles: Sequence[str],
        shape: str = "circle",
        radius: float | Sequence[float] = 4.5,
    ) -> None:
        """Adds a mark at each point, with a title that is shown on hover."""
        radii = [radius] * len(xs) if isinstance(radius, (int, float)) else radius
        for x, y, title, r in zip(xs, ys, titles, radii, strict=True):
            px, py = self.at(x, y)
            path = outline(shape, px, py, r)
            self.marks.append(Markup("<path class='dot {}' d='{}'><title>{}</title></path>").format(style, path, title))

    def specks(self, xs: Sequence[float], ys: Sequence[float], style: str) -> None:
        """Adds many small round points without titles, as one path."""
        path = "".join("M{:.1f} {:.1f}h0".format(*self.at(x, y)) for x, y in zip(xs, ys, strict=True))
        self.marks.append(Markup("<path class='specks {}' d='{}'/>").format(style, path))

    def render(self, title: str, description: str) -> Markup:
        """The whole chart as SVG. title and description are for screen readers."""
        (left, _, right, bottom), out = self._box, Markup()
        for value, text in self.y.ticks:
            _, py = self.at(self.x.low, value)
            out += Markup("<path class=grid d='M{:.1f} {:.1f}H{:.1f}'/>").format(left, py, right)
            out += Markup("<text class=tick x={:.1f} y={:.1f} text-anchor=end>{}</text>").format(
                left - 8, py + 4.5, text
            )
        reach = -math.inf
        for value, text in self.x.ticks:
            px, _ = self.at(value, self.y.low)
            half = CHARACTER / 2 * len(text)
            out += Markup("<path class=grid d='M{:.1f} {:.1f}v5'/>").format(px, bottom)
            if px - half > reach:
                out += Markup("<text class=tick x={:.1f} y={:.1f} text-anchor=middle>{}</text>").format(
                    px, bottom + 23, text
                )
                reach = px + half + CHARACTER / 2
        out += Markup("<text class=axis x=2 y=15>{}</text>").format(self.y.label)
        out += Markup("<text class=axis x={:.1f} y={:.1f} text-anchor=end>{}</text>").format(
            right, self.height - 5, self.x.label
        )
        head = Markup("<svg class=chart role=img viewBox='0 0 {:g} {:g}'><title>{}</title><desc>{}</desc>").format(
            WIDTH, self.height, title, description
        )
        return head + out + Markup().join(self.marks) + Markup("</svg>")


def plain_frame(x: Axis, y: Axis) -> Frame:
    """A chart without ticks whose axes have the same scale."""
    return Frame(x, y, 2 * MARGIN + (WIDTH - 2 * MARGIN) * (y.high - y.low) / (x.high - x.low))


def outline(shape: str, x: float, y: float, r: float) -> str:
    """The SVG path of one of SHAPES around a point, each with about the area of a circle of radius r."""
    if shape == "circle":
        r = round(r, 1)  # a chord of another length than the rounded one would flatten the circle
        return f"M{x - r:.1f} {y:.1f}a{r:.1f} {r:.1f} 0 1 0 {2 * r:.1f} 0a{r:.1f} {r:.1f} 0 1 0 {-2 * r:.1f} 0z"
    corners = {
        "square": [(-0.89, -0.89), (0.89, -0.89), (0.89, 0.89), (-0.89, 0.89)],
        "triangle": [(0, -1.35), (1.25, 0.9), (-1.25, 0.9)],
        "diamond": [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
        "wedge": [(0, 1.35), (1.25, -0.9), (-1.25, -0.9)],
        "cross": [(-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4), (0.4, 1.2), (-0.4, 1.2),
                  (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4)],
    }  # fmt: skip
    return "M" + "L".join(f"{x + r * dx:.1f} {y + r * dy:.1f}" for dx, dy in corners[shape]) + "z"


def swatch(shape: str, style: str) -> Markup:
    """A legend's mark, to be put beside the text that names it."""
    path = outline(shape, 8, 8, 5)
    return Markup("<svg class=swatch viewBox='0 0 16 16' aria-hidden=true><path class='dot {}' d='{}'/></svg>").format(
        style, path
    )


def stroke(style: str) -> Markup:
    """A legend's piece of line."""
    return Markup(
        "<svg class=swatch viewBox='0 0 16 16' aria-hidden=true><path class='line {}' d='M0 8H16'/></svg>"
    ).format(style)


def whisker(
    low: float | None, middle: float | None, high: float | None, ends: tuple[float, float], zero: float | None
) -> Markup:
    """A value and its interval as a dot and a line, for a table cell on a scale that all rows share; an arrow where the
    value lies outside the scale. zero: position of a reference line, or None. Screen readers skip it, as the numbers
    stand beside it. Empty where a number is unknown.
    """
    if low is None or middle is None or high is None:
        return Markup()
    place = Axis("", *ends, ticks=())
    rule = (
        Markup() if zero is None else Markup("<path class=zero d='M{:.1f} 0V18'/>").format(6 + 128 * place.share(zero))
    )
    if not ends[0] <= middle <= ends[1]:
        tip, back = (1, 9) if middle < ends[0] else (139, 131)
        return Markup(
            "<svg class=cell viewBox='0 0 140 18' aria-hidden=true>{}<path class=dot d='M{} 9L{} 4V14z'/></svg>"
        ).format(rule, tip, back)
    at = [6 + 128 * place.share(value) for value in (low, middle, high)]
    return Markup(
        "<svg class=cell viewBox='0 0 140 18' aria-hidden=true>{}"
        "<path class=whisker d='M{:.1f} 9H{:.1f}'/><circle class=dot cx={:.1f} cy=9 r=4 /></svg>"
    ).format(rule, at[0], at[2], at[1])


def bar(value: float, longest: float, style: str = "") -> Markup:
    """A bar for a table cell, beside its number; 0 is at the left."""
    width = 0.0 if longest <= 0 else max(0.0, min(1.0, value / longest)) * 140
    return Markup(
        "<svg class=cell viewBox='0 0 140 18' aria-hidden=true><rect class='bar {}' y=4 width={:.1f} height=10 /></svg>"
    ).format(style, width)
