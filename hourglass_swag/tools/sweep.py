"""Many networks in one evaluation: what ``imagenet_1k_eval.py --sweep`` says, and its table."""

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import groupby
from pathlib import Path

from common.ledger.tables import load_tables
from common.run.errors import UsageError
from common.run.files import read_file
from hourglass_swag.models import REGISTRY
from hourglass_swag.tools.parser import check_method_flags, parse_network


@dataclass(frozen=True)
class Setting:
    """A network: its name in the output, its flags, and its published top-1 in percent, if it is a published row."""

    name: str
    network: argparse.Namespace
    published: float | None = None

    @property
    def shares(self) -> tuple[int, str]:
        """Resolution and published weights, or else backbone: settings that agree are evaluated in one pass."""
        entry = REGISTRY[self.network.model]
        return self.network.resolution, entry.weights or entry.size


def read_settings(text: str) -> list[list[Setting]]:
    """Settings by what they share.

    Args:
        text: names of published tables and rows, or patterns of them, with commas between; or a file with the words
            of one network in every line.

    Raises:
        UsageError: naming what is no such thing.
    """
    try:
        is_file = Path(text).is_file()
    except OSError:  # many names are too long for the name of a file
        is_file = False
    settings = _of_file(Path(text)) if is_file else _of_tables(text.split(","))
    ordered = sorted(settings, key=lambda setting: setting.shares)
    return [list(group) for _, group in groupby(ordered, key=lambda setting: setting.shares)]


def _of_file(path: Path) -> list[Setting]:
    settings: dict[str, Setting] = {}
    for number, line in enumerate(read_file(path).decode(errors="replace").splitlines(), 1):
        try:
            if not (words := shlex.split(line, comments=True)):
                continue
            network = parse_network(words)
            check_method_flags(network)
        except ValueError as error:
            raise UsageError(
                f"{path}, line {number}: {error}; expected words such as -m vit_l16_in1k -r 512"
            ) from error
        settings.setdefault(name := " ".join(words), Setting(name, network))
    if not settings:
        raise UsageError(f"--sweep {path} holds no line with a network")
    return list(settings.values())


def _of_tables(patterns: Sequence[str]) -> list[Setting]:
    rows = [row for table in load_tables("hourglass_swag") for row in table.rows if "top1_percent" in row.published]
    rows = [row for row in rows if row.arguments]
    settings: dict[str, Setting] = {}
    for pattern in patterns:
        found = [row for row in rows if fnmatch(row.id, pattern) or row.table == pattern]
        if not found:
            tables = ", ".join(dict.fromkeys(row.table for row in rows))
            raise UsageError(
                f"--sweep {pattern}: no file and no published row or table with an accuracy; the tables are {tables}, "
                f"the rows are named like {rows[0].id}"
            )
        for row in found:
            settings[row.id] = Setting(row.id, parse_network(row.arguments), float(row.published["top1_percent"]))
    return list(settings.values())


def table(settings: Sequence[Setting], measured: Mapping[str, Mapping[str, float]]) -> str:
    """Top-1 of every row in percent, beside what is published."""
    width = max(len(setting.name) for setting in settings)
    lines = [f"{'':{width}}   top-1  published  difference"]
    for setting in settings:
        found, published = measured[setting.name]["top1_percent"], setting.published
        beside = "" if published is None else f"{published:11.1f}{found - published:+12.2f}"
        lines.append(f"{setting.name:{width}}{found:8.2f}{beside}")
    return "\n".join(lines)
