"""The trainer: networks learn, go on exactly after a kill, read every kind of checkpoint, and refuse what is wrong."""

import argparse
import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from common.run import cli
from common.run.checkpoint import CheckpointError
from common.run.files import ROOT
from common.run.settings import OptimizerSettings
from common.tests.forks import Ended, free_port, run_forked
from dvt import build, main
from dvt.loading import load_network
from dvt.models import check_filled, create_model

DESK = ["--model", "DVT_desk", "--data-set", "IMNET", "--img-size", "32", "--num-classes", "6", "--epochs", "2",
        "--warmup-epochs", "0", "--cooldown-epochs", "0", "-j", "0", "--device", "cpu"]  # fmt: skip
SMALL = ["--num-classes", "6", "-j", "0", "--device", "cpu", "--epochs", "1", "--cooldown-epochs", "0", "-b", "2"]


def start(words: list[str], *launcher: str) -> subprocess.Popen[str]:
    """The script in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment = {key: value for key, value in environment.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, *launcher, "dvt/main.py", *words]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Wait for it; what it printed."""
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return printed, errors


def state_of(folder: Path) -> dict:
    return torch.load(folder / "last.pth.tar", weights_only=True)


def epochs(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == "epoch"]


def equal(first: object, second: object) -> bool:
    """Whether nested states agree bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)  # pyright: ignore[reportArgumentType]
    if isinstance(first, dict):
        return list(first) == list(second) and all(equal(first[key], second[key]) for key in first)  # pyright: ignore
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))  # pyright: ignore
    return first == second


def test_killed_and_resumed_is_bit_identical(imagenet: Path, tmp_path: Path) -> None:
    words = [str(imagenet), *DESK, "-b", "6", "--mixup", ".8", "--cutmix", "1", "--reprob", ".5", "--drop-path", ".2",
             "--recovery-interval", "1", "--output", str(tmp_path), "--resume", "auto", "--experiment"]  # fmt: skip
    whole, broken = (tmp_path / "train" / name for name in ("whole", "broken"))

    def ended(name: str, **options) -> Ended:
        (process,) = run_forked(lambda: main.main([*words, name]), timeout_s=200, **options)
        return process

    assert ended("whole").status == 0
    assert ended("broken", kill_when=(broken / "last.pth.tar").exists).status == -signal.SIGKILL
    assert len(epochs(broken)) < 2, "it ended before it could be killed"
    resumed = ended("broken")
    assert resumed.status == 0, resumed.output
    assert "resumed from" in resumed.output
    expected, found = state_of(whole), state_of(broken)
    for part in ("model", "model_ema", "optimizer", "lr_scheduler", "ranks"):
        assert equal(expected[part], found[part]), part
    assert [row["train_loss"] for row in epochs(whole)] == [row["train_loss"] for row in epochs(broken)]


@pytest.mark.slow
def test_two_processes_train_and_both_launchers_evaluate_alike(imagenet: Path, tmp_path: Path) -> None:
    """The published launch lines, on a small network: ``--b`` and ``--local_rank`` included."""
    words = [str(imagenet), *DESK, "--b", "4", "--epochs", "1"]
    run = start(
        [*words, "--amp", "--lr", "2e-3", "--weight-decay", ".03", "--output", str(tmp_path), "--experiment", "a"],
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
    )  # fmt: skip
    finish(run)
    (row,) = epochs(tmp_path / "train" / "a")
    assert row["train_images"] == 24
    assert row["test_images"] == 12
    state = state_of(tmp_path / "train" / "a")
    assert len(state["ranks"]) == 2
    assert (tmp_path / "train" / "a" / "model_best.pth.tar").exists()
    evaluation = [*words, "--amp", "--eval_checkpoint", str(tmp_path / "train" / "a" / "last.pth.tar")]
    legacy = ("-m", "torch.distributed.launch", "--nproc_per_node=2", f"--master_port={free_port()}")
    printed, _ = finish(start(evaluation, *legacy))
    numbers = dict(re.findall(r"(\S+) ([\d.]+)", printed.splitlines()[-1]))
    for name in ("loss", "exit1_top1", "exit2_top1", "exit3_top1", "exit3_top5"):
        assert float(numbers[name]) == pytest.approx(row[f"test_{name}"], abs=2e-3), name
    alone = main.main([*evaluation, "--output", str(tmp_path / "results")])
    assert alone["exit3_top1"] == pytest.approx(row["test_exit3_top1"])
    assert json.loads((tmp_path / "results" / "results.json").read_text()) == alone


@pytest.mark.parametrize("name", ["DVT_T2t_vit_12", "DVT_Deit_small", "T2t_vit_7"])
def test_every_kind_of_network_trains(name, small_models, imagenet, tmp_path, capsys):
    words = [str(imagenet), "--model", name, *SMALL, "--output", str(tmp_path), "--experiment", "a"]
    result = main.main(words)
    folder = tmp_path / "train" / "a"
    exits = 1 if name == "T2t_vit_7" else 3
    last = f"exit{exits}_top1"
    assert 0 <= result[last] <= 100
    assert f"{last} {result[last]:.3f}" in capsys.readouterr().out.splitlines()[-1]
    assert json.loads((folder / "results.json").read_text()) == result
    assert yaml.safe_load((folder / "args.yaml").read_text())["model"] == name
    (row,) = csv.DictReader((folder / "summary.csv").open())
    expected = ["epoch", "train_loss", "eval_loss", *(f"eval_exit{k}_top1" for k in range(1, exits + 1))]
    assert list(row) == [*expected, f"eval_exit{exits}_top5"]
    assert float(row["train_loss"]) == pytest.approx(exits * 1.79, rel=0.25)  # near K ln C at the start
    again = main.main([*words, "--eval_checkpoint", str(folder / "last.pth.tar")])
    assert again[last] == result[last]


@pytest.fixture(scope="module")
def trained(imagenet, tmp_path_factory) -> Path:
    """Folder of a finished run of the desk network."""
    output = tmp_path_factory.mktemp("trained")
    main.main([str(imagenet), *DESK, "-b", "4", "--epochs", "1", "--output", str(output), "--experiment", "a"])
    return output / "train" / "a"


def test_every_kind_of_checkpoint_evaluates(trained, imagenet, tmp_path):
    state = state_of(trained)
    average, raw = state["model_ema"], state["model"]
    assert any(not torch.equal(average[key], raw[key]) for key in average)
    files = {
        "packed": {"model_state_dict": average, "flops": [1.0, 2.0, 3.0]},
        "official": {
            "epoch": 3, "arch": "DVT", "state_dict": raw, "version": 2, "args": argparse.Namespace(lr=1.0),
            "state_dict_ema": {f"module.{key}": value for key, value in average.items()}, "metric": 1.0,
        },
        "bare": average,
    }  # fmt: skip
    words = [str(imagenet), *DESK, "--eval_checkpoint"]
    expected = main.main([*words, str(trained / "last.pth.tar")])
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pth.tar")
        assert main.main([*words, str(tmp_path / f"{name}.pth.tar")]) == expected, name
    torch.save({"state_dict": raw}, tmp_path / "raw.pth.tar")
    plain = main.main([*words, str(tmp_path / "raw.pth.tar")])
    assert main.main([*words, str(trained / "last.pth.tar"), "--no-model-ema"]) == plain
    assert plain["loss"] != expected["loss"]


def test_an_official_run_is_continued(trained, imagenet, tmp_path):
    state = state_of(trained)
    content = {
        "epoch": 0, "arch": "DVT", "state_dict": state["model"], "optimizer": state["optimizer"], "version": 2,
        "args": argparse.Namespace(lr=1.0), "state_dict_ema": state["model_ema"], "metric": 1.0,
    }  # fmt: skip
    torch.save(content, tmp_path / "official.pth.tar")
    words = [str(imagenet), *DESK, "-b", "4", "--lr", "1e-3", "--output", str(tmp_path), "--experiment"]
    main.main([*words, "a", "--resume", str(tmp_path / "official.pth.tar")])
    (row,) = epochs(tmp_path / "train" / "a")
    assert row["epoch"] == 1
    assert row["train_lr"] == pytest.approx(1e-5 + (1e-3 - 1e-5) / 2)  # half way down the cosine of two epochs
    moments = state_of(tmp_path / "train" / "a")["optimizer"]["state"][0]
    assert float(moments["step"]) == 12
    main.main([*words, "b", "--resume", str(tmp_path / "official.pth.tar"), "--no-resume-opt"])
    assert float(state_of(tmp_path / "train" / "b")["optimizer"]["state"][0]["step"]) == 6
    main.main([*words, "c", "--resume", str(trained / "last.pth.tar"), "--start-epoch", "0"])
    assert [row["epoch"] for row in epochs(tmp_path / "train" / "c")] == [0, 1]


def test_views_mixing_switches_and_dead_flags(imagenet, tmp_path, capsys, caplog):
    words = [str(imagenet), *DESK, "-b", "4", "--epochs", "1", "--output", str(tmp_path), "--experiment"]
    views = ["--aug-splits", "3", "--jsd", "--resplit", "--aa", "rand-m9-mstd0.5-inc1", "--reprob", "1"]
    main.main([*words, "a", *views, "--vflip", ".5", "--no-feature-reuse", "--gp", "avg", "--sync-bn", "--apex-amp"])
    errors = capsys.readouterr().err
    assert "--gp has no effect" in errors
    assert "--sync-bn has no effect" in errors
    assert "--apex-amp: apex is not used" in caplog.text + errors
    state = state_of(tmp_path / "train" / "a")["model"]
    assert "less_token.relation_reuse_conv.0.weight" in state
    assert not any("feature_resuse_mlp" in key for key in state)
    main.main([*words, "b", "--mixup", ".8", "--mixup-off-epoch", "1", "--no-aug", "--no-model-ema", "--opt", "sgd"])
    assert state_of(tmp_path / "train" / "b")["model_ema"] is None
    assert "raw" not in (tmp_path / "train" / "b" / "log.jsonl").read_text().replace("raw_scheduler", "")


def test_classes_that_the_data_lack_are_pointed_out(imagenet, tmp_path, caplog, capsys):
    torch.save(create_model("DVT_desk", num_classes=10).state_dict(), tmp_path / "ten.pth")
    main.main([str(imagenet), *DESK, "--num-classes", "10", "--eval_checkpoint", str(tmp_path / "ten.pth")])
    assert "--num-classes 6 was probably meant" in caplog.text + capsys.readouterr().err


def test_initial_weights_config_and_decay(trained, imagenet, tmp_path, capsys):
    (tmp_path / "flags.yaml").write_text("model: DVT_desk\nlr: 0.25\nmodel_ema: false\nscale: [0.5, 1.0]\n")
    args = main.parse_args(["-c", str(tmp_path / "flags.yaml"), "--lr", "0.5", "--batch-size", "2"])
    assert (args.lr, args.model_ema, args.scale, args.data_set) == (0.5, False, [0.5, 1.0], "digits")
    assert main.parse_args(["--model", "DVT_desk", "--data-set", "fashion_tune"]).data == ""
    for text, message in (
        ("lr: -1", "argument --lr: must be positive, got -1"),
        ("batch_size: 0", "must be at least 1, got 0"),
        ("mixup: .nan", "must be a number from 0 on, got nan"),
        ("epochs: 1.5", "invalid positive_int value"),
        ("remode: x", "invalid choice"),
        ("model_ema: 3", "model_ema: expected true or false, got 3"),
        ("lr: [1, 2]", "lr: expected 1 values, got 2"),
        ("scale: [1]", "scale: expected 2 values, got 1"),
        ("mean: &a [1, 1, 1]\nlr: [*a, *a]", "expected values, and none that hold others"),
    ):
        (tmp_path / "wrong.yaml").write_text(f"model: DVT_desk\n{text}\n")
        with pytest.raises(SystemExit):
            main.parse_args(["-c", str(tmp_path / "wrong.yaml")])
        assert message in capsys.readouterr().err
    state = state_of(trained)
    model = load_network(
        "DVT_desk", state, source="last.pth.tar", feature_reuse=True, relation_reuse=True, num_classes=6
    )
    assert equal(dict(model.state_dict()), dict(state["model_ema"]))
    names = {id(weight): name for name, weight in model.named_parameters()}
    for flags, decayed in ([], True), (["--no-decay-tokens"], False):
        args = main.parse_args([str(imagenet), *DESK, *flags])
        settings = OptimizerSettings.of(args)
        optimizer = build.build_optimizer(model, settings, decay_tokens=not args.no_decay_tokens)
        groups = {group["weight_decay"]: group["params"] for group in optimizer.param_groups}
        assert sorted(groups) == [0.0, 0.05]
        found = {names[id(weight)] for weight in groups[0.05]}
        assert ("less_token.cls_token" in found, "less_token.pos_embed" in found) == (decayed, decayed)


def test_published_defaults_and_recipes():
    args = main.parse_args(["DIR"])
    published = {
        "model": "T2t_vit_14", "num_classes": 1000, "img_size": 224, "batch_size": 64, "opt": "adamw", "opt_eps": None,
        "opt_betas": None, "momentum": 0.9, "weight_decay": 0.05, "clip_grad": None, "sched": "cosine", "lr": 5e-4,
        "lr_noise": None, "warmup_lr": 1e-6, "min_lr": 1e-5, "epochs": 300, "decay_epochs": 30, "warmup_epochs": 20,
        "cooldown_epochs": 10, "patience_epochs": 10, "decay_rate": 0.1, "hflip": 0.5, "vflip": 0.0,
        "color_jitter": 0.4, "aa": "rand-m9-mstd0.5-inc1", "reprob": 0.25, "remode": "pixel", "recount": 1,
        "mixup": 0.8, "cutmix": 1.0, "mixup_prob": 1.0, "mixup_switch_prob": 0.5, "mixup_mode": "batch",
        "mixup_off_epoch": 0, "smoothing": 0.1, "train_interpolation": "random", "drop": 0.0, "drop_path": 0.1,
        "model_ema": True, "model_ema_decay": 0.99996, "seed": 42, "log_interval": 50,
        "workers": cli.default_workers(8), "validation_batch_size_multiplier": 1, "repeated_aug": False,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in published} == published
    deit = main.parse_args(["DIR", "--model", "DVT_Deit_small"])
    assert (deit.lr, deit.warmup_epochs, deit.weight_decay) == (1e-3, 5, 0.05)
    assert main.parse_args(["DIR", "--model", "DVT_Deit_small", "--warmup-epochs", "7"]).warmup_epochs == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "DVT_T2t_vit_12"], "DIR is missing"),
        (["DIR", "--pretrained"], "--initial-checkpoint"),
        (["DIR", "--model", "DVT_desk"], "leave DIR out, or say --data-set IMNET"),
        (["DIR", "-b", "3"], "must be even"),
        (["DIR", "--jsd"], "--aug-splits"),
        (["DIR", "--aug-splits", "3"], "--mixup 0 --cutmix 0"),
        (["DIR", "--resume", "auto"], "--experiment"),
        (["DIR", "--eval-metric", "exit3_top1"], "T2t_vit_14 has loss, exit1_top1, exit1_top5"),
        (["DIR", "--model", "DVT_T2t_vit_12", "--eval-metric", "exit3_top5", "--num-classes", "4"], "always 100 %"),
        (["DIR", "-c", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["DIR", "--model", "DVT_T2t_vit_13"], "invalid choice"),
        (["DIR", "--bat", "128"], "unrecognized arguments: --bat"),
    ],
)
def test_a_wrong_command_line_says_what_to_do(words, message, capsys):
    with pytest.raises(SystemExit):
        main.parse_args(words)
    assert message in capsys.readouterr().err


def test_bad_data_and_checkpoints_are_named(trained, imagenet, tmp_path):
    (tmp_path / "flags.yaml").write_text("batchsize: 3")
    with pytest.raises(SystemExit):
        main.parse_args(["DIR", "-c", str(tmp_path / "flags.yaml")])
    with pytest.raises(Exception, match="nowhere"):
        main.main(["nowhere", *DESK])
    (tmp_path / "empty" / "train").mkdir(parents=True)
    (tmp_path / "empty" / "val").mkdir()
    with pytest.raises(Exception, match="empty"):
        main.main([str(tmp_path / "empty"), *DESK])
    few = [str(imagenet), *DESK, "--eval_checkpoint", str(trained / "last.pth.tar")]
    with pytest.raises(CheckpointError, match=r"(?s)last.pth.tar does not fit.*head.*\[7, 64\]"):
        main.main([*few, "--num-classes", "7"])
    with pytest.raises(CheckpointError, match="no such file"):
        main.main(
            [str(imagenet), *DESK, "-b", "4", "--resume", str(tmp_path / "none.pth.tar"), "--output", str(tmp_path)]
        )
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "odd.pth.tar")
    with pytest.raises(CheckpointError, match="cannot resume from it"):
        main.main(
            [str(imagenet), *DESK, "-b", "4", "--resume", str(tmp_path / "odd.pth.tar"), "--output", str(tmp_path)]
        )
    torch.save(create_model("DVT_desk", num_classes=3).state_dict(), tmp_path / "three.pth")
    with pytest.raises(ValueError, match="the data set has 6 classes and the network 3"):
        main.main([str(imagenet), *DESK, "--num-classes", "3", "--eval_checkpoint", str(tmp_path / "three.pth")])
    with pytest.raises(ValueError, match=r"img_size 256 does not give; sizes that work: 224-226"):
        main.main([str(imagenet), "--model", "DVT_T2t_vit_12", "--img-size", "256", *SMALL])


def test_images_that_the_patches_do_not_fill_are_not_trained_on():
    """Of the sizes at which the published cascade of DeiTs has its grids, all but one cut pixels off."""
    message = r"patches of 32, 23 \(3 of padding\), 16 pixels do not fill img_size 230; sizes that work: 224, "
    with pytest.raises(ValueError, match=message):
        main.main(["DIR", "--model", "DVT_Deit_small", "--img-size", "230"])
    with pytest.raises(ValueError, match="do not fill img_size 33; sizes that work: 32, "):
        main.main(["--model", "DVT_desk", "--img-size", "33"])
    check_filled("DVT_Deit_small", 224)
    check_filled("DVT_T2t_vit_12", 226)  # soft splits overlap
