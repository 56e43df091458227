"""Figures of points and lines, drawn with matplotlib as a PNG or as an SVG that follows the page that it is in.

A filled marker has both coordinates measured here, a hollow one is as published, and a cross is measured and differs.
"""

import io
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["here", "published", "differs"]


@dataclass
class Series:
    """Points of one colour and one kind in a figure."""

    name: str
    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    joined: bool = True
    """draw a thin line through the points"""
    kind: Kind = "here"
    """filled: measured here; hollow: as published; cross: measured here and not equal to what is published"""
    baseline: bool = False
    """the dense models, in the colour of the text"""
    marked: bool = True
    """with its points, not as a dashed line alone"""

    def add(self, point: tuple[float, float], label: str) -> None:
        """Append one point."""
        self.x.append(point[0])
        self.y.append(point[1])
        self.labels.append(label)

    @property
    def by_x(self) -> list[tuple[float, float]]:
        """The points from left to right."""
        return sorted(zip(self.x, self.y, strict=True))


@dataclass
class Figure:
    """One figure: panels side by side, each with its series."""

    key: str
    title: str
    x_label: str
    y_label: str
    panels: dict[str, list[Series]]
    clip: bool = False
    """cut outliers at the bottom, and write their values at the edge"""


INK = "#5b6470"
"""Text and axes: readable on white and on black; in the HTML page it becomes the colour of the text."""

COLORS = ("#2f7fd6", "#e0632b", "#22a06b", "#c2559b", "#b58a00", "#7a5cc7", "#1aa0b0", "#d0454c")
"""Series: told apart on a light and on a dark ground."""

MARKERS = "osD^vPXh"


def draw(figure: Figure, *forms: str) -> list[bytes]:
    """Draw a figure with matplotlib, without a display.

    Args:
        figure: what to draw.
        forms: "png" (on white) or "svg" (transparent, text as text, no date, so equal input gives equal output).

    Returns:
        The content of a file in each of the forms.
    """
    import matplotlib as mpl  # heavy, and not needed for tables alone
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": figure.key,
        "font.size": 10,
        "font.family": "sans-serif",
        **dict.fromkeys(inked, INK),
    }
    with mpl.rc_context(settings):
        panels = {name: series for name, series in figure.panels.items() if series}
        width = 8.2 if len(panels) == 1 else 5.6 * len(panels)
        canvas = Canvas(figsize=(width, 5.2), layout="constrained")
        FigureCanvasAgg(canvas)
        canvas.suptitle(figure.title, fontsize=12, color=INK)
        styles = _styles(panels)
        for index, (name, series) in enumerate(panels.items()):
            axes = canvas.add_subplot(1, len(panels), index + 1)
            axes.set_facecolor("none")
            axes.set_title(name, fontsize=10.5, color=INK)
            axes.set_xlabel(figure.x_label)
            axes.set_ylabel(figure.y_label if index == 0 else "")
            axes.grid(alpha=0.25, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            axes.margins(0.1, 0.12)
            for line in series:
                _draw_series(axes, line, *styles[line.name])
            if figure.clip:
                _clip_outliers(axes, series, styles)
        _add_legend(canvas, panels, styles, width)
        canvas.draw_without_rendering()
        for axes, series in zip(canvas.axes, panels.values(), strict=True):
            _place_labels(axes, series, styles)
        saving: Mapping[str, dict[str, Any]] = {
            "svg": {"transparent": True, "metadata": {"Date": None}},
            "png": {"dpi": 130, "facecolor": "white", "metadata": {"Software": None}},
        }
        contents: list[bytes] = []
        for form in forms:
            stream = io.BytesIO()
            canvas.savefig(stream, format=form, **saving[form])
            contents.append(stream.getvalue())
        return contents


def inline_svg(content: bytes) -> str:
    """An SVG file as an element of a page, its ink in the colour of the page's text."""
    text = content.decode()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def _styles(panels: Mapping[str, Sequence[Series]]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each series, the same in all panels."""
    lines = {line.name: line for series in panels.values() for line in series}
    names = [name for name, line in lines.items() if not line.baseline and line.marked]
    styles = {
        name: (COLORS[i % len(COLORS)], MARKERS[(i + i // len(COLORS)) % len(MARKERS)]) for i, name in enumerate(names)
    }
    return {name: styles.get(name, (INK, "*" if line.marked else "none")) for name, line in lines.items()}


def _marking(kind: Kind, color: str, marker: str, *, baseline: bool = False) -> dict[str, Any]:
    """Arguments of matplotlib for the markers of one kind."""
    size = 14 if baseline else {"here": 5.5, "published": 9, "differs": 6}[kind]
    face = "none" if kind == "published" else color
    return {"marker": "x" if kind == "differs" else marker, "markersize": size, "markerfacecolor": face, "color": color}


def _draw_series(axes: Any, line: Series, color: str, marker: str) -> None:
    axes.plot(
        *zip(*line.by_x, strict=True),
        **_marking(line.kind, color, marker, baseline=line.baseline),
        markeredgewidth=1.4,
        linestyle=("-" if line.marked else "--") if line.joined and len(line.x) > 1 else "none",
        linewidth=1.0,
        zorder=4 if line.baseline else 2 if line.kind == "published" else 3,
    )


def _clip_outliers(axes: Any, series: Sequence[Series], styles: Mapping[str, tuple[str, str]]) -> None:
    """Let the axis start where most points are, and write the values below it at the edge."""
    heights = sorted(y for line in series for y in line.y)
    if len(heights) < 8:
        return
    low, high = heights[len(heights) // 4], heights[3 * len(heights) // 4]
    floor = low - 3 * (high - low)
    inside = [y for y in heights if y >= floor]
    if len(inside) == len(heights) or inside[0] == heights[-1]:
        return
    top = heights[-1]
    axes.set_ylim(inside[0] - 0.12 * (top - inside[0]), top + 0.1 * (top - inside[0]))
    for line in series:
        if below := [(x, y) for x, y in line.by_x if y < floor]:
            axes.annotate(
                f"\N{DOWNWARDS ARROW} {', '.join(f'{y:g}' for _, y in below)}",
                (statistics.mean(x for x, _ in below), 0.012),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                fontsize=8.5,
                color=styles[line.name][0],
            )


def _add_legend(canvas: Any, panels: Mapping[str, Sequence[Series]], styles: Mapping[str, Any], width: float) -> None:
    """Names of the series below the figure, in as many columns as fit, and what the markers mean."""
    from matplotlib.lines import Line2D

    kinds = {line.kind for series in panels.values() for line in series}
    handles: list[Any] = []
    if len(styles) > 1:
        face = {"markerfacecolor": "none"} if kinds == {"published"} else {}
        for name, (color, marker) in styles.items():
            look: dict[str, Any] = {"color": color, "marker": marker, "markersize": 7, **face}
            handles.append(Line2D([], [], linestyle="--" if marker == "none" else "none", label=name, **look))
    if kinds != {"here"}:
        meanings: dict[Kind, str] = {"published": "as published", "here": "measured here", "differs": "differs here"}
        for kind, meaning in meanings.items():
            if kind in kinds:
                handles.append(Line2D([], [], linestyle="none", label=meaning, **_marking(kind, INK, "o")))
    if handles:
        longest = max(len(handle.get_label()) for handle in handles)
        columns = max(1, min(len(handles), int(width * 13 / (longest + 6))))
        canvas.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


_DIRECTIONS = (
    *((1, -0.3, "left", "center_baseline"), (-1, 0.3, "right", "center_baseline")),
    *((0.7, 0.7, "left", "bottom"), (-0.7, 0.7, "right", "bottom"), (0.7, -0.7, "left", "top")),
    *((-0.7, -0.7, "right", "top"), (0, 1, "center", "bottom"), (0, -1, "center", "top")),
)
"""Where a label can be: direction from its point, and its alignment."""


def _place_labels(axes: Any, series: Sequence[Series], styles: Mapping[str, tuple[str, str]]) -> None:
    """Write each label beside its point, where it covers no point, line or other label and stays inside the axes."""
    from matplotlib.transforms import Bbox

    scale = axes.figure.dpi / 72
    taken: list[tuple[Any, float]] = []

    def take(x: float, y: float, size: float, weight: float) -> None:
        taken.append((Bbox.from_bounds(x - size * scale, y - size * scale, 2 * size * scale, 2 * size * scale), weight))

    for line in series:
        spots = [axes.transData.transform(point) for point in line.by_x]
        for x, y in spots:
            take(x, y, 6, 3.0)
        for (x0, y0), (x1, y1) in itertools.pairwise(spots) if line.joined else ():
            steps = max(int(math.hypot(x1 - x0, y1 - y0) / (4 * scale)), 1)
            for part in (step / steps for step in range(steps)):
                take(x0 + (x1 - x0) * part, y0 + (y1 - y0) * part, 2, 1.5)
    frame = axes.get_window_extent()
    renderer = axes.figure.canvas.get_renderer()
    for line in series:
        look = {"textcoords": "offset points", "color": styles[line.name][0]}
        for x, y, text in zip(line.x, line.y, line.labels, strict=False):  # a line need not say its points
            best: tuple[float, Any, Any, float] | None = None
            for reach, (dx, dy, ha, va) in itertools.product((9, 15, 24, 36, 50), _DIRECTIONS) if text else ():
                note = axes.annotate(text, (x, y), (dx * reach, dy * reach), ha=ha, va=va, fontsize=8.5, **look)
                box = note.get_window_extent(renderer)
                cost = 5 * (box.width * box.height - _overlap(box, frame)) + 0.04 * box.height**2 * reach / 9
                cost += sum(weight * _overlap(box, other) for other, weight in taken)
                worse = note
                if best is None or cost < best[0]:
                    worse, best = best and best[1], (cost, note, box, reach)
                if worse is not None:
                    worse.remove()
            if best is None:
                continue
            _, note, box, reach = best
            if reach > 15:
                arrow = {"arrowstyle": "-", "color": look["color"], "linewidth": 0.6, "alpha": 0.7}
                axes.annotate("", (x, y), note.xyann, textcoords="offset points", arrowprops=arrow)
            taken.append((box, 3.0))


def _overlap(box: Any, other: Any) -> float:
    """Area that two boxes share, in square pixels."""
    width = min(box.x1, other.x1) - max(box.x0, other.x0)
    height = min(box.y1, other.y1) - max(box.y0, other.y0)
    return max(width, 0.0) * max(height, 0.0)
