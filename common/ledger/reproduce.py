"""The main job: every published value against the one that comes out here.

    python -m common.reproduce                                       # all papers: costs, recorded speeds
    python -m common.reproduce hourglass_swag --table hourglass           # one table in full
    python -m common.reproduce hourglass_swag --row hourglass-l16-12-23x23 --columns gmacs,throughput_ips
    python -m common.reproduce hourglass_swag --data /data/imagenet --format json --output ledger.json

Costs need no data, no weights and no GPU. Accuracies need ``--data``; speeds are measured where there is a GPU, or
when ``--columns`` names one. The exit status is 1 if a row failed, 2 if the command line makes no sense.
"""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from common.ledger import cache
from common.ledger.compare import Ledger
from common.ledger.gather import Request, build, run_live, select
from common.ledger.report import FORMATS, write_report
from common.ledger.tables import TableError, column, load_tables, papers
from common.ledger.text import legend, own_text, to_text
from common.ledger.view import plural
from common.run.errors import LaunchError
from common.run.files import ROOT, problem_with, write_atomic
from common.run.flags import make_parser

DEVICE_FILES = ("/dev/nvidiactl", "/dev/nvhost-ctrl", "/dev/dxg", "/dev/kfd")
"""Without any of these Linux has no device that torch calls cuda."""


def parse_args(argv: Sequence[str] | None = None, *, root: Path = ROOT) -> argparse.Namespace:
    """Read the command line.

    Raises:
        SystemExit: if a paper or format does not exist.
    """
    parser = make_parser((__doc__ or "").splitlines()[0], prog="python -m common.reproduce")
    known = ", ".join(papers(root))
    parser.add_argument("papers", metavar="PAPER", nargs="*", help=f"papers to reproduce: {known} (default: all)")
    parser.add_argument("--table", metavar="T", help="only this table, e.g. hourglass")
    parser.add_argument("--row", metavar="R", help="only this row, e.g. hourglass-l16-12-23x23")
    parser.add_argument(
        "--columns",
        metavar="C,C,...",
        help="only these columns, e.g. gmacs,params_m,fps,throughput_ips,top1_percent; naming a speed column measures "
        "it here, on the CPU too (default: all columns, speeds measured only on a GPU)",
    )
    parser.add_argument("--data", metavar="DIR", type=Path, help="root of ImageNet-1K, to evaluate accuracies")
    parser.add_argument(
        "--weights", metavar="DIR", type=Path, help="folder of published checkpoints (default: torch's hub cache)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--format", choices=sorted(FORMATS), default="text", help="form of the output (default: text)")
    parser.add_argument("--output", metavar="FILE", type=Path, help="write to this file instead of the screen")
    parser.add_argument(
        "--live", action="store_true", help="then train, evaluate and export with each paper's method: a minute each"
    )
    parser.add_argument(
        "--report", metavar="DIR", type=Path, help="also write report.md, index.html, ledger.json, ledger.csv and plots"
    )
    parser.add_argument("--force", action="store_true", help="compute again what the local cache holds")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("-v", "--verbose", action="store_true", help="show what the programs of --live print")
    args = parser.parse_args(argv)
    for name in args.papers:
        if name not in papers(root):
            parser.error(f"there is no paper {name!r}; the papers are {known}")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", args.device):
        parser.error(f"--device must be auto, cpu, cuda or cuda:N, got {args.device!r}")
    for option in ("data", "weights"):
        folder = getattr(args, option)
        if folder is not None and not folder.is_dir():
            parser.error(f"--{option}: there is no folder {folder}")
    for option in ("output", "report"):
        path = getattr(args, option)
        if path is not None and (problem := problem_with(path, folder=option == "report")):
            parser.error(f"--{option}: {problem}")
    return args


def parse_columns(text: str | None, published: Sequence[str], everywhere: Sequence[str]) -> frozenset[str] | None:
    """Names of a comma-separated list; None for all.

    Args:
        text: the list.
        published: columns of the chosen tables.
        everywhere: columns of all tables.

    Raises:
        ValueError: if a column does not exist, or the chosen tables publish none of them; the message lists what there
            is.
    """
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in everywhere:
            raise ValueError(f"--columns: there is no column {name!r}; the columns are {', '.join(everywhere)}")
    if not set(names) & set(published):
        raise ValueError(f"--columns: the chosen tables publish none of these; they publish {', '.join(published)}")
    return frozenset(names)


def resolve_device(name: str) -> str:
    """``auto`` becomes cuda where there is one, else cpu.

    Raises:
        LaunchError: if the device does not exist here.
    """
    if name == "cpu" or (name == "auto" and sys.platform == "linux" and not any(map(os.path.exists, DEVICE_FILES))):
        return "cpu"
    from common.run.launch import choose_device  # imports torch, which not every run needs

    return str(choose_device(name))


def check_weights() -> None:
    """Refuse to evaluate without any checkpoint.

    Raises:
        ValueError: naming the folder that is empty.
    """
    from common.run.checkpoint import hub_folder  # imports torch, which evaluating needs

    if not (folder := hub_folder()).is_dir() or not any(folder.iterdir()):
        raise ValueError(f"--data: no checkpoint is in {folder}, torch's hub cache; name their folder by --weights DIR")


def main(argv: Sequence[str] | None = None, *, root: Path = ROOT) -> int:
    """Entry point."""
    args = parse_args(argv, root=root)
    try:
        everything = load_tables(root=root)
        chosen = [table for table in everything if not args.papers or table.paper in args.papers]
        tables = select(chosen, table=args.table, row=args.row)
        published, everywhere = (
            list(dict.fromkeys(name for table in group for name in table.columns)) for group in (tables, everything)
        )
        columns = parse_columns(args.columns, published, everywhere)
        device = resolve_device(args.device)
        if args.data and not args.weights:
            check_weights()
    except (TableError, ValueError, LaunchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    named = columns is not None and any(column(name).kind == "speed" for name in columns)
    measured = named or device.startswith("cuda")
    request = Request.of(args, columns=columns, device=device, measure_speed=measured, root=root)
    cache.skipped.clear()
    ledger = build(tables, request, all_tables=everything)
    screen = sys.stdout if args.format == "text" or args.output else sys.stderr
    show(ledger, args, screen)
    with contextlib.redirect_stdout(screen):  # also of what the programs print
        for paper in dict.fromkeys(table.paper for table in tables) if args.live else ():
            if own := run_live(paper, request, ledger):
                print(f"\n{own_text(own)}", flush=True)
                write(ledger, args)
    conclude(ledger, screen)
    return 1 if ledger.failures else 0


def show(ledger: Ledger, args: argparse.Namespace, screen: TextIO) -> None:
    """The ledger on the screen or in a file, and the report: before anything trains."""
    if not args.output:
        print(render(ledger, args), end="", flush=True)
    number = write(ledger, args)
    if args.output:
        print(f"{legend(ledger)}\nWritten: {args.output}")
    if args.report:
        print(f"Report: {args.report / 'index.html'} and {number - 1} other files in {args.report}", file=screen)


def render(ledger: Ledger, args: argparse.Namespace) -> str:
    """The ledger in the form that was asked for."""
    if args.format == "text":
        return to_text(ledger, full=bool(args.table or args.row or args.columns))
    return FORMATS[args.format](ledger)


def write(ledger: Ledger, args: argparse.Namespace) -> int:
    """The files that were asked for, again after each live run; how many are in the report."""
    if args.output:
        write_atomic(args.output, render(ledger, args))
    return len(write_report(ledger, args.report, quiet=args.quiet)) if args.report else 0


def conclude(ledger: Ledger, screen: TextIO) -> None:
    """What came from the cache, errors, and totals as the last line."""
    if reused := cache.report_skipped():
        print(reused, file=screen)
    for failure in ledger.failures:
        print(f"ERROR {failure}", file=sys.stderr)
    counts = ledger.counts()
    totals = ", ".join(f"{count} {status}" for status, count in counts.items())
    errors = f", {plural(len(ledger.failures), 'error')}" if ledger.failures else ""
    print(f"{plural(sum(counts.values()), 'published value')}: {totals}{errors}", file=screen)
