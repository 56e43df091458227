"""The GPU job, tried out on the CPU with a small paper of its own, and its honest failure without a GPU."""

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common import gpu as command
from common.ledger import gpu
from common.ledger.results import RecordError, add, load_records, parse
from common.ledger.speeds import measure_rows
from common.run.files import ROOT

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
from common.ledger.tables import NotImplementedYet
WIDTHS = {"dense": 64, "small": 4}
def build(row):
    if row.id not in WIDTHS:
        raise NotImplementedYet(row.id)
    return nn.Conv2d(3, WIDTHS[row.id], 3), 16
def speeds(rows, *, columns, device, progress):
    return {}
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


def run(root: Path, *words: str) -> int:
    argv = ["--output", str(root / "out"), "--device", "cpu", "--rounds", "2", "-b", "2", *words]
    return command.main(argv, root)


def read(root: Path) -> dict:
    return json.loads((root / "out/gpu.json").read_text())


def test_the_steps_are_the_tests_then_each_way_of_each_group_of_rows(root: Path) -> None:
    steps = gpu.plan(root)
    assert [step.name for step in steps] == [
        "tests",
        "shrinkpaper-main-dense-throughput_ips-bfloat16",
        "shrinkpaper-main-dense-fps-bfloat16",
        "shrinkpaper-main-dense-fps-bfloat16-graph",
        "shrinkpaper-main-dense-throughput_ips-float32",
        "shrinkpaper-main-dense-fps-float32",
        "shrinkpaper-main-dense-fps-bfloat16-compiled",
    ]
    assert [[row.id for row in step.rows] for step in steps] == [[], *[["small"]] * 6]
    assert len(gpu.plan(root, together=False)) == 5


def test_a_paper_without_an_adapter_has_no_steps(root: Path) -> None:
    (root / "shrinkpaper/ledger.py").unlink()
    assert [step.name for step in gpu.plan(root)] == ["tests"]


def test_a_broken_adapter_is_not_taken_for_a_missing_one(root: Path) -> None:
    (root / "shrinkpaper/ledger.py").write_text("import a_module_that_is_not_there")
    with pytest.raises(ImportError, match="a_module_that_is_not_there"):
        gpu.plan(root)


def test_one_file_holds_records_that_can_be_filed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(root, "--only", "*float32") == 0
    path = root / "out/gpu.json"
    records = parse(path.read_text(), where=str(path))[1]
    assert {(record.row, record.column) for record in records} == {
        (row, column) for row in ("dense", "small") for column in ("fps", "throughput_ips")
    }
    small = next(record for record in records if record.row == "small" and record.column == "throughput_ips")
    assert small.ratio is not None
    assert small.reference_row == "main/dense"
    assert (small.batch_size, small.dtype, small.resolution) == (2, "float32", 16)
    assert small.origin.part == "gpu"
    words = "--output DIR --device cpu --rounds 2 -b 2 --only *float32"
    assert small.origin.command == f"python -m common.gpu {words}"
    assert "main/small fps: " in capsys.readouterr().out
    assert add(path, root=root)[0].parent == root / "shrinkpaper/results"
    assert len(load_records("shrinkpaper", root=root)) == 4


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_rows_that_share_a_dense_row_take_turns(root: Path, mode: str) -> None:
    (step,) = [step for step in gpu.plan(root) if step.name.endswith("fps-float32")]
    adapter = gpu.find_adapter("shrinkpaper")
    options = {"device": torch.device("cpu"), "columns": ["fps"], "mode": mode, "rounds": 2, "root": root}
    run = measure_rows(step.rows, adapter.build, together=True, **options)
    assert {(record.row, record.ratio is None) for record in run.records} == {("dense", True), ("small", False)}
    assert {record.compiled for record in run.records} == {mode == "compiled"}


def test_a_network_that_fails_leaves_the_others(root: Path) -> None:
    (step,) = [step for step in gpu.plan(root) if step.name.endswith("fps-float32")]

    def build(row):
        if row.id == "small":
            raise RuntimeError("this one does not run")
        return torch.nn.Conv2d(3, 2, 3), 16

    options = {"device": torch.device("cpu"), "columns": ["fps"], "rounds": 2, "root": root}
    run = measure_rows(step.rows, build, together=True, **options)
    assert [record.row for record in run.records] == ["dense"]
    assert run.left_out == ["main/small fps: RuntimeError: this one does not run"]


def test_processor_time_counts_what_one_thread_computes(root: Path) -> None:
    threads = torch.get_num_threads()
    try:
        assert run(root, "--only", "*fps-float32", "--processor-time") == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    dense, small = sorted(read(root)["records"], key=lambda record: record["row"])
    assert small["ratio"] is not None
    assert dense["value"] > 0
    assert read(root)["command"].endswith("--processor-time")
    assert read(root)["device"]["timing"] == "processor time, 1 thread"


def test_processor_time_is_refused_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse_args(["--output", "out", "--processor-time"])
    assert "--processor-time: a GPU's work does not count" in capsys.readouterr().err


def test_what_the_budget_leaves_out_is_said(root: Path) -> None:
    assert run(root, "--only", "*bfloat16", "--budget-s", "0.001") == 0
    assert read(root)["records"] == []
    assert read(root)["left_out"] == [
        f"shrinkpaper-main-main-dense-{column}-bfloat16: the budget of 0.001 s was spent"
        for column in ("throughput_ips", "fps")
    ]


def test_a_step_runs_in_its_precision(root: Path) -> None:
    assert run(root, "--only", "*bfloat16") == 0
    assert {record["dtype"] for record in read(root)["records"]} == {"bfloat16"}


def test_programs_put_what_they_write_into_the_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "shrinkpaper/speed.py").write_text("import sys; open(sys.argv[1], 'w').write('[1]')")
    (root / "shrinkpaper/broken.py").write_text("raise SystemExit('it broke')")
    programs = {f"shrinkpaper/{name}": f"{root}/shrinkpaper/{name}.py {{output}}" for name in ("speed", "broken")}
    monkeypatch.setattr(gpu, "PROGRAMS", programs)
    steps = [step for step in gpu.plan(root) if step.program]
    origin = gpu.results.Origin(gpu.results.now(), "abc", gpu.describe_device("cpu"), "command")
    job = gpu.Job(root / "out/gpu.json", origin, torch.device("cpu"), rounds=2, batch_size=2, root=root)
    assert [job.do(step, 60) for step in steps] == [True, False]
    (root / "shrinkpaper/speed.py").write_text("import sys, time; open(sys.argv[1], 'w').write('[1]'); time.sleep(60)")
    assert job.do(steps[0], 2)  # stopped when it had written something
    assert read(root)["programs"] == {"shrinkpaper/speed": [1]}
    assert read(root)["left_out"] == ["shrinkpaper/broken: it broke"]
    assert run(root, "--only", "*fps-float32") == 0
    (root / "out/gpu.json").write_text(json.dumps(read(root) | {"programs": {"shrinkpaper/speed": [1]}}))
    (path,) = add(root / "out/gpu.json", root=root)
    assert json.loads(path.read_text())["programs"] == {"shrinkpaper/speed": [1]}
    (root / "out/gpu.json").write_text(json.dumps(read(root) | {"programs": {"other/speed": [1]}}))
    with pytest.raises(RecordError, match=r"programs of \['other'\], which is no paper"):
        add(root / "out/gpu.json", root=root)


def test_the_tests_step_runs_only_marked_tests(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(root, "--only", "tests") == 0
    content = read(root)
    assert content["tests"]["status"] == 0
    assert "1 passed" in content["tests"]["summary"]
    assert add(root / "out/gpu.json", root=root) == []
    (root / "shrinkpaper/tests/test_kernel.py").write_text(GPU_TEST.format(outcome=False))
    assert run(root, "--only", "tests") == 1
    assert "1 failed" in capsys.readouterr().out
    assert read(root)["tests"]["status"] == 1


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
    words = [sys.executable, "-m", "common.gpu", "--output", str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 2
    assert re.match(r"error: --device cuda: .*; use --device cpu", done.stderr.splitlines()[-1])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--output DIR is missing"),
        (["--output", "x", "--rounds", "0"], "--rounds must be positive, got 0"),
        (["--output", "x", "--device", "banana"], "--device must be cpu, cuda or cuda:N, got 'banana'"),
        (["--output", "FILE"], "--output: FILE is a file, not a folder"),
        (["--output", "FILE/below"], "--output: FILE is a file, not a folder"),
    ],
)
def test_wrong_flags(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit) as caught:
        command.main([word.replace("FILE", str(file)) for word in words])
    assert caught.value.code == 2
    assert message.replace("FILE", str(file)) in capsys.readouterr().err


def test_a_rehearsal_goes_through_every_step_and_is_not_filed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "shrinkpaper/speed.py").write_text("import argparse\nparse_args = argparse.ArgumentParser().parse_args")
    monkeypatch.setattr(gpu, "PROGRAMS", {"shrinkpaper/speed": "-m shrinkpaper.speed"})
    assert command.main(["--output", str(root / "out"), "--rehearse", "--rounds", "1"], root) == 0
    content = read(root)
    assert content["rehearsal"]
    assert content["left_out"] == []
    assert content["tests"]["status"] == 0
    assert list(content["programs"]) == ["shrinkpaper/speed"]
    steps = [step for step in gpu.plan(root) if step.rows]
    assert len(content["records"]) == 2 * len(steps), "dense and small, each way"
    with pytest.raises(RecordError, match="is a rehearsal"):
        add(root / "out/gpu.json", root=root)
    monkeypatch.setattr(gpu, "PROGRAMS", {"shrinkpaper/speed": "-m shrinkpaper.speed --no-such-flag"})
    assert command.main(["--output", str(root / "out"), "--rehearse", "--only", "*/speed"], root) == 1


def test_the_plan_of_the_papers_is_rehearsed(tmp_path: Path) -> None:
    """The real one, without the collection of the tests, which takes long and runs with every run of the suite."""
    words = ["--output", str(tmp_path), "--rehearse", "--rounds", "1", "--only", "[!t]*"]
    assert command.main(words) == 0
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["left_out"] == []
    assert {"hourglass_swag", "sit"} <= {record["paper"] for record in content["records"]}
    assert set(content["programs"]) == {*gpu.PROGRAMS, *(f"{paper}/evidence" for paper in gpu.papers())}


def test_a_step_that_does_not_exist(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(root, "--only", "nothing*") == 2
    assert "no step matches ['nothing*']; --list names the 5 steps" in capsys.readouterr().err
