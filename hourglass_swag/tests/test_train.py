"""The trainer, as a user starts it: it learns, goes on after a kill with the same weights, and feeds the evaluation."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common.run.errors import UsageError
from common.run.files import ROOT
from hourglass_swag import imagenet_1k_eval, train

FLAGS = ["-m", "vit_desk", "--data-set", "digits", "--device", "cpu", "--batch-size", "400", "--warmup-epochs", "0"]


def start(folder: Path, *more: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """The script in a process of its own."""
    command = [sys.executable, *launcher, "hourglass_swag/train.py", *FLAGS, "--output-dir", str(folder), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for it; what it printed on stderr."""
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return errors


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "weights.pth", weights_only=True)


def epochs(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == "epoch"]


@pytest.mark.slow
def test_killed_and_resumed_is_bit_identical(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = ("--epochs", "2", "--cooldown-epochs", "0", "--mixup", "0.8", "--save-every-steps", "1")
    finish(start(whole, *flags))
    process = start(broken, *flags)
    while process.poll() is None and not (broken / "last.pth").exists():
        time.sleep(0.05)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (broken / "weights.pth").exists()
    assert "resumed from" in finish(start(broken, *flags, "--resume", "auto"))
    expected, found = weights(whole), weights(broken)
    assert list(expected) == list(found)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert [row["train_loss"] for row in epochs(whole)] == [row["train_loss"] for row in epochs(broken)]


@pytest.mark.slow
def test_two_processes_train_and_their_weights_evaluate(tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    finish(start(tmp_path, "--epochs", "1", "--cooldown-epochs", "0", launcher=launcher))
    (row,) = epochs(tmp_path)
    assert row["test_images"] == 360
    assert row["train_images"] == 1 * 2 * 400  # one step of two processes, the rest does not fill a batch
    words = ["-m", "hourglass_vit_desk", "-r", "32", "-l", "3", "-n", "25", "--dataset", "digits", "-j", "0"]
    result = imagenet_1k_eval.main([*words, "--weights", str(tmp_path / "weights.pth"), "--device", "cpu"])
    assert result["images"] == 360


def test_recipe_gives_way_to_flags() -> None:
    assert train.parse_args(["-m", "vit_desk"]).epochs == 36
    assert train.parse_args(["-m", "vit_desk", "--epochs", "2"]).epochs == 2
    assert train.parse_args(["-m", "vit_b16_in1k"]).epochs == 300


def test_a_missing_folder_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match="nowhere"):
        train.main(["-m", "vit_desk", "--data-set", "IMNET", "--data-path", "nowhere", "--device", "cpu"])


def test_a_size_that_patches_do_not_fill_and_an_output_that_is_a_file_are_refused(tmp_path: Path) -> None:
    words = ["-m", "vit_desk", "--data-set", "digits", "--device", "cpu"]
    with pytest.raises(UsageError, match=r"--resolution 33: .*nearest are 32, 36"):
        train.main([*words, "-r", "33"])
    (tmp_path / "file").write_text("kept")
    for folder in ("file", "file/inside"):
        with pytest.raises(UsageError, match=r"no place for the output: .*file is a file, not a folder; name another"):
            train.main([*words, "--output-dir", str(tmp_path / folder)])
    assert (tmp_path / "file").read_text() == "kept"
