"""Where each equation of a paper is in the code: an index for its README, read from the docstrings.

The line of a docstring that cites names the paper by its number, then the place, then what it states, if the summary of
the docstring does not say that already. A semicolon starts the next place:

    Source: arXiv:2105.15075, Section 3.2, Eq. 4: E_l = f_l(z_L^up); Eq. 5: MLP(LN(Concat(z'_l, E_l))) + z'_l.
    Source: EViT, arXiv:2202.07800, Eq. 1.

Nothing is imported: the index works where the papers' own packages are not installed, and costs no time.
"""

import ast
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SOURCE = re.compile(
    r"^Source: (?:(?P<name>[^,;:\n]+), )?arXiv:(?P<paper>\d{4}\.\d{5})(?:v\d+)?, (?P<places>.+)", re.DOTALL
)
PLACE = re.compile(r"(Eqs?\.|Algorithm|Section|Appendix|Figure|Table) ", re.IGNORECASE)
OWN = re.compile(r"arXiv:(\d{4}\.\d{5})")

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Citation:
    """One place of a paper, and the function or class that holds it.

    Attributes:
        paper: arXiv number.
        name: what the docstring calls the paper; empty for the paper of the directory itself.
        place: as cited, e.g. ``Section 3.2, Eq. 4``.
        states: one line of what is computed there.
        function: name with its classes, e.g. ``Block.forward``.
        path, line: where it is defined; the line of ``def`` or ``class``.
    """

    paper: str
    name: str
    place: str
    states: str
    function: str
    path: Path
    line: int

    @property
    def order(self) -> tuple[int, tuple[int, ...], str, int]:
        """Equations by number, then sections by number, then what is cited by name."""
        for rank, kind in enumerate((r"\bEqs?\.", r"\bSection")):
            if found := re.search(rf"{kind} ([\d.]*\d)", self.place, re.IGNORECASE):
                return rank, tuple(map(int, found[1].split("."))), str(self.path), self.line
        return 2, (), str(self.path), self.line


def definitions(path: Path) -> Iterator[tuple[str, Definition]]:
    """Every function, class and method of a module with its name, outer classes included."""

    def inside(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Definition]]:
        for node in body:
            if isinstance(node, Definition):
                yield prefix + node.name, node
                yield from inside(node.body, f"{prefix}{node.name}.")

    yield from inside(ast.parse(path.read_text(encoding="utf-8")).body, "")


def citations(path: Path) -> Iterator[Citation]:
    """What the docstrings of one module cite, in the order of the module."""
    for function, node in definitions(path):
        docstring = ast.get_docstring(node) or ""
        for paragraph in re.split(r"\n\s*\n|\n(?=Source: )", docstring):
            if not (source := SOURCE.match(paragraph.strip())):
                continue
            for number, item in enumerate(re.split(r";\s+", " ".join(source["places"].split()))):
                place, _, states = item.rstrip(".").partition(": ")
                place = re.split(r"\. (?=[A-Z])", place)[0]  # a remark in a sentence of its own
                if number == 0 or PLACE.match(place):
                    states = states or docstring.partition("\n")[0].rstrip(".")
                    yield Citation(source["paper"], source["name"] or "", place, states, function, path, node.lineno)


def index(readme: Path, root: Path) -> str:
    """The table of a paper's README: place in the paper, what it states, function with file and line.

    The paper is the one that the README names first. Its citations are looked for in its directory and in ``common/``,
    those of other papers in its directory alone.

    Raises:
        KeyError: if nothing is cited, or the README names no paper.
    """
    own = OWN.search(readme.read_text(encoding="utf-8"))
    if not own:
        raise KeyError("the README names no paper (arXiv:...)")
    found = [
        citation
        for folder in (readme.parent, root / "common")
        for path in sorted(folder.rglob("*.py"))
        if "tests" not in path.parts
        for citation in citations(path)
        if citation.paper == own[1] or folder == readme.parent
    ]
    if not found:
        raise KeyError("no docstring cites a paper (Source: arXiv:...)")
    lines = ["| In the paper | What | Function |", "| :-- | :-- | :-- |"]
    for c in sorted(found, key=lambda c: (c.paper != own[1], c.paper, c.order)):
        name = "" if c.paper == own[1] else f"[{c.name or c.paper}](https://arxiv.org/abs/{c.paper}) "
        link = f"[`{c.function}`]({os.path.relpath(c.path, readme.parent)}#L{c.line})"
        lines.append(f"| {name}{_escaped(c.place)} | {_escaped(c.states)} | {link} |")
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """Prose for a cell of a Markdown table; what stands in backticks is left alone but for the bar."""
    parts = re.split(r"(`+.+?`+)", text.replace("|", "\\|"))
    return "".join(part if part.startswith("`") else re.sub(r"([*_<])", r"\\\1", part) for part in parts)
