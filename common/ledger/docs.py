"""Render the tables inside the READMEs from ``tables/`` and ``results/``, so that no number there is typed.

    python -m common.docs             # rewrite README.md and <paper>/README.md
    python -m common.docs --check     # change nothing; exit status 1 names the files that are stale
    python -m common.docs --only equations      # the markers of one kind: after code moved, in a second

Everything between a marker and ``<!-- end -->`` is replaced:

    <!-- table: hourglass_swag/hourglass -->    a published table, published beside reproduced and recorded
    <!-- ledger -->                             the shortened ledger: values by status, one line per table
    <!-- plot: hourglass_swag-all-methods -->   a figure, written to docs/plots/
    <!-- realised: hourglass_swag -->           recorded speed-ups beside what the counted costs promise
    <!-- papers -->                             one line per paper: what it is, and its values by status
    <!-- claims: hourglass_swag -->            what a paper claims, and how it came out here; or all in short
    <!-- loading -->                            how fast images load, from docs/measured/loading/
    <!-- equations -->                          the paper's equations, each linked to its function
    <!-- tables -->29<!-- end -->               how many tables there are, inside a line

Costs are computed (cached); speeds and accuracies come from ``results/`` alone, so the text does not depend on the
machine that renders it.
"""

import ast
import os
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from common import loading
from common.ledger import evidence
from common.ledger.compare import Ledger
from common.ledger.equations import index
from common.ledger.gather import Request, build
from common.ledger.plots import figures
from common.ledger.realised import markdown_realised
from common.ledger.report import count_table, markdown_of, tables_table
from common.ledger.tables import TableError, load_tables, papers
from common.ledger.view import TableView, markdown_own, view_tables
from common.plots import Figure, draw
from common.run.files import ROOT, write_atomic
from common.run.flags import make_parser

KINDS = ("table", "ledger", "plot", "realised", "equations", "papers", "claims", "loading")
END = "<!-- end -->"
MARKER = rf"<!-- (?P<kind>{'|'.join(KINDS)})(?:: (?P<name>\S+))? -->$"
BLOCK = re.compile(rf"^(?P<marker>{MARKER})(?:\n(?!<!-- (?:{'|'.join(KINDS)}|end)).*)*(?P<end>\n{END})?", re.MULTILINE)
COUNT = re.compile(r"(?<=<!-- tables -->)[^<\n]*(?=<!-- end -->)")


class DocsError(ValueError):
    """A marker that cannot be rendered; the message names file and line."""


class Renderer:
    """Text for each marker; the ledger is worked out when the first marker asks for it."""

    def __init__(self, root: Path = ROOT, only: str | None = None) -> None:
        self.root = root
        self.only = only

    @cached_property
    def ledger(self) -> Ledger:
        """Every table, with costs computed and everything else from ``results/``.

        Raises:
            DocsError: if a row failed.
        """
        ledger = build(load_tables(root=self.root), Request(root=self.root))
        if ledger.failures:
            raise DocsError("the ledger has errors: " + "; ".join(str(failure) for failure in ledger.failures))
        return ledger

    @cached_property
    def views(self) -> Mapping[str, TableView]:
        """Every table as it is shown, by ``paper/table``."""
        return {view.name: view for view in view_tables(self.ledger)}

    @cached_property
    def figures(self) -> Mapping[str, Figure]:
        """Every figure by its key."""
        measured = [own.figure for own in self.ledger.own if own.figure]  # empty ones too: nothing is recorded yet
        return {figure.key: figure for figure in [*figures(list(self.views.values())), *measured]}

    def plot_path(self, key: str) -> Path:
        """Where a figure is kept for the READMEs."""
        return self.root / "docs" / "plots" / f"{key}.png"

    def render(self, text: str, path: Path) -> str:
        """The text of a file with everything between markers renewed.

        Raises:
            DocsError: if a marker names nothing that exists, or has no end.
        """

        def renew(block: re.Match[str]) -> str:
            where = f"{path.relative_to(self.root)}:{text.count(chr(10), 0, block.start()) + 1}"
            if not block["end"]:
                raise DocsError(f"{where}: the marker has no {END}")
            if self.only not in (None, block["kind"]):
                return block[0]
            try:
                return f"{block['marker']}\n{self._content(block['kind'], block['name'] or '', path)}\n{END}"
            except KeyError as error:
                raise DocsError(f"{where}: {error.args[0]}") from error

        renewed = BLOCK.sub(renew, text)
        return COUNT.sub(lambda _: str(len(self.views)), renewed) if self.only is None else renewed

    def _content(self, kind: str, name: str, path: Path) -> str:
        """What stands between a marker and its end; a KeyError says what the marker could have named."""
        if kind == "ledger":
            return tables_table(list(self.views.values()), linked=True)
        if kind == "equations":
            return index(path, self.root)
        if kind == "loading":
            return loading.markdown(self.root / "docs" / "measured" / "loading")
        if kind == "papers":
            return papers_table(list(self.views.values()), self.root)
        if kind == "claims":
            if not name:
                return evidence.claims_summary(evidence.papers(self.root), root=self.root)
            return markdown_own(evidence.claims_table(name, root=self.root))
        if kind == "realised":
            return markdown_realised(self.ledger, name, root=self.root)
        known: Mapping[str, object] = self.views if kind == "table" else self.figures
        if name not in known:
            what = "table" if kind == "table" else "figure"
            raise KeyError(f"there is no {what} {name!r}; the {what}s are {', '.join(known)}")
        if kind == "table":
            return markdown_of(self.views[name])
        if not any(self.figures[name].panels.values()):
            return "*Nothing is recorded yet.*"
        return f"![{self.figures[name].title}]({os.path.relpath(self.plot_path(name), path.parent)})"


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
    own = {describe(root / paper): part for paper, part in parts.items()}
    return count_table("Paper", own, f"all {len(views)} tables")


def readmes(root: Path = ROOT) -> list[Path]:
    """The files that may hold markers: the root's README and each paper's."""
    return [path for path in (root / "README.md", *(root / p / "README.md" for p in papers(root))) if path.exists()]


def render_all(root: Path = ROOT, only: str | None = None, *, check: bool = False) -> list[Path]:
    """Rewrite what is stale, and every figure in use; returns the READMEs that changed.

    Args:
        root: folder that holds the READMEs and the papers.
        only: one kind of marker.
        check: write nothing, and return also the figures that are missing.

    Raises:
        DocsError: if a file cannot be rendered; then nothing is written.
    """
    renderer = Renderer(root, only)
    texts = {path: path.read_text(encoding="utf-8") for path in readmes(root)}
    renewed = {path: renderer.render(text, path) for path, text in texts.items()}
    changed = [path for path in texts if renewed[path] != texts[path]]
    keys = dict.fromkeys(key for text in texts.values() for key in _plots(text))
    keys = [key for key in keys if any(renderer.figures[key].panels.values())] if only in (None, "plot") else []
    if check:
        return changed + [path for path in map(renderer.plot_path, keys) if not path.exists()]
    for key in keys:
        write_atomic(renderer.plot_path(key), *draw(renderer.figures[key], "png"))
    for path in changed:
        write_atomic(path, renewed[path])
    return changed


def _plots(text: str) -> list[str]:
    """Keys of the figures that a file shows."""
    return [marker["name"] for marker in BLOCK.finditer(text) if marker["kind"] == "plot"]


def main(argv: Sequence[str] | None = None, *, root: Path = ROOT) -> int:
    """Entry point."""
    parser = make_parser((__doc__ or "").splitlines()[0], prog="python -m common.docs")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a file is stale")
    parser.add_argument("--only", choices=KINDS, help="this kind of marker alone")
    args = parser.parse_args(argv)
    try:
        files = render_all(root, args.only, check=args.check)
    except (DocsError, TableError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in files:
        print(f"{'stale' if args.check else 'rendered'}: {path.relative_to(root)}")
    if args.check and files:
        print("make docs renders them", file=sys.stderr)
        return 1
    return 0
