"""What can only be done on a machine with a GPU, in parts that each end within minutes.

    make gpu OUT=DIR                                  # all parts, one after the other
    python -m common.gpu --output DIR --part 3        # one of them; --list says which there are

Needs an interpreter with torch 2.11 or newer, torchvision, timm, pytest and tqdm, and PYTHONPATH=. ; nothing is
installed, nothing is downloaded. Part 1 runs the tests marked ``gpu``. Each further part measures the rows of one table
that share a dense row, in one precision, each row in turns with that dense row. A part writes one JSON file under DIR,
complete or not at all; ``python -m common.results add DIR/*.json`` files them in a checkout.
"""

import argparse
import importlib
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch

from common import results
from common.benchmark import describe_device, device_name
from common.cache import ROOT
from common.speeds import COLUMNS, LARGE_BATCH, measure_rows
from common.tables import Row, Unavailable, load_tables, papers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TEST_MARK = re.compile(r"\bmark\.gpu\b")


@dataclass(frozen=True)
class Part:
    """One piece of the job: the tests, or rows of one paper in one precision."""

    number: int
    name: str
    rows: tuple[Row, ...] = ()
    dtype: str = ""

    @property
    def label(self) -> str:
        """``part2-...``: names the file of the part."""
        return f"part{self.number}-{self.name}"


def plan(root: Path = ROOT) -> list[Part]:
    """All parts: the tests, then table by table the rows that can be built, by dense row and precision.

    A paper takes part once its adapter ``<paper>/ledger.py`` has ``build(row) -> (network, resolution)``.
    """
    parts = [Part(1, "tests")]
    for paper in papers(root):
        if (adapter := find_adapter(paper)) is None:
            continue
        tables = load_tables(paper, root=root)
        dense = {row.dense for table in tables for row in table.rows if row.dense}
        for table in tables:
            groups: dict[str, list[Row]] = {}
            for row in table.rows:
                has_speed = not row.cited and bool(set(row.published) & set(COLUMNS))
                if has_speed and row.key not in dense and can_build(adapter, row):
                    groups.setdefault(row.dense or row.key, []).append(row)
            for key, rows in groups.items():
                for dtype in DTYPES:
                    name = f"{paper}-{table.name}-{key.split('/')[1]}-{dtype}"
                    parts.append(Part(len(parts) + 1, name, tuple(rows), dtype))
    return parts


def find_adapter(paper: str) -> ModuleType | None:
    """The paper's adapter; None if the paper has none yet, or one that builds no rows."""
    try:
        adapter = importlib.import_module(f"{paper}.ledger")
    except ModuleNotFoundError as error:
        if error.name not in (paper, f"{paper}.ledger"):
            raise
        return None
    return adapter if hasattr(adapter, "build") else None


def can_build(adapter: ModuleType, row: Row) -> bool:
    """Whether the row's network is implemented: it is built on the meta device, where that costs nothing."""
    try:
        with torch.device("meta"):
            adapter.build(row)
    except Unavailable:
        return False
    return True


def run_tests(limit_s: float, root: Path = ROOT) -> tuple[int, str]:
    """Run the tests marked ``gpu``; only files that hold such a test are collected, so that nothing else is imported.

    Returns:
        pytest's exit status (1 also if there is no such test, or none of them ran) and the end of its output.
    """
    files = [path for path in sorted(root.glob("*/tests/**/test_*.py")) if TEST_MARK.search(path.read_text("utf-8"))]
    if not files:
        return 1, "no test is marked gpu"
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-m", "gpu", "-p", "no:cacheprovider", *map(str, files)]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired as error:
        text = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        return 124, f"{text}\nstopped after {limit_s:.0f} s"
    text = done.stdout + done.stderr
    status = done.returncode if " passed" in text or done.returncode else 1
    return status, text


def run_part(
    part: Part,
    *,
    output: Path,
    device: torch.device,
    limit_s: float,
    rounds: int,
    batch_size: int | None,
    columns: Sequence[str] = COLUMNS,
    processor_time: bool = False,
    root: Path = ROOT,
) -> int:
    """Do one part and write its file.

    ``processor_time`` counts the seconds that this process computed, on one thread, which other work on the machine
    disturbs little; ``limit_s`` counts them too.

    Returns:
        0, or 1 if a test failed or nothing could be measured.
    """
    begin = time.perf_counter()
    command = f"python -m common.gpu --part {part.number} --rounds {rounds} --columns {' '.join(columns)} --output DIR"
    command += f" --device {device}" if device.type == "cpu" else ""
    command += f" -b {batch_size}" if batch_size else ""
    described = describe_device(device)
    if processor_time:
        command += " --processor-time"
        described |= {"threads": 1, "timing": "processor time, 1 thread"}
    origin = results.Origin(results.now(), results.current_commit(root), described, command, part=part.label)
    path = output / f"{part.label}.json"
    if not part.rows:
        status, text = run_tests(limit_s, root)
        print(text)
        summary = next((line for line in reversed(text.splitlines()) if line.strip()), "")
        results.write_records(path, [], replace(origin, tests={"status": status, "summary": summary}))
    else:
        adapter = find_adapter(part.rows[0].paper)
        assert adapter is not None
        run = measure_rows(
            part.rows,
            adapter.build,
            device=device,
            columns=columns,
            dtype=DTYPES[part.dtype],
            batch_size=batch_size,
            rounds=rounds,
            limit_s=limit_s,
            progress=f"part {part.number}:",
            clock=time.process_time if processor_time else time.perf_counter,
            root=root,
        )
        results.write_records(path, run.records, replace(origin, left_out=run.left_out))
        for record in run.records:
            ratio = "" if record.ratio is None else f", {record.ratio:.3f} x {record.reference_row}"
            spread = "" if record.spread_percent is None else f", spread {record.spread_percent:.1f} %"
            print(
                f"{record.table}/{record.row} {record.column}: {record.value:.2f} im/s at batch {record.batch_size}"
                f"{ratio}{spread}"
            )
        for reason in run.left_out:
            print(f"left out: {reason}")
        status = 0 if run.records else 1
    print(f"{part.label}: {time.perf_counter() - begin:.0f} s, written to {path}", flush=True)
    return status


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m common.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the JSON files, one per part")
    parser.add_argument("--part", type=int, metavar="N", help="only this part (default: all, one after the other)")
    parser.add_argument("--list", action="store_true", help="print the parts and end")
    parser.add_argument(
        "--limit-s",
        type=float,
        default=480,
        help="seconds for each part: it starts nothing that ends later (default: 480)",
    )
    parser.add_argument("--rounds", type=int, default=20, help="timed passes of each network of a pair (default: 20)")
    parser.add_argument(
        "-b",
        "--batch-size",
        type=int,
        help=f"batch of the throughput (default: {LARGE_BATCH['cuda']}, halved until it fits)",
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        choices=COLUMNS,
        default=COLUMNS,
        help=f"speeds to measure: fps is batch 1 (default: {' '.join(COLUMNS)})",
    )
    parser.add_argument(
        "--device", default="cuda", help="cuda or cuda:N; cpu tries the job out where there is no GPU (default: cuda)"
    )
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="with --device cpu: count the time that one thread computes instead of the time that passes, for a "
        "machine that has other work to do",
    )
    args = parser.parse_args(argv)
    if args.processor_time and torch.device(args.device).type != "cpu":
        parser.error("--processor-time: a GPU's work does not count as processor time; it goes with --device cpu")
    if args.output is None and not args.list:
        parser.error("--output DIR is missing: the folder for the JSON files")
    for flag, value in (("--rounds", args.rounds), ("--batch-size", args.batch_size), ("--limit-s", args.limit_s)):
        if value is not None and value <= 0:
            parser.error(f"{flag} must be positive, got {value}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; exit status 2 without the device that was asked for, 1 if a part failed."""
    args = parse_args(argv)
    parts = plan()
    if args.list:
        for part in parts:
            print(f"{part.number:3} {part.name} {' '.join(row.id for row in part.rows)}".rstrip())
        return 0
    device = torch.device(args.device)
    if args.processor_time:
        torch.set_num_threads(1)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "this machine has no CUDA device that torch can use; run this on one that has, or see --device cpu",
            file=sys.stderr,
        )
        return 2
    chosen = [part for part in parts if args.part in (None, part.number)]
    if not chosen:
        print(f"there is no part {args.part}; there are 1 to {len(parts)} (--list)", file=sys.stderr)
        return 2
    print(f"{device_name(device)}, torch {torch.__version__}: {len(chosen)} of {len(parts)} parts", flush=True)
    failed = [
        part.label
        for part in chosen
        if run_part(
            part,
            output=args.output,
            device=device,
            limit_s=args.limit_s,
            rounds=args.rounds,
            batch_size=args.batch_size,
            columns=args.columns,
            processor_time=args.processor_time,
        )
    ]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
