"""Flags of ``main.py`` and ``run_with_submitit.py``: the published names and defaults, and a few beyond them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.run import cli
from common.run.settings import (
    AugmentationSettings,
    DataSettings,
    OptimizerSettings,
    RunSettings,
    ScheduleSettings,
    Settings,
)
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


def add_network_args(parser: argparse._ActionsContainer) -> None:
    """What says which network a file holds."""
    add = parser.add_argument
    add("--model", default="sit_lvvit_tiny", choices=list(SIZES), metavar="NAME",
        help=f"one of {', '.join(SIZES)} (default: sit_lvvit_tiny)")  # fmt: skip
    add("--keeping-ratio", type=cli.fraction, default=None, metavar="R",
        help="tokens of a stage over those of the one before (default: the model's, 0.5)")  # fmt: skip
    add("--stage-blocks", type=cli.positive_int, nargs="+", default=None, metavar="N",
        help="blocks of each stage, slimmed in between (default: the model's)")  # fmt: skip
    add("--num-classes", type=cli.positive_int, default=None, metavar="K", help="classes (default: those of the data)")


def network_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags change in a size, as keyword arguments of ``LVViT``."""
    found = {"img_size": args.input_size, "keeping_ratio": args.keeping_ratio, "stage_blocks": args.stage_blocks}
    return {name: value for name, value in found.items() if value is not None}


def get_args_parser(description: str | None = None) -> argparse.ArgumentParser:
    """All flags; abbreviations are taken, as the published scripts write ``--epoch``."""
    parser = cli.make_parser(description, conflict_handler="resolve")
    parser.allow_abbrev = True
    network = parser.add_argument_group("network")
    add_network_args(network)
    add = network.add_argument
    add("--drop", type=cli.fraction, default=0.0, metavar="P",
        help="dropout after the position embedding, the attention projection and the MLP (default: 0)")  # fmt: skip
    add("--drop-path", type=cli.fraction, default=0.1, metavar="P",
        help="largest stochastic-depth rate (default: 0.1)")  # fmt: skip
    _add_distillation_args(parser)
    cli.add_data_args(parser)
    cli.add_augmentation_args(parser, color_jitter=0.4)
    cli.add_optimizer_args(parser, model_ema=False)
    cli.add_schedule_args(parser)
    cli.add_runtime_args(parser, amp="auto")
    _add_own_args(parser)
    cli.add_ignored_args(parser, DEAD)
    cli.add_ignored_args(parser, DEAD_LISTS, nargs="+")
    cli.add_ignored_args(parser, DEAD_SWITCHES, nargs=0)
    return parser


def _add_distillation_args(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("distillation and weights").add_argument
    add("--distillation-type", default="frd", choices=TYPES,
        help="frd: slim and distil; none: the network without slimming, trained on labels (default: frd)")  # fmt: skip
    add("--teacher-model", default="sit_lvvit_tiny", choices=list(SIZES), metavar="NAME",
        help="size of the token teacher, the same as --model (default: sit_lvvit_tiny)")  # fmt: skip
    add("--teacher-path", default="", metavar="FILE", help="its weights, a file or URL; needed to train with frd")
    add("--extra-teacher-model", default="", metavar="NAME",
        help="timm name of a CNN teacher; adds a distillation token that follows its decisions")  # fmt: skip
    add("--extra-teacher-path", default="", metavar="FILE", help="its weights, a file or URL")
    add("--lambda-token", type=float, default=2.0, metavar="W", help="weight of the token loss (default: 2)")
    add("--lambda-logits", type=float, default=2.0, metavar="W", help="weight of the logit loss (default: 2)")
    add("--lambda-cnn", type=float, default=1.0, metavar="W", help="weight of the CNN teacher's loss (default: 1)")
    add("--distillation-tau", type=cli.positive_float, default=1.0, metavar="TAU",
        help="temperature of the logit loss (default: 1)")  # fmt: skip
    add("--finetune", default="", metavar="FILE",
        help="weights to start from, or with --eval to evaluate: a file or URL (default: none)")  # fmt: skip
    add("--finetune-key", default="model", choices=("model", "model_ema"),
        help="which weights of a training file --finetune takes (default: model)")  # fmt: skip
    add("--allow-stripped", action="store_true", help="evaluate a file without the training-only rtsm.* and aux_head.*")
    add("--token-label-data", default="", metavar="DIR",
        help="label maps for training a teacher with token labeling (--distillation-type none); "
        "sit/token_labeling.py says their form")  # fmt: skip
    add("--dense-weight", type=float, default=0.5, metavar="W",
        help="weight of the loss of the patch tokens under token labeling (default: 0.5)")  # fmt: skip


def _add_own_args(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("runtime of SiT").add_argument
    add("--hflip", type=cli.fraction, default=0.5, metavar="P",
        help="probability of a horizontal flip in training (default: 0.5)")  # fmt: skip
    add("--scale-lr", action=cli.Switch, default=True, help="--lr is for 512 images per step (default: on)")
    add("--linear-warmup", type=cli.count, default=0, metavar="N",
        help="epochs in which the rate rises first; ours, for a teacher from scratch (default: 0)")  # fmt: skip
    add("--start-epoch", "--start_epoch", type=cli.count, default=0, metavar="E",
        help="first epoch of a run that is not resumed (default: 0)")  # fmt: skip
    add("--print-freq", type=cli.count, default=10, metavar="N",
        help="print the published line of meters every N steps; 0: never (default: 10)")  # fmt: skip


def parse_args(argv: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Flags of a command line."""
    return get_args_parser(description).parse_args(argv)


@dataclass(frozen=True)
class SiTSettings(Settings):
    """Flags of this paper alone, by their names."""

    model: str
    drop: float
    drop_path: float
    num_classes: int | None
    distillation_type: str
    teacher_model: str
    teacher_path: str
    extra_teacher_model: str
    extra_teacher_path: str
    lambda_token: float
    lambda_logits: float
    lambda_cnn: float
    distillation_tau: float
    finetune: str
    finetune_key: str
    allow_stripped: bool
    token_label_data: str
    dense_weight: float
    linear_warmup: int
    start_epoch: int
    print_freq: int
    options: Mapping[str, Any]
    """what the flags change in a size; see :func:`network_options`"""

    @property
    def teaches(self) -> bool:
        """Whether a loss needs the token teacher."""
        return self.distillation_type == "frd" and bool(self.lambda_token or self.lambda_logits)


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
