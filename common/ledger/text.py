"""The ledger for a terminal: one line for each table, or tables in full, never wider than ``WIDTH``."""

import textwrap
from collections.abc import Sequence

from common.ledger.compare import STATUSES, Entry, Ledger
from common.ledger.tables import OwnTable
from common.ledger.view import ColumnView, TableView, plural, view_tables

WIDTH = 140


def to_text(ledger: Ledger, *, full: bool = False) -> str:
    """The ledger as text.

    Args:
        ledger: what to show.
        full: after the summary every table with all of its values; else what differs and what is missing.
    """
    views = view_tables(ledger)
    parts = [_summary(views)]
    parts += [_table(view) for view in views] if full else [part for view in views if (part := _notes(view))]
    parts += [own_text(own) for own in ledger.own]
    return "\n\n".join([*parts, legend(ledger)]) + "\n"


def legend(ledger: Ledger) -> str:
    """Totals per status, with the tag used in the tables."""
    counts = ledger.counts()
    width = max((len(status) for status in counts), default=6)
    lines = [f"{'tag':<8}{'values':>6}  status"]
    lines += [f"{STATUSES[s].tag:<8}{n:>6}  {s:<{width}}  {STATUSES[s].meaning}" for s, n in counts.items()]
    return "\n".join([*lines, f"{'':<8}{sum(counts.values()):>6}  in all"])


def align(rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Lines of a table: the first ``left`` columns flush left, the others right."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return [
        "  ".join(f"{cell:{'<' if i < left else '>'}{widths[i]}}" for i, cell in enumerate(row)).rstrip()
        for row in rows
    ]


def _summary(views: Sequence[TableView]) -> str:
    """One line for each table: its values by status, and as much of its title as fits."""
    statuses = [status for status in STATUSES if any(view.counts[status] for view in views)]
    rows = [["table", "values", *(STATUSES[status].tag for status in statuses)]]
    for view in views:
        rows.append([view.name, str(len(view.entries)), *(str(view.counts[status] or "") for status in statuses)])
    totals = [sum(view.counts[status] for view in views) for status in statuses]
    rows.append([plural(len(views), "table"), str(sum(totals)), *map(str, totals)])
    lines = align(rows)
    width = max(map(len, lines))
    titles = ["", *(view.table.title for view in views), ""]
    shown = [textwrap.shorten(title, WIDTH - width - 2, placeholder=" ...") for title in titles]
    return "\n".join(f"{line:<{width}}  {title}".rstrip() for line, title in zip(lines, shown, strict=True))


def _notes(view: TableView) -> str:
    """What differs and why, and one command for each thing that is missing."""
    lines: list[str] = []
    for entry in view.differing:
        value = f"{entry.row} {entry.column} {entry.here}, published {entry.there}"
        lines += _wrap(f"differs: {value}: {entry.reason}", "  ", "    ")
    for need in view.needs:
        lines += _wrap(f"{need.status}: {need.columns}, e.g. {need.command}", "  ", "    ", ending=" \\")
    return "\n".join([f"{view.name}:", *lines]) if lines else ""


def _wrap(text: str, first: str, others: str, *, ending: str = "") -> list[str]:
    """Lines that fit; commands end a line as the shell wants it."""
    wrapper = textwrap.TextWrapper(WIDTH - len(ending), first, others, break_long_words=False, break_on_hyphens=False)
    lines = wrapper.wrap(text)
    return [line + ending for line in lines[:-1]] + lines[-1:]


def _table(view: TableView) -> str:
    heads = ["row", *(column.heading for column in view.columns)]
    blocks = [[row.id for row in view.rows], *(_block(column) for column in view.columns)]
    lines = [f"{view.name}: {view.table.title}", *_side_by_side(heads, blocks)]
    notes = _notes(view).splitlines()[1:]
    return "\n".join([*lines, *notes, *_details([entry for entry in view.entries if entry.reproduced is not None])])


def _block(column: ColumnView) -> list[str]:
    """Published, here and tag of each row, aligned."""
    if column.plain:
        return list(column.plain)
    triples = [
        ("~" * entry.approximate + entry.there, entry.here, STATUSES[entry.status].tag) if entry else ("", "", "")
        for entry in column.entries
    ]
    widths = [max(len(triple[index]) for triple in triples) for index in range(3)]
    if not widths[1]:
        return [f"{published:>{widths[0]}} {tag:<{widths[2]}}" for published, _, tag in triples]
    return [f"{a:>{widths[0]}} {b:>{widths[1]}} {c:<{widths[2]}}" for a, b, c in triples]


def _side_by_side(heads: Sequence[str], blocks: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Columns side by side as far as they fit, then the others below; the first is repeated."""
    widths = [max(len(text) for text in (head, *block)) + 2 for head, block in zip(heads, blocks, strict=True)]
    chunks: list[list[int]] = [[0]]
    for index in range(1, len(heads)):
        if len(chunks[-1]) > 1 and sum(widths[i] for i in chunks[-1]) + widths[index] > WIDTH:
            chunks.append([0])
        chunks[-1].append(index)
    lines: list[str] = []
    for chunk in chunks:
        rows = [[heads[i] for i in chunk], *([blocks[i][r] for i in chunk] for r in range(len(blocks[0])))]
        lines += align(rows, left=left if chunk is chunks[0] else 1)
    return lines


def _details(entries: Sequence[Entry]) -> list[str]:
    """For each value that came out: how far off, what was allowed, how it was counted and where it is from."""
    rows = [["  value", "column", "status", "published", "here", "difference", "tolerance"]]
    for entry in entries:
        off = "" if entry.difference is None else f"{entry.difference:+.4g}"
        allowed = "" if entry.tolerance is None else f"{entry.tolerance:.3g}"
        rows.append([f"  {entry.row}", entry.column, entry.status, entry.there, entry.here, off, allowed])
    if not entries:
        return []
    lines = align(rows, left=3)
    sources = [_wrap(f"{entry.convention}: {entry.source}", " " * 6, " " * 6) for entry in entries]
    return lines[:1] + [line for head, source in zip(lines[1:], sources, strict=True) for line in (head, *source)]


def own_text(own: OwnTable) -> str:
    """What was measured here, for a terminal."""
    rows = [own.columns, *(row for rows in own.groups.values() for row in rows)]
    lines = iter(align([[f"  {row[0]}", *row[1:]] for row in rows]))
    shown = [f"{own.paper}: {own.title}", next(lines)]
    for said, rows in own.groups.items():
        shown += _wrap(said, "  ", "  ") if said else []
        shown += [next(lines) for _ in rows]
    return "\n".join([*shown, *(line for note in own.notes for line in _wrap(note, "  ", "  "))])
