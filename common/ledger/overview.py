"""The papers in one table that is no wider than a page: what each is, and where its published values stand."""

import ast
import re
from collections import Counter
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
    statuses = {paper: Counter(e.status for e in ledger.entries if e.paper == paper) for paper in papers}
    lines = [f"| Paper | values | {' | '.join(GROUPS)} |", f"| :-- |{' --: |' * (len(GROUPS) + 1)}"]
    rows = [(describe(root / paper), statuses[paper]) for paper in papers]
    for text, counts in [*rows, (f"all {len(ledger.tables)} tables", sum(statuses.values(), Counter[str]()))]:
        numbers = [counts.total(), *(sum(counts[status] for status in group) for group in GROUPS.values())]
        lines.append(f"| {text} | {' | '.join(str(number or '') for number in numbers)} |")
    return "\n".join(lines)
