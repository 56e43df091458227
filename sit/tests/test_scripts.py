"""The scripts of the runs: the published flags, read by the real parser, and two processes from start to end."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from common.run.files import ROOT
from common.run.launch import shutdown
from common.tests.forks import run_forked, torchrun_variables
from sit import main
from sit.tests.tools import SCRIPTS, SMALL, miniature_imagenet, words_of

RUNS = ("sit_lvvit_tiny", "sit_lvvit_xsmall", "sit_lvvit_small", "sit_lvvit_medium", "sit_lvvit_large")
PUBLISHED = {
    "batch_size": 128, "epochs": 125, "lr": 2e-4, "distillation_type": "frd", "lambda_token": 2.0,
    "lambda_logits": 2.0, "cooldown_epochs": 10, "min_lr": 1e-5, "weight_decay": 0.05, "mixup": 0.8, "cutmix": 1.0,
    "smoothing": 0.1, "reprob": 0.25, "repeated_aug": True, "distillation_tau": 1.0, "clip_grad": None,
}  # fmt: skip
OF_LARGE = {"input_size": 288, "drop_path": 0.3, "aa": "rand-n3-m9-mstd0.5-inc1"}
SET = {"DATA": "imagenet", "TEACHER": "teacher.pth", "CHECKPOINT": "checkpoint.pth", "MODEL": "sit_lvvit_small"}


def test_there_is_a_script_for_every_run():
    names = {str(script.relative_to(ROOT / "sit" / "exp")) for script in SCRIPTS}
    assert names == {f"{run}/{kind}.sh" for run in (*RUNS, "teacher") for kind in ("train", "test")}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: f"{script.parent.name}/{script.stem}")
def test_words_of_a_script_are_the_published_ones(script: Path, tmp_path: Path, capsys) -> None:
    args = main.parse_args(words_of(script, SET | {"OUTPUT": str(tmp_path)}, "--seed", "7"))
    run = script.parent.name
    assert args.output_dir == str(tmp_path)
    assert args.eval is (script.stem == "test")
    assert args.seed == 7  # what is added behind a script
    if run == "teacher":
        assert (args.model, args.distillation_type) == ("sit_lvvit_small", "none")
        return
    warnings = capsys.readouterr().err
    assert "--warmup-epochs has no effect" in warnings
    assert "--dist-eval has no effect" in warnings
    drop_path = 0.0 if run == "sit_lvvit_tiny" else 0.1
    expected = PUBLISHED | {"model": run, "input_size": 224, "drop_path": drop_path, "aa": "rand-m9-mstd0.5-inc1"}
    expected |= OF_LARGE if run == "sit_lvvit_large" else {}
    if script.stem == "train":
        expected |= {"teacher_model": run, "teacher_path": "teacher.pth", "finetune": "teacher.pth"}
    else:
        expected |= {"finetune": "checkpoint.pth"}
    assert {name: getattr(args, name) for name in expected} == expected


def test_a_script_without_its_variables_says_what_they_are():
    done = subprocess.run(["bash", str(SCRIPTS[0])], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: DATA is not set: the folder that holds" in done.stderr
    assert "bash sit/exp/" in done.stderr


def shell(script: str, environment: dict[str, str], *more: str) -> str:
    """A script with two processes, as a user starts it; what it printed."""
    variables = os.environ | {"PYTHON": sys.executable, "NPROC": "2", "OMP_NUM_THREADS": "1"} | environment
    command = ["bash", str(ROOT / "sit" / "exp" / script), *more]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a miniature ImageNet and a small teacher."""
    folder = tmp_path_factory.mktemp("runs")
    miniature_imagenet(folder / "imagenet")
    words = words_of(ROOT / "sit/exp/teacher/train.sh", SET | {"DATA": str(folder / "imagenet")}, *SMALL)
    words += ["--output_dir", str(folder / "teacher"), "--distillation-type", "none"]
    (ended,) = run_forked(partial(main.main, words), timeout_s=120)
    assert ended.status == 0, ended.output
    return folder


@pytest.mark.slow
def test_a_student_from_start_to_end_under_both_launchers(runs: Path) -> None:
    """Two Gloo processes through torchrun, then torch.distributed.launch: the table's number is the last line."""
    variables = {
        "DATA": str(runs / "imagenet"),
        "TEACHER": str(runs / "teacher" / "checkpoint.pth"),
        "CHECKPOINT": str(runs / "tiny" / "checkpoint.pth"),
    }
    printed = shell("sit_lvvit_tiny/train.sh", variables | {"OUTPUT": str(runs / "tiny")}, *SMALL)
    assert "## Using lr  " in printed
    assert "rtsm.1 to rtsm.7 (84 keys), tsm.0 to tsm.2 (21 keys)" in printed
    assert "Epoch: [0]  [0/2]  eta: " in printed
    (row,) = [json.loads(line) for line in (runs / "tiny" / "log.txt").read_text().splitlines()]
    assert row["train_loss"] == pytest.approx(
        row["train_loss_cls"] + row["train_loss_token"] + row["train_loss_logits"] + row["train_loss_cnn"]
    )
    assert row["train_loss_token"] > 0
    assert row["n_parameters"] > 0
    variables |= {"OUTPUT": str(runs / "tested"), "LAUNCHER": "torch.distributed.launch"}
    printed = shell("sit_lvvit_tiny/test.sh", variables, *SMALL)
    assert printed.splitlines()[-1] == f"Accuracy of the network on the 9 test images: {row['test_acc1']:.1f}%"
    result = json.loads((runs / "tested" / "results.json").read_text())["result"]
    assert result["images"] == 9
    assert result["acc1"] == pytest.approx(row["test_acc1"])
    assert "* Acc@1" in (runs / "tested" / "console.txt").read_text()


def both(run: str, folder: Path, words: list[str], output: Path) -> tuple[float, dict]:
    """Train and test the words of a run's scripts, in this process's place among two."""
    variables = {"DATA": str(folder / "imagenet"), "TEACHER": str(folder / "teacher" / "checkpoint.pth")}
    train = words_of(ROOT / f"sit/exp/{run}/train.sh", variables, *words, "--output_dir", str(output))
    row = main.main(train)
    torch.distributed.barrier()
    shutdown()
    variables["CHECKPOINT"] = str(output / "checkpoint.pth")
    test = words_of(ROOT / f"sit/exp/{run}/test.sh", variables, *words, "--output_dir", str(output / "test"))
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    return row["test_acc1"], main.main(test)


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS[1:])
def test_the_other_runs_with_two_processes(run: str, runs: Path) -> None:
    """The words of the two scripts, in two Gloo processes."""
    work = partial(both, run, runs, SMALL, runs / run)
    ended = run_forked(work, torchrun_variables(2), timeout_s=200)
    assert [end.status for end in ended] == [0, 0], ended[0].output + ended[1].output
    trained, tested = ended[0].result
    assert tested["acc1"] == pytest.approx(trained)
    assert tested["images"] == 9
    assert ended[0].result == ended[1].result
    content = torch.load(runs / run / "checkpoint.pth", weights_only=True)
    assert content["args"]["model"] == "sit_lvvit_desk"  # what the test put in place of the published size
    assert content["epoch"] == 0
