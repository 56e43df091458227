"""The command lines of Scala, and what they say as named values; imports no torch.

``main_scala.py`` takes Scala's own flags and DeiT's, with a word for every flag that would do nothing. The groups are
shared with the other programs of this directory.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from common.run import cli
from common.run.errors import CheckpointError, DataError
from common.run.settings import Settings

TRANSFER_TYPES = ("progressive", "US")
"""Who teaches a slim width: the pass just before it, or the largest width (as in universally slimmable networks)."""
TRANSFER_KINDS = ("soft", "hard")
"""How a width teaches a narrower one: by its distribution or by its prediction."""
CE_TYPES = ("one_hot", "teacher")
"""Targets of the slim widths' cross entropy: the labels, or the predictions of the largest width's class head."""
TOKENS = {"cls_token": 0, "dist_token": 1}
"""Which of a distilled network's two heads carries the transfer, by the names of ``--token_type``."""

DEFAULTS = {"smallest_ratio": 0.25, "largest_ratio": 1.0, "granularity": 0.03125}
"""Of the slicing bound and the granularity, where neither a flag nor the checkpoint's own arguments say them."""
DEFAULT_MODEL = "deit_small_distilled_patch16_224_scala"

REJECTED = {
    "--lr-noise-std": "the noise is a truncated standard normal, whatever this says",
    "--decay-epochs": "the schedule is always a cosine",
    "--decay-rate, --dr": "the schedule is always a cosine",
    "--patience-epochs": "the schedule is always a cosine",
    "--cooldown-epochs": "training ends after --epochs",
}
"""Flags with one value that the official program parses and never reads."""
PUBLISHED_SPELLINGS = {"granularity": "--discrete_ratio"}
"""Flags of the published commands that the official program itself does not know, by what they mean."""


# ---------------------------------------------------------------------------------------------------------------------
# What the flags say


@dataclass(frozen=True)
class NetworkSettings(Settings):
    """Of :func:`add_model_args` and :func:`add_width_args`: a network and what it starts from; None for its own."""

    model: str
    smallest_ratio: float
    largest_ratio: float
    granularity: float | None = None
    input_size: int | None = None
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    patch_size: int | None = None
    init_values: float | None = None
    official_layer_scale: bool | None = None
    official_anchors: bool | None = None
    drop: float = 0.0
    drop_path: float = 0.0
    grad_checkpointing: bool = False
    finetune: str = ""
    attn_only: bool = False
    train_mode: bool = True


@dataclass(frozen=True)
class LossSettings(Settings):
    """Of :func:`add_distillation_args`, and Scala's own of the slim widths."""

    distillation_type: str
    distillation_alpha: float
    distillation_tau: float
    teacher_model: str
    teacher_path: str
    bce_loss: bool
    cosub: bool
    smoothing: float
    ce_coefficient: float
    ce_type: str
    distill_type: str
    token_type: str


@dataclass(frozen=True)
class StepSettings(Settings):
    """Of :func:`add_step_args`, and what a training image goes through besides the common augmentation."""

    epochs: int
    full_warm_epoch: int
    transfer_type: str
    start_epoch: int = 0
    ThreeAugment: bool = False
    src: bool = False

    @property
    def alone(self) -> bool:
        """Whether the largest width is the only one that is trained."""
        return self.full_warm_epoch >= self.epochs


def given(args: argparse.Namespace) -> dict[str, Any]:
    """Those flags of a network that the user gave; the others are the checkpoint's to say."""
    names = ("model", *DEFAULTS, "input_size", "embed_dim", "depth", "num_heads", "patch_size", "init_values",
             "official_layer_scale", "official_anchors", "num_classes")  # fmt: skip
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def check_files(args: argparse.Namespace, *flags: str, data: bool = True) -> None:
    """Refuse paths that lead nowhere, before anything heavy is imported.

    Args:
        flags: names of those whose value is a file or a URL; ``auto``, ``timm`` and nothing are no paths.
        data: look for ``--data-path`` as well, where the data set is folders.

    Raises:
        DataError, CheckpointError: naming flag and path.
    """
    folders = ("imnet", "imagenet", "folder", "inat", "inat18", "inat19", "ucf101", "clips")
    if data and args.data_set.lower() in folders and args.data_path and not Path(args.data_path).is_dir():
        raise DataError(f"--data-path {args.data_path}: no such folder")
    for flag in flags:
        name = getattr(args, flag)
        if name and name not in ("auto", "timm") and "://" not in name and not Path(name).is_file():
            raise CheckpointError(f"--{flag.replace('_', '-')} {name}: no such file")


# ---------------------------------------------------------------------------------------------------------------------
# Groups of flags


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


def add_width_args(parser: Any, defaults: Mapping[str, float] | None = None) -> None:
    """--smallest_ratio, --largest_ratio, --granularity; without ``defaults`` None, for a checkpoint to say."""
    for name, metavar, what in (
        ("smallest", "s", "smallest width ratio, which uses the leading channels"),
        ("largest", "l", "largest width ratio"),
        ("granularity", "g", "step between the trained widths"),
    ):
        dest = name if name == "granularity" else f"{name}_ratio"
        value, said = (defaults or DEFAULTS)[dest], "" if defaults else "the checkpoint's, else "
        spellings = {f"--{dest}", f"--{dest.replace('_', '-')}", PUBLISHED_SPELLINGS.get(dest, f"--{dest}")}
        parser.add_argument(
            *sorted(spellings, reverse=True), type=cli.positive_float, default=defaults and value, dest=dest,
            metavar=metavar, help=f"{what} (default: {said}{value:g})",
        )  # fmt: skip


def add_checkpoint_args(parser: Any) -> None:
    """--checkpoint and what it may not say itself, for programs that start from a trained network."""
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FILE",
        help="of main_scala.py or main_dinov2.py, or a state dict: path or URL")  # fmt: skip
    add("--weights", choices=("model", "model_ema"), default="model",
        help="which weights of it; the published numbers are those of model (default: model)")  # fmt: skip
    add("--model", metavar="NAME", help="the network's name (default: the checkpoint's)")
    add_width_args(parser)
    add("--allow-untrained", action=cli.Switch, default=False,
        help="take widths that were not trained, whose accuracy is chance (default: off)")  # fmt: skip


def add_step_args(parser: Any) -> None:
    """--full_warm_epoch and --transfer_type."""
    add = parser.add_argument
    add("--full_warm_epoch", "--full-warm-epoch", type=cli.count, default=10, metavar="N",
        help="epochs at the start that train the largest width alone; --epochs or more is separate training "
        "(default: 10)")  # fmt: skip
    add("--transfer_type", "--transfer-type", default="progressive", choices=TRANSFER_TYPES,
        help="who teaches a slim width: the next wider pass, or the largest width (default: progressive)")  # fmt: skip


def add_scala_args(parser: argparse.ArgumentParser) -> None:
    """Widths, scale coordination, and at which widths to evaluate."""
    group = parser.add_argument_group("Scala")
    add_width_args(group)
    add_step_args(group)
    add = group.add_argument
    add("--ce_coefficient", "--ce-coefficient", type=float, default=1.0, metavar="c",
        help="weight of the cross entropy of the three slim widths (default: 1.0)")  # fmt: skip
    add("--ce_type", "--ce-type", default="one_hot", choices=CE_TYPES,
        help="its targets: the labels, or the predictions of the largest width's class head "
        "(default: one_hot)")  # fmt: skip
    add("--distill_type", "--distill-type", default="soft", choices=TRANSFER_KINDS,
        help="a width teaches by its distribution (KL) or by its prediction (default: soft)")  # fmt: skip
    add("--token_type", "--token-type", default="cls_token", choices=tuple(TOKENS),
        help="head of a distilled model that carries the transfer (default: cls_token)")  # fmt: skip
    add("--eval_ratio", "--eval-ratio", nargs="+", default=["1.0"], metavar="r",
        help="widths to evaluate with --eval: ratios, or all for every trained width (default: 1.0)")  # fmt: skip
    add("--allow-untrained", action=cli.Switch, default=False,
        help="evaluate a width that was not trained, whose accuracy is chance (default: off)")  # fmt: skip
    add("--calibrate-batches", type=cli.count, default=0, metavar="N",
        help="batches of training images that give an untrained width its batch statistics, in models with batch "
        "normalisation (default: 0)")  # fmt: skip


def add_model_args(parser: argparse.ArgumentParser) -> None:
    """The network, and what it starts from."""
    add = parser.add_argument_group("network").add_argument
    add("--model", metavar="NAME",
        help=f"a model of this package (default: the checkpoint's with --eval, else {DEFAULT_MODEL})")  # fmt: skip
    for name, what in (
        ("--embed-dim", "width"),
        ("--depth", "number of blocks"),
        ("--num-heads", "number of heads"),
        ("--patch-size", "side of a patch in pixels"),
    ):
        add(name, type=cli.positive_int, metavar="N", help=f"{what}, in place of the model's (DeiT only)")
    add("--num-classes", type=cli.positive_int, metavar="N", help="classes (default: as many as the data set has)")
    add("--drop", type=cli.fraction, default=0.0, metavar="RATE", help="dropout (default: 0.0)")
    add("--drop-path", type=cli.fraction, default=0.1, metavar="RATE",
        help="stochastic depth of the last block; rises linearly from 0 (default: 0.1)")  # fmt: skip
    add("--init-values", type=float, metavar="GAMMA", help="initial LayerScale (default: no LayerScale)")
    add("--official-layer-scale", action=cli.Switch,
        help="LayerScale without effect, as in the official code (default: off)")  # fmt: skip
    add("--official-anchors", action=cli.Switch,
        help="in a distilled model cut tokens, positions, last norm and heads as if the bound were 0.25 to 1, as the "
        "official code does (default: off)")  # fmt: skip
    add("--grad-checkpointing", action=cli.Switch, default=False,
        help="recompute blocks in the backward pass, for less memory (default: off)")  # fmt: skip
    add("--finetune", default="", metavar="FILE",
        help="start from these weights of a DeiT: path, URL (default: random weights)")  # fmt: skip
    add("--attn-only", action=cli.Switch, default=False,
        help="train attention, class head and positions only (default: off)")  # fmt: skip
    add("--train-mode", action=cli.Switch, default=True,
        help="train in training mode, with dropout and stochastic depth (default: on)")  # fmt: skip


def add_distillation_args(parser: argparse.ArgumentParser) -> None:
    """The external teacher of the largest width, and losses in its place."""
    add = parser.add_argument_group("loss of the largest width").add_argument
    add(
        "--distillation-type", default="none", choices=("none", "soft", "hard"), help="external teacher (default: none)"
    )
    add("--distillation-alpha", type=cli.fraction, default=0.5, metavar="A", help="its weight (default: 0.5)")
    add("--distillation-tau", type=cli.positive_float, default=1.0, metavar="T",
        help="its temperature, soft only (default: 1.0)")  # fmt: skip
    add("--teacher-model", default="regnety_160", metavar="NAME", help="a timm model (default: regnety_160)")
    add("--teacher-path", default="", metavar="FILE",
        help="its weights: path, URL, or timm for timm's own (required when distilling)")  # fmt: skip
    add("--bce-loss", action=cli.Switch, default=False,
        help="binary cross entropy; every class with a target above 0 counts as present (default: off)")  # fmt: skip
    add("--cosub", action=cli.Switch, default=False,
        help="train two sub-networks by stochastic depth that teach each other, DeiT III (default: off)")  # fmt: skip


def add_schedule_args(parser: argparse.ArgumentParser) -> None:
    """Those of DeiT's schedule flags that do something under a cosine."""
    add = parser.add_argument_group("schedule").add_argument
    add("--epochs", type=cli.positive_int, default=300, metavar="N", help="epochs (default: 300)")
    add("--start_epoch", "--start-epoch", type=cli.count, default=0, metavar="N",
        help="count epochs from here; a resumed run knows its own (default: 0)")  # fmt: skip
    add("--sched", default="cosine", choices=("cosine",), help="the only schedule there is (default: cosine)")
    add("--warmup-epochs", type=cli.count, default=5, metavar="N", help="linear warm-up (default: 5)")
    add("--warmup-lr", type=cli.positive_float, default=1e-6, metavar="LR", help="its first rate (default: 1e-06)")
    add("--min-lr", type=cli.positive_float, default=1e-5, metavar="LR", help="the last rate (default: 1e-05)")
    add("--lr-noise", type=float, nargs="+", metavar="FRACTION",
        help="from which, and up to which, fraction of the epochs the rate gets noise (default: never)")  # fmt: skip
    add("--lr-noise-pct", type=cli.positive_float, default=0.67, metavar="P", help="its bound (default: 0.67)")
    add("--unscale-lr", action=cli.Switch, default=False,
        help="take --lr as it is, instead of for 512 images per step (default: off)")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# main_scala.py


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    """All flags of ``main_scala.py``."""
    parser = cli.make_parser(description)
    add_scala_args(parser)
    add_model_args(parser)
    add_distillation_args(parser)
    cli.add_data_args(parser, input_size=None)
    cli.add_augmentation_args(parser)
    add = parser.add_argument_group("more augmentation").add_argument
    add("--ThreeAugment", action=cli.Switch, default=False, help="3-Augment instead of --aa (default: off)")
    add("--src", action=cli.Switch, default=False, help="simple random crop, with --ThreeAugment (default: off)")
    add("--hflip", type=cli.fraction, default=0.5, metavar="P", help="probability of a flip; digits: 0 (default: 0.5)")
    add("--global-batch-size", type=cli.positive_int, metavar="N",
        help="images per step over all processes, in place of --batch-size per process (default: none)")  # fmt: skip
    cli.add_optimizer_args(parser)
    add_schedule_args(parser)
    cli.add_runtime_args(parser)
    parser.set_defaults(amp=None)  # resolved once the device is known
    add_rejected_args(parser, REJECTED)
    add_rejected_args(parser, {"--resplit": "there are no augmentation splits"}, nargs=0)
    always = "every process evaluates its share, each image once"
    cli.add_ignored_args(parser, {"--dist-eval": always, "--distributed": "the launcher says so"}, nargs=0)
    launcher = "the launcher's environment says it"
    cli.add_ignored_args(parser, {"--world_size, --world-size": launcher, "--dist_url, --dist-url": launcher})
    parser.epilog = "Without --amp, CUDA trains and evaluates in fp16, as published, and the CPU in float32."
    return parser


def parse_args(argv: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Flags, checked against each other; ``eval_ratio`` becomes ``"all"`` or a list of numbers."""
    parser = build_parser(description)
    args = parser.parse_args(argv)
    if not args.eval:  # an evaluated checkpoint says these itself
        args.model = args.model or DEFAULT_MODEL
        args.input_size = args.input_size or 224
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
