"""Measuring the rows of a table, with networks that say how long they take."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common.ledger import speeds
from common.ledger.speeds import as_measured, measure_rows, speeds_for_ledger
from common.ledger.tables import NotImplementedYet, Row, load_tables

TABLE = """
paper = "shrink"
table = "{table}"
title = "A table"
source = "a paper"
[convention]
fps = "ratio"
throughput_ips = "ratio"
[tolerance]
fps = 0.05
throughput_ips = 0.05
[commands]
fps = "python bench.py"
throughput_ips = "python bench.py"
"""
ROW = """
[[rows]]
id = "{id}"
method = "{id}"
arguments = "{id}"
dense = "{dense}"
published = {{fps = 10.0, throughput_ips = 20.0}}
"""
SECONDS_PER_IMAGE = {"dense": 4.0, "half": 2.0, "quarter": 1.0, "other": 3.0}
CPU = torch.device("cpu")


class FakeClock:
    """Seconds that pass only when a network says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Fake(nn.Module):
    """A network that takes a fixed time per image."""

    def __init__(self, clock: FakeClock, seconds: float, largest_batch: int) -> None:
        super().__init__()
        self.clock, self.seconds, self.largest_batch = clock, seconds, largest_batch
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == self.weight.dtype
        if len(images) > self.largest_batch:
            raise torch.OutOfMemoryError("out of memory")
        self.clock.now += self.seconds * len(images)
        return images.flatten(1)


class Builder:
    """Networks of the rows, and a log of what was built."""

    def __init__(self, clock: FakeClock, largest_batch: int = 100) -> None:
        self.clock, self.largest_batch, self.built = clock, largest_batch, []

    def __call__(self, row: Row) -> tuple[nn.Module, int]:
        if row.id == "missing":
            raise NotImplementedYet("missing_vit")
        self.built.append(row.id)
        return Fake(self.clock, SECONDS_PER_IMAGE[row.id], self.largest_batch), 8


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "shrink" / "tables"
    folder.mkdir(parents=True)
    (folder / "dense.toml").write_text(TABLE.format(table="dense") + ROW.format(id="dense", dense=""))
    rows = [ROW.format(id=name, dense="dense/dense") for name in ("half", "quarter", "missing")]
    (folder / "fast.toml").write_text(TABLE.format(table="fast") + "".join(rows) + ROW.format(id="other", dense=""))
    return tmp_path


def rows_named(root: Path, *names: str) -> list[Row]:
    rows = {row.id: row for table in load_tables("shrink", root=root) for row in table.rows}
    return [rows[name] for name in names]


def test_rows_are_paired_with_their_dense_row(root: Path) -> None:
    clock = FakeClock()
    build = Builder(clock)
    rows = rows_named(root, "dense", "half", "quarter")
    run = measure_rows(rows, build, device=CPU, batch_size=4, rounds=3, warmup=1, clock=clock, root=root)
    found = {(record.row, record.column): record for record in run.records}
    assert set(found) == {(name, column) for name in ("dense", "half", "quarter") for column in speeds.COLUMNS}
    assert run.left_out == []
    record = found["quarter", "throughput_ips"]
    assert (record.paper, record.table, record.reference_row) == ("shrink", "fast", "dense/dense")
    assert (record.value, record.reference_value, record.ratio) == (1.0, 0.25, 4.0)
    assert (record.batch_size, record.resolution, record.rounds, record.dtype) == (4, 8, 3, "float32")
    assert found["half", "fps"].batch_size == 1
    dense = found["dense", "fps"]
    assert (dense.table, dense.value, dense.ratio, dense.reference_row) == ("dense", 0.25, None, None)
    assert sorted(build.built) == ["dense", "half", "quarter"], "each network is built once"
    measured = as_measured(run, CPU)["quarter", "fps"]
    assert (measured.value, measured.ratio, measured.convention) == (1.0, 4.0, "float32, batch 1")


def test_the_dense_row_is_measured_although_only_others_are_asked_for(root: Path) -> None:
    clock = FakeClock()
    run = measure_rows(rows_named(root, "half"), Builder(clock), device=CPU, columns=["fps"], clock=clock, root=root)
    assert [(record.row, record.value) for record in run.records] == [("half", 0.5), ("dense", 0.25)]


def test_a_row_without_a_dense_row_is_measured_alone(root: Path) -> None:
    clock = FakeClock()
    run = measure_rows(rows_named(root, "other"), Builder(clock), device=CPU, columns=["fps"], clock=clock, root=root)
    assert [(record.row, record.ratio, record.reference_row) for record in run.records] == [("other", None, None)]


def test_networks_are_cast_to_the_precision(root: Path) -> None:
    clock = FakeClock()
    run = measure_rows(
        rows_named(root, "half"), Builder(clock), device=CPU, dtype=torch.bfloat16, clock=clock, rounds=1, root=root
    )
    assert {record.dtype for record in run.records} == {"bfloat16"}


def test_the_batch_is_halved_until_it_fits(root: Path) -> None:
    clock = FakeClock()
    run = measure_rows(
        rows_named(root, "half"),
        Builder(clock, largest_batch=2),
        device=CPU,
        columns=["throughput_ips"],
        batch_size=16,
        clock=clock,
        root=root,
    )
    assert {record.batch_size for record in run.records} == {2}


def test_what_cannot_be_measured_is_left_out_with_the_reason(root: Path) -> None:
    clock = FakeClock()
    rows = rows_named(root, "missing", "half")
    run = measure_rows(rows, Builder(clock), device=CPU, columns=["fps"], rounds=1, clock=clock, root=root)
    assert run.left_out == ["fast/missing fps: missing_vit is not implemented yet"]
    assert {record.row for record in run.records} == {"half", "dense"}
    run = measure_rows(rows[1:], Builder(clock, 0), device=CPU, columns=["fps"], rounds=1, clock=clock, root=root)
    assert run.records == []
    assert "fast/half fps: a batch of 1" in run.left_out[0]
    assert run.errors == []


def test_what_was_not_expected_is_an_error_of_the_ledger(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speeds, "load_tables", lambda paper, root: load_tables(paper, root=folder))
    folder, clock = root, FakeClock()
    build = Builder(clock)
    options = {"columns": ["fps"], "device": CPU, "progress": False}
    assert ("half", "fps") in speeds_for_ledger(rows_named(root, "half"), build, **options)
    monkeypatch.setitem(SECONDS_PER_IMAGE, "half", "long")
    with pytest.raises(TypeError):
        speeds_for_ledger(rows_named(root, "half"), build, **options)


def test_rows_that_take_turns_together(root: Path) -> None:
    clock = FakeClock()
    rows = rows_named(root, "half", "quarter", "missing")
    options = {"device": CPU, "columns": ["fps"], "rounds": 2, "warmup": 1, "clock": clock, "root": root}
    run = measure_rows(rows, build := Builder(clock), together=True, **options)
    assert {(record.row, record.ratio) for record in run.records} == {("half", 2), ("quarter", 4), ("dense", None)}
    assert run.left_out == ["fast/missing fps: missing_vit is not implemented yet"]
    assert build.built == ["dense", "half", "quarter"]
    late = measure_rows(rows, Builder(clock), together=True, limit_s=6.0, **options)
    assert {record.row for record in late.records} == {"half", "dense"}
    assert late.left_out == [f"fast/{name} fps: the time limit was near" for name in ("quarter", "missing")]


def test_near_the_limit_no_further_pair_is_started(root: Path) -> None:
    clock = FakeClock()
    rows = rows_named(root, "half", "quarter")
    # A round of half against dense takes 6 s, one of quarter against dense 5 s.
    run = measure_rows(
        rows, Builder(clock), device=CPU, columns=["fps"], warmup=1, rounds=100, limit_s=30.0, clock=clock, root=root
    )
    assert clock.now <= 30
    assert {record.row for record in run.records} == {"half", "dense", "quarter"}
    short = measure_rows(
        rows, Builder(clock), device=CPU, columns=["fps"], warmup=1, rounds=100, limit_s=11.0, clock=clock, root=root
    )
    assert {record.row for record in short.records} == {"half", "dense"}
    assert short.left_out == ["fast/quarter fps: the time limit was near"]
