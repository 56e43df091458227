"""The forms of the ledger: text, Markdown, HTML and figures."""

import html.parser
import json
import re
from decimal import Decimal

import pytest

from common.ledger.compare import Entry, Ledger, compare
from common.ledger.gather import Request, build, run_live
from common.ledger.plots import figures
from common.ledger.report import markdown_of, tables_table, to_html, to_markdown, write_report
from common.ledger.tables import NeedsCompute, load_tables, papers
from common.ledger.text import WIDTH, to_text
from common.ledger.view import view_tables
from common.plots import Figure, Series, draw, inline_svg
from common.tests.fake_paper import TABLE, importable, record, write_paper, write_records

CLAIMS = "fakepaper: claims, on Fashion-MNIST"


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """Ledger of the made-up paper with speeds, claims and a live run."""
    root = tmp_path_factory.mktemp("papers")
    write_paper(root)
    with importable(root):
        request = Request(root=root, measure_speed=True)
        found = build(load_tables(root=root), request)
        run_live("fakepaper", request, found)
    assert not found.failures
    return found


def entry(published, reproduced, column="gmacs", absolute=None):
    words = ("p", "t", "r", column, Decimal(published), "reproduced", "", "", "")
    return Entry(*words, reproduced, absolute=absolute)


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
    assert entry(published, reproduced).here == text
    assert entry(published, reproduced).there == published


def test_ratios_are_marked():
    ratio = entry("1.244", 1.2513, "fps", absolute=Decimal(10))
    assert (ratio.there, ratio.here) == ("1.244x", "1.251x")
    assert entry("12.7", 410.26, "fps").here == "410.3"
    assert entry("12.7", None, "fps").here == ""


def test_text_is_aligned_and_narrow(filled):
    text = to_text(filled, full=True)
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("row"))
    assert "FPS, batch 1 / dense" in lines[head]
    rows = lines[head + 1 : head + 7]
    assert [line.split()[0] for line in rows] == ["dense", "half", "slip", "unknown", "later", "other"]
    assert re.search(r"half +5\.0 +4\.96 ✓ +4\.46 .*1\.800x 1\.900x ✓ +79\.0 data", rows[1])
    assert max(map(len, lines)) <= WIDTH
    assert "differs: slip gmacs 4.02, published 4.1: a slip of rounding in the table" in text
    assert "needs weights: gmacs of 1 row, e.g. python fakepaper/cost.py -m sampled" in text
    assert "one number in twenty" in text


def test_the_text_starts_with_a_line_for_each_table_and_without_its_rows(filled):
    text = to_text(filled)
    lines = text.splitlines()
    assert lines[0].split() == ["table", "values", "✓", "✗", "rec", "data", "weights", "compute", "todo", "cited"]
    assert lines[1].split()[:2] == ["fakepaper/main", str(len(filled.entries))]
    assert lines[1].endswith("A made-up table")
    assert lines[2].startswith("1 table ")
    assert not any(line.startswith(("row", "half  ")) for line in lines[: lines.index(CLAIMS)])
    assert "differs: slip gmacs 4.02, published 4.1: a slip of rounding in the table" in text
    assert "needs weights: gmacs of 1 row, e.g. python fakepaper/cost.py -m sampled" in text


def test_every_line_of_the_real_tables_fits(tmp_path):
    write_paper(tmp_path, table=TABLE.replace('method = "Half"', f'method = "{"Half " * 40}"'))
    with importable(tmp_path):
        found = build(load_tables(root=tmp_path), Request(root=tmp_path))
    real = load_tables()
    missing = [
        compare(row, name, NeedsCompute("", "why " * 60), rows[row.dense] if row.dense else None)
        for rows in [
            {row.key: row for table in real if table.paper == paper for row in table.rows} for paper in papers()
        ]
        for row in rows.values()
        for name in row.published
    ]
    for ledger in (found, Ledger(tables=real, entries=missing)):
        for full in (False, True):
            long = [line for line in to_text(ledger, full=full).splitlines() if len(line) > WIDTH]
            assert [line for line in long if len(max(line.split(), key=len)) < WIDTH - 10] == []


def test_wide_tables_are_split(tmp_path):
    found = build([t for t in load_tables("scala") if t.name == "dinov2_probe"], Request(root=tmp_path))
    lines = to_text(found, full=True).splitlines()
    assert max(len(line) for line in lines if line.startswith(("row", "dinov2"))) <= WIDTH


def test_tables_with_nothing_to_do_take_one_line(tmp_path):
    write_paper(tmp_path, adapter=None)
    with importable(tmp_path):
        found = build(load_tables(root=tmp_path), Request(root=tmp_path))
    text = to_text(found)
    assert re.match(r"table +values  todo  cited\nfakepaper/main +17 +15 +2 +A made-up table\n", text)
    assert "half" not in text
    assert "half" in to_text(found, full=True)


def test_markdown_puts_published_beside_reproduced(filled):
    text = markdown_of(view_tables(filled)[0])
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
    text = markdown_of(view_tables(found)[0])
    assert "| here |" not in text
    assert "| Half | ViT, r = 0.5 | 5.0 |" in text


def test_the_summary_counts_every_value(filled):
    last = tables_table(view_tables(filled)).splitlines()[-1]
    numbers = [int(cell) for cell in last.split("|")[2:-1]]
    assert numbers[0] == sum(numbers[1:]) == len(filled.entries)


def test_failures_are_in_the_report(filled):
    broken = Ledger(tables=filled.tables, entries=filled.entries, failures=["p/t/r: <boom>"])
    assert "p/t/r: &lt;boom>" in to_markdown(broken)
    assert "p/t/r: &lt;boom&gt;" in to_html(broken, drawn={})


def test_names_of_devices_cannot_write_html(tmp_path):
    write_paper(tmp_path)
    name = "x <script>alert(1)</script> <b>GPU</b>"
    measured = record("dense", "fps", 50.0)
    write_records(tmp_path, "evil", [measured], kind="cuda", created="2026-01-01T00:00:00")
    path = tmp_path / "fakepaper" / "results" / "evil.json"
    path.write_text(path.read_text().replace('"evil"', json.dumps(name)))
    with importable(tmp_path):
        found = build(load_tables(root=tmp_path), Request(root=tmp_path))
    for text in (to_markdown(found), to_html(found, drawn={})):
        assert "alert(1)" in text
        assert "<script>alert" not in text
        assert "<b>GPU" not in text
    assert any("alert(1)" in line and "GPU" in line for line in to_markdown(found).splitlines()), "in one line"


class Page(html.parser.HTMLParser):
    """Collects what the test asks about, and checks that tags are closed."""

    VOID = ("meta", "br", "input")

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
    assert page.counts["table"] == 3
    assert page.counts["svg"] == 2
    assert page.counts["script"] == 1
    assert "4.96" in page.cells
    assert "prefers-color-scheme: dark" in to_html(filled, drawn={})


def test_the_page_has_an_index_a_search_and_filters(filled):
    text = to_html(filled, drawn={})
    page = Page()
    page.feed(text)
    assert {"#fakepaper", "#fakepaper-main", "#fakepaper-claims", "#fakepaper-live"} <= set(page.links)
    assert all(f'id="{link[1:]}"' in text for link in page.links)
    assert page.counts["input"] == 1
    assert page.counts["button"] == len(filled.counts())
    for status in filled.counts():
        assert f'data-status="{status.replace(" ", "-")}" aria-pressed="false"' in text
    assert f"{len(filled.entries)} published values of 1 table." in text


def test_figures_show_published_and_measured_points(filled):
    table, measured = figures(view_tables(filled), filled.own)
    assert [series.kind for series in table.panels[""]] == ["published"] * 4, "without data nothing is measured"
    published = next(s for s in table.panels[""] if s.name == "ViT")
    assert published.x == [10.0, 5.0, 4.1]
    assert published.labels == ["Dense", "r = 0.5", "r = 0.4"]
    assert any(series.name == "cited baselines" for series in table.panels[""])
    assert [(line.name, line.x, line.y) for line in measured.panels[""]] == [
        ("new", [2.0], [85.0]),
        ("old", [2.0], [82.5]),
    ]
    assert {line.kind for line in measured.panels[""]} == {"here"}


def test_a_filled_point_has_both_coordinates_from_here(tmp_path):
    write_paper(tmp_path)
    (tmp_path / "data").mkdir()
    with importable(tmp_path):
        found = build(load_tables(root=tmp_path), Request(root=tmp_path, data=tmp_path / "data"))
    (table,) = figures(view_tables(found))
    points = {series.kind: (series.x, series.y) for series in table.panels[""] if series.name == "ViT"}
    assert points["published"] == ([10.0, 5.0, 4.1], [80.0, 79.0, 78.0])
    assert points["here"] == ([10.04], [80.15])
    assert points["differs"] == ([4.96], [78.5]), "its cost is reproduced, its accuracy differs"
    assert_filled_points_came_out_here(found)


def assert_filled_points_came_out_here(ledger):
    """Every filled point is a row of which both values are reproduced or recorded; every hollow one is published."""
    views = view_tables(ledger)
    measured, printed = set(), set()
    for view in views:
        axes = [view.table.plot[axis] for axis in ("x", "y")] if view.table.plot else []
        for row in view.rows:
            entries = [entry for entry in view.entries if entry.row == row.id and entry.column in axes]
            if len(entries) == 2 and {entry.status for entry in entries} <= {"reproduced", "recorded"}:
                by_column = {entry.column: entry.reproduced for entry in entries}
                measured.add(tuple(by_column[name] for name in axes))
            if axes and set(axes) <= set(row.published):
                printed.add(tuple(float(row.published[name]) for name in axes))
    for figure in figures(views):
        for series in (series for lines in figure.panels.values() for series in lines):
            points = set(zip(series.x, series.y, strict=True))
            if series.kind == "here":
                assert points <= measured, f"{figure.key}, {series.name}"
            if series.kind == "published":
                assert points <= printed, f"{figure.key}, {series.name}"


def test_no_figure_claims_more_than_the_ledger():
    """All tables of this checkout, as the page and the READMEs draw them."""
    assert_filled_points_came_out_here(build(load_tables(), Request()))


def test_students_are_not_drawn_through_a_teacher():
    found = build(load_tables("sit"), Request())
    overview = next(figure for figure in figures(view_tables(found)) if figure.key == "sit-slimming")
    lines = {(series.name, series.kind): series for series in overview.panels[""]}
    students, teachers = lines["SiT", "published"], next(s for s in lines.values() if s.baseline)
    assert students.joined
    assert students.labels == ["SiT-T", "SiT-XS", "SiT-S", "SiT-M", "SiT-L"]
    assert not teachers.joined
    assert len(set(teachers.labels)) == len(teachers.x)
    assert not {series.kind for series in lines.values()} - {"published"}
    page = to_html(found, drawn={"sit-slimming": "<svg></svg>"})
    assert page.count('<div class="figure"><svg></svg></div>') == 1, "shown once, above the first of its tables"


def test_the_overview_has_a_panel_per_backbone_and_ends_at_the_dense_row(tmp_path):
    tables = [table for table in load_tables("hourglass_swag") if table.plot]
    overview = figures(view_tables(build(tables, Request(root=tmp_path))))[0]
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
    figure = figures(view_tables(filled), filled.own)[0]
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
