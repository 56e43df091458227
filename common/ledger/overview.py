"""Where the published values stand, in tables no wider than a page: one line per paper, or one per table."""

import ast
import re
from collections.abc import Sequence
from pathlib import Path

from common.ledger.compare import Ledger

GROUPS = {
    "same": ("reproduced",),
    "measured": ("recorded",),
    "differ": ("differs",),
    "open": ("needs data", "needs weights", "needs gpu", "needs compute", "not implemented yet"),
    "quoted": ("cited",),
}
"""Column -> the statuses it counts; together all of them."""


def describe(folder: Path) -> str:
    """A paper in one cell: its directory; title and method from the docstring of its package."""
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or folder.name
    title, _, method = docstring.partition("\n\n")
    title = title.rstrip(".")
    if paper := re.search(r"arXiv:(\d{4}\.\d{5})", (folder / "README.md").read_text(encoding="utf-8")):
        title = f"[{title}](https://arxiv.org/abs/{paper[1]})"
    return f"[**{folder.name}**]({folder.name}/README.md): {title}. {' '.join(method.split())}".strip()


def papers_table(ledger: Ledger, root: Path) -> str:
    """One line per paper in Markdown, and the sum."""
    papers = dict.fromkeys(table.paper for table in ledger.tables)
    parts = [(describe(root / paper), [e.status for e in ledger.entries if e.paper == paper]) for paper in papers]
    return _table("Paper", parts, f"all {len(ledger.tables)} tables")


def tables_table(ledger: Ledger) -> str:
    """One line per published table in Markdown, linked to its data, and the sum."""
    parts = [
        (
            f"[{table.paper}/{table.name}]({table.paper}/tables/{table.name}.toml): {table.title}",
            [e.status for e in ledger.entries if (e.paper, e.table) == (table.paper, table.name)],
        )
        for table in ledger.tables
    ]
    return _table("Table", parts, "all")


def _table(heading: str, parts: Sequence[tuple[str, Sequence[str]]], total: str) -> str:
    """Lines of (text, statuses of its values), and their sum."""
    lines = [f"| {heading} | values | {' | '.join(GROUPS)} |", f"| :-- |{' --: |' * (len(GROUPS) + 1)}"]
    for text, statuses in [*parts, (total, [status for _, found in parts for status in found])]:
        numbers = [len(statuses), *(sum(status in group for status in statuses) for group in GROUPS.values())]
        lines.append(f"| {text} | {' | '.join(str(number or '') for number in numbers)} |")
    return "\n".join(lines)
