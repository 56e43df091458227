"""Tables as they are shown: headings, cells and notes, worked out once for text, Markdown, HTML and the plots."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.ledger.compare import Entry, Ledger, count_statuses
from common.ledger.tables import OwnTable, Row, Table, column

WAITING = ("not implemented yet", "cited")
"""Statuses for which nothing can be done from the command line."""


@dataclass(frozen=True)
class ColumnView:
    """One column of a table: its heading, how it is counted, and what each row has in it."""

    name: str
    heading: str
    convention: str = ""
    entries: tuple[Entry | None, ...] = ()
    plain: tuple[str, ...] = ()
    """plain multiply-accumulates, beside a column that is counted in the paper's way: nothing is published"""


@dataclass(frozen=True)
class Need:
    """What several values of a table wait for."""

    status: str
    columns: str
    """``gmacs of 1 row, fps of 3 rows``"""
    command: str
    """that of the first of them"""


@dataclass(frozen=True)
class TableView:
    """One table, ready to be shown."""

    table: Table
    rows: tuple[Row, ...]
    columns: tuple[ColumnView, ...]
    entries: tuple[Entry, ...]
    counts: Counter[str]

    @property
    def name(self) -> str:
        """``paper/table``."""
        return f"{self.table.paper}/{self.table.name}"

    @property
    def key(self) -> str:
        """``paper-table``: of the figure, and of the place in the page."""
        return f"{self.table.paper}-{self.table.name}"

    @property
    def overview(self) -> str:
        """Key of the figure that it shares with other tables; empty if it has none."""
        name = self.table.plot.get("overview")
        return f"{self.table.paper}-{name}" if name else ""

    @property
    def idle(self) -> bool:
        """Nothing can be reproduced yet: the published values stand alone."""
        return all(status in WAITING for status in self.counts)

    @property
    def conventions(self) -> str:
        """One sentence on how the columns are counted."""
        texts = [f"{label_of(column.name)}: {column.convention}" for column in self.columns if column.convention]
        return f"Conventions: {'; '.join(texts)}."

    @property
    def differing(self) -> list[Entry]:
        """Values that came out otherwise."""
        return [entry for entry in self.entries if entry.status == "differs"]

    @property
    def origins(self) -> list[str]:
        """Where recorded values come from."""
        return sorted({entry.origin for entry in self.entries if entry.status == "recorded" and entry.origin})

    @property
    def needs(self) -> list[Need]:
        """What is missing, with one command for each thing."""
        columns: dict[tuple[str, str], list[Entry]] = {}
        for entry in self.entries:
            if entry.status.startswith("needs"):
                columns.setdefault((entry.status, entry.column), []).append(entry)
        commands: dict[tuple[str, str], list[str]] = {}
        for (status, name), group in columns.items():
            text = f"{name} of {plural(len(group), 'row')}"
            commands.setdefault((status, group[0].command), []).append(text)
        return [Need(status, ", ".join(texts), command) for (status, command), texts in commands.items()]


def view_tables(ledger: Ledger) -> list[TableView]:
    """Every table of a ledger that has an entry."""
    found: dict[tuple[str, str], dict[tuple[str, str], Entry]] = {}
    for entry in ledger.entries:
        found.setdefault((entry.paper, entry.table), {})[entry.row, entry.column] = entry
    return [
        _view(table, entries, ledger.plain_gmacs)
        for table in ledger.tables
        if (entries := found.get((table.paper, table.name)))
    ]


def _view(
    table: Table, entries: Mapping[tuple[str, str], Entry], plain_gmacs: Mapping[tuple[str, str], float]
) -> TableView:
    rows = [row for row in table.rows if any(key[0] == row.id for key in entries)]
    plain = [plain_gmacs.get((table.paper, row.key)) for row in rows]
    columns: list[ColumnView] = []
    for name in table.columns:
        own = tuple(entries.get((row.id, name)) for row in rows)
        if not any(own):
            continue
        heading = label_of(name) + (" / dense" if any(entry and entry.is_ratio for entry in own) else "")
        convention = next((row.convention[name] for row in table.rows if row.convention.get(name)), "")
        columns.append(ColumnView(name, heading, convention, own))
        if name == "gmacs" and any(value is not None for value in plain):
            texts = tuple("" if value is None else f"{value:.2f}" for value in plain)
            columns.append(ColumnView("macs_g", "plain GMACs", plain=texts))
    return TableView(table, tuple(rows), tuple(columns), tuple(entries.values()), count_statuses(entries.values()))


def plural(number: int, noun: str) -> str:
    """``1 table``, ``2 tables``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def setting_of(row: Row) -> str:
    """Series and setting, without repeating the method."""
    series = "" if row.method.startswith(row.series) else row.series
    return ", ".join(word for word in (series, row.setting) if word)


def label_of(name: str) -> str:
    """Heading of a column: its meaning with the unit."""
    meaning = column(name)
    if meaning.unit in ("", "G") or meaning.kind == "speed":
        return meaning.label
    return f"{meaning.label} ({meaning.unit})"


def markdown_text(text: Any) -> str:
    """Text on one line, in which nothing is taken for HTML: names of devices come from elsewhere."""
    return " ".join(str(text).split()).replace("<", "&lt;")


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Lines of a Markdown table; the first ``left`` columns flush left."""
    marks = [":--" if index < left else "--:" for index in range(len(heads))]
    escaped = ([markdown_text(cell).replace("|", "\\|") for cell in row] for row in (heads, marks, *rows))
    return [f"| {' | '.join(row)} |" for row in escaped]


def markdown_own(own: OwnTable) -> str:
    """What was measured here: a table for the rows that have something in common, under what that is."""
    parts = [
        part
        for said, rows in own.groups.items()
        for part in (said and markdown_text(said), "\n".join(markdown_table(own.columns, rows)))
    ]
    return "\n\n".join(part for part in [*parts, *own.notes] if part)
