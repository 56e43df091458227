"""The command line of ``main_scala.py``: Scala's own flags, DeiT's, and a word for every flag that would do nothing."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from common.losses import DISTILLATION_TYPES
from common.run import cli
from scala.engine_scala import TRANSFER_TYPES
from scala.losses import CE_TYPES, TOKENS, TRANSFER_KINDS

DEFAULTS = {"smallest_ratio": 0.25, "largest_ratio": 1.0, "granularity": 0.03125}
"""Of the slicing bound and the granularity, where neither a flag nor the checkpoint's own arguments say them."""

REJECTED = {
    "--lr-noise-std": "the noise is a truncated standard normal, whatever this says",
    "--decay-epochs": "the schedule is always a cosine",
    "--decay-rate, --dr": "the schedule is always a cosine",
    "--patience-epochs": "the schedule is always a cosine",
    "--cooldown-epochs": "training ends after --epochs",
}
"""Flags with one value that the official program parses and never reads."""


class _Rejected(argparse.Action):
    """A flag that would do nothing: refused, with the reason."""

    def __init__(self, *args: Any, reason: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.reason = reason

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None
    ) -> NoReturn:
        del namespace, values
        parser.error(f"{option_string} would have no effect, as in the official code: {self.reason}; leave it out")


def add_rejected_args(parser: argparse.ArgumentParser, reasons: Mapping[str, str], *, nargs: Any = None) -> None:
    """Flags that end the program with the reason why they would do nothing."""
    for flags, reason in reasons.items():
        parser.add_argument(
            *flags.split(", "), action=_Rejected, reason=reason, nargs=nargs, default=argparse.SUPPRESS,
            dest=argparse.SUPPRESS, help=argparse.SUPPRESS,
        )  # fmt: skip


def add_scala_args(parser: argparse.ArgumentParser) -> None:
    """Widths, scale coordination, and at which widths to evaluate."""
    add = parser.add_argument_group("Scala").add_argument
    add(
        "--smallest_ratio",
        "--smallest-ratio",
        type=cli.positive_float,
        metavar="s",
        help="smallest width ratio, which uses the leading channels (default: the checkpoint's, else 0.25)",
    )
    add(
        "--largest_ratio",
        "--largest-ratio",
        type=cli.positive_float,
        metavar="l",
        help="largest width ratio (default: the checkpoint's, else 1.0)",
    )
    add(
        "--granularity",
        "--discrete_ratio",
        type=cli.positive_float,
        metavar="g",
        help="step between the trained widths (default: the checkpoint's, else 0.03125, which is X = 25)",
    )
    add(
        "--full_warm_epoch",
        "--full-warm-epoch",
        type=cli.count,
        default=10,
        metavar="N",
        help="epochs at the start that train the largest width alone; --epochs or more is separate training "
        "(default: 10)",
    )
    add(
        "--ce_coefficient",
        "--ce-coefficient",
        type=float,
        default=1.0,
        metavar="c",
        help="weight of the cross entropy of the three slim widths (default: 1.0)",
    )
    add(
        "--ce_type",
        "--ce-type",
        default="one_hot",
        choices=CE_TYPES,
        help="its targets: the labels, or the predictions of the largest width's class head (default: one_hot)",
    )
    add(
        "--distill_type",
        "--distill-type",
        default="soft",
        choices=TRANSFER_KINDS,
        help="a width teaches by its distribution (KL) or by its prediction (default: soft)",
    )
    add(
        "--transfer_type",
        "--transfer-type",
        default="progressive",
        choices=TRANSFER_TYPES,
        help="who teaches a slim width: the next wider pass, or the largest width (default: progressive)",
    )
    add(
        "--token_type",
        "--token-type",
        default="cls_token",
        choices=tuple(TOKENS),
        help="head of a distilled model that carries the transfer (default: cls_token)",
    )
    add(
        "--eval_ratio",
        "--eval-ratio",
        nargs="+",
        default=["1.0"],
        metavar="r",
        help="widths to evaluate with --eval: ratios, or all for every trained width (default: 1.0)",
    )
    add("--allow-untrained", action=cli.Switch, default=False,
        help="evaluate a width that was not trained, whose accuracy is chance (default: off)")  # fmt: skip
    add("--calibrate-batches", type=cli.count, default=0, metavar="N",
        help="batches of training pictures that give an untrained width its batch statistics, in models with batch "
        "normalisation (default: 0)")  # fmt: skip


def add_model_args(parser: argparse.ArgumentParser) -> None:
    """The network, and what it starts from."""
    add = parser.add_argument_group("network").add_argument
    add(
        "--model",
        default="deit_small_distilled_patch16_224_scala",
        metavar="NAME",
        help="a model of this package (default: deit_small_distilled_patch16_224_scala)",
    )
    for name, what in (
        ("--embed-dim", "width"),
        ("--depth", "number of blocks"),
        ("--num-heads", "number of heads"),
        ("--patch-size", "side of a patch in pixels"),
    ):
        add(name, type=cli.positive_int, metavar="N", help=f"{what}, in place of the model's (DeiT only)")
    add("--num-classes", type=cli.positive_int, metavar="N", help="classes (default: the data set's; 1000 for IMNET)")
    add("--drop", type=cli.fraction, default=0.0, metavar="RATE", help="dropout (default: 0.0)")
    add(
        "--drop-path",
        type=cli.fraction,
        default=0.1,
        metavar="RATE",
        help="stochastic depth of the last block; rises linearly from 0 (default: 0.1)",
    )
    add("--init-values", type=float, metavar="GAMMA", help="initial LayerScale (default: no LayerScale)")
    add(
        "--official-layer-scale",
        action=cli.Switch,
        default=False,
        help="LayerScale without effect, as in the official code (default: off)",
    )
    add(
        "--official-anchors",
        action=cli.Switch,
        default=False,
        help="in a distilled model cut tokens, positions, last norm and heads as if the bound were 0.25 to 1, as the "
        "official code does (default: off)",
    )
    add(
        "--grad-checkpointing",
        action=cli.Switch,
        default=False,
        help="recompute blocks in the backward pass, for less memory (default: off)",
    )
    add(
        "--finetune",
        default="",
        metavar="FILE",
        help="start from these weights of a DeiT: path, URL (default: random weights)",
    )
    add(
        "--attn-only",
        action=cli.Switch,
        default=False,
        help="train attention, class head and positions only (default: off)",
    )
    add("--train-mode", action=cli.Switch, default=True,
        help="train in training mode, with dropout and stochastic depth (default: on)")  # fmt: skip


def add_distillation_args(parser: argparse.ArgumentParser) -> None:
    """The external teacher of the largest width, and losses in its place."""
    add = parser.add_argument_group("loss of the largest width").add_argument
    add("--distillation-type", default="none", choices=DISTILLATION_TYPES, help="external teacher (default: none)")
    add("--distillation-alpha", type=cli.fraction, default=0.5, metavar="A", help="its weight (default: 0.5)")
    add(
        "--distillation-tau",
        type=cli.positive_float,
        default=1.0,
        metavar="T",
        help="its temperature, soft only (default: 1.0)",
    )
    add("--teacher-model", default="regnety_160", metavar="NAME", help="a timm model (default: regnety_160)")
    add(
        "--teacher-path",
        default="",
        metavar="FILE",
        help="its weights: path, URL, or timm for timm's own (required when distilling)",
    )
    add(
        "--bce-loss",
        action=cli.Switch,
        default=False,
        help="binary cross entropy; every class with a target above 0 counts as present (default: off)",
    )
    add("--cosub", action=cli.Switch, default=False,
        help="train two sub-networks by stochastic depth that teach each other, DeiT III (default: off)")  # fmt: skip


def add_schedule_args(parser: argparse.ArgumentParser) -> None:
    """Those of DeiT's schedule flags that do something under a cosine."""
    add = parser.add_argument_group("schedule").add_argument
    add("--epochs", type=cli.positive_int, default=300, metavar="N", help="epochs (default: 300)")
    add(
        "--start_epoch",
        "--start-epoch",
        type=cli.count,
        default=0,
        metavar="N",
        help="count epochs from here; a resumed run knows its own (default: 0)",
    )
    add("--sched", default="cosine", choices=("cosine",), help="the only schedule there is (default: cosine)")
    add("--warmup-epochs", type=cli.count, default=5, metavar="N", help="linear warm-up (default: 5)")
    add("--warmup-lr", type=cli.positive_float, default=1e-6, metavar="LR", help="its first rate (default: 1e-06)")
    add("--min-lr", type=cli.positive_float, default=1e-5, metavar="LR", help="the last rate (default: 1e-05)")
    add(
        "--lr-noise",
        type=float,
        nargs="+",
        metavar="FRACTION",
        help="from which, and up to which, fraction of the epochs the rate gets noise (default: never)",
    )
    add("--lr-noise-pct", type=cli.positive_float, default=0.67, metavar="P", help="its bound (default: 0.67)")
    add("--unscale-lr", action=cli.Switch, default=False,
        help="take --lr as it is, instead of for 512 pictures per step (default: off)")  # fmt: skip


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    """All flags of ``main_scala.py``."""
    parser = cli.make_parser(description)
    add_scala_args(parser)
    add_model_args(parser)
    add_distillation_args(parser)
    cli.add_data_args(parser)
    cli.add_augmentation_args(parser)
    add = parser.add_argument_group("more augmentation").add_argument
    add("--ThreeAugment", action=cli.Switch, default=False, help="3-Augment instead of --aa (default: off)")
    add("--src", action=cli.Switch, default=False, help="simple random crop, with --ThreeAugment (default: off)")
    add("--hflip", type=cli.fraction, default=0.5, metavar="P", help="probability of a flip; digits: 0 (default: 0.5)")
    add("--global-batch-size", type=cli.positive_int, metavar="N",
        help="pictures per step over all processes, in place of --batch-size per process (default: none)")  # fmt: skip
    cli.add_optimizer_args(parser)
    add_schedule_args(parser)
    cli.add_runtime_args(parser)
    parser.set_defaults(amp=None)  # resolved once the device is known
    add_rejected_args(parser, REJECTED)
    add_rejected_args(parser, {"--resplit": "there are no augmentation splits"}, nargs=0)
    always = "every process evaluates its share, each picture once"
    cli.add_ignored_args(parser, {"--dist-eval": always, "--distributed": "the launcher says so"}, nargs=0)
    launcher = "the launcher's environment says it"
    cli.add_ignored_args(parser, {"--world_size, --world-size": launcher, "--dist_url, --dist-url": launcher})
    parser.epilog = "Without --amp, CUDA trains and evaluates in fp16, as published, and the CPU in float32."
    return parser


def parse_args(argv: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Flags, checked against each other; ``eval_ratio`` becomes ``"all"`` or a list of numbers."""
    parser = build_parser(description)
    args = parser.parse_args(argv)
    check(parser, args)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Combinations that cannot work end the program here, before any data is opened."""
    args.eval_ratio = read_ratios(parser, args.eval_ratio)
    distilling = args.distillation_type != "none"
    if distilling and not args.eval:
        if "distilled" not in args.model:
            parser.error(
                f"--distillation-type {args.distillation_type} needs a model with a distillation head, a *_distilled_* "
                f"one, got --model {args.model}; or give --distillation-type none"
            )
        if not args.teacher_path:
            parser.error("--distillation-type needs --teacher-path: the teacher's weights, a path, a URL, or timm")
        if args.finetune:
            parser.error("--finetune together with --distillation-type is not defined; leave one out")
    if args.cosub and distilling:
        parser.error("--cosub replaces the loss of the largest width: leave --distillation-type out")
    mixing = bool(args.mixup or args.cutmix or args.cutmix_minmax)
    if args.bce_loss and mixing and args.smoothing and not args.eval:
        parser.error("--bce-loss takes every class with a target above 0, and smoothing raises all of them; give "
                     "--smoothing 0")  # fmt: skip
    if args.batch_size % 2 and mixing and not args.eval and args.global_batch_size is None:
        parser.error(f"mixup and CutMix need an even --batch-size, got {args.batch_size}")
    if args.src and not args.ThreeAugment:
        parser.error("--src belongs to --ThreeAugment: give both")
    if args.ce_coefficient < 0:
        parser.error(f"--ce_coefficient must not be negative, got {args.ce_coefficient:g}")


def read_ratios(parser: argparse.ArgumentParser, words: Sequence[str]) -> str | list[float]:
    """``all``, or numbers given one by one or with commas."""
    words = [word for text in words for word in text.split(",") if word]
    if words == ["all"]:
        return "all"
    try:
        return [float(word) for word in words]
    except ValueError:
        parser.error(f"--eval_ratio takes width ratios such as 0.5, or all, got {' '.join(words)!r}")
