"""The local cache: valid for one job, one state of the sources and one set of versions."""

import json
import os
from pathlib import Path

import pytest

from common.ledger import cache
from common.ledger.cache import cached, digest, report_skipped, source_files
from common.run import files
from common.run.files import write_atomic


@pytest.fixture(autouse=True)
def _fresh_counts():
    cache.skipped.clear()
    yield
    cache.skipped.clear()


class Job:
    """Counts how often it is computed."""

    def __init__(self):
        self.runs = 0

    def __call__(self):
        self.runs += 1
        return {"value": [1, 2.5, None], "run": self.runs}


def test_a_job_is_computed_once(tmp_path):
    job = Job()
    first = cached(["costs", "row"], job, folder=tmp_path)
    assert cached(["costs", "row"], job, folder=tmp_path) == first
    assert job.runs == 1
    assert "1 costs" in report_skipped()
    assert cached(["costs", "other row"], job, folder=tmp_path)["run"] == 2
    assert cached(["costs", "row"], job, folder=tmp_path, force=True)["run"] == 3
    assert cached(["costs", "row"], job, folder=tmp_path)["run"] == 3


def test_nothing_is_said_if_nothing_was_skipped(tmp_path):
    cached(["costs"], Job(), folder=tmp_path)
    assert report_skipped() == ""


def test_another_state_of_the_sources_is_another_job(tmp_path):
    source = tmp_path / "model.py"
    source.write_text("width = 1")
    job = Job()
    cached(["costs"], job, files=[source], folder=tmp_path / "cache")
    cached(["costs"], job, files=[source], folder=tmp_path / "cache")
    assert job.runs == 1
    source.write_text("width = 2")
    os.utime(source, ns=(1, 1))
    cached(["costs"], job, files=[source], folder=tmp_path / "cache")
    assert job.runs == 2


def test_other_versions_are_another_job(tmp_path, monkeypatch):
    job = Job()
    cached(["costs"], job, folder=tmp_path)
    monkeypatch.setattr(cache, "versions", lambda: {"python": "9.9", "torch": "9.9"})
    cached(["costs"], job, folder=tmp_path)
    assert job.runs == 2


@pytest.mark.parametrize("damage", ["", "{", '{"value": 1}', "[1, 2]", "\x00\xff"])
def test_a_damaged_entry_is_computed_again(tmp_path, capsys, damage):
    job = Job()
    cached(["costs"], job, folder=tmp_path)
    (entry,) = tmp_path.iterdir()
    entry.write_bytes(damage.encode("latin-1"))
    assert cached(["costs"], job, folder=tmp_path)["run"] == 2
    assert "is damaged" in capsys.readouterr().err
    assert cached(["costs"], job, folder=tmp_path)["run"] == 2


def test_a_failed_job_leaves_nothing(tmp_path):
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        cached(["costs"], fail, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_entry_says_what_it_is(tmp_path):
    cached(["costs", "paper", "row"], Job(), folder=tmp_path)
    (entry,) = tmp_path.iterdir()
    content = json.loads(entry.read_text())
    assert content["key"]["job"] == ["costs", "paper", "row"]
    assert content["key"]["versions"]["torch"]
    assert entry.name.startswith("costs-paper-row-")


def test_an_atomic_write_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.txt"
    write_atomic(path, "old")

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


def test_tests_are_no_source(tmp_path):
    for name in ("common/a.py", "common/tests/test_a.py", "paper/models/b.py", "paper/tests/test_b.py", "paper/run.sh"):
        write_atomic(tmp_path / name, "")
    found = [path.relative_to(tmp_path).as_posix() for path in source_files("paper", root=tmp_path)]
    assert found == ["common/a.py", "paper/models/b.py"]


def test_a_digest_depends_on_names_and_contents(tmp_path):
    paths = [tmp_path / name for name in ("a.py", "b.py")]
    for path in paths:
        path.write_text("same")
    assert digest(paths) == digest(reversed(paths))
    assert digest(paths[:1]) != digest(paths[1:])
    with pytest.raises(FileNotFoundError):
        digest([Path("/nonexistent.py")])
