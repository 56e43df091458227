"""The command lines of Scala, and what they say as named values; imports no torch.

``main_scala.py`` takes Scala's own flags and DeiT's, with a word for every flag that would do nothing. A group of flags
is a dataclass, shared with the other programs of this directory.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any

from common.run import cli
from common.run.flags import Settings, Switch, add_flags, count, flag, fraction, positive_float, positive_int
from common.run.settings import AugmentationSettings
from common.sizes import TIMM

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
NETWORK_FLAGS = (
    "model", *DEFAULTS, "input_size", "embed_dim", "depth", "num_heads", "patch_size", "official_anchors",
    "isolated_activation",
)  # fmt: skip
"""Those that make a network and do not show in its weights."""
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
# Groups of flags


@dataclass(frozen=True)
class NetworkSettings(Settings):
    """A network and what it starts from; None for its own."""

    smallest_ratio: float
    largest_ratio: float
    model: str = flag(
        None, f"a model of this package, or {TIMM}NAME for any plain ViT of timm (default: the checkpoint's with "
        f"--eval, else {DEFAULT_MODEL})", own=MISSING, metavar="NAME",
    )  # fmt: skip
    granularity: float | None = None
    input_size: int | None = None
    embed_dim: int | None = flag(
        None, "width, in place of the model's (DeiT and timm's only)", type=positive_int, metavar="N"
    )
    depth: int | None = flag(None, "number of blocks, likewise", type=positive_int, metavar="N")
    num_heads: int | None = flag(None, "number of heads, likewise", type=positive_int, metavar="N")
    patch_size: int | None = flag(None, "side of a patch in pixels, likewise", type=positive_int, metavar="N")
    init_values: float | None = flag(None, "initial LayerScale (default: no LayerScale)", type=float, metavar="GAMMA")
    official_layer_scale: bool | None = flag(
        None, "LayerScale without effect, as in the official code (default: off)", action=Switch
    )
    official_anchors: bool | None = flag(
        None, "in a distilled model cut tokens, positions, last norm and heads as if the bound were 0.25 to 1, as the "
        "official code does (default: off)", action=Switch,
    )  # fmt: skip
    isolated_activation: bool | None = flag(
        None, "widths between the bounds have the other end of the channels than the smallest; off, all lead, as in "
        "slimmable networks (DeiT only; default: on)", action=Switch,
    )  # fmt: skip
    drop: float = flag(0.0, "dropout", type=fraction, metavar="RATE")
    drop_path: float = flag(
        0.1, "stochastic depth of the last block; rises linearly from 0", own=0.0, type=fraction, metavar="RATE"
    )
    grad_checkpointing: bool = flag(False, "recompute blocks in the backward pass, for less memory")
    finetune: str = flag(
        "", "start from these weights of the network, or of a DeiT: path, URL, or timm for timm's own with --model "
        "timm:NAME (default: random weights)", "--weights", metavar="FILE",
    )  # fmt: skip
    attn_only: bool = flag(False, "train attention, class head and positions only")
    train_mode: bool = flag(True, "train in training mode, with dropout and stochastic depth")


@dataclass(frozen=True)
class LossSettings(Settings):
    """The external teacher of the largest width, losses in its place, and those of the slim widths."""

    smoothing: float
    distillation_type: str = flag("none", "external teacher of the largest width", choices=("none", "soft", "hard"))
    distillation_alpha: float = flag(0.5, "its weight", type=fraction, metavar="A")
    distillation_tau: float = flag(1.0, "its temperature, soft only", type=positive_float, metavar="T")
    teacher_model: str = flag("regnety_160", "a timm model", metavar="NAME")
    teacher_path: str = flag(
        "", "its weights: path, URL, or timm for timm's own (default: none; required when distilling)", metavar="FILE"
    )
    bce_loss: bool = flag(False, "binary cross entropy; every class with a target above 0 counts as present")
    cosub: bool = flag(False, "train two sub-networks by stochastic depth that teach each other, DeiT III")
    ce_coefficient: float = flag(
        1.0, "weight of the cross entropy of the three slim widths", "--ce_coefficient", metavar="c"
    )
    ce_type: str = flag(
        "one_hot", "its targets: the labels, or the predictions of the largest width's class head", "--ce_type",
        choices=CE_TYPES,
    )  # fmt: skip
    distill_type: str = flag(
        "soft", "a width teaches by its distribution (KL) or by its prediction", "--distill_type",
        choices=TRANSFER_KINDS,
    )  # fmt: skip
    token_type: str = flag(
        "cls_token", "head of a distilled model that carries the transfer", "--token_type", choices=tuple(TOKENS)
    )


@dataclass(frozen=True)
class StepSettings(Settings):
    """Scale coordination."""

    epochs: int
    start_epoch: int = 0
    full_warm_epoch: int = flag(
        10, "epochs at the start that train the largest width alone; --epochs or more is separate training",
        "--full_warm_epoch", type=count, metavar="N",
    )  # fmt: skip
    transfer_type: str = flag(
        "progressive", "who teaches a slim width: the next wider pass, or the largest width", "--transfer_type",
        choices=TRANSFER_TYPES,
    )  # fmt: skip

    @property
    def alone(self) -> bool:
        """Whether the largest width is the only one that is trained."""
        return self.full_warm_epoch >= self.epochs


@dataclass(frozen=True)
class EvalSettings(Settings):
    """At which widths to evaluate: ``all`` that were trained, or ratios."""

    eval_ratio: str | Sequence[float] = flag(
        ["1.0"], "widths to evaluate with --eval: ratios, or all for every trained width", "--eval_ratio", own="all",
        nargs="+", metavar="r",
    )  # fmt: skip
    allow_untrained: bool = flag(False, "evaluate a width that was not trained, whose accuracy is chance")
    calibrate_batches: int = flag(
        0, "batches of training images that give an untrained width its batch statistics, in models with batch "
        "normalisation", type=count, metavar="N",
    )  # fmt: skip


@dataclass(frozen=True)
class ScalaAugmentation(AugmentationSettings):
    """DeiT's augmentation, and DeiT III's."""

    hflip: float = flag(0.5, "probability of a flip; digits: 0", type=fraction, metavar="P")
    crop_padding: int = flag(
        4, "border in pixels of images of up to 32, which are cropped at random", type=count, metavar="N"
    )
    ThreeAugment: bool = flag(False, "3-Augment instead of --aa", "--ThreeAugment")
    src: bool = flag(False, "simple random crop, with --ThreeAugment")


@dataclass(frozen=True)
class CosineSettings(Settings):
    """Those of DeiT's schedule flags that do something under a cosine."""

    epochs: int = flag(300, "epochs", type=positive_int, metavar="N")
    start_epoch: int = flag(
        0, "count epochs from here; a resumed run knows its own", "--start_epoch", type=count, metavar="N"
    )
    sched: str = flag("cosine", "the only schedule there is", choices=("cosine",))
    warmup_epochs: int = flag(5, "linear warm-up", type=count, metavar="N")
    warmup_lr: float = flag(1e-6, "its first rate", type=positive_float, metavar="LR")
    min_lr: float = flag(1e-5, "the last rate", type=positive_float, metavar="LR")
    lr_noise: Sequence[float] | None = flag(
        None, "from which, and up to which, fraction of the epochs the rate gets noise (default: never)", type=float,
        nargs="+", metavar="FRACTION",
    )  # fmt: skip
    lr_noise_pct: float = flag(0.67, "its bound", type=positive_float, metavar="P")
    unscale_lr: bool = flag(False, "take --lr as it is, instead of for 512 images per step")


@dataclass(frozen=True)
class CheckpointSettings(Settings):
    """The trained network that a program starts from, and what its file may not say itself."""

    checkpoint: str = flag(
        None, "of main_scala.py or main_dinov2.py, or a state dict: path or URL", own="", required=True, metavar="FILE"
    )
    weights: str = flag(
        "model", "which weights of it; the published numbers are those of model", choices=("model", "model_ema")
    )
    model: str | None = flag(None, "the network's name (default: the checkpoint's)", metavar="NAME")
    allow_untrained: bool = flag(False, "take widths that were not trained, whose accuracy is chance")


@dataclass(frozen=True)
class ProbeSettings(Settings):
    """What is probed by ``linear_probe.py``."""

    head: str = flag(
        "auto", "one head cut like the backbone, or one per width; auto: sliced for clips",
        choices=("auto", "sliced", "separate"),
    )  # fmt: skip
    ratios: Sequence[float] | None = flag(
        None, "widths to evaluate, and to train with --head separate (default: all that were trained)", type=float,
        nargs="+", metavar="R",
    )  # fmt: skip
    allow_untrained: bool = False
    frames: int = flag(8, "frames of a clip", type=positive_int, metavar="T")
    fold: int = flag(1, "which of UCF101's lists", choices=(1, 2, 3))
    smoothing: float = flag(0.0, "label smoothing", type=fraction)


def add_width_args(group: Any, defaults: Mapping[str, float] | None = None) -> None:
    """--smallest_ratio, --largest_ratio, --granularity; without ``defaults`` None, for a checkpoint to say."""
    for name, metavar, what in (
        ("smallest_ratio", "s", "smallest width ratio, which uses the leading channels"),
        ("largest_ratio", "l", "largest width ratio"),
        ("granularity", "g", "step between the trained widths"),
    ):
        value, said = (defaults or DEFAULTS)[name], "" if defaults else "the checkpoint's, else "
        group.add_argument(
            f"--{name}", PUBLISHED_SPELLINGS.get(name, f"--{name.replace('_', '-')}"), type=positive_float,
            default=defaults and value, metavar=metavar, help=f"{what} (default: {said}{value:g})",
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What the flags say


def given(args: argparse.Namespace) -> dict[str, Any]:
    """Those flags of a network that the user gave; the others are the checkpoint's to say."""
    names = (*NETWORK_FLAGS, "init_values", "official_layer_scale", "num_classes")
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


# ---------------------------------------------------------------------------------------------------------------------
# main_scala.py


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    """All flags of ``main_scala.py``."""
    parser = cli.make_parser(description)
    add_width_args(add_flags(parser, "scale coordination", StepSettings))
    add_flags(parser, "evaluation", EvalSettings)
    add = add_flags(parser, "network", NetworkSettings).add_argument
    add("--num-classes", type=positive_int, metavar="N", help="classes (default: as many as the data set has)")
    add_flags(parser, "losses", LossSettings)
    cli.add_data_args(parser, input_size=None)
    parser.add_argument(
        "--global-batch-size", type=positive_int, metavar="N",
        help="images per step over all processes, in place of --batch-size per process (default: none)",
    )  # fmt: skip
    add_flags(parser, "augmentation", ScalaAugmentation)
    cli.add_optimizer_args(parser)
    add_flags(parser, "schedule", CosineSettings)
    cli.add_runtime_args(parser, fsdp=True, amp=None)  # resolved once the device is known
    cli.add_ignored_args(parser, REJECTED, refused=True)
    cli.add_ignored_args(parser, {"--resplit": "there are no augmentation splits"}, nargs=0, refused=True)
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
    mixing = bool(args.mixup or args.cutmix or args.cutmix_minmax) and not args.eval
    kind = args.distillation_type
    teaching = kind != "none" and not args.eval
    for wrong, message in (
        (teaching and "distilled" not in args.model,
         f"--distillation-type {kind} needs a model with a distillation head, a *_distilled_* one, got --model "
         f"{args.model}; or give --distillation-type none"),
        (teaching and not args.teacher_path,
         "--distillation-type needs --teacher-path: the teacher's weights, a path, a URL, or timm"),
        (teaching and args.finetune, "--finetune together with --distillation-type is not defined; leave one out"),
        (args.finetune == "timm" and not (args.model or "").startswith(TIMM),
         f"--weights timm needs --model {TIMM}NAME: timm has no weights of the models of this package"),
        (args.cosub and kind != "none",
         "--cosub replaces the loss of the largest width: leave --distillation-type out"),
        (args.bce_loss and mixing and args.smoothing,
         "--bce-loss takes every class with a target above 0, and smoothing raises all of them; give --smoothing 0"),
        (args.batch_size % 2 and mixing and args.global_batch_size is None,
         f"mixup and CutMix need an even --batch-size, got {args.batch_size}"),
        (args.src and not args.ThreeAugment, "--src belongs to --ThreeAugment: give both"),
        (args.ce_coefficient < 0, f"--ce_coefficient must not be negative, got {args.ce_coefficient:g}"),
    ):  # fmt: skip
        if wrong:
            parser.error(message)


def read_ratios(parser: argparse.ArgumentParser, words: Sequence[str]) -> str | list[float]:
    """``all``, or numbers given one by one or with commas."""
    words = [word for text in words for word in text.split(",") if word]
    if words == ["all"]:
        return "all"
    try:
        return [float(word) for word in words] or parser.error("--eval_ratio is empty")
    except ValueError:
        parser.error(f"--eval_ratio takes width ratios such as 0.5, or all, got {' '.join(words)!r}")
