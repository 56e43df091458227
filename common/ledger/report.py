"""The ledger as Markdown, JSON, CSV and one self-contained HTML page; the folder that holds all of them.

The report folder holds ``report.md``, ``ledger.json``, ``ledger.csv``, ``plots/<paper>-<table>.png`` and
``index.html`` (needs no network; has an index, a search and filters; tables sort by a click; follows light and dark).
What the Markdown and the page look like is written in ``templates/``.
"""

import base64
import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from tqdm import tqdm

from common import plots
from common.ledger.cache import cached
from common.ledger.compare import KEYS, STATUSES, Ledger
from common.ledger.plots import figures
from common.ledger.text import to_text
from common.ledger.view import (
    TableView,
    label_of,
    markdown_own,
    markdown_table,
    markdown_text,
    plural,
    setting_of,
    view_tables,
)
from common.run.files import write_atomic

MARKS = {"reproduced": " ✓", "differs": " ✗", "recorded": " (recorded)"}
"""What follows a value in the tables of the READMEs; other statuses stand in its place."""

GROUPS = ("same", "measured", "differ", "open", "quoted")
"""Columns of the overviews, each with the statuses of that group; together all values."""


@cache
def _templates(form: str) -> jinja2.Environment:
    """Templates of one form; every value is escaped for it."""
    html, own = form == "html", Path(__file__).parent / "templates"
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader([own, own.parents[1] / "templates"]),  # what the pages of this house share
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=html,
        finalize=None if html else _one_line,
    )
    found.filters["slug"] = slug
    names: dict[str, Any] = found.globals
    names.update(STATUSES=STATUSES, label_of=label_of, setting_of=setting_of, plural=plural)
    return found


def slug(status: str) -> str:
    """A status as the name of a class of CSS."""
    return status.replace(" ", "-")


def _one_line(value: Any) -> str:
    """Text for Markdown; what a template calls safe is Markdown already."""
    return value if isinstance(value, Markup) else markdown_text(value)


# ------------------------------------------------------------------------------------------------------- JSON and CSV


def to_json(ledger: Ledger) -> str:
    """A list of objects with the keys ``common.ledger.compare.KEYS``."""
    return json.dumps([entry.as_dict() for entry in ledger.entries], indent=1, ensure_ascii=False) + "\n"


def to_csv(ledger: Ledger) -> str:
    """One line per value; published values keep their digits."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list[str](KEYS), lineterminator="\n")
    writer.writeheader()
    writer.writerows({**entry.as_dict(), "published": f"{entry.published:f}"} for entry in ledger.entries)
    return stream.getvalue()


# ------------------------------------------------------------------------------------------------------------ Markdown


def markdown_of(view: TableView) -> str:
    """One table, published beside reproduced, with its conventions: what the READMEs show.

    Where nothing can be reproduced yet, the published values stand alone.
    """
    heads = ["Method", "Setting"]
    for column in view.columns:
        heads += [column.heading] if view.idle or column.plain else [f"{column.heading}: published", "here"]
    rows = []
    for index, row in enumerate(view.rows):
        cells = [row.method, setting_of(row)]
        for column in view.columns:
            if column.plain:
                cells.append(column.plain[index])
            elif entry := column.entries[index]:
                published = "~" * entry.approximate + entry.there
                published = f"{entry.absolute:f} ({published})" if entry.is_ratio else published
                here = entry.here + MARKS[entry.status] if entry.status in MARKS else f"*{entry.status}*"
                cells += [published] if view.idle else [published, here]
            else:
                cells += [""] if view.idle else ["", ""]
        rows.append(cells)
    notes = _templates("md").get_template("notes.md").render(view=view)
    return "\n".join([*markdown_table(heads, rows, left=2), "", notes.rstrip()])


def tables_table(views: Sequence[TableView], *, linked: bool = False) -> str:
    """One line per published table in Markdown, perhaps linked to its data, and the sum."""
    parts = {}
    for view in views:
        name = f"[{view.name}]({view.table.paper}/tables/{view.table.name}.toml)" if linked else view.name
        parts[f"{name}: {view.table.title}"] = [view]
    return count_table("Table", parts, "all")


def count_table(heading: str, parts: Mapping[str, Sequence[TableView]], total: str) -> str:
    """A line of numbers for the values of each part, and of their sum."""
    rows: list[list[str]] = []
    for text, views in {**parts, total: [view for part in parts.values() for view in part]}.items():
        counts = Counter(STATUSES[entry.status].group for view in views for entry in view.entries)
        numbers = [counts[group] for group in GROUPS]
        rows.append([text, str(sum(numbers)), *(str(number or "") for number in numbers)])
    return "\n".join(markdown_table([heading, "values", *GROUPS], rows))


def to_markdown(ledger: Ledger, *, pictures: Mapping[str, str] | None = None) -> str:
    """The whole ledger in Markdown.

    Args:
        ledger: what to show.
        pictures: key of a figure -> its path, relative to the file.
    """
    views = view_tables(ledger)
    own = [(table, markdown_own(table)) for table in ledger.own]
    tables = [(view, markdown_of(view)) for view in views]
    return (
        _templates("md")
        .get_template("report.md")
        .render(ledger=ledger, summary=tables_table(views), tables=tables, own=own, pictures=pictures or {})
    )


# ---------------------------------------------------------------------------------------------------------------- HTML


def to_html(ledger: Ledger, *, drawn: Mapping[str, str] | None = None) -> str:
    """One self-contained page: index, search, status filters, sortable tables, figures inline as SVG.

    Args:
        ledger: what to show.
        drawn: key of a figure -> its SVG; drawn here if None.
    """
    views = view_tables(ledger)
    if drawn is None:
        found = figures(views, ledger.own)
        drawn = {figure.key: plots.inline_svg(*plots.draw(figure, "svg")) for figure in found}
    papers = dict.fromkeys(table.paper for table in ledger.tables)
    return (
        _templates("html")
        .get_template("page.html")
        .render(
            ledger=ledger,
            counts=ledger.counts(),
            made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            papers={paper: [view for view in views if view.table.paper == paper] for paper in papers},
            own={paper: [table for table in ledger.own if table.paper == paper] for paper in papers},
            tables=len(views),
            drawn=drawn,
        )
    )


# -------------------------------------------------------------------------------------------------------------- folder


_drawn: dict[str, list[bytes]] = {}
"""What is in a figure -> as PNG and SVG, of this process: a report is written anew after each live run."""


def _draw_once(figure: plots.Figure) -> list[bytes]:
    """The figure as PNG and SVG, from the local cache if the same one was drawn before."""
    if (content := repr(figure)) in _drawn:
        return _drawn[content]

    def compute() -> list[str]:
        return [base64.b64encode(content).decode() for content in plots.draw(figure, "png", "svg")]

    job = ["figures", figure.key, asdict(figure), metadata.version("matplotlib")]
    found = cached(job, compute, files=[Path(plots.__file__)])
    return _drawn.setdefault(content, [base64.b64decode(each) for each in found])


def write_report(ledger: Ledger, folder: Path, *, quiet: bool = True) -> list[Path]:
    """Write the report folder, each file atomically.

    Args:
        ledger: what to report.
        folder: made if it does not exist.
        quiet: no progress bar.

    Returns:
        The files written.
    """
    drawn: dict[str, str] = {}
    contents: dict[str, Any] = {}
    found = figures(view_tables(ledger), ledger.own)
    for figure in tqdm(found, desc="figures", delay=2, leave=False, disable=quiet):
        contents[f"plots/{figure.key}.png"], drawing = _draw_once(figure)
        drawn[figure.key] = plots.inline_svg(drawing)
    contents["ledger.json"] = to_json(ledger)
    contents["ledger.csv"] = to_csv(ledger)
    contents["report.md"] = to_markdown(ledger, pictures={key: f"plots/{key}.png" for key in drawn})
    contents["index.html"] = to_html(ledger, drawn=drawn)
    for name, content in contents.items():
        write_atomic(folder / name, content)
    return [folder / name for name in contents]


FORMATS = {"text": to_text, "md": to_markdown, "json": to_json, "csv": to_csv, "html": to_html}
"""Renderer of each ``--format``."""
