"""The forms of the ledger: text, Markdown, HTML and figures."""

import html.parser
import re
from decimal import Decimal

import pytest

from common.ledger.compare import Entry, Ledger, Request, build, run_desk
from common.ledger.report import (
    WIDTH,
    Figure,
    Series,
    draw,
    figures,
    format_published,
    format_reproduced,
    format_value,
    inline_svg,
    markdown_of,
    markdown_summary,
    to_html,
    to_markdown,
    to_text,
    write_report,
)
from common.ledger.tables import load_tables
from common.tests.fake_paper import importable, write_paper


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """Ledger of the made-up paper with speeds and a desk experiment."""
    root = tmp_path_factory.mktemp("papers")
    write_paper(root)
    with importable(root):
        request = Request(root=root, measure_speed=True)
        found = build(load_tables(root=root), request)
        run_desk(["fakepaper"], request, found)
    assert not found.failures
    return found


def entry(published, reproduced, column="gmacs", is_ratio=False):
    value = None if published is None else Decimal(published)
    return Entry("p", "t", "r", column, value, reproduced, None, None, "reproduced", "", "", "", is_ratio)


@pytest.mark.parametrize(
    ("published", "reproduced", "text"),
    [
        ("275.8", 275.7896, "275.79"),
        ("392", 391.9961, "392.00"),
        ("305.174504", 305.174504, "305.174504"),
        ("88.0", 88.0, "88.00"),
    ],
)
def test_reproduced_values_show_one_digit_more(published, reproduced, text):
    assert format_reproduced(entry(published, reproduced)) == text
    assert format_published(entry(published, reproduced)) == published


def test_ratios_are_marked():
    ratio = entry("1.244", 1.2513, "fps", is_ratio=True)
    assert (format_published(ratio), format_reproduced(ratio)) == ("1.244x", "1.251x")
    assert format_reproduced(entry("12.7", 410.26, "fps")) == "410.3"
    assert format_reproduced(entry("12.7", None, "fps")) == ""


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("top1_percent", 98.3333, "98.33"),
        ("throughput_ips", 5123.4, "5123"),
        ("mmacs", 21.344, "21.34"),
        ("a", None, ""),
    ],
)
def test_desk_values_follow_their_unit(name, value, text):
    assert format_value(name, value) == text


def test_text_is_aligned_and_narrow(filled):
    text = to_text(filled)
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("row"))
    assert "FPS, batch 1 / dense" in lines[head]
    rows = lines[head + 1 : head + 7]
    assert [line.split()[0] for line in rows] == ["dense", "half", "slip", "unknown", "later", "other"]
    assert re.search(r"half +5\.0 +4\.96 ✓ +4\.46 .*1\.800x 1\.900x ✓ +79\.0 data", rows[1])
    assert max(len(line) for line in lines[head : head + 7]) <= WIDTH
    assert "differs: slip gmacs 4.02, published 4.1: a slip of rounding in the table" in text
    assert "needs weights: gmacs of 1 row, e.g. python fakepaper/cost.py -m sampled" in text
    assert "a note" in text


def test_wide_tables_are_split(tmp_path):
    found = build([t for t in load_tables("scala") if t.name == "dinov2_probe"], Request(root=tmp_path))
    lines = to_text(found, collapse=False).splitlines()
    assert max(len(line) for line in lines if line.startswith(("row", "dinov2"))) <= WIDTH


def test_tables_with_nothing_to_do_take_one_line(tmp_path):
    write_paper(tmp_path, adapter=None)
    with importable(tmp_path):
        found = build(load_tables(root=tmp_path), Request(root=tmp_path))
    text = to_text(found)
    assert re.search(r"fakepaper/main +A made-up table +15 not implemented yet, 2 cited", text)
    assert "half" not in text
    assert "half" in to_text(found, collapse=False)


def test_markdown_puts_published_beside_reproduced(filled):
    text = markdown_of(filled, filled.tables[0])
    assert "| Half | ViT, r = 0.5 | 5.0 | 4.96 ✓ | 4.46 |" in text
    assert "| 180 (1.800x) | 1.900x ✓ |" in text
    assert "*needs data*" in text
    assert "`slip`: GMACs differs: a slip of rounding in the table." in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_markdown_shows_published_values_alone_where_nothing_is_built(tmp_path):
    write_paper(tmp_path, adapter=None)
    with importable(tmp_path):
        found = build(load_tables(root=tmp_path), Request(root=tmp_path))
    text = markdown_of(found, found.tables[0])
    assert "| here |" not in text
    assert "| Half | ViT, r = 0.5 | 5.0 |" in text


def test_the_summary_counts_every_value(filled):
    last = markdown_summary(filled).splitlines()[-1]
    numbers = [int(cell) for cell in last.split("|")[3:-1]]
    assert numbers[0] == sum(numbers[1:]) == len(filled.entries)


def test_failures_are_in_the_report(filled):
    from common.ledger.compare import Failure

    broken = Ledger(tables=filled.tables, entries=filled.entries, failures=[Failure("p", "t", "r", "<boom>")])
    assert "p/t/r: <boom>" in to_markdown(broken)
    assert "p/t/r: &lt;boom&gt;" in to_html(broken, drawn={})


class Page(html.parser.HTMLParser):
    """Collects what the test asks about, and checks that tags are closed."""

    VOID = ("meta", "br")

    def __init__(self):
        super().__init__()
        self.open, self.counts, self.links, self.cells = [], {}, [], []

    def handle_starttag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append(dict(attrs).get("data-value"))

    def handle_startendtag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_self_contained_and_sortable(filled):
    page = Page()
    page.feed(to_html(filled))
    assert page.open == []
    assert all(link.startswith("#") for link in page.links)
    assert page.counts["table"] == 2
    assert page.counts["svg"] == 2
    assert page.counts["script"] == 1
    assert "4.96" in page.cells
    assert "prefers-color-scheme: dark" in to_html(filled, drawn={})


def test_figures_show_published_and_reproduced_points(filled):
    table, desk = figures(filled)
    published, reproduced = (
        next(s for s in table.panels[""] if s.name == "ViT" and s.hollow is h) for h in (True, False)
    )
    assert published.x == [10.0, 5.0, 4.1]
    assert reproduced.x == [10.04, 4.96, 4.02]
    assert published.labels == ["Dense", "r = 0.5", "r = 0.4"]
    assert any(series.name == "cited baselines" for series in table.panels[""])
    assert desk.panels[""][0].labels == ["dense", "half"]


def test_the_overview_has_a_panel_per_backbone_and_ends_at_the_dense_row(tmp_path):
    tables = [table for table in load_tables("hourglass_swag") if table.plot]
    overview = figures(build(tables, Request(root=tmp_path)))[0]
    assert list(overview.panels) == ["ViT-L/16 at 512", "ViT-H/14 at 518"]
    lines = {series.name: series for series in overview.panels["ViT-L/16 at 512"]}
    assert set(lines) == {"SWAG", "Hourglass", "EViT", "ToMe", "ATS", "ACT", "Evo-ViT", "SMYRF"}
    assert lines["SWAG"].baseline
    assert (lines["ToMe"].x[0], lines["ToMe"].y[0]) == (364.8, 88.1)


def test_labels_do_not_cover_each_other():
    from matplotlib import text
    from matplotlib.figure import Figure as Canvas

    kept = []
    original = Canvas.savefig

    def keep(self, *args, **kwargs):
        kept.append(self)
        return original(self, *args, **kwargs)

    line = Series("s", [1.0, 1.02, 1.04, 2.0], [1.0, 1.01, 1.0, 2.0], ["first", "second", "third", "fourth"])
    figure = Figure("k", "title", "x", "y", {"": [line]})
    Canvas.savefig = keep
    try:
        draw(figure, "png")
    finally:
        Canvas.savefig = original
    (axes,) = kept[0].axes
    notes = [a for a in axes.texts if isinstance(a, text.Annotation) and a.get_text() in line.labels]
    boxes = [note.get_window_extent() for note in notes]
    assert len(boxes) == 4
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_drawing_is_deterministic(filled):
    figure = figures(filled)[0]
    (first,), (second, picture) = draw(figure, "svg"), draw(figure, "svg", "png")
    assert first == second
    assert "currentColor" in inline_svg(first)
    assert picture.startswith(b"\x89PNG")


def test_an_empty_ledger_can_be_reported(tmp_path):
    assert {path.name for path in write_report(Ledger(), tmp_path)} == {
        "ledger.json",
        "ledger.csv",
        "report.md",
        "index.html",
    }
