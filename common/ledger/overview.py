"""Where the published values stand, in tables no wider than a page: one line per paper, or one per table."""

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.ledger.view import TableView, markdown_table

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


def papers_table(views: Sequence[TableView], root: Path) -> str:
    """One line per paper in Markdown, and the sum."""
    parts: dict[str, list[TableView]] = {}
    for view in views:
        parts.setdefault(view.table.paper, []).append(view)
    return _table("Paper", {describe(root / paper): own for paper, own in parts.items()}, f"all {len(views)} tables")


def tables_table(views: Sequence[TableView], *, linked: bool = False) -> str:
    """One line per published table in Markdown, perhaps linked to its data, and the sum."""
    parts = {}
    for view in views:
        name = f"[{view.name}]({view.table.paper}/tables/{view.table.name}.toml)" if linked else view.name
        parts[f"{name}: {view.table.title}"] = [view]
    return _table("Table", parts, "all")


def _table(heading: str, parts: Mapping[str, Sequence[TableView]], total: str) -> str:
    """A line of numbers for the values of each part, and of their sum."""
    rows: list[list[str]] = []
    for text, views in {**parts, total: [view for part in parts.values() for view in part]}.items():
        numbers = [sum(view.counts[status] for view in views for status in group) for group in GROUPS.values()]
        rows.append([text, str(sum(numbers)), *(str(number or "") for number in numbers)])
    return "\n".join(markdown_table([heading, "values", *GROUPS], rows))
