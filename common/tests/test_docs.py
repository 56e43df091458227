"""Tables inside the READMEs: rendered from data, and a stale one is found."""

import pytest

from common.ledger import docs
from common.ledger.docs import DocsError, main, render_all
from common.tests.fake_paper import TABLE, importable, record, write_paper, write_records

README = """# Fake

before
<!-- table: fakepaper/main -->
something old
<!-- end -->
between
<!-- ledger -->
<!-- end -->
<!-- plot: fakepaper-main -->
<!-- end -->
after
"""


@pytest.fixture
def paper(tmp_path):
    write_paper(tmp_path)
    (tmp_path / "fakepaper" / "README.md").write_text(README)
    with importable(tmp_path):
        yield tmp_path


def test_markers_are_filled_and_the_rest_is_kept(paper):
    (changed,) = render_all(paper)
    text = changed.read_text()
    assert text.startswith("# Fake\n\nbefore\n<!-- table: fakepaper/main -->\n| Method |")
    assert "something old" not in text
    assert "\n<!-- end -->\nbetween\n<!-- ledger -->\n| Table |" in text
    assert "![A made-up table](../docs/plots/fakepaper-main.png)" in text
    assert text.endswith("<!-- end -->\nafter\n")
    assert (paper / "docs" / "plots" / "fakepaper-main.png").read_bytes().startswith(b"\x89PNG")


def test_rendering_twice_changes_nothing(paper):
    render_all(paper)
    assert render_all(paper, check=True) == []
    assert render_all(paper) == []


def test_the_check_names_stale_files_and_changes_nothing(paper, capsys):
    assert main(["--check"], root=paper) == 1
    assert "stale: fakepaper/README.md" in capsys.readouterr().out
    assert (paper / "fakepaper" / "README.md").read_text() == README
    assert main([], root=paper) == 0
    assert main(["--check"], root=paper) == 0


def test_another_published_value_makes_the_readme_stale(paper):
    render_all(paper)
    write_paper(paper, table=TABLE.replace("gmacs = 5.0", "gmacs = 5.1"))
    assert render_all(paper, check=True) == [paper / "fakepaper" / "README.md"]


def test_a_missing_figure_is_stale(paper):
    render_all(paper)
    figure = paper / "docs" / "plots" / "fakepaper-main.png"
    figure.unlink()
    assert render_all(paper, check=True) == [figure]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a\n<!-- table: fakepaper/nothing -->\n<!-- end -->\n",
            r"README\.md:2: there is no table 'fakepaper/nothing'",
        ),
        (
            "<!-- plot: nothing -->\n<!-- end -->\n",
            r"README\.md:1: there is no figure 'nothing'; the figures are fakepaper",
        ),
        ("<!-- ledger -->\nno end\n", r"README\.md:1: the marker has no <!-- end -->"),
        ("<!-- ledger -->\n<!-- ledger -->\n<!-- end -->\n", r"README\.md:1: the marker has no <!-- end -->"),
    ],
)
def test_wrong_markers_are_named(paper, text, message):
    path = paper / "fakepaper" / "README.md"
    path.write_text(text)
    with pytest.raises(DocsError, match=message):
        render_all(paper)
    assert path.read_text() == text


def test_a_failing_row_stops_the_rendering(tmp_path, capsys):
    write_paper(tmp_path, adapter="def costs(row):\n    raise RuntimeError('no')\n")
    (tmp_path / "README.md").write_text("<!-- ledger -->\n<!-- end -->\n")
    with importable(tmp_path):
        assert main([], root=tmp_path) == 2
    assert "RuntimeError: no" in capsys.readouterr().err


def test_the_readmes_of_this_checkout_are_current():
    assert [str(path.relative_to(docs.ROOT)) for path in render_all(check=True)] == [], "run make docs"


def test_recorded_speedups_beside_what_the_costs_promise(paper):
    half = record("half", "fps", 95.0, reference_row="dense", reference_value=50.0, ratio=1.9)
    other = record("half", "fps", 90.0, reference_row="main/dense", reference_value=50.0, ratio=1.7, batch_size=8)
    alone = record("dense", "fps", 50.0)
    write_records(paper, "old", [half | {"ratio": 1.0}], kind="cpu", created="2024-01-01T00:00:00+00:00")
    write_records(paper, "new", [half, other, alone], kind="cpu", created="2024-01-02T00:00:00+00:00")
    for name in ("old", "new"):  # one device
        path = paper / "fakepaper" / "results" / f"{name}.json"
        path.write_text(path.read_text().replace(f'"name": "{name}"', '"name": "desk"'))
    path = paper / "fakepaper" / "README.md"
    path.write_text("<!-- realised: fakepaper -->\n<!-- end -->\n")
    render_all(paper)
    lines = path.read_text().splitlines()
    # plain MACs 9.54 over 4.46
    assert lines[3:5] == [
        "| Half | ViT, r = 0.5 | desk, float32, batch 1 | 1.90x | 2.14x | 0.89 | 1.0 % |",
        "| Half | ViT, r = 0.5 | desk, float32, batch 8 | 1.70x | 2.14x | 0.79 | 1.0 % |",
    ]
    assert lines[5] == "<!-- end -->"


def test_a_paper_without_records_has_no_table_of_speedups(paper):
    (paper / "fakepaper" / "README.md").write_text("<!-- realised: fakepaper -->\n<!-- end -->\n")
    with pytest.raises(DocsError, match="fakepaper has no recorded speed-ups"):
        render_all(paper)


def test_one_kind_of_marker_can_be_rendered_alone(paper):
    (paper / "fakepaper" / "method.py").write_text(
        'def f():\n    """Double.\n\n    Source: arXiv:2105.15075, Eq. 1."""\n'
    )
    readme = paper / "fakepaper" / "README.md"
    readme.write_text(README + "arXiv:2105.15075\n<!-- equations -->\n<!-- end -->\n")
    assert render_all(paper, "equations") == [readme]
    assert readme.read_text().endswith("| Eq. 1 | Double | [`f`](method.py#L1) |\n<!-- end -->\n")
    assert "something old" in readme.read_text()
