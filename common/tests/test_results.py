"""Record files: what is accepted, what is refused and why, and how they are filed."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.ledger import results
from common.ledger.results import Origin, Record, RecordError, add, load_records, parse, write_records

TABLE = """
paper = "shrink"
table = "main"
title = "A table"
source = "a paper"
dataset = "ImageNet-1K"
[convention]
fps = "ratio to the dense row"
[tolerance]
fps = 0.05
[commands]
fps = "python bench.py {arguments}"
[[rows]]
id = "dense"
method = "Dense"
published = {fps = 10.0}
[[rows]]
id = "small"
method = "Small"
dense = "dense"
published = {fps = 20.0}
"""

ORIGIN = Origin(
    created="2026-01-02T03:04:05+00:00",
    commit="0123456789abcdef",
    device={"name": "NVIDIA H200", "type": "cuda", "torch": "2.11.0", "driver": "570.1"},
    command="python -m common.gpu --output out",
    part="part2",
)
RECORD = Record("shrink", "main", "small", "fps", 41.5, "dense", 20.0, 2.07, "float32", 1, 512, False, 30, 1.5, 900.0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout" / "shrink" / "tables"
    folder.mkdir(parents=True)
    (folder / "main.toml").write_text(TABLE)
    return tmp_path / "checkout"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "out" / "part2.json"
    write_records(path, [RECORD], ORIGIN)
    return path


def edit(file: Path, **changes: Any) -> Path:
    """Change keys of the file; those with a leading underscore are keys of its only record."""
    data = json.loads(file.read_text())
    for key, value in changes.items():
        place, name = (data["records"][0], key[1:]) if key.startswith("_") else (data, key)
        if value is ...:
            del place[name]
        else:
            place[name] = value
    file.write_text(json.dumps(data))
    return file


def nested(depth: int) -> list[Any]:
    return [nested(depth - 1)] if depth else []


def test_a_file_is_filed_and_read_back(file: Path, root: Path) -> None:
    assert add(file, root=root) == [root / "shrink/results/nvidia-h200-2026-01-02-part2.json"]
    (record,) = load_records("shrink", root=root)
    assert record.as_dict() == RECORD.as_dict()
    assert record.origin.path == root / "shrink/results/nvidia-h200-2026-01-02-part2.json"
    assert record.origin.text == "NVIDIA H200, torch 2.11.0, driver 570.1, commit 0123456789ab, 2026-01-02"
    assert list((root / "shrink/results").iterdir()) == [record.origin.path], "no temporary file is left"


def test_the_keys_of_a_file_are_those_agreed_on(file: Path) -> None:
    data = json.loads(file.read_text())
    assert set(data) == {"format", "created", "commit", "device", "command", "part", "left_out", "records"}
    assert set(data["records"][0]) == {
        *("paper", "table", "row", "column", "value", "reference_row", "reference_value", "ratio", "dtype"),
        *("batch_size", "resolution", "compiled", "rounds", "spread_percent", "peak_memory_mb", "cuda_graph"),
    }


def test_filing_twice_is_harmless_but_nothing_is_overwritten(file: Path, root: Path) -> None:
    (path,) = add(file, root=root)
    assert add(file, root=root) == [path]
    edit(file, _value=50.0)
    with pytest.raises(RecordError, match="exists already with other content"):
        add(file, root=root)
    assert load_records("shrink", root=root)[0].value == 41.5
    add(file, force=True, root=root)
    assert load_records("shrink", root=root)[0].value == 50.0


def test_without_a_part_the_name_comes_from_the_content(file: Path, root: Path) -> None:
    (first,) = add(edit(file, part=""), root=root)
    (second,) = add(edit(file, _value=50.0), root=root)
    assert first != second
    assert len(load_records("shrink", root=root)) == 2


def test_a_speed_up_over_the_dense_row_needs_no_published_speed(file: Path, root: Path) -> None:
    """Row ``small`` publishes fps only; a throughput with its ratio is filed all the same, one without is not."""
    add(edit(file, _column="throughput_ips"), root=root)
    assert load_records("shrink", root=root)[0].ratio == 2.07
    with pytest.raises(RecordError, match="publishes no 'throughput_ips'"):
        add(edit(file, _column="throughput_ips", _ratio=None, part="other"), root=root)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "not a record file of format 1 .found 2"),
        ({"commit": ...}, "commit: is missing"),
        ({"speed": 1}, "unknown keys .'speed'"),
        ({"created": "yesterday"}, "created: expected an ISO date, got 'yesterday'"),
        ({"device": {"name": "x"}}, "device: expected an object with at least name, type and torch"),
        ({"records": {}}, "records: expected a list"),
        ({"records": []}, "holds no records"),
        ({"_value": "fast"}, "record 0: value: expected a number, got 'fast'"),
        ({"_value": True}, "record 0: value: expected a number, got True"),
        ({"_value": float("nan")}, "record 0: value: expected a finite number"),
        ({"_value": -1.0}, "record 0: value: expected a positive number"),
        ({"_dtype": ...}, "record 0: dtype: is missing"),
        ({"_note": "x"}, "record 0: unknown keys .'note'"),
        ({"_paper": "other"}, "there is no paper 'other'; the papers are .'shrink'"),
        ({"_table": "extra"}, "shrink has no table 'extra'; the tables are .'main'"),
        ({"_row": "large"}, "table 'main' has no row 'large'; the rows are .'dense', 'small'"),
        ({"_column": "gmacs"}, "row 'small' publishes no 'gmacs'"),
        ({"_reference_row": "big"}, "reference_row: shrink has no row 'main/big'"),
        ({"_reference_row": "small"}, "record 0: reference_row and ratio: expected a ratio to 'main/dense'"),
        ({"_ratio": None, "_reference_value": None}, "record 0: reference_row and ratio: expected a ratio to"),
        ({"part": 5}, "part: expected text, got 5"),
        ({"part": "x" * 300}, "device and part: 323 characters do not make a file name"),
        ({"commit": "a\nb"}, "commit: expected one line"),
        ({"_dtype": "a\n| b"}, "record 0: dtype: expected one line"),
        ({"created": "2026-01-02\n03:04"}, "created: expected one line"),
        ({"device": {"name": 5, "type": "cpu", "torch": "2"}}, "device: expected one line of text under name"),
        ({"device": {"name": "x", "type": "cpu", "torch": "2", "driver": "a\nb"}}, "one line of text under driver"),
        ({"_value": 10**400}, "record 0: value: expected a finite number, got inf"),
        ({"_value": 1e300}, "record 0: value: expected a number from 1e-9 to 1e15, got 1e.300"),
        ({"_ratio": 1e-300}, "record 0: ratio: expected a number from 1e-9"),
        ({"_batch_size": 10**30}, "record 0: batch_size: expected a whole number, got 1e.30"),
        ({"device": {"name": "x", "type": "cpu", "torch": "2", "watts": 10**400}}, "device: watts: expected a finite"),
        ({"programs": {"shrink/x": [{"a": float("nan")}]}}, "programs: shrink/x: 0: a: expected a finite number"),
        ({"programs": {"shrink/x": "\ud800"}}, "programs: shrink/x: expected text, got half of a character"),
        ({"programs": {"shrink/x": nested(50)}}, "nested more than 20 deep"),
    ],
)
def test_a_wrong_file_is_refused_with_the_reason(changes: dict, message: str, file: Path, root: Path) -> None:
    with pytest.raises(RecordError, match=message) as caught:
        add(edit(file, **changes), root=root)
    assert str(file) in str(caught.value)
    assert not (root / "shrink/results").exists()


def test_a_report_of_tests_is_accepted_but_not_filed(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "part1.json"
    write_records(path, [], replace(ORIGIN, tests={"status": 0, "summary": "3 passed"}))
    assert add(path, root=root) == []
    assert results.main(["add", str(path)]) == 0
    assert "tests only" in capsys.readouterr().out


def test_what_is_no_record_file_at_all(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="cannot be read"):
        add(tmp_path / "missing.json")
    (tmp_path / "cut.json").write_text('{"format": 1, "rec')
    with pytest.raises(RecordError, match="not valid JSON"):
        add(tmp_path / "cut.json")
    with pytest.raises(RecordError, match="not a record file"):
        parse("[1, 2]", where="list.json")[1]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("9" * 5000, "record 0: value: expected a finite number, got inf"),
        ("1e999", "record 0: value: expected a finite number, got inf"),
        ("[" * 100_000 + "]" * 100_000, "nested more than 20 deep"),
        ('1, "value": 2', "'value' is given twice"),
    ],
)
def test_what_json_can_say_and_a_record_cannot_hold(value: str, message: str, file: Path, root: Path) -> None:
    text = file.read_text()
    file.write_text(text.replace('"value": 41.5', f'"value": {value}'))
    assert file.read_text() != text
    with pytest.raises(RecordError, match=message) as caught:
        add(file, root=root)
    assert len(str(caught.value)) < 300


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RecordError, match=r"pipe: cannot be read: .*not a regular file"):
        add(tmp_path / "pipe")


def test_write_records_refuses_what_could_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="finite"):
        write_records(tmp_path / "x.json", [Record("a", "b", "c", "fps", float("inf"))], ORIGIN)
    assert not (tmp_path / "x.json").exists()


def test_a_damaged_filed_record_is_an_error(file: Path, root: Path) -> None:
    (path,) = add(file, root=root)
    path.write_text(path.read_text()[:100])
    with pytest.raises(RecordError, match=r"shrink/results/nvidia-h200-2026-01-02-part2\.json: not valid JSON"):
        load_records("shrink", root=root)


def test_the_command_reports_and_fails(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert results.main(["add", str(file)]) == 2
    assert "there is no paper 'shrink'" in capsys.readouterr().err


def test_only_what_is_a_paper_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert results.main(["list", "hourglass_swag"]) == 0
    assert "hourglass_swag hourglass/hourglass-l16" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        results.main(["list", "hourglas"])
    assert "there is no paper 'hourglas'; the papers are dvt, hourglass_swag" in capsys.readouterr().err


def test_commit_without_a_history_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMIT", "fedcba")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert results.current_commit(tmp_path) == "fedcba"
    monkeypatch.delenv("COMMIT")
    assert results.current_commit(tmp_path) == "unknown"

    def git(*words: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "first")
    commit = results.current_commit(tmp_path)
    assert len(commit) == 40
    (tmp_path / "a").write_text("2")
    assert results.current_commit(tmp_path) == f"{commit}-dirty"
