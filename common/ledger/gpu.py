"""The steps of ``common.gpu``, the file that they fill, and the order in which they are done."""

import argparse
import fnmatch
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.ledger import results
from common.ledger.gather import find_adapter
from common.ledger.speeds import COLUMNS, Build, SpeedRun, measure_rows
from common.ledger.tables import Row, Unavailable, load_tables, papers
from common.measure.benchmark import Clock, describe_device, device_name, query_gpu, synchronize
from common.run.errors import LaunchError
from common.run.files import ROOT
from common.run.launch import choose_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCH = 64
"""Batch of the throughput on a GPU: large enough to fill it, small enough for every row of ViT-H/14."""
TEST_MARK = re.compile(r"\bmark\.gpu\b")
TESTS_LIMIT_S = 100
CLOCKS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
WAYS = (
    ("bfloat16", "throughput_ips", "eager"),
    ("bfloat16", "fps", "eager"),
    ("bfloat16", "fps", "graph"),
    ("float32", "throughput_ips", "eager"),
    ("float32", "fps", "eager"),
    ("bfloat16", "fps", "compiled"),
)
"""Precision, column and way of running, in order of worth."""
PROGRAMS = {
    "scala/benchmark": "-m scala.benchmark --dtype bfloat16 --batch-size 256 --device {device} --output {output}",
    "dvt/benchmark": "-m dvt.benchmark -b 64 256 --dtype bfloat16 --device {device} --output {output}",
}
"""Benchmarks of papers whose speeds are not rows of a table: name -> words; each writes one JSON file."""

EVIDENCE = "-m common.evidence {paper} --device {{device}} --output {{output}}"
"""What is measured for a paper's claims, last: seeds that are done when the budget ends are kept."""


@dataclass(frozen=True)
class Step:
    """One piece of the job: the tests, a program, or the rows of one dense row in one way."""

    name: str
    rows: tuple[Row, ...] = ()
    dtype: str = "float32"
    column: str = ""
    mode: str = "eager"
    program: str = ""


def plan(root: Path = ROOT, *, together: bool = True) -> list[Step]:
    """All steps in order of worth: the tests; then way by way, dense row by dense row.

    A paper takes part once its adapter ``<paper>/ledger.py`` has ``build(row) -> (network, resolution)``. With
    ``together`` (a GPU), rows of all tables of a paper that share a dense row are one step; else each table has its
    own, in eager mode only.
    """
    steps = [Step("tests")]
    groups: dict[str, list[Row]] = {}
    for paper in papers(root):
        adapter: Any = find_adapter(paper)
        if not (hasattr(adapter, "build") and hasattr(adapter, "speeds")):
            continue  # none yet, or one that builds no rows for timing
        tables = load_tables(paper, root=root)
        dense = {row.dense for table in tables for row in table.rows if row.dense}
        for table in tables:
            for row in table.rows:
                has_speed = bool(set(row.published) & set(COLUMNS)) or bool(row.dense)
                if has_speed and not row.cited and row.key not in dense and can_build(adapter.build, row):
                    key = (row.dense or row.key).replace("/", "-")
                    groups.setdefault(f"{paper}-{'' if together else table.name + '-'}{key}", []).append(row)
    for number, (dtype, column, mode) in enumerate(WAYS):
        if not together and mode != "eager":
            continue
        steps += [
            Step(f"{name}-{column}-{dtype}{'' if mode == 'eager' else '-' + mode}", tuple(rows), dtype, column, mode)
            for name, rows in groups.items()
        ]
        if together and number == 1:
            steps += [Step(name, program=words) for name, words in PROGRAMS.items() if (root / f"{name}.py").is_file()]
    if together:
        claims = [path.parent.parent.name for path in sorted(root.glob("*/tables/claims.toml"))]
        steps += [Step(f"{paper}/evidence", program=EVIDENCE.format(paper=paper)) for paper in claims]
    return steps


def can_build(build: Build, row: Row) -> bool:
    """Whether the row's network is implemented: it is built on the meta device, where that costs nothing."""
    try:
        with torch.device("meta"):
            build(row)
    except Unavailable:
        return False
    return True


def run_tests(limit_s: float, root: Path = ROOT, *, only_collect: bool = False) -> tuple[int, str]:
    """Run the tests marked ``gpu``; only files that hold such a test are collected, so that nothing else is imported.

    Args:
        limit_s: seconds after which they are stopped.
        root: folder that holds the papers.
        only_collect: import the tests and run none.

    Returns:
        pytest's exit status (1 also if there is no such test, or none of them ran) and the end of its output.
    """
    texts = {path: path.read_text("utf-8") for path in sorted(root.glob("*/tests/**/test_*.py"))}
    files = [path for path, text in texts.items() if TEST_MARK.search(text)]
    files.sort(key=lambda path: "nvcc" in texts[path])  # what compiles for a minute comes last
    if not files:
        return 1, "no test is marked gpu"
    words = ["-q", "-rs", "--durations=8", "-m", "gpu", "-p", "no:cacheprovider"]
    words += ["--collect-only"] if only_collect else ["-n", "4"] if find_spec("xdist") else []
    status, text = run_python(["-m", "pytest", *words, *map(str, files)], limit_s, root)
    return status or int(not only_collect and " passed" not in text), text


def run_python(words: Sequence[str], limit_s: float, folder: Path) -> tuple[int, str]:
    """Exit status and output of an interpreter; 124 where it was stopped after ``limit_s``."""
    run = partial(subprocess.run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    try:
        done = run([sys.executable, *words], cwd=folder, timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        text = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        return 124, f"{text}\nstopped after {limit_s:.0f} s"
    return done.returncode, done.stdout


def matmul_tflops(device: torch.device, size: int = 8192, passes: int = 20) -> float:
    """Rate of a bfloat16 matrix product of random data: what this device can reach at most, in 1e12 operations/s."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        torch.matmul(a, b)
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(passes):
        torch.matmul(a, b)
    synchronize(device)
    return 2 * size**3 * passes / (time.perf_counter() - begin) / 1e12


def run_program(words: str, device: torch.device, limit_s: float) -> Any:
    """What a benchmark program writes, until it is stopped.

    Raises:
        RuntimeError: with its last line, if it fails or has written nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output.json"
        status, text = run_python(words.format(device=device, output=output).split(), limit_s, ROOT)
        if status not in (0, 124) or not output.exists():
            raise RuntimeError(["no output", *text.strip().splitlines()][-1])
        return json.loads(output.read_text("utf-8"))


def parse_flags(words: str, device: torch.device, limit_s: float) -> None:
    """What stands for ``run_program`` in a rehearsal: the program's flags are parsed.

    Raises:
        RuntimeError: if it refuses them.
    """
    _, module, *flags = words.format(device=device, output="output.json").split()
    try:
        importlib.import_module(module).parse_args(flags)
    except SystemExit as error:
        raise RuntimeError(f"{module} refuses {' '.join(flags)}") from error


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether any of some shell patterns fits."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def stand_in(row: Row) -> tuple[nn.Module, int]:
    """The network of every row in a rehearsal."""
    return nn.Conv2d(3, 8, 16, stride=16), 32


@dataclass
class Job:
    """How the steps are done, what they have brought so far, and the file that holds it."""

    path: Path
    origin: results.Origin
    device: torch.device
    rounds: int = 10
    batch_size: int | None = None
    clock: Clock = time.perf_counter
    root: Path = ROOT
    records: list[results.Record] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    programs: dict[str, Any] = field(default_factory=dict)

    def write(self) -> None:
        """Write the file anew: a job that is killed later keeps this much."""
        origin = replace(self.origin, left_out=tuple(self.left_out), programs=self.programs)
        results.write_records(self.path, self.records, origin)

    def do(self, step: Step, limit_s: float) -> bool:
        """Do one step and write what it brought; whether it brought something, tests without a failure."""
        begin = time.perf_counter()
        run, good = SpeedRun(), True
        if step.program:
            try:
                ask = parse_flags if self.origin.rehearsal else run_program
                self.programs[step.name] = ask(step.program, self.device, limit_s)
            except RuntimeError as error:
                run.left_out.append(f"{step.name}: {error}")
                good = False
        elif not step.rows:
            status, text = run_tests(min(limit_s, TESTS_LIMIT_S), self.root, only_collect=self.origin.rehearsal)
            print(text)
            summary = next((line for line in reversed(text.splitlines()) if line.strip()), "")
            self.origin = replace(self.origin, tests={"status": status, "summary": summary})
            good = status == 0
        else:
            run = self.measure(step, limit_s)
            good = bool(run.records)
        self.records += run.records
        self.left_out += run.left_out
        self.write()
        for record in run.records:
            print(record)
        for reason in run.left_out:
            print(f"left out: {reason}")
        print(f"{step.name}: {time.perf_counter() - begin:.0f} s", flush=True)
        return good

    def measure(self, step: Step, limit_s: float) -> SpeedRun:
        """Measure the rows of a step: on a GPU, and in a rehearsal for it, together."""
        rehearsal, on_gpu = self.origin.rehearsal, self.device.type == "cuda"
        adapter: Any = find_adapter(step.rows[0].paper)
        run = measure_rows(
            step.rows,
            stand_in if rehearsal else adapter.build,
            device=self.device,
            columns=[step.column],
            dtype=DTYPES[step.dtype],
            batch_size=self.batch_size or (BATCH if on_gpu else None),
            mode="eager" if rehearsal else step.mode,
            together=on_gpu or rehearsal,
            rounds=self.rounds,
            limit_s=limit_s,
            progress=None if on_gpu or rehearsal else step.name,
            clock=self.clock,
            root=self.root,
        )
        if on_gpu:
            torch.cuda.empty_cache()
        return run


def run_job(args: argparse.Namespace, words: Sequence[str], root: Path = ROOT) -> int:
    """What ``common.gpu`` was asked for; exit status 2 without the device that was asked for, 1 if a step failed."""
    begin = time.perf_counter()
    try:
        device = choose_device("cpu" if args.rehearse or args.list else args.device)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    steps = plan(root, together=args.rehearse or args.device != "cpu")
    kept = [replace(step, rows=tuple(row for row in step.rows if not matches(row.id, args.skip))) for step in steps]
    steps = [step for step, whole in zip(kept, steps, strict=True) if step.rows or not whole.rows]
    chosen = [step for step in steps if matches(step.name, args.only or ["*"])]
    if not chosen:
        print(f"no step matches {args.only}; --list names the {len(steps)} steps", file=sys.stderr)
        return 2
    if args.list:
        for step in chosen:
            print(f"{step.name} {' '.join(row.id for row in step.rows)}".rstrip())
        return 0
    if args.processor_time:
        torch.set_num_threads(1)
    print(f"{device_name(device)}, torch {torch.__version__}: {len(chosen)} of {len(steps)} steps", flush=True)
    described = describe_device(device)
    if device.type == "cuda":
        described |= {"matmul_tflops_bfloat16": round(matmul_tflops(device), 1), "clocks": query_gpu(*CLOCKS)}
    if args.processor_time:
        described |= {"threads": 1, "timing": "processor time, 1 thread"}
    command = " ".join(["python -m common.gpu", *words]).replace(str(args.output), "DIR")
    origin = results.Origin(
        results.now(), results.current_commit(root), described, command, part=args.name, rehearsal=args.rehearse
    )
    clock = time.process_time if args.processor_time else time.perf_counter
    job = Job(args.output / f"{args.name}.json", origin, device, args.rounds, args.batch_size, clock, root)
    failed = []
    for step in chosen:
        left_s = args.budget_s - (time.perf_counter() - begin)
        if left_s < 5:
            job.left_out.append(f"{step.name}: the budget of {args.budget_s:g} s was spent")
        elif not job.do(step, left_s):
            failed.append(step.name)
    job.write()
    print(f"{time.perf_counter() - begin:.0f} s, {len(job.records)} records in {job.path}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0
