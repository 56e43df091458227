"""Flags that the papers share, in groups, with DeiT's names and defaults; a paper picks groups and its own defaults.

    parser = make_parser(__doc__)
    add_data_args(parser, data_set="IMNET")
    add_optimizer_args(parser, lr=2e-4)
    args = parser.parse_args()

A group's keyword arguments replace its defaults, by the flag's name with underscores. A flag that nothing reads is not
here; one that a published command passes all the same goes through :func:`add_ignored_args` and warns.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

AMP_MODES = ("none", "fp16", "bf16")
AMP_BY_DEVICE = ("on", "auto")
DATASET_NAMES = {
    "IMNET": "imagenet",
    "CIFAR": "cifar100",
    "CIFAR10": "cifar10",
    "CIFAR100": "cifar100",
    "INAT": "inat18",
    "INAT18": "inat18",
    "INAT19": "inat19",
    "DIGITS": "digits",
}
INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")


class Parser(argparse.ArgumentParser):
    """A parser that names a mistake once, however many processes of a job read the same flags."""

    def error(self, message: str) -> NoReturn:
        if os.environ.get("RANK", "0") != "0":
            self.exit(2)
        super().error(message)


def make_parser(description: str | None = None, **options: Any) -> argparse.ArgumentParser:
    """A parser that keeps the line breaks of ``description`` and takes no abbreviated flags."""
    return Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **options,
    )


class Switch(argparse.BooleanOptionalAction):
    """``--flag`` and ``--no-flag``, with the same help text on every Python version."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None, **options: Any) -> None:
        super().__init__(option_strings, dest, **options)
        self.help = help


class _Group:
    """An argument group whose defaults the caller may replace; every help text ends with the default."""

    def __init__(self, parser: argparse.ArgumentParser, title: str, defaults: Mapping[str, Any]) -> None:
        self.group = parser.add_argument_group(title)
        self.parser = parser
        self.defaults = dict(defaults)

    def add(self, *flags: str, help: str, **options: Any) -> None:
        dest = options.get("dest") or flags[0].lstrip("-").replace("-", "_")
        if flags[0].startswith("-"):
            options["dest"] = dest
        options["default"] = self.defaults.pop(dest, options.get("default"))
        shown = options["default"]
        if options.get("action") is Switch:
            shown = "on" if shown else "off"
        elif shown in (None, ""):
            shown = "none"
        elif isinstance(shown, (list, tuple)):
            shown = " ".join(str(item) for item in shown)
        self.group.add_argument(*flags, help=f"{help} (default: {shown})".replace("%", "%%"), **options)

    def done(self) -> None:
        if self.defaults:
            raise TypeError(f"the group {self.group.title!r} has no flag for {', '.join(sorted(self.defaults))}")


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {text}")
    return value


def default_workers(wanted: int) -> int:
    """Loading processes where nobody says how many: ``wanted``, or as many as there are cores for this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(wanted, cores)


def amp_mode(text: str) -> str:
    if text not in (*AMP_MODES, *AMP_BY_DEVICE):
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(AMP_MODES)}, got {text!r}")
    return text


def dataset_name(text: str) -> str:
    """DeiT's names (``IMNET``, ``INAT``, ...) to those of ``common.data.loaders``, which pass as they are."""
    return DATASET_NAMES.get(text, text)


# ---------------------------------------------------------------------------------------------------------------------
# Groups


def add_data_args(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """--data-path, --data-set, --inat-category, --input-size, --eval-crop-ratio, --batch-size, --workers, ..."""
    group = _Group(parser, "data", {**defaults, "workers": default_workers(defaults.get("workers", 10))})
    add = group.add
    add("--data-path", default="", metavar="DIR", help="folder of the dataset; the digits need none")
    add(
        "--data-set",
        default="IMNET",
        metavar="NAME",
        help="IMNET (class folders under train/ and val/), CIFAR (CIFAR-100), CIFAR10, INAT (2018), INAT19, digits, "
        "folder, tar, or a name for timm's create_dataset such as hfds/ORG/SET",
    )
    add(
        "--inat-category",
        default="name",
        choices=INAT_CATEGORIES,
        help="level of iNaturalist's taxonomy that makes the classes",
    )
    add("--input-size", type=positive_int, default=224, metavar="PIXELS", help="side of the square input, in pixels")
    add(
        "--eval-crop-ratio",
        type=fraction,
        default=0.875,
        metavar="RATIO",
        help="share of the resized image's side that the evaluation crop keeps",
    )
    add("--batch-size", "-b", type=positive_int, default=64, metavar="N", help="images per step and process")
    add(
        "--workers",
        "--num-workers",
        "--num_workers",
        "-j",
        type=count,
        metavar="N",
        help="loading processes per process, no more than cores by default; 0 loads in the process itself",
    )
    add("--pin-mem", action=Switch, default=True, help="page-locked memory for faster copies to the GPU")
    add(
        "--skip-bad-images",
        action=Switch,
        default=False,
        help="leave out images that cannot be decoded, and count them, instead of stopping",
    )
    group.done()


def add_augmentation_args(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """--aa, --color-jitter, --reprob, --mixup, --cutmix, --smoothing, --repeated-aug and their companions."""
    group = _Group(parser, "augmentation", defaults)
    add = group.add
    add("--color-jitter", type=float, default=0.3, help="strength of colour jitter; used where --aa is none")
    add("--aa", default="rand-m9-mstd0.5-inc1", metavar="POLICY", help="timm's automatic augmentation; '' for none")
    add(
        "--train-interpolation",
        default="bicubic",
        choices=("bicubic", "bilinear", "random"),
        help="resampling of the training crop; random is either per image",
    )
    add("--repeated-aug", action=Switch, default=True, help="three augmented versions of an image per epoch's share")
    add("--reprob", type=fraction, default=0.25, help="probability of random erasing")
    add("--remode", default="pixel", choices=("const", "rand", "pixel"), help="what random erasing fills in")
    add("--recount", type=positive_int, default=1, help="areas that random erasing takes")
    add("--mixup", type=float, default=0.8, metavar="ALPHA", help="mixup's Beta parameter; 0 for no mixup")
    add("--cutmix", type=float, default=1.0, metavar="ALPHA", help="CutMix's Beta parameter; 0 for no CutMix")
    add(
        "--cutmix-minmax",
        type=float,
        nargs=2,
        default=None,
        metavar=("MIN", "MAX"),
        help="smallest and largest side of CutMix's box as a share of the image's, instead of --cutmix",
    )
    add("--mixup-prob", type=fraction, default=1.0, help="probability of mixup or CutMix per batch")
    add("--mixup-switch-prob", type=fraction, default=0.5, help="probability of CutMix where both are on")
    add("--mixup-mode", default="batch", choices=("batch", "pair", "elem"), help="what one mixing ratio is drawn for")
    add("--smoothing", type=fraction, default=0.1, help="label smoothing: probability spread over all classes")
    group.done()


def add_optimizer_args(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """--opt, --opt-eps, --opt-betas, --lr, --momentum, --weight-decay, --clip-grad, --model-ema and its companions."""
    group = _Group(parser, "optimiser", defaults)
    add = group.add
    add("--opt", default="adamw", metavar="NAME", help="timm's name of the optimiser")
    add("--opt-eps", type=positive_float, default=1e-8, metavar="EPS", help="epsilon of Adam-like optimisers")
    add(
        "--opt-betas",
        type=float,
        nargs="+",
        default=None,
        metavar="BETA",
        help="betas of Adam-like optimisers; none is the optimiser's own, 0.9 0.999 for AdamW",
    )
    add("--lr", type=positive_float, default=5e-4, help="peak learning rate; each paper's README says how it scales")
    add("--momentum", type=float, default=0.9, help="of SGD-like optimisers")
    add("--weight-decay", type=float, default=0.05, help="decoupled decay per step and learning rate")
    add(
        "--clip-grad",
        type=positive_float,
        default=None,
        metavar="NORM",
        help="largest L2 norm of all gradients together; none does not clip",
    )
    add("--model-ema", action=Switch, default=True, help="keep a moving average of the weights")
    add("--model-ema-decay", type=fraction, default=0.99996, metavar="D", help="share of the average kept per step")
    add("--model-ema-force-cpu", action=Switch, default=False, help="keep the average in host memory (slower)")
    group.done()


def add_schedule_args(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """--epochs, --sched, --warmup-epochs, --warmup-lr, --min-lr and the rest of timm's schedules."""
    group = _Group(parser, "schedule", defaults)
    add = group.add
    add("--epochs", type=positive_int, default=300, help="epochs, without the cooldown")
    add(
        "--sched",
        default="cosine",
        choices=("cosine", "tanh", "step", "multistep", "plateau", "poly"),
        help="course of the learning rate over the epochs",
    )
    add(
        "--lr-noise",
        type=float,
        nargs="+",
        default=None,
        metavar="FRACTION",
        help="from which, and up to which, fraction of the epochs the learning rate gets noise",
    )
    add("--lr-noise-pct", type=float, default=0.67, help="bound of that noise, as a fraction of the rate")
    add("--lr-noise-std", type=float, default=1.0, help="standard deviation of that noise")
    add("--warmup-lr", type=float, default=1e-6, help="learning rate at the first epoch of the warm-up")
    add("--min-lr", type=float, default=1e-5, help="learning rate at the end of the schedule")
    add("--decay-epochs", type=float, default=30, help="epochs between two decays of --sched step")
    add("--warmup-epochs", type=count, default=5, help="epochs of linear warm-up")
    add("--cooldown-epochs", type=count, default=10, help="epochs at --min-lr after --epochs")
    add("--patience-epochs", type=count, default=10, help="epochs without gain before --sched plateau decays")
    add("--decay-rate", "--dr", type=float, default=0.1, help="factor of a decay of --sched step and plateau")
    group.done()


class _Apex(argparse.Action):
    """``--apex-amp`` of published commands: torch's own mixed precision, and a word about it."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        del parser, values
        namespace.amp = "on"
        if os.environ.get("RANK", "0") == "0":
            print(f"warning: {option_string}: apex is not used, torch's own mixed precision is", file=sys.stderr)


def _add_amp(group: _Group) -> None:
    group.add(
        "--amp",
        "--native-amp",
        nargs="?",
        const="on",
        type=amp_mode,
        default="none",
        metavar="MODE",
        help="mixed precision: none, fp16 (CUDA only), bf16, auto (fp16 on CUDA, none on the CPU), or no word for fp16 "
        "on CUDA and bf16 on the CPU",
    )
    group.group.add_argument(
        "--apex-amp", action=_Apex, nargs=0, dest="amp", default=argparse.SUPPRESS,
        help="of published commands: the same as --amp without a word (default: off)",
    )  # fmt: skip


def add_amp_args(parser: argparse.ArgumentParser, default: str = "none") -> None:
    """--amp and --apex-amp alone, for a program that does not take the whole runtime group."""
    _add_amp(_Group(parser, "mixed precision", {"amp": default}))


def add_runtime_args(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """--device, --amp, --compile, --seed, --output-dir, --resume, --eval, --tensorboard, --local-rank, ..."""
    group = _Group(parser, "runtime", defaults)
    add = group.add
    add("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda, or cuda:N")
    _add_amp(group)
    add("--compile", action=Switch, default=False, help="run the model through torch.compile")
    add("--seed", type=count, default=0, help="of all random numbers; each process adds its rank")
    add(
        "--output-dir",
        "--output_dir",
        default="",
        metavar="DIR",
        help="where checkpoints and the record go; without it nothing is written",
    )
    add("--resume", default="", metavar="FILE", help="continue from this file or URL; auto: from --output-dir's last")
    add("--eval", action=Switch, default=False, help="evaluate only")
    add("--tensorboard", action=Switch, default=False, help="also write TensorBoard's files into --output-dir")
    add(
        "--save-every-steps",
        type=positive_int,
        default=None,
        metavar="N",
        help="also write a checkpoint within epochs, every N optimiser steps; none only after epochs",
    )
    add(
        "--log-every-steps",
        type=positive_int,
        default=None,
        metavar="N",
        help="also record the loss terms every N optimiser steps; none only after epochs",
    )
    add(
        "--local-rank",
        "--local_rank",
        type=int,
        default=-1,
        metavar="N",
        help="set by torch.distributed.launch: this process's place on its machine; -1 without a launcher",
    )
    group.done()


class _Ignored(argparse.Action):
    """Takes a flag that does nothing, and says so."""

    def __init__(self, *args: Any, reason: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.reason = reason

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        del parser, namespace, values
        print(f"warning: {option_string} has no effect: {self.reason}", file=sys.stderr)


def add_ignored_args(parser: argparse.ArgumentParser, reasons: Mapping[str, str], *, nargs: Any = None) -> None:
    """Accept flags of published commands that do nothing; each one given prints a warning that names it.

    Args:
        reasons: why, by flag; several spellings of a flag are written ``"--a, --b"``.
        nargs: 0 for switches, None for flags with one value, "*" for any number.
    """
    group = parser.add_argument_group("accepted without effect")
    for flags, reason in reasons.items():
        options: dict[str, Any] = {} if nargs == 0 else {"metavar": "VALUE"}
        group.add_argument(
            *flags.split(", "),
            action=_Ignored,
            reason=reason,
            nargs=nargs,
            default=argparse.SUPPRESS,
            dest=argparse.SUPPRESS,
            help=f"no effect: {reason}".replace("%", "%%"),
            **options,
        )
