"""The Slurm script on submitit's local executor: two processes, pre-empted, queued again, resumed to the end."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from common.run.errors import UsageError
from sit import run_with_submitit as script
from sit.models.lvvit import build_lvvit
from sit.tests.tools import SMALL, miniature_imagenet

submitit = pytest.importorskip("submitit", reason="submitit is not installed: pip install 'leanvit[slurm]'")


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    imagenet = miniature_imagenet(tmp_path / "imagenet")
    teacher = build_lvvit("sit_lvvit_desk", distillation_type=None, num_classes=3)
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
    file = str(tmp_path / "teacher.pth")
    more = ["--data-path", str(imagenet), "--teacher-path", file, "--finetune", file, "--save-every-steps", "1"]
    return [*SMALL, *more, "--cluster", "local", "--ngpus", "2"]


def processes(parent: int) -> list[Path]:
    """Folders in /proc of the processes below one."""
    try:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except OSError:  # it ended meanwhile
        return []
    return [place for child in children for place in (Path("/proc", child), *processes(int(child)))]


def preempt(job) -> None:
    """Send what Slurm sends before the time is up to the first process of a job of the local executor."""
    for place in processes(job._process.pid):
        if b"SUBMITIT_LOCAL_GLOBALID=0\0" in (place / "environ").read_bytes():
            os.kill(int(place.name), signal.SIGUSR2)
            return
    raise AssertionError("the job has no first process")


@pytest.mark.slow
def test_a_preempted_job_queues_again_and_resumes(words: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    job = script.main([*words, "--shared-dir", str(tmp_path / "shared"), "--batch-size", "2", "--epochs", "4"])
    folder = tmp_path / "shared" / job.job_id
    deadline = time.monotonic() + 200
    while not (folder / "checkpoint.pth").exists():
        assert time.monotonic() < deadline, "no checkpoint"
        assert not job.done(), job.stderr()
        time.sleep(0.1)
    preempt(job)
    first, second = job.results()
    printed = job.stdout() + job.stderr()
    assert "queueing again, resuming" in printed
    assert "resumed from" in printed
    assert first["epoch"] == 3
    assert first["test_acc1"] == second["test_acc1"]
    rows = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(4))


def test_a_failure_is_reported_as_one(words: list[str], tmp_path: Path, monkeypatch) -> None:
    """In the place of a job of one process: a missing teacher is an exception, which submitit hands on."""
    place = {"JOB_ID": "12", "NTASKS": "1", "JOB_NUM_NODES": "1", "NODEID": "0", "GLOBALID": "0", "LOCALID": "0"}
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    for name, value in place.items():
        monkeypatch.setenv(f"SUBMITIT_LOCAL_{name}", value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # so that what the job sets is put back
    args = script.parse_args([*words, "--teacher-path", "nowhere.pth", "--output_dir", str(tmp_path / "%j")])
    with pytest.raises(RuntimeError, match=r"nowhere\.pth: no such file"):
        script.Trainer(args)()
    assert not (tmp_path / "12").exists(), "a mistake leaves nothing"


def test_folders(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(script, "PUBLISHED_SHARED", tmp_path / "nothing")
    with pytest.raises(UsageError, match="give --shared-dir DIR, or --job_dir DIR"):
        script.job_folder(script.parse_args([]))
    assert script.job_folder(script.parse_args(["--job_dir", "a/%j"])) == Path("a/%j")
    assert script.job_folder(script.parse_args(["--shared-dir", "b"])) == Path("b/%j")
    (tmp_path / "nothing").mkdir()
    monkeypatch.setenv("USER", "someone")
    assert script.job_folder(script.parse_args([])) == tmp_path / "nothing" / "someone" / "experiments" / "%j"


def test_published_defaults() -> None:
    args = script.parse_args([])
    assert (args.ngpus, args.nodes, args.timeout, args.partition) == (8, 2, 2800, "learnfair")
    assert args.epochs == 300
