"""What every parser here is made of: a parser, kinds of values, and fields of settings that are flags.

@dataclass(frozen=True)
class MySettings(Settings):
    rate: float = flag(0.1, "share that is kept", type=fraction)  # --rate

add_flags(parser, "my group", MySettings, rate=0.2)               # with another default
settings = MySettings.of(parser.parse_args())
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import MISSING, field, fields
from difflib import get_close_matches
from typing import Any, NoReturn, Self

AMP_MODES = ("none", "fp16", "bf16")
AMP_BY_DEVICE = ("on", "auto")


class Parser(argparse.ArgumentParser):
    """A parser that names a mistake once, however many processes of a job read the same flags, and in one line."""

    def error(self, message: str) -> NoReturn:
        if os.environ.get("RANK", "0") != "0":
            self.exit(2)
        wrong = re.findall(r"--[\w-]+", message) if message.startswith("unrecognized") else []
        near = [get_close_matches(word, self._option_string_actions, n=1) for word in wrong]
        meant = " ".join(itertools.chain.from_iterable(near))
        self.exit(2, f"{self.prog}: error: {message}{f' (meant: {meant}?)' if meant else ''}; --help shows all flags\n")


def make_parser(description: str | None = None, **options: Any) -> argparse.ArgumentParser:
    """A parser that keeps the line breaks of ``description`` and takes no abbreviated flags."""
    options = {"formatter_class": argparse.RawDescriptionHelpFormatter} | options
    return Parser(description=description, allow_abbrev=False, **options)


class Switch(argparse.BooleanOptionalAction):
    """``--flag`` and ``--no-flag``, with the same help text on every Python version."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None, **options: Any) -> None:
        super().__init__(option_strings, dest, **options)
        self.help = help


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


def number(text: str) -> float:
    """What a flag of type float takes: a typed nan would pass every later comparison."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
    return value


def not_negative(text: str) -> float:
    """A rate, a decay or a strength: 0, which leaves things as they are, or more."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number from 0 on, got {text}")
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


def amp_mode(text: str) -> str:
    if text not in (*AMP_MODES, *AMP_BY_DEVICE):
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(AMP_MODES)}, got {text!r}")
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Settings


class Group:
    """Flags that are no fields of settings: ``add(spellings, kind, default, help)``; defaults are said as there.

    ``spellings`` are divided by spaces. ``kind`` is what argparse calls type, ``bool`` for a switch that is off without
    its flag, ``Switch`` for one with ``--no-flag``, or a tuple of choices.
    """

    def __init__(self, parser: argparse.ArgumentParser, title: str) -> None:
        self.group = parser.add_argument_group(title)

    def __call__(self, spellings: str, kind: Any, default: Any, help: str, **options: Any) -> None:
        if kind in (bool, Switch):
            options["action"] = "store_true" if kind is bool else kind
        else:
            options["choices" if isinstance(kind, tuple) else "type"] = kind
        _add(self.group, spellings.split(), default=default, help=help, **options)


def _add(group: Any, spellings: Sequence[str], *, default: Any, help: str, **options: Any) -> None:
    shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else default
    if isinstance(default, bool) and "action" in options:
        shown = "on" if default else "off"
    elif isinstance(default, bool):  # of a flag that takes 0 or 1
        shown = int(default)
        options.setdefault("metavar", "0|1")
    elif shown in (None, ""):
        shown = "none"
    if options.get("type") is float:
        options["type"] = number
    said = "" if options.get("required") or "(default: " in help else f" (default: {shown})"
    group.add_argument(*spellings, default=default, help=(help + said).replace("%", "%%"), **options)


class Settings:
    """Base of small frozen dataclasses that hold what flags say; they travel below ``main`` instead of a Namespace."""

    @classmethod
    def of(cls, args: argparse.Namespace, **changes: Any) -> Self:
        """Fields by their flags' names.

        Args:
            args: a parser's result; a flag that the program does not have keeps the field's default.
            changes: fields whose flag has another name, or whose value is computed.

        Raises:
            TypeError: a field without default is in neither.
        """
        values = dict(changes)
        for own in fields(cls):  # pyright: ignore[reportArgumentType] - every subclass is a dataclass
            if own.name not in values and hasattr(args, own.name):
                values[own.name] = getattr(args, own.name)
            elif own.name not in values and own.default is MISSING:
                raise TypeError(f"{cls.__name__} needs {own.name}, and the program has no such flag")
        return cls(**values)


def flag(default: Any, help: str, *others: str, own: Any = ..., **options: Any) -> Any:
    """A field of ``Settings`` with its flag, ``--field-name``; a truth value is a switch with ``--no-field-name``.

    Args:
        default: of the flag.
        others: further spellings.
        own: default of the field, for programs without the flag, where it is another; ``MISSING`` for none.
        options: of ``add_argument``; ``type`` is that of the default where nothing else is said.
    """
    if isinstance(default, bool) and "type" not in options:
        options["action"] = Switch
    elif default is not None and "nargs" not in options:
        options.setdefault("type", type(default))
    said = {"others": others, "options": {**options, "default": default, "help": help}}
    return field(default=default if own is ... else own, metadata=said)


def add_flags(
    parser: argparse.ArgumentParser, title: str, settings: type[Settings], *, dash: str = "-", **defaults: Any
) -> Any:
    """The flags of ``settings`` as a group of ``parser``; every help text ends with the default, or says it itself.

    Args:
        dash: what stands in a flag for the underscores of its field.
        defaults: in place of the flags' own, by field.

    Raises:
        TypeError: a default for a field that is no flag.
    """
    group = parser.add_argument_group(title)
    for own in fields(settings):  # pyright: ignore[reportArgumentType] - every subclass is a dataclass
        if own.metadata:
            options = dict(own.metadata["options"])
            options["default"] = defaults.pop(own.name, options["default"])
            spellings = ["--" + own.name.replace("_", dash), *own.metadata["others"]]
            _add(group, spellings, dest=own.name, **options)
    if defaults:
        raise TypeError(f"the group {title!r} has no flag for {', '.join(sorted(defaults))}")
    return group
