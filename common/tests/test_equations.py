"""The index of equations: what docstrings cite, and links that point at the functions they name."""

import re
from pathlib import Path

import pytest

from common.ledger.equations import citations, definitions, index
from common.run.files import ROOT

PAPERS = ("scala", "hourglass_swag", "dvt", "sit", "uvc")
LINK = re.compile(r"\[`(?P<name>[\w.]+)`\]\((?P<path>[^)#\s]+\.py)#L(?P<line>\d+)\)")

MODULE = '''"""Source: arXiv:2105.15075, Eq. 99: a module's own docstring cites nothing."""


class Block:
    """A block.

    Source: arXiv:2105.15075v3, Section 3.2, Eq. 10: Softmax(A_l) V_l; the logits are kept for the next stage; Eq. 2:
    MSA(LN(z)) + z.
    """

    @staticmethod
    def score(x):
        """Rank the tokens by |a_i|, see ``a_b``.

        Source: EViT, arXiv:2202.07800, "Attentive token identification".
        Source: arXiv:2105.15075, Eq. 9. In print it is the other way round.
        """


def other():
    """Nothing.

    Source: the official release.
    """
'''


def wrong_links(readme: Path) -> list[str]:
    """Links of a README to a line of Python that is not the definition of the function they name."""
    wrong = []
    for link in LINK.finditer(readme.read_text(encoding="utf-8")):
        lines = {name: node.lineno for name, node in definitions(readme.parent / link["path"])}
        if lines.get(link["name"]) != int(link["line"]):
            wrong.append(f"{link[0]} should point at line {lines.get(link['name'])}")
    return wrong


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    package = tmp_path / "paper"
    package.mkdir()
    (package / "block.py").write_text(MODULE)
    (package / "README.md").write_text("Paper: [arXiv:2105.15075](https://arxiv.org/abs/2105.15075)\n")
    return package / "README.md"


def test_a_docstring_gives_places_and_what_they_state(readme):
    found = [(c.place, c.states, c.function, c.line) for c in citations(readme.parent / "block.py")]
    assert found == [
        ("Section 3.2, Eq. 10", "Softmax(A_l) V_l", "Block", 4),
        ("Eq. 2", "MSA(LN(z)) + z", "Block", 4),
        ('"Attentive token identification"', "Rank the tokens by |a_i|, see ``a_b``", "Block.score", 12),
        ("Eq. 9", "Rank the tokens by |a_i|, see ``a_b``", "Block.score", 12),
    ]


def test_the_index_is_in_the_order_of_the_paper_and_links_to_lines(readme):
    rows = index(readme, readme.parent.parent).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [
        "| Eq. 2",
        "| Eq. 9",
        "| Section 3.2, Eq. 10",
        '| [EViT](https://arxiv.org/abs/2202.07800) "Attentive token identification"',
    ]
    assert rows[1] == "| Eq. 9 | Rank the tokens by \\|a\\_i\\|, see ``a_b`` | [`Block.score`](block.py#L12) |"


def test_an_equation_that_common_holds_is_in_the_index_of_its_own_paper_only(readme):
    (readme.parents[1] / "common").mkdir()
    (readme.parents[1] / "common" / "shared.py").write_text(MODULE)
    text = index(readme, readme.parents[1])
    assert text.count("[`Block`](../common/shared.py#L4)") == 2
    assert text.count("EViT") == 1


def test_a_link_that_points_at_another_function_is_found(readme):
    readme.write_text(readme.read_text() + index(readme, readme.parents[1]))
    assert wrong_links(readme) == []
    (readme.parent / "block.py").write_text(MODULE.replace("\n\nclass Block", "\n\nimport os\n\n\nclass Block"))
    assert len(wrong_links(readme)) == 4
    (readme.parent / "block.py").write_text(MODULE.replace("def score", "def rank"))
    assert wrong_links(readme) == [
        "[`Block.score`](block.py#L12) should point at line None",
        "[`Block.score`](block.py#L12) should point at line None",
    ]


def test_a_readme_that_cites_nothing_is_refused(readme):
    (readme.parent / "block.py").write_text("")
    with pytest.raises(KeyError, match="no docstring cites a paper"):
        index(readme, readme.parents[1])


@pytest.mark.parametrize("paper", PAPERS)
def test_every_link_to_a_line_points_at_the_function_it_names(paper):
    readme = ROOT / paper / "README.md"
    assert len(LINK.findall(readme.read_text(encoding="utf-8"))) >= 1
    assert wrong_links(readme) == [], "run make docs"


@pytest.mark.parametrize(("paper", "numbers"), [("scala", range(2, 11)), ("dvt", range(1, 11))])
def test_every_numbered_equation_that_is_computed_has_its_function(paper, numbers):
    """Scala's Eq. 1 states what separate training would cost, which no function computes."""
    places = [c.place for path in (ROOT / paper).rglob("*.py") for c in citations(path) if not c.name]
    cited = {int(number) for place in places for number in re.findall(r"\bEqs?\. (\d+)", place)}
    assert set(numbers) <= cited
