"""What the recorded speed-ups keep of what the counted costs promise: realised/theoretical, row by row."""

from collections.abc import Sequence
from pathlib import Path

from common.ledger.compare import Ledger
from common.ledger.results import Record, load_records
from common.ledger.tables import Row
from common.ledger.view import markdown_table
from common.run.files import ROOT


def latest(records: Sequence[Record]) -> list[Record]:
    """The newest record with a ratio of each row, column, device and way of running."""
    found: dict[tuple[object, ...], Record] = {}
    for record in records:  # oldest first
        if record.ratio is not None and record.reference_row is not None:
            device = (record.origin.device.get("name"), record.origin.device.get("timing"))
            found[record.table, record.row, record.column, device, record.conditions] = record
    return list(found.values())


def promised(ledger: Ledger, row: Row, dense: Row) -> tuple[float, str] | None:
    """Cost of the dense row over that of ``row``, and where it comes from; None if neither source has both.

    Multiply-accumulates that were counted here, else the published ones (the cost depends on the weights).
    """
    counted = [ledger.plain_gmacs.get((row.paper, entry.key)) for entry in (dense, row)]
    published = [entry.published.get("gmacs") for entry in (dense, row)]
    for costs, how in ((counted, ""), (published, " (published)")):
        if costs[0] is not None and costs[1] is not None:
            return float(costs[0]) / float(costs[1]), how
    return None


def markdown_realised(ledger: Ledger, paper: str, *, root: Path = ROOT) -> str:
    """Every recorded speed-up of a paper beside the ratio of the costs, in the order of the tables.

    Raises:
        KeyError: if there is no record of this paper.
    """
    rows = {row.key: row for table in ledger.tables if table.paper == paper for row in table.rows}
    order = {key: index for index, key in enumerate(rows)}
    lines: list[tuple[int, list[str]]] = []
    for record in latest(load_records(paper, root=root)):
        row = rows[f"{record.table}/{record.row}"]
        cost = promised(ledger, row, rows[record.reference_key])
        if cost is None or record.ratio is None:
            continue
        device = record.origin.device
        timing = f", {device['timing']}" if "timing" in device else ""
        cells = [
            row.method,
            ", ".join(word for word in (row.series, row.setting) if word and word != row.method),
            f"{device.get('name')}, {record.conditions}{timing}",
            f"{record.ratio:.2f}x",
            f"{cost[0]:.2f}x{cost[1]}",
            f"{record.ratio / cost[0]:.2f}",
            "" if record.spread_percent is None else f"{record.spread_percent:.1f} %",
        ]
        lines.append((order[row.key], cells))
    if not lines:
        raise KeyError(f"{paper} has no recorded speed-ups")
    heads = ["Method", "Setting", "Measured on", "Speed-up", "Cost ratio", "Realised", "Spread of the passes"]
    return "\n".join(markdown_table(heads, [cells for _, cells in sorted(lines, key=lambda line: line[0])], left=3))
