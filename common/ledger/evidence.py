"""Each paper's claims on real images, measured seed by seed, with intervals and a verdict by a rule fixed beforehand.

    python -m common.evidence [PAPER ...] [--seeds 5] [--jobs 2] [--device auto]     # the long form; resumes run by run
    python -m common.evidence --show                                                 # the table of what is recorded

``<paper>/tables/claims.toml`` says what is claimed and what is compared; ``<paper>/evidence.py`` has ``RUNS``, what is
trained and measured for one seed; ``<paper>/results/evidence/seed-N.json`` keeps what came out. Both sides of a
comparison see the same seed and the same order of images; no seed is left out.

A comparison is *shown* where the 95 % interval of its mean difference (paired t) lies above zero, *refuted here* where
it lies below, *open* where it contains zero.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import os
import shutil
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from common.ledger.reading import Reader, not_empty
from common.ledger.results import Origin, current_commit, now
from common.ledger.tables import OwnTable, TableError
from common.ledger.text import own_text
from common.ledger.view import markdown_table
from common.plots import Figure, Series
from common.run.files import ROOT, check_output, write_atomic
from common.run.flags import make_parser, positive_int

CONFIDENCE = 0.95
POWER = 0.8
"""of the smallest effect that is told beside an open comparison"""
NOT_MEASURED = "not measured yet"
VERDICTS = ("shown", "open", "refuted here", NOT_MEASURED)
LIVE_SEED = 1000
"""of live runs: not among those that are recorded"""

Arms = Mapping[str, Mapping[str, float]]
"""What a run measured: side of a comparison -> metric -> value."""


@dataclass(frozen=True)
class Job:
    """One seed of one paper."""

    seed: int
    folder: Path
    """of what is trained for this seed"""
    device: str = "cpu"


@dataclass(frozen=True)
class Run:
    """Something trained or measured for every seed; later runs may use the files of earlier ones.

    Args:
        settings: what decides the outcome besides the seed; where it changes, the run is done again.
    """

    settings: str
    measure: Callable[[Job], Arms]


def mixture(cheap: Mapping[str, float], dear: Mapping[str, float], mmacs: float) -> dict[str, float]:
    """What two settings reach that are each taken for a part of the images, so that the mean cost is ``mmacs``."""
    part = (mmacs - cheap["mmacs"]) / max(dear["mmacs"] - cheap["mmacs"], 1e-12)
    return {key: (1 - part) * value + part * dear[key] for key, value in cheap.items()}


@dataclass(frozen=True)
class Comparison:
    """Two sides; several names of one side are averaged."""

    label: Annotated[str, not_empty]
    arm: Annotated[Sequence[str], not_empty]
    against: Annotated[Sequence[str], not_empty]
    metric: str = "top1_percent"
    unit: str = "points"


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper, and what is compared here."""

    id: Annotated[str, not_empty]
    claim: Annotated[str, not_empty]
    source: Annotated[str, not_empty]
    published: Annotated[str, not_empty]
    """the effect that the paper reports"""
    measured: Annotated[str, not_empty]
    """what is measured here, and on what"""
    comparisons: Sequence[Comparison] = ()
    note: str = ""
    """said beside what came out, for instance the likely reason"""
    paper: str = ""


@dataclass(frozen=True)
class Finding:
    """One comparison over the seeds."""

    comparison: Comparison
    differences: Sequence[float]
    mean: float
    low: float
    high: float
    """95 % interval of the mean by the paired t distribution"""
    boot: tuple[float, float]
    """the same by the bootstrap over seeds (percentiles)"""
    smallest: float
    """difference that this many seeds with this spread show with a probability of 80 %"""
    means: tuple[float, float]
    """of the two sides"""

    @property
    def intervals(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """By the paired t distribution, and by the bootstrap."""
        return (self.low, self.high), self.boot

    @property
    def verdict(self) -> str:
        return "shown" if self.low > 0 else "refuted here" if self.high < 0 else "open"


def load_claims(paper: str, *, root: Path = ROOT) -> tuple[Claim, ...]:
    """The claims of a paper.

    Raises:
        TableError: naming file, claim and key.
    """
    path = root / paper / "tables" / "claims.toml"
    if not path.is_file():
        raise TableError(f"{paper} has no claims: {path} is missing; those that have some are {list(papers(root))}")
    try:
        content = tomllib.loads(path.read_text())
    except (RecursionError, ValueError) as error:
        raise TableError(f"{path}: {error}") from error
    reader, sections = Reader(lambda text: TableError(f"{path}: {text}")), Sequence[Mapping[str, Any]]
    claims = []
    for number, entry in enumerate(reader.value(content.get("claims", []), sections, "claims")):
        where = f"claim {entry.get('id', number)!r}"
        found = reader.value(entry.pop("comparisons", []), sections, f"{where}: comparisons")
        rows = [reader.section(Comparison, row, where) for row in found]
        claims.append(reader.section(Claim, entry, where, paper=paper, comparisons=tuple(rows)))
    return tuple(claims)


def papers(root: Path = ROOT) -> tuple[str, ...]:
    """Those that have claims."""
    return tuple(sorted(path.parent.parent.name for path in root.glob("*/tables/claims.toml")))


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def record_file(paper: str, seed: int, *, root: Path = ROOT) -> Path:
    return root / paper / "results" / "evidence" / f"seed-{seed}.json"


def measure_seed(
    paper: str, seed: int, *, device: str, folder: Path, again: bool = False, verbose: bool = False, root: Path = ROOT
) -> Path:
    """Do the runs of one seed that are not recorded yet, each kept as soon as it is done."""
    import torch

    from common.measure.benchmark import describe_device

    runs: Mapping[str, Run] = importlib.import_module(f"{paper}.evidence").RUNS
    path = record_file(paper, seed, root=root)
    known = json.loads(path.read_text())["runs"] if path.is_file() else {}
    place = folder / paper / f"seed-{seed}"
    for name, run in runs.items():
        if not again and known.get(name, {}).get("settings") == run.settings:
            continue
        say(f"{paper} seed {seed}: {name}")
        started = time.perf_counter(), time.process_time()
        arms = _measure(run, Job(seed, place, device), verbose)
        seconds = {"wall": time.perf_counter() - started[0], "processor": time.process_time() - started[1]}
        origin = Origin(now(), current_commit(), describe_device(torch.device(device)), f"{paper} seed {seed}")
        known[name] = {
            "settings": run.settings,
            "arms": arms,
            "seconds": {clock: round(value, 1) for clock, value in seconds.items()},
            **{key: asdict(origin)[key] for key in ("created", "commit", "device")},
        }
        write_atomic(path, json.dumps({"paper": paper, "seed": seed, "runs": known}, indent=1) + "\n")
        say(f"{paper} seed {seed}: {name} took {seconds['wall']:.0f} s; {_shown(arms)}")
    return path


def _shown(arms: Arms) -> str:
    return ", ".join(f"{arm} {values['top1_percent']:.2f}" for arm, values in arms.items() if "top1_percent" in values)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _prepare(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------------------
# What came out


def recorded(paper: str, *, root: Path = ROOT) -> dict[int, dict[str, dict[str, float]]]:
    """Seed -> arm -> metric -> value, of all records of a paper.

    Raises:
        TableError: for a file that does not hold what it should.
    """
    found = {}
    for path in sorted(record_file(paper, 0, root=root).parent.glob("seed-*.json")):
        try:
            content = json.loads(path.read_text())
            arms = {
                arm: {metric: float(value) for metric, value in values.items()}
                for run in content["runs"].values()
                for arm, values in run["arms"].items()
            }
            found[int(content["seed"])] = arms
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise TableError(
                f"{path} is no record of evidence ({type(error).__name__}: {error}): delete it, and measure again"
            ) from error
    return found


def judge(comparison: Comparison, seeds: Mapping[int, Mapping[str, Mapping[str, float]]]) -> Finding | None:
    """One comparison over the seeds that measured both sides; None below two of them."""
    import numpy as np
    from scipy import stats

    def side(arms: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> float | None:
        values = [arms.get(name, {}).get(comparison.metric) for name in names]
        return None if None in values else float(np.mean([value for value in values if value is not None]))

    pairs = [(side(arms, comparison.arm), side(arms, comparison.against)) for arms in seeds.values()]
    both = np.array([pair for pair in pairs if None not in pair], dtype=float).reshape(-1, 2)
    if len(both) < 2:
        return None
    differences = both[:, 0] - both[:, 1]
    count = len(differences)
    error = differences.std(ddof=1) / count**0.5
    mean, reach = float(differences.mean()), float(stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1) * error)
    power = float(stats.t.ppf(POWER, count - 1) * error)
    drawn = np.random.default_rng(0).choice(differences, (10_000, count)).mean(axis=1)
    edges = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    means = both.mean(axis=0)
    return Finding(
        comparison, tuple(differences.tolist()), mean, mean - reach, mean + reach, (float(edges[0]), float(edges[1])),
        reach + power, (float(means[0]), float(means[1])),
    )  # fmt: skip


def claims_table(paper: str, *, root: Path = ROOT) -> OwnTable:
    """A paper's claims with a row per comparison, and the figure of what was measured.

    Raises:
        TableError: of its claims or records.
    """
    seeds = recorded(paper, root=root)
    groups: dict[str, list[list[str]]] = {}
    for claim in load_claims(paper, root=root):
        said = f"{claim.claim} ({claim.source}: {claim.published}). {claim.measured} {claim.note}".rstrip()
        for comparison in claim.comparisons:
            cells = ["", "", "", "", "", NOT_MEASURED]
            if finding := judge(comparison, seeds):
                digits = 1 if comparison.metric.endswith("_percent") else 3
                cells = [
                    " / ".join(f"{mean:.{digits}f}" for mean in finding.means),
                    f"{finding.mean:+.{digits + 1}f} {comparison.unit}".rstrip(),
                    *(f"{low:+.{digits + 1}f} to {high:+.{digits + 1}f}" for low, high in finding.intervals),
                    str(len(finding.differences)),
                    finding.verdict + f"; {finding.smallest:.2g} could have been seen" * (finding.verdict == "open"),
                ]
            groups.setdefault(said, []).append([comparison.label, *cells])
    columns = ("compared here", "means", "difference", "95 % interval", "bootstrap", "seeds", "verdict")
    return OwnTable(paper, "claims", "claims, on Fashion-MNIST", columns, groups, figure=figure(paper, root=root))


def claims_summary(papers: Iterable[str], *, root: Path = ROOT) -> str:
    """Markdown: a row per claim of some papers, with how its comparisons came out."""
    rows = []
    for paper in papers:
        seeds = recorded(paper, root=root)
        for claim in load_claims(paper, root=root):
            found = [judge(comparison, seeds) for comparison in claim.comparisons]
            counts = Counter(finding.verdict if finding else NOT_MEASURED for finding in found)
            verdicts = ", ".join(f"{counts[word]} {word}" for word in VERDICTS if counts[word])
            rows.append([f"[{paper}]({paper}/README.md)", claim.claim, verdicts])
    return "\n".join(markdown_table(["Paper", "Claim", "Comparisons on Fashion-MNIST"], rows, left=3))


def predicted(values: Sequence[float]) -> tuple[float, float]:
    """Where one more seed comes out in 95 % of cases, by the t distribution; of at least two values."""
    import numpy as np
    from scipy import stats

    spread = float(np.std(values, ddof=1)) * (1 + 1 / len(values)) ** 0.5
    reach = spread * float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1))
    return float(np.mean(values)) - reach, float(np.mean(values)) + reach


def live_table(paper: str, arms: Arms, seconds: float, *, root: Path = ROOT) -> OwnTable:
    """A live run beside what the recorded seeds lead to expect."""
    seeds = recorded(paper, root=root).values()
    rows = []
    for arm, values in arms.items():
        for metric, value in values.items():
            known = [found[arm][metric] for found in seeds if metric in found.get(arm, {})]
            cells = ["not recorded yet", ""]
            if len(known) > 1:
                low, high = predicted(known)
                cells = [f"{low:.2f} to {high:.2f}", "" if low - 5e-3 <= value <= high + 5e-3 else "OUTSIDE"]
            name = f"{arm.removeprefix('live: ')}, {metric.replace('_', ' ')}"
            rows.append([name, f"{value:.2f}", *cells])
    columns = ("trained, evaluated and exported now", "this run", f"recorded ({len(seeds)} seeds)", "")
    note = (
        f"Seed {LIVE_SEED}, {seconds:.0f} s. In 95 % of cases another seed comes out within the interval, so about one "
        "number in twenty does not."
    )
    return OwnTable(paper, "live", "a live run", columns, {"": rows}, (note,))


def live(paper: str, *, device: str, folder: Path, verbose: bool = False) -> tuple[Arms, float] | None:
    """Do a paper's short run anew, with a seed that is not recorded; None if it has none.

    Returns:
        What was measured, and the seconds that it took.
    """
    if importlib.util.find_spec(f"{paper}.evidence") is None:
        return None
    runs: Mapping[str, Run] = importlib.import_module(f"{paper}.evidence").RUNS
    if "live" not in runs:
        return None
    shutil.rmtree(folder, ignore_errors=True)
    say(f"{paper}: training, evaluating and exporting")
    started = time.perf_counter()
    arms = _measure(runs["live"], Job(LIVE_SEED, folder, device), verbose)
    return arms, time.perf_counter() - started


def _measure(run: Run, job: Job, verbose: bool) -> Arms:
    """Do a run; what its programs print is kept from the screen, and the last of it told if they fail."""
    if verbose:
        return run.measure(job)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            return run.measure(job)
    except (Exception, SystemExit):
        say("\n".join(["a program failed; it said last:", *printed.getvalue().splitlines()[-20:]]))
        raise


def figure(paper: str, *, root: Path = ROOT) -> Figure:
    """Top-1 against executed MACs, mean over the seeds: a line for each family of arms called ``family: setting``."""
    import numpy as np

    seeds = recorded(paper, root=root).values()
    series: dict[str, Series] = {}
    for arm in dict.fromkeys(arm for arms in seeds for arm in arms):
        family, colon, _ = arm.partition(": ")
        found = [arms[arm] for arms in seeds if {"mmacs", "top1_percent"} <= arms.get(arm, {}).keys()]
        if found and (colon or arm == "dense") and family != "live":
            line = series.setdefault(family, Series(family, baseline=arm == "dense"))
            mean = [float(np.mean([values[key] for values in found])) for key in ("mmacs", "top1_percent")]
            line.add((mean[0], mean[1]), "dense" if arm == "dense" else "")
    title = f"{paper}: mean of {len(seeds)} networks trained on Fashion-MNIST"
    return Figure(
        f"{paper}-evidence", title, "millions of MACs", "top-1 accuracy (%)", {"": list(series.values())}, clip=True
    )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, prog="python -m common.evidence")
    parser.add_argument("paper", nargs="*", help="default: all that have claims")
    parser.add_argument("--seeds", type=positive_int, default=5, metavar="N", help="seeds 0 to N - 1 (default: 5)")
    cores = os.cpu_count() or 1
    parser.add_argument(
        "--jobs", type=positive_int, default=cores, metavar="N", help="seeds at a time (default: cores)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / ".cache" / "leanvit" / "evidence", help="of what is trained"
    )
    parser.add_argument("--force", action="store_true", help="measure again what is recorded")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    parser.add_argument(
        "--output", type=Path, metavar="FILE",
        help="measure all of it, whatever is recorded, and write it to this file instead, after every seed",
    )  # fmt: skip
    parser.add_argument("-v", "--verbose", action="store_true", help="show what the training programs print")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is not recorded yet, and print the table."""
    args = parse_args(argv)
    check_output(args.output)
    chosen = args.paper or papers()
    for paper in chosen:
        load_claims(paper)
    if not args.show:
        from common.run.launch import choose_device

        device = str(choose_device(args.device))
        jobs = 1 if device != "cpu" else min(args.jobs, args.seeds)
        threads = max((os.cpu_count() or 1) // jobs, 1)
        with contextlib.ExitStack() as stack:
            apart = Path(stack.enter_context(TemporaryDirectory())) if args.output else ROOT
            pool = stack.enter_context(ProcessPoolExecutor(jobs, get_context("spawn"), _prepare, (threads,)))
            options: dict[str, Any] = {
                "device": device,
                "folder": args.folder,
                "again": args.force,
                "verbose": args.verbose,
                "root": apart,
            }
            waiting = [
                pool.submit(measure_seed, paper, seed, **options) for seed in range(args.seeds) for paper in chosen
            ]
            for done in as_completed(waiting):
                done.result()
                if args.output:
                    files = sorted(apart.glob("*/results/evidence/seed-*.json"))
                    write_atomic(args.output, json.dumps([json.loads(file.read_text()) for file in files]) + "\n")
        if args.output:
            print(f"{len(waiting)} seeds are in {args.output}; what is recorded here is as before")
            return 0
    for paper in chosen:
        print(f"\n{own_text(claims_table(paper))}")
    return 0
