"""The main job on a made-up paper, and its command line on the real tables."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from decimal import Decimal

import pytest

from common.ledger import cache, evidence
from common.ledger import compare as ledger
from common.ledger.compare import KEYS, half_unit
from common.ledger.gather import Request, _listing, build, run_live
from common.ledger.reproduce import main, parse_columns, resolve_device
from common.ledger.tables import load_tables
from common.run.files import ROOT
from common.tests.fake_paper import ADAPTER, EVIDENCE, TABLE, importable, record, write_paper, write_records


@pytest.fixture
def paper(tmp_path):
    """Root of a folder with the made-up paper, importable."""
    write_paper(tmp_path)
    with importable(tmp_path):
        yield tmp_path


def entries_of(root, **options):
    found = build(load_tables(root=root), Request(root=root, **options))
    assert not found.failures
    return {(entry.row, entry.column): entry for entry in found.entries}


def calls():
    import fakepaper.ledger  # pyright: ignore[reportMissingImports]

    return fakepaper.ledger.CALLS


def test_costs_are_compared_at_the_published_digits(paper):
    entries = entries_of(paper)
    dense, half, slip = (entries[row, "gmacs"] for row in ("dense", "half", "slip"))
    assert dense.status == half.status == "reproduced"
    assert (dense.reproduced, dense.difference, dense.tolerance) == (10.04, 0.04, 0.05)
    assert "plain MACs 9.54 G" in dense.source
    assert slip.status == "differs"
    assert slip.source.endswith("differs: a slip of rounding in the table")
    assert entries["dense", "params_m"].status == "reproduced"


def test_what_is_missing_names_its_command(paper):
    entries = entries_of(paper)
    assert entries["half", "top1_percent"].status == "needs data"
    assert entries["half", "top1_percent"].command.startswith("python fakepaper/evaluate.py -m half -r 0.5")
    assert entries["unknown", "top1_percent"].status == "needs compute"
    assert entries["unknown", "gmacs"].status == "needs weights"
    assert entries["half", "fps"].status == "needs gpu"
    assert {entry.status for (row, _), entry in entries.items() if row == "later"} == {"not implemented yet"}
    assert {entry.status for (row, _), entry in entries.items() if row == "other"} == {"cited"}
    assert entries["half", "fps"].published == Decimal("1.800")
    assert entries["dense", "fps"].published == Decimal("100")


def test_speeds_are_ratios_to_the_dense_row(paper):
    entries = entries_of(paper, measure_speed=True)
    half, slip, dense = (entries[row, "fps"] for row in ("half", "slip", "dense"))
    assert (half.reproduced, half.status, half.tolerance) == (1.9, "reproduced", 0.18)
    assert half.convention == "float32 on cpu"
    assert "published 180 / 100 images/s (main/dense)" in half.source
    assert (slip.reproduced, slip.status) == (1.2, "differs")
    assert (dense.reproduced, dense.difference, dense.status) == (50.0, None, "recorded")
    assert entries["later", "fps"].status == "not implemented yet"
    assert ("speeds", ["dense", "half", "slip"]) in calls()


def test_a_paired_ratio_is_used_where_there_is_one(tmp_path):
    adapter = ADAPTER.replace('"timed")', '"timed", 1.75 if row.id == "half" else None)')
    assert adapter != ADAPTER
    write_paper(tmp_path, adapter=adapter)
    with importable(tmp_path):
        entries = entries_of(tmp_path, measure_speed=True)
    assert entries["half", "fps"].reproduced == 1.75
    assert entries["slip", "fps"].reproduced == 1.2


def test_accuracy_is_evaluated_where_there_is_data(paper, tmp_path):
    data = tmp_path / "imagenet"
    data.mkdir()
    entries = entries_of(paper, data=data)
    assert (entries["dense", "top1_percent"].status, entries["dense", "top1_percent"].difference) == (
        "reproduced",
        0.15,
    )
    assert entries["half", "top1_percent"].status == "differs"
    assert entries["half", "top1_percent"].source.endswith("evaluated on imagenet; differs: the reason is not known")
    assert entries["slip", "top1_percent"].status == "needs weights"
    assert entries["slip", "top1_percent"].command == "fetch slip"
    assert ("accuracy", "later") not in calls()
    assert ("accuracy", "other") not in calls()


def test_records_fill_in_what_cannot_be_measured_here(paper):
    ratio = {"reference_row": "main/dense", "reference_value": 50.0}
    write_records(
        paper, "old-gpu", [record("half", "fps", 80.0, **ratio, ratio=1.6)], kind="cuda", created="2025-01-01T00:00:00"
    )
    write_records(
        paper,
        "new-gpu",
        [
            record("half", "fps", 88.0, **ratio),
            record("half", "fps", 99.0, **ratio, dtype="bfloat16"),
            record("dense", "fps", 50.0),
            record("slip", "top1_percent", 77.9),
        ],
        kind="cuda",
        created="2026-01-01T00:00:00",
    )
    write_records(
        paper, "cpu", [record("half", "fps", 9.0, **ratio, ratio=1.9)], kind="cpu", created="2026-06-01T00:00:00"
    )
    entries = entries_of(paper)
    half = entries["half", "fps"]
    assert (half.status, half.reproduced, half.difference) == ("recorded", 1.76, -0.04)
    assert "recorded: new-gpu, torch 2.15.0, commit 0123456789ab, 2026-01-01" in half.source
    assert half.convention == "float32, batch 1"
    assert (entries["dense", "fps"].reproduced, entries["dense", "fps"].status) == (50.0, "recorded")
    assert (entries["slip", "top1_percent"].status, entries["slip", "top1_percent"].difference) == ("recorded", -0.1)
    measured = entries_of(paper, measure_speed=True)
    assert measured["half", "fps"].reproduced == 1.9


def test_a_record_changes_no_number_of_values_and_hides_no_other(paper):
    """Against another row, without a ratio, in a damaged file: an error each, and the good record still counts."""
    before = {(entry.row, entry.column) for entry in build(load_tables(root=paper), Request(root=paper)).entries}
    good = record("half", "fps", 80.0, reference_row="main/dense", reference_value=50.0)
    write_records(paper, "good", [good], kind="cuda", created="2026-01-01T00:00:00")
    other = good | {"reference_row": "main/slip"}
    write_records(paper, "other", [other, record("half", "fps", 1.0)], kind="cuda", created="2026-01-02T00:00:00")
    (paper / "fakepaper/results/cut.json").write_text('{"format": 1, "re')
    found = build(load_tables(root=paper), Request(root=paper))
    assert {(entry.row, entry.column): entry.reproduced for entry in found.entries}["half", "fps"] == 1.6
    assert {(entry.row, entry.column) for entry in found.entries} == before
    places = [failure.split(":")[0] for failure in found.failures]
    assert places == ["fakepaper", "fakepaper/main/half", "fakepaper/main/half"]
    assert "fakepaper/results/cut.json: not valid JSON" in found.failures[0]
    assert all("is not a ratio to 'main/dense'" in failure for failure in found.failures[1:])


def test_one_failing_row_does_not_lose_the_others(tmp_path, capsys):
    write_paper(
        tmp_path,
        adapter=ADAPTER.replace(
            'if row.id == "later":', 'if row.id == "half":\n        1 / 0\n    if row.id == "later":'
        ),
    )
    with importable(tmp_path):
        assert main(["--format", "json", "--quiet"], root=tmp_path) == 1
    captured = capsys.readouterr()
    rows = {entry["row"] for entry in json.loads(captured.out)}
    assert rows == {"dense", "slip", "unknown", "later", "other"}
    assert "ERROR fakepaper/main/half: ZeroDivisionError: division by zero" in captured.err
    assert ", 1 error" in captured.err


def test_what_programs_and_libraries_print_is_not_in_the_ledger(tmp_path, capsys):
    lines = ["import argparse, warnings", "print(argparse.Namespace(lr=1))", "print('a program')"]
    lines += ["warnings.warn('a library')"]
    noise = "".join(f"    {line}\n" for line in lines)
    adapter = ADAPTER
    for method in ("costs", "accuracy"):
        adapter = adapter.replace(f'    CALLS.append(("{method}"', f'{noise}    CALLS.append(("{method}"')
    write_paper(tmp_path, adapter=adapter)
    with importable(tmp_path):
        assert main(["--data", str(tmp_path), "--weights", str(tmp_path), "--format", "json"], root=tmp_path) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)
    assert not re.search("Namespace|a program|a library", captured.out)
    assert "a program" in captured.err
    assert not re.search("Namespace|a library", captured.err)


def test_a_program_that_ends_itself_is_an_error_of_its_row(tmp_path):
    ended = 'if row.id == "half": raise SystemExit("--ratio: too small")'
    adapter = ADAPTER.replace('    CALLS.append(("accuracy"', f'    {ended}\n    CALLS.append(("accuracy"')
    write_paper(tmp_path, adapter=adapter)
    with importable(tmp_path):
        found = build(load_tables(root=tmp_path), Request(root=tmp_path, data=tmp_path))
    assert [str(failure) for failure in found.failures] == ["fakepaper/main/half: RuntimeError: --ratio: too small"]
    assert {entry.row for entry in found.entries} == {"dense", "slip", "unknown", "later", "other"}


def test_a_cost_that_is_not_returned_is_an_error(tmp_path):
    write_paper(tmp_path, table=TABLE.replace('gmacs = "weights", ', ""))
    with importable(tmp_path):
        found = build(load_tables(root=tmp_path), Request(root=tmp_path))
    assert "returned no 'gmacs'" in str(found.failures[0])


def test_a_paper_without_an_adapter_is_not_implemented_yet(tmp_path):
    write_paper(tmp_path, adapter=None)
    with importable(tmp_path):
        for columns in (None, frozenset({"top1_percent"})):
            statuses = {entry.status for entry in entries_of(tmp_path, columns=columns).values()}
            assert statuses == {"not implemented yet", "cited"}


def test_a_broken_adapter_is_an_error_and_not_a_missing_one(tmp_path, capsys):
    write_paper(tmp_path, adapter="import a_module_that_does_not_exist")
    with importable(tmp_path):
        assert main(["--quiet"], root=tmp_path) == 1
    assert "a_module_that_does_not_exist" in capsys.readouterr().err


def test_a_second_run_computes_nothing(paper, capsys):
    assert main(["--quiet", "--live", "--columns", "gmacs,fps", "--device", "cpu"], root=paper) == 0
    first = len(calls())
    assert first > 0
    capsys.readouterr()
    assert main(["--quiet", "--live", "--columns", "gmacs,fps", "--device", "cpu"], root=paper) == 0
    again = calls()[first:]
    assert [call for call in again if call != ("costs", "later")] == []
    out = capsys.readouterr().out
    assert re.search(r"Not computed again.*: 4 costs, 1 live, 1 speeds\. FORCE=1", out)
    main(["--quiet", "--live", "--force", "--device", "cpu"], root=paper)
    assert ("live", 1000) in calls()[first + len(again) :]


def test_naming_a_speed_column_measures_it(paper, capsys):
    assert main(["--quiet", "--format", "json", "--device", "cpu"], root=paper) == 0
    assert not any(call[0] == "speeds" for call in calls())
    assert main(["--quiet", "--columns", "fps", "--format", "json", "--device", "cpu"], root=paper) == 0
    assert any(call[0] == "speeds" for call in calls())


def test_columns_that_need_no_costs_compute_none(paper, capsys):
    assert main(["--quiet", "--columns", "top1_percent"], root=paper) == 0
    assert calls() == []
    out = capsys.readouterr().out
    assert "1 table " in out
    assert "6 published values: 4 needs data, 1 needs compute, 1 cited" in out


def test_json_is_a_list_of_objects_with_the_documented_keys(paper, tmp_path, capsys):
    file = tmp_path / "out" / "ledger.json"
    assert main(["--quiet", "--format", "json", "--output", str(file)], root=paper) == 0
    entries = json.loads(file.read_text())
    assert all(list(entry) == list(KEYS) for entry in entries)
    half = next(entry for entry in entries if (entry["row"], entry["column"]) == ("half", "gmacs"))
    assert (half["published"], half["reproduced"], half["status"]) == (5.0, 4.96, "reproduced")
    assert str(file) in capsys.readouterr().out


def test_csv_keeps_published_digits(paper, capsys):
    assert main(["--quiet", "--format", "csv"], root=paper) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    dense = next(row for row in rows if (row["row"], row["column"]) == ("dense", "top1_percent"))
    assert dense["published"] == "80.0"
    assert list(dense) == list(KEYS)


def test_one_row_and_one_column(paper, capsys):
    assert main(["fakepaper", "--row", "half", "--columns", "gmacs", "--format", "json", "--quiet"], root=paper) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["row"], entry["column"]) == ("half", "gmacs")


def test_one_row_is_still_measured_against_its_dense_row(paper, capsys):
    assert main(["--row", "half", "--columns", "fps", "--format", "json", "--quiet"], root=paper) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["reproduced"] == 1.9
    assert calls()[-1] == ("speeds", ["dense", "half"])


def test_the_report_folder(paper, tmp_path, capsys):
    folder = tmp_path / "report"
    assert main(["--quiet", "--live", "--report", str(folder)], root=paper) == 0
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    plots = {"plots/fakepaper-main.png", "plots/fakepaper-evidence.png"}
    assert names == {"report.md", "index.html", "ledger.json", "ledger.csv", *plots}
    assert str(folder / "index.html") in capsys.readouterr().out
    assert "84.50" in (folder / "report.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nobody"], "there is no paper 'nobody'; the papers are fakepaper"),
        (["--table", "nothing"], "there is no table 'nothing'; the tables are main"),
        (["--row", "nothing"], "there is no row 'nothing'; the rows are dense, half, slip, unknown, later, other"),
        (["--columns", "gmac"], "there is no column 'gmac'; the columns are gmacs, params_m, fps, top1_percent"),
        (["--columns", ","], "publish none of these"),
        (["--data", "/nonexistent"], "--data: there is no folder /nonexistent"),
        (["--device", "nonsense"], "--device must be auto, cpu, cuda or cuda:N, got 'nonsense'"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--output", "FOLDER"], "--output: FOLDER is a folder, expected the name of a file"),
        (["--report", "FOLDER/file"], "--report: FOLDER/file is a file, not a folder"),
        (["--report", "FOLDER/file/below"], "--report: FOLDER/file is a file, not a folder"),
        (["--data", "FOLDER"], "--data: no checkpoint is in FOLDER/torch/hub/checkpoints, torch's hub cache; name"),
    ],
)
def test_wrong_command_lines_are_answered_with_what_there_is(paper, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "file").touch()
    try:
        status = main([*(word.replace("FOLDER", str(tmp_path)) for word in words), "--quiet"], root=paper)
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    assert message.replace("FOLDER", str(tmp_path)) in capsys.readouterr().err
    assert calls() == []


@pytest.mark.parametrize("words", [["--help"], ["--tabel", "x"], ["fakepaper", "--row", "half", "--columns", "gmacs"]])
def test_help_mistakes_and_cached_rows_import_no_torch(paper, words):
    """Nor the paper: the row was computed before."""
    assert main(["--quiet"], root=paper) == 0
    program = (
        "import sys, pathlib, common.reproduce\n"
        "try: status = common.reproduce.main(sys.argv[2:], root=pathlib.Path(sys.argv[1]))\n"
        "except SystemExit as error: status = error.code\n"
        "heavy = {'torch', 'torchvision', 'timm', 'matplotlib', 'fakepaper.ledger'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    path = os.pathsep.join([str(paper), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", program, str(paper), *words],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_columns_that_a_table_lacks_are_no_error():
    assert parse_columns("gmacs, fps", ["gmacs"], ["gmacs", "fps"]) == {"gmacs", "fps"}
    assert parse_columns(None, [], []) is None


def test_auto_is_a_device_that_exists():
    assert resolve_device("auto") in ("cpu", "cuda")


@pytest.mark.parametrize(("published", "half"), [("275.8", 0.05), ("392", 0.5), ("0.47", 0.005), ("100", 0.5)])
def test_half_of_the_last_digit(published, half):
    assert half_unit(Decimal(published)) == pytest.approx(half)


def test_a_failing_live_run_is_reported(tmp_path, capfd):
    write_paper(tmp_path, evidence=EVIDENCE.replace("CALLS.append", 'raise RuntimeError("no loss")\n    CALLS.append'))
    with importable(tmp_path):
        found = build(load_tables(root=tmp_path), Request(root=tmp_path))
        assert run_live("fakepaper", Request(root=tmp_path), found) is None
    assert "live run: RuntimeError: no loss" in str(found.failures[0])
    assert "it said last:\nepoch 1/1 done" in capfd.readouterr().err


def test_the_report_is_there_before_anything_trains_and_renewed_after(paper, tmp_path, capsys, monkeypatch):
    folder, before = tmp_path / "report", []
    monkeypatch.setattr(evidence, "live", lambda name, **_: before.append((folder / "report.md").read_text()))
    assert main(["--quiet", "--live", "--report", str(folder)], root=paper) == 0
    assert "| at full width | 85.0 / 82.5 | +2.50 points |" in before[0]
    monkeypatch.undo()
    assert main(["--quiet", "--live", "--report", str(folder), "--force"], root=paper) == 0
    out, err = capsys.readouterr()
    assert "epoch 1/1 done" not in out + err
    assert re.search(r"half, top1 percent +84\.50 +80\.03 to 89\.97\n", out), out
    assert re.search(r"later, top1 percent +90\.00 +not recorded yet\n", out)
    assert "half, top1 percent | 84.50" in (folder / "report.md").read_text()
    assert main(["--quiet", "--live", "--force", "-v"], root=paper) == 0
    assert "epoch 1/1 done" in capsys.readouterr().out
    assert main(["--quiet", "--live", "--force", "-v", "--format", "json"], root=paper) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)) == 17
    assert "epoch 1/1 done" in err


def test_a_program_that_ends_a_live_run_loses_nothing_else(tmp_path, capsys):
    write_paper(tmp_path, evidence=EVIDENCE.replace("CALLS.append", 'raise SystemExit("--lr: no")\n    CALLS.append'))
    with importable(tmp_path):
        assert main(["--quiet", "--live"], root=tmp_path) == 1
    out, err = capsys.readouterr()
    assert "17 published values" in out
    assert "ERROR fakepaper: live run: RuntimeError: --lr: no" in err


def test_a_value_that_is_not_finite_is_an_error(tmp_path):
    write_paper(tmp_path, adapter=ADAPTER.replace('"half": 4.96', '"half": float("nan")'))
    with importable(tmp_path):
        found = build(load_tables(root=tmp_path), Request(root=tmp_path))
    assert "expected a finite number" in str(found.failures[0])


# ---------------------------------------------------------------------------------------------------- the real tables


@pytest.fixture(scope="module")
def real():
    return build(load_tables(), Request())


def test_every_published_value_has_an_entry(real):
    assert not real.failures
    published = sum(len(row.published) for table in load_tables() for row in table.rows)
    assert len(real.entries) == published
    assert {entry.status for entry in real.entries} <= set(ledger.STATUSES)
    assert all(entry.command and entry.source for entry in real.entries)


def test_published_costs_of_swag_and_hourglass_come_out(real):
    found = [e for e in real.entries if e.table in ("swag", "hourglass") and e.column == "gmacs"]
    assert len(found) == 8
    assert {entry.status for entry in found} == {"reproduced"}


def test_parameters_of_swag_and_hourglass_come_out(real):
    found = {entry.row: entry.status for entry in real.entries if entry.column == "params_m"}
    names = ["vit-b16", "vit-b16-in1k", "vit-l16", "vit-l16-in1k", "vit-h14", "vit-h14-in1k"]
    names += ["hourglass-vit-l16-in1k", "hourglass-vit-h14-in1k"]
    assert {found[name] for name in names} == {"reproduced"}


def test_no_cost_differs_without_a_reason(real):
    assert [e for e in real.entries if e.status == "differs" and "the reason is not known" in e.source] == []


def test_the_cache_folder_is_inside_the_checkout():
    assert cache.FOLDER.is_relative_to(ROOT)


def test_a_picture_that_changes_makes_another_state_of_the_folder(tmp_path):
    """An accuracy is taken from the cache only for the same pictures; those to train on do not matter."""
    picture = tmp_path / "val" / "a" / "1.png"
    for path in (picture, tmp_path / "train" / "a" / "1.png"):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"picture")
    before = _listing(tmp_path)
    (tmp_path / "train" / "a" / "2.png").write_bytes(b"another")
    assert _listing(tmp_path) == before
    picture.write_bytes(b"other picture")
    assert _listing(tmp_path) != before
    picture.unlink()
    assert _listing(tmp_path) != before
