"""Flags that the papers share, in groups, with DeiT's names and defaults; a paper picks groups and its own defaults.

    parser = make_parser(__doc__)
    add_data_args(parser, data_set="IMNET")
    add_optimizer_args(parser, lr=2e-4)
    args = parser.parse_args()

A group's keyword arguments replace its defaults, by the flag's name with underscores; the flags themselves are the
fields of ``common.run.settings``. A flag that nothing reads is not there; one that a published command passes all the
same goes through :func:`add_ignored_args` and warns.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from typing import Any

from common.run.flags import Switch as Switch
from common.run.flags import add_flags
from common.run.flags import amp_mode as amp_mode
from common.run.flags import count as count
from common.run.flags import fraction as fraction
from common.run.flags import make_parser as make_parser
from common.run.flags import not_negative as not_negative
from common.run.flags import positive_float as positive_float
from common.run.flags import positive_int as positive_int
from common.run.settings import (
    FSDP,
    AugmentationSettings,
    DataSettings,
    OptimizerSettings,
    RunSettings,
    ScheduleSettings,
)

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


def dataset_name(text: str) -> str:
    """DeiT's names (``IMNET``, ``INAT``, ...) to those of ``common.data.loaders``, which pass as they are."""
    return DATASET_NAMES.get(text, text)


def default_workers(wanted: int) -> int:
    """Loading processes where nobody says how many: ``wanted``, or as many as there are cores for this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(wanted, cores)


# ---------------------------------------------------------------------------------------------------------------------
# Groups


def add_data_args(parser: argparse.ArgumentParser, *, workers: int = 10, **defaults: Any) -> None:
    """--data-path, --data-set, --inat-category, --input-size, --eval-crop-ratio, --batch-size, --workers, ..."""
    add_flags(parser, "data", DataSettings, workers=default_workers(workers), **defaults)


def add_augmentation_args(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """--aa, --color-jitter, --reprob, --mixup, --cutmix, --smoothing, --repeated-aug and their companions."""
    add_flags(parser, "augmentation", AugmentationSettings, **defaults)


def add_optimizer_args(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """--opt, --opt-eps, --opt-betas, --lr, --momentum, --weight-decay, --clip-grad, --model-ema and its companions."""
    add_flags(parser, "optimiser", OptimizerSettings, **defaults)


def add_schedule_args(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """--epochs, --sched, --warmup-epochs, --warmup-lr, --min-lr and the rest of timm's schedules."""
    add_flags(parser, "schedule", ScheduleSettings, **defaults)


def add_runtime_args(parser: argparse.ArgumentParser, *, fsdp: bool = False, **defaults: Any) -> None:
    """--device, --amp, --compile, --seed, --output-dir, --resume, --eval, --tensorboard, --local-rank, ...

    Args:
        fsdp: also --fsdp, for programs whose networks run their weights :func:`common.run.wrapping.within` units.
        defaults: in place of the flags' own, by field.
    """
    group = add_flags(parser, "runtime", RunSettings, **defaults)
    if fsdp:
        group.add_argument("--fsdp", action="store_true", help=f"{FSDP} (default: off)")
    group.add_argument(
        "--apex-amp", action=_Apex, nargs=0, dest="amp", default=argparse.SUPPRESS,
        help="of published commands: the same as --amp without a word (default: off)",
    )  # fmt: skip


class _Apex(argparse.Action):
    """``--apex-amp`` of published commands: torch's own mixed precision, and a word about it."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        del parser, values
        namespace.amp = "on"
        if os.environ.get("RANK", "0") == "0":
            print(f"warning: {option_string}: apex is not used, torch's own mixed precision is", file=sys.stderr)


class _Ignored(argparse.Action):
    """Takes a flag that does nothing, and says so; or ends the program."""

    def __init__(self, *args: Any, reason: str, refused: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        self.reason, self.refused = reason, refused

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        del namespace, values
        if self.refused:
            official = f"{option_string} would have no effect, as in the official code"
            parser.error(f"{official}: {self.reason}; leave it out")
        print(f"warning: {option_string} has no effect: {self.reason}", file=sys.stderr)


def add_ignored_args(
    parser: argparse.ArgumentParser, reasons: Mapping[str, str], *, nargs: Any = None, refused: bool = False
) -> None:
    """Accept flags of published commands that do nothing; each one given prints a warning that names it.

    Args:
        reasons: why, by flag; several spellings of a flag are written ``"--a, --b"``.
        nargs: 0 for switches, None for flags with one value, "*" for any number.
        refused: end the program instead, and leave them out of the help.
    """
    group = parser if refused else parser.add_argument_group("accepted without effect")
    for flags, reason in reasons.items():
        options: dict[str, Any] = {} if nargs == 0 else {"metavar": "VALUE"}
        group.add_argument(
            *flags.split(", "),
            action=_Ignored,
            reason=reason,
            refused=refused,
            nargs=nargs,
            default=argparse.SUPPRESS,
            dest=argparse.SUPPRESS,
            help=argparse.SUPPRESS if refused else f"no effect: {reason}".replace("%", "%%"),
            **options,
        )
