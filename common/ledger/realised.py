"""What the recorded speed-ups keep of what the counted costs promise: realised/theoretical, row by row."""

from collections.abc import Sequence
from pathlib import Path

from common.ledger.compare import Ledger
from common.ledger.report import markdown_table
from common.ledger.results import Record, load_records
from common.ledger.tables import Row
from common.run.files import ROOT


def latest(records: Sequence[Record]) -> list[Record]:
    """The newest record with a ratio of each row, column, device and way of running."""
    found: dict[tuple[object, ...], Record] = {}
    for record in records:  # oldest first
        if record.ratio is not None and record.reference_row is not None and record.origin is not None:
            device = (record.origin.device.get("name"), record.origin.device.get("timing"))
            key = (
                record.table,
                record.row,
                record.column,
                device,
                record.dtype,
                record.compiled,
                record.cuda_graph,
                record.batch_size,
            )
            found[key] = record
    return list(found.values())


def promised(ledger: Ledger, row: Row, dense: Row) -> tuple[float, str] | None:
    """Cost of the dense row over that of ``row``, and where it comes from; None if neither source has both.

    Multiply-accumulates that were counted here, else the published ones (the cost depends on the weights).
    """
    counted = [ledger.plain_gmacs.get((row.paper, entry.key)) for entry in (dense, row)]
    if counted[0] is not None and counted[1] is not None:
        return counted[0] / counted[1], "counted"
    published = [entry.published.get("gmacs") for entry in (dense, row)]
    if published[0] is not None and published[1] is not None:
        return float(published[0] / published[1]), "published"
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
        reference = record.reference_row or ""
        key, dense = f"{record.table}/{record.row}", reference if "/" in reference else f"{record.table}/{reference}"
        ratio = promised(ledger, rows[key], rows[dense])
        if ratio is None or record.ratio is None or record.origin is None:
            continue
        row, how = rows[key], ", compiled" if record.compiled else ", CUDA graph" if record.cuda_graph else ""
        spread = "" if record.spread_percent is None else f"{record.spread_percent:.1f} %"
        timing = f", {record.origin.device['timing']}" if "timing" in record.origin.device else ""
        cells = [
            row.method,
            ", ".join(word for word in (row.series, row.setting) if word and word != row.method),
            f"{record.origin.device.get('name')}, {record.dtype}{how}, batch {record.batch_size}{timing}",
            f"{record.ratio:.2f}x",
            f"{ratio[0]:.2f}x" + ("" if ratio[1] == "counted" else " (published)"),
            f"{record.ratio / ratio[0]:.2f}",
            spread,
        ]
        lines.append((order[key], cells))
    if not lines:
        raise KeyError(f"{paper} has no recorded speed-ups")
    heads = ["Method", "Setting", "Measured on", "Speed-up", "Cost ratio", "Realised", "Spread of the passes"]
    return "\n".join(markdown_table(heads, (cells for _, cells in sorted(lines, key=lambda line: line[0])), left=3))
