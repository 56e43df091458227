"""Compare the course of a run with the facts of the logs that the UVC release publishes.

    python uvc/compare_logs.py RUN --against deit-tiny
    python uvc/compare_logs.py RUN --against deit-small-stage2 --plot course.png

RUN is the folder of a run (with log.jsonl), that file, or a text log in the form of the published ones. A run is judged
by its mechanism, not by the single numbers of the curve: what is checked is listed by name. The last line says how many
of the checks hold.
"""

import argparse
import json
import re
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.plots import Figure, Series, draw
from common.run import program
from common.run.cli import make_parser
from common.run.errors import UsageError
from common.run.files import check_output, write_atomic
from uvc.flags import share

STAGE2 = "deit-small-stage2"


@dataclass(frozen=True)
class Epoch:
    """What a log says after an epoch; None where it does not say. ``epoch`` counts from 1; 0 is before any."""

    epoch: int
    top1_percent: float
    loss: float | None = None
    kept_percent: float | None = None
    expected_percent: float | None = None
    real_percent: float | None = None
    blocks: float | None = None
    step: int | None = None


@dataclass(frozen=True)
class PublishedLog:
    """A log of the release; of stage 2 the courses of the cost are not known."""

    file: str
    epochs: tuple[Epoch, ...]
    budget: float = 0.5
    warmup_epochs: int = 0
    final_blocks: float | None = None
    note: str = ""


def read_published() -> dict[str, PublishedLog]:
    """The logs of ``published_logs.toml`` by the names of ``--against``."""
    facts = tomllib.loads(Path(__file__).with_name("published_logs.toml").read_text(encoding="utf-8"))
    logs = {}
    for name, log in facts["stage1"].items():
        epochs = tuple(
            Epoch(epoch, top1, loss, kept, expected, real, step=step)
            for epoch, step, loss, top1, kept, expected, real in log["epochs"]
        )
        keys = ("file", "budget", "warmup_epochs", "final_blocks", "note")
        logs[name] = PublishedLog(epochs=epochs, **{key: log[key] for key in keys})
    stage2 = facts["stage2"]["deit-small"]
    validations = sorted([*stage2["validations"], stage2["best"]])
    return logs | {STAGE2: PublishedLog(stage2["file"], tuple(Epoch(number, top1) for number, top1 in validations))}


PUBLISHED = read_published()


@dataclass(frozen=True)
class Check:
    """One statement about a run, whether it holds, and what it was judged by."""

    name: str
    holds: bool
    found: str


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder with log.jsonl, that file, or a text log")
    parser.add_argument(
        "--against", required=True, choices=list(PUBLISHED), help="published log; the last one is of stage 2"
    )
    parser.add_argument("--budget", type=share, help="budget of the run (default: as its log says, else the log's)")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw both courses")
    return parser.parse_args(argv)


LOGGED = {
    "top1_percent": "test_top1_percent", "loss": "test_loss", "kept_percent": "test_kept_parameters_percent",
    "expected_percent": "test_expected_cost_percent", "real_percent": "test_remaining_cost_percent",
    "blocks": "test_blocks_running",
}  # fmt: skip
"""What ``log.jsonl`` calls the fields of an epoch."""


def read_run(path: Path) -> tuple[list[Epoch], dict[str, Any]]:
    """Epochs of a run and the arguments it was started with, where its log holds them.

    Raises:
        UsageError: there is no such file, or it holds no epoch.
    """
    file = path / "log.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{file}: no such file; name the folder of a run, its log.jsonl, or a text log")
    text = file.read_text(encoding="utf-8", errors="replace")
    epochs, arguments = read_jsonl(text) if file.suffix == ".jsonl" else (read_text_log(text), {})
    if not epochs:
        raise UsageError(f"{file}: it says nothing about any epoch; has the run validated yet?")
    return epochs, arguments


def read_jsonl(text: str) -> tuple[list[Epoch], dict[str, Any]]:
    """Epochs and arguments of a log of ours."""
    epochs: list[Epoch] = []
    arguments: dict[str, Any] = {}
    for line in text.splitlines():
        try:
            row: Any = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            continue  # half a line, of a run killed while writing it
        event = row.get("event") if isinstance(row, dict) else None
        if event == "start":
            arguments = row.get("arguments", {})
        if event == "epoch" and row.get("test_top1_percent") is not None:
            values: dict[str, Any] = {name: row.get(logged) for name, logged in LOGGED.items()}
            epochs.append(Epoch(row["epoch"] + 1, **values))
    return epochs, arguments


PRINTED = re.compile(
    r"Valid Loss: (?P<loss>[\d.]+)|Valid Accuracy: (?P<top1>[\d.]+)"
    r"|\[Validation Sparsity\|Step \d+\|Epoch (?P<epoch>\d+)\]|Parameter size: .*? = (?P<kept>[\d.]+)\s*%"
    r"|Expectation FLOPs: (?P<expected>[\d.]+)\s*% Real FLOPs: (?P<real>[\d.]+)\s*%"
)
"""What a validation prints, from its loss to its cost."""


def read_text_log(text: str) -> list[Epoch]:
    """Epochs of a log in the published form, in which progress bars may lie between the lines.

    A log of stage 2 states no cost: its first validation is before training, and top-1 may be a fraction.
    """
    epochs: dict[int, Epoch] = {}
    said: dict[str, float] = {}
    for found in PRINTED.finditer(text):
        new = {name: float(value) for name, value in found.groupdict().items() if value}
        said = new if "loss" in new else said | new
        if "real" in new and "top1" in said and (number := int(said.get("epoch", 0))):
            cost = said["expected"], said["real"]
            epochs[number] = Epoch(number, said["top1"], said.get("loss"), said.get("kept"), *cost)
    if epochs:
        return list(epochs.values())
    top1 = [float(number) for number in re.findall(r"Valid Accuracy: (\d*\.?\d+)", text)]
    factor = 100 if top1 and max(top1) <= 1 else 1
    return [Epoch(number, factor * value) for number, value in enumerate(top1)]


def check_stage1(run: Sequence[Epoch], log: PublishedLog, *, budget: float, warmup_epochs: int) -> list[Check]:
    """What the published courses have in common, of a run."""
    warm = [epoch for epoch in run if epoch.epoch <= warmup_epochs]
    later = [epoch for epoch in run if epoch.epoch > warmup_epochs]
    checks: list[Check] = []

    def add(name: str, holds: bool, found: str) -> None:
        checks.append(Check(name, holds, found))

    if warm and all(epoch.kept_percent is not None for epoch in warm):
        least = min(epoch.kept_percent or 0.0 for epoch in warm)
        add("nothing is pruned during the warm-up", least == 100, f"at least {least:.2f} % of the mask elements kept")
    if not later:
        add("the run went beyond the warm-up", False, f"{len(run)} epochs, {warmup_epochs} of warm-up")
        return checks
    real = [epoch.real_percent for epoch in later if epoch.real_percent is not None]
    if real:
        add("the cost comes down to the budget", min(real) <= 100 * budget, f"lowest {min(real):.2f} %")
        settled = abs(real[-1] - 100 * budget) <= 12.5
        add("the cost ends within one block and a half of the budget", settled, f"last {real[-1]:.2f} %")
    together = [(e.expected_percent, e.real_percent) for e in later if e.expected_percent and e.real_percent]
    if together:
        gap = abs(together[-1][0] - together[-1][1])
        add("soft and hard cost agree at the end", gap <= 12.5, f"{gap:.2f} points apart")
    if warm:
        drop = warm[-1].top1_percent - min(epoch.top1_percent for epoch in later)
        add("accuracy falls when pruning starts", drop > 0, f"by {drop:.2f} points at the most")
        low = min(range(len(later)), key=lambda index: later[index].top1_percent)
        gain = later[-1].top1_percent - later[low].top1_percent
        add("and recovers afterwards", gain > 0, f"{gain:.2f} points from its lowest")
    if later[-1].blocks is not None:
        add("some blocks still run", later[-1].blocks > 0, f"{later[-1].blocks:g}; {log.final_blocks} in the log")
    return checks


def check_stage2(run: Sequence[Epoch]) -> list[Check]:
    """What the published fine-tuning shows, of a run."""
    top1 = [epoch.top1_percent for epoch in run if epoch.epoch > 0] or [epoch.top1_percent for epoch in run]
    best = max(top1)
    return [
        Check("accuracy rises over the first epochs", len(top1) < 2 or max(top1[1:8]) > top1[0],
              f"{top1[0]:.2f} % after the first, {max(top1[:8]):.2f} % within eight"),
        Check("the end is within half a point of the best", best - top1[-1] <= 0.5, f"{best - top1[-1]:.2f} points"),
    ]  # fmt: skip


COURSES = {
    "top-1 (%)": "top1_percent", "masks kept (%)": "kept_percent", "expected cost (%)": "expected_percent",
    "real cost (%)": "real_percent",
}  # fmt: skip
"""What is set side by side, by title."""


def courses_of(log: PublishedLog) -> dict[str, str]:
    """The courses that a published log tells."""
    return {title: name for title, name in COURSES.items() if getattr(log.epochs[0], name) is not None}


def print_courses(run: Sequence[Epoch], log: PublishedLog) -> None:
    """Both courses side by side."""

    def cell(epoch: Epoch | None, name: str) -> str:
        value = getattr(epoch, name, None)
        return f"{value:8.2f}" if value is not None else f"{'-':>8}"

    courses, own = courses_of(log), {epoch.epoch: epoch for epoch in run}
    published = {epoch.epoch: epoch for epoch in log.epochs}
    if len(courses) > 1:
        print(f"{'':>5} " + " ".join(f"{title:^17}" for title in courses))
    print("epoch" + f" {'run':>8} {'log':>8}" * len(courses))
    for number in sorted(own | published):
        pair = own.get(number), published.get(number)
        print(f"{number:>5} " + " ".join(cell(epoch, name) for name in courses.values() for epoch in pair))


def draw_courses(run: Sequence[Epoch], log: PublishedLog) -> bytes:
    """Accuracy and, for stage 1, remaining cost of the run and of the published log, as a PNG."""
    panels: dict[str, list[Series]] = {}
    for title, name in courses_of(log).items():
        if name in ("top1_percent", "real_percent"):
            panels[title] = [Series("published log", kind="published"), Series("this run")]
            for line, epochs in zip(panels[title], (log.epochs, run), strict=True):
                known = [epoch for epoch in epochs if getattr(epoch, name) is not None]
                line.x, line.y = [epoch.epoch for epoch in known], [getattr(epoch, name) for epoch in known]
    return draw(Figure("courses", f"A run and {log.file}", "epoch", "percent", panels), "png")[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; the exit status is 1 if a check does not hold."""
    args = parse_args(argv)
    check_output(args.plot, inputs=[args.run])
    run, arguments = read_run(args.run)
    log = PUBLISHED[args.against]
    print_courses(run, log)
    if args.against == STAGE2:
        checks = check_stage2(run)
    else:
        budget = args.budget if args.budget is not None else float(arguments.get("budget", log.budget))
        warmup = int(arguments.get("warmup_epochs", log.warmup_epochs))
        if arguments.get("enable_warmup") is False and not arguments.get("official"):
            warmup = 0
        checks = check_stage1(run, log, budget=budget, warmup_epochs=warmup)
        print(f"{log.file}: {log.note}")
    for check in checks:
        print(f"{'holds ' if check.holds else 'FAILS '} {check.name}: {check.found}")
    if args.plot:
        write_atomic(args.plot, draw_courses(run, log))
        print(f"drawn: {args.plot}")
    print(f"{sum(check.holds for check in checks)} of {len(checks)} checks hold")
    return 0 if all(check.holds for check in checks) else 1


if __name__ == "__main__":
    sys.exit(program.run(main))
