"""What can only be done on a machine with a GPU: one command, one file, in order of worth, within a time.

    make gpu OUT=DIR BUDGET_S=480
    python -m common.gpu --output DIR --only 'hourglass_swag*'   # some of the steps; --list says which there are
    python -m common.gpu --output DIR --rehearse                 # before that, where there is no GPU

Needs an interpreter with torch 2.11 or newer, torchvision, timm, pytest and tqdm, and PYTHONPATH=. ; nothing is
installed, nothing is downloaded. First come the tests marked ``gpu``. Then the rows that have a speed, all those that
share a dense row in turns with it: in bfloat16 a large batch, a batch of one, the same captured as a CUDA graph and
compiled; then in float32 as published; last the papers' claims, seed by seed. DIR/gpu.json holds what is done so far,
complete at any moment; what there was no time for is listed in it. ``python -m common.results add DIR/gpu.json`` files
it in a checkout.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from common.run.files import problem_with
from common.run.flags import make_parser
from common.run.program import run


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = make_parser(__doc__, prog="python -m common.gpu")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the file gpu.json")
    parser.add_argument(
        "--only", nargs="+", metavar="PATTERN", help="only steps whose name matches one of these (default: all)"
    )
    parser.add_argument("--skip", nargs="+", metavar="PATTERN", default=[], help="leave out rows that match")
    parser.add_argument("--list", action="store_true", help="print the steps and end")
    parser.add_argument(
        "--budget-s", type=float, default=480, help="seconds for everything: no step starts later (default: 480)"
    )
    parser.add_argument("--rounds", type=int, default=10, help="timed passes of each network (default: 10)")
    parser.add_argument(
        "-b",
        "--batch-size",
        type=int,
        help="batch of the throughput (default: 64 on a GPU, 4 on a CPU)",
    )
    parser.add_argument("--name", default="gpu", help="names the file, and the records once they are filed")
    parser.add_argument(
        "--device", default="cuda", help="cuda or cuda:N; cpu tries the job out where there is no GPU (default: cuda)"
    )
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="with --device cpu: count the time that one thread computes instead of the time that passes, for a "
        "machine that has other work to do",
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="go through every step on the CPU: tests are collected, programs parse their flags, each network is built "
        "without weights and timed as a tiny one; the file is marked, and cannot be filed",
    )
    args = parser.parse_args(argv)
    if args.device != "cpu" and not re.fullmatch(r"cuda(:\d+)?", args.device):
        parser.error(f"--device must be cpu, cuda or cuda:N, got {args.device!r}")
    if args.output and (problem := problem_with(args.output, folder=True)):
        parser.error(f"--output: {problem}")
    if args.processor_time and args.device != "cpu":
        parser.error("--processor-time: a GPU's work does not count as processor time; it goes with --device cpu")
    if not args.name or set(args.name) & set("/\\"):
        parser.error(f"--name must be the name of a file without its folder, got {args.name!r}")
    if args.output is None and not args.list:
        parser.error("--output DIR is missing: the folder for the JSON file")
    for flag, value in (("--rounds", args.rounds), ("--batch-size", args.batch_size), ("--budget-s", args.budget_s)):
        if value is not None and not value > 0:
            parser.error(f"{flag} must be positive, got {value}")
    return args


def main(argv: Sequence[str] | None = None, root: Path | None = None) -> int:
    """Entry point; for the exit status see ``run_job``."""
    args = parse_args(argv)
    from common.ledger.gpu import ROOT, run_job  # torch only behind the flags

    return run_job(args, sys.argv[1:] if argv is None else argv, root or ROOT)


if __name__ == "__main__":
    sys.exit(run(main))
