"""How flags are declared: row by row, or as fields of the dataclasses that they end in. Imports no torch."""

from __future__ import annotations

import argparse
from dataclasses import field, fields
from typing import Any


class Group:
    """An argument group: ``add(flag, kind, default, help)``; every help text ends with the default.

    ``kind`` is what argparse calls type, ``bool`` for 1 or 0 as the published commands write it, or a tuple of choices.
    """

    def __init__(self, parser: argparse.ArgumentParser, title: str) -> None:
        self.group = parser.add_argument_group(title)

    def __call__(self, flag: str, kind: Any, default: Any, help: str, **options: Any) -> None:
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        shown = int(shown) if isinstance(shown, bool) else "none" if shown in (None, "") else shown
        if kind is bool:
            options |= {"type": switch, "metavar": "0|1"}
        else:
            options["choices" if isinstance(kind, tuple) else "type"] = kind
        self.group.add_argument(flag, default=default, help=f"{help} (default: {shown})".replace("%", "%%"), **options)

    def settings(self, kind: type) -> None:
        """The flags that the fields of a dataclass declare by ``flag``."""
        for item in fields(kind):
            if item.metadata:
                self(**{"flag": f"--{item.name}", "default": item.default, **item.metadata})

    def on(self, flag: str, help: str) -> None:
        """A switch that is off without it."""
        self.group.add_argument(flag, action="store_true", help=f"{help} (default: off)")


def flag(kind: Any, default: Any, help: str, **options: Any) -> Any:
    """A field of a dataclass that is set by the flag of its name, or by ``flag=``; arguments as ``Group``'s."""
    return field(default=default, metadata={"kind": kind, "help": help, **options})


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


def rate(text: str) -> float:
    """A learning rate: 0, which leaves things as they are, or more."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number from 0 on, got {text}")
    return value
