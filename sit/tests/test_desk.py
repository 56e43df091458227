"""The desk experiment: flags that the trainer takes, and a short run of it from training to table."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sit import desk, main


@pytest.mark.parametrize("job", desk.RUNS, ids=lambda job: job.name)
def test_words_are_flags_of_the_trainer(job, tmp_path: Path):
    args = main.parse_args(desk.words_of(job, tmp_path))
    assert args.data_set == "digits"
    assert bool(args.finetune) is job.taught
    if job.name.startswith("frd"):
        assert (args.lambda_token, args.lambda_logits) == (2.0, 2.0)
    elif job.ratio:
        assert (args.lambda_token, args.lambda_logits) == (0.0, 0.0)


@pytest.fixture
def short(monkeypatch):
    """A teacher and one student, one epoch each, in large batches."""
    kept = [job for job in desk.RUNS if job.name in ("teacher", "frd-0.5")]
    quick = "--epochs 1 --linear-warmup 0 --batch-size 360"
    monkeypatch.setattr(desk, "RUNS", [replace(job, words=f"{job.words} {quick}") for job in kept])
    monkeypatch.setattr(desk, "EXPECTED_PERCENT", 0)
    monkeypatch.setattr(desk, "ROUNDS", 1)
    monkeypatch.setattr(desk, "WARMUP", 0)
    monkeypatch.setitem(desk.BATCH, "cpu", 4)


@pytest.mark.slow
def test_a_short_run_gives_a_table_and_is_not_repeated(short, tmp_path: Path, monkeypatch, capsys):
    table = desk.run(tmp_path, device="cpu", force=False, progress=False)
    assert capsys.readouterr().out == ""  # the ledger prints JSON there
    teacher, student = table.rows
    assert teacher["tokens"] == "64"
    assert student["tokens"] == "64 32 16 8"
    assert (teacher["flops_ratio"], teacher["speedup"]) == (1, 1)
    assert student["flops_ratio"] == pytest.approx(teacher["mmacs"] / student["mmacs"], abs=0.01)
    assert student["realised"] == pytest.approx(student["speedup"] / student["flops_ratio"], abs=0.01)
    assert 0 <= student["top1_percent"] <= 100

    def never(words):
        raise AssertionError("trained again although nothing changed")

    monkeypatch.setattr(main, "main", never)
    again = desk.run(tmp_path, device="cpu", force=False, progress=False)
    assert [row["top1_percent"] for row in again.rows] == [row["top1_percent"] for row in table.rows]
    torch.save({}, tmp_path / "teacher" / "checkpoint.pth")
    with pytest.raises(AssertionError, match="trained again"):  # a file that was changed is
        desk.run(tmp_path, device="cpu", force=False, progress=False)


def test_a_teacher_that_did_not_learn_stops_it(short, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(desk, "EXPECTED_PERCENT", 101)
    monkeypatch.setattr(main, "main", lambda words: (tmp_path / "teacher").mkdir() or _saved(tmp_path))
    with pytest.raises(RuntimeError, match="expected 101 %"):
        desk.train(desk.RUNS[0], tmp_path, torch.device("cpu"), force=False, progress=False)


def _saved(folder: Path) -> dict[str, float]:
    (folder / "teacher" / "checkpoint.pth").write_bytes(b"x")
    return {"test_acc1": 50.0}
