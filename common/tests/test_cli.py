import argparse
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from common.run import build, cli, precision
from common.run.build import scaled_lr
from common.run.cli import make_parser
from common.run.errors import UsageError
from common.run.settings import AugmentationSettings, OptimizerSettings, RunSettings, ScheduleSettings

GROUPS: tuple[Callable[..., None], ...] = (
    cli.add_data_args,
    cli.add_augmentation_args,
    cli.add_optimizer_args,
    cli.add_schedule_args,
    cli.add_runtime_args,
)


def build_optimizer(model: Any, *, group_fn: Any = None, **values: Any) -> torch.optim.Optimizer:
    return build.build_optimizer(model, OptimizerSettings(**values), group_fn=group_fn)


def build_schedule(optimizer: torch.optim.Optimizer, **values: Any) -> tuple[Any, int]:
    return build.build_schedule(optimizer, ScheduleSettings(**values))


def full_parser() -> argparse.ArgumentParser:
    parser = make_parser("all groups")
    for group in GROUPS:
        group(parser)
    return parser


def test_defaults_are_deits() -> None:
    args = full_parser().parse_args([])
    deit = {
        "batch_size": 64, "epochs": 300, "input_size": 224, "opt": "adamw", "opt_eps": 1e-8, "opt_betas": None,
        "clip_grad": None, "momentum": 0.9, "weight_decay": 0.05, "sched": "cosine", "lr": 5e-4, "lr_noise": None,
        "lr_noise_pct": 0.67, "lr_noise_std": 1.0, "warmup_lr": 1e-6, "min_lr": 1e-5, "decay_epochs": 30,
        "warmup_epochs": 5, "cooldown_epochs": 10, "patience_epochs": 10, "decay_rate": 0.1, "color_jitter": 0.3,
        "aa": "rand-m9-mstd0.5-inc1", "smoothing": 0.1, "train_interpolation": "bicubic", "repeated_aug": True,
        "reprob": 0.25, "remode": "pixel", "recount": 1, "mixup": 0.8, "cutmix": 1.0, "cutmix_minmax": None,
        "mixup_prob": 1.0, "mixup_switch_prob": 0.5, "mixup_mode": "batch", "model_ema": True,
        "model_ema_decay": 0.99996, "model_ema_force_cpu": False, "data_set": "IMNET", "inat_category": "name",
        "output_dir": "", "seed": 0, "resume": "", "eval": False, "eval_crop_ratio": 0.875, "pin_mem": True,
        "workers": min(10, len(os.sched_getaffinity(0))),
    }  # fmt: skip
    assert {name: getattr(args, name) for name in deit} == deit
    ours = {"device": "auto", "amp": "none", "compile": False, "tensorboard": False, "local_rank": -1}
    assert {name: getattr(args, name) for name in ours} == ours


def test_loading_processes_are_no_more_than_cores_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(3)))
    assert cli.default_workers(2) == 2
    assert full_parser().parse_args([]).workers == 3
    assert full_parser().parse_args(["--workers", "20"]).workers == 20


def test_every_flag_says_what_it_does_and_its_default() -> None:
    parser = full_parser()
    for action in parser._actions:
        if action.dest == "help":
            continue
        assert action.help is not None, action.dest
        assert action.help.count("(default: ") == 1, action.dest
        assert len(action.help.split("(default")[0]) > 10, action.dest
    text = parser.format_help()
    assert "--pin-mem, --no-pin-mem" in text
    assert "(default: on)" in text


def test_spellings_of_launchers_and_old_scripts() -> None:
    parse = full_parser().parse_args
    assert parse(["--local-rank", "3"]).local_rank == parse(["--local_rank=3"]).local_rank == 3
    assert parse(["--output_dir", "x"]).output_dir == parse(["--output-dir", "x"]).output_dir == "x"
    assert parse(["--num_workers", "2"]).workers == parse(["-j", "2"]).workers == parse(["--workers", "2"]).workers == 2
    assert parse(["--no-model-ema", "--no-pin-mem", "--no-repeated-aug"]).model_ema is False
    assert parse(["-b", "8", "--dr", "0.5", "--opt-betas", "0.9", "0.95"]).opt_betas == [0.9, 0.95]


def test_papers_replace_defaults_by_name() -> None:
    parser = make_parser()
    cli.add_optimizer_args(parser, lr=2e-4, model_ema=False)
    args = parser.parse_args([])
    assert (args.lr, args.model_ema, args.weight_decay) == (2e-4, False, 0.05)
    assert "(default: 0.0002)" in parser.format_help()
    assert "(default: off)" in parser.format_help()
    with pytest.raises(TypeError, match="no flag for learning_rate"):
        cli.add_optimizer_args(make_parser(), learning_rate=1.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--amp", "fp8"], "must be one of none, fp16, bf16, got 'fp8'"),
        (["--batch-size", "0"], "must be at least 1, got 0"),
        (["--workers", "-1"], "must be at least 0"),
        (["--lr", "-1"], "must be positive"),
        (["--min-lr", "-1"], "--min-lr: must be a number from 0 on, got -1"),
        (["--weight-decay", "nan"], "--weight-decay: must be a number from 0 on, got nan"),
        (["--opt-betas", "0.9", "inf"], "--opt-betas: must be a finite number, got inf"),
        (["--reprob", "1.5"], "must be from 0 to 1"),
        (["--mixup-mode", "all"], "invalid choice"),
        (["--epoch", "3"], "unrecognized arguments: --epoch"),
    ],
)
def test_impossible_values_are_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        full_parser().parse_args(words)
    error = capsys.readouterr().err
    assert message in error
    assert words[0] in error


def test_flags_without_effect_warn(capsys: pytest.CaptureFixture[str]) -> None:
    parser = make_parser()
    cli.add_ignored_args(parser, {"--resplit": "DeiT never read it"}, nargs=0)
    cli.add_ignored_args(parser, {"--gp, --pooling": "100% dead"})
    args = parser.parse_args(["--resplit", "--pooling", "avg"])
    assert vars(args) == {}
    error = capsys.readouterr().err
    assert "warning: --resplit has no effect: DeiT never read it" in error
    assert "warning: --pooling has no effect: 100% dead" in error
    assert "no effect: 100% dead" in parser.format_help()
    parser.parse_args([])
    assert capsys.readouterr().err == ""


def test_dataset_names() -> None:
    assert cli.dataset_name("IMNET") == "imagenet"
    assert cli.dataset_name("CIFAR") == "cifar100"
    assert cli.dataset_name("hfds/org/set") == "hfds/org/set"


def test_learning_rates_of_the_papers() -> None:
    assert scaled_lr(2e-3, batch_size=128, world_size=8) == pytest.approx(4e-3)  # Scala-S
    assert scaled_lr(2e-4, batch_size=128, world_size=8) == pytest.approx(4e-4)  # SiT


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def no_weight_decay(self) -> set[str]:
        return {"cls_token"}


def decays(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, float]:
    by_id = {id(weight): group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
    return {name: by_id[id(weight)] for name, weight in model.named_parameters()}


def one_group(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters())}]


def test_optimizer_leaves_one_dimensional_weights_undecayed() -> None:
    model = Small()
    optimizer = build_optimizer(model, lr=1e-3, opt_eps=1e-7, opt_betas=[0.9, 0.95])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (optimizer.defaults["eps"], optimizer.defaults["betas"]) == (1e-7, (0.9, 0.95))
    found = decays(optimizer, model)
    assert found == {
        "cls_token": 0, "norm.weight": 0, "norm.bias": 0, "head.weight": 0.05, "head.bias": 0,
    }  # fmt: skip
    assert set(decays(build_optimizer(model, lr=1e-3, group_fn=one_group), model).values()) == {0.05}


def test_optimizer_takes_groups_with_their_own_rates() -> None:
    model = Small()
    groups = [
        {"params": [model.head.weight], "lr": 5e-3, "weight_decay": 0.05, "name": "rtsm"},
        {"params": [model.head.bias], "weight_decay": 0.0, "name": "base_no_decay"},
    ]
    optimizer = build_optimizer(groups, lr=1e-3)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ("rtsm", 5e-3, 0.05),
        ("base_no_decay", 1e-3, 0.0),
    ]
    assert isinstance(build_optimizer(model, opt="sgd", lr=1.0, momentum=0.8), torch.optim.SGD)


def test_cosine_of_dvt() -> None:
    """lr 2e-3 after 20 warm-up epochs: 1.978e-3 at epoch 20, for the cosine is not shifted; 310 epochs in all."""
    optimizer = build_optimizer(Small(), lr=2e-3)
    scheduler, total = build_schedule(optimizer, epochs=300, warmup_epochs=20)
    assert total == 310
    for epoch, expected in (
        (0, 1e-6),
        (10, 1e-6 + 10 * (2e-3 - 1e-6) / 20),
        (20, 1e-5 + (2e-3 - 1e-5) / 2 * (1 + math.cos(math.pi * 20 / 300))),
        (150, 1e-5 + (2e-3 - 1e-5) / 2),
        (305, 1e-5),
    ):
        scheduler.step(epoch)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected), epoch
    scheduler.step(20)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1.978e-3, abs=5e-7)


def test_schedule_noise_is_within_its_bound_and_repeatable() -> None:
    def rates() -> list[float]:
        optimizer = build_optimizer(Small(), lr=1e-3)
        scheduler, _ = build_schedule(
            optimizer, epochs=10, warmup_epochs=0, lr_noise=[0.4, 0.9], lr_noise_pct=0.3, noise_seed=1
        )
        found = []
        for epoch in range(10):
            scheduler.step(epoch)
            found.append(optimizer.param_groups[0]["lr"])
        return found

    plain = [1e-5 + (1e-3 - 1e-5) / 2 * (1 + math.cos(math.pi * epoch / 10)) for epoch in range(10)]
    noisy = rates()
    assert noisy == rates()
    relative = [a / b - 1 for a, b in zip(noisy, plain, strict=True)]
    assert all(abs(value) < 1e-9 for value in (*relative[:4], relative[9]))
    assert all(0 < abs(value) < 0.3 for value in relative[4:9])


def test_unknown_and_fused_optimisers_say_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"--opt nosuch: .*not found"):
        build_optimizer(Small(), opt="nosuch", lr=1.0)
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match=r"apex's optimisers.*--opt lamb is the same in torch"):
            build_optimizer(Small(), opt="fusedlamb", lr=1.0)


def test_settings_are_read_by_the_flags_names() -> None:
    args = full_parser().parse_args(["--mixup", "0", "--cutmix", "0", "--lr", "0.5", "--amp", "bf16"])
    augmentation = AugmentationSettings.of(args)
    assert (augmentation.mixes, augmentation.smoothing, augmentation.hflip) == (False, 0.1, 0.5)
    assert OptimizerSettings.of(args, lr=0.25).lr == 0.25
    assert OptimizerSettings.of(args).model_ema is True
    assert RunSettings.of(args).amp == "bf16"
    with pytest.raises(TypeError, match="ScheduleSettings needs epochs"):
        ScheduleSettings.of(argparse.Namespace(sched="cosine"))


def test_amp_of_published_commands(capsys: pytest.CaptureFixture[str]) -> None:
    parse = full_parser().parse_args
    assert [parse(words).amp for words in ([], ["--amp"], ["--native-amp"], ["--amp", "bf16"])] == [
        "none", "on", "on", "bf16",
    ]  # fmt: skip
    assert parse(["--apex-amp", "--epochs", "3"]).amp == "on"
    assert "--apex-amp: apex is not used" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["--amp", "O1"])
    assert precision.amp_dtype("on", torch.device("cpu")) is torch.bfloat16
    assert precision.amp_dtype("on", torch.device("cuda")) is torch.float16
    assert precision.amp_dtype("auto", torch.device("cpu")) is None


def test_a_mistyped_flag_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    parser = make_parser("What it does.", prog="program")
    parser.add_argument("--epochs", type=cli.positive_int)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--eplchs", "3"])
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--epochs", "0"])
    assert capsys.readouterr().err.splitlines() == [
        "program: error: unrecognized arguments: --eplchs 3 (meant: --epochs?); --help shows all flags",
        "program: error: argument --epochs: must be at least 1, got 0; --help shows all flags",
    ]
