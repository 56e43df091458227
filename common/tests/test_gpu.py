"""The GPU job, tried out on the CPU with a small paper of its own, and its honest failure without a GPU."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common import gpu
from common.cache import ROOT
from common.results import add, load_records, parse_records

TABLE = """
paper = "shrinkpaper"
table = "main"
title = "A table"
source = "a paper"
[convention]
fps = "ratio"
throughput_ips = "ratio"
gmacs = "macs"
[tolerance]
fps = 0.05
throughput_ips = 0.05
[commands]
fps = "python bench.py"
throughput_ips = "python bench.py"
[[rows]]
id = "dense"
method = "Dense"
published = {fps = 10.0, throughput_ips = 12.0}
[[rows]]
id = "small"
method = "Small"
dense = "dense"
published = {fps = 20.0, throughput_ips = 25.0}
[[rows]]
id = "costs-only"
method = "Small"
published = {gmacs = 20.0}
[[rows]]
id = "later"
method = "Later"
dense = "dense"
published = {fps = 20.0}
[[rows]]
id = "quoted"
method = "Quoted"
dense = "dense"
cited = true
published = {fps = 20.0}
"""
LEDGER = """
from torch import nn
from common.tables import NotImplementedYet
WIDTHS = {"dense": 64, "small": 4}
def build(row):
    if row.id not in WIDTHS:
        raise NotImplementedYet(row.id)
    return nn.Conv2d(3, WIDTHS[row.id], 3), 16
"""
GPU_TEST = """
import pytest
@pytest.mark.gpu
def test_it():
    assert {outcome}
def test_not_for_the_gpu():
    raise AssertionError
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    package = tmp_path / "shrinkpaper"
    (package / "tables").mkdir(parents=True)
    (package / "tests").mkdir()
    (package / "__init__.py").touch()
    (package / "tables/main.toml").write_text(TABLE)
    (package / "ledger.py").write_text(LEDGER)
    (package / "tests/test_kernel.py").write_text(GPU_TEST.format(outcome=True))
    (package / "tests/test_other.py").write_text("import a_module_that_is_not_there")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "shrinkpaper"]:
        del sys.modules[name]


def run_part(part: gpu.Part, root: Path, limit_s: float = 60) -> int:
    cpu = torch.device("cpu")
    return gpu.run_part(part, output=root / "out", device=cpu, limit_s=limit_s, rounds=2, batch_size=2, root=root)


def test_the_parts_are_the_tests_then_each_group_of_rows_in_each_precision(root: Path) -> None:
    parts = gpu.plan(root)
    assert [part.label for part in parts] == [
        "part1-tests",
        "part2-shrinkpaper-main-dense-float32",
        "part3-shrinkpaper-main-dense-bfloat16",
    ]
    assert [[row.id for row in part.rows] for part in parts] == [[], ["small"], ["small"]]


def test_a_paper_without_an_adapter_has_no_parts(root: Path) -> None:
    (root / "shrinkpaper/ledger.py").unlink()
    assert [part.label for part in gpu.plan(root)] == ["part1-tests"]


def test_a_broken_adapter_is_not_taken_for_a_missing_one(root: Path) -> None:
    (root / "shrinkpaper/ledger.py").write_text("import a_module_that_is_not_there")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        gpu.plan(root)


def test_a_part_writes_records_that_can_be_filed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_part(gpu.plan(root)[1], root) == 0
    path = root / "out/part2-shrinkpaper-main-dense-float32.json"
    records = parse_records(path.read_text(), where=str(path))
    assert {(record.row, record.column) for record in records} == {
        (row, column) for row in ("dense", "small") for column in ("fps", "throughput_ips")
    }
    small = next(record for record in records if record.row == "small" and record.column == "throughput_ips")
    assert small.ratio is not None
    assert small.reference_row == "main/dense"
    assert (small.batch_size, small.dtype, small.resolution) == (2, "float32", 16)
    assert small.origin is not None
    assert small.origin.part == "part2-shrinkpaper-main-dense-float32"
    words = "--part 2 --rounds 2 --columns fps throughput_ips --output DIR --device cpu -b 2"
    assert small.origin.command == f"python -m common.gpu {words}"
    assert "main/small fps: " in capsys.readouterr().out
    assert add(path, root=root)[0].parent == root / "shrinkpaper/results"
    assert len(load_records("shrinkpaper", root=root)) == 4


def test_processor_time_counts_what_one_thread_computes(root: Path) -> None:
    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    options = {"limit_s": 60, "rounds": 2, "batch_size": None, "columns": ["fps"], "processor_time": True}
    assert gpu.run_part(gpu.plan(root)[1], output=root / "out", device=cpu, root=root, **options) == 0
    assert torch.get_num_threads() == threads  # main, not run_part, sets it
    path = root / "out/part2-shrinkpaper-main-dense-float32.json"
    small, dense = parse_records(path.read_text(), where=str(path))
    assert small.ratio is not None
    assert dense.value > 0
    assert small.origin is not None
    assert small.origin.command.endswith("--device cpu --processor-time")
    assert small.origin.device["timing"] == "processor time, 1 thread"


def test_processor_time_is_refused_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.parse_args(["--output", "out", "--processor-time"])
    assert "--processor-time: a GPU's work does not count" in capsys.readouterr().err


def test_what_the_limit_leaves_out_is_said(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_part(gpu.plan(root)[2], root, limit_s=-1) == 1
    content = json.loads((root / "out/part3-shrinkpaper-main-dense-bfloat16.json").read_text())
    assert content["records"] == []
    assert content["left_out"] == [f"main/small {column}: the time limit was near" for column in gpu.COLUMNS]
    assert "left out: main/small throughput_ips" in capsys.readouterr().out


def test_a_part_runs_in_its_precision(root: Path) -> None:
    assert run_part(gpu.plan(root)[2], root) == 0
    content = json.loads((root / "out/part3-shrinkpaper-main-dense-bfloat16.json").read_text())
    assert {record["dtype"] for record in content["records"]} == {"bfloat16"}


def test_the_tests_part_runs_only_marked_tests(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tests, *_) = gpu.plan(root)
    assert run_part(tests, root) == 0
    content = json.loads((root / "out/part1-tests.json").read_text())
    assert content["tests"]["status"] == 0
    assert "1 passed" in content["tests"]["summary"]
    assert add(root / "out/part1-tests.json", root=root) == []
    (root / "shrinkpaper/tests/test_kernel.py").write_text(GPU_TEST.format(outcome=False))
    assert run_part(tests, root) == 1
    assert "1 failed" in capsys.readouterr().out
    assert json.loads((root / "out/part1-tests.json").read_text())["tests"]["status"] == 1


def test_tests_that_all_skip_or_run_too_long_do_not_pass(root: Path) -> None:
    file = root / "shrinkpaper/tests/test_kernel.py"
    file.write_text(GPU_TEST.format(outcome="pytest.skip('no GPU')"))
    assert gpu.run_tests(60, root)[0] == 1
    file.write_text(GPU_TEST.format(outcome="__import__('time').sleep(60)"))
    status, text = gpu.run_tests(2, root)
    assert status == 124
    assert "stopped after 2 s" in text
    file.unlink()
    assert gpu.run_tests(60, root) == (1, "no test is marked gpu")


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "common.gpu", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("this machine has no CUDA device")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "--output DIR is missing"), (["--output", "x", "--rounds", "0"], "--rounds must be positive, got 0")],
)
def test_wrong_flags(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(words)
    assert message in capsys.readouterr().err


def test_a_part_that_does_not_exist(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "plan", lambda: [gpu.Part(1, "tests")])
    assert gpu.main(["--output", "x", "--part", "7", "--device", "cpu"]) == 2
    assert "there is no part 7; there are 1 to 1" in capsys.readouterr().err
