"""Command lines of both stages, in the published names."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

from common.run import cli
from common.run.distributed import get_logger
from uvc.data import DATASETS
from uvc.schedules import DECAYS

logger = get_logger(__name__)

DEIT = "https://dl.fbaipublicfiles.com/deit/"
WEIGHTS = {
    "deit_tiny_patch16_224": DEIT + "deit_tiny_patch16_224-a1311bcf.pth",
    "deit_small_patch16_224": DEIT + "deit_small_patch16_224-cd65a155.pth",
    "deit_base_patch16_224": DEIT + "deit_base_patch16_224-b5f2ef4d.pth",
    "deit_tiny_distilled_patch16_224": DEIT + "deit_tiny_distilled_patch16_224-b40b3cf7.pth",
    "deit_small_distilled_patch16_224": DEIT + "deit_small_distilled_patch16_224-649709d9.pth",
    "deit_base_distilled_patch16_224": DEIT + "deit_base_distilled_patch16_224-df68dfff.pth",
}
"""Published dense checkpoints, what ``--model_path pretrained`` means."""


class Group:
    """An argument group; every help text ends with the default."""

    def __init__(self, parser: argparse.ArgumentParser, title: str) -> None:
        self.group = parser.add_argument_group(title)

    def __call__(self, *flags: str, help: str, default: Any = None, **options: Any) -> None:
        shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else default
        shown = "none" if shown in (None, "") else "off" if shown is False else shown
        self.group.add_argument(
            *flags, default=default, help=f"{help} (default: {shown})".replace("%", "%%"), **options
        )


def switch(text: str) -> bool:
    """1 or 0, as the published commands write it."""
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"must be 0 or 1, got {text!r}")
    return text == "1"


def numbers(text: str) -> list[float]:
    """Numbers separated by commas."""
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        values = []
    if not values:
        raise argparse.ArgumentTypeError(f"must be numbers separated by commas, such as 1,5,9, got {text!r}")
    return values


def share(text: str) -> float:
    """A number above 0 and up to 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


def add_common_arguments(parser: argparse.ArgumentParser, *, train_batch_size: int, workers: int) -> None:
    """Data, network, mixing, teacher and precision: what both stages share."""
    add = Group(parser, "data and network")
    add("--name", default="debug", help="name of the run: its files go to OUTPUT_DIR/NAME")
    add("--dataset", default="imagenet", choices=DATASETS, help="imagenet has train/ and val/ with a folder per class")
    add("--data_dir", default="", metavar="DIR", help="folder of the dataset; digits need none")
    add("--num_workers", type=cli.count, default=workers, metavar="N", help="loading processes per process")
    add("--model_type", default="deit_tiny_distilled_patch16_224", metavar="NAME", help="architecture")
    add("--model_path", default=None, metavar="FILE",
        help="checkpoint or URL of the dense network, the teacher too unless --teacher-path names another; "
        "'pretrained' is the published one of this architecture, which stage 2 takes where none is named")  # fmt: skip
    add(
        "--img_size",
        type=cli.positive_int,
        default=None,
        metavar="PIXELS",
        help="side of the input; none is the network's own",
    )
    add(
        "--train_batch_size",
        type=cli.positive_int,
        default=train_batch_size,
        metavar="N",
        help="pictures per step and process",
    )
    add(
        "--eval_batch_size",
        type=cli.positive_int,
        default=64,
        metavar="N",
        help="pictures per validation batch and process",
    )
    add("--enable_deit", type=switch, default=False, metavar="0|1",
        help="1 for the *_distilled networks, whose token and head of distillation it stands for")  # fmt: skip
    add(
        "--enable_jumping",
        type=switch,
        default=False,
        metavar="0|1",
        help="the final norm takes the sum of all blocks' outputs",
    )
    add("--gpu_num", default=None, metavar="LIST", help="sets CUDA_VISIBLE_DEVICES where that is not set, such as 0,1")
    add = Group(parser, "mixing")
    add("--mixup", type=float, default=0.8, metavar="ALPHA", help="mixup's Beta parameter; 0 for no mixup")
    add("--cutmix", type=float, default=1.0, metavar="ALPHA", help="CutMix's Beta parameter; 0 for no CutMix")
    add(
        "--cutmix-minmax",
        type=float,
        nargs="+",
        default=None,
        metavar="SHARE",
        help="smallest and largest side of CutMix's box",
    )
    add("--mixup-prob", type=cli.fraction, default=0.8, help="probability of mixing a batch")
    add("--mixup-switch-prob", type=cli.fraction, default=0.5, help="probability of CutMix where both are on")
    add("--mixup-mode", default="batch", choices=("batch", "pair", "elem"), help="what one mixing ratio is drawn for")
    add("--smoothing", type=cli.fraction, default=0.1, help="label smoothing")
    add = Group(parser, "optimisation")
    add("--learning_rate", type=cli.positive_float, default=1e-4, help="learning rate of the weights")
    add(
        "--max_grad_norm",
        type=cli.positive_float,
        default=1.0,
        metavar="NORM",
        help="largest L2 norm of all gradients together",
    )
    add("--gradient_accumulation_steps", type=cli.positive_int, default=1, metavar="N",
        help="parts in which a batch of --train_batch_size is taken")  # fmt: skip
    add("--fp16", action="store_true", default=False, help="the same as --amp fp16")
    add("--enable_writer", type=switch, default=False, metavar="0|1", help="1 is the same as --tensorboard")


def add_teacher_arguments(parser: argparse.ArgumentParser, *, kind: str) -> None:
    """The teacher and its weight in the loss."""
    add = Group(parser, "distillation")
    add("--teacher-model", default="", metavar="NAME", help="architecture of the teacher; none is --model_type")
    add("--teacher-path", default="", metavar="FILE", help="its checkpoint; none is --model_path")
    add("--distillation-type", default=kind, choices=("none", "soft", "hard"), help="what is learned from the teacher")
    add("--distillation-alpha", type=cli.fraction, default=0.5, help="weight of the distillation in the loss")
    add("--distillation-tau", type=cli.positive_float, default=1.0, help="temperature; soft only")


def joint_parser(description: str | None) -> argparse.ArgumentParser:
    """Flags of stage 1."""
    parser = cli.make_parser(description)
    add_common_arguments(parser, train_batch_size=1024, workers=4)
    add_teacher_arguments(parser, kind="hard")
    add = Group(parser, "stage 1")
    add("--pretrained", type=switch, default=True, metavar="0|1", help="load --model_path into the student")
    add("--official", action="store_true", default=False,
        help="the published behaviour where it is not what was meant: z keeps its first rate, patch gates are plain "
        "parameters, old zeros stay in masks, one epoch more, noisy validation, bare state dicts")  # fmt: skip
    add("--weight_decay", type=float, default=0.05, help="decay of every parameter")
    add("--num_epochs", type=cli.positive_int, default=20, help="epochs, one more under --official")
    add("--decay_type", default="cosine", choices=DECAYS, help="course of the learning rate")
    add("--warmup_steps", type=cli.count, default=500, help="steps over which the learning rate rises")
    add("--enable_warmup", type=switch, default=True, metavar="0|1", help="0 leaves the epochs of warm-up out")
    add("--warmup_epochs", type=cli.count, default=5, help="first epochs, in which nothing is pruned or skipped")
    add("--warmup_lr", type=cli.positive_float, default=1e-4, help="learning rate of the first step of each of them")
    add(
        "--warmup_reset", type=switch, default=False, metavar="0|1", help="start optimizer and schedule anew after them"
    )
    add(
        "--log_interval",
        type=cli.positive_int,
        default=2000,
        metavar="N",
        help="steps between records of the structure",
    )
    add = Group(parser, "primal and dual variables")
    add("--budget", type=share, default=0.5, help="share of the dense network's cost that may remain")
    add("--enable_pruning", type=switch, default=True, metavar="0|1", help="learn s and r; 0 learns gates alone")
    add("--soptim", default="sgd", choices=("sgd", "adam", "rmsprop"), help="optimizer of s")
    add("--roptim", default="sgd", choices=("sgd", "adam", "rmsprop"), help="optimizer of r")
    add("--slr", type=float, default=0.02, help="learning rate of s")
    add("--rlr", type=float, default=0.02, help="learning rate of r")
    add("--ylr", type=float, default=1e-4, help="learning rate of y")
    add("--plr", type=float, default=1e-4, help="learning rate of p")
    add("--zlr_schedule_list", type=numbers, default=[10.0, 20.0, 30.0, 40.0, 50.0], metavar="LIST",
        help="learning rates of z, spread evenly over the epochs; under --official the first one alone")  # fmt: skip
    add("--sl2wd", type=float, default=0.0, help="decay of s and r relative to their bounds")
    add(
        "--z_grad_clip",
        type=cli.positive_float,
        default=0.5,
        help="bound of cost minus budget where it is differentiated",
    )
    add("--flops_with_mhsa", type=switch, default=True, metavar="0|1", help="0 counts the output projections alone")
    add = Group(parser, "gates")
    add("--enable_block_gating", type=switch, default=True, metavar="0|1", help="learn to skip blocks")
    add("--use_gumbel", type=switch, default=True, metavar="0|1", help="1 Gumbel softmax gates, 0 soft-L0 gates")
    add("--glr", type=float, default=1e-3, help="learning rate of the gates' SGD")
    add("--gating_interval", type=cli.positive_int, default=100, metavar="N", help="steps between its updates")
    add("--gating_weight", type=float, default=5.0, help="factor on the cost's gradient there")
    add("--eps", type=cli.positive_float, default=0.1, help="epsilon of soft-L0 gates")
    add("--eps_decay", type=cli.positive_float, default=0.92, help="factor on it at each epoch after the warm-up")
    add("--enable_patch_gating", type=int, default=2, choices=(0, 1, 2),
        help="0 off, 1 a learned gate per patch position, 2 selection of patch tokens by image")  # fmt: skip
    add("--patch_ratio", type=cli.fraction, default=0.9, help="share of patch tokens kept in mode 2")
    add("--patch_weight", type=float, default=5.0, help="factor on the cost's gradient of the patch gates, mode 1")
    add("--patch_l1_weight", type=float, default=0.01, help="factor on the sum of the patch gates in the loss, mode 1")
    add("--patchlr", type=float, default=0.01, help="learning rate of the patch gates, mode 1")
    add("--patchloss", default="l1", choices=("l1",), help="penalty on the patch gates, mode 1")
    cli.add_ignored_args(
        parser,
        {
            "--pretrained_dir": "the dense network is --model_path",
            "--eval_every": "validation follows every epoch",
            "--num_steps": "the length of a run is --num_epochs",
            "--fp16_opt_level": "mixed precision is torch's own; --amp chooses it",
            "--loss_scale": "the loss scale of --amp fp16 adapts by itself",
            "--save_budgets": "no file is written at these budgets",
            "--post_learning_rate": "post_train.py is a program of its own",
            "--post_weight_decay": "post_train.py is a program of its own",
            "--post_num_epochs": "post_train.py is a program of its own",
            "--use_distribute": "the launcher decides",
            "--enable_part_gating": "gates of block halves take no part in network or cost",
        },
    )  # fmt: skip
    cli.add_ignored_args(
        parser, {"--uvc_train": "it is what this program does", "--verbose": "it says the same"}, nargs=0
    )
    cli.add_runtime_args(parser, seed=42, output_dir="../result/output/uvc_train")
    return parser


def post_parser(description: str | None) -> argparse.ArgumentParser:
    """Flags of stage 2."""
    parser = cli.make_parser(description)
    add_common_arguments(parser, train_batch_size=64, workers=8)
    add_teacher_arguments(parser, kind="none")
    add = Group(parser, "stage 2")
    add("--checkpoint_dir", default="", metavar="FILE", help="file of stage 1, or an official state dict with masks")
    add("--pretrained", type=switch, default=False, metavar="0|1", help="1 is refused: --checkpoint_dir names the file")
    add("--patch_mode", default="auto", choices=("auto", "off", "soft", "hard", "remove"),
        help="what patch gates of the file do; auto is what the file says, soft where it does not")  # fmt: skip
    add("--opt", default="adamw", metavar="NAME", help="timm's name of the optimiser")
    add("--opt-eps", type=cli.positive_float, default=1e-8, help="its epsilon")
    add("--opt-betas", type=float, nargs="+", default=None, metavar="BETA", help="its betas; none is its own")
    add("--momentum", type=float, default=0.9, help="of SGD-like optimisers")
    add("--weight-decay", type=float, default=0.05, help="decay of matrices; biases, norms and tokens have none")
    cli.add_schedule_args(parser, epochs=100)
    cli.add_ignored_args(
        parser,
        {
            "--eval_every": "validation follows every epoch",
            "--num_steps": "the length of a run is --epochs",
            "--decay_type": "the schedule is --sched",
            "--warmup_steps": "the warm-up is --warmup-epochs",
            "--clip-grad": "gradients are clipped by --max_grad_norm",
            "--lr": "the rate is --learning_rate",
            "--color-jitter": "pictures are cropped and flipped alone",
            "--aa": "pictures are cropped and flipped alone",
            "--train-interpolation": "it is bilinear",
            "--reprob": "nothing is erased",
            "--remode": "nothing is erased",
            "--recount": "nothing is erased",
            "--fp16_opt_level": "mixed precision is torch's own; --amp chooses it",
            "--loss_scale": "the loss scale of --amp fp16 adapts by itself",
            "--use_distribute": "the launcher decides",
        },
    )  # fmt: skip
    cli.add_ignored_args(
        parser,
        {"--repeated-aug": "pictures are not repeated", "--no-repeated-aug": "pictures are not repeated"}
        | {"--resplit": "batches are not split"},
        nargs=0,
    )  # fmt: skip
    cli.add_runtime_args(parser, seed=42, output_dir="output_post")
    return parser


def finish(args: argparse.Namespace) -> argparse.Namespace:
    """Resolve what flags mean together; the same for both stages."""
    if args.fp16:
        args.amp = "fp16"
    args.tensorboard = args.tensorboard or args.enable_writer
    if args.gpu_num is not None and args.device != "cpu":
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", args.gpu_num.replace(" ", ""))
    if args.cutmix_minmax is not None and len(args.cutmix_minmax) != 2:
        raise SystemExit("error: --cutmix-minmax takes two shares, the smallest and the largest")
    for name in ("model_path", "teacher_path"):
        if getattr(args, name) == "pretrained":
            model = args.model_type if name == "model_path" else args.teacher_model or args.model_type
            if model not in WEIGHTS:
                raise SystemExit(f"error: no published dense checkpoint of {model} is known; name a file with --{name}")
            setattr(args, name, WEIGHTS[model])
    if args.train_batch_size % args.gradient_accumulation_steps:
        raise SystemExit(
            f"error: --train_batch_size {args.train_batch_size} is no multiple of --gradient_accumulation_steps "
            f"{args.gradient_accumulation_steps}"
        )
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    if mixes and args.train_batch_size // args.gradient_accumulation_steps < 2:
        raise SystemExit(
            "error: mixup and CutMix pair pictures: --train_batch_size over --gradient_accumulation_steps must be at "
            "least 2, or give --mixup 0 --cutmix 0"
        )
    return args


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and resolve."""
    return finish(parser.parse_args(argv))
