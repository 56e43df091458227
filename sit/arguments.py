"""Flags of ``main.py`` and ``run_with_submitit.py``: the published names and defaults, and a few beyond them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.run import cli
from common.run.flags import add_flags, flag
from common.run.settings import (
    AugmentationSettings,
    DataSettings,
    OptimizerSettings,
    RunSettings,
    ScheduleSettings,
    Settings,
)
from common.sizes import TIMM, Names
from sit.sizes import SIZES, TYPES

DEAD = {
    "--sched": "the learning rate follows the paper's cosine",
    "--lr-noise-pct": "the published code never used it",
    "--lr-noise-std": "the published code never used it",
    "--warmup-lr": "there is no warm-up",
    "--warmup-epochs": "there is no warm-up, whatever it says",
    "--decay-epochs": "the learning rate follows the paper's cosine",
    "--patience-epochs": "the learning rate follows the paper's cosine",
    "--decay-rate, --dr": "the learning rate follows the paper's cosine",
    "--opt": "the optimiser is AdamW",
    "--momentum": "AdamW has none",
    "--world_size": "the launcher's environment says how many processes there are",
    "--dist_url": "the launcher's environment says where the processes meet",
}
"""Flags of the published parser that do nothing here or did nothing there -> why."""

DEAD_LISTS = {"--lr-noise": "the published code never used it"}
DEAD_SWITCHES = {
    "--resplit": "the published code never used it",
    "--dist-eval": "every evaluation is divided among the processes, each image counted once",
}


@dataclass(frozen=True)
class NetworkSettings(Settings):
    """Which network a file holds."""

    model: str = flag(
        "sit_lvvit_tiny", f"one of {', '.join(SIZES)}, or {TIMM}NAME for any plain Vision Transformer of timm",
        choices=Names(SIZES), metavar="NAME",
    )  # fmt: skip
    keeping_ratio: float | None = flag(
        None, "tokens of a stage over those of the one before; none is the model's, 0.5", type=cli.fraction, metavar="R"
    )
    stage_blocks: Sequence[int] | None = flag(
        None, "blocks of each stage, slimmed in between; none is the model's, "
        f"of {TIMM}NAME half of the blocks and three stages behind them", type=cli.positive_int, nargs="+", metavar="N",
    )  # fmt: skip
    patch_size: int | None = flag(
        None, f"side of a patch of {TIMM}NAME, to which kernels are resampled; none is the network's",
        type=cli.positive_int, metavar="PIXELS",
    )  # fmt: skip
    num_classes: int | None = flag(None, "classes; none is as many as the data has", type=cli.positive_int, metavar="K")


@dataclass(frozen=True)
class SiTSettings(NetworkSettings):
    """What this paper alone has."""

    drop: float = flag(
        0.0,
        "dropout after the position embedding, the attention projection and the MLP",
        type=cli.fraction,
        metavar="P",
    )
    drop_path: float = flag(0.1, "largest stochastic-depth rate", type=cli.fraction, metavar="P")
    distillation_type: str = flag(
        "frd", "frd: slim and distil; none: the network without slimming, trained on labels", choices=TYPES
    )
    teacher_model: str = flag(
        "", f"the token teacher: none is --model, of {TIMM}NAME any of its width and patches",
        choices=Names(("", *SIZES)), metavar="NAME",
    )  # fmt: skip
    teacher_path: str = flag("", "its weights, a file or URL; needed to train with frd", metavar="FILE")
    extra_teacher_model: str = flag(
        "", "timm name of a CNN teacher; adds a distillation token that follows its decisions", metavar="NAME"
    )
    extra_teacher_path: str = flag("", "its weights, a file or URL", metavar="FILE")
    lambda_token: float = flag(2.0, "weight of the token loss", metavar="W")
    lambda_logits: float = flag(2.0, "weight of the logit loss", metavar="W")
    lambda_cnn: float = flag(1.0, "weight of the CNN teacher's loss", metavar="W")
    distillation_tau: float = flag(1.0, "temperature of the logit loss", type=cli.positive_float, metavar="TAU")
    finetune: str = flag(
        "", "weights to start from, or with --eval to evaluate: a file or URL", "--weights", metavar="FILE"
    )
    finetune_key: str = flag(
        "model", "which weights of a training file --finetune takes", choices=("model", "model_ema")
    )
    allow_stripped: bool = flag(False, "evaluate a file without the training-only rtsm.* and aux_head.*")
    token_label_data: str = flag(
        "", "label maps for training a teacher with token labeling (--distillation-type none); "
        "sit/token_labeling.py says their form", metavar="DIR",
    )  # fmt: skip
    dense_weight: float = flag(0.5, "weight of the loss of the patch tokens under token labeling", metavar="W")
    hflip: float = flag(0.5, "probability of a horizontal flip in training", type=cli.fraction, metavar="P")
    scale_lr: bool = flag(True, "--lr is for 512 images per step")
    linear_warmup: int = flag(
        0, "epochs in which the rate rises first; ours, for a teacher from scratch", type=cli.count, metavar="N"
    )
    start_epoch: int = flag(0, "first epoch of a run that is not resumed", "--start_epoch", type=cli.count, metavar="E")
    print_freq: int = flag(
        10, "print the published line of meters every N steps; 0: never", type=cli.count, metavar="N"
    )
    options: Mapping[str, Any] = field(default_factory=dict)
    """what the flags change in a size; see :func:`network_options`"""

    @property
    def of_timm(self) -> str | None:
        """The name in timm, where ``model`` is a network of it."""
        return self.model.removeprefix(TIMM) if self.model.startswith(TIMM) else None

    @property
    def teaches(self) -> bool:
        """Whether a loss needs the token teacher."""
        return self.distillation_type == "frd" and bool(self.lambda_token or self.lambda_logits)


def network_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags change in a size, as keyword arguments of ``LVViT``; of ``timm_vit.build`` for a name of timm."""
    names = {"img_size": "input_size", **{name: name for name in ("keeping_ratio", "stage_blocks", "patch_size")}}
    found = {name: getattr(args, flag) for name, flag in names.items()}
    return {name: value for name, value in found.items() if value is not None}


def get_args_parser(description: str | None = None) -> argparse.ArgumentParser:
    """All flags; abbreviations are taken, as the published scripts write ``--epoch``."""
    parser = cli.make_parser(description, conflict_handler="resolve")
    parser.allow_abbrev = True
    add_flags(parser, "network and method", SiTSettings)
    cli.add_data_args(parser)
    cli.add_augmentation_args(parser, color_jitter=0.4)
    cli.add_optimizer_args(parser, model_ema=False)
    cli.add_schedule_args(parser)
    cli.add_runtime_args(parser, fsdp=True, amp="auto")
    cli.add_ignored_args(parser, DEAD)
    cli.add_ignored_args(parser, DEAD_LISTS, nargs="+")
    cli.add_ignored_args(parser, DEAD_SWITCHES, nargs=0)
    return parser


def parse_args(argv: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Flags of a command line."""
    return get_args_parser(description).parse_args(argv)


@dataclass(frozen=True)
class Job:
    """All that a command line says, once it is known where it runs."""

    own: SiTSettings
    data: DataSettings
    augmentation: AugmentationSettings
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    run: RunSettings
    arguments: Mapping[str, Any]

    @classmethod
    def of(cls, args: argparse.Namespace, *, processes: int, on_gpu: bool) -> Job:
        """Settings from flags; ``--amp auto`` is fp16 on CUDA, as published, and nothing on the CPU."""
        scale = args.batch_size * processes / 512 if args.scale_lr else 1.0
        amp = ("fp16" if on_gpu else "none") if args.amp == "auto" else args.amp
        return cls(
            SiTSettings.of(args, options=network_options(args)),
            DataSettings.of(args, pin_mem=args.pin_mem and on_gpu),
            AugmentationSettings.of(args),
            OptimizerSettings.of(args, lr=args.lr * scale),
            ScheduleSettings.of(args),
            RunSettings.of(args, amp=amp),
            vars(args),
        )
