"""Accuracy against cost as figures: what is published hollow, what came out here filled; ``common.plots`` draws them.

A filled marker has both coordinates from here, computed or recorded; one of which a coordinate differs is a cross. A
published value never stands in for one that is missing.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from common.ledger.tables import OwnTable, Row, column
from common.ledger.view import TableView
from common.plots import Figure, Kind, Series

# ------------------------------------------------------------------------------------------------------ what is drawn


def figures(views: Sequence[TableView], own: Iterable[OwnTable] = ()) -> list[Figure]:
    """Every figure: one per overview, one per table with a ``plot``, and those of what was measured here."""
    drawn = [view for view in views if view.table.plot]
    places = {(view.table.paper, row.key): (view, row) for view in views for row in view.rows}
    found: list[Figure] = []
    for key in dict.fromkeys(view.overview for view in drawn if view.overview):
        sharing = [view for view in drawn if view.overview == key]
        table = sharing[0].table
        title = f"{table.paper}: {axis_label(table.plot['y'])} against {axis_label(table.plot['x'])}"
        rows = [(view, row) for view in sharing for row in view.rows]
        panels = _panels(rows, apart=table.plot.get("panels") == "series")
        found.append(_figure(key, title, table.plot, panels, clip=True))
    for view in drawn:
        if len(view.rows) > 2 or not view.overview:
            keys = dict.fromkeys((row.paper, row.dense) for row in view.rows)
            rows = [places[key] for key in keys if key in places and places[key][0] is not view]
            panels = _panels([*rows, *((view, row) for row in view.rows)])
            found.append(_figure(view.key, view.table.title, view.table.plot, panels))
    found += [table.figure for table in own if table.figure]
    return [figure for figure in found if any(figure.panels.values())]


def _points(view: TableView, row: Row) -> dict[Kind, tuple[float, float]]:
    """A row as published and, if both coordinates came out here, what they are; never one for the other."""
    names = [view.table.plot[axis] for axis in ("x", "y") if view.table.plot.get(axis) in row.published]
    if len(names) < 2:
        return {}
    found: dict[Kind, tuple[float, float]] = {"published": _pair(row.published[name] for name in names)}
    here = [entry for name in names for entry in view.entries if (entry.row, entry.column) == (row.id, name)]
    values = [entry.reproduced for entry in here if entry.reproduced is not None and not entry.is_ratio]
    if len(values) == 2:
        found["differs" if any(entry.status == "differs" for entry in here) else "here"] = _pair(values)
    return found


def _pair(values: Iterable[Any]) -> tuple[float, float]:
    x, y = map(float, values)
    return x, y


def _figure(
    key: str, title: str, plot: Mapping[str, str], panels: dict[str, list[Series]], *, clip: bool = False
) -> Figure:
    return Figure(key, title, axis_label(plot["x"]), axis_label(plot["y"]), panels, clip)


def _panels(shown: Sequence[tuple[TableView, Row]], *, apart: bool | None = None) -> dict[str, list[Series]]:
    """Rows as series, in panels. ``apart``: whether each backbone has a panel and each method a line.

    In an overview (``apart`` is not None) the dense rows are stars, and a line begins at the dense row if all of its
    rows are compared with that one.
    """
    rows = [row for _, row in shown]
    points = {row.key: _points(view, row) for view, row in shown}
    baselines = set() if apart is None else {row.dense for row in rows}
    places = {row.key: (row.series, row.method) if apart else ("", row.series or row.method) for row in rows}
    stars = Counter(places[row.key][0] for row in rows if row.key in baselines)
    dense = {place: {row.dense for row in rows if places[row.key] == place} for place in places.values()}
    panels: dict[str, dict[tuple[str, Kind], Series]] = {}
    for row in rows:
        panel, name = places[row.key]
        baseline = row.key in baselines
        label = "dense" if baseline and stars[panel] == 1 else "" if apart else row.label
        for kind, point in points[row.key].items():
            joined = kind == "published" and not baseline and name != "cited baselines"
            lines = panels.setdefault(panel, {})
            line = lines.setdefault((name, kind), Series(name, joined=joined, kind=kind, baseline=baseline))
            if apart is not None and joined and not line.x and len(dense[panel, name]) == 1 and row.dense in points:
                line.add(points[row.dense][kind], "")
            line.add(point, label if kind == "published" else "")
    return {panel: list(lines.values()) for panel, lines in panels.items()}


def axis_label(name: str) -> str:
    """Title of an axis, with the unit; a name that is no column stands for itself."""
    try:
        meaning = column(name)
    except KeyError:
        return name.replace("_", " ")
    text = {"top1_percent": "top-1 accuracy", "top5_percent": "top-5 accuracy"}.get(name, meaning.label)
    return text if meaning.unit in ("", "G") else f"{text} ({meaning.unit})"
