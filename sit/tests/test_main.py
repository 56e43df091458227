"""Training and evaluation through the entry point: resume, average of the weights, other teachers, and bad input."""

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from timm.models._factory import create_model

from common.data.loaders import DataError
from common.run.build import build_optimizer
from common.run.errors import CheckpointError, UsageError
from common.run.program import run
from common.run.settings import OptimizerSettings
from common.tests.forks import run_forked
from common.tests.jobs import digest
from sit import build, engine, main
from sit.arguments import Job
from sit.tests.tools import SMALL, miniature_imagenet


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images, and files of a small teacher and student with random weights."""
    folder = tmp_path_factory.mktemp("main")
    miniature_imagenet(folder / "imagenet")
    torch.manual_seed(0)
    for name, kind in (("teacher", None), ("student", "frd")):
        model = create_model("sit_lvvit_desk", distillation_type=kind, num_classes=3)
        torch.save({"model": model.state_dict()}, folder / f"{name}.pth")
    return folder


def words(folder: Path, *more: str) -> list[str]:
    teacher = str(folder / "teacher.pth")
    data = ["--data-path", str(folder / "imagenet"), "--teacher-path", teacher, "--finetune", teacher]
    return [*SMALL, *data, "--print-freq", "0", *more]


def state_of(path: Path) -> str:
    content = torch.load(path, weights_only=True)
    kept = {key: content[key] for key in ("model", "model_ema", "optimizer", "epoch", "progress")}
    kept["progress"].pop("seconds")
    return digest(kept)


@pytest.mark.slow
def test_killed_and_resumed_is_bit_identical(folder: Path, tmp_path: Path) -> None:
    """Weights, average, moments and log; killed in the middle of an epoch, with dropout, drop path and mixup on."""
    more = ["--epochs", "2", "--save-every-steps", "1", "--model-ema", "--model-ema-decay", "0.9", "--drop", "0.1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    first = partial(main.main, words(folder, *more, "--output_dir", str(whole)))
    (ended,) = run_forked(first, timeout_s=120)
    assert ended.status == 0, ended.output
    second = partial(main.main, words(folder, *more, "--output_dir", str(broken)))
    (ended,) = run_forked(second, kill_when=(broken / "checkpoint.pth").exists)
    assert ended.status == -9, ended.output
    assert not (broken / "log.txt").exists()
    resumed = partial(main.main, words(folder, *more, "--output_dir", str(broken), "--resume", "auto"))
    (ended,) = run_forked(resumed, timeout_s=120)
    assert ended.status == 0, ended.output
    assert "resumed from" in ended.output
    assert state_of(broken / "checkpoint.pth") == state_of(whole / "checkpoint.pth")
    assert (broken / "log.txt").read_text() == (whole / "log.txt").read_text()
    assert "test_ema_acc1" in (whole / "log.jsonl").read_text()
    average = words(folder, "--eval", "--finetune", str(whole / "checkpoint.pth"), "--finetune-key", "model_ema")
    rows = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert main.main(average)["loss"] == pytest.approx(rows[-1]["test_ema_loss"], rel=1e-5)


def test_a_published_training_file_resumes(folder: Path, tmp_path: Path) -> None:
    """The trainer's own layout: a Namespace, no progress; continued at its next epoch, and the next one is recorded."""
    import argparse

    model = create_model("sit_lvvit_desk", distillation_type="frd", num_classes=3)
    args = main.parse_args(words(folder))
    optimizer = build_optimizer(engine.get_param_groups(model, 0.05), OptimizerSettings.of(args))
    sum(value.sum() for value in model.parameters() if value.requires_grad).backward()  # pyright: ignore
    optimizer.step()
    content = {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 4, "scaler": {},
        "args": argparse.Namespace(output_dir=Path("x")),
    }  # fmt: skip
    torch.save(content, tmp_path / "official.pth")
    out = tmp_path / "out"
    main.main(words(folder, "--epochs", "6", "--resume", str(tmp_path / "official.pth"), "--output_dir", str(out)))
    (row,) = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    assert row["epoch"] == 5
    assert torch.load(out / "checkpoint.pth", weights_only=True)["optimizer"]["state"][0]["step"] == 5


def test_a_cnn_teacher_trains_its_token(folder: Path, tmp_path: Path) -> None:
    """And its weight counts: with 0 the term is zero and the token does not learn."""
    torch.save(
        {"model": create_model("resnet10t", num_classes=3, global_pool="avg").state_dict()}, tmp_path / "cnn.pth"
    )
    more = ["--extra-teacher-model", "resnet10t", "--extra-teacher-path", str(tmp_path / "cnn.pth")]
    row = main.main(words(folder, *more, "--output_dir", str(tmp_path / "out")))
    assert row["train_loss_cnn"] > 0
    half = main.main(words(folder, *more, "--lambda-cnn", "0"))
    assert half["train_loss_cnn"] == 0
    result = main.main(words(folder, *more, "--eval", "--finetune", str(tmp_path / "out" / "checkpoint.pth")))
    assert result["acc1"] == pytest.approx(row["test_acc1"])


def test_without_a_token_weight_the_reverse_modules_rest(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    row = main.main(words(folder, "--lambda-token", "0", "--output_dir", str(out)))
    assert row["train_loss_token"] == 0
    assert row["train_loss_logits"] > 0
    assert row["train_loss"] == pytest.approx(row["train_loss_cls"] + row["train_loss_logits"])


def test_rates_are_the_published_ones(folder: Path, tmp_path: Path) -> None:
    """A cosine of one epoch: the scaled rate, five times that for the reverse modules; then --min-lr."""
    out = tmp_path / "out"
    more = ["--cooldown-epochs", "1", "--min-lr", "1e-6", "--lr", "1e-2"]
    main.main(words(folder, *more, "--output_dir", str(out)))
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    rates = [(row["train_lr_backbone"], row["train_lr_rtsm"]) for row in rows if row["event"] == "epoch"]
    peak = 1e-2 * 4 / 512
    assert rates[0] == pytest.approx((peak, 5 * peak))
    assert rates[1] == pytest.approx((1e-6, 1e-6))


def test_another_size_is_evaluated_with_resized_positions(folder: Path) -> None:
    """A slimmed file of 64 patches at 256: its modules still put out 32, 16 and 8 tokens; training on is refused."""
    more = ["--input-size", "64", "--finetune", str(folder / "student.pth")]
    assert main.main(words(folder, *more, "--eval"))["images"] == 9
    with pytest.raises(CheckpointError, match="put out"):
        main.main(words(folder, *more))


BAD = [
    (["--distillation-type", "frd", "--teacher-path", ""], UsageError, "--teacher-path FILE"),
    (["--batch-size", "3"], UsageError, "--batch-size 3 must be even"),
    (["--extra-teacher-model", "resnet10t"], UsageError, "--extra-teacher-path FILE"),
    (["--extra-teacher-model", "x", "--distillation-type", "none"], UsageError, "needs --distillation-type frd"),
    (["--extra-teacher-model", "nonet", "--extra-teacher-path", "x"], UsageError, "timm.list_models"),
    (["--teacher-path", "nowhere.pth"], CheckpointError, r"nowhere\.pth: no such file"),
    (["--teacher-model", "sit_lvvit_tiny"], UsageError, "--teacher-model has 320 width, --model has 64"),
    (["--repeated-aug"], DataError, "--no-repeated-aug"),
    (["--data-path", "nowhere"], DataError, "data directory nowhere does not exist"),
    (["--eval", "--finetune", ""], UsageError, "--eval needs weights"),
    (["--input-size", "34"], UsageError, "patches of 4 pixels do not fill 34 pixels; give a multiple, such as 32"),
    (["--token-label-data", "x"], UsageError, "give --distillation-type none"),
]


@pytest.mark.parametrize(
    ("more", "error", "message"), BAD, ids=lambda value: "_".join(value) if isinstance(value, list) else None
)
def test_bad_flags_are_named(folder: Path, more: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        main.main(words(folder, *more))


def test_a_rate_below_the_smallest_is_announced(folder: Path, capsys) -> None:
    args = main.parse_args(words(folder, "--lr", "1e-5", "--min-lr", "1e-5"))
    build.check_flags(Job.of(args, processes=1, on_gpu=False))
    assert "is below --min-lr 1e-05: the rate will rise" in capsys.readouterr().err


def test_expected_errors_end_with_one_line(folder: Path, capfd) -> None:
    command = partial(_as_program, words(folder, "--teacher-path", ""))
    (ended,) = run_forked(command, timeout_s=60)
    assert ended.status == 2
    assert ended.output.strip().splitlines()[-1].startswith("error: training with --distillation-type frd needs")


def _as_program(argv: list[str]) -> None:
    os.environ.pop("RANK", None)
    run(lambda: main.main(argv))


def test_classes_are_those_of_the_data_and_a_replaced_head_is_announced(folder: Path, tmp_path: Path, capfd) -> None:
    """A folder of three classes: no network of 1000, from a file of 1000 classes; evaluation takes the file's."""
    wide = create_model("sit_lvvit_desk", distillation_type="none")
    torch.save({"model": wide.state_dict()}, tmp_path / "wide.pth")
    file = str(tmp_path / "wide.pth")
    free = [word for word in SMALL if word not in ("--num-classes", "3")]
    given = [*free, "--data-path", str(folder / "imagenet"), "--finetune", file, "--distillation-type", "none"]
    main.main([*given, "--print-freq", "0", "--output_dir", str(tmp_path / "out")])
    assert torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)["model"]["head.bias"].shape == (3,)
    printed = capfd.readouterr().err
    assert "the data set has 3 classes, not imagenet's 1000: so has the network" in printed
    assert "its head is for 1000 classes, the network for 3: the head was replaced" in printed
    assert main.main([*given, "--eval"])["images"] == 9
    assert "the data set has 3 classes and the network 1000" in capfd.readouterr().err
    teacher = ["--distillation-type", "frd", "--teacher-model", "sit_lvvit_desk", "--teacher-path", file]
    with pytest.raises(CheckpointError, match=r"its head is for 1000 classes, the network for 3.*--num-classes 1000"):
        main.main([*given, *teacher])


def test_the_total_of_the_epochs_is_said(folder: Path, capfd) -> None:
    main.main(words(folder, "--distillation-type", "none", "--cooldown-epochs", "2"))
    assert "3 epochs in all: 1 and 2 of cooldown" in capfd.readouterr().err
