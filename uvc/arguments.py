"""Command lines of both stages, in the published names; they end in ``uvc.settings``. Imports no torch."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.data.paths import check_data_path, reads_folder
from common.run import cli
from common.run.errors import DataError, UsageError
from common.run.files import check_files, check_output
from common.run.flags import Group, add_flags, not_negative
from common.run.settings import (
    CACHE_DECODED,
    AugmentationSettings,
    DataSettings,
    OptimizerSettings,
    RunSettings,
    ScheduleSettings,
)
from common.sizes import TIMM
from uvc.config import config_text, with_config
from uvc.flags import numbers, switch
from uvc.schedules import zlr_schedule
from uvc.settings import JointRun, JointSettings, PostRun, PrimalDualSettings, Student, Teacher

DATASETS = ("imagenet", "cifar10", "cifar100", "digits", "fashion", "fashion_tune", "fashion_full", "folder", "tar")
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
MODEL_TYPE = "deit_tiny_distilled_patch16_224"
"""The published default of ``--model_type``."""


IGNORED = {
    "--eval_every": "validation follows every epoch",
    "--num_steps": "the length of a run is its number of epochs",
    "--fp16_opt_level": "mixed precision is torch's own; --amp chooses it",
    "--loss_scale": "the loss scale of --amp fp16 adapts by itself",
    "--use_distribute": "the launcher decides",
}
"""Flags of both published programs that do nothing, and why."""


def add_common_arguments(
    parser: argparse.ArgumentParser, *, train_batch_size: int, workers: int, distillation: str
) -> None:
    """Data, network, mixing, teacher and precision: what both stages share."""
    add = Group(parser, "data and network")
    add("--name", str, "debug", "name of the run: its files go to OUTPUT_DIR/NAME")
    add("--dataset", DATASETS, "imagenet", "imagenet has train/ and val/ with a folder per class")
    add("--data_dir", str, "", "folder of the dataset; digits and fashion need none", metavar="DIR")
    add("--num_workers", cli.count, cli.default_workers(workers), "loading processes per process", metavar="N")
    add("--cache-decoded", str, "", CACHE_DECODED, metavar="DIR")
    add("--model_type", str, MODEL_TYPE,
        "architecture; timm:NAME is any plain Vision Transformer of timm, whose heads, neurons and blocks are pruned",
        metavar="NAME")  # fmt: skip
    add("--model_path", str, None,
        "checkpoint or URL of the dense network, the teacher too unless --teacher-path names another; "
        "'pretrained' is the published one of this architecture, which stage 2 takes where none is named",
        metavar="FILE")  # fmt: skip
    add("--img_size", cli.positive_int, None, "side of the input; none is the network's own", metavar="PIXELS")
    add("--train_batch_size", cli.positive_int, train_batch_size, "images per step and process", metavar="N")
    add("--eval_batch_size", cli.positive_int, 64, "images per validation batch and process", metavar="N")
    add("--enable_deit", switch, False,
        "1 for the *_distilled networks, whose token and head of distillation it stands for")  # fmt: skip
    add("--enable_jumping", switch, False, "the final norm takes the sum of all blocks' outputs")
    add("--gpu_num", str, None, "sets CUDA_VISIBLE_DEVICES where that is not set, such as 0,1", metavar="LIST")

    add = Group(parser, "mixing")
    add("--mixup", not_negative, 0.8, "mixup's Beta parameter; 0 for no mixup", metavar="ALPHA")
    add("--cutmix", not_negative, 1.0, "CutMix's Beta parameter; 0 for no CutMix", metavar="ALPHA")
    add("--cutmix-minmax", float, None, "smallest and largest side of CutMix's box", nargs=2, metavar="SHARE")
    add("--mixup-prob", cli.fraction, 0.8, "probability of mixing a batch")
    add("--mixup-switch-prob", cli.fraction, 0.5, "probability of CutMix where both are on")
    add("--mixup-mode", ("batch", "pair", "elem"), "batch", "what one mixing ratio is drawn for")
    add("--smoothing", cli.fraction, 0.1, "label smoothing")
    add("--no-aug", bool, False, "train on images as they are validated, neither cropped at random nor flipped")

    add = Group(parser, "optimisation")
    add("--learning_rate", not_negative, 1e-4, "learning rate of the weights")
    add("--max_grad_norm", cli.positive_float, 1.0, "largest L2 norm of all gradients together", metavar="NORM")
    add("--gradient_accumulation_steps", cli.positive_int, 1,
        "parts in which a batch of --train_batch_size is taken", metavar="N")  # fmt: skip
    add("--fp16", bool, False, "the same as --amp fp16")
    add("--enable_writer", switch, False, "1 is the same as --tensorboard")

    add = Group(parser, "distillation")
    add("--teacher-model", str, "", "architecture of the teacher; none is --model_type", metavar="NAME")
    add("--teacher-path", str, "", "its checkpoint; none is --model_path", metavar="FILE")
    add("--distillation-type", ("none", "soft", "hard"), distillation, "what is learned from the teacher")
    add("--distillation-alpha", cli.fraction, 0.5, "weight of the distillation in the loss")
    add("--distillation-tau", cli.positive_float, 1.0, "temperature; soft only")

    add = Group(parser, "settings in a file")
    add("--config", str, None,
        "settings by the names of these flags, which win over them: JSON, YAML, or a Python file, which is EXECUTED "
        "and whose get_config() returns an ml_collections.ConfigDict", metavar="FILE")  # fmt: skip
    add("--print_config", bool, False, "print all resolved settings as a ConfigDict, which --config reads")


def joint_parser(description: str | None) -> argparse.ArgumentParser:
    """Flags of stage 1."""
    parser = cli.make_parser(description)
    add_common_arguments(parser, train_batch_size=1024, workers=4, distillation="hard")
    add = Group(parser, "stage 1")
    add("--official", bool, False,
           "the published behaviour where it is not what was meant: z keeps its first rate, patch gates are plain "
           "parameters, old zeros stay in masks, one epoch more, noisy validation, bare state dicts")  # fmt: skip
    add("--weight_decay", not_negative, 0.05, "decay of every parameter")
    add("--enable_warmup", switch, True, "0 leaves the epochs of warm-up out")
    add("--zlr_schedule_list", numbers, [10.0, 20.0, 30.0, 40.0, 50.0],
        "learning rates of z, spread evenly over the epochs; under --official the first one alone",
        metavar="LIST")  # fmt: skip
    add_flags(parser, "course of stage 1", JointSettings, dash="_")
    add_flags(parser, "primal and dual variables", PrimalDualSettings, dash="_")
    add_flags(parser, "network and gates", Student, dash="_")

    add = Group(parser, "patches")
    add("--patch_ratio", cli.fraction, 0.9, "share of patch tokens kept in mode 2")
    add("--patchloss", ("l1",), "l1", "penalty on the patch gates, mode 1")
    cli.add_ignored_args(
        parser,
        {
            "--pretrained_dir": "the dense network is --model_path",
            **IGNORED,
            "--save_budgets": "no file is written at these budgets",
            **dict.fromkeys(
                ("--post_learning_rate", "--post_weight_decay", "--post_num_epochs"),
                "post_train.py is a program of its own",
            ),
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
    add_common_arguments(parser, train_batch_size=64, workers=8, distillation="none")
    add = Group(parser, "stage 2")
    add("--checkpoint_dir", str, "", "file of stage 1, or an official state dict with masks", metavar="FILE")
    add("--pretrained", switch, False, "1 is refused: --checkpoint_dir names the file")
    add("--patch_mode", ("auto", "off", "soft", "hard", "remove"), "auto",
        "what patch gates of the file do; auto is what the file says, soft where it does not")  # fmt: skip
    add("--opt", str, "adamw", "timm's name of the optimiser", metavar="NAME")
    add("--opt-eps", cli.positive_float, 1e-8, "its epsilon")
    add("--opt-betas", float, None, "its betas; none is its own", nargs="+", metavar="BETA")
    add("--momentum", not_negative, 0.9, "of SGD-like optimisers")
    add("--weight-decay", not_negative, 0.05, "decay of matrices; biases, norms and tokens have none")
    cli.add_schedule_args(parser, epochs=100)
    cli.add_ignored_args(
        parser,
        {
            **IGNORED,
            "--decay_type": "the schedule is --sched",
            "--warmup_steps": "the warm-up is --warmup-epochs",
            "--clip-grad": "gradients are clipped by --max_grad_norm",
            "--lr": "the rate is --learning_rate",
            **dict.fromkeys(("--color-jitter", "--aa"), "images are cropped and flipped alone"),
            "--train-interpolation": "it is bilinear",
            **dict.fromkeys(("--reprob", "--remode", "--recount"), "nothing is erased"),
        },
    )  # fmt: skip
    cli.add_ignored_args(
        parser,
        dict.fromkeys(("--repeated-aug", "--no-repeated-aug"), "images are not repeated")
        | {"--resplit": "batches are not split"},
        nargs=0,
    )  # fmt: skip
    cli.add_runtime_args(parser, seed=42, output_dir="output_post")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, with the settings of ``--config``, and resolve what flags mean together; the same for both stages.

    Besides the flags the namespace holds ``stated_model_type``, None where ``--model_type`` is left at its default.
    """
    words = with_config(parser, sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words, argparse.Namespace(model_type=None))
    args.stated_model_type = args.model_type
    args.model_type = args.model_type or MODEL_TYPE
    if args.model_type.startswith(TIMM):
        _refuse_for_timm(parser, args, words)
    if args.fp16:
        args.amp = "fp16"
    args.tensorboard = args.tensorboard or args.enable_writer
    if args.print_config:
        print(config_text(parser, args))
        raise SystemExit(0)
    if args.gpu_num is not None and args.device != "cpu":
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", args.gpu_num.replace(" ", ""))
    if args.distillation_type != "none" and args.teacher_model and not re.search("deit|t2t|^timm:", args.teacher_model):
        raise UsageError(f"--teacher-model must be a deit, t2t or timm: network, got {args.teacher_model!r}")
    for name in ("model_path", "teacher_path"):
        if getattr(args, name) == "pretrained":
            model = args.model_type if name == "model_path" else args.teacher_model or args.model_type
            if model not in WEIGHTS:
                raise UsageError(f"no published dense checkpoint of {model} is known; name a file with --{name}")
            setattr(args, name, WEIGHTS[model])
    if args.train_batch_size % args.gradient_accumulation_steps:
        raise UsageError(
            f"--train_batch_size {args.train_batch_size} is no multiple of --gradient_accumulation_steps "
            f"{args.gradient_accumulation_steps}"
        )
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    if mixes and args.train_batch_size // args.gradient_accumulation_steps < 2:
        raise UsageError(
            "mixup and CutMix pair images: --train_batch_size over --gradient_accumulation_steps must be at least 2, "
            "or give --mixup 0 --cutmix 0"
        )
    return args


def _refuse_for_timm(parser: argparse.ArgumentParser, args: argparse.Namespace, words: Sequence[str]) -> None:
    """Flags of parts that a plain network has no place for; left out, ``--enable_patch_gating`` is 0."""
    if hasattr(args, "enable_patch_gating"):  # of stage 1
        again = parser.parse_args(words, argparse.Namespace(enable_patch_gating=0))
        args.enable_patch_gating = again.enable_patch_gating
    for name in ("enable_patch_gating", "enable_jumping"):
        if getattr(args, name, None):
            raise UsageError(f"--{name}: a plain network of timm has no place for that; leave it out or give 0")


def check_paths(args: argparse.Namespace) -> None:
    """Whether the local files and folders that flags name exist, before anything heavy is loaded.

    Raises:
        CheckpointError, DataError: one does not.
    """
    check_files(*(getattr(args, name, None) for name in ("checkpoint_dir", "model_path", "teacher_path", "resume")))
    check_output(args.output_dir, folder=True)
    if not args.data_dir and reads_folder(args.dataset):
        raise DataError(f"--data_dir is missing: name the folder of the dataset {args.dataset!r}")
    check_data_path(args.dataset, args.data_dir)


def _shared(args: argparse.Namespace, model_type: str, model_path: str | None) -> dict[str, Any]:
    """What both stages' settings hold."""
    folder = str(Path(args.output_dir) / args.name) if args.output_dir else ""
    source = args.teacher_path or model_path
    if args.distillation_type != "none" and not args.eval and not source:
        raise UsageError(
            f"--distillation-type {args.distillation_type} needs the teacher's weights: give --teacher-path or "
            "--model_path, or --distillation-type none"
        )
    plain = {"aa": None, "color_jitter": None, "train_interpolation": "bilinear", "repeated_aug": False, "reprob": 0.0}
    return {
        "data": DataSettings.of(
            args, data_set=args.dataset, data_path=args.data_dir, input_size=args.img_size or 0,
            batch_size=args.train_batch_size, workers=args.num_workers,
        ),
        "augmentation": AugmentationSettings.of(args, hflip=0.0 if args.dataset == "digits" else 0.5, **plain),
        "eval_batch_size": args.eval_batch_size,
        "teacher": Teacher.of(args, model_type=args.teacher_model or model_type, source=source),
        "run": RunSettings.of(
            args, output_dir=folder, log_every_steps=args.log_every_steps or getattr(args, "log_interval", None)
        ),
        "optimizer": OptimizerSettings.of(args, lr=args.learning_rate, clip_grad=args.max_grad_norm),
        "parts": args.gradient_accumulation_steps,
        "augment": not args.no_aug,
        "arguments": {**vars(args), "model_type": model_type},
    }  # fmt: skip


def joint_run(args: argparse.Namespace) -> JointRun:
    """Stage 1 out of its flags."""
    if args.pretrained and not args.model_path:
        raise UsageError(
            "--model_path is missing: name the checkpoint of the dense network (pretrained for the published one), or "
            "give --pretrained 0 to start from random weights"
        )
    zlr = args.zlr_schedule_list
    warm = args.warmup_epochs if args.enable_warmup or args.official else 0
    if warm >= args.num_epochs + args.official and not args.eval:
        raise UsageError(
            f"--warmup_epochs {warm}: nothing would be pruned in --num_epochs {args.num_epochs}; give fewer of the "
            "first or more of the second"
        )
    learned = args.enable_patch_gating == 1 and not args.official
    primal_dual = PrimalDualSettings.of(args, zlr=zlr[0], learn_patches=learned)
    course = JointSettings.of(
        args,
        warmup_epochs=warm,
        zlr_schedule={0: zlr[0]} if args.official else zlr_schedule(zlr, args.num_epochs),
        select_ratio=args.patch_ratio if args.enable_patch_gating == 2 else None,
    )
    shared = _shared(args, args.model_type, args.model_path)
    return JointRun(**shared, student=Student.of(args), primal_dual=primal_dual, course=course)


def post_run(args: argparse.Namespace, model_type: str) -> PostRun:
    """Stage 2 out of its flags, for a network whose name its file may have said."""
    path = args.model_path
    if args.stated_model_type is None and path == WEIGHTS[MODEL_TYPE]:
        path = None  # "pretrained" meant the network of the file
    return PostRun(
        **_shared(args, model_type, path or WEIGHTS.get(model_type)),
        schedule=ScheduleSettings.of(args, cooldown_epochs=0),
    )  # fmt: skip
