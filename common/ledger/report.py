"""The ledger as text, Markdown, JSON, CSV and one self-contained HTML page, with accuracy-against-cost plots.

The report folder holds ``report.md``, ``ledger.json``, ``ledger.csv``, ``index.html`` (needs no network; tables sort
by a click on a column; follows light and dark) and ``plots/<paper>-<table>.png``.
"""

import base64
import csv
import html
import io
import itertools
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.ledger.cache import cached
from common.ledger.compare import KEYS, STATUSES, Entry, Ledger
from common.ledger.tables import DeskTable, Row, Table, column
from common.run.files import write_atomic

WIDTH = 140
"""Columns of the text form."""

TAGS: Mapping[str, str] = {
    "reproduced": "✓",
    "differs": "✗",
    "recorded": "rec",
    "needs data": "data",
    "needs weights": "weights",
    "needs gpu": "gpu",
    "needs compute": "compute",
    "not implemented yet": "todo",
    "cited": "cited",
}
"""Statuses in the narrow text tables."""

BADGES: Mapping[str, str] = {
    **{status: status for status in STATUSES},
    "reproduced": "✓",
    "differs": "✗",
    "not implemented yet": "not yet",
}
"""Statuses in the HTML page."""

WAITING = ("not implemented yet", "cited")
"""Statuses for which nothing can be done from the command line."""


# ------------------------------------------------------------------------------------------------------------- numbers


def format_published(entry: Entry) -> str:
    """Published value with its digits; ``~`` if it was read off a figure, ``x`` for a ratio to the dense row."""
    if entry.published is None:
        return ""
    return f"{entry.published:f}x" if entry.is_ratio else f"{entry.published:f}"


def format_reproduced(entry: Entry) -> str:
    """Reproduced value, one digit more than published where it is compared."""
    if entry.reproduced is None:
        return ""
    if entry.is_ratio:
        return f"{entry.reproduced:.3f}x"
    if column(entry.column).kind == "speed" or not isinstance(entry.published, Decimal):
        return f"{entry.reproduced:.4g}" if entry.reproduced < 1000 else f"{entry.reproduced:.0f}"
    exponent = entry.published.as_tuple().exponent
    digits = max(-exponent if isinstance(exponent, int) else 0, 0)
    extra = 0 if digits >= 4 else 1 + (digits == 0)
    return f"{entry.reproduced:.{digits + extra}f}"


def format_value(name: str, value: Any) -> str:
    """Value of a desk table by the unit in its column's name."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value}"
    if name.endswith("_percent"):
        return f"{value:.2f}"
    if name.endswith(("_ips", "fps")):
        return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
    if name.endswith("_m") or "macs" in name:
        return f"{value:.4g}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"


def _heading(entries: Mapping[tuple[str, str], Entry], name: str) -> str:
    """Heading of a column in one table; speeds that are ratios say so."""
    ratio = any(entry.is_ratio for (_, key), entry in entries.items() if key == name)
    return f"{label_of(name)} / dense" if ratio else label_of(name)


def label_of(name: str) -> str:
    """Heading of a column: its meaning with the unit."""
    meaning = column(name)
    if meaning.unit in ("", "G") or meaning.kind == "speed":
        return meaning.label
    return f"{meaning.label} ({meaning.unit})"


# ---------------------------------------------------------------------------------------------------------------- text


def align(rows: Sequence[Sequence[str]], *, left: int = 1, gap: str = "  ") -> list[str]:
    """Lines of a table: the first ``left`` columns flush left, the others right."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(gap.join(cells).rstrip())
    return lines


def to_text(ledger: Ledger, *, collapse: bool = True) -> str:
    """The ledger for a terminal, about ``WIDTH`` columns wide.

    Args:
        ledger: what to show.
        collapse: give a table in which nothing can be done yet a single line.
    """
    parts: list[str] = []
    idle: list[list[str]] = []
    for table in ledger.tables:
        entries = ledger.of(table)
        if not entries:
            continue
        if collapse and all(entry.status in WAITING for entry in entries.values()):
            counts = Ledger(entries=list(entries.values())).counts()
            summary = ", ".join(f"{count} {status}" for status, count in counts.items())
            idle.append([f"{table.paper}/{table.name}", table.title, summary])
            continue
        parts.append(_text_table(ledger, table, entries))
    if idle:
        parts.append("\n".join(["Nothing to compute yet:", *align(idle, left=3)]))
    parts += [_text_desk(paper, desk) for paper, desk in ledger.desk]
    return "\n\n".join([*parts, legend(ledger)]) + "\n"


def legend(ledger: Ledger) -> str:
    """Totals per status, with the tag used in the tables."""
    counts = ledger.counts()
    width = max((len(status) for status in counts), default=6)
    lines = [f"{'tag':<8}{'values':>6}  status"]
    lines += [f"{TAGS[s]:<8}{n:>6}  {s:<{width}}  {STATUSES[s]}" for s, n in counts.items()]
    lines.append(f"{'':<8}{sum(counts.values()):>6}  in all")
    return "\n".join(lines)


def _text_table(ledger: Ledger, table: Table, entries: Mapping[tuple[str, str], Entry]) -> str:
    names = [name for name in table.columns if any(key[1] == name for key in entries)]
    rows = [row for row in table.rows if any(key[0] == row.id for key in entries)]
    blocks: list[list[str]] = [[row.id for row in rows]]
    heads = ["row"]
    for name in names:
        triples = [_text_cell(entries.get((row.id, name)), name in row.approximate) for row in rows]
        widths = [max(len(triple[index]) for triple in triples) for index in range(3)]
        heads.append(_heading(entries, name))
        blocks.append(
            [f"{a:>{widths[0]}} {b:>{widths[1]}} {c:<{widths[2]}}" for a, b, c in triples]
            if widths[1]
            else [f"{a:>{widths[0]}} {c:<{widths[2]}}" for a, _, c in triples]
        )
        if name == "gmacs" and any((table.paper, row.key) in ledger.plain_gmacs for row in rows):
            heads.append("plain MACs")
            plain = [ledger.plain_gmacs.get((table.paper, row.key)) for row in rows]
            blocks.append(["" if value is None else f"{value:.2f}" for value in plain])
    lines = [f"{table.paper}/{table.name}: {table.title}"]
    for chunk in _chunks(heads, blocks):
        lines += align([[heads[i] for i in chunk]] + [[blocks[i][r] for i in chunk] for r in range(len(rows))])
    return "\n".join([*lines, *_text_notes(entries.values()), *_text_details(entries.values())])


def _chunks(heads: Sequence[str], blocks: Sequence[Sequence[str]]) -> list[list[int]]:
    """Columns side by side that fit the width, the first repeated in each."""
    widths = [max(len(text) for text in (head, *block)) + 2 for head, block in zip(heads, blocks, strict=True)]
    chunks: list[list[int]] = [[0]]
    for index in range(1, len(heads)):
        if len(chunks[-1]) > 1 and sum(widths[i] for i in chunks[-1]) + widths[index] > WIDTH:
            chunks.append([0])
        chunks[-1].append(index)
    return chunks


def _text_cell(entry: Entry | None, approximate: bool) -> tuple[str, str, str]:
    if entry is None:
        return ("", "", "")
    return (("~" if approximate else "") + format_published(entry), format_reproduced(entry), TAGS[entry.status])


def _text_notes(entries: Iterable[Entry]) -> list[str]:
    """What differs and why, and one command for each thing that is missing."""
    lines: list[str] = []
    missing: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        if entry.status == "differs":
            reason = entry.source.rpartition("differs: ")[2]
            lines.append(
                f"  differs: {entry.row} {entry.column} {format_reproduced(entry)}, "
                f"published {format_published(entry)}: {reason}"
            )
        elif entry.status.startswith("needs"):
            missing.setdefault((entry.status, entry.column), []).append(entry)
    commands: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for (status, name), group in missing.items():
        commands.setdefault((status, group[0].command), []).append((name, len(group)))
    for (status, command), columns in commands.items():
        what = ", ".join(f"{name} of {count} row{'s' if count > 1 else ''}" for name, count in columns)
        lines.append(f"  {status}: {what}, e.g. {command}")
    return lines


def _text_details(entries: Iterable[Entry]) -> list[str]:
    """One line for each value that came out: how far off, what was allowed, how it was counted and where it is from."""
    lines = [
        [
            f"  {entry.row}",
            entry.column,
            format_published(entry),
            format_reproduced(entry),
            "" if entry.difference is None else f"{entry.difference:+.4g}",
            "" if entry.tolerance is None else f"{entry.tolerance:.3g}",
            entry.status,
            f"{entry.convention}: {entry.source}",
        ]
        for entry in entries
        if entry.reproduced is not None
    ]
    if not lines:
        return []
    heads = ["  value", "column", "published", "here", "difference", "tolerance", "status", "convention: source"]
    numbers = align([row[2:6] for row in [heads, *lines]], left=0)
    texts = [[*row[:2], middle, *row[6:]] for row, middle in zip([heads, *lines], numbers, strict=True)]
    width = max(map(len, numbers))
    return align([[*row[:2], row[2].ljust(width), *row[3:]] for row in texts], left=5)


def _text_desk(paper: str, desk: DeskTable) -> str:
    rows = [[format_value(name, row.get(name)) for name in desk.columns] for row in desk.rows]
    texts = sum(all(not isinstance(row.get(name), int | float) for row in desk.rows) for name in desk.columns)
    lines = [f"{paper}, desk experiment: {desk.title}", *align([list(desk.columns), *rows], left=max(texts, 1))]
    return "\n".join([*lines, *(f"  {note}" for note in desk.notes)])


# ------------------------------------------------------------------------------------------------------- JSON and CSV


def to_json(ledger: Ledger) -> str:
    """A list of objects with the keys ``common.ledger.compare.KEYS``."""
    return json.dumps([entry.as_dict() for entry in ledger.entries], indent=1, ensure_ascii=False) + "\n"


def to_csv(ledger: Ledger) -> str:
    """One line per value; published values keep their digits."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list[str](KEYS), lineterminator="\n")
    writer.writeheader()
    for entry in ledger.entries:
        published = "" if entry.published is None else f"{entry.published:f}"
        writer.writerow({**entry.as_dict(), "published": published})
    return stream.getvalue()


# ------------------------------------------------------------------------------------------------------------ Markdown


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> list[str]:
    """Lines of a Markdown table; the first ``left`` columns flush left."""
    marks = [":--" if index < left else "--:" for index in range(len(heads))]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (heads, marks, *rows)]


def markdown_of(ledger: Ledger, table: Table) -> str:
    """One table, published beside reproduced, with its conventions: what the READMEs show.

    Where nothing can be reproduced yet, the published values stand alone.
    """
    entries = ledger.of(table)
    names = [name for name in table.columns if any(key[1] == name for key in entries)]
    idle = all(entry.status in WAITING for entry in entries.values())
    plain = {row.id: ledger.plain_gmacs.get((table.paper, row.key)) for row in table.rows}
    has_plain = "gmacs" in names and any(value is not None for value in plain.values())
    heads = ["Method", "Setting"]
    for name in names:
        heads += [_heading(entries, name)] if idle else [f"{_heading(entries, name)}: published", "here"]
        heads += ["plain GMACs"] if has_plain and name == "gmacs" else []
    rows = []
    for row in table.rows:
        cells = [row.method, _setting(row)]
        for name in names:
            entry = entries.get((row.id, name))
            pair = ["", ""] if entry is None else _markdown_cells(entry, row)
            cells += pair[:1] if idle else pair
            if has_plain and name == "gmacs":
                value = plain[row.id]
                cells.append("" if value is None else f"{value:.2f}")
        rows.append(cells)
    notes = [f"Source: {table.source}.", table.note, _conventions(table, names)]
    notes += [
        f"`{entry.row}`: {label_of(entry.column)} differs: {entry.source.rpartition('differs: ')[2]}."
        for entry in entries.values()
        if entry.status == "differs"
    ]
    filed = sorted({e.source.partition("recorded: ")[2].split(";")[0] for e in entries.values() if _is_filed(e)})
    notes += [f"Recorded on {text}." for text in filed]
    lines = markdown_table(heads, rows, left=2)
    return "\n".join([*lines, "", *(f"- {note}" for note in notes if note)])


def _setting(row: Row) -> str:
    """Series and setting, without repeating the method."""
    series = "" if row.method.startswith(row.series) else row.series
    return ", ".join(word for word in (series, row.setting) if word)


def _is_filed(entry: Entry) -> bool:
    return entry.status == "recorded" and "recorded: " in entry.source


def _markdown_cells(entry: Entry, row: Row) -> list[str]:
    published = ("~" if entry.column in row.approximate else "") + format_published(entry)
    if entry.is_ratio:
        published = f"{row.published[entry.column]:f} ({published})"
    value = format_reproduced(entry)
    here = {"reproduced": f"{value} ✓", "differs": f"{value} ✗", "recorded": f"{value} (recorded)"}
    return [published, here.get(entry.status, f"*{entry.status}*")]


def _conventions(table: Table, names: Sequence[str]) -> str:
    """One sentence per column on how it is counted."""
    found = [
        (label_of(name), next((row.convention[name] for row in table.rows if row.convention.get(name)), ""))
        for name in names
    ]
    return "Conventions: " + "; ".join(f"{label}: {text}" for label, text in found if text) + "."


def markdown_summary(ledger: Ledger) -> str:
    """The shortened ledger: one line per table, values by status."""
    groups = {
        "reproduced": ("reproduced",),
        "differs": ("differs",),
        "recorded": ("recorded",),
        "needs data, weights, GPU or compute": ("needs data", "needs weights", "needs gpu", "needs compute"),
        "not implemented yet": ("not implemented yet",),
        "cited": ("cited",),
    }
    rows, totals = [], [0] * (len(groups) + 1)
    for table in ledger.tables:
        entries = ledger.of(table)
        statuses = [entry.status for entry in entries.values()]
        numbers = [len(statuses), *(sum(s in group for s in statuses) for group in groups.values())]
        totals = [a + b for a, b in zip(totals, numbers, strict=True)]
        rows.append(
            [f"{table.paper}/{table.name}", table.title, *(str(number) if number else "" for number in numbers)]
        )
    rows.append(["all", "", *(str(number) for number in totals)])
    return "\n".join(markdown_table(["Table", "", "Values", *groups], rows, left=2))


def markdown_desk(desk: DeskTable) -> str:
    """A desk table in Markdown."""
    rows = [[format_value(name, row.get(name)) for name in desk.columns] for row in desk.rows]
    return "\n".join([*markdown_table(desk.columns, rows), "", *desk.notes])


def to_markdown(ledger: Ledger, *, plots: Mapping[str, str] | None = None) -> str:
    """The whole ledger in Markdown.

    Args:
        ledger: what to show.
        plots: key of a figure -> its path, relative to the file.
    """
    plots = plots or {}
    parts = ["# Published against reproduced", markdown_summary(ledger)]
    counts = [f"- {status}: {count} ({STATUSES[status]})" for status, count in ledger.counts().items()]
    parts.append("\n".join(counts))
    if ledger.failures:
        parts.append("\n".join(["## Errors", "", *(f"- {failure}" for failure in ledger.failures)]))
    drawn: set[str] = set()
    for table in ledger.tables:
        key = f"{table.paper}-{table.name}"
        overview = f"{table.paper}-{table.plot.get('overview', '')}"
        pictures = [name for name in (overview, key) if name in plots and name not in drawn]
        drawn.update(pictures)
        parts.append(f"## {table.paper}/{table.name}: {table.title}")
        parts += [f"![{name}]({plots[name]})" for name in pictures]
        parts.append(markdown_of(ledger, table))
    for paper, desk in ledger.desk:
        key = f"{paper}-{desk.key}"
        parts.append(f"## {paper}, desk experiment: {desk.title}")
        parts += [f"![{key}]({plots[key]})"] if key in plots else []
        parts.append(markdown_desk(desk))
    return "\n\n".join(parts) + "\n"


# --------------------------------------------------------------------------------------------------------------- plots


@dataclass
class Series:
    """Points of one colour in a figure."""

    name: str
    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    joined: bool = True
    """draw a thin line through the points"""
    hollow: bool = False
    """published values, where reproduced ones are drawn filled"""
    baseline: bool = False
    """the dense models, in the colour of the text"""

    def add(self, point: tuple[float, float], label: str) -> None:
        """Append one point."""
        self.x.append(point[0])
        self.y.append(point[1])
        self.labels.append(label)


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


def figures(ledger: Ledger) -> list[Figure]:
    """Every figure of a ledger: one per overview, one per table with a ``plot``, one per desk table with a ``plot``."""
    tables: list[Figure] = []
    shared: dict[tuple[str, str], list[Table]] = {}
    for table in ledger.tables:
        if not table.plot or not ledger.of(table):
            continue
        overview = table.plot.get("overview")
        if overview:
            shared.setdefault((table.paper, overview), []).append(table)
        if len(table.rows) > 2 or not overview:
            tables.append(_table_figure(ledger, table))
    overviews = [_overview_figure(ledger, paper, name, group) for (paper, name), group in shared.items()]
    desks = [_desk_figure(paper, desk) for paper, desk in ledger.desk if desk.plot]
    return [figure for figure in [*overviews, *tables, *desks] if any(figure.panels.values())]


def _axis_label(name: str) -> str:
    """Axis title with unit."""
    meaning = column(name)
    text = {"top1_percent": "top-1 accuracy", "top5_percent": "top-5 accuracy"}.get(name, meaning.label)
    return text if meaning.unit in ("", "G") else f"{text} ({meaning.unit})"


def _point(ledger: Ledger, row: Row, table: Table, *, reproduced: bool) -> tuple[float, float] | None:
    """Published point, or the reproduced one, of a row; None if there is none.

    A reproduced point may have one published coordinate: a cost can be had without data.
    """
    entries = ledger.of(table)
    point: list[float] = []
    fresh = False
    for axis in ("x", "y"):
        name = table.plot[axis]
        if name not in row.published:
            return None
        entry = entries.get((row.id, name))
        if reproduced and entry is not None and entry.reproduced is not None and not entry.is_ratio:
            point.append(entry.reproduced)
            fresh = True
        else:
            point.append(float(row.published[name]))
    return (point[0], point[1]) if fresh or not reproduced else None


def _table_figure(ledger: Ledger, table: Table) -> Figure:
    """Published points of a table, hollow, with the reproduced ones filled; the dense rows join their series."""
    own = {other.name: other for other in ledger.tables if other.paper == table.paper}
    everything = {row.key: row for other in own.values() for row in other.rows}
    dense = dict.fromkeys(row.dense for row in table.rows if row.dense in everything)
    extra = [everything[key] for key in dense if not key.startswith(f"{table.name}/")]
    series: dict[str, Series] = {}
    for row in [*extra, *table.rows]:
        name = row.series or row.method
        for reproduced in (False, True):
            if point := _point(ledger, row, own[row.table], reproduced=reproduced):
                line = series.setdefault(
                    f"{name}{reproduced}", Series(name, joined=not reproduced, hollow=not reproduced)
                )
                line.joined = line.joined and name != "cited baselines"
                line.add(point, "" if reproduced else row.label)
    labels = {axis: _axis_label(table.plot[axis]) for axis in ("x", "y")}
    return Figure(f"{table.paper}-{table.name}", table.title, labels["x"], labels["y"], {"": list(series.values())})


def _overview_figure(ledger: Ledger, paper: str, name: str, tables: Sequence[Table]) -> Figure:
    """All tables that share an overview, as published; each line runs up to the dense row it is compared with."""
    apart = tables[0].plot.get("panels") == "series"
    everything = {row.key: (row, table) for table in tables for row in table.rows}
    baselines = {row.dense for row, _ in everything.values()}
    panels: dict[str, dict[str, Series]] = {}
    for row, table in everything.values():
        point = _point(ledger, row, table, reproduced=False)
        if point is None:
            continue
        baseline = row.key in baselines
        panel = panels.setdefault(row.series if apart else "", {})
        key = row.method if apart else row.series or row.method
        line = panel.setdefault(key, Series(key, baseline=baseline, joined=not baseline))
        if (
            not line.x
            and row.dense in everything
            and (start := _point(ledger, *everything[row.dense], reproduced=False))
        ):
            line.add(start, "")
        line.add(point, "dense" if baseline else "" if apart else row.label)
    labels = {axis: _axis_label(tables[0].plot[axis]) for axis in ("x", "y")}
    title = f"{paper}: {labels['y']} against {labels['x']}, as published"
    drawn = {panel: list(lines.values()) for panel, lines in panels.items()}
    return Figure(f"{paper}-{name}", title, labels["x"], labels["y"], drawn, clip=True)


def _desk_figure(paper: str, desk: DeskTable) -> Figure:
    series: dict[str, Series] = {}
    for row in desk.rows:
        x, y = row.get(desk.plot["x"]), row.get(desk.plot["y"])
        if not isinstance(x, int | float) or not isinstance(y, int | float):
            continue
        name = str(row.get(desk.plot.get("series", ""), "measured"))
        line = series.setdefault(name, Series(name, joined=False))
        line.add((float(x), float(y)), str(row.get(desk.plot.get("label", ""), "")))
    labels = {axis: _desk_label(desk.plot[axis]) for axis in ("x", "y")}
    return Figure(f"{paper}-{desk.key}", desk.title, labels["x"], labels["y"], {"": list(series.values())})


def _desk_label(name: str) -> str:
    try:
        return _axis_label(name)
    except KeyError:
        return name.replace("_", " ")


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

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": figure.key,
        "font.size": 10,
        "font.family": "sans-serif",
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
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
            _place_labels(axes, series, {line.name: styles[line.name][0] for line in series})
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


def _styles(panels: Mapping[str, Sequence[Series]]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each series, the same in all panels."""
    lines = {line.name: line for series in panels.values() for line in series}
    names = [name for name, line in lines.items() if not line.baseline]
    styles = {name: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}
    return {name: styles.get(name, (INK, "*")) for name in lines}


def _draw_series(axes: Any, line: Series, color: str, marker: str) -> None:
    order = sorted(range(len(line.x)), key=lambda i: (line.x[i], line.y[i]))
    axes.plot(
        [line.x[i] for i in order],
        [line.y[i] for i in order],
        color=color,
        marker=marker,
        markersize=14 if line.baseline else 9 if line.hollow else 5.5,
        markerfacecolor="none" if line.hollow else color,
        markeredgewidth=1.4,
        linestyle="-" if line.joined and len(order) > 1 else "none",
        linewidth=1.0,
        zorder=4 if line.baseline else 2 if line.hollow else 3,
    )


def _clip_outliers(axes: Any, series: Sequence[Series], styles: Mapping[str, tuple[str, str]]) -> None:
    """Let the axis start where most points are, and write the values below it at the edge."""
    heights = sorted(y for line in series for y in line.y)
    if len(heights) < 8:
        return
    low, high = heights[len(heights) // 4], heights[3 * len(heights) // 4]
    floor = low - 3 * (high - low)
    inside = [y for y in heights if y >= floor]
    if len(inside) == len(heights):
        return
    top = heights[-1]
    axes.set_ylim(inside[0] - 0.12 * (top - inside[0]), top + 0.1 * (top - inside[0]))
    for line in series:
        below = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y < floor]
        if below:
            values = ", ".join(f"{y:g}" for _, y in below)
            axes.annotate(
                f"\N{DOWNWARDS ARROW} {values}",
                (statistics.mean(x for x, _ in below), 0.012),
                xycoords=("data", "axes fraction"),
                ha="right",
                va="bottom",
                fontsize=8.5,
                color=styles[line.name][0],
            )


def _add_legend(canvas: Any, panels: Mapping[str, Sequence[Series]], styles: Mapping[str, Any], width: float) -> None:
    """Names of the series below the figure, in as many columns as fit, and what hollow and filled mean."""
    from matplotlib.lines import Line2D

    lines = {line.name: line for series in panels.values() for line in series}
    both = len({line.hollow for series in panels.values() for line in series}) == 2
    handles: list[Any] = []
    if len(lines) > 1:
        handles += [
            Line2D([], [], color=color, marker=marker, linestyle="none", label=name, markersize=7)
            for name, (color, marker) in styles.items()
        ]
    if both:
        for label, face in (("published", "none"), ("reproduced here", INK)):
            size = 9 if face == "none" else 5.5
            handles.append(
                Line2D(
                    [], [], color=INK, marker="o", markerfacecolor=face, markersize=size, linestyle="none", label=label
                )
            )
    if handles:
        longest = max(len(handle.get_label()) for handle in handles)
        columns = max(1, min(len(handles), int(width * 13 / (longest + 6))))
        canvas.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def _place_labels(axes: Any, series: Sequence[Series], colors: Mapping[str, str]) -> None:
    """Write each label beside its point, where it covers no point, line or other label and stays inside the axes."""
    from matplotlib.transforms import Bbox

    scale = axes.figure.dpi / 72
    taken: list[tuple[Any, float]] = []
    for line in series:
        order = sorted(range(len(line.x)), key=lambda i: (line.x[i], line.y[i]))
        spots = [axes.transData.transform((line.x[i], line.y[i])) for i in order]
        taken += [(Bbox.from_bounds(x - 6 * scale, y - 6 * scale, 12 * scale, 12 * scale), 3.0) for x, y in spots]
        if line.joined:
            for (x0, y0), (x1, y1) in itertools.pairwise(spots):
                steps = max(int(math.hypot(x1 - x0, y1 - y0) / (4 * scale)), 1)
                for step in range(steps):
                    x, y = x0 + (x1 - x0) * step / steps, y0 + (y1 - y0) * step / steps
                    taken.append((Bbox.from_bounds(x - 2 * scale, y - 2 * scale, 4 * scale, 4 * scale), 1.5))
    frame = axes.get_window_extent()
    renderer = axes.figure.canvas.get_renderer()
    directions = ((1, -0.3, "left", "center_baseline"), (-1, 0.3, "right", "center_baseline"))
    directions += ((0.7, 0.7, "left", "bottom"), (-0.7, 0.7, "right", "bottom"), (0.7, -0.7, "left", "top"))
    directions += ((-0.7, -0.7, "right", "top"), (0, 1, "center", "bottom"), (0, -1, "center", "top"))
    for line in series:
        for x, y, text in zip(line.x, line.y, line.labels, strict=True):
            if not text:
                continue
            best: tuple[float, Any, Any, float] | None = None
            for reach, (dx, dy, ha, va) in itertools.product((9, 15, 24, 36, 50), directions):
                offset = (dx * reach, dy * reach)
                note = axes.annotate(
                    text,
                    (x, y),
                    offset,
                    textcoords="offset points",
                    ha=ha,
                    va=va,
                    fontsize=8.5,
                    color=colors[line.name],
                )
                box = note.get_window_extent(renderer)
                outside = box.width * box.height - _overlap(box, frame)
                cost = sum(weight * _overlap(box, other) for other, weight in taken) + 5 * outside
                cost += 0.04 * box.height * box.height * reach / 9
                if best is None or cost < best[0]:
                    if best is not None:
                        best[1].remove()
                    best = (cost, note, box, reach)
                else:
                    note.remove()
            assert best is not None
            _, note, box, reach = best
            if reach > 15:
                axes.annotate(
                    "",
                    (x, y),
                    note.xyann,
                    textcoords="offset points",
                    arrowprops={"arrowstyle": "-", "color": colors[line.name], "linewidth": 0.6, "alpha": 0.7},
                )
            taken.append((box, 3.0))


def _overlap(box: Any, other: Any) -> float:
    """Area that two boxes share, in square pixels."""
    width = min(box.x1, other.x1) - max(box.x0, other.x0)
    height = min(box.y1, other.y1) - max(box.y0, other.y0)
    return max(width, 0.0) * max(height, 0.0)


# ---------------------------------------------------------------------------------------------------------------- HTML

_STYLE = """
:root { color-scheme: light dark; --ground: #fbfbfc; --card: #fff; --text: #1f2630; --dim: #667080; --line: #dfe3e8;
  --good: #137a4b; --bad: #c0392b; --note: #2563a8; --wait: #8a6d00; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171c; --card: #1b2027; --text: #e4e8ee; --dim: #98a2b0;
  --line: #323a45; --good: #4cc38a; --bad: #ff7a6b; --note: #6fb1ff; --wait: #e0b94a; } }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--text); background: var(--ground); margin: 0 auto;
  padding: 1.5rem; max-width: 92rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 0 0 .6rem; } p { margin: .4rem 0; } .dim { color: var(--dim); font-size: .87rem; }
section.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem;
  margin: 0 0 1rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .87rem; width: 100%; }
th, td { padding: .28rem .55rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th { cursor: pointer; color: var(--dim); font-weight: 600; user-select: none; }
th:hover { color: var(--text); } th[aria-sort=ascending]::after { content: " ▲"; }
th[aria-sort=descending]::after { content: " ▼"; }
th.text, td.text { text-align: left; } tr:hover td { background: color-mix(in srgb, var(--line) 35%, transparent); }
.badge { font-size: .78rem; border-radius: 4px; padding: 0 .35rem; border: 1px solid currentColor; }
.reproduced { color: var(--good); } .differs { color: var(--bad); } .recorded { color: var(--note); }
.needs-data, .needs-weights, .needs-gpu, .needs-compute { color: var(--wait); }
.not-implemented-yet, .cited { color: var(--dim); }
.figure { max-width: 52rem; margin: .3rem auto .8rem; } .figure svg { width: 100%; height: auto; }
.figure.wide { max-width: 70rem; } .summary { display: flex; flex-wrap: wrap; gap: .5rem; margin: .8rem 0; }
.summary span { border: 1px solid currentColor; border-radius: 999px; padding: .1rem .7rem; font-size: .87rem; }
details { margin-top: .6rem; } summary { cursor: pointer; color: var(--dim); font-size: .87rem; }
details code { font-size: .8rem; } nav a { margin-right: .9rem; } a { color: var(--note); }
li { overflow-wrap: anywhere; }
"""

_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, index) => {
    head.tabIndex = 0;
    const sort = () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = row => row.cells[index].dataset.value ?? row.cells[index].textContent;
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const x = value(a), y = value(b);
        if (x === "" || y === "") return (x === "") - (y === "");
        const order = isNaN(x) || isNaN(y) ? x.localeCompare(y, "en", {numeric: true}) : x - y;
        return up ? order : -order;
      });
      table.tBodies[0].append(...rows);
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  });
}
"""


def to_html(ledger: Ledger, *, drawn: Mapping[str, str] | None = None) -> str:
    """One self-contained page: sortable tables, status colours, figures inline as SVG.

    Args:
        ledger: what to show.
        drawn: key of a figure -> its SVG; drawn here if None.
    """
    if drawn is None:
        drawn = {figure.key: inline_svg(*draw(figure, "svg")) for figure in figures(ledger)}
    counts = ledger.counts()
    chips = "".join(
        f'<span class="{_class(status)}" title="{_text(STATUSES[status])}">{count} {status}</span>'
        for status, count in counts.items()
    )
    done = Counter(entry.paper for entry in ledger.entries if entry.status not in WAITING)
    papers = sorted(dict.fromkeys(table.paper for table in ledger.tables), key=lambda paper: -done[paper])
    body = [
        "<h1>Published against reproduced</h1>",
        f'<p class="dim">{sum(counts.values())} published values of {len(ledger.tables)} tables. '
        f"Made {datetime.now(UTC):%Y-%m-%d %H:%M} UTC. A click on a column sorts; values, commands and sources appear "
        "under each table.</p>",
        f'<div class="summary">{chips}</div>',
        "<nav>" + "".join(f'<a href="#{_text(paper)}">{_text(paper)}</a>' for paper in papers) + "</nav>",
    ]
    if ledger.failures:
        failures = "".join(f"<li>{_text(str(failure))}</li>" for failure in ledger.failures)
        body.append(f'<section class="card"><h3 class="differs">Errors</h3><ul>{failures}</ul></section>')
    for paper in papers:
        body.append(f'<h2 id="{_text(paper)}">{_text(paper)}</h2>')
        body += [_html_desk(paper, desk, drawn) for name, desk in ledger.desk if name == paper]
        seen: set[str] = set()
        for table in ledger.tables:
            if table.paper == paper and ledger.of(table):
                overview = f"{paper}-{table.plot.get('overview', '')}"
                if overview in drawn and overview not in seen:
                    seen.add(overview)
                    body.append(f'<section class="card"><div class="figure wide">{drawn[overview]}</div></section>')
                body.append(_html_table(ledger, table, drawn))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>LeanViT: published against reproduced</title><style>{_STYLE}</style></head>\n<body>"
        + "\n".join(body)
        + f"<script>{_SCRIPT}</script></body></html>\n"
    )


def inline_svg(content: bytes) -> str:
    """An SVG file as an element of a page, its ink in the colour of the page's text."""
    text = content.decode()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def _html_table(ledger: Ledger, table: Table, drawn: Mapping[str, str]) -> str:
    entries = ledger.of(table)
    names = [name for name in table.columns if any(key[1] == name for key in entries)]
    has_plain = "gmacs" in names and any((table.paper, row.key) in ledger.plain_gmacs for row in table.rows)
    heads = ['<th class="text">row</th><th class="text">method</th><th class="text">setting</th>']
    for name in names:
        heads.append(f"<th>{_text(_heading(entries, name))}</th><th>here</th>")
        if has_plain and name == "gmacs":
            heads.append("<th>plain GMACs</th>")
    lines = []
    for row in table.rows:
        cells = [_td(row.id, text=True), _td(row.method, text=True)]
        cells.append(_td(_setting(row), text=True))
        for name in names:
            cells += _html_cells(entries.get((row.id, name)), name in row.approximate)
            if has_plain and name == "gmacs":
                value = ledger.plain_gmacs.get((table.paper, row.key))
                cells.append("<td></td>" if value is None else _td(f"{value:.2f}", value=value))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    figure = drawn.get(f"{table.paper}-{table.name}", "")
    details = "".join(
        f"<li>{_text(e.row)} <b>{_text(e.column)}</b> "
        f'<span class="{_class(e.status)}">{e.status}</span>: {_text(e.source)} <code>{_text(e.command)}</code></li>'
        for e in entries.values()
    )
    return (
        f'<section class="card" id="{table.paper}-{table.name}"><h3>{_text(table.name)}: {_text(table.title)}</h3>'
        + (f'<div class="figure">{figure}</div>' if figure else "")
        + f'<div class="scroll"><table class="sortable"><thead><tr>{"".join(heads)}</tr></thead>'
        + f'<tbody>{"".join(lines)}</tbody></table></div><p class="dim">Source: {_text(table.source)}. '
        + f"{_text(table.note)} {_text(_conventions(table, names))}</p>"
        + f"<details><summary>sources and commands</summary><ul class='dim'>{details}</ul></details></section>"
    )


def _html_cells(entry: Entry | None, approximate: bool) -> list[str]:
    if entry is None:
        return ["<td></td>", "<td></td>"]
    published = ("~" if approximate else "") + format_published(entry)
    tip = _text(f"{entry.convention}. {entry.source}")
    status = f'<span class="badge {_class(entry.status)}" title="{tip}">{BADGES[entry.status]}</span>'
    value = "" if entry.reproduced is None else entry.reproduced
    return [
        _td(published, value=entry.published),
        f'<td data-value="{value}">{_text(format_reproduced(entry))} {status}</td>',
    ]


def _html_desk(paper: str, desk: DeskTable, drawn: Mapping[str, str]) -> str:
    numeric = {name for name in desk.columns if any(isinstance(row.get(name), int | float) for row in desk.rows)}
    heads = "".join(f"<th{'' if name in numeric else ' class=text'}>{_text(name)}</th>" for name in desk.columns)
    rows = "".join(
        "<tr>"
        + "".join(
            _td(format_value(name, row.get(name)), text=name not in numeric, value=row.get(name))
            for name in desk.columns
        )
        + "</tr>"
        for row in desk.rows
    )
    figure = drawn.get(f"{paper}-{desk.key}", "")
    notes = "".join(f'<p class="dim">{_text(note)}</p>' for note in desk.notes)
    return (
        f'<section class="card"><h3>At desk size: {_text(desk.title)}</h3>'
        + (f'<div class="figure">{figure}</div>' if figure else "")
        + f'<div class="scroll"><table class="sortable"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'
        + f"</div>{notes}</section>"
    )


def _td(content: str, *, text: bool = False, value: Any = None) -> str:
    sort = f' data-value="{_text(str(value))}"' if value is not None else ""
    return f"<td{' class=text' if text else ''}{sort}>{_text(content)}</td>"


def _text(content: str) -> str:
    return html.escape(content)


def _class(status: str) -> str:
    return status.replace(" ", "-")


# -------------------------------------------------------------------------------------------------------------- folder


def _draw_once(figure: Figure) -> list[bytes]:
    """The figure as PNG and SVG, from the local cache if the same one was drawn before."""

    def compute() -> list[str]:
        return [base64.b64encode(content).decode() for content in draw(figure, "png", "svg")]

    job = ["figures", figure.key, asdict(figure), metadata.version("matplotlib")]
    return [base64.b64decode(content) for content in cached(job, compute, files=[Path(__file__)])]


def write_report(ledger: Ledger, folder: Path, *, quiet: bool = True) -> list[Path]:
    """Write the report folder, each file atomically.

    Args:
        ledger: what to report.
        folder: made if it does not exist.
        quiet: no progress bar.

    Returns:
        The files written.
    """
    plots: dict[str, str] = {}
    drawn: dict[str, str] = {}
    contents: dict[str, str | bytes] = {}
    for figure in tqdm(figures(ledger), desc="figures", delay=2, leave=False, disable=quiet):
        picture, drawing = _draw_once(figure)
        plots[figure.key] = f"plots/{figure.key}.png"
        contents[plots[figure.key]] = picture
        drawn[figure.key] = inline_svg(drawing)
    contents["ledger.json"] = to_json(ledger)
    contents["ledger.csv"] = to_csv(ledger)
    contents["report.md"] = to_markdown(ledger, plots=plots)
    contents["index.html"] = to_html(ledger, drawn=drawn)
    for name, content in contents.items():
        write_atomic(folder / name, content)
    return [folder / name for name in contents]


FORMATS = {"text": to_text, "md": to_markdown, "json": to_json, "csv": to_csv, "html": to_html}
"""Renderer of each ``--format``."""
