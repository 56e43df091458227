"""Table files: what they hold, and what is refused with file, row and key."""

from decimal import Decimal

import pytest

from common.ledger.tables import TableError, column, load_table, load_tables, papers
from common.measure.flops import CONVENTIONS
from common.tests.fake_paper import TABLE, write_paper


def test_a_table_keeps_published_digits_and_defaults(tmp_path):
    write_paper(tmp_path)
    (table,) = load_tables("fakepaper", root=tmp_path)
    dense, half = table.row("dense"), table.row("half")
    assert dense.published["top1_percent"] == Decimal("80.0")
    assert str(dense.published["top1_percent"]) == "80.0"
    assert table.columns == ("gmacs", "params_m", "fps", "top1_percent")
    assert half.dense == "main/dense"
    assert half.label == "r = 0.5"
    assert half.tolerance["fps"] == Decimal("0.1")
    assert half.command("gmacs") == "python fakepaper/cost.py -m half -r 0.5"
    assert half.command("top1_percent").endswith("--resume https://example.org/weights-0123abcd.pth DIR")
    assert table.row("unknown").needs == {"gmacs": "weights", "top1_percent": "compute"}
    assert table.row("other").cited


def test_a_column_without_a_command_gets_one(tmp_path):
    write_paper(tmp_path, table=TABLE.replace('gmacs = "python fakepaper/cost.py {arguments}"\n', ""))
    row = load_tables("fakepaper", root=tmp_path)[0].row("half")
    assert row.command("gmacs") == "python -m common.reproduce fakepaper --table main --row half --columns gmacs"


def test_the_order_of_tables_is_stated_or_by_name(tmp_path):
    path = write_paper(tmp_path)
    for name, order in (("zebra", "order = 1\n"), ("apple", "")):
        text = TABLE.replace('table = "main"\n', f'table = "{name}"\n{order}')
        for row in ("dense", "half", "slip", "unknown", "later", "other"):
            text = text.replace(f'id = "{row}"', f'id = "{name}-{row}"')
        path.with_name(f"{name}.toml").write_text(text.replace('dense = "dense"', 'dense = "main/dense"'))
    tables = load_tables("fakepaper", root=tmp_path)
    assert [table.name for table in tables] == ["zebra", "apple", "main"]
    assert tables[0].row("zebra-half").dense == "main/dense"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "A', 'titel = "A', r"main\.toml: unknown keys \['titel'\]"),
        ('method = "Half"\n', 'metod = "Half"\n', r"row 'half': unknown keys \['metod'\]"),
        ('id = "half"', 'id = "dense"', r"rows: ids \['dense'\] appear more than once"),
        ('id = "half"', 'id = "Half One"', r"rows\[1\]\.id: must be lower-case"),
        ('dense = "dense"', 'dense = "nothing"', r"row 'half': dense: there is no row 'main/nothing'"),
        ("gmacs = 5.0", 'gmacs = "5.0"', r"row 'half': published\.gmacs: expected a number with its published digits"),
        ("gmacs = 5.0", "gmacs = inf", r"row 'half': published\.gmacs: expected a finite number"),
        ("gmacs = 5.0", "gmacs = true", r"row 'half': published\.gmacs: expected a number"),
        ("gmacs = 5.0", "gigamacs = 5.0", r"row 'half': published\.gigamacs: is not a column"),
        ('[convention]\ngmacs = "macs"\n', "[convention]\n", r"row 'dense': convention\.gmacs: is missing"),
        ("[tolerance]\nfps = 0.1\n", "[tolerance]\n", r"row 'dense': tolerance\.fps: is missing"),
        ("fps = 0.1", "fps = -0.1", r"tolerance\.fps: must not be negative"),
        ("cost.py {arguments}", "cost.py {argument}", r"commands\.gmacs: uses \['argument'\]"),
        ("cost.py {arguments}", "cost.py {arguments", r"commands\.gmacs: is not a valid template"),
        ('checkpoint = "weights"', 'checkpoint = "wights"', r"row 'dense': checkpoint: 'wights' is not declared"),
        ('checkpoint = "weights"', 'checkpoint = ["weights"]', r"checkpoint: \['weights'\] is not declared"),
        ('title = "A made', f"title = {'[' * 9000}", r"main\.toml: not valid TOML"),
        ('checkpoint = "weights"\n', "", r"row 'dense': checkpoint: is missing, and commands\.top1_percent uses it"),
        ('sha256 = "0123abcd"', 'sha256 = "xyz"', r"checkpoint 'weights': sha256: expected 8 to 64 hexadecimal"),
        ('url = "https', 'address = "https', r"checkpoint 'weights': unknown keys \['address'\]"),
        ("reasons = {gmacs", "reasons = {params_m", r"row 'slip': reasons: names columns without a published value"),
        ('gmacs = "weights", ', 'gmacs = "luck", ', r"row 'unknown': needs\.gmacs: must be one of"),
        ('x = "gmacs"', 'x = "stage_gmacs"', r"plot\.x: must be one of the published columns"),
        ("cited = true", 'cited = "yes"', r"row 'other': cited: expected true or false"),
        ('paper = "fakepaper"', 'paper = "real"', r"paper: is 'real', but the file lies in 'fakepaper'"),
        ('table = "main"', 'table = "side"', r"table: is 'side', but the file is called 'main.toml'"),
        ('title = "A', "title = A", r"not valid TOML"),
        ("published = {gmacs = 6.5, top1_percent = 78.8}", "", r"row 'other': published: is missing"),
    ],
)
def test_mistakes_are_named(tmp_path, old, new, message):
    assert old in TABLE
    write_paper(tmp_path, table=TABLE.replace(old, new, 1))
    with pytest.raises(TableError, match=message):
        load_tables("fakepaper", root=tmp_path)


def test_a_ratio_needs_a_published_speed_of_the_dense_row(tmp_path):
    write_paper(tmp_path, table=TABLE.replace("params_m = 5.25, fps = 100", "params_m = 5.25"))
    with pytest.raises(TableError, match=r"row 'half': dense: row 'main/dense' publishes no \['fps'\]"):
        load_tables("fakepaper", root=tmp_path)


def test_ids_are_unique_in_a_paper(tmp_path):
    path = write_paper(tmp_path)
    path.with_name("side.toml").write_text(TABLE.replace('table = "main"', 'table = "side"'))
    with pytest.raises(TableError, match=r"side\.toml: row 'dense': the id is already used in table 'main'"):
        load_tables("fakepaper", root=tmp_path)


def test_a_paper_without_tables_is_refused(tmp_path):
    write_paper(tmp_path)
    assert papers(tmp_path) == ("fakepaper",)
    with pytest.raises(TableError, match=r"no paper 'nobody' with tables; the papers are \['fakepaper'\]"):
        load_tables("nobody", root=tmp_path)


def test_columns_of_other_data_sets_are_accuracies():
    assert column("cifar100_percent").kind == "accuracy"
    assert column("remaining_percent").kind == "cost"
    with pytest.raises(KeyError):
        column("speed")


# ---------------------------------------------------------------------------------------------------- the real tables


def test_the_five_papers_have_their_tables():
    names = {paper: [table.name for table in load_tables(paper)] for paper in papers()}
    assert set(names) == {"dvt", "hourglass_swag", "scala", "sit", "uvc"}
    methods = ["swag", "hourglass", "evit", "tome", "ats", "act", "evo_vit", "smyrf"]
    assert names["hourglass_swag"][: len(methods)] == methods


@pytest.mark.parametrize(
    ("paper", "table", "row", "column_name", "value"),
    [
        ("hourglass_swag", "swag", "swag-h14", "gmacs", "1023.2"),
        ("hourglass_swag", "hourglass", "hourglass-l16-12-23x23", "throughput_ips", "19.5"),
        ("hourglass_swag", "evit", "evit-h14-0.6", "gmacs", "544.4"),
        ("hourglass_swag", "tome", "tome-l16-r40", "top1_percent", "87.7"),
        ("hourglass_swag", "ats", "ats-h14-14", "fps", "7.1"),
        ("hourglass_swag", "act", "act-h14-q32", "gmacs", "978.5"),
        ("hourglass_swag", "evo_vit", "evo-l16-8-0.4", "throughput_ips", "25.0"),
        ("hourglass_swag", "smyrf", "smyrf-h14-16-c16", "gmacs", "975.98"),
        ("hourglass_swag", "models", "vit-l16-in1k", "params_m", "305.174504"),
        ("scala", "scala_s", "s-x4-0.50", "top1_percent", "72.0"),
        ("scala", "scala_b", "b-separate-0.25", "top1_percent", "72.2"),
        ("dvt", "table2", "t2-dvt-at-14", "throughput_ips", "877"),
        ("dvt", "table3", "t3-cifar100-dvt-at-19", "gmacs", "1.74"),
        ("dvt", "exits", "exit-t2t-14-3", "gmacs", "9.3276"),
        ("sit", "students", "sit-m", "gmacs", "8.1"),
        ("sit", "teachers", "lvvit-l", "params_m", "147"),
        ("uvc", "deit_small", "small-uvc-50.41", "remaining_percent", "50.41"),
        ("uvc", "deit_small", "small-patch-slimming", "top1_percent", "79.4"),
    ],
)
def test_published_values(paper, table, row, column_name, value):
    (found,) = [t for t in load_tables(paper) if t.name == table]
    assert str(found.row(row).published[column_name]) == value


def test_every_gmacs_names_a_counting_convention():
    for table in load_tables():
        for row in table.rows:
            for name in ("gmacs", "stage_gmacs"):
                if name in row.published and not row.cited:
                    assert row.convention[name] in CONVENTIONS, row.key


def test_every_command_is_complete_and_names_a_program_of_its_paper():
    for table in load_tables():
        for row in table.rows:
            for name in row.published:
                command = row.command(name)
                assert "{" not in command
                assert f"{row.paper}/" in command or command.startswith("python -m common.reproduce")


def test_method_rows_are_compared_with_the_dense_row_of_their_size():
    for table in load_tables("hourglass_swag"):
        for row in table.rows:
            if row.dense and row.dense.startswith("swag/"):
                size = "l16" if "-l16-" in row.id else "h14"
                assert row.dense == f"swag/swag-{size}"
                assert f"vit_{size}_in1k" in row.arguments


def test_the_example_of_the_documentation_loads():
    path = next(t.path for t in load_tables("hourglass_swag") if t.name == "hourglass")
    assert load_table(path).row("hourglass-l16-8-16x16").arguments == "-m hourglass_vit_l16_in1k -r 512 -l 8 -n 256"
